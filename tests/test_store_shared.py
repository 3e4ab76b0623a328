"""A database that several stores share: what each hears of the others, and what a lost connection may not do."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable
from typing import Literal

import psycopg
import pytest
from conftest import until
from postgres import Proxy, fresh_database
from test_store import end, intent, make

from app.errors import ConfigurationError, InvalidRequest, SlotBusy, Unavailable
from app.events import Change
from app.store import Store


@contextlib.asynccontextmanager
async def opened(url: str, publish: Callable[..., None] = lambda _: None) -> AsyncIterator[Store]:
    store = Store(url, publish)
    await store.open()
    try:
        yield store
    finally:
        await store.aclose()


def said(changes: list[Change]) -> list[tuple[str, str, int]]:
    return [(change.event.type, change.runner.runner_id, change.event.revision) for change in changes]


async def test_stores_that_open_at_once_make_the_tables_once(postgres: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        stores = [opened(postgres) for _ in range(4)]
        first, *others = await asyncio.gather(*[stack.enter_async_context(store) for store in stores])
        runner, _ = await first.intend(intent(make()))
        assert [await other.get(runner.runner_id) for other in others] == [runner] * 3


async def test_everybody_is_told_of_every_change_in_the_order_of_revisions(postgres: str) -> None:
    told: list[list[Change]] = [[], [], []]
    async with contextlib.AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(opened(postgres, each.extend)) for each in told]
        writes = [stores[number % 3].intend(intent(make(number))) for number in range(60)]
        runners = [runner for runner, _ in await asyncio.gather(*writes)]
        await asyncio.gather(*[end(stores[number % 2], runner) for number, runner in enumerate(runners)])
        await until(lambda: all(len(each) == 120 for each in told))
    revisions = [change.event.revision for change in told[0]]
    assert revisions == sorted(revisions)
    assert said(told[0]) == said(told[1]) == said(told[2])


async def test_a_slot_is_given_once_whichever_store_is_asked(postgres: str) -> None:
    async with opened(postgres) as one, opened(postgres) as other:
        tries = [(one, other)[number % 2].intend(intent(make(number, slot_id="same"))) for number in range(20)]
        answers = await asyncio.gather(*tries, return_exceptions=True)
    assert sum(isinstance(answer, SlotBusy) for answer in answers) == 19


@pytest.mark.parametrize("lost", ["commit", "answer"])
async def test_a_commit_whose_answer_is_lost_is_settled_by_reading(postgres: str, lost: Literal["commit", "answer"]) -> None:
    proxy, told = Proxy(), list[Change]()
    async with proxy.serving(postgres) as url, opened(url, told.extend) as store:
        await store.switch_pool("local", enabled=True)
        proxy.lose = lost
        runner, _ = await store.intend(intent(make(), key="k"))
        assert proxy.lost == 1
        assert [event.revision for event in await store.history(runner.runner_id)] == [runner.revision]
        assert await store.get(runner.runner_id) == runner
        await until(lambda: len(told) == 1)


@pytest.mark.usefixtures("postgres")
async def test_a_restarted_server_is_waited_for() -> None:
    told = list[Change]()
    with fresh_database() as database:
        async with opened(database, told.extend) as store:
            runner, _ = await store.intend(intent(make()))
            with psycopg.connect(database, autocommit=True) as admin:
                everybody = "SELECT pid FROM pg_stat_activity WHERE pid != pg_backend_pid() AND datname = current_database()"
                for (pid,) in admin.execute(everybody).fetchall():
                    admin.execute("SELECT pg_terminate_backend(%s)", [pid])
            assert await store.get(runner.runner_id) == runner
            ended = await end(store, runner)
            assert await store.get(runner.runner_id) == ended
            await until(lambda: len(told) == 2)


async def test_while_the_server_is_away_reads_are_refused_and_writes_wait(postgres: str) -> None:
    proxy, told = Proxy(), list[Change]()
    async with proxy.serving(postgres) as url, opened(url, told.extend) as store, opened(postgres) as other:
        runner, _ = await store.intend(intent(make()))
        proxy.cut(away=True)
        with pytest.raises(Unavailable) as refusal:
            await store.get(runner.runner_id)
        assert refusal.value.code == "store-unavailable"
        writing = asyncio.create_task(store.intend(intent(make(2))))
        elsewhere, _ = await other.intend(intent(make(3)))
        await asyncio.sleep(0.3)
        assert not writing.done()
        proxy.cut()
        late, _ = await writing
        await until(lambda: len(told) == 3)
        assert [change.runner for change in told] == [runner, elsewhere, late]


@pytest.mark.usefixtures("postgres")
async def test_a_server_that_takes_no_writes_is_left_for_one_that_does() -> None:
    """As after a failover, when a name still leads to the server that was demoted."""
    with fresh_database() as database, psycopg.connect(database, autocommit=True) as admin:

        def set_read_only(word: str) -> None:
            name = admin.info.dbname
            admin.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = {word}'.encode())
            everybody = (
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid != pg_backend_pid() AND datname = %s"
            )
            admin.execute(everybody, [name])

        async with opened(database) as store:
            set_read_only("on")
            writing = asyncio.create_task(store.intend(intent(make())))
            await asyncio.sleep(1)
            assert not writing.done()
            set_read_only("off")
            runner, _ = await writing
            assert await store.get(runner.runner_id) == runner


async def test_a_server_that_is_away_at_the_start_is_waited_for(postgres: str) -> None:
    proxy = Proxy()
    async with proxy.serving(postgres) as url:
        proxy.cut(away=True)
        store = Store(url, lambda _: None)
        opening = asyncio.create_task(store.open())
        await asyncio.sleep(0.2)
        assert not opening.done()
        proxy.cut()
        await opening
        assert await store.unclean() == []
        await store.aclose()


async def test_a_database_that_is_not_there_is_refused_with_a_reason(postgres: str) -> None:
    store = Store(postgres.partition("?")[0].rpartition("/")[0] + "/no-such-database", lambda _: None)
    with pytest.raises(ConfigurationError, match="does not exist"):
        await store.open()
    await store.aclose()


async def test_what_no_index_can_hold_is_refused_alone(postgres: str) -> None:
    long = "".join(chr(0x1000 + secrets.randbelow(0xC000)) for _ in range(1024))  # some 3 KB that do not compress
    async with opened(postgres) as store:
        wishes = [intent(make(number, **({"task_id": long} if number == 7 else {}))) for number in range(20)]
        answers = await asyncio.gather(*map(store.intend, wishes), return_exceptions=True)
        assert [number for number, answer in enumerate(answers) if isinstance(answer, BaseException)] == [7]
        assert isinstance(answers[7], InvalidRequest)


async def test_a_server_that_says_nothing_is_told_as_one_that_is_away(
    postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.database.PATIENCE_SECONDS", 1.0)
    proxy = Proxy()
    async with proxy.serving(postgres) as url, opened(url) as store:
        runner, _ = await store.intend(intent(make()))
        proxy.flows.clear()
        with pytest.raises(Unavailable, match="does not answer within 1 s"):
            await store.usage()
        proxy.flows.set()
        assert await store.get(runner.runner_id) == runner
