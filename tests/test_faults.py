"""What befalls the machine, the clock and the database under live runners, and what is true once it is over."""

import asyncio
import contextlib
import random
import resource
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from conftest import Json, Serve, alive, launch_body, launched, until, written
from engines import group_of_version_1
from fault_table import Verdict

from app.main import create_app
from app.settings import Settings

COUNT = 'echo "$RUNNER_ID" >>started\n'
UNTIL_TOLD = COUNT + "while [ ! -e go ]; do sleep 0.02; done\n"


def slot_of(slot: Path, number: int) -> Path:
    """Name one more slot beside this."""
    return slot.with_name(f"slot-{number}")


async def live_runners(client: httpx.AsyncClient, slot: Path, *codes: int) -> dict[str, tuple[str, int | None]]:
    """Launch a runner for each code, which it ends with once its slot holds a file `go`; gives their right ends."""
    right: dict[str, tuple[str, int | None]] = {}
    for code in codes:
        place = slot_of(slot, code)
        runner = await launched(client, launch_body(place, f"{UNTIL_TOLD}exit {code}"))
        await written(place / "started")
        right[runner["runner_id"]] = ("failed" if code else "completed", code)
    return right


def let_go(slot: Path, *codes: int) -> None:
    """Let runners end."""
    for code in codes:
        (slot_of(slot, code) / "go").touch()


def left(right: dict[str, tuple[str, int | None]]) -> list[str]:
    """Name the runners of which a process lives."""
    return [name for name in right if alive({"runner_id": name})]


async def answered(client: httpx.AsyncClient, body: Json, key: str) -> Json:
    """Ask for a launch again and again, as a Dispatcher does, until there is a record."""

    async def record() -> Json:
        try:
            answer = await client.post("/runners", json=body, headers={"Idempotency-Key": key})
        except httpx.TransportError:
            return {}
        return dict(answer.json()) if answer.status_code in {200, 201, 202} else {}

    return await until(record)


@pytest.mark.fault("the database is locked by somebody else")
async def test_a_locked_database_delays_and_loses_nothing(
    serve: Serve, slot: Path, state_dir: Path, verdict: Verdict
) -> None:
    async with serve(mishaps=True) as service, service.client() as client:
        right = await live_runners(client, slot, 0, 7)
        body = launch_body(slot_of(slot, 5), COUNT + "exit 5")
        with contextlib.closing(sqlite3.connect(state_dir / "runners.db")) as other:
            other.execute("BEGIN IMMEDIATE")
            let_go(slot, 0, 7)
            coming = asyncio.create_task(answered(client, body, "k"))
            await until(lambda: not left(right))
            assert (await client.get("/runners")).status_code == 200
            await asyncio.sleep(1)
            assert {item["state"] for item in (await client.get("/runners")).json()["items"]} == {"running"}
            other.rollback()
        verdict.over()
        right[(await coming)["runner_id"]] = ("failed", 5)
        await verdict.judge(client, slot.parent, right, lambda: left(right))


@pytest.fixture
def pids() -> Iterator[Path]:
    """A control group in which the number of processes and threads can be held."""
    with group_of_version_1("pids", "this user may limit no processes on this machine") as group:
        yield group


@pytest.mark.fault("no process and no thread can be started")
async def test_on_a_machine_full_of_processes_a_launch_is_refused_and_ends_are_told(
    serve: Serve, slot: Path, pids: Path, verdict: Verdict
) -> None:
    async with serve(mishaps=True) as service, service.client() as client:
        right = await live_runners(client, slot, 0, 7)
        (pids / "cgroup.procs").write_text(str(service.process.pid))
        (pids / "pids.max").write_text("1")  # the threads that are there stay
        body = launch_body(slot_of(slot, 5), COUNT + "exit 5")
        refused = await client.post("/runners", json=body, headers={"Prefer": "wait=10"})
        assert refused.status_code == 503, refused.text
        assert refused.json()["retryable"] is True
        let_go(slot, 0, 7)
        (pids / "pids.max").write_text("max")
        verdict.over()
        answer = await client.post("/runners", json=launch_body(slot_of(slot, 6), COUNT + "exit 6"))
        right[answer.json()["runner_id"]] = ("failed", 6)
        await verdict.judge(client, slot.parent, right, lambda: left(right))


