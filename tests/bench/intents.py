"""Durable intents a second, in SQLite and in PostgreSQL, beside the bare driver.

    python tests/bench/intents.py [--intents 1000] [--rounds 7] [--at-once 1 4 16 64] [--database URL] [--json FILE]

An intent is what makes a launch the service's own: slot and place are checked, runner, event and specification are written,
and the disk has it. The store is asked from a process of its own, and in turn with it a process that sends the same
statements, recorded from the store, through the driver alone, a transaction for each. Where several replicas share a
database, writers wait for one another: so two stores at once are measured beside one. ``--database`` (or ``TEST_POSTGRES``)
is a PostgreSQL database where schemas may be made; without a server that part is left out.
"""

import argparse
import asyncio
import secrets
import sqlite3
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import sqlalchemy as sa
from bare import Bare, obey, spec_of
from figures import Json, Report, Round, bench, compared, drive, in_turns, table_of_sides

from app.runner import Phase, Policy, Runner, identity
from app.store import Intent, Store

sys.path.insert(0, str(Path(__file__).parents[1]))

from postgres import SERVER, fresh_schema

Statement = tuple[str, Any]
MARK, POOL = "f00dfeedf00d", "f001f001f001"


def intent_of(mark: str, pool: str) -> Intent:
    """Write the intent of a launch; its id, its slot and its place are told apart by the mark, of twelve hex digits."""
    spec = spec_of(f"runner-{mark}", Path("/slots") / mark, ("true",))
    runner = Runner(
        runner_id=f"runner-{mark}",
        task_id=f"task-{mark}",
        pool_name=pool,
        slot_id=mark,
        slot_place=f"bench:/slots/{mark}",
        engine="local-process",
        phase=Phase.STARTING,
        calls=1,
        created_at=1000.0,
        launch_deadline=1300.0,
        policy=Policy(),
    )
    spec = replace(spec, labels=identity(runner))
    return Intent(
        runner=runner, spec=spec, refusal=lambda _: None, queue_limit=0, caller="bench", key=None, request_sha256="none"
    )


@asynccontextmanager
async def open_store(url: str) -> AsyncIterator[Store]:
    store = Store(url, publish=lambda _: None)
    try:
        await store.open()
        yield store
    finally:
        await store.aclose()


async def ask_store(url: str) -> None:
    """Be the process that asks a store for intents."""
    async with open_store(url) as store:

        async def run(count: int, at_once: int, pool: str) -> Round:
            intents = [intent_of(secrets.token_hex(6), pool) for _ in range(count)]

            async def launch(number: int) -> None:
                await store.intend(intents[number])

            return await drive(count, at_once, launch)

        await obey(run)


async def statements(url: str) -> list[Statement]:
    """Record what the store says to its database for one intent, without what begins and ends transactions."""
    said: list[Statement] = []

    def note(_connection: object, _cursor: object, statement: str, parameters: Any, *_: object) -> None:  # noqa: ANN401
        if not statement.startswith(("BEGIN", "SAVEPOINT", "RELEASE")):
            said.append((statement, parameters))

    async with open_store(url) as store:
        await store.intend(intent_of(secrets.token_hex(6), POOL))  # the first one may say more
        sa.event.listen(store.database._write_engine, "before_cursor_execute", note)
        await store.intend(intent_of(MARK, POOL))
        sa.event.remove(store.database._write_engine, "before_cursor_execute", note)
    return said


def marked(parameters: Any, mark: str, pool: str) -> Any:  # noqa: ANN401 - as a driver takes them
    """Put another mark, and another pool, into what was recorded."""
    if isinstance(parameters, dict):
        return {name: marked(value, mark, pool) for name, value in parameters.items()}
    if isinstance(parameters, list | tuple):
        return tuple(marked(value, mark, pool) for value in parameters)
    if isinstance(parameters, str):
        return parameters.replace(MARK, mark).replace(POOL, pool)
    return parameters


