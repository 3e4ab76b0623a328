"""What every request passes: who asks, by which name, from where, with what kind of body and how much of it."""

import json
import re
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import Json, Serve, Service, finished, launch_body, launched, problem
from starlette.routing import BaseRoute, Route

from app.api import gate, page
from app.main import create_app
from app.settings import Settings

PROBES = ("/livez", "/readyz")
PAGE = ("/", "/page/page.css", "/page/icon.svg", "/page/page.js", "/page/fleet.js", "/page/service.js")
MEBIBYTE = 1024 * 1024


def calls() -> Iterator[tuple[str, str]]:
    """Every method of every route of the app, its own documentation included."""
    app = create_app(Settings.model_construct())
    described = {(method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods}
    plain = {(method, route.path) for route in _routes(app.routes) for method in route.methods or ()}
    for method, path in sorted(described | plain):
        yield method, re.sub(r"\{\w+\}", "runner-000000000000", path)


def _routes(routes: list[BaseRoute]) -> Iterator[Route]:
    for route in routes:
        if isinstance(route, Route):
            yield route
        yield from _routes(getattr(route, "routes", None) or [])


CALLS = list(calls())
GUARDED = [(method, path) for method, path in CALLS if path not in (*PROBES, *PAGE)]


def test_only_probes_and_the_page_itself_are_there_for_everybody() -> None:
    assert set(page.FILES) == set(PAGE)
    assert sorted({*PROBES, *PAGE}) == sorted(gate.OPEN)


@pytest.mark.parametrize("path", PAGE)
async def test_the_page_needs_no_token_and_answers_no_foreign_name(client: httpx.AsyncClient, path: str) -> None:
    assert (await anonymous(client, "GET", path)).status_code == 200
    assert (await anonymous(client, "HEAD", path)).status_code == 200
    problem(await client.get(path, headers={"Host": "evil.example"}), 403, "foreign-host")


def test_the_calls_tested_here_are_all_there_are() -> None:
    assert {"/runners", "/pools", "/docs", "/openapi.json", *PROBES} <= {path for _, path in CALLS}
    assert {"POST", "GET", "DELETE", "PATCH"} <= {method for method, _ in CALLS}


# Who asks.


@pytest.mark.parametrize(("method", "path"), GUARDED)
async def test_a_call_without_a_token_is_refused(client: httpx.AsyncClient, method: str, path: str) -> None:
    answer = await anonymous(client, method, path)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    if method != "HEAD":
        problem(answer, 401, "unauthenticated", words="a bearer token is needed")


async def anonymous(client: httpx.AsyncClient, method: str, path: str, **more: Any) -> httpx.Response:  # noqa: ANN401
    request = client.build_request(method, path, **more)
    del request.headers["Authorization"]
    return await client.send(request)


@pytest.mark.parametrize(("method", "path"), GUARDED)
async def test_a_call_with_a_wrong_token_is_refused(client: httpx.AsyncClient, method: str, path: str) -> None:
    answer = await client.request(method, path, headers={"Authorization": "Bearer guessed"})
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("path", PROBES)
async def test_a_probe_needs_no_token_and_minds_no_wrong_one(client: httpx.AsyncClient, path: str) -> None:
    assert (await anonymous(client, "GET", path)).status_code == 200
    assert (await client.get(path, headers={"Authorization": "Bearer guessed"})).status_code == 200


async def test_readiness_tells_which_engines_answer(client: httpx.AsyncClient, slot: Path) -> None:
    await finished(client, await launched(client, launch_body(slot)))
    ready = await client.get("/readyz")
    assert (ready.status_code, ready.json()) == (200, {"ready": True, "detail": None, "engines": {"local-process": True}})
    assert (await client.get("/readyz", params={"engine": "local-process"})).status_code == 200


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        "Basic {token}",
        "{token}",
        "Bearer {token}x",
        "Bearer x{token}",
        "Bearer {token} {token}",
        "Bearer " + "x" * 60_000,
        "Bearer \xff",
    ],
)
async def test_only_the_token_itself_is_the_token(client: httpx.AsyncClient, header: str) -> None:
    token = client.headers["Authorization"].split()[1]
    value = header.replace("{token}", token).encode("latin-1")
    answer = await client.get("/runners", headers=[(b"Authorization", value)])
    problem(answer, 401, "unauthenticated")
    assert token not in answer.text


