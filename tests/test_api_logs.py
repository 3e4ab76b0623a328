"""A runner's output over HTTP: while it runs, as it comes, and after its end."""

import asyncio
import signal
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from conftest import (
    Json,
    Serve,
    Served,
    Service,
    alive,
    finished,
    launch_body,
    launched,
    local_pool,
    problem,
    read,
    record_of,
    served,
    until,
)

MEBIBYTE = 1024 * 1024
STEP = "while [ ! -e go-{0} ]; do sleep 0.01; done; echo {0}\n"
"""A line that is printed when the test says so."""
NO_TIMES = ("", "yesterday", "10", "-10m", "10m ", "m", "1.h", "10M", "2026-01-05", "2026-13-05T09:30:00Z")


async def log_of(client: httpx.AsyncClient, runner: Json, **query: object) -> str:
    answer = await client.get(runner["links"]["logs"], params={key: str(value) for key, value in query.items()})
    assert answer.status_code == 200
    return answer.text


async def test_output_is_there_while_the_runner_runs_and_after_its_end(client: httpx.AsyncClient, slot: Path) -> None:
    runner = await launched(client, launch_body(slot, "echo one; echo two >&2; echo three\n" + STEP.format("four")))
    assert await until(lambda: complete(client, runner, 3)) == "one\ntwo\nthree\n"
    (slot / "go-four").touch()
    await finished(client, runner)
    assert await log_of(client, runner) == "one\ntwo\nthree\nfour\n"


def completed(runner: Json) -> str:
    """Say what a follower is told behind the log of a runner that completed."""
    return f"[{runner['runner_id']} completed]\n"


async def complete(client: httpx.AsyncClient, runner: Json, lines: int) -> str:
    text = await log_of(client, runner)
    return text if text.count("\n") == lines else ""


async def test_output_is_plain_text_that_no_browser_takes_for_anything_else(client: httpx.AsyncClient, slot: Path) -> None:
    runner = await launched(client, launch_body(slot, "echo '<script>'"))
    answer = await client.get(runner["links"]["logs"])
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    ("tail", "text"),
    [(0, ""), (1, "three"), (2, "two\nthree"), (3, "one\ntwo\nthree"), (1_000_000, "one\ntwo\nthree")],
)
@pytest.mark.parametrize("end", ["", "\n"])
async def test_the_last_lines_can_be_asked_for(
    client: httpx.AsyncClient, slot: Path, tail: int, text: str, end: str
) -> None:
    runner = await launched(client, launch_body(slot, f"printf 'one\ntwo\nthree{end}'"))
    await finished(client, runner)
    assert await log_of(client, runner, tail=tail) == text + end * bool(text)


@pytest.mark.parametrize(
    "query",
    [
        {"tail": "-1"},
        {"tail": "1000001"},
        {"tail": "some"},
        {"follow": "maybe"},
        *({"since": since} for since in NO_TIMES),
    ],
)
async def test_a_question_that_makes_no_sense_is_refused(
    client: httpx.AsyncClient, slot: Path, query: dict[str, str]
) -> None:
    runner = await launched(client, launch_body(slot))
    answer = await client.get(runner["links"]["logs"], params=query)
    problem(answer, 422, "invalid", *(f"/query/{name}" for name in query))


async def since_now(client: httpx.AsyncClient, runner: Json) -> str:
    """Give a time once all that was written so far is known to be older."""

    async def known() -> str | None:
        now = datetime.now(UTC).isoformat()
        return now if await log_of(client, runner, since=now) == "" else None

    return str(await until(known))


async def test_what_was_written_since_a_time_can_be_asked_for(service: Service, slot: Path, state_dir: Path) -> None:
    """Also after the service was away, after the end, and together with the last lines."""
    every = "one\ntwo\nthree\nfour\n"
    async with service(leave_runners=True) as client:
        runner = await launched(
            client, launch_body(slot, "echo one\n" + "".join(map(STEP.format, ("two", "three", "four"))))
        )
        await until(lambda: complete(client, runner, 1))
        moment = await since_now(client, runner)
        (slot / "go-two").touch()
        await until(lambda: complete(client, runner, 2))
        assert await log_of(client, runner, since=moment) == "two\n"
    (slot / "go-three").touch()
    await until(lambda: "three" in read(state_dir / "runners" / runner["runner_id"] / "log"))
    async with service() as client:
        assert await log_of(client, runner, since=moment) == "two\nthree\n"
        late = await since_now(client, runner)
        (slot / "go-four").touch()
        await finished(client, runner)
        for _ in range(2):  # from the run directory, and from where it is kept
            assert await log_of(client, runner, since=moment) == "two\nthree\nfour\n"
            assert await log_of(client, runner, since=moment.replace("+", " ")) == "two\nthree\nfour\n"
            assert await log_of(client, runner, since=late) == "four\n"
            assert await log_of(client, runner, since=late, follow=True) == "four\n" + completed(runner)
            assert await log_of(client, runner, since=moment, tail=2) == "three\nfour\n"
            assert await log_of(client, runner, since=late, tail=2) == "four\n"
            assert await log_of(client, runner, since="9000-01-01T00:00:00Z") == ""
            assert await log_of(client, runner, since="0001-01-01T00:00:00+14:00") == every
            assert (
                await log_of(client, runner, since="1h30m") == await log_of(client, runner, since="9" * 400 + "d") == every
            )
            await until(lambda: not list((state_dir / "runners").iterdir()))
        assert await since_now(client, runner)


