"""Two services on one PostgreSQL database, as processes of their own: who acts, who answers, and who takes over."""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from conftest import (
    Json,
    Served,
    finished,
    launch_body,
    launched,
    local_pool,
    problem,
    record_of,
    served,
    until,
    write_pools,
)
from house import pool
from postgres import Proxy
from test_store import T, intent, make
from test_webhooks import Call, Receiver, Reply, completed, receiver, shown, targets

from app.errors import NotOwner
from app.events import Change, Feed
from app.launchers.fake import FakeLauncher, FakeWorld
from app.logs import Spool
from app.ownership import LEASE_SECONDS, Ownership
from app.reconciler import Reconciler
from app.runner import Phase
from app.runner import finished as ended_runner
from app.store import Store

__all__ = ["receiver"]  # a fixture
LONG = "sleep 600"
SCRIPT = Path(__file__).parent / "crash" / "replicas.py"


@asynccontextmanager
async def replica(
    tmp_path: Path,
    database: str,
    node: str,
    pools: Json | None = None,
    more: dict[str, str] | None = None,
    **wishes: Any,  # noqa: ANN401
) -> AsyncIterator[Served]:
    directory = tmp_path / node
    directory.mkdir(exist_ok=True)
    write_pools(directory / "pools.yaml", pools or {"local": local_pool(node="a"), "mine": local_pool()})
    settings = {"DATABASE_URL": database, "NODE": node, "SLOT_ROOTS": str(tmp_path / "slots"), **(more or {})}
    async with served(directory, **settings, **wishes) as running:  # type: ignore[arg-type]
        yield running


async def test_a_local_pool_is_served_by_its_node_and_read_anywhere(postgres: str, tmp_path: Path, slot: Path) -> None:
    async with (
        replica(tmp_path, postgres, "a") as a,
        replica(tmp_path, postgres, "b") as b,
        a.client() as at_a,
        b.client() as at_b,
    ):
        body = launch_body(slot, f"echo hello; {LONG}")
        refused = await at_b.post("/runners", json=body)
        problem(refused, 421, "other-node", words=a.url)
        assert refused.headers["location"] == f"{a.url}/runners"
        tried = await at_b.post("/runners", params={"dry_run": "true"}, json=body)
        assert (tried.status_code, tried.headers["location"]) == (421, f"{a.url}/runners?dry_run=true")
        for path in ("/runners/%00", "/runners?task_id=%00", "/runners?label=a%3D%00"):
            answer = await at_a.get(path)
            assert answer.status_code in {404, 422}
            assert answer.json()["retryable"] is False
        runner = await launched(at_a, body)
        path = f"/runners/{runner['runner_id']}"
        assert (await record_of(at_b, runner))["phase"] in ("starting", "running")
        problem(await at_b.delete(path), 421, "other-node", words=a.url)
        problem(await at_b.get(f"{path}/logs"), 421, "other-node", words=a.url)
        asked = await at_b.get(path)
        waiting = asyncio.create_task(at_b.get(path, headers={"Prefer": "wait=20", "If-None-Match": asked.headers["etag"]}))
        await at_a.delete(f"{path}?grace=0")
        assert (await waiting).status_code == 200
        assert (await finished(at_b, runner))["reason"] == "cancelled"
        await until_logged(at_a, path)
        problem(await at_b.get(f"{path}/logs"), 421, "other-node", words="node a")


async def until_logged(client: httpx.AsyncClient, path: str) -> None:
    async def logged() -> bool:
        answer = await client.get(f"{path}/logs")
        return answer.status_code == 200 and "hello" in answer.text

    await until(logged)


async def test_streams_of_both_replicas_tell_the_same(postgres: str, tmp_path: Path) -> None:
    async with (
        replica(tmp_path, postgres, "a") as a,
        replica(tmp_path, postgres, "b") as b,
        a.client() as at_a,
        b.client() as at_b,
    ):
        bodies = [launch_body(tmp_path / "slots" / f"s{n}", "exit 3", pool="mine") for n in range(6)]
        runners = await asyncio.gather(*[launched((at_a, at_b)[n % 2], body) for n, body in enumerate(bodies)])
        ends = await asyncio.gather(*[finished((at_b, at_a)[n % 2], runner) for n, runner in enumerate(runners)])
        assert [end["exit_code"] for end in ends] == [3] * 6
        pages = [(await client.get("/events?since=0")).json() for client in (at_a, at_b)]
        assert [item["revision"] for item in pages[0]["items"]] == [item["revision"] for item in pages[1]["items"]]
        assert len(pages[0]["items"]) >= 18, json.dumps(pages[0])


