"""The store, on a real SQLite file and a real PostgreSQL server alike.

What is written together, what is refused, and what is read without reading it all.
"""

import asyncio
import contextlib
import math
import sqlite3
import stat
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from typing_extensions import override

import app
from app.errors import ConfigurationError, InvalidRequest, NotFound, PoolFull, SlotBusy, Unavailable
from app.events import Change
from app.launcher import Enforcement, Handle, LaunchSpec
from app.pools import Rate, Usage
from app.reason import Reason
from app.runner import Attempt, Phase, Policy, Runner, State, Stop, accepted, admitted, finished, stop_asked
from app.schema import HEAD, metadata
from app.store import Filter, Intent, Store

T = 1000.0
SECRET = "correct-horse-battery"  # noqa: S105 - to be looked for where it must not be
SPEC = LaunchSpec(command=("sh", "-c", "true"), environment={"TOKEN": SECRET}, context=b'{"task_id": "1.1"}')


def unlimited(_: Usage) -> None:
    """Take any number."""


def room_for(places: int) -> Callable[[Usage], str | None]:
    """Take so many."""
    return lambda usage: f"{usage.runners} of {places} places are taken" if usage.runners >= places else None


def make(number: int = 1, **facts: Any) -> Runner:  # noqa: ANN401 - the fields of Runner
    """Make a runner as a service does."""
    runner = Runner(
        runner_id=f"runner-{number:012x}",
        task_id=f"task-{number}",
        pool_name="local",
        slot_id=f"slot-{number}",
        slot_place=f"node:/slots/{number}",
        engine="local-process",
        phase=Phase.STARTING,
        calls=1,
        created_at=T + number,
        launch_deadline=T + 300,
        policy=Policy(),
    )
    return replace(runner, **facts)


def intent(runner: Runner, **wishes: Any) -> Intent:  # noqa: ANN401 - the fields of Intent
    known = {"refusal": unlimited, "queue_limit": 0, "caller": "ann", "key": None, "request_sha256": "body"}
    return Intent(runner=runner, spec=SPEC, **{**known, **wishes})


@dataclass(frozen=True)
class Database:
    """A database, and a look behind the store's back."""

    url: str

    def rows(self, query: str) -> list[Any]:
        with self.engine() as engine, engine.begin() as connection:
            result = connection.exec_driver_sql(query)
            return [tuple(row) for row in result] if result.returns_rows else []

    @contextlib.contextmanager
    def engine(self) -> Iterator[sa.Engine]:
        engine = sa.create_engine(self.url.replace("postgresql:", "postgresql+psycopg:"), poolclass=sa.NullPool)
        yield engine
        engine.dispose()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runners.db"


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, path: Path) -> Database:
    return Database(f"sqlite:///{path}" if request.param == "sqlite" else request.getfixturevalue("postgres"))


on_sqlite = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


@pytest.fixture
def published() -> list[Change]:
    """What the store told, in order."""
    return []


@pytest.fixture
async def store(database: Database, published: list[Change]) -> AsyncIterator[Store]:
    async with opened(database, published.extend) as store:
        yield store


class DoubtedStore(Store):
    """A store that is asked twice: what it has at hand must be what its database has."""

    @override
    async def get(self, runner_id: str) -> Runner:
        given = await super().get(runner_id)
        self._recent.drop(runner_id)
        assert given == await super().get(runner_id)
        return given

    @override
    async def spec(self, runner_id: str) -> LaunchSpec | None:
        given = await super().spec(runner_id)
        self._fresh.pop(runner_id, None)
        assert given == await super().spec(runner_id)
        return given


@contextlib.asynccontextmanager
async def opened(database: Database, publish: Callable[..., None] = lambda _: None) -> AsyncIterator[Store]:
    store = DoubtedStore(database.url, publish)
    await store.open()
    try:
        yield store
    finally:
        await store.aclose()


async def add(store: Store, number: int = 1, **facts: Any) -> Runner:  # noqa: ANN401
    runner, _ = await store.intend(intent(make(number, **facts)))
    return runner


async def end(store: Store, runner: Runner, reason: Reason | None = None) -> Runner:
    ended = await store.change(runner, finished(runner, reason, None, T + 50), "finished", T + 50)
    assert ended
    return ended


async def put(store: Store, number: int = 1, **facts: Any) -> Runner:  # noqa: ANN401
    """Record a runner as it is, whatever its pool says."""
    await store.adopt(make(number, **facts), T)
    return await store.get(make(number).runner_id)


@contextlib.asynccontextmanager
async def batched(store: Store) -> AsyncIterator[None]:
    """Keep the writer busy, so that what is asked for meanwhile is committed together."""
    begun = threading.Event()

    def hold(*_: object) -> None:
        begun.set()
        time.sleep(0.3)

    commits: list[object] = []
    sa.event.listen(store.database._write_engine, "commit", commits.append)
    busy = asyncio.ensure_future(store._write(hold))
    await asyncio.to_thread(begun.wait)
    yield
    await busy
    assert len(commits) == 2


def rows(database: Database, query: str) -> list[Any]:
    """Read the tables behind the store's back."""
    return database.rows(query)


def count(database: Database, table: str) -> int:
    number: int = rows(database, f"SELECT count(*) FROM {table}")[0][0]  # noqa: S608 - a name of ours
    return number


# Intents.


async def test_an_intent_is_a_runner_its_specification_and_its_first_event(
    store: Store, database: Database, published: list[Change]
) -> None:
    runner, replayed = await store.intend(intent(make()))
    assert not replayed
    assert await store.get(runner.runner_id) == runner == replace(make(), revision=runner.revision)
    assert await store.spec(runner.runner_id) == SPEC
    (event,) = await store.history(runner.runner_id)
    assert (event.type, event.from_phase, event.to_phase, event.at) == ("accepted", None, Phase.STARTING, T + 1)
    assert event.revision == runner.revision
    assert published == [Change(runner, event)]
    assert [count(database, table) for table in ("runners", "specs", "events", "idempotency_keys")] == [1, 1, 1, 0]