async def test_the_log_of_a_launch_that_failed_is_empty(service: Service, slot: Path) -> None:
    async with service({"local": local_pool(command=["no-such-command"])}) as client:
        said = problem(await client.post("/runners", json=launch_body(slot)), 422, "launch-rejected")
        assert await log_of(client, said["runner"]) == ""
        followed = await log_of(client, said["runner"], follow=True)
        assert followed == f"[{said['runner']['runner_id']} failed: launch_rejected: {said['runner']['message']}]\n"


async def test_output_outlives_the_service(service: Service, slot: Path, state_dir: Path) -> None:
    async with service() as client:
        runner = await launched(client, launch_body(slot, "echo kept"))
        await finished(client, runner)
        await until(lambda: not list((state_dir / "runners").iterdir()))
    async with service() as client:
        assert await log_of(client, runner) == "kept\n"
        assert await log_of(client, runner, follow=True) == "kept\n" + completed(runner)


async def test_a_log_over_its_cap_keeps_the_newest_whole_lines_and_says_what_is_missing(
    service: Service, slot: Path, state_dir: Path
) -> None:
    count = 3 * MEBIBYTE // 32
    async with service({"local": local_pool(log_max_mib=1)}) as client:
        runner = await launched(client, launch_body(slot, f"seq -f %031.0f {count}"))
        record = await finished(client, runner)
        assert (record["state"], record["log_truncated"]) == ("completed", True)
        text = await log_of(client, runner)
        assert await log_of(client, runner, tail=2) == f"{count - 1:031}\n{count:031}\n"
        note, *lines = text.splitlines()
        assert note.endswith("bytes of older output were dropped: the log is capped]")
        assert lines == [f"{number:031}" for number in range(count - len(lines) + 1, count + 1)]
        assert MEBIBYTE / 2 < len(text) <= MEBIBYTE + len(note) + 1
        assert int(note.removeprefix("[").split()[0]) + len(text) - len(note) - 1 == 3 * MEBIBYTE
        await until(lambda: not list((state_dir / "runners").iterdir()))
        assert used(state_dir) < 2 * MEBIBYTE


def used(directory: Path) -> int:
    """Say how much of the disk the logs in a directory take."""
    return sum(file.stat().st_blocks * 512 for file in directory.rglob("*log*") if file.is_file())


async def test_a_log_under_its_cap_is_whole(service: Service, slot: Path) -> None:
    async with service({"local": local_pool(log_max_mib=1)}) as client:
        runner = await launched(client, launch_body(slot, f"seq -f %031.0f {MEBIBYTE // 32}"))
        assert (await finished(client, runner))["log_truncated"] is False
        assert len(await log_of(client, runner)) == MEBIBYTE


# Following: a stream, so a real server.


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """One service for all that only follow."""
    pools = {"local": local_pool(), "tight": local_pool(log_max_mib=1)}
    async with served(tmp_path_factory.mktemp("served"), pools) as server:
        yield server


@pytest.fixture
def place(server: Served, request: pytest.FixtureRequest) -> Path:
    """A slot of this test's own on the shared service."""
    return server.output.parent / "slots" / str(abs(hash(request.node.nodeid)))


async def test_a_follower_sees_each_line_as_it_comes_and_is_let_go_at_the_end(server: Served, place: Path) -> None:
    async with server.client() as client:
        runner = await launched(client, launch_body(place, "echo ready\n" + STEP.format("one") + STEP.format("two")))
        async with client.stream("GET", runner["links"]["logs"], params={"follow": "true"}) as answer:
            lines = answer.aiter_lines()
            assert await anext(lines) == "ready"
            for line in ("one", "two"):
                (place / f"go-{line}").touch()
                async with asyncio.timeout(8):
                    assert await anext(lines) == line
            async with asyncio.timeout(8):
                assert [line + "\n" async for line in lines] == [completed(runner)]
        assert (await record_of(client, runner))["state"] == "completed"


