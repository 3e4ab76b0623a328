"""All events over HTTP: as a stream that may be taken up again, as pages, and as lines of text."""

import asyncio
import contextlib
import json
import signal
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import Json, Serve, Served, Service, finished, launch_body, launched, local_pool, problem, read, until

FOREVER = "sleep 1000"
STREAM = {"Accept": "text/event-stream"}
STREAMS = 50


@asynccontextmanager
async def stream(client: httpx.AsyncClient, path: str = "/events", **headers: str) -> AsyncIterator[AsyncIterator[Json]]:
    """Open a stream; gives its events, each with `id`, `event` and `data`, one that says hello first."""
    async with client.stream("GET", path, headers={**STREAM, **headers}) as answer:
        assert answer.status_code == 200, await answer.aread()
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        assert answer.headers["Cache-Control"] == "no-store"
        yield sent(answer)


async def sent(answer: httpx.Response) -> AsyncIterator[Json]:
    """Read server-sent events as a browser does."""
    event: Json = {}
    async for line in answer.aiter_lines():
        name, _, value = line.partition(": ")
        if line and name:
            event[name] = json.loads(value) if name == "data" else value
        elif event:
            yield event
            event = {}


async def some(events: AsyncIterator[Json], count: int) -> list[Json]:
    """Read so many events."""
    async with asyncio.timeout(10):
        return [await anext(events) for _ in range(count)]


async def rest(events: AsyncIterator[Json]) -> list[Json]:
    async with asyncio.timeout(10):
        return [event async for event in events]


async def all_events(client: httpx.AsyncClient, **query: Any) -> list[Json]:  # noqa: ANN401 - what a query may hold
    answer = await client.get("/events", params=query)
    assert answer.status_code == 200, answer.text
    items: list[Json] = answer.json()["items"]
    return items


# The stream.


async def test_a_stream_begins_now_and_tells_every_event_as_it_comes(serve: Serve, slot: Path) -> None:
    async with serve() as running, running.client() as client:
        await finished(client, await launched(client, launch_body(slot)))
        async with stream(client) as events:
            hello = await anext(events)
            assert (hello["event"], hello["id"]) == ("hello", str((await all_events(client))[-1]["revision"]))
            runner = await launched(client, launch_body(slot, "exit 3", id="b"))
            told = await some(events, 2)
            while told[-1]["data"]["to"] != "finished":
                told.append(await anext(events))
            assert [event["data"] for event in told] == await all_events(client, since=hello["id"])
            assert all(int(event["id"]) == event["data"]["revision"] and "event" not in event for event in told)
            last = told[-1]["data"]
            assert (last["runner_id"], last["task_id"], last["pool_name"]) == (runner["runner_id"], "b", "local")
            assert (last["type"], last["reason"]) == ("finished", "exit_nonzero")


async def test_a_reader_that_comes_back_misses_nothing_and_gets_nothing_twice_also_after_a_restart(
    serve: Serve, slot: Path
) -> None:
    async with serve(leave_runners=True) as running, running.client() as client:
        async with stream(client) as events:
            place = (await anext(events))["id"]
            runner = await launched(client, launch_body(slot, "while [ ! -e go ]; do sleep 0.01; done"))
            first = await some(events, 2)
        async with stream(client, **{"Last-Event-ID": place}) as events:
            await anext(events)
            assert await some(events, 2) == first
        async with stream(client, f"/events?since={place}", **{"Last-Event-ID": first[-1]["id"]}) as events:
            third = (await some(events, 2))[1]  # after hello: running
    assert int(third["id"]) == int(first[-1]["id"]) + 1
    (slot / "go").touch()
    async with serve() as running, running.client() as client:
        async with stream(client, **{"Last-Event-ID": first[0]["id"]}) as events:
            await anext(events)
            told = [first[0], *await some(events, 3)]
            assert told[:3] == [*first, third]
            assert told[-1]["data"]["to"] == "finished"
        await finished(client, runner)


async def test_a_stream_says_goodbye_when_the_service_ends_and_does_not_hold_it_up(serve: Serve) -> None:
    async with serve() as running, running.client() as client, stream(client) as events:
        await anext(events)
        async with asyncio.timeout(8):  # less than the server's own patience with connections
            ended = asyncio.create_task(running.end(signal.SIGTERM))
            (bye,) = await rest(events)
            assert await ended == 0
    assert (bye["event"], "going down" in bye["data"]["detail"]) == ("bye", True)


async def test_a_stream_that_has_nothing_to_say_shows_that_it_lives(serve: Serve) -> None:
    async with serve() as running, running.client() as client, client.stream("GET", "/events", headers=STREAM) as answer:
        async with asyncio.timeout(20):
            async for line in answer.aiter_lines():
                if line == ": ping":
                    break