@pytest.mark.parametrize(
    "second",
    [
        {"slot_id": "slot-1"},
        {"slot_place": "node:/slots/1"},
        {"slot_id": "slot-1", "slot_place": None},
        {"slot_id": "slot-1", "pool_name": "another"},
    ],
    ids=["by its id", "by its place", "by its id though placeless", "across pools"],
)
@pytest.mark.parametrize("phase", [Phase.QUEUED, Phase.STARTING, Phase.RUNNING, Phase.STOPPING])
async def test_a_slot_has_one_live_runner_and_a_second_is_told_who_holds_it(
    store: Store, database: Database, second: dict[str, Any], phase: Phase
) -> None:
    first = await add(store)
    holder = await store.change(first, replace(first, phase=phase), "moved", T)
    with pytest.raises(SlotBusy) as refusal:
        await add(store, 2, **second)
    assert refusal.value.holder == holder
    assert count(database, "runners") == count(database, "specs") == 1
    await end(store, refusal.value.holder)
    await add(store, 3, **second)


async def test_slots_may_lie_in_one_another(store: Store) -> None:
    for number, place in enumerate(("a", "a/b", "", "a/b/c"), 1):
        await add(store, number, slot_place=f"node:/slots{place and '/'}{place}", engine="docker:unix:")


async def test_slots_elsewhere_and_runners_without_a_place_are_no_hindrance(store: Store, database: Database) -> None:
    await add(store, 1)
    await add(store, 2, slot_place="other-node:/slots/1")
    await add(store, 3, slot_place=None)
    await add(store, 4, slot_place=None)
    assert count(database, "runners") == 4


async def test_a_full_pool_refuses_and_says_why(store: Store, database: Database) -> None:
    for number in (1, 2):
        await store.intend(intent(make(number), refusal=room_for(2)))
    with pytest.raises(PoolFull, match="2 of 2 places are taken"):
        await store.intend(intent(make(3), refusal=room_for(2)))
    assert count(database, "runners") == count(database, "events") == 2


async def test_a_pools_use_is_what_its_placed_runners_hold_together(store: Store) -> None:
    await put(store, 1, cpu=0.5, memory_mib=100)
    await put(store, 2, cpu=1.0, memory_mib=None, phase=Phase.STOPPING, started_at=T)
    await put(store, 3, cpu=4.0, memory_mib=10, phase=Phase.QUEUED)
    await put(store, 4, cpu=8.0, memory_mib=1, pool_name="other")
    await end(store, await put(store, 5, cpu=16.0, memory_mib=10_000))
    used = {
        "local": Usage(runners=2, cpu=1.5, memory_mib=100, launching=1),
        "other": Usage(runners=1, cpu=8.0, memory_mib=1, launching=1),
    }
    asked: list[Usage] = []
    await store.intend(intent(make(6), refusal=asked.append, queue_limit=9))
    assert asked == [used["local"]]
    assert await store.usage() == used


async def test_who_finds_the_pool_full_may_wait_up_to_its_limit(store: Store) -> None:
    wishes = {"refusal": room_for(1), "queue_limit": 2}
    await store.intend(intent(make(1), **wishes))
    for number in (2, 3):
        runner, _ = await store.intend(intent(make(number), **wishes))
        assert (runner.phase, runner.calls) == (Phase.QUEUED, 0)
        assert (await store.history(runner.runner_id))[0].message == "1 of 1 places are taken"
    with pytest.raises(PoolFull):
        await store.intend(intent(make(4), **wishes))
    assert await store.next_in_line("local") == make(2).runner_id
    assert await store.queue_lengths() == {"local": 2}


async def test_nobody_overtakes_who_waits_though_there_is_room(store: Store) -> None:
    await add(store, 1, phase=Phase.QUEUED)
    with pytest.raises(PoolFull, match="1 launches wait for pool local already"):
        await store.intend(intent(make(2)))
    runner, _ = await store.intend(intent(make(3), queue_limit=2))
    assert runner.phase is Phase.QUEUED


async def test_only_the_first_in_the_queue_is_admitted_and_only_if_there_is_room(store: Store) -> None:
    await put(store, 1)
    first, second = await put(store, 2, phase=Phase.QUEUED), await put(store, 3, phase=Phase.QUEUED)
    assert await store.admit(second, unlimited, T + 9) == math.inf
    assert await store.admit(first, room_for(1), T + 9) == math.inf
    assert await store.admit(first, room_for(2), T + 9) == 0
    runner = await store.get(first.runner_id)
    assert runner == replace(admitted(first, T + 9), revision=runner.revision)
    assert await store.admit(first, unlimited, T + 9) == math.inf
    assert await store.admit(second, unlimited, T + 9) == 0


async def test_who_waits_for_one_node_holds_up_nobody_who_waits_for_another(store: Store) -> None:
    bound = [await put(store, number, phase=Phase.QUEUED, home=home) for number, home in enumerate("aab", 1)]
    assert await store.next_in_line("local", "b") == bound[2].runner_id
    assert await store.next_in_line("local", "c") is None
    assert await store.admit(bound[1], unlimited, T + 9) == math.inf
    assert await store.admit(bound[2], unlimited, T + 9) == 0
    anywhere = await put(store, 4, phase=Phase.QUEUED)
    assert await store.admit(anywhere, unlimited, T + 9) == 0


def begun(number: int, at: float, **facts: Any) -> Runner:  # noqa: ANN401 - the fields of Runner
    """Make a runner that is to begin at once, at this time."""
    return make(number, created_at=at, placed_at=at, **facts)


async def test_a_rate_counts_what_began_by_the_records_and_says_when_the_next_may(store: Store) -> None:
    two = Rate(2, 10)
    await store.intend(intent(begun(1, T), rate=two))
    await store.intend(intent(begun(2, T + 1), rate=two))
    await store.intend(intent(begun(3, T + 2, pool_name="other"), rate=two))
    with pytest.raises(PoolFull, match=r"begins no launch in the next 7\.0 s") as refused:
        await store.intend(intent(begun(4, T + 3), rate=two))
    assert refused.value.retry_after == 7
    queued, _ = await store.intend(intent(begun(5, T + 3), rate=two, queue_limit=1))
    assert (queued.phase, queued.placed_at) == (Phase.QUEUED, None)
    assert await store.admit(queued, unlimited, T + 4, rate=two) == 6
    assert await store.admit(queued, unlimited, T + 10, rate=two) == 0
    with pytest.raises(PoolFull, match=r"in the next 0\.5 s"):
        await store.intend(intent(begun(6, T + 10.5), rate=two))
    await store.intend(intent(begun(7, T + 11), rate=two))