async def test_the_scheme_may_be_written_in_any_case(client: httpx.AsyncClient) -> None:
    token = client.headers["Authorization"].split()[1]
    assert (await client.get("/runners", headers={"Authorization": f"bearer {token}"})).status_code == 200


async def test_a_path_that_is_not_there_is_refused_like_any_other(client: httpx.AsyncClient) -> None:
    problem(await client.get("/nothing/here", headers={"Authorization": ""}), 401, "unauthenticated")
    problem(await client.get("/nothing/here"), 404, "not-found")


async def test_a_wrong_method_is_told_which_are_right(client: httpx.AsyncClient) -> None:
    answer = await client.put("/runners/runner-000000000000", json={})
    problem(answer, 405, "method-not-allowed")
    assert answer.headers["Allow"] == "DELETE, GET"
    assert (await client.put("/pools/local", json={})).headers["Allow"] == "GET, PATCH"
    assert (await client.put("/docs", json={})).headers["Allow"]


async def test_head_is_answered_as_get_without_a_body(client: httpx.AsyncClient, slot: Path) -> None:
    runner = await finished(client, await launched(client, launch_body(slot, "echo hello")))
    for path in ("/runners", "/pools/local", "/livez", "/nothing", *runner["links"].values()):
        got, head = await client.get(path), await client.head(path)
        assert (head.status_code, head.content) == (got.status_code, b"")
        own = {"x-request-id", "etag", "content-length"}  # which tell of the moment too
        assert {*head.headers.items()} - {*got.headers.items()} <= {(name, head.headers.get(name, "")) for name in own}
    assert (await anonymous(client, "HEAD", "/runners")).status_code == 401


async def test_head_of_a_stream_ends(serve: Serve) -> None:
    async with serve() as running, running.client() as client:
        head = await client.head("/events", headers={"Accept": "text/event-stream"})
        assert head.headers["content-type"].startswith("text/event-stream")
        assert (await client.get("/livez")).status_code == 200  # on the same connection


async def test_where_authentication_is_off_nobody_needs_a_token(service: Service, slot: Path, state_dir: Path) -> None:
    state_dir.mkdir()
    (state_dir / "token").write_text("unused")
    async with service(auth="off") as client:
        answer = await anonymous(client, "POST", "/runners", json=launch_body(slot))
        assert answer.status_code == 201
        await finished(client, answer.json())


# By which name, from where.


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8080",
        "127.0.0.1",
        "127.0.0.1:8080",
        "10.1.2.3:80",
        "[::1]",
        "[::1]:8080",
        socket.gethostname(),
        "launcher.example",
        "launcher.example:443",
    ],
)
async def test_the_service_answers_to_its_names_and_to_addresses(service: Service, host: str) -> None:
    async with service(public_url="https://launcher.example/x") as client:
        assert (await client.get("/runners", headers={"Host": host})).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.nip.io",
        "evil.example:8080",
        "localhost@evil.example",
        "launcher.example",
        "",
        "[::1",
    ],
)
@pytest.mark.parametrize("path", ["/runners", "/livez"])
async def test_the_service_answers_to_no_other_name(client: httpx.AsyncClient, host: str, path: str) -> None:
    problem(await client.get(path, headers={"Host": host}), 403, "foreign-host", words="does not answer for the host")


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "null",
        "http://localhost.evil.example",
        "",
        "file://",
        "http://203.0.113.5",
        "http://[2001:db8::1]",
    ],
)
@pytest.mark.parametrize("path", ["/runners", "/livez"])
async def test_pages_of_others_may_not_call(client: httpx.AsyncClient, origin: str, path: str) -> None:
    problem(await client.get(path, headers={"Origin": origin}), 403, "foreign-origin", words="may not call this service")


@pytest.mark.parametrize("origin", ["http://localhost:8080", "http://127.0.0.1:8080", "http://[::1]:8080"])
async def test_pages_of_our_own_may_call(client: httpx.AsyncClient, origin: str) -> None:
    assert (await client.get("/runners", headers={"Origin": origin})).status_code == 200


async def test_a_page_that_comes_from_the_address_it_calls_is_our_own(client: httpx.AsyncClient) -> None:
    page = {"Host": "10.1.2.3:8080", "Origin": "http://10.1.2.3:8080"}
    assert (await client.get("/runners", headers=page)).status_code == 200
    problem(await client.get("/runners", headers=page | {"Origin": "http://10.1.2.4:8080"}), 403, "foreign-origin")