async def test_a_restarted_replica_takes_its_own_up_at_once(postgres: str, tmp_path: Path, slot: Path) -> None:
    async with replica(tmp_path, postgres, "a", leave_runners=True) as a, a.client() as client:
        runner = await launched(client, launch_body(slot, LONG))
        await a.end(signal.SIGKILL)
    async with replica(tmp_path, postgres, "a") as a, a.client() as client:
        await client.delete(f"/runners/{runner['runner_id']}?grace=0")
        assert (await finished(client, runner))["reason"] == "cancelled"


@asynccontextmanager
async def owner(url: str, node: str) -> AsyncIterator[tuple[Store, Ownership]]:
    store = Store(url, lambda _: None, replica=node)
    await store.open()
    ownership = Ownership(store, node=node, url=f"http://{node}")
    await ownership.open(["shared"])
    try:
        yield store, ownership
    finally:
        await ownership.aclose()
        await store.aclose()


async def test_an_engine_has_one_owner_and_is_handed_over_at_once_on_a_clean_end(postgres: str) -> None:
    async with owner(postgres, "b") as (_, second), owner(postgres, "c") as (_, third):
        assert [each.holds("shared") for each in (second, third)] == [True, False]
        with pytest.raises(NotOwner):
            async with third.holding("shared"):
                pass
        gained: list[str] = []
        third.on_gain(gained.append)
        await second.aclose()
        await until(lambda: gained == ["shared"], LEASE_SECONDS / 2)


async def test_who_cannot_renew_stops_before_the_next_owner_may_act_and_writes_nothing(postgres: str) -> None:
    proxy = Proxy()
    async with proxy.serving(postgres) as url, owner(url, "b") as (store, stale), owner(postgres, "c") as (_, fresh):
        runner, _ = await store.intend(intent(make(engine="shared")))
        fence = stale.fence(runner)
        overlap: list[bool] = []
        proxy.cut(away=True)

        async def act() -> None:
            async with stale.holding("shared"):
                while True:
                    overlap.append(fresh.holds("shared"))
                    await asyncio.sleep(0.02)

        with pytest.raises(NotOwner):
            await act()
        assert not any(overlap)
        await until(lambda: fresh.holds("shared"))
        proxy.cut()
        with pytest.raises(NotOwner):
            await store.change(runner, ended_runner(runner, None, None, T), "finished", T, fence=fence)
        assert await store.get(runner.runner_id) == runner


async def test_a_lease_that_a_clock_set_back_made_last_for_hours_is_nobodys(postgres: str) -> None:
    async with owner(postgres, "b") as (_, dead):
        assert dead.holds("shared")
        await dead.aclose()
        with psycopg.connect(postgres) as admin:
            admin.execute("UPDATE leases SET expires_at = extract(epoch FROM clock_timestamp()) + 3600")
        async with owner(postgres, "c") as (_, next_one):
            assert next_one.holds("shared")