async def test_a_clock_that_was_set_back_does_not_hold_up_launches(store: Store) -> None:
    one = Rate(1, 10)
    await store.intend(intent(begun(1, T + 3600), rate=one))
    await store.intend(intent(begun(2, T), rate=one))


# Idempotency keys.


async def test_the_same_request_under_the_same_key_finds_the_runner_as_it_now_is(store: Store, database: Database) -> None:
    runner, _ = await store.intend(intent(make(1), key="k"))
    ended = await end(store, runner)
    assert await store.intend(intent(make(2), key="k")) == (ended, True)
    assert await store.replayed("ann", "k", "body") == ended
    assert count(database, "runners") == 1


async def test_another_request_under_a_used_key_is_refused(store: Store) -> None:
    await store.intend(intent(make(1), key="k"))
    with pytest.raises(InvalidRequest) as refusal:
        await store.intend(intent(make(2), key="k", request_sha256="other"))
    assert refusal.value.code == "idempotency-key-reused"
    with pytest.raises(InvalidRequest):
        await store.replayed("ann", "k", "other")


async def test_a_key_is_its_callers_alone(store: Store) -> None:
    first, _ = await store.intend(intent(make(1), key="k"))
    second, replayed = await store.intend(intent(make(2), key="k", caller="bob", request_sha256="other"))
    assert not replayed
    assert await store.replayed("ann", "k", "body") == first
    assert await store.replayed("bob", "k", "other") == second
    assert await store.replayed("eve", "k", "body") is None


async def test_a_refused_request_does_not_use_its_key_up(store: Store) -> None:
    holder = await add(store, 1)
    for wishes in ({}, {"refusal": room_for(0)}):
        with pytest.raises((SlotBusy, PoolFull)):
            await store.intend(intent(make(2, slot_id="slot-1"), key="k", **wishes))
        await end(store, holder) if not wishes else None
    runner, replayed = await store.intend(intent(make(3), key="k", request_sha256="other"))
    assert (runner.runner_id, replayed) == (make(3).runner_id, False)


async def test_many_at_once_under_one_key_make_one_runner(store: Store, database: Database) -> None:
    answers = await asyncio.gather(*[store.intend(intent(make(number), key="k")) for number in range(50)])
    assert len({runner.runner_id for runner, _ in answers}) == 1
    assert sorted(replayed for _, replayed in answers) == [False] + [True] * 49
    assert [count(database, table) for table in ("runners", "specs", "events", "idempotency_keys")] == [1] * 4


async def test_many_at_once_for_one_slot_make_one_runner(store: Store, database: Database) -> None:
    tries = [store.intend(intent(make(number, slot_place="node:/same"))) for number in range(50)]
    answers = await asyncio.gather(*tries, return_exceptions=True)
    assert sum(isinstance(answer, SlotBusy) for answer in answers) == 49
    assert count(database, "runners") == 1


async def test_many_at_once_fill_a_pool_and_no_more(store: Store) -> None:
    tries = [store.intend(intent(make(number), refusal=room_for(7), queue_limit=5)) for number in range(40)]
    answers = await asyncio.gather(*tries, return_exceptions=True)
    assert sum(isinstance(answer, PoolFull) for answer in answers) == 40 - 7 - 5
    assert (await store.usage())["local"].runners == 7
    assert await store.queue_lengths() == {"local": 5}


# Changes.


async def test_a_change_is_written_with_its_event_and_told(store: Store, published: list[Change]) -> None:
    old = await add(store)
    asked = stop_asked(old, "by ann", 10, T + 3)
    new = await store.change(old, asked, "stop_asked", T + 3, {"grace": 10})
    assert new == replace(asked, revision=published[-1].event.revision)
    assert await store.get(old.runner_id) == new
    event = (await store.history(old.runner_id))[-1]
    assert published[-1] == Change(new, event)
    assert (event.type, event.at, event.from_phase, event.to_phase) == ("stop_asked", T + 3, Phase.STARTING, Phase.STARTING)
    assert (event.reason, event.message, event.data) == (Reason.CANCELLED, "by ann", {"grace": 10})


async def test_a_change_decided_on_an_old_revision_writes_and_tells_nothing(
    store: Store, database: Database, published: list[Change]
) -> None:
    old = await add(store)
    new = await store.change(old, replace(old, phase=Phase.RUNNING), "running", T)
    told = list(published)
    assert await store.change(old, finished(old, Reason.LOST, "", T), "finished", T) is None
    assert await store.get(old.runner_id) == new
    assert count(database, "events") == 2
    assert published == told


async def test_of_many_changes_decided_on_the_same_revision_one_is_written(store: Store, database: Database) -> None:
    old = await add(store)
    wishes = [replace(old, message=str(number)) for number in range(30)]
    answers = await asyncio.gather(*[store.change(old, wish, "changed", T) for wish in wishes])
    (winner,) = filter(None, answers)
    assert await store.get(old.runner_id) == winner
    assert count(database, "events") == 2


async def test_a_change_of_a_runner_that_is_not_there_writes_nothing(store: Store, database: Database) -> None:
    assert await store.change(make(9), make(9), "changed", T) is None
    assert count(database, "events") == 0


async def test_every_revision_is_an_event_and_events_are_told_in_their_order(
    store: Store, database: Database, published: list[Change]
) -> None:
    async def live(number: int) -> None:
        runner: Runner | None = await add(store, number)
        for step in range(10):
            assert runner
            runner = await store.change(runner, replace(runner, message=str(step)), "changed", T)

    await asyncio.gather(*[live(number) for number in range(20)])
    revisions = [change.event.revision for change in published]
    assert (
        revisions == sorted(set(revisions)) == [row[0] for row in rows(database, "SELECT revision FROM events ORDER BY 1")]
    )
    assert len(revisions) == 20 * 11
    assert all(change.runner.revision == change.event.revision for change in published)
    for number in range(20):
        history = await store.history(make(number).runner_id)
        assert (await store.get(make(number).runner_id)).revision == history[-1].revision


