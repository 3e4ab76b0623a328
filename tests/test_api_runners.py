"""Launch, read, stop: what a Dispatcher does, over HTTP, with runners that are real processes."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from conftest import (
    TELL,
    Json,
    Serve,
    Service,
    alive,
    finished,
    launch_body,
    launched,
    local_pool,
    problem,
    read,
    record_of,
    told,
    until,
    written,
)

from app.events import Change

FOREVER = "exec sleep 600"
WITNESS = 'echo "$RUNNER_ID" >>witness\n'
DEAF = "trap '' TERM; echo >ready; while :; do sleep 0.05; done"
OBEDIENT = "trap 'exit 0' TERM; echo >ready; while :; do sleep 0.02; done"

ONE = {"local": local_pool(max_concurrency=1)}


def moment(text: str) -> datetime:
    at = datetime.fromisoformat(text)
    assert text.endswith("Z")
    return at


# What a launch answers.


async def test_a_launch_answers_201_with_the_whole_record_and_where_it_is(client: httpx.AsyncClient, slot: Path) -> None:
    before = datetime.now(UTC)
    answer = await client.post("/runners", json=launch_body(slot, FOREVER, id="task-7"))
    after = datetime.now(UTC)

    record = answer.json()
    runner_id, pid = record["runner_id"], record["pid"]
    assert answer.status_code == 201
    assert answer.headers["Location"] == f"/runners/{runner_id}"
    assert re.fullmatch(r"runner-[0-9a-f]{12}", runner_id)
    await until(lambda: pid in alive(record))  # whose environment cannot be seen while it is just being started
    for name in ("created_at", "started_at", "observed_at"):
        assert before <= moment(record[name]) <= after
    assert record == {
        "runner_id": runner_id,
        "task_id": "task-7",
        "pool_name": "local",
        "slot_id": "slot-1",
        "state": "running",
        "started_at": record["started_at"],
        "pid": pid,
        "container_id": None,
        "job_name": None,
        "phase": "starting",
        "reason": None,
        "message": None,
        "exit_code": None,
        "signal": None,
        "oom_killed": False,
        "retryable": None,
        "attempts": [],
        "created_at": record["created_at"],
        "finished_at": None,
        "observed_at": record["observed_at"],
        "stale": False,
        "revision": record["revision"],
        "node": record["node"],
        "image_digest": None,
        "labels": {},
        "limits": {"cpu": None, "memory_mib": None, "enforced_by": {"cpu": "none", "memory_mib": "none"}},
        "isolation": "none",
        "last_heartbeat": None,
        "log_truncated": False,
        "links": {
            "self": f"/runners/{runner_id}",
            "logs": f"/runners/{runner_id}/logs",
            "events": f"/runners/{runner_id}/events",
            "diagnosis": f"/runners/{runner_id}/diagnosis",
        },
    }


async def test_the_record_tells_the_pools_labels_and_limits_and_that_nothing_holds_them(
    service: Service, slot: Path
) -> None:
    pool = local_pool(labels={"team": "blue"}, quotas={"cpu_quota": 1.5, "memory_quota": 512})
    async with service({"local": pool}) as client:
        record = await launched(client, launch_body(slot))
    assert record["labels"] == {"team": "blue"}
    enforced_by = record["limits"].pop("enforced_by")
    assert record["limits"] == {"cpu": 1.5, "memory_mib": 512}
    assert set(enforced_by) == {"cpu", "memory_mib"}
    assert set(enforced_by.values()) <= {"cgroup2", "cgroup1", "none"}


@pytest.mark.parametrize("prefer", ["respond-async", "wait=0", "Respond-Async, wait=20", "handling=lenient; x, wait=0"])
async def test_a_client_that_will_not_wait_gets_202_and_the_launch_goes_on(
    client: httpx.AsyncClient, slot: Path, prefer: str
) -> None:
    answer = await client.post("/runners", json=launch_body(slot), headers={"Prefer": prefer})
    record = answer.json()
    assert answer.status_code == 202
    assert answer.headers["Location"] == record["links"]["self"]
    assert (record["state"], record["phase"], record["started_at"], record["pid"]) == ("pending", "starting", None, None)
    assert (await finished(client, record))["state"] == "completed"


@pytest.mark.parametrize(
    ("prefer", "applied"),
    [
        ("respond-async", "respond-async"),
        ("wait=0", "wait=0"),
        ("wait=7", "wait=7"),
        ("wait=99999", "wait=300"),
        ("return=minimal", None),
        ("wait=soon", None),
        (None, None),
    ],
)
async def test_a_preference_that_was_heeded_is_confirmed_and_no_other(
    client: httpx.AsyncClient, slot: Path, prefer: str | None, applied: str | None
) -> None:
    headers = {"Prefer": prefer} if prefer else {}
    answer = await client.post("/runners", json=launch_body(slot), headers=headers)
    assert answer.headers.get("Preference-Applied") == applied


async def test_a_wait_that_runs_out_answers_202(service: Service, slot: Path) -> None:
    async with service({"local": local_pool(max_concurrency=1, queue_limit=1)}) as client:
        await launched(client, launch_body(slot, FOREVER))
        second = launch_body(slot.with_name("slot-2"))
        async with asyncio.timeout(8):
            answer = await client.post("/runners", json=second, headers={"Prefer": "wait=1"})
    assert (answer.status_code, answer.json()["phase"]) == (202, "queued")


async def test_what_the_request_has_beyond_the_contract_is_ignored(client: httpx.AsyncClient, slot: Path) -> None:
    body = launch_body(slot, "exit 0", priority=3, status={"is": ["unknown"]})
    body["slot"]["allocated_at"] = None
    body["dispatcher"] = "d-1"
    await launched(client, body)


async def test_nulls_stand_for_keys_left_out(client: httpx.AsyncClient, slot: Path) -> None:
    body = launch_body(slot, TELL, title=None, dependencies=None, required_skill=None, metadata=None, spec_name=None)
    await launched(client, body)
    context = json.loads((await told(slot))["TASK_CONTEXT"])
    assert (context["task_title"], context["dependencies"], context["metadata"]) == ("", [], {})
    assert (context["required_skill"], context["branch_name"], context["spec_name"]) == (None, None, "unknown")


# How a runner ended.


@pytest.mark.parametrize("code", [1, 127, 137, 143, 255])
async def test_a_program_that_exits_with_a_code_failed_with_that_code(
    client: httpx.AsyncClient, slot: Path, code: int
) -> None:
    record = await finished(client, await launched(client, launch_body(slot, f"exit {code}")))
    assert (record["state"], record["reason"]) == ("failed", "exit_nonzero")
    assert (record["exit_code"], record["signal"], record["oom_killed"]) == (code, None, False)
    assert (record["message"], record["retryable"]) == (f"exited with code {code}", False)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL", "SIGINT", "SIGUSR1"])
async def test_a_program_that_a_signal_ended_failed_with_its_name(client: httpx.AsyncClient, slot: Path, name: str) -> None:
    script = f"kill -{name.removeprefix('SIG')} $$; sleep 1"
    record = await finished(client, await launched(client, launch_body(slot, script)))
    assert (record["state"], record["reason"]) == ("failed", "signalled")
    assert (record["exit_code"], record["signal"], record["oom_killed"]) == (None, name, False)
    assert (record["message"], record["retryable"]) == (f"ended by {name}", False)


async def test_a_program_that_exits_with_0_completed(client: httpx.AsyncClient, slot: Path) -> None:
    record = await finished(client, await launched(client, launch_body(slot, "exit 0")))
    assert (record["state"], record["exit_code"], record["signal"]) == ("completed", 0, None)
    assert (record["reason"], record["message"], record["retryable"]) == (None, None, None)
    assert moment(record["started_at"]) <= moment(record["finished_at"]) <= moment(record["observed_at"])


async def test_a_runner_killed_from_outside_is_told_as_signalled(client: httpx.AsyncClient, slot: Path) -> None:
    record = await launched(client, launch_body(slot, FOREVER))
    os.kill(record["pid"], signal.SIGKILL)
    record = await finished(client, record)
    assert (record["reason"], record["signal"], record["exit_code"]) == ("signalled", "SIGKILL", None)


async def test_a_finished_record_never_changes(client: httpx.AsyncClient, slot: Path) -> None:
    runner = await launched(client, launch_body(slot))
    record = await finished(client, runner)
    await client.delete(f"/runners/{runner['runner_id']}")
    await asyncio.sleep(0.1)
    assert await record_of(client, runner) == record


async def test_the_history_tells_every_step_in_order(client: httpx.AsyncClient, slot: Path) -> None:
    runner = await launched(client, launch_body(slot, "exit 3"))
    record = await finished(client, runner)
    events = (await client.get(record["links"]["events"])).json()["items"]
    assert [(event["from"], event["to"]) for event in events][:2] == [(None, "starting"), ("starting", "starting")]
    assert [event["type"] for event in events if event["type"] != "running"] == ["accepted", "started", "finished"]
    revisions = [event["revision"] for event in events]
    assert revisions == sorted(set(revisions))
    assert revisions[-1] == record["revision"]
    last = events[-1]
    assert (last["to"], last["reason"], last["message"]) == ("finished", "exit_nonzero", "exited with code 3")
    contract = {"revision", "at", "type", "from", "to", "reason", "message", "data"}
    assert set(last) == contract | {"runner_id", "task_id", "pool_name"}


@pytest.mark.parametrize("path", ["", "/logs", "/events"])
async def test_a_runner_that_never_was_is_not_found(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.get(f"/runners/runner-000000000000{path}")
    problem(answer, 404, "not-found", words="no runner runner-000000000000")


# Waiting for news.


async def test_a_record_that_is_known_already_is_not_told_again(client: httpx.AsyncClient, slot: Path) -> None:
    runner = await launched(client, launch_body(slot, "exit 0"))
    await finished(client, runner)
    answer = await client.get(runner["links"]["self"])
    tag = answer.headers["ETag"]
    assert re.fullmatch(r'W/"[0-9a-z]+"', tag)
    again = await client.get(runner["links"]["self"], headers={"If-None-Match": tag})
    assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", tag)
    again = await client.get(runner["links"]["self"], headers={"If-None-Match": f'W/"0", {tag}'})
    assert again.status_code == 304
    again = await client.get(runner["links"]["self"], headers={"If-None-Match": 'W/"0"'})
    assert (again.status_code, again.json()) == (200, answer.json())


async def test_a_client_may_wait_for_the_next_change(client: httpx.AsyncClient, slot: Path) -> None:
    runner = await launched(client, launch_body(slot, "while [ ! -e go ]; do sleep 0.01; done; exit 3"))
    await until(lambda: running(client, runner))
    tag = (await client.get(runner["links"]["self"])).headers["ETag"]
    headers = {"If-None-Match": tag, "Prefer": "wait=10"}
    waiting = asyncio.create_task(client.get(runner["links"]["self"], headers=headers))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    (slot / "go").touch()
    answer = await waiting
    assert (answer.status_code, answer.json()["phase"], answer.json()["exit_code"]) == (200, "finished", 3)
    assert answer.headers["ETag"] != tag


async def test_a_wait_for_a_change_that_does_not_come_answers_304(client: httpx.AsyncClient, slot: Path) -> None:
    runner = await launched(client, launch_body(slot, FOREVER))
    await until(lambda: running(client, runner))
    tag = (await client.get(runner["links"]["self"])).headers["ETag"]
    async with asyncio.timeout(8):
        answer = await client.get(runner["links"]["self"], headers={"If-None-Match": tag, "Prefer": "wait=1"})
    assert (answer.status_code, answer.headers["ETag"]) == (304, tag)


# The same request twice.


async def test_a_replay_answers_200_with_the_record_as_it_is_now(client: httpx.AsyncClient, slot: Path) -> None:
    body = launch_body(slot, WITNESS + "exit 4")
    first = await launched(client, body, **{"Idempotency-Key": "k"})
    ended = await finished(client, first)

    answer = await client.post("/runners", json=body, headers={"Idempotency-Key": "k"})
    assert answer.status_code == 200
    assert answer.headers["Idempotency-Replayed"] == "true"
    assert answer.headers["Location"] == ended["links"]["self"]
    assert answer.json() == ended
    assert read(slot / "witness").split() == [first["runner_id"]]


async def test_a_first_launch_is_not_marked_as_replayed(client: httpx.AsyncClient, slot: Path) -> None:
    answer = await client.post("/runners", json=launch_body(slot), headers={"Idempotency-Key": "k"})
    assert "Idempotency-Replayed" not in answer.headers


async def test_the_same_request_in_other_words_is_a_replay(client: httpx.AsyncClient, slot: Path) -> None:
    body = launch_body(slot, "exit 0")
    first = await launched(client, body, **{"Idempotency-Key": "k"})
    turned = {key: body[key] for key in reversed(body)}
    text = json.dumps(turned, indent=4).encode()
    headers = {"Idempotency-Key": "k", "Content-Type": "application/json"}
    answer = await client.post("/runners", content=text, headers=headers)
    assert (answer.status_code, answer.json()["runner_id"]) == (200, first["runner_id"])


async def test_another_request_under_a_used_key_is_refused(client: httpx.AsyncClient, slot: Path) -> None:
    first = await launched(client, launch_body(slot, FOREVER), **{"Idempotency-Key": "k"})
    other = launch_body(slot.with_name("slot-2"), FOREVER)
    answer = await client.post("/runners", json=other, headers={"Idempotency-Key": "k"})
    problem(answer, 422, "idempotency-key-reused", words="used for another request")
    assert [item["runner_id"] for item in (await client.get("/runners")).json()["items"]] == [first["runner_id"]]


async def test_the_same_key_from_many_at_once_starts_one_runner(client: httpx.AsyncClient, slot: Path) -> None:
    body = launch_body(slot, WITNESS + FOREVER)
    calls = [client.post("/runners", json=body, headers={"Idempotency-Key": "k"}) for _ in range(20)]
    answers = await asyncio.gather(*calls)
    statuses = Counter(answer.status_code for answer in answers)
    assert statuses == {201: 1, 200: 19}
    assert {answer.headers.get("Idempotency-Replayed") for answer in answers if answer.status_code == 200} == {"true"}
    assert {answer.json()["state"] for answer in answers} == {"running"}
    (runner_id,) = {answer.json()["runner_id"] for answer in answers}
    assert (await written(slot / "witness")).split() == [runner_id]


async def test_a_replay_of_a_launch_in_flight_waits_for_it(client: httpx.AsyncClient, slot: Path) -> None:
    body = launch_body(slot, FOREVER)
    first = await client.post("/runners", json=body, headers={"Idempotency-Key": "k", "Prefer": "respond-async"})
    again = await client.post("/runners", json=body, headers={"Idempotency-Key": "k"})
    assert (first.status_code, again.status_code) == (202, 200)
    assert again.json()["pid"] is not None


async def test_a_failed_launch_replays_its_problem(service: Service, slot: Path) -> None:
    async with service({"local": local_pool(command=["no-such-command"])}) as client:
        body = launch_body(slot)
        first = await client.post("/runners", json=body, headers={"Idempotency-Key": "k"})
        again = await client.post("/runners", json=body, headers={"Idempotency-Key": "k"})
        said = [problem(answer, 422, "launch-rejected") for answer in (first, again)]
        assert said[0]["runner"]["runner_id"] == said[1]["runner"]["runner_id"]
        assert len((await client.get("/runners")).json()["items"]) == 1


async def test_a_refused_request_does_not_use_its_key_up(service: Service, slot: Path) -> None:
    async with service(ONE | {"off": local_pool(enabled=False)}) as client:
        key = {"Idempotency-Key": "k"}
        holder = await launched(client, launch_body(slot, FOREVER))
        problem(await client.post("/runners", json=launch_body(slot, FOREVER), headers=key), 409, "slot-busy")
        second = launch_body(slot.with_name("slot-2"))
        problem(await client.post("/runners", json=second, headers=key), 429, "pool-full")
        off = launch_body(slot.with_name("slot-3"), pool="off")
        problem(await client.post("/runners", json=off, headers=key), 422, "pool-disabled", "/pool")
        nowhere = launch_body(slot.with_name("slot-4"), pool="nowhere")
        problem(await client.post("/runners", json=nowhere, headers=key), 422, "unknown-pool", "/pool")

        await client.delete(f"/runners/{holder['runner_id']}?grace=0")
        await finished(client, holder)
        await launched(client, second, **key)


async def test_a_key_replays_also_after_its_pool_was_switched_off_and_its_slot_removed(
    client: httpx.AsyncClient, slot: Path
) -> None:
    body = launch_body(slot)
    first = await finished(client, await launched(client, body, **{"Idempotency-Key": "k"}))
    await client.patch("/pools/local", json={"enabled": False})
    shutil.rmtree(slot)
    answer = await client.post("/runners", json=body, headers={"Idempotency-Key": "k"})
    assert (answer.status_code, answer.json()) == (200, first)


async def test_a_key_replays_also_after_a_restart(service: Service, slot: Path) -> None:
    async with service() as client:
        body = launch_body(slot)
        first = await finished(client, await launched(client, body, **{"Idempotency-Key": "k"}))
    async with service() as client:
        answer = await client.post("/runners", json=body, headers={"Idempotency-Key": "k"})
    assert (answer.status_code, answer.json()) == (200, first)


@pytest.mark.parametrize("key", ["", "k" * 256])
async def test_a_key_that_cannot_be_kept_is_refused(client: httpx.AsyncClient, slot: Path, key: str) -> None:
    answer = await client.post("/runners", json=launch_body(slot), headers={"Idempotency-Key": key})
    problem(answer, 422, "invalid", "/header/Idempotency-Key")


# One live runner in a slot.


def other_ways(slot: Path) -> dict[str, tuple[str, str]]:
    link = slot.with_name("link")
    link.symlink_to(slot)
    return {
        "the same slot": ("slot-1", str(slot)),
        "its id with another path": ("slot-1", str(slot.parent)),
        "its path under another id": ("slot-2", str(slot)),
        "its path by a symbolic link": ("slot-2", str(link)),
        "its path through the root and back": ("slot-2", f"{slot.parent}/../slots//slot-1/"),
    }


@pytest.mark.parametrize(
    "way",
    [
        "the same slot",
        "its id with another path",
        "its path under another id",
        "its path by a symbolic link",
        "its path through the root and back",
    ],
)
async def test_a_slot_that_is_taken_is_refused_with_its_holders_record(
    client: httpx.AsyncClient, slot: Path, way: str
) -> None:
    holder = await launched(client, launch_body(slot, FOREVER))
    holder = await until(lambda: running(client, holder))
    body = launch_body(slot, FOREVER)
    body["slot"]["slot_id"], body["slot"]["slot_path"] = other_ways(slot)[way]

    answer = await client.post("/runners", json=body)
    said = problem(answer, 409, "slot-busy", words=f"is held by {holder['runner_id']}")
    assert {**said["runner"], "observed_at": None} == {**holder, "observed_at": None}
    assert answer.headers["Location"] == holder["links"]["self"]
    assert said["retryable"] is True

    await client.delete(f"/runners/{holder['runner_id']}?grace=0")
    await finished(client, holder)
    await launched(client, body)


async def test_of_many_launches_at_once_for_one_slot_one_wins(client: httpx.AsyncClient, slot: Path) -> None:
    body = launch_body(slot, WITNESS + FOREVER)
    answers = await asyncio.gather(*(client.post("/runners", json=body) for _ in range(20)))
    assert Counter(answer.status_code for answer in answers) == {201: 1, 409: 19}
    assert len((await written(slot / "witness")).split()) == 1


async def test_a_slot_is_free_again_only_when_nothing_of_its_runner_lives(client: httpx.AsyncClient, slot: Path) -> None:
    holder = await launched(client, launch_body(slot, DEAF))
    await written(slot / "ready")
    assert (await client.delete(f"/runners/{holder['runner_id']}?grace=600")).json()["phase"] == "stopping"
    problem(await client.post("/runners", json=launch_body(slot)), 409, "slot-busy", words="which is stopping")
    await client.delete(f"/runners/{holder['runner_id']}?grace=0")
    await finished(client, holder)
    assert not alive(holder)
    await launched(client, launch_body(slot))


# Room in a pool.


@pytest.mark.parametrize(
    ("pool", "words"),
    [
        (local_pool(max_concurrency=1), "its max_concurrency is 1"),
        (local_pool(resources={"cpu_limit": 1}, quotas={"cpu_quota": 1.5}), "1 of 1.5 are taken"),
        (local_pool(resources={"memory_limit": 300}, quotas={"memory_quota": 512}), "300 of 512 are taken"),
    ],
)
async def test_a_full_pool_is_refused_with_when_to_come_again(service: Service, slot: Path, pool: Json, words: str) -> None:
    async with service({"local": pool}) as client:
        first = await launched(client, launch_body(slot, FOREVER))
        answer = await client.post("/runners", json=launch_body(slot.with_name("slot-2")))
        assert problem(answer, 429, "pool-full", words=words)["retryable"] is True
        assert 1 <= int(answer.headers["Retry-After"]) <= 5

        await client.delete(f"/runners/{first['runner_id']}?grace=0")
        await finished(client, first)
        await launched(client, launch_body(slot.with_name("slot-2")))


async def test_of_many_launches_at_once_no_more_run_than_the_pool_holds(service: Service, slot: Path) -> None:
    async with service({"local": local_pool(max_concurrency=3)}) as client:
        bodies = [launch_body(slot.with_name(f"slot-{number}"), FOREVER) for number in range(12)]
        answers = await asyncio.gather(*(client.post("/runners", json=body) for body in bodies))
        assert Counter(answer.status_code for answer in answers) == {201: 3, 429: 9}
        assert (await client.get("/pools/local")).json()["current_running"] == 3


async def test_launches_wait_in_order_for_a_place_up_to_the_queues_limit(service: Service, slot: Path) -> None:
    async with service({"local": local_pool(max_concurrency=1, queue_limit=3)}) as client:
        slots = [slot.with_name(f"slot-{number}") for number in range(4)]
        runners = []
        for place in slots:
            body = launch_body(place, "echo $RUNNER_ID >>../order; exec sleep 600")
            answer = await client.post("/runners", json=body, headers={"Prefer": "respond-async"})
            runners.append(answer.json())
        assert [runner["phase"] for runner in runners] == ["starting", "queued", "queued", "queued"]
        problem(await client.post("/runners", json=launch_body(slot.with_name("slot-9"))), 429, "pool-full")
        assert (await client.get("/pools/local")).json()["queued"] == 3

        order = slot.with_name("order")
        for runner in runners:
            await told_of(runner, order)
            await client.delete(f"/runners/{runner['runner_id']}?grace=0")
        for runner in runners:
            await finished(client, runner)
        assert read(order).split() == [runner["runner_id"] for runner in runners]


async def told_of(runner: Json, witness: Path) -> None:
    """Wait until a runner has borne witness of itself."""
    await until(lambda: runner["runner_id"] in read(witness))


async def test_a_client_that_waits_for_its_turn_gets_201_when_it_comes(service: Service, slot: Path) -> None:
    async with service({"local": local_pool(max_concurrency=1, queue_limit=1)}) as client:
        first = await launched(client, launch_body(slot, "while [ ! -e go ]; do sleep 0.01; done"))
        second = asyncio.create_task(client.post("/runners", json=launch_body(slot.with_name("slot-2"))))
        await until(lambda: queued(client))
        (slot / "go").touch()
        answer = await second
    assert answer.status_code == 201
    assert moment(answer.json()["started_at"]) >= moment((first)["started_at"])


async def queued(client: httpx.AsyncClient) -> list[Json]:
    items: list[Json] = (await client.get("/runners", params={"phase": "queued"})).json()["items"]
    return items


async def test_a_queued_launch_holds_its_slot_and_none_of_the_pool(service: Service, slot: Path) -> None:
    async with service({"local": local_pool(max_concurrency=1, queue_limit=2)}) as client:
        await launched(client, launch_body(slot, FOREVER))
        second = launch_body(slot.with_name("slot-2"))
        await client.post("/runners", json=second, headers={"Prefer": "respond-async"})
        problem(await client.post("/runners", json=second), 409, "slot-busy", words="which is queued")
        assert (await client.get("/pools/local")).json()["current_running"] == 1


async def test_a_queued_runner_that_is_stopped_ends_at_once_and_never_starts(service: Service, slot: Path) -> None:
    async with service({"local": local_pool(max_concurrency=1, queue_limit=1)}) as client:
        await launched(client, launch_body(slot, FOREVER))
        second = launch_body(slot.with_name("slot-2"), WITNESS)
        answer = await client.post("/runners", json=second, headers={"Prefer": "respond-async"})
        answer = await client.delete(answer.headers["Location"])
        record = answer.json()
        assert (answer.status_code, record["state"], record["reason"]) == (200, "failed", "cancelled")
        assert (record["started_at"], record["pid"], record["exit_code"]) == (None, None, None)
        assert (await client.get(record["links"]["logs"])).text == ""
        assert not read(slot.with_name("slot-2") / "witness")


async def test_news_of_what_was_read_already_ends_no_wait(service: Service, slot: Path) -> None:
    """As a replica hears them that has read a change in the database before it was told of it."""
    async with service() as client:
        runner = await launched(client, launch_body(slot, FOREVER))

        async def settled() -> bool:
            return bool((await record_of(client, runner))["phase"] == "running")

        await until(settled)
        app = client._transport.app  # type: ignore[attr-defined]
        known = await app.state.service._store.get(runner["runner_id"])
        event = (await app.state.service._store.history(runner["runner_id"]))[-1]
        tag = (await client.get(runner["links"]["self"])).headers["ETag"]
        began = time.monotonic()
        waiting = asyncio.create_task(
            client.get(runner["links"]["self"], headers={"If-None-Match": tag, "Prefer": "wait=1"})
        )
        while not waiting.done():
            app.state.feed.publish([Change(known, event)])
            await asyncio.sleep(0.05)
        assert (await waiting).status_code == 304
        assert time.monotonic() - began >= 1


async def test_a_queued_launch_whose_time_runs_out_is_told_so(service: Service, slot: Path) -> None:
    pool = local_pool(max_concurrency=1, queue_limit=1, launch_timeout_seconds=3)
    async with service({"local": pool}) as client:
        await launched(client, launch_body(slot, FOREVER))
        answer = await client.post("/runners", json=launch_body(slot.with_name("slot-2")))
        said = problem(answer, 503, "queue-timeout", words="no place in pool local within 3 s")
        assert (said["retryable"], said["runner"]["reason"]) == (True, "queue_timeout")
        assert answer.headers["Location"] == said["runner"]["links"]["self"]
        assert int(answer.headers["Retry-After"]) >= 1


# Lists.


async def test_a_list_shows_what_is_asked_for(service: Service, slot: Path) -> None:
    async with service({"local": local_pool(), "other": local_pool(labels={"team": "core", "tier": "a=b"})}) as client:
        first = await finished(client, await launched(client, launch_body(slot, "exit 0", id="a")))
        second = await finished(client, await launched(client, launch_body(slot, "exit 5", id="b", pool="other")))
        third = await launched(client, launch_body(slot.with_name("slot-3"), FOREVER, id="a"))

        async def found(**query: str) -> list[str]:
            answer = await client.get("/runners", params=query)
            assert answer.status_code == 200
            return [item["runner_id"] for item in answer.json()["items"]]

        one, two, three = (runner["runner_id"] for runner in (first, second, third))
        assert await found() == [three, two, one]
        assert await found(state="completed") == [one]
        assert await found(state="failed") == [two]
        assert await found(state="running") == [three]
        assert await found(state="pending") == []
        assert await found(phase="finished") == [two, one]
        assert await found(pool="other") == [two]
        assert await found(task_id="a") == [three, one]
        assert await found(slot_id="slot-1") == [two, one]
        assert await found(slot_id="slot-1", task_id="a") == [one]
        assert await found(since=third["created_at"]) == [three]
        assert await found(since=third["created_at"].replace("Z", "+00:00")) == [three]
        assert await found(task_id="never") == []
        assert await found(label="team=core") == [two]
        assert await found(label="team=") == []
        items = (await client.get("/runners")).json()["items"]
        assert items[1:] == [second, first]
        both = await client.get("/runners?label=team%3Dcore&label=tier%3Da%3Db")
        assert [item["runner_id"] for item in both.json()["items"]] == [two]
        assert (await client.get("/runners?label=team%3Dcore&label=tier%3Da")).json()["items"] == []


async def test_pages_show_every_runner_once_also_while_new_ones_come(client: httpx.AsyncClient, slot: Path) -> None:
    made = [await finished(client, await launched(client, launch_body(slot))) for _ in range(5)]
    seen: list[str] = []
    query: Json = {"limit": 2}
    while True:
        page = (await client.get("/runners", params=query)).json()
        seen += [item["runner_id"] for item in page["items"]]
        if page["next_cursor"] is None:
            break
        query["cursor"] = page["next_cursor"]
        await finished(client, await launched(client, launch_body(slot)))
    assert seen == [record["runner_id"] for record in reversed(made)]


@pytest.mark.parametrize(
    ("query", "pointer"),
    [
        ({"limit": "0"}, "/query/limit"),
        ({"limit": "501"}, "/query/limit"),
        ({"limit": "many"}, "/query/limit"),
        ({"cursor": "!"}, "/query/cursor"),
        ({"cursor": "YWJj"}, "/query/cursor"),
        ({"state": "happy"}, "/query/state"),
        ({"phase": "Running"}, "/query/phase"),
        ({"since": "yesterday"}, "/query/since"),
        ({"since": "0.5"}, "/query/since"),
        ({"since": "2026-01-05"}, "/query/since"),
        ({"label": "team"}, "/query/label/0"),
        ({"label": "=core"}, "/query/label/0"),
    ],
)
async def test_a_list_that_makes_no_sense_is_refused(client: httpx.AsyncClient, query: dict[str, str], pointer: str) -> None:
    problem(await client.get("/runners", params=query), 422, "invalid", pointer)


async def test_a_page_leads_to_the_next_one(client: httpx.AsyncClient, slot: Path) -> None:
    for _ in range(3):
        await finished(client, await launched(client, launch_body(slot)))
    page = await client.get("/runners", params={"limit": "2", "pool": "local"})
    assert page.links["next"]["url"].startswith("/runners?limit=2&pool=local&cursor=")
    last = await client.get(page.links["next"]["url"])
    assert [len(each.json()["items"]) for each in (page, last)] == [2, 1]
    assert "Link" not in last.headers


async def test_a_list_that_is_known_already_is_not_told_again(client: httpx.AsyncClient, slot: Path) -> None:
    runner = await launched(client, launch_body(slot, "while [ ! -e go ]; do sleep 0.01; done"))
    await until(lambda: running(client, runner))
    tag = (await client.get("/runners")).headers["ETag"]
    assert tag.startswith('W/"')
    same = await client.get("/runners", headers={"If-None-Match": f'W/"0", {tag}'})
    assert (same.status_code, same.content, same.headers["ETag"]) == (304, b"", tag)
    assert (await client.get("/runners", params={"pool": "none"}, headers={"If-None-Match": tag})).status_code == 200
    (slot / "go").touch()
    await finished(client, runner)
    changed = await client.get("/runners", headers={"If-None-Match": tag})
    assert (changed.status_code, changed.json()["items"][0]["phase"]) == (200, "finished")
    assert changed.headers["ETag"] != tag


# Stop.


async def test_a_stop_answers_202_then_200_and_again_is_no_harm(client: httpx.AsyncClient, slot: Path) -> None:
    runner = await launched(client, launch_body(slot, OBEDIENT))
    await written(slot / "ready")
    url = runner["links"]["self"]
    answers = await asyncio.gather(*(client.delete(url) for _ in range(3)))
    assert {answer.status_code for answer in answers} <= {200, 202}
    assert answers[0].status_code == 202
    assert answers[0].json()["phase"] == "stopping"

    record = await finished(client, runner)
    answer = await client.delete(url)
    assert (answer.status_code, answer.json()) == (200, record)


async def test_cancelled_wins_over_the_code_that_the_program_then_leaves(client: httpx.AsyncClient, slot: Path) -> None:
    runner = await launched(client, launch_body(slot, OBEDIENT))
    await written(slot / "ready")
    await client.delete(runner["links"]["self"])
    record = await finished(client, runner)
    assert (record["state"], record["reason"], record["exit_code"]) == ("failed", "cancelled", 0)
    assert record["message"] == "stopped by admin"


async def test_a_program_that_ended_before_the_stop_keeps_its_own_end(client: httpx.AsyncClient, slot: Path) -> None:
    for _ in range(10):  # somewhere among these the stop meets the end
        runner = await launched(client, launch_body(slot, WITNESS + "exit 0"))
        await told_of(runner, slot / "witness")
        await client.delete(runner["links"]["self"])
        record = await finished(client, runner)
        how = (record["state"], record["reason"], record["exit_code"], record["signal"])
        assert how in {
            ("completed", None, 0, None),
            ("failed", "cancelled", 0, None),
            ("failed", "cancelled", None, "SIGTERM"),
        }


async def test_a_runner_deaf_to_term_is_killed_when_the_grace_is_over(client: httpx.AsyncClient, slot: Path) -> None:
    runner = await launched(client, launch_body(slot, DEAF))
    await written(slot / "ready")
    asked = datetime.now(UTC)
    await client.delete(runner["links"]["self"], params={"grace": 0.3})
    record = await finished(client, runner)
    assert (record["reason"], record["signal"], record["exit_code"]) == ("cancelled", "SIGKILL", None)
    assert 0.25 <= (moment(record["finished_at"]) - asked).total_seconds() < 2


async def test_the_pools_grace_holds_where_a_stop_names_none(service: Service, slot: Path) -> None:
    async with service({"local": local_pool(stop_grace_seconds=0.2)}) as client:
        runner = await launched(client, launch_body(slot, DEAF))
        await written(slot / "ready")
        await client.delete(runner["links"]["self"])
        assert (await finished(client, runner, 3))["signal"] == "SIGKILL"


async def test_asking_again_with_less_patience_ends_it_sooner_and_never_later(client: httpx.AsyncClient, slot: Path) -> None:
    runner = await launched(client, launch_body(slot, DEAF))
    await written(slot / "ready")
    await client.delete(runner["links"]["self"], params={"grace": 600})
    await client.delete(runner["links"]["self"], params={"grace": 0.2})
    await client.delete(runner["links"]["self"], params={"grace": 600})
    record = await finished(client, runner, 3)
    assert (record["reason"], record["signal"]) == ("cancelled", "SIGKILL")


@pytest.mark.parametrize("grace", [0, 0.2])
async def test_a_stop_ends_the_whole_tree_also_what_left_the_session(
    client: httpx.AsyncClient, slot: Path, grace: float
) -> None:
    script = f'setsid sh -c "{DEAF}" & sleep 600 & {OBEDIENT}'.replace(">ready", ">>ready")
    runner = await launched(client, launch_body(slot, script))
    await until(lambda: len(read(slot / "ready")) == 2)
    assert len(alive(runner)) >= 4
    await client.delete(runner["links"]["self"], params={"grace": grace})
    assert (await finished(client, runner))["reason"] == "cancelled"
    assert not alive(runner)


async def test_a_stop_right_behind_its_launch_ends_it_whatever_it_has_come_to(client: httpx.AsyncClient, slot: Path) -> None:
    for number in range(5):
        answer = await client.post("/runners", json=launch_body(slot, FOREVER), headers={"Prefer": "respond-async"})
        await asyncio.sleep(number / 200)
        await client.delete(answer.headers["Location"], params={"grace": 1})
        record = await finished(client, answer.json())
        assert (record["state"], record["reason"]) == ("failed", "cancelled")
        assert not alive(record)


async def test_a_launch_that_was_stopped_while_its_client_waits_is_told_as_cancelled(service: Service, slot: Path) -> None:
    async with service({"local": local_pool(max_concurrency=1, queue_limit=1)}) as client:
        await launched(client, launch_body(slot, FOREVER))
        second = asyncio.create_task(client.post("/runners", json=launch_body(slot.with_name("slot-2"))))
        (waiting,) = await until(lambda: queued(client))
        await client.delete(waiting["links"]["self"])
        said = problem(await second, 409, "cancelled", words="stopped by admin")
        assert said["runner"]["reason"] == "cancelled"


async def test_force_ends_a_record_as_lost_and_what_still_lives_with_it(client: httpx.AsyncClient, slot: Path) -> None:
    runner = await launched(client, launch_body(slot, FOREVER))
    answer = await client.delete(runner["links"]["self"], params={"force": "true"})
    record = answer.json()
    assert (answer.status_code, record["reason"], record["exit_code"]) == (200, "lost", None)
    await until(lambda: not alive(runner))
    await launched(client, launch_body(slot))


async def test_a_stop_of_nothing_is_not_found(client: httpx.AsyncClient) -> None:
    problem(await client.delete("/runners/runner-000000000000"), 404, "not-found")


@pytest.mark.parametrize("grace", ["-1", "86401", "nan", "inf", "soon"])
async def test_a_grace_that_is_no_time_is_refused_and_nothing_stopped(
    client: httpx.AsyncClient, slot: Path, grace: str
) -> None:
    runner = await launched(client, launch_body(slot, FOREVER))
    answer = await client.delete(runner["links"]["self"], params={"grace": grace})
    problem(answer, 422, "invalid", "/query/grace")
    assert (await record_of(client, runner))["state"] == "running"


# Signs of life, and deadlines.


async def test_a_heartbeat_with_the_runners_own_token_is_noted_and_is_no_change(
    client: httpx.AsyncClient, slot: Path
) -> None:
    runner = await launched(client, launch_body(slot, TELL + FOREVER))
    token = (await told(slot))["RUNNER_TOKEN"]
    before = await until(lambda: running(client, runner))
    tag = (await client.get(runner["links"]["self"])).headers["ETag"]
    answer = await client.post(f"{runner['links']['self']}/heartbeat", headers={"Authorization": f"Bearer {token}"})
    assert (answer.status_code, answer.content) == (204, b"")
    after = await record_of(client, runner)
    assert (await client.get(runner["links"]["self"])).headers["ETag"] == tag
    assert (datetime.now(UTC) - moment(after["last_heartbeat"])).total_seconds() < 5
    assert before["revision"] == after["revision"]


async def test_a_heartbeat_comes_by_the_name_that_a_pool_tells_its_runners(service: Service, slot: Path) -> None:
    async with service({"local": local_pool(public_url="http://balancer.example:8080")}) as client:
        runner = await launched(client, launch_body(slot, TELL + FOREVER))
        environment, named = await told(slot), {"Host": "balancer.example:8080"}
        assert environment["RUNNER_LAUNCHER_URL"] == "http://balancer.example:8080"
        headers = named | {"Authorization": f"Bearer {environment['RUNNER_TOKEN']}"}
        answer = await client.post(f"{runner['links']['self']}/heartbeat", headers=headers)
        assert answer.status_code == 204
        problem(await client.get(runner["links"]["self"], headers=named), 403, "foreign-host")


async def running(client: httpx.AsyncClient, runner: Json) -> Json:
    record = await record_of(client, runner)
    return record if record["phase"] == "running" else {}


async def test_a_heartbeat_with_any_other_token_is_refused(client: httpx.AsyncClient, slot: Path) -> None:
    runner = await launched(client, launch_body(slot, FOREVER))
    other = slot.with_name("slot-2")
    await launched(client, launch_body(other, TELL + FOREVER))
    url = f"{runner['links']['self']}/heartbeat"
    for token in ((await told(other))["RUNNER_TOKEN"], client.headers["Authorization"].split()[1], "x"):
        answer = await client.post(url, headers={"Authorization": f"Bearer {token}"})
        problem(answer, 401, "unauthenticated", words="not the token of this runner")
    answer = await client.post("/runners/runner-000000000000/heartbeat", headers={"Authorization": "Bearer x"})
    problem(answer, 401, "unauthenticated", words="not the token of this runner")
    assert (await record_of(client, runner))["last_heartbeat"] is None


async def test_a_runners_token_is_good_for_nothing_but_its_heartbeats(client: httpx.AsyncClient, slot: Path) -> None:
    runner = await launched(client, launch_body(slot, TELL + FOREVER))
    headers = {"Authorization": f"Bearer {(await told(slot))['RUNNER_TOKEN']}"}
    problem(await client.get(runner["links"]["self"], headers=headers), 401, "unauthenticated")
    problem(await client.delete(runner["links"]["self"], headers=headers), 401, "unauthenticated")


async def test_a_heartbeat_after_the_end_is_told_that_it_ended(client: httpx.AsyncClient, slot: Path) -> None:
    runner = await launched(client, launch_body(slot, TELL + "exit 3"))
    token = (await told(slot))["RUNNER_TOKEN"]
    await finished(client, runner)
    answer = await client.post(f"{runner['links']['self']}/heartbeat", headers={"Authorization": f"Bearer {token}"})
    problem(answer, 409, "runner-ended", words="has ended: exit_nonzero")
    assert (await record_of(client, runner))["last_heartbeat"] is None


async def test_a_runner_that_falls_silent_after_its_first_beat_is_ended(service: Service, slot: Path) -> None:
    async with service({"local": local_pool(heartbeat_timeout_seconds=3)}) as client:
        quiet = await launched(client, launch_body(slot.with_name("slot-2"), FOREVER))
        runner = await launched(client, launch_body(slot, TELL + OBEDIENT))
        await written(slot / "ready")
        headers = {"Authorization": f"Bearer {(await told(slot))['RUNNER_TOKEN']}"}
        for _ in range(4):  # longer in all than the limit
            await client.post(f"{runner['links']['self']}/heartbeat", headers=headers)
            await asyncio.sleep(1)
        assert (await record_of(client, runner))["phase"] == "running"
        record = await finished(client, runner)
        assert (record["state"], record["reason"], record["exit_code"]) == ("failed", "heartbeat_lost", 0)
        assert (record["message"], record["retryable"]) == ("no heartbeat for 3 s", True)
        assert (await record_of(client, quiet))["phase"] == "running"  # never beat, so nothing counts


async def test_a_runner_that_outlives_its_time_is_ended_and_its_own_code_does_not_hide_it(
    service: Service, slot: Path
) -> None:
    async with service({"local": local_pool(run_timeout_seconds=3)}) as client:
        record = await finished(client, await launched(client, launch_body(slot, OBEDIENT)))
    assert (record["state"], record["reason"], record["exit_code"]) == ("failed", "deadline_exceeded", 0)
    assert (record["message"], record["retryable"]) == ("not done 3 s after it was started", False)
    assert (moment(record["finished_at"]) - moment(record["started_at"])).total_seconds() < 3 + 1.7


async def test_a_runner_deaf_to_term_is_killed_after_its_deadline_and_the_pools_grace(service: Service, slot: Path) -> None:
    async with service({"local": local_pool(run_timeout_seconds=2, stop_grace_seconds=0.2)}) as client:
        record = await finished(client, await launched(client, launch_body(slot, DEAF)), 2 + 2.8)
    assert (record["reason"], record["signal"]) == ("deadline_exceeded", "SIGKILL")


# What a runner is told.


async def test_a_runner_finds_its_environment_as_the_contract_says_and_nothing_else(
    service: Service, slot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the service's own")
    monkeypatch.setenv("TZ", "Europe/Vienna")
    monkeypatch.setenv("LANG", "C.UTF-8")
    monkeypatch.setenv("HOME", "/the/service")
    pool = local_pool(
        log_level="DEBUG", retries=3, ratio=0.5, fast=True, note=None, environment={"RUNNER_LOG_LEVEL": "INFO", "HOME": "/h"}
    )
    async with service({"local": pool}, public_url="https://launcher.example") as client:
        runner = await finished(client, await launched(client, launch_body(slot, TELL)))
    variables = await told(slot)
    assert variables.pop("PWD", str(slot)) == str(slot)  # some shells say where they are
    file, token, trace, context = (
        variables.pop(name) for name in ("TASK_CONTEXT_FILE", "RUNNER_TOKEN", "TRACEPARENT", "TASK_CONTEXT")
    )
    assert variables == {
        "PATH": os.environ["PATH"],
        "TZ": "Europe/Vienna",
        "LANG": "C.UTF-8",
        "HOME": "/h",
        "RUNNER_LOG_LEVEL": "INFO",
        "RUNNER_RETRIES": "3",
        "RUNNER_RATIO": "0.5",
        "RUNNER_FAST": "True",
        "RUNNER_NOTE": "None",
        "RUNNER_ID": runner["runner_id"],
        "POOL_NAME": "local",
        "RUNNER_LAUNCHER_URL": "https://launcher.example",
    }
    assert Path(file).is_absolute()
    assert len(token) >= 32
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01", trace)
    assert context.startswith('{"')


async def test_a_runner_finds_its_task_in_the_environment_and_in_a_file(client: httpx.AsyncClient, slot: Path) -> None:
    task: Json = {
        "id": "7",
        "title": "Grüße 👋",
        "description": 'line\nline\t"quoted" $HOME `x`',
        "dependencies": ["5", "6"],
        "required_skill": "backend",
        "reserved_branch": "feature/task-7",
        "metadata": {"spec_name": "hello", "deep": [{"n": 1.5}, None, True]},
        "unknown": "not told",
    }
    await launched(client, launch_body(slot, 'cat "$TASK_CONTEXT_FILE" >context\n' + TELL, **task))
    variables = await told(slot)
    assert variables["TASK_CONTEXT"] == read(slot / "context")
    assert "Grüße 👋" in variables["TASK_CONTEXT"]
    assert json.loads(variables["TASK_CONTEXT"]) == {
        "task_id": "7",
        "spec_name": "hello",
        "task_title": "Grüße 👋",
        "task_description": 'line\nline\t"quoted" $HOME `x`',
        "dependencies": ["5", "6"],
        "required_skill": "backend",
        "slot_id": "slot-1",
        "slot_path": str(slot),
        "repo_url": "https://git.example.org/a.git",
        "branch_name": "feature/task-7",
        "metadata": {"spec_name": "hello", "deep": [{"n": 1.5}, None, True]},
    }


async def test_a_context_too_long_for_a_variable_travels_by_the_file_alone(client: httpx.AsyncClient, slot: Path) -> None:
    script = 'cat "$TASK_CONTEXT_FILE" >context\n' + TELL
    await launched(client, launch_body(slot, script, description="x" * 200_000))
    assert "TASK_CONTEXT" not in await told(slot)
    assert len(json.loads(read(slot / "context"))["task_description"]) == 200_000


@pytest.mark.parametrize(
    ("given", "passed_on"),
    [
        ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", True),
        ("00-00000000000000000000000000000000-b7ad6b7169203331-01", False),
        ("nonsense", False),
    ],
)
async def test_the_callers_trace_is_passed_on_if_it_is_one(
    client: httpx.AsyncClient, slot: Path, given: str, *, passed_on: bool
) -> None:
    await launched(client, launch_body(slot, TELL), traceparent=given)
    trace = (await told(slot))["TRACEPARENT"]
    assert (trace == given) is passed_on
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", trace)


async def test_a_runner_starts_in_its_slots_real_path_unless_the_pool_says_where(
    service: Service, slot: Path, tmp_path: Path
) -> None:
    (slot / "inner").mkdir()
    (slot / "link").symlink_to(slot / "inner")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = ["sh", "-c", f'echo "$(pwd -P)" >{tmp_path}/$POOL_NAME.said']
    pools = {"there": local_pool(command=command), "elsewhere": local_pool(command=command, working_dir=str(elsewhere))}
    async with service(pools) as client:
        await launched(client, launch_body(slot / "link", pool="there"))
        await launched(client, launch_body(slot.with_name("slot-2"), pool="elsewhere"))
        assert (await written(tmp_path / "there.said")).strip() == str(slot / "inner")
        assert (await written(tmp_path / "elsewhere.said")).strip() == str(elsewhere)


async def test_a_pool_without_a_command_runs_the_services(service: Service, slot: Path) -> None:
    pool = local_pool()
    del pool["config"]["command"]
    async with service({"local": pool}, runner_command=("sh", "agent.sh")) as client:
        record = await finished(client, await launched(client, launch_body(slot, "exit 9")))
    assert record["exit_code"] == 9


# Secrets.


async def test_no_answer_tells_a_secret(service: Service, slot: Path) -> None:
    secrets = ["canary-in-the-task", "canary-of-the-pool"]
    async with service({"local": local_pool(environment={"API_KEY": secrets[1]})}) as client:
        runner = await launched(client, launch_body(slot, TELL + OBEDIENT, description=secrets[0]))
        variables = await told(slot)
        assert variables["API_KEY"] == secrets[1]
        answers = [await client.get(path) for path in everything(runner)]
        await client.delete(runner["links"]["self"])
        await finished(client, runner)
        answers += [await client.get(path) for path in everything(runner)]
        answers += [await client.post("/runners", json=launch_body(slot, description=secrets[0], pool="unknown"))]
    for answer in answers:
        for secret in (*secrets, variables["RUNNER_TOKEN"], client.headers["Authorization"].split()[1]):
            assert secret not in answer.text


def everything(runner: Json) -> list[str]:
    links = runner["links"]
    more = ["/runners", "/events", "/pools", "/pools/local", "/engines", "/metrics", "/livez", "/readyz", "/openapi.json"]
    return [*links.values(), f"{links['self']}/diagnosis", *more]


async def test_after_the_end_no_secret_is_left_in_the_state_directory(service: Service, slot: Path, state_dir: Path) -> None:
    async with service({"local": local_pool(environment={"API_KEY": "canary-of-the-pool"})}) as client:
        runner = await launched(client, launch_body(slot, TELL, description="canary-in-the-task"))
        secrets = ["canary-of-the-pool", "canary-in-the-task", (await told(slot))["RUNNER_TOKEN"]]
        await finished(client, runner)
        await until(lambda: not holding(state_dir, *secrets), 3)
    assert not holding(state_dir, *secrets)


async def test_when_the_service_has_closed_no_secret_of_an_ended_runner_is_left(
    service: Service, slot: Path, state_dir: Path
) -> None:
    async with service({"local": local_pool(environment={"API_KEY": "canary-of-the-pool"})}) as client:
        script = TELL + "while [ ! -e go ]; do sleep 0.01; done"
        runner = await launched(client, launch_body(slot, script, description="canary-in-the-task" * 20_000))
        secrets = ["canary-of-the-pool", "canary-in-the-task", (await told(slot))["RUNNER_TOKEN"]]
        assert holding(state_dir, *secrets)
        (slot / "go").touch()
        await finished(client, runner)
        await until(lambda: not list((state_dir / "runners").iterdir()))
    assert not holding(state_dir, *secrets)


def holding(directory: Path, *secrets: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for place, _, names in os.walk(directory):  # which minds nothing that goes meanwhile
        for file in (Path(place, name) for name in names):
            with contextlib.suppress(FileNotFoundError):
                data = file.read_bytes() if file.is_file() else b""
                found += [(file.name, secret) for secret in secrets if secret.encode() in data]
    return found


async def test_nobody_else_on_the_machine_can_read_what_we_keep(service: Service, slot: Path, state_dir: Path) -> None:
    make_open(state_dir)
    async with service() as client:
        await launched(client, launch_body(slot, "echo spoken; " + FOREVER))
        assert open_to_others(state_dir) == []


def make_open(directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o755)


def open_to_others(directory: Path) -> list[Path]:
    """Give the files that others can reach and read."""
    found: list[Path] = []
    for place, directories, files in os.walk(directory):
        directories[:] = [name for name in directories if Path(place, name).stat().st_mode & 0o011]
        found += [Path(place, name) for name in files if Path(place, name).stat().st_mode & 0o066]
    return found


# A client that goes away.


async def test_a_client_that_goes_away_while_it_waits_changes_nothing(serve: Serve, slot: Path) -> None:
    async with serve({"local": local_pool(max_concurrency=1, queue_limit=1)}) as served, served.client() as client:
        first = await launched(client, launch_body(slot, FOREVER))
        await post_and_go(served.url, served.token, launch_body(slot.with_name("slot-2"), WITNESS))
        (second,) = await until(lambda: queued(client))
        await asyncio.sleep(0.1)
        await client.delete(first["links"]["self"], params={"grace": 0})
        assert (await finished(client, second))["state"] == "completed"
        assert read(slot.with_name("slot-2") / "witness").split() == [second["runner_id"]]


async def test_a_client_that_goes_away_before_its_request_is_whole_launches_nothing(serve: Serve, slot: Path) -> None:
    async with serve() as served, served.client() as client:
        await post_and_go(served.url, served.token, launch_body(slot, WITNESS), missing=1)
        await asyncio.sleep(0.1)
        assert (await client.get("/runners")).json()["items"] == []
        assert "ERROR" not in read(served.output)


async def post_and_go(url: str, token: str, body: Json, *, missing: int = 0) -> None:
    """Send a launch, all but the last bytes, and hang up."""
    data = json.dumps(body).encode()
    head = (
        f"POST /runners HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    _, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port)
    writer.write(head.encode() + data[: len(data) - missing])
    await writer.drain()
    writer.close()
    await writer.wait_closed()
