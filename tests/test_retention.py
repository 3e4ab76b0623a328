"""What is forgotten of runners that have ended, and what stays."""

import os
from hashlib import sha256
from pathlib import Path

import httpx
from conftest import Json, Service, finished, launch_body, launched, problem, record_of, until

AT_ONCE = 1e-9
"""A number of days: whoever has ended has ended before that."""


async def sweep(client: httpx.AsyncClient, **query: str) -> Json:
    answer = await client.post("/retention", params=query)
    assert answer.status_code == 200, answer.text
    told: Json = answer.json()
    return told


async def ended(client: httpx.AsyncClient, state_dir: Path, slot: Path, script: str, **headers: str) -> Json:
    """Run a runner to its end, until its engine holds nothing of it any more."""
    runner = await launched(client, launch_body(slot, script), **headers)
    record = await finished(client, runner)
    await until(lambda: not (state_dir / "runners" / runner["runner_id"]).exists())
    return record


async def test_an_ended_runner_is_forgotten_whole_and_a_live_one_not_at_all(
    service: Service, state_dir: Path, slot: Path, tmp_path: Path
) -> None:
    async with service(retention_days=None, leave_runners=True) as client:
        live = await launched(client, launch_body(tmp_path / "slots" / "slot-2", "sleep 1000"))
        gone = await ended(client, state_dir, slot, "echo hello", **{"Idempotency-Key": "once"})
        before = (await client.get("/events")).json()
        assert await sweep(client) == {"records": 0, "logs": 0, "log_bytes": 0, "dry_run": False}
        log = state_dir / "logs" / f"{gone['runner_id']}.log"
        assert log.exists()

    def forgotten() -> bool:
        return not log.exists()

    async with service(retention_days=AT_ONCE) as client:
        await until(forgotten)  # a start forgets by itself
        await until(lambda: _not_found(client, gone))
        problem(await client.get(f"/runners/{gone['runner_id']}/logs"), 404, "not-found")
        assert (await record_of(client, live))["phase"] == "running"
        assert (await client.get(f"/runners/{live['runner_id']}/events")).json()["items"]
        listed = (await client.get("/runners")).json()["items"]
        assert [item["runner_id"] for item in listed] == [live["runner_id"]]

        # Who would miss what was forgotten is told so.
        first = before["items"][0]["revision"]
        problem(await client.get("/events", params={"since": first}), 410, "history-gone")
        again = (await client.get("/events")).json()
        assert again["revision"] == before["revision"]
        assert (await client.get("/events", params={"since": before["revision"]})).json()["items"] == []

        # The key is free again with its record.
        anew = await ended(client, state_dir, slot, "echo hello", **{"Idempotency-Key": "once"})
        assert anew["runner_id"] != gone["runner_id"]


async def _not_found(client: httpx.AsyncClient, runner: Json) -> bool:
    return (await client.get(f"/runners/{runner['runner_id']}")).status_code == 404


async def test_a_dry_run_says_what_would_go_and_changes_nothing(service: Service, state_dir: Path, slot: Path) -> None:
    async with service(retention_days=None) as client:
        gone = await ended(client, state_dir, slot, "echo hello")
        size = sum(file.stat().st_blocks * 512 for file in (state_dir / "logs").iterdir())  # the log and its times
    async with service(retention_days=None, retention_logs_mib=0) as client:
        await until(lambda: not (state_dir / "logs" / f"{gone['runner_id']}.log").exists())
        assert (await client.get(f"/runners/{gone['runner_id']}/logs")).text == "[no log of it is kept]\n"
        assert await record_of(client, gone) == gone
        fresh = await ended(client, state_dir, slot, "echo hello")
        told = await sweep(client, dry_run="true")
        assert told == {"records": 0, "logs": 1, "log_bytes": size, "dry_run": True}
        assert (await client.get(f"/runners/{fresh['runner_id']}/logs")).text == "hello\n"
        assert await sweep(client) == {**told, "dry_run": False}
        assert await sweep(client) == {"records": 0, "logs": 0, "log_bytes": 0, "dry_run": False}


async def test_the_oldest_logs_make_room_and_those_of_nobody_go_when_they_are_old(
    service: Service, state_dir: Path, slot: Path
) -> None:
    async with service(retention_days=1, retention_logs_mib=1) as client:
        runners = [await ended(client, state_dir, slot, "head -c 600000 /dev/zero | tr '\\0' x") for _ in range(2)]
        paths = [state_dir / "logs" / f"{runner['runner_id']}.log" for runner in runners]
        os.utime(paths[0], (1, 1))
        unknown = [state_dir / "logs" / f"runner-00000000000{number}.log" for number in (1, 2)]
        for path in unknown:
            path.write_text("of a database that was lost\n")
        os.utime(unknown[0], (1, 1))
        told = await sweep(client)
        assert (told["records"], told["logs"]) == (0, 2)
        assert [path.exists() for path in (*paths, *unknown)] == [False, True, False, True]


async def test_who_is_for_some_pools_sweeps_nothing(service: Service, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.yaml"
    tokens.write_text(f"- {{name: some, sha256: {sha256(b'test').hexdigest()}, scopes: [admin], pools: [local]}}")
    async with service(tokens_file=tokens) as client:
        answer = await client.post("/retention", headers={"Authorization": "Bearer test"})
        problem(answer, 403, "pool-not-permitted")