async def test_a_change_is_told_only_once_it_is_committed(database: Database) -> None:
    seen: list[bool] = []
    with ThreadPoolExecutor(1) as reader:
        reader.submit(time.sleep, 0).result()

        def look(changes: list[Change]) -> None:
            reading = reader.submit(rows, database, "SELECT revision FROM events")
            while not reading.done():  # no lock may be waited for on the event loop
                pass
            known = {row[0] for row in reading.result()}
            seen.extend(change.event.revision in known for change in changes)

        async with opened(database, look) as store:
            runners = await asyncio.gather(*[add(store, number) for number in range(10)])
            await asyncio.gather(*[end(store, runner) for runner in runners])
    assert seen == [True] * 20


async def test_a_caller_hears_of_its_write_after_everyone_was_told(store: Store, published: list[Change]) -> None:
    runner = await add(store)
    assert published[-1].runner == runner


# Many writes, one commit.


async def test_a_write_that_is_refused_does_not_harm_those_committed_with_it(store: Store, database: Database) -> None:
    async with batched(store):
        before, refused, after = await asyncio.gather(
            add(store, 1), add(store, 2, slot_id="slot-1"), add(store, 3), return_exceptions=True
        )
    assert isinstance(refused, SlotBusy)
    assert [before, after] == [await store.get(make(number).runner_id) for number in (1, 3)]
    assert count(database, "events") == 2


async def test_a_write_that_breaks_does_not_harm_those_committed_with_it(
    store: Store, database: Database, published: list[Change]
) -> None:
    def defect(*_: object) -> None:
        raise ZeroDivisionError

    async with batched(store):
        before, broken, after = await asyncio.gather(
            add(store, 1), store._write(defect), add(store, 2), return_exceptions=True
        )
    assert isinstance(broken, ZeroDivisionError)
    assert [change.runner for change in published] == [before, after]
    assert count(database, "runners") == 2


async def test_a_write_that_breaks_a_rule_of_the_tables_is_undone_alone(
    store: Store, database: Database, published: list[Change]
) -> None:
    await add(store, 1)
    same_id = make(2, runner_id=make(1).runner_id)
    async with batched(store):
        before, broken, after = await asyncio.gather(
            add(store, 3), store.intend(intent(same_id)), add(store, 4), return_exceptions=True
        )
    assert isinstance(broken, Exception)
    assert [change.runner for change in published[1:]] == [before, after]
    assert count(database, "runners") == count(database, "events") == 3


async def test_the_tables_guard_the_slots_even_against_us(database: Database, store: Store) -> None:
    first = await add(store, 1)
    second = await add(store, 2)
    for column, value in (("slot_id", first.slot_id), ("slot_place", first.slot_place)):
        with pytest.raises(sa.exc.IntegrityError):
            rows(database, f"UPDATE runners SET {column} = '{value}' WHERE runner_id = '{second.runner_id}'")  # noqa: S608


async def test_a_write_whose_caller_went_away_still_happens(store: Store, published: list[Change]) -> None:
    async with batched(store):
        caller = asyncio.create_task(add(store))
        await asyncio.sleep(0)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        await store.switch_pool("local", enabled=True)
    assert (await store.get(make().runner_id)).revision == published[0].event.revision


async def test_a_refusal_whose_caller_went_away_troubles_nobody(store: Store) -> None:
    await add(store)
    async with batched(store):
        caller = asyncio.create_task(add(store))
        await asyncio.sleep(0)
        caller.cancel()
        await add(store, 2)
    with pytest.raises(asyncio.CancelledError):
        await caller


async def test_closing_finishes_the_writes_that_were_asked_for(database: Database) -> None:
    async with opened(database) as store:
        writes = [asyncio.create_task(add(store, number)) for number in range(20)]
        await asyncio.sleep(0)
    assert len(await asyncio.gather(*writes)) == 20
    assert count(database, "runners") == 20


async def test_a_write_after_closing_is_refused_at_once(database: Database) -> None:
    async with opened(database) as store:
        await add(store)
    with pytest.raises(Unavailable):
        async with asyncio.timeout(8):
            await add(store, 2)


@on_sqlite
async def test_a_full_disk_refuses_the_intent_and_the_store_recovers(
    store: Store, database: Database, published: list[Change]
) -> None:
    await add(store, 1)
    before = count(database, "events")
    pages = rows(database, "PRAGMA page_count")[0][0]
    await limit_pages(store, pages)
    large = replace(SPEC, context=b"x" * 500_000)
    with pytest.raises(Unavailable) as refusal:
        await store.intend(replace(intent(make(2), key="k"), spec=large))
    assert refusal.value.code == "store-unavailable"
    assert (len(published), count(database, "events"), count(database, "runners")) == (1, before, 1)
    await limit_pages(store, 100_000)
    runner, replayed = await store.intend(replace(intent(make(2), key="k"), spec=large))
    assert not replayed
    assert await store.spec(runner.runner_id) == large


async def limit_pages(store: Store, pages: int) -> None:
    """Let the disk be full at so many pages of the database."""

    def limit(connection: sa.Connection, _: object) -> None:
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")

    await store._write(limit)


# What is kept beside the record.


async def test_a_sign_of_life_changes_no_revision_and_is_not_undone_by_a_change_decided_before(
    store: Store, database: Database
) -> None:
    old = await add(store)
    await store.beat(old.runner_id, T + 7)
    assert await store.get(old.runner_id) == replace(old, last_heartbeat=T + 7)
    assert count(database, "events") == 1
    changed = await store.change(old, replace(old, phase=Phase.RUNNING), "running", T + 8)
    assert changed
    assert changed == await store.get(old.runner_id)
    assert changed.last_heartbeat == T + 7
    ended = await end(store, changed)
    await store.beat(old.runner_id, T + 9)
    assert await store.get(old.runner_id) == ended


@on_sqlite
async def test_forgetting_wipes_the_secrets_from_the_file_and_stays_so(store: Store, path: Path, database: Database) -> None:
    runner = await end(store, await add(store))
    await store.forget_spec(runner.runner_id)
    assert await store.spec(runner.runner_id) is None
    assert await store.get(runner.runner_id) == replace(runner, cleaned=True)
    assert await store.unclean() == []
    assert count(database, "specs") == 0
    await store.change(runner, replace(runner, message="late"), "late", T)
    assert (await store.get(runner.runner_id)).cleaned
    await store.aclose()
    assert SECRET.encode() not in path.read_bytes()
    assert [file.name for file in path.parent.glob("runners.db*")] == ["runners.db"]