async def test_a_follower_may_begin_with_the_last_lines(server: Served, place: Path) -> None:
    async with server.client() as client:
        runner = await launched(client, launch_body(place, "echo one; echo two\n" + STEP.format("three")))
        await until(lambda: complete(client, runner, 2))
        async with client.stream("GET", runner["links"]["logs"], params={"follow": "true", "tail": 1}) as answer:
            lines = answer.aiter_lines()
            assert await anext(lines) == "two"
            (place / "go-three").touch()
            assert [line async for line in lines][:-1] == ["three"]


async def test_a_follower_gets_every_byte_of_a_runner_that_writes_and_ends(server: Served, place: Path) -> None:
    async with server.client() as client:
        for number in range(5):
            slot = place.with_name(f"{place.name}-{number}")
            runner = await launched(client, launch_body(slot, "seq 20000; printf end"))
            text = await log_of(client, runner, follow=True)
            assert text == "".join(f"{line}\n" for line in range(1, 20001)) + "end\n" + completed(runner)


async def test_followers_may_be_many_and_one_that_goes_away_disturbs_nobody(server: Served, place: Path) -> None:
    async with server.client() as client:
        runner = await launched(client, launch_body(place, "echo ready\n" + STEP.format("one")))
        async with client.stream("GET", runner["links"]["logs"], params={"follow": "true"}) as answer:
            assert await anext(answer.aiter_lines()) == "ready"
        others = [asyncio.create_task(log_of(client, runner, follow=True)) for _ in range(5)]
        await asyncio.sleep(0.05)
        (place / "go-one").touch()
        assert await asyncio.gather(*others) == ["ready\none\n" + completed(runner)] * 5
        assert "ERROR" not in read(server.output)


async def test_a_follower_of_a_launch_that_has_not_started_waits_for_it(server: Served, place: Path) -> None:
    async with server.client() as client:
        body = launch_body(place, "echo started")
        answer = await client.post("/runners", json=body, headers={"Prefer": "respond-async"})
        assert await log_of(client, answer.json(), follow=True) == "started\n" + completed(answer.json())


async def test_a_follower_of_a_capped_log_is_told_of_any_gap(server: Served, place: Path) -> None:
    count = 8 * MEBIBYTE // 32
    async with server.client() as client:
        runner = await launched(client, launch_body(place, f"seq -f %031.0f {count}", pool="tight"))
        text = await log_of(client, runner, follow=True)
    *lines, _ = text.splitlines()
    told = sum(int(line[1:].split()[0]) for line in lines if line.startswith("["))
    numbers = [int(line) for line in lines if not line.startswith("[")]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == count
    assert told + 32 * len(numbers) == 8 * MEBIBYTE


async def test_a_follower_of_a_queued_launch_is_let_go_when_the_service_goes_down(serve: Serve, slot: Path) -> None:
    pools = {"local": local_pool(max_concurrency=1, queue_limit=1)}
    async with serve(pools, leave_runners=True) as running, running.client() as client:
        holder = await launched(client, launch_body(slot, STEP.format("on")))
        body = launch_body(slot.with_name("slot-2"))
        queued = (await client.post("/runners", json=body, headers={"Prefer": "respond-async"})).json()
        assert queued["phase"] == "queued"
        following = asyncio.create_task(log_of(client, queued, follow=True))
        await asyncio.sleep(0.2)
        async with asyncio.timeout(8):  # less than the server's own patience with connections
            assert await running.end(signal.SIGTERM) == 0
            assert await following == "[the service is going down; ask again to follow on]\n"
    (slot / "go-on").touch()
    await until(lambda: not alive(holder))


async def test_a_follower_is_let_go_when_the_service_goes_down(serve: Serve, slot: Path) -> None:
    async with serve(leave_runners=True) as running, running.client() as client:
        runner = await launched(client, launch_body(slot, "echo ready\n" + STEP.format("on")))
        async with client.stream("GET", runner["links"]["logs"], params={"follow": "true"}) as answer:
            lines = answer.aiter_lines()
            assert await anext(lines) == "ready"
            async with asyncio.timeout(8):  # less than the server's own patience with connections
                ended = asyncio.create_task(running.end(signal.SIGTERM))
                assert [line async for line in lines] == ["[the service is going down; ask again to follow on]"]
                assert await ended == 0
    assert alive(runner)
    (slot / "go-on").touch()
    await until(lambda: not alive(runner))


@pytest.mark.parametrize(
    ("script", "ending"),
    [
        ("exit 3", "failed: exit_nonzero: exited with code 3"),
        ("kill -KILL $$", "failed: signalled: ended by SIGKILL"),
        ("printf unfinished; exit 3", "failed: exit_nonzero: exited with code 3"),
    ],
)
async def test_a_follower_is_told_at_last_how_it_ended(
    client: httpx.AsyncClient, slot: Path, script: str, ending: str
) -> None:
    runner = await launched(client, launch_body(slot, script))
    last = (await log_of(client, runner, follow=True)).splitlines()[-1]
    assert last == f"[{runner['runner_id']} {ending}]"