@pytest.mark.fault("no file descriptor is left")
async def test_without_file_descriptors_nothing_is_lost_and_launches_come_later(
    serve: Serve, slot: Path, verdict: Verdict
) -> None:
    async with serve(mishaps=True) as service, service.client() as client:
        right = await live_runners(client, slot, 0, 7)
        pid = service.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, before[1]))  # those that are open stay open
        body = launch_body(slot_of(slot, 5), COUNT + "exit 5")
        with contextlib.suppress(httpx.TransportError):
            refused = await client.post("/runners", json=body, headers={"Prefer": "wait=5"})
            assert refused.status_code in {202, 503}
            if told := refused.json().get("runner", refused.json() if refused.status_code == 202 else None):
                right[told["runner_id"]] = ("failed", None) if told["phase"] == "finished" else ("failed", 5)
        let_go(slot, 0, 7)
        await until(lambda: not left(right))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        verdict.over()
        late = await answered(client, launch_body(slot_of(slot, 6), COUNT + "exit 6"), "later")
        right[late["runner_id"]] = ("failed", 6)
        await verdict.judge(client, slot.parent, right, lambda: left(right))


@pytest.mark.fault("SIGTERM amid launches")
@pytest.mark.parametrize("seed", [1, *[pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 9)]])
async def test_a_termination_amid_launches_neither_loses_nor_doubles_one(
    serve: Serve, slot: Path, verdict: Verdict, seed: int
) -> None:
    dice = random.Random(seed)  # noqa: S311 - a schedule, to be repeated by its seed
    bodies = {code: launch_body(slot_of(slot, code), f"{COUNT}sleep 0.2; exit {code}") for code in range(8)}
    right: dict[str, tuple[str, int | None]] = {}
    async with serve(leave_runners=True) as service, service.client() as client:
        calls = [client.post("/runners", json=body, headers={"Idempotency-Key": f"{code}"}) for code, body in bodies.items()]
        going = [asyncio.ensure_future(call) for call in calls]
        await asyncio.sleep(dice.uniform(0, 0.3))
        assert await service.end(signal.SIGTERM) == 0
        await asyncio.gather(*going, return_exceptions=True)
    verdict.over()
    async with serve() as service, service.client() as client:
        for code, body in bodies.items():
            record = await answered(client, body, f"{code}")
            right[record["runner_id"]] = ("failed" if code else "completed", code)
        await verdict.judge(client, slot.parent, right, lambda: left(right))


@pytest.mark.fault("an upgrade from an earlier database, under live runners")
async def test_an_earlier_database_is_brought_up_to_date_under_live_runners(
    serve: Serve, slot: Path, state_dir: Path, verdict: Verdict
) -> None:
    async with serve(leave_runners=True) as service, service.client() as client:
        right = await live_runners(client, slot, 0, 7)
        await service.end(signal.SIGKILL)
    let_go(slot, 7)
    with contextlib.closing(sqlite3.connect(state_dir / "runners.db")) as old:
        old.execute("DROP INDEX runners_placed")
        for column in ("placed_at", "home"):
            old.execute(f"ALTER TABLE runners DROP COLUMN {column}")
        old.execute("UPDATE runners SET body = json_remove(body, '$.placed_at')")
        old.execute("UPDATE alembic_version SET version_num = '0006'")
        old.commit()
    async with serve() as service, service.client() as client:
        verdict.over()
        assert (await client.post("/runners", json=launch_body(slot_of(slot, 0), COUNT))).json()["code"] == "slot-busy"
        launch_body(slot_of(slot, 0), f"{UNTIL_TOLD}exit 0")
        let_go(slot, 0)
        await verdict.judge(client, slot.parent, right, lambda: left(right))


@pytest.mark.fault("the clock jumps, by an hour ahead and back")
async def test_a_clock_that_jumps_ends_no_runner_and_stops_no_launch(tmp_path: Path, slot: Path, verdict: Verdict) -> None:
    ahead = [0.0]
    (tmp_path / "pools.yaml").write_text(
        "agent_pools: {local: {type: local-process, max_concurrency: 9, config: {command: [sh, agent.sh], launch_rate: 5}}}"
    )
    settings = Settings(
        state_dir=tmp_path / "state", pools_file=tmp_path / "pools.yaml", slot_roots=(slot.parent,), auth="off"
    )
    app = create_app(settings, now=lambda: time.time() + ahead[0])
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
    ):
        right = await live_runners(client, slot, 0, 7)
        for number, jump in enumerate((3600.0, -3600.0, 0.0), 10):
            ahead[0] = jump
            right |= await live_runners(client, slot, number)
            assert {item["state"] for item in (await client.get("/runners")).json()["items"]} == {"running"}
        verdict.over()
        let_go(slot, 0, 7, 10, 11, 12)
        await verdict.judge(client, slot.parent, right, lambda: left(right))
        for item in (await client.get("/runners")).json()["items"]:
            assert item["finished_at"] >= item["started_at"]