async def test_a_pool_stays_as_it_was_switched(store: Store) -> None:
    assert await store.pool_switches() == {}
    for enabled in (False, True, False):
        await store.switch_pool("local", enabled=enabled)
        assert await store.pool_switches() == {"local": enabled}


async def test_everything_about_a_runner_survives_a_restart_to_the_letter(database: Database) -> None:
    whole = make(
        labels={"team": "家", "": "\n"},
        cpu=0.1 + 0.2,
        memory_mib=2**43,
        token_sha256="ab",  # noqa: S106 - no secret
        attempts=(Attempt(number=1, at=T + 1 / 3, error="refused: \x7f \u2028 🚀", retryable=True, delay_seconds=1e-9),),
        handle=Handle(
            runner_id=make().runner_id,
            pid=2**22,
            node="node",
            enforced_by=Enforcement(cpu="cgroup1", memory_mib="cgroup2"),
            isolation="user",
        ),
        stop=Stop(reason=Reason.CANCELLED, message="why", at=T, grace_seconds=0.5, sent=True),
        policy=Policy(run_timeout_seconds=1e9, heartbeat_timeout_seconds=0.001, retry_attempts=0),
        started_at=T + 0.1,
        observed_at=T + 1e-7,
        exit_code=-(2**31),
        signal="SIGKILL",
        oom_killed=True,
        log_truncated=True,
        last_heartbeat=T + 2 / 3,
        next_attempt_at=1_700_000_000.123456,
    )
    spec = replace(
        SPEC, context='{"task_title": "家 🚀 \\u0000"}'.encode(), options={"a": [1, 2.5, None, {"b": "ü"}]}, cpu=0.5
    )
    async with opened(database) as store:
        runner, _ = await store.intend(replace(intent(whole), spec=spec))
        ended = await end(store, runner, Reason.EVICTED)
    async with opened(database) as store:
        assert await store.get(whole.runner_id) == ended
        assert replace(ended, phase=whole.phase, reason=None, finished_at=None, revision=0) == whole
        assert await store.spec(whole.runner_id) == spec
        assert [event.type for event in await store.history(whole.runner_id)] == ["accepted", "finished"]


async def test_an_adopted_runner_takes_its_slot_and_has_no_secrets(store: Store, published: list[Change]) -> None:
    runner = make(phase=Phase.RUNNING, started_at=T, handle=Handle(runner_id=make().runner_id))
    await store.adopt(runner, T + 5)
    assert await store.get(runner.runner_id) == replace(runner, revision=published[0].event.revision)
    assert (published[0].event.type, published[0].event.at) == ("adopted", T + 5)
    assert await store.spec(runner.runner_id) is None
    assert await store.unclean() == [runner.runner_id]
    with pytest.raises(SlotBusy):
        await store.adopt(make(2, slot_id="slot-1"), T + 5)


# Reads.


async def test_who_is_not_there_is_not_found(store: Store) -> None:
    with pytest.raises(NotFound, match="no runner runner-nobody"):
        await store.get("runner-nobody")
    assert await store.spec("runner-nobody") is None
    assert await store.history("runner-nobody") == []


async def test_pages_are_newest_first_and_lose_and_repeat_nothing_while_runners_are_added(store: Store) -> None:
    for number in range(10):
        await add(store, number)
    seen: list[str] = []
    before: int | None = None
    for late in range(100, 105):
        page, before = await store.page(Filter(limit=3, before=before))
        seen += [runner.runner_id for runner in page]
        await add(store, late)
        if before is None:
            break
    assert seen == [make(number).runner_id for number in reversed(range(10))]


async def test_a_page_that_ends_with_the_last_runner_has_no_next(store: Store) -> None:
    for number in range(4):
        await add(store, number)
    first, before = await store.page(Filter(limit=2))
    second, end_of_list = await store.page(Filter(limit=2, before=before))
    assert (len(first), len(second), end_of_list) == (2, 2, None)
    assert await store.page(Filter(limit=4)) == (first + second, None)
    assert await store.page(Filter(before=0)) == ([], None)


@pytest.mark.parametrize(
    ("wanted", "numbers"),
    [
        (Filter(), [6, 5, 4, 3, 2, 1]),
        (Filter(state=State.PENDING), [2, 1]),
        (Filter(state=State.RUNNING), [4, 3]),
        (Filter(state=State.COMPLETED), [5]),
        (Filter(state=State.FAILED), [6]),
        (Filter(phase=Phase.QUEUED), [2]),
        (Filter(phase=Phase.STARTING), [3, 1]),
        (Filter(phase=Phase.RUNNING), [4]),
        (Filter(phase=Phase.FINISHED), [6, 5]),
        (Filter(pool="other"), [6, 3]),
        (Filter(task_id="task-3"), [3]),
        (Filter(slot_id="slot-5"), [5]),
        (Filter(since=T + 4), [6, 5, 4]),
        (Filter(pool="other", state=State.FAILED, since=T), [6]),
        (Filter(state=State.RUNNING, phase=Phase.STARTING, slot_id="slot-3", task_id="task-3"), [3]),
        (Filter(pool="nowhere"), []),
        (Filter(labels=(("team", "core"),)), [5, 4]),
        (Filter(labels=(("team", "core"), ("tier", "1"))), [5]),
        (Filter(labels=(("team", "core"),), state=State.RUNNING), [4]),
        (Filter(labels=(("tier", "core"),)), []),
    ],
    ids=lambda value: str(value) if isinstance(value, Filter) else "",
)
async def test_a_list_holds_what_was_asked_for(store: Store, wanted: Filter, numbers: list[int]) -> None:
    handle = Handle(runner_id="r")
    await add(store, 1)
    await add(store, 2, phase=Phase.QUEUED, pool_name="waiting")
    await add(store, 3, started_at=T, handle=handle, pool_name="other")
    await add(store, 4, started_at=T, handle=handle, phase=Phase.RUNNING, labels={"team": "core"})
    await end(store, await add(store, 5, labels={"team": "core", "tier": "1"}))
    await end(store, await add(store, 6, pool_name="other"), Reason.LOST)
    page, _ = await store.page(wanted)
    assert [runner.runner_id for runner in page] == [make(number).runner_id for number in numbers]