async def test_of_a_dead_node_runners_are_stale_and_those_in_its_queue_can_be_stopped_and_run_out_of_time(
    postgres: str, tmp_path: Path
) -> None:
    pools = {
        "local": local_pool(node="a", max_concurrency=1, queue_limit=8, launch_timeout_seconds=12),
        "mine": local_pool(),
    }
    async with (
        replica(tmp_path, postgres, "a", pools, leave_runners=True) as a,
        replica(tmp_path, postgres, "b") as b,
        a.client() as at_a,
        b.client() as at_b,
    ):
        bodies = [launch_body(tmp_path / "slots" / f"s{n}", LONG) for n in range(3)]
        lives = await launched(at_a, bodies[0])
        waiting = [await at_a.post("/runners", json=body, headers={"Prefer": "wait=0"}) for body in bodies[1:]]
        waits, is_stopped = [answer.json() for answer in waiting]
        assert (await record_of(at_b, lives))["stale"] is False
        await a.end(signal.SIGKILL)

        async def stale() -> bool:
            return bool((await record_of(at_b, lives))["stale"])

        assert (await at_b.delete(f"/runners/{is_stopped['runner_id']}")).is_success
        assert (await record_of(at_b, is_stopped))["reason"] == "cancelled"
        await until(stale)
        assert (await finished(at_b, waits))["reason"] == "queue_timeout"
        assert (await record_of(at_b, lives))["phase"] != "finished"
        with psycopg.connect(postgres, autocommit=True) as admin:
            secrets = "SELECT runner_id FROM specs"
            await until(lambda: admin.execute(secrets).fetchall() == [(lives["runner_id"],)])
        async with replica(tmp_path, postgres, "a") as again, again.client() as client:
            assert (await record_of(client, lives))["stale"] is False


async def test_a_place_that_comes_free_as_the_database_goes_is_given_when_it_is_back(postgres: str, tmp_path: Path) -> None:
    proxy, feed, world = Proxy(), Feed(), FakeWorld()
    limited = pool(launching_limit=1)
    async with contextlib.AsyncExitStack() as stack:
        store = Store(await stack.enter_async_context(proxy.serving(postgres)), feed.publish)
        await store.open()
        stack.push_async_callback(store.aclose)
        ownership = Ownership(store, node="b", url="http://b")
        stack.push_async_callback(ownership.aclose)
        spool = Spool(tmp_path / "logs")
        reconciler = Reconciler(
            store,
            feed,
            spool,
            ownership=ownership,
            open_launcher=lambda _: FakeLauncher(world),
            pools=lambda: {"local": limited},
        )
        stack.push_async_callback(reconciler.aclose)
        await ownership.open(["shared"])
        await reconciler.start()
        gate = world.hang_launches()
        now = time.time()
        wishes = [
            intent(
                make(number, engine="shared", created_at=now, launch_deadline=now + 300),
                refusal=limited.refusal,
                queue_limit=1,
            )
            for number in (1, 2)
        ]
        wishes = [replace(wish, spec=replace(wish.spec, command=("fake",))) for wish in wishes]
        first, _ = await store.intend(wishes[0])
        second, _ = await store.intend(wishes[1])
        assert (first.phase, second.phase) == (Phase.STARTING, Phase.QUEUED)
        cut: list[str] = []

        def cut_off(change: Change) -> None:
            if change.event.type == "started" and not cut:
                cut.append(change.runner.runner_id)
                proxy.cut(away=True)
                asyncio.get_running_loop().call_later(0.5, proxy.cut)

        feed.listen(cut_off)
        gate.set()
        await until(lambda: second.runner_id in world.runners)
        assert cut == [first.runner_id]
        assert world.copies.total() == 2


async def test_one_replica_tells_webhooks_and_another_goes_on_when_it_dies(
    postgres: str, tmp_path: Path, slot: Path, receiver: Receiver
) -> None:
    hooks = {"WEBHOOKS_FILE": str(targets(tmp_path, receiver))}
    async with (
        replica(tmp_path, postgres, "a", more=hooks, mishaps=True) as a,
        replica(tmp_path, postgres, "b", more=hooks, mishaps=True) as b,
        a.client() as at_a,
        b.client() as at_b,
    ):
        assert await until(lambda: telling(at_a, at_b)) == [200, 421]
        runner = await launched(at_a, launch_body(slot))
        await finished(at_b, runner)
        await completed(receiver, runner)
        told = receiver.types(runner)
        assert len(told) == len(set(told)), told  # after a kill it may be told again
        for client in (at_a, at_b):
            assert (await shown(client))["state"] == "ok"
        first = (await at_a.post("/webhooks/target-0/retry")).status_code == 200
        teller, client, pool = (a, at_b, "mine") if first else (b, at_a, "local")
        await teller.end(signal.SIGKILL)
        again = await launched(client, launch_body(slot.with_name("slot-2"), pool=pool))
        await completed(receiver, again)