@pytest.mark.parametrize(
    ("headers", "query", "status", "code"),
    [
        ({"Last-Event-ID": "some"}, {}, 422, "invalid"),
        ({"Last-Event-ID": "-1"}, {}, 422, "invalid"),
        ({}, {"since": "-1"}, 422, "invalid"),
        ({"Last-Event-ID": "99"}, {}, 410, "history-gone"),
        ({"Last-Event-ID": "9" * 400}, {}, 410, "history-gone"),
        ({}, {"since": "99"}, 410, "history-gone"),
    ],
)
async def test_a_place_that_never_was_is_refused(
    client: httpx.AsyncClient, headers: Json, query: Json, status: int, code: str
) -> None:
    answer = await client.get("/events", headers={**STREAM, **headers}, params=query)
    pointers = {"invalid": "/query/since" if query else "/header/Last-Event-ID"}
    problem(answer, status, code, *filter(None, [pointers.get(code)]))
    if code == "history-gone" and query:
        problem(await client.get("/events", params=query), status, code)


async def test_a_place_whose_history_is_no_longer_kept_is_refused(service: Service, slot: Path, state_dir: Path) -> None:
    async with service() as client:
        await finished(client, await launched(client, launch_body(slot)))
        events = await all_events(client)
    with contextlib.closing(sqlite3.connect(state_dir / "runners.db")) as database:
        database.execute("DELETE FROM events WHERE revision < ?", [events[2]["revision"]])
        database.execute("UPDATE history SET forgotten = ?", [events[1]["revision"]])
        database.commit()
    async with service() as client:
        for headers in (STREAM, {}):
            answer = await client.get("/events", params={"since": events[0]["revision"]}, headers=headers)
            problem(answer, 410, "history-gone", words="no longer kept")
        assert await all_events(client, since=events[1]["revision"]) == events[2:]
        assert await all_events(client) == events[2:]


# Slow readers, and many.