async def test_live_runners_are_told_by_what_they_need(store: Store) -> None:
    starting = await add(store, 1)
    runner = await add(store, 2)
    running = await store.change(runner, accepted(runner, Handle(runner_id=runner.runner_id), T), "started", T)
    queued = await add(store, 3, phase=Phase.QUEUED, pool_name="other")
    ended = await end(store, await add(store, 4))
    gone = await end(store, await add(store, 5))
    await store.forget_spec(gone.runner_id)
    assert await store.accepted("local-process") == [running]
    assert await store.unclean() == [starting.runner_id, runner.runner_id, queued.runner_id, ended.runner_id]
    assert await store.next_in_line("other") == queued.runner_id
    assert await store.next_in_line("local") is None


MANY = 4000
"""Ended runners of the past, among which those that matter now are to be found."""

QUERIES: dict[str, Callable[[Store, Runner, Runner], Awaitable[object]]] = {
    "intend": lambda store, _, __: store.intend(intent(make(MANY + 9), key="k9", queue_limit=99)),
    "slot": lambda store, _, __: store.intend(intent(make(MANY + 8, slot_id="slot-x", slot_place=None), queue_limit=99)),
    "admit": lambda store, _, queued: store.admit(queued, unlimited, T, rate=Rate(9, 1)),
    "change": lambda store, runner, _: store.change(runner, replace(runner, message="x"), "changed", T),
    "beat": lambda store, runner, _: store.beat(runner.runner_id, T),
    "forget": lambda store, runner, _: store.forget_spec(runner.runner_id),
    "get": lambda store, runner, _: by_the_database(store, runner).get(runner.runner_id),
    "named": lambda store, runner, _: by_the_database(store, runner).named(runner.runner_id),
    "events": lambda store, _, __: store.events(3, 100),
    "span": lambda store, _, __: store.span(),
    "outdated": lambda store, _, __: store.outdated(1.0, None, fresh=1.0, told=None, after=0, limit=10),
    "forget whole": lambda store, runner, _: store.forget([runner.runner_id]),
    "spec": lambda store, runner, _: by_the_database(store, runner).spec(runner.runner_id),
    "unclean": lambda store, _, __: store.unclean(),
    "accepted": lambda store, _, __: store.accepted("local-process"),
    "next in line": lambda store, _, __: store.next_in_line("local", "a"),
    "replayed": lambda store, _, __: store.replayed("ann", "k", "body"),
    "history": lambda store, runner, _: store.history(runner.runner_id),
    "usage": lambda store, _, __: store.usage(),
    "queue lengths": lambda store, _, __: store.queue_lengths(),
    "list": lambda store, _, __: store.page(Filter()),
    "list further": lambda store, _, __: store.page(Filter(before=MANY // 2)),
    "list pending": lambda store, _, __: store.page(Filter(state=State.PENDING)),
    "list running": lambda store, _, __: store.page(Filter(state=State.RUNNING)),
    "list failed": lambda store, _, __: store.page(Filter(state=State.FAILED)),
    "list queued": lambda store, _, __: store.page(Filter(phase=Phase.QUEUED)),
    "list stopping": lambda store, _, __: store.page(Filter(phase=Phase.STOPPING)),
    "list finished": lambda store, _, __: store.page(Filter(phase=Phase.FINISHED)),
    "list pool": lambda store, _, __: store.page(Filter(pool="local")),
    "list pool running": lambda store, _, __: store.page(Filter(pool="local", state=State.RUNNING)),
    "list pool in phase": lambda store, _, __: store.page(Filter(pool="local", phase=Phase.RUNNING)),
    "list another pool": lambda store, _, __: store.page(Filter(pool="nowhere")),
    "list task": lambda store, _, __: store.page(Filter(task_id="task-1")),
    "list slot": lambda store, _, __: store.page(Filter(slot_id="slot-1")),
    "list label": lambda store, _, __: store.page(Filter(labels=(("team", "core"),))),
    "list labels": lambda store, _, __: store.page(Filter(labels=(("team", "core"), ("tier", "1")))),
    "list label further": lambda store, _, __: store.page(Filter(labels=(("team", "core"),), before=MANY // 2)),
    "list pools": lambda store, _, __: store.page(Filter(pools=("local", "nowhere"))),
    "list recent": lambda store, _, __: store.page(Filter(since=T + 10 * MANY)),
}


@on_sqlite
@pytest.mark.parametrize("name", QUERIES)
async def test_no_query_reads_through_the_runners_of_the_past(store: Store, path: Path, name: str) -> None:
    """Watch the SQL of a call, ask SQLite how it would run it, and count the steps it takes among many ended runners."""
    live = await add(store, 1)
    queued = await add(store, 2, phase=Phase.QUEUED)
    asked = watch_sql(store)
    await QUERIES[name](store, live, queued)
    fill(path)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for statement, parameters in asked:
            steps = count_steps(connection, statement, parameters)
            plan = explain(connection, statement, parameters)
            assert steps < MANY, f"{steps} steps for {statement}: {plan}"
            scans = [line for line in plan if line.startswith("SCAN") and "INDEX" not in line]
            assert not scans or name.startswith("list"), f"{scans} for {statement}"
    assert asked


@on_sqlite
async def test_a_page_of_all_since_long_ago_is_no_look_at_them_all(store: Store, path: Path) -> None:
    await add(store, 1)
    fill(path)
    asked = watch_sql(store)
    page, more = await store.page(Filter(since=0, limit=10))
    assert (len(page), more is not None) == (10, True)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert sum(count_steps(connection, statement, parameters) for statement, parameters in asked) < MANY
    last, more = await store.page(Filter(since=0, limit=10, before=20))
    assert ([runner.revision for runner in last] != [], more) == (True, None)


@on_sqlite
async def test_whether_a_slot_is_free_is_found_without_a_look_at_the_other_live_runners(store: Store, path: Path) -> None:
    await asyncio.gather(*(add(store, number) for number in range(1, 301)))
    asked = watch_sql(store)
    await store.check_slot(make(999))
    [(statement, parameters)] = asked
    with contextlib.closing(sqlite3.connect(path)) as connection:
        count_steps(connection, "SELECT 1 FROM runners WHERE seq = 0", ())  # reads the schema
        assert count_steps(connection, statement, parameters) < 300


def by_the_database(store: Store, runner: Runner) -> Store:
    """Have a store forget what it has at hand of a runner."""
    store._recent.drop(runner.runner_id)
    store._fresh.pop(runner.runner_id, None)
    return store


def watch_sql(store: Store) -> list[tuple[str, tuple[Any, ...]]]:
    """Collect the queries and updates that a store makes from now on."""
    asked: list[tuple[str, tuple[Any, ...]]] = []

    def note(_: object, __: object, statement: str, parameters: tuple[Any, ...], *___: object) -> None:
        if statement.startswith(("SELECT", "UPDATE", "DELETE")):
            asked.append((statement, parameters))

    for engine in (store.database._write_engine, store.database._read_engine):
        sa.event.listen(engine, "before_cursor_execute", note)
    return asked


def fill(path: Path) -> None:
    """Put the past in front of the present: many ended runners of the same pool, with their events."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE runners SET seq = seq + 1000000")
        connection.execute(
            """WITH RECURSIVE past(n) AS (SELECT 10 UNION ALL SELECT n + 1 FROM past WHERE n < ?) INSERT INTO runners
            (seq, runner_id, phase, state, task_id, slot_id, cleaned, revision, pool_name, created_at, cpu, memory_mib, body)
            SELECT n, 'past-' || n, 'finished', 'completed', 'task-' || n, 'slot-' || (n % 50), 1,
            revision, pool_name, created_at, cpu, memory_mib, body
            FROM past, (SELECT * FROM runners ORDER BY seq LIMIT 1)""",
            [MANY],
        )
        for label in (("team", "core"), ("tier", "1")):
            connection.execute("INSERT INTO runner_labels SELECT ?, ?, seq FROM runners WHERE phase = 'finished'", label)
        connection.execute(
            """INSERT INTO events (revision, runner_id, at, body)
            SELECT seq + 1000, runner_id, 0, '{}' FROM runners WHERE phase = 'finished'"""
        )
        connection.commit()


def count_steps(connection: sqlite3.Connection, statement: str, parameters: tuple[Any, ...]) -> int:
    steps = 0

    def step() -> int:
        nonlocal steps
        steps += 10
        return 0

    connection.set_progress_handler(step, 10)
    connection.execute(statement, parameters).fetchall()
    connection.set_progress_handler(None, 0)
    connection.rollback()
    return steps


def explain(connection: sqlite3.Connection, statement: str, parameters: tuple[Any, ...]) -> list[str]:
    return [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)]


# The file.


@on_sqlite
async def test_a_commit_is_on_the_disk_and_readers_do_not_wait_for_it(store: Store) -> None:
    def pragmas(connection: sa.Connection, *_: object) -> list[object]:
        names = ("journal_mode", "synchronous", "secure_delete")
        return [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names]

    assert await store._write(pragmas) == ["wal", 2, 1]


async def test_readers_cannot_write(store: Store) -> None:
    with pytest.raises(Unavailable):
        await store._read(lambda connection: connection.exec_driver_sql("DELETE FROM runners"))


@on_sqlite
async def test_nobody_else_may_read_the_file(store: Store, path: Path) -> None:
    await add(store)
    for file in path.parent.glob("runners.db*"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


@on_sqlite
async def test_the_migrations_make_the_tables_of_the_code(store: Store, path: Path, tmp_path: Path) -> None:
    await add(store)
    engine = sa.create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()
    fresh = sa.create_engine(f"sqlite:///{tmp_path / 'fresh.db'}")
    metadata.create_all(fresh)
    fresh.dispose()
    for file in (path, tmp_path / "fresh.db"):
        assert "AUTOINCREMENT" in str(
            rows(Database(f"sqlite:///{file}"), "SELECT sql FROM sqlite_master WHERE name = 'events'")
        )
    assert indexes(path) == indexes(tmp_path / "fresh.db")


@on_sqlite
async def test_what_was_there_before_its_table_or_column_is_found(path: Path, database: Database) -> None:
    async with opened(database) as store:
        await add(store, 1, labels={"team": "core"})
        await put(store, 2, phase=Phase.QUEUED, home="a")
        await put(store, 3, phase=Phase.QUEUED, home="b")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for name in (
            "runner_labels",
            "history",
            "webhook_targets",
            "webhook_arrears",
            "replicas",
            "leases",
            "installations",
        ):
            connection.execute(f"DROP TABLE {name}")
        connection.execute("DROP INDEX idempotency_keys_runner")
        connection.execute("DROP INDEX runners_placed")
        for name in ("placed_at", "log_kept_by", "home"):
            connection.execute(f"ALTER TABLE runners DROP COLUMN {name}")
        connection.execute("UPDATE alembic_version SET version_num = '0001'")
        connection.commit()
    async with opened(database) as store:
        page, _ = await store.page(Filter(labels=(("team", "core"),)))
        assert [runner.runner_id for runner in page] == [make(1).runner_id]
        assert [await store.next_in_line("local", home) for home in "ab"] == [make(2).runner_id, make(3).runner_id]


async def test_an_end_that_came_before_a_stop_is_not_told_as_that_stop(store: Store) -> None:
    runner = await add(store)
    asked = await changed(store, runner, stop_asked(accepted(runner, Handle(runner_id=runner.runner_id), T), "stop", 10, T))
    await changed(store, asked, finished(asked, None, None, T))
    stop, end = (await store.history(runner.runner_id))[-2:]
    assert (stop.reason, stop.message) == (Reason.CANCELLED, "stop")
    assert (end.reason, end.message) == (None, None)


async def changed(store: Store, old: Runner, new: Runner) -> Runner:
    written = await store.change(old, new, "changed", T)
    assert written
    return written


def indexes(path: Path) -> set[tuple[str, str]]:
    return set(
        rows(Database(f"sqlite:///{path}"), "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL")
    )


async def test_the_newest_migration_is_the_one_the_code_expects(store: Store, database: Database) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(app.__file__).with_name("migrations")))
    assert ScriptDirectory.from_config(config).get_heads() == [HEAD]
    assert rows(database, "SELECT version_num FROM alembic_version") == [(HEAD,)]
    await add(store)


async def test_a_database_of_a_newer_version_is_refused_and_left_alone(database: Database) -> None:
    async with opened(database) as store:
        await add(store)
    rows(database, "UPDATE alembic_version SET version_num = '9999'")
    store = Store(database.url, lambda _: None)
    with pytest.raises(ConfigurationError, match="newer version"):
        await store.open()
    await store.aclose()
    assert rows(database, "SELECT version_num FROM alembic_version") == [("9999",)]
    assert count(database, "runners") == 1


async def test_what_is_no_database_is_refused_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("no database, and long enough to be taken for one" * 100)
    for url in (
        "no url",
        "postgresql://localhost/runners",
        "sqlite://",
        "sqlite:///:memory:",
        f"sqlite:///{tmp_path}",
        f"sqlite:///{tmp_path}/no/such/directory/runners.db",
        f"sqlite:///{tmp_path}/text",
    ):
        with pytest.raises(ConfigurationError) as refusal:
            await open_and_close(url)
        assert "\n" not in str(refusal.value)
    assert not Path(":memory:").exists()


async def open_and_close(url: str) -> None:
    store = Store(url, lambda _: None)
    try:
        await store.open()
    finally:
        await store.aclose()


# What is forgotten.


async def test_the_newest_are_kept_and_whoever_ended_just_now(store: Store) -> None:
    runners = [await add(store, number, created_at=float(number)) for number in range(1, 6)]
    for number, runner in enumerate(runners[:4], 1):
        await leave(store, runner, at=10.0 * number)
    ids = [runner.runner_id for runner in runners]

    async def outdated(
        ended_before: float | None, keep: int | None, fresh: float = 1000.0, told: int | None = None
    ) -> list[str]:
        found: list[str] = []
        place: int | None = 0
        while place is not None:
            some, place = await store.outdated(ended_before, keep, fresh=fresh, told=told, after=place, limit=2)
            found += some
        return found

    assert await outdated(None, None) == []
    assert await outdated(25.0, None) == ids[:2]
    assert await outdated(None, 3) == ids[:2]
    assert await outdated(None, 0) == ids[:4]
    assert await outdated(None, 0, fresh=25.0) == ids[:2]
    assert await outdated(35.0, 4) == ids[:3]
    second = await store.get(ids[1])
    assert await outdated(None, 0, told=second.revision) == ids[:2]


async def test_who_was_adopted_sends_nobody_away(store: Store) -> None:
    """One that ran all the time is found again, after others that were launched later."""
    for number in range(1, 6):
        await leave(store, await add(store, number, created_at=float(number)), at=10.0)
    await store.adopt(make(9, created_at=0.5), T)
    assert await store.outdated(None, 5, fresh=1000.0, told=None, after=0, limit=10) == ([], None)
    found, _ = await store.outdated(None, 4, fresh=1000.0, told=None, after=0, limit=10)
    assert found == [make(1).runner_id]


async def test_an_end_that_was_told_late_is_kept_from_then_on(store: Store) -> None:
    runner = await add(store, created_at=1.0)
    assert await store.change(runner, finished(runner, Reason.LOST, "gone", 2.0), "finished", 100.0)
    await store.forget_spec(runner.runner_id)
    for ended_before, keep, fresh in ((50.0, None, 0.0), (None, 0, 50.0)):
        assert await store.outdated(ended_before, keep, fresh=fresh, told=None, after=0, limit=10) == ([], None)
    assert (await store.outdated(101.0, None, fresh=0.0, told=None, after=0, limit=10))[0] == [runner.runner_id]


async def test_only_what_ended_and_is_cleaned_up_is_forgotten(store: Store) -> None:
    live, unclean, done = [await add(store, number) for number in (1, 2, 3)]
    for runner in (unclean, done):
        await leave(store, runner, at=10.0, clean=runner is done)
    await store.forget([live.runner_id, unclean.runner_id, done.runner_id])
    assert set(await store.known([live.runner_id, unclean.runner_id, done.runner_id])) == {live.runner_id, unclean.runner_id}
    assert await store.history(unclean.runner_id)
    assert await store.history(done.runner_id) == []


async def leave(store: Store, runner: Runner, at: float, *, clean: bool = True) -> None:
    """End a runner, and say that its engine holds nothing of it any more."""
    assert await store.change(runner, finished(runner, Reason.LOST, "gone", at), "finished", at)
    if clean:
        await store.forget_spec(runner.runner_id)


# What is read without a look into the database.


async def test_what_is_read_by_name_is_what_the_database_has_whatever_was_written(store: Store) -> None:
    async def same(runner_id: str) -> Runner:
        named = await store.named(runner_id)
        assert named == await store.get(runner_id)
        return named

    runner = await add(store)
    assert await same(runner.runner_id) == runner
    await store.beat(runner.runner_id, T + 1)
    assert (await same(runner.runner_id)).last_heartbeat == T + 1
    running = await store.change(runner, accepted(runner, Handle(runner_id=runner.runner_id), T + 2), "started", T + 2)
    assert running
    await asyncio.gather(store.beat(runner.runner_id, T + 3), store.change(running, running, "again", T + 3))
    latest = await same(runner.runner_id)
    await leave(store, latest, at=T + 4)
    await store.beat(runner.runner_id, T + 5)
    ended = await same(runner.runner_id)
    assert (ended.cleaned, ended.last_heartbeat) == (True, T + 3)
    with pytest.raises(NotFound):
        await store.named(runner.runner_id, {"another"})
    await store.forget([runner.runner_id])
    with pytest.raises(NotFound):
        await store.named(runner.runner_id)


async def test_a_write_that_fails_is_not_read(store: Store) -> None:
    runner = await add(store)
    with pytest.raises(SlotBusy):
        await add(store, 2, slot_id=runner.slot_id)
    stale = replace(runner, revision=runner.revision + 1)
    assert await store.change(stale, stale, "too late", T) is None
    assert await store.named(runner.runner_id) == runner
    with pytest.raises(NotFound):
        await store.named(make(2).runner_id)


async def test_a_write_that_the_database_refuses_puts_no_secret_into_the_log(
    store: Store, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    database.rows("DROP TABLE specs")
    with pytest.raises(Unavailable, match="specs"):
        await store.intend(intent(make()))
    assert "specs" in caplog.text
    assert SECRET not in caplog.text
