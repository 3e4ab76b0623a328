"""Who may call, and what: the token file, scopes, pools, expiry, and the line that every change leaves in the audit log."""

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from conftest import Json, Serve, Service, finished, launch_body, launched, local_pool, problem, read, until
from test_api_gate import GUARDED

from app.errors import ConfigurationError
from app.tokens import load_tokens

FOREVER = "sleep 1000"
HEARTBEAT = "/runners/runner-000000000000/heartbeat"


def entry(name: str, *scopes: str, **more: Any) -> Json:  # noqa: ANN401 - what a file may say
    """Write an entry for a token that is its name."""
    digest = hashlib.sha256(name.encode()).hexdigest()
    return {"name": name, "sha256": digest, "scopes": list(scopes or ("launch", "read", "stop", "admin")), **more}


def write(path: Path, *entries: Json) -> Path:
    path.write_text(yaml.safe_dump(list(entries)))
    return path


def as_(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(
        tmp_path / "tokens.yaml",
        entry("all"),
        entry("launcher", "launch"),
        entry("reader", "read"),
        entry("stopper", "stop"),
        entry("expired", expires="2020-01-01"),
        entry("later", expires="2999-01-01T00:00:00+02:00"),
        entry("local-only", pools=["local"]),
    )


@pytest.fixture
async def client(service: Service, file: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with service({"local": local_pool(), "other": local_pool()}, tokens_file=file) as client:
        yield client


# Every route.


@pytest.mark.parametrize(("method", "path"), GUARDED)
async def test_every_call_denies_who_is_expired_or_lacks_the_scope_or_comes_from_elsewhere(
    client: httpx.AsyncClient, method: str, path: str
) -> None:
    async def status(**headers: str) -> int:
        return (await client.request(method, path, headers=headers)).status_code

    assert await status(**as_("expired")) == 401
    assert await status(**as_("nobody")) == 401
    assert await status(Authorization="") == 401
    scope = {"GET": "reader", "HEAD": "reader", "DELETE": "stopper"}.get(method, "launcher" if path == "/runners" else "")
    scope = "" if path.startswith("/webhooks") else scope  # which is an admin's business
    refused = 401 if path == HEARTBEAT else 403
    for name in ("launcher", "reader", "stopper"):
        answer = await status(**as_(name))
        assert (answer == refused) == (name != scope), name
    beats = path == HEARTBEAT  # which a runner sends by the name that its pool has for us
    assert await status(**as_("all"), Host="evil.example") == (401 if beats else 403)
    assert await status(**as_("all"), Origin="https://evil.example") == 403


async def test_a_token_is_for_so_many_calls_a_second(service: Service, tmp_path: Path) -> None:
    file = write(tmp_path / "tokens.yaml", entry("slow", rate=2), entry("free"))
    async with service(tokens_file=file) as client:
        answers = [await client.get("/pools", headers=as_("slow")) for _ in range(6)]
        refused = [answer for answer in answers if answer.status_code != 200]
        assert 3 <= len(refused) <= 4  # two at once, and maybe one more while these were made
        said = problem(refused[-1], 429, "too-many-calls", words="the token of slow is for 2 calls a second")
        assert said["retryable"]
        assert int(refused[-1].headers["Retry-After"]) == 1
        assert (await client.get("/pools", headers=as_("free"))).status_code == 200

        async def let_in() -> bool:
            return (await client.get("/pools", headers=as_("slow"))).status_code == 200

        await until(let_in)


async def test_what_lacks_is_said(client: httpx.AsyncClient, slot: Path) -> None:
    problem(await client.get("/runners", headers=as_("expired")), 401, "unauthenticated", words="has expired")
    answer = await client.post("/runners", json=launch_body(slot), headers=as_("reader"))
    problem(answer, 403, "scope-missing", words="the token of reader has no scope launch")


# Scopes.


async def test_each_may_do_what_its_scopes_say(client: httpx.AsyncClient, slot: Path) -> None:
    answer = await client.post("/runners", json=launch_body(slot, FOREVER), headers=as_("launcher"))
    assert answer.status_code == 201
    path = answer.headers["Location"]
    assert (await client.get(path, headers=as_("reader"))).status_code == 200
    assert (await client.get(path, headers=as_("later"))).status_code == 200
    problem(await client.delete(f"{path}?force=true", headers=as_("stopper")), 403, "scope-missing", words="scope admin")
    assert (await client.delete(path, headers=as_("stopper"))).status_code in {200, 202}
    ended = await finished(client, answer.json())
    assert ended["message"] == "stopped by stopper"
    problem(await client.patch("/pools/local", json={"enabled": False}, headers=as_("stopper")), 403, "scope-missing")
    assert (await client.patch("/pools/local", json={"enabled": True}, headers=as_("all"))).status_code == 200


async def test_an_idempotency_key_is_its_callers_alone(client: httpx.AsyncClient, slot: Path) -> None:
    key = {"Idempotency-Key": "k"}
    first = await client.post("/runners", json=launch_body(slot), headers={**key, **as_("launcher")})
    body = launch_body(slot.with_name("slot-2"))
    second = await client.post("/runners", json=body, headers={**key, **as_("all")})
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json()["runner_id"] != second.json()["runner_id"]


# Pools.


async def test_who_is_for_some_pools_sees_and_touches_nothing_of_others(client: httpx.AsyncClient, slot: Path) -> None:
    mine = as_("local-only")
    seen = await launched(client, launch_body(slot, FOREVER))
    hidden = await launched(client, launch_body(slot.with_name("slot-2"), FOREVER, pool="other"))
    assert [each["runner_id"] for each in (await client.get("/runners", headers=mine)).json()["items"]] == [
        seen["runner_id"]
    ]
    listed = await client.get("/runners", params={"pool": "other"}, headers=mine)
    assert listed.json()["items"] == []
    for path in ("", "/logs", "/events", "/diagnosis"):
        assert (await client.get(seen["links"]["self"] + path, headers=mine)).status_code == 200
        problem(await client.get(hidden["links"]["self"] + path, headers=mine), 404, "not-found")
        problem(await client.get(f"/runners/{hidden['runner_id'][:-1]}{path}", headers=mine), 404, "not-found")
    problem(await client.delete(hidden["links"]["self"], headers=mine), 404, "not-found")
    assert [pool["pool_name"] for pool in (await client.get("/pools", headers=mine)).json()["items"]] == ["local"]
    problem(await client.get("/pools/other", headers=mine), 404, "not-found")
    problem(await client.patch("/pools/other", json={"enabled": False}, headers=mine), 404, "not-found")
    events = (await client.get("/events", headers=mine)).json()
    assert {event["pool_name"] for event in events["items"]} == {"local"}
    assert events["revision"] == (await client.get("/events")).json()["revision"]
    (engine,) = (await client.get("/engines", headers=mine)).json()["items"]
    assert engine["pools"] == ["local"]
    problem(await client.get("/metrics", headers=mine), 403, "pool-not-permitted")


async def test_who_is_for_some_pools_launches_in_no_other(service: Service, file: Path, slot: Path) -> None:
    async with service({"local": local_pool(), "other": local_pool()}, tokens_file=file, allow_inline_pools=True) as client:
        mine = as_("local-only")
        inline = {"name": "mine", "type": "local-process"}
        for pool in ("other", {"name": "other"}, inline):
            for query in ("", "?dry_run=true"):
                answer = await client.post(f"/runners{query}", json=launch_body(slot, pool=pool), headers=mine)
                problem(answer, 403, "pool-not-permitted", "/pool")
        assert (await client.post("/runners", json=launch_body(slot), headers=mine)).status_code == 201
        holder = await launched(client, launch_body(slot.with_name("slot-2"), FOREVER, pool="other"))
        answer = await client.post("/runners", json=launch_body(slot.with_name("slot-2"), FOREVER), headers=mine)
        assert "runner" not in problem(answer, 409, "slot-busy")
        await client.delete(holder["links"]["self"])


# The file.


async def test_a_changed_file_holds_at_once_and_a_wrong_one_changes_nothing(serve: Serve, tmp_path: Path) -> None:
    file = write(tmp_path / "tokens.yaml", entry("old", "read"))
    async with serve(TOKENS_FILE=str(file)) as running, httpx.AsyncClient(base_url=running.url) as client:

        async def status(name: str) -> int:
            return (await client.get("/runners", headers=as_(name))).status_code

        async def becomes(name: str, wanted: int) -> bool:
            return await status(name) == wanted

        assert await status("old") == 200
        write(file.with_suffix(".new"), entry("new", "read")).rename(file)
        await until(lambda: becomes("old", 401))
        assert await status("new") == 200
        file.write_text("- name: broken")
        await running.says("the tokens stay as they were")
        assert "sha256" in read(running.output)
        assert await status("new") == 200
        file.unlink()
        await until(lambda: read(running.output).count("the tokens stay as they were") == 2)
        assert await status("new") == 200
        assert await status(running.token) == 200
        write(file)
        await until(lambda: becomes("new", 401))
        assert await status(running.token) == 200


@pytest.mark.parametrize("accept", ["text/plain", "text/event-stream"])
@pytest.mark.parametrize("path", ["/events?follow=true", "{self}/logs?follow=true", "{self}/events?follow=true"])
async def test_a_stream_ends_with_the_token_that_asked_for_it(
    serve: Serve, tmp_path: Path, slot: Path, path: str, accept: str
) -> None:
    file = write(tmp_path / "tokens.yaml", entry("ann"))
    async with serve(TOKENS_FILE=str(file)) as running, running.client() as client:
        script = "echo before; until [ -e go ]; do sleep 0.05; done; echo after; sleep 99"
        runner = await launched(client, launch_body(slot, script))
        headers = {**as_("ann"), "Accept": accept}
        read_so_far = ""
        async with client.stream("GET", path.format(self=runner["links"]["self"]), headers=headers) as answer:
            assert answer.status_code == 200
            write(file)
            await running.says("the tokens were read again: 0")
            (slot / "go").touch()
            if "logs" not in path:
                await client.delete(runner["links"]["self"], params={"grace": 0})  # of which they would tell
            async with asyncio.timeout(20):
                async for piece in answer.aiter_text():
                    read_so_far += piece
        assert "the token is no longer good" in read_so_far
        assert "after" not in read_so_far
        assert "RunnerFailed" not in read_so_far
        assert "cancelled" not in read_so_far
        await client.delete(runner["links"]["self"], params={"grace": 0})


GOOD = entry("ann")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not YAML"),
        ("name: ann", "the file: "),
        (json.dumps([{**GOOD, "sha256": "abc"}]), "0.sha256: "),
        (json.dumps([{**GOOD, "scopes": []}]), "0.scopes: "),
        (json.dumps([{**GOOD, "scopes": ["everything"]}]), "0.scopes"),
        (json.dumps([{**GOOD, "token": "hush"}]), "0.token: "),
        (json.dumps([{**GOOD, "name": "admin"}]), "0.name: "),
        (json.dumps([{**GOOD, "name": "a\nb"}]), "0.name: "),
        (json.dumps([GOOD, {**GOOD, "expires": "soon"}]), "1.expires: "),
        (json.dumps([{**GOOD, "pools": "local"}]), "0.pools: "),
    ],
)
def test_a_wrong_file_is_refused_with_the_place_and_tells_no_token(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "tokens.yaml"
    file.write_text(text)
    with pytest.raises(ConfigurationError) as refused:
        load_tokens(file)
    assert f"{file}: {words}" in str(refused.value)
    assert "hush" not in str(refused.value)


async def test_a_wrong_file_stops_the_start(service: Service, tmp_path: Path) -> None:
    def start(file: Path) -> AbstractAsyncContextManager[httpx.AsyncClient]:
        return service(tokens_file=file)

    with pytest.raises(ConfigurationError, match=r"tokens\.yaml: No such file"):
        async with start(tmp_path / "tokens.yaml"):
            pass
    (tmp_path / "tokens.yaml").write_text("- {}")
    with pytest.raises(ConfigurationError, match=r"0\.name: Field required"):
        async with start(tmp_path / "tokens.yaml"):
            pass


@pytest.mark.parametrize(
    ("expires", "at"),
    [
        ("2027-01-01", 1798761600),
        ("2027-01-01T00:00:00Z", 1798761600),
        ("2027-01-01T02:00:00+02:00", 1798761600),
        ("2027-01-01 00:00:00", 1798761600),
        ('"2027-01-01"', 1798761600),
        ("null", None),
    ],
)
def test_an_expiry_without_a_zone_is_utc(tmp_path: Path, expires: str, at: float | None) -> None:
    file = tmp_path / "tokens.yaml"
    file.write_text(f"- {{name: ann, sha256: {GOOD['sha256']}, scopes: [read], expires: {expires}}}")
    assert [token.expires for token in load_tokens(file)] == [at]


# The audit log.


async def test_every_call_that_would_change_something_leaves_a_line(
    client: httpx.AsyncClient, slot: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "audit")
    answer = await client.post(
        "/runners", json=launch_body(slot, FOREVER), headers={**as_("launcher"), "X-Request-ID": "r1"}
    )
    path = answer.headers["Location"]
    await client.get(path)
    await client.delete(f"{path}?grace=0", headers={**as_("stopper"), "X-Request-ID": "r2"})
    await client.delete("/runners/%0Aforged", headers={**as_("expired"), "X-Request-ID": "r3"})
    await client.patch("/pools/local", json={}, headers={**as_("reader"), "X-Request-ID": "r4"})
    await client.post(f"{path}/heartbeat", headers={"X-Request-ID": "r5"})
    lines = [record.getMessage() for record in caplog.records if record.name == "audit"]
    assert lines == [
        f"launcher: POST /runners: 201 {path} (request r1)",
        f"stopper: DELETE {path}?grace=0: 202 (request r2)",
        "nobody known: DELETE /runners/\\nforged: 401 (request r3)",
        "reader: PATCH /pools/local: 403 (request r4)",
    ]
    assert all(record.levelno == logging.INFO for record in caplog.records if record.name == "audit")