def with_many_events(path: Path, count: int) -> None:
    """Put many events behind those of a database."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute(
            """WITH RECURSIVE more(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM more WHERE n < ?)
            INSERT INTO events (runner_id, at, body) SELECT runner_id, at, body
            FROM more, (SELECT * FROM events ORDER BY revision DESC LIMIT 1)""",
            [count],
        )
        database.commit()


def memory_mib(running: Served) -> float:
    status = read(Path(f"/proc/{running.process.pid}/status"))
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


async def test_readers_that_do_not_read_hold_up_nobody_and_make_nothing_grow(
    serve: Serve, slot: Path, state_dir: Path
) -> None:
    count = 20_000
    async with serve() as running, running.client() as client:
        await finished(client, await launched(client, launch_body(slot)))
        newest = (await all_events(client))[-1]["revision"]
    with_many_events(state_dir / "runners.db", count)
    async with serve() as running, running.client() as client, contextlib.AsyncExitStack() as stack:
        before = memory_mib(running)
        lazy = [await stack.enter_async_context(stream(client, "/events?since=0")) for _ in range(10)]
        async with stream(client, f"/events?since={newest}") as events:
            await anext(events)
            told = [await anext(events) for _ in range(count)]
        assert [int(event["id"]) for event in told] == list(range(newest + 1, newest + count + 1))
        assert memory_mib(running) - before < 30
        await finished(client, await launched(client, launch_body(slot)))
        for events in lazy:
            for revision in ("0", *map(str, range(1, 1001))):
                assert (await anext(events))["id"] == revision


async def test_every_one_of_many_streams_gets_every_event(serve: Serve, slot: Path) -> None:
    async with serve({"local": local_pool(max_concurrency=20)}) as running, contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(running.client())
        opened = [await stack.enter_async_context(stream(client)) for _ in range(STREAMS)]
        place = (await asyncio.gather(*(anext(events) for events in opened)))[0]["id"]
        readers = [asyncio.create_task(until_finished(events, 10)) for events in opened]
        await asyncio.gather(*(launched(client, launch_body(slot.with_name(f"slot-{number}"))) for number in range(10)))
        told = await asyncio.gather(*readers)
        expected = await all_events(client, since=place)
        assert all(each == expected for each in told)


async def until_finished(events: AsyncIterator[Json], count: int) -> list[Json]:
    """Read until so many runners have ended."""
    told: list[Json] = []
    async with asyncio.timeout(30):
        while sum(event["to"] == "finished" for event in told) < count:
            told.append((await anext(events))["data"])
    return told


async def test_a_reader_that_goes_away_is_forgotten(serve: Serve, slot: Path) -> None:
    async with serve() as running, running.client() as client:
        for _ in range(5):
            async with stream(client) as events:
                await anext(events)
        await finished(client, await launched(client, launch_body(slot)))
        async with stream(client, "/events?since=0") as events:
            await some(events, 3)
        assert "ERROR" not in read(running.output)


# Pages and text.


async def test_pages_tell_every_event_once_and_where_to_go_on(client: httpx.AsyncClient, slot: Path) -> None:
    await finished(client, await launched(client, launch_body(slot)))
    seen: list[Json] = []
    answer = await client.get("/events", params={"limit": 1})
    while True:
        page = answer.json()
        seen += page["items"]
        assert page["revision"] == seen[-1]["revision"]
        if page["next_cursor"] is None:
            break
        assert len(page["items"]) == 1
        answer = await client.get(answer.links["next"]["url"])
    assert "Link" not in answer.headers
    assert seen == await all_events(client)
    assert [event["type"] for event in seen if event["type"] != "running"] == ["accepted", "started", "finished"]
    empty = (await client.get("/events", params={"since": page["revision"]})).json()
    assert empty == {"items": [], "next_cursor": None, "revision": page["revision"]}


async def test_before_anything_has_happened_a_page_is_empty(client: httpx.AsyncClient) -> None:
    assert (await client.get("/events")).json() == {"items": [], "next_cursor": None, "revision": 0}
    assert (await client.get("/events?since=0")).json()["items"] == []


@pytest.mark.parametrize("query", [{"limit": "0"}, {"limit": "501"}, {"cursor": "!"}, {"since": "now"}])
async def test_a_page_that_makes_no_sense_is_refused(client: httpx.AsyncClient, query: dict[str, str]) -> None:
    problem(await client.get("/events", params=query), 422, "invalid", *(f"/query/{name}" for name in query))


async def test_events_in_text_are_a_table_and_lines_for_who_follows(serve: Serve, slot: Path) -> None:
    text = {"Accept": "text/plain"}
    async with serve() as running, running.client() as client:
        await finished(client, await launched(client, launch_body(slot, "exit 3")))
        head, *rows = (await client.get("/events", headers=text)).text.splitlines()
        assert head.split()[:4] == ["REVISION", "AT", "RUNNER_ID", "TASK_ID"]
        assert rows[-1].endswith("exited with code 3")
        async with client.stream("GET", "/events?follow=true&since=0", headers=text) as answer:
            lines = answer.aiter_lines()
            told = [await anext(lines) for _ in rows]
            assert "exit_nonzero exited with code 3" in told[-1]
            await running.end()
            assert [line async for line in lines] == ["[the service is going down; ask again to follow on]"]


# One runner's.


async def test_a_runners_events_can_be_followed_to_its_end(serve: Serve, slot: Path) -> None:
    async with serve() as running, running.client() as client:
        runner = await launched(client, launch_body(slot, "while [ ! -e go ]; do sleep 0.01; done; exit 3"))
        other = await launched(client, launch_body(slot.with_name("slot-2")))
        path = f"/runners/{runner['runner_id']}/events"
        async with stream(client, path) as events, client.stream("GET", f"{path}?follow=true") as lines:
            hello, *first = await some(events, 3)
            await finished(client, other)
            (slot / "go").touch()
            *more, bye = await rest(events)
            history = (await client.get(path)).json()["items"]
            assert [event["data"] for event in first + more] == history
            assert (hello["id"], bye["data"]["detail"]) == (
                "0",
                f"{runner['runner_id']} failed: exit_nonzero: exited with code 3",
            )
            text = [line async for line in lines.aiter_lines()]
            assert len(text) == len(history) + 1
            assert text[-1] == f"[{bye['data']['detail']}]"
        async with stream(client, path, **{"Last-Event-ID": more[-2]["id"] if len(more) > 1 else first[-1]["id"]}) as events:
            assert len(await rest(events)) == 3
        again = await client.get(path, headers={**STREAM, "Last-Event-ID": more[-1]["id"]})
        assert (again.status_code, again.content) == (204, b"")


async def test_who_follows_a_runner_is_let_go_when_the_service_ends(serve: Serve, slot: Path) -> None:
    async with serve(leave_runners=True) as running, running.client() as client:
        runner = await launched(client, launch_body(slot, "while [ ! -e go ]; do sleep 0.01; done"))
        async with stream(client, f"{runner['links']['events']}") as events:
            await some(events, 3)
            async with asyncio.timeout(8):  # less than the server's own patience with connections
                assert await running.end() == 0
                assert [event.get("event") for event in await rest(events)][-1] == "bye"
    (slot / "go").touch()
    async with serve() as running, running.client() as client:
        await finished(client, runner)
        await until(lambda: "Traceback" not in read(running.output))