# What kind of body.


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
async def test_a_body_of_json_is_read(client: httpx.AsyncClient, slot: Path, kind: str) -> None:
    data = json.dumps(launch_body(slot)).encode()
    assert (await client.post("/runners", content=data, headers={"Content-Type": kind})).status_code == 201


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "json"])
@pytest.mark.parametrize("chunked", [True, False])
async def test_a_body_that_does_not_say_it_is_json_is_refused(
    client: httpx.AsyncClient, slot: Path, kind: str, *, chunked: bool
) -> None:
    data = json.dumps(launch_body(slot)).encode()
    content = pieces(data) if chunked else data
    answer = await client.post("/runners", content=content, headers={"Content-Type": kind} if kind else {})
    problem(answer, 422, "content-type", words="must be application/json")
    assert (await client.get("/runners")).json()["items"] == []


async def pieces(data: bytes, size: int = 65_536) -> AsyncIterator[bytes]:
    """Give a body without saying how long it is."""
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def test_a_body_in_pieces_is_read_like_any_other(client: httpx.AsyncClient, slot: Path) -> None:
    data = json.dumps(launch_body(slot)).encode()
    answer = await client.post("/runners", content=pieces(data, 10), headers={"Content-Type": "application/json"})
    assert answer.status_code == 201


# How much of it.


def padded(body: Json, size: int) -> bytes:
    """Write a launch in so many bytes, most of which nobody asked for."""
    data = json.dumps({**body, "more": ""}).encode()
    return data.replace(b'"more": ""', b'"more": "' + b"x" * (size - len(data)) + b'"')


@pytest.mark.parametrize("chunked", [True, False])
async def test_a_body_of_4_mib_is_read_and_one_byte_more_is_refused(
    client: httpx.AsyncClient, slot: Path, *, chunked: bool
) -> None:
    headers = {"Content-Type": "application/json"}
    large, larger = padded(launch_body(slot), 4 * MEBIBYTE), padded(launch_body(slot), 4 * MEBIBYTE + 1)
    assert (len(large), len(larger)) == (4 * MEBIBYTE, 4 * MEBIBYTE + 1)
    answer = await client.post("/runners", content=pieces(larger) if chunked else larger, headers=headers)
    problem(answer, 413, "too-large", words=f"{4 * MEBIBYTE} is the most")
    assert (await client.get("/runners")).json()["items"] == []
    answer = await client.post("/runners", content=pieces(large) if chunked else large, headers=headers)
    assert answer.status_code == 201


async def test_a_large_body_is_refused_before_it_is_read(client: httpx.AsyncClient) -> None:
    async def never() -> AsyncIterator[bytes]:
        raise AssertionError("this was read")
        yield b""

    headers = {"Content-Type": "application/json", "Content-Length": str(50 * MEBIBYTE)}
    problem(await client.post("/runners", content=never(), headers=headers), 413, "too-large")


async def test_who_asks_is_looked_at_before_what(client: httpx.AsyncClient) -> None:
    answer = await client.post("/runners", content=b"{", headers={"Authorization": "Bearer guessed"})
    problem(answer, 401, "unauthenticated")


# Its name in our log.


async def test_every_answer_names_its_request(client: httpx.AsyncClient) -> None:
    answers = [await client.get(path) for path in ("/livez", "/runners", "/nothing")]
    names = [answer.headers["X-Request-ID"] for answer in answers]
    assert len(set(names)) == 3
    assert all(re.fullmatch(r"[0-9a-f]{16}", name) for name in names)


async def test_a_request_may_bring_its_name(client: httpx.AsyncClient) -> None:
    headers = {"X-Request-ID": "Dispatch_7.try-2"}
    assert (await client.get("/livez", headers=headers)).headers["X-Request-ID"] == "Dispatch_7.try-2"
    answer = await client.get("/runners/runner-000000000000", headers=headers)
    assert problem(answer, 404, "not-found")["request_id"] == "Dispatch_7.try-2"


@pytest.mark.parametrize("name", ["", "two words", "x" * 129, 'quoted"', "semi;colon"])
async def test_a_name_that_could_disturb_a_log_is_replaced(client: httpx.AsyncClient, name: str) -> None:
    answer = await client.get("/livez", headers={"X-Request-ID": name})
    assert re.fullmatch(r"[0-9a-f]{16}", answer.headers["X-Request-ID"])