async def ask_driver(url: str) -> None:
    """Be the process that says the same to the driver."""
    said = await statements(url)
    opened = driver_of_sqlite(url, said) if url.startswith("sqlite") else driver_of_postgres(url, said)
    await obey(opened)


def driver_of_sqlite(url: str, said: list[Statement]) -> Callable[[int, int, str], Awaitable[Round]]:
    """Write through the one connection that may write, in a thread, one transaction after the other."""
    connection = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None, check_same_thread=False)
    connection.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA secure_delete=1")
    turn = threading.Lock()

    def write(mark: str, pool: str) -> None:
        with turn:
            connection.execute("BEGIN IMMEDIATE")
            for statement, parameters in said:
                connection.execute(statement, marked(parameters, mark, pool)).fetchall()
            connection.execute("COMMIT")

    async def run(count: int, at_once: int, pool: str) -> Round:
        return await drive(count, at_once, lambda _: asyncio.to_thread(write, secrets.token_hex(6), pool))

    return run


def driver_of_postgres(url: str, said: list[Statement]) -> Callable[[int, int, str], Awaitable[Round]]:
    """Write through as many connections as there are transactions at once."""

    async def run(count: int, at_once: int, pool: str) -> Round:
        free = [await psycopg.AsyncConnection.connect(url, autocommit=True) for _ in range(at_once)]
        connections = list(free)

        async def launch(_: int) -> None:
            connection, mark = free.pop(), secrets.token_hex(6)
            async with connection.transaction():
                for statement, parameters in said:
                    await connection.execute(statement, marked(parameters, mark, pool))
            free.append(connection)

        done = await drive(count, at_once, launch)
        for connection in connections:
            await connection.close()
        return done

    return run


async def beside(name: str, urls: tuple[str, str], options: argparse.Namespace, report: Report, *, stores: int) -> None:
    """Let stores and driver write in turn, each into a database of its own."""
    sides = [*(Bare(__file__, "store", urls[0]) for _ in range(stores)), Bare(__file__, "driver", urls[1])]
    for side in sides:
        await side.start()

    async def run(some: list[Bare], count: int, at_once: int) -> Round:
        """Share the work out, in a pool of its own: what is in use there is looked at by each intent."""
        pool = secrets.token_hex(6)
        done = await asyncio.gather(*(one.run(count // len(some), max(1, at_once // len(some)), pool) for one in some))
        took = [seconds for one in done for seconds in one.took]
        return Round(took, max(one.launched for one in done), cpu=sum(one.cpu or 0.0 for one in done))

    figures: dict[int, Json] = {}
    for at_once in options.at_once:
        turns = {"store": partial(run, sides[:1], options.intents, at_once)}
        turns["bare driver"] = partial(run, sides[-1:], options.intents, at_once)
        if stores > 1:
            turns[f"{stores} stores"] = partial(run, sides[:-1], options.intents, at_once)
        figures[at_once] = compared(await in_turns(options.rounds, turns))
    for side in sides:
        await side.stop()
    report.figures[name] = figures
    table_of_sides(report, f"intents in {name}", figures)


async def measure(home: Path, options: argparse.Namespace, report: Report) -> None:
    await beside("SQLite", (f"sqlite:///{home}/ours.db", f"sqlite:///{home}/bare.db"), options, report, stores=1)
    try:
        psycopg.connect(options.database, connect_timeout=5).close()
    except psycopg.OperationalError as error:
        print(f"PostgreSQL left out: {error}")
        return
    with fresh_schema(options.database) as ours, fresh_schema(options.database) as bare:
        await beside("PostgreSQL", (ours, bare), options, report, stores=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--intents", type=int, default=1000, help="in a round")
    parser.add_argument("--rounds", type=int, default=7, help="of each side at each concurrency, after one to warm up")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--database", default=SERVER)
    bench(parser, measure)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--bare"]:
        kind, where = sys.argv[2:]
        asyncio.run(ask_store(where) if kind == "store" else ask_driver(where))
    else:
        main()