async def test_what_a_teller_notes_after_another_has_told_it_is_refused(
    postgres: str, tmp_path: Path, slot: Path, receiver: Receiver
) -> None:
    hooks = {"WEBHOOKS_FILE": str(targets(tmp_path, receiver))}
    proxy, asked, cut = Proxy(), threading.Event(), threading.Event()

    def refuse(_: Call) -> Reply:
        asked.set()
        cut.wait()
        return 500, {}

    async with (
        proxy.serving(postgres) as way,
        replica(tmp_path, way, "a", more=hooks, mishaps=True) as a,
        a.client() as at_a,
    ):
        await until(lambda: telling(at_a))
        async with replica(tmp_path, postgres, "b", more=hooks) as b, b.client() as at_b:
            receiver.answer = refuse
            runner = await launched(at_b, launch_body(slot, pool="mine"))
            await finished(at_b, runner)
            await until(asked.is_set)
            proxy.cut(away=True)
            cut.set()  # and so the first has to note that it is owed this, and cannot
            receiver.answer = lambda _: (204, {})
            await completed(receiver, runner)
            await until(lambda: telling(at_b))
            proxy.cut()
            await a.says("owns webhooks no longer")
            assert (await shown(at_b))["arrears"] == []
            with psycopg.connect(postgres) as database:
                assert database.execute("SELECT * FROM webhook_arrears").fetchall() == []


async def telling(*clients: httpx.AsyncClient) -> list[int]:
    """Ask each to try a target again, until one does; what they answer then."""
    answers = sorted([(await client.post("/webhooks/target-0/retry")).status_code for client in clients])
    return answers if 200 in answers else []


# Replicas on a real engine, to which something happens while they act on it. The crash run does the same for hours.


def befallen(database: str, kind: str, *faults: str) -> None:
    """Play a round for each of these faults, and see that nothing was lost, doubled, left behind or told wrongly."""
    wishes = [word for fault in faults for word in ("--fault", fault)]
    command = [sys.executable, str(SCRIPT), "--database", database, "--kind", kind, "--rounds", str(len(faults)), *wishes]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"rounds {len(faults)}" in done.stdout
    assert "lost 0   doubled 0   false end 0   orphan 0" in done.stdout


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("docker_engine")
def test_a_launch_that_its_owner_gives_after_another_has_finished_it_starts_nothing(postgres: str) -> None:
    befallen(postgres, "docker", "frozen at launch-called")


@pytest.mark.slow
@pytest.mark.usefixtures("docker_engine")
def test_whatever_an_owner_was_about_to_do_when_it_was_frozen_is_done_once(postgres: str) -> None:
    befallen(postgres, "docker", "frozen at stop-called", "frozen at end-observed", "frozen at remove-called", "frozen")


@pytest.mark.slow
@pytest.mark.usefixtures("docker_engine")
def test_a_partition_between_a_replica_and_the_database_loses_and_doubles_nothing(postgres: str) -> None:
    befallen(postgres, "docker", "cut off", "held", "cut off", "held")


@pytest.mark.slow
def test_replicas_on_nodes_of_their_own_freeze_and_are_cut_off_alone(postgres: str) -> None:
    befallen(postgres, "local-process", "frozen at launch-called", "held", "cut off", "frozen")


async def test_a_421_leads_to_the_replica_itself_while_it_lives(postgres: str, tmp_path: Path, slot: Path) -> None:
    shared = {"PUBLIC_URL": "http://balancer.example:8080"}
    own = shared | {"REPLICA_URL": "http://replica-a.example:8080"}
    async with replica(tmp_path, postgres, "b", more=shared) as b, b.client() as at_b:
        async with replica(tmp_path, postgres, "a", more=own) as a, a.client() as at_a:
            runner = await launched(at_a, launch_body(slot, "echo hello"))
            path = f"/runners/{runner['runner_id']}/logs"
            await finished(at_a, runner)

            async def led() -> bool:
                answer = await at_b.get(path)
                return answer.status_code == 421 and answer.headers.get("location") == f"{own['REPLICA_URL']}{path}"

            await until(led)

        async def away() -> bool:
            answer = await at_b.get(path)
            return answer.status_code == 421 and "location" not in answer.headers and "which is away" in answer.text

        await until(away)
