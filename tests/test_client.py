"""The Dispatcher's client, at a real service with real runners; faults are real too: cut connections and killed services."""

import asyncio
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import Any, Self

import pytest
import pytest_asyncio
from conftest import (
    TELL,
    Json,
    Serve,
    Served,
    alive,
    launch_body,
    local_pool,
    served,
    told,
    until,
    write_pools,
    written,
)
from runner_launcher_client import (
    AgentPool,
    Event,
    InvalidRequestError,
    NotFoundError,
    NotPermittedError,
    PoolFullError,
    PoolType,
    Runner,
    RunnerLauncher,
    RunnerLauncherClient,
    RunnerLaunchError,
    RunnerState,
    SlotBusyError,
    TaskContext,
    UnavailableError,
)

WAITS = "while [ ! -e go ]; do sleep 0.01; done\n"


def client_of(service: Served, *, patience: float = 10) -> RunnerLauncherClient:
    return RunnerLauncherClient(url=service.url, token=service.token, patience_seconds=patience)


async def launch(client: RunnerLauncherClient, body: Json, **options: Any) -> Runner:  # noqa: ANN401 - as launch() has them
    return await client.launch(body["task"], body["slot"], body["pool"], **options)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """One service for all that leave it as it is."""
    pools = {"local": local_pool(max_concurrency=64), "broken": local_pool(command=["/no/such/program"])}
    async with served(tmp_path_factory.mktemp("served"), pools) as server:
        yield server


@pytest.fixture
def place(server: Served, tmp_path: Path) -> Path:
    """A slot of this test's own on the shared service."""
    place = server.output.parent / "slots" / tmp_path.name
    place.mkdir(parents=True)
    return place


# A life.


async def test_a_launch_gives_a_record_with_types_and_its_end_too(server: Served, place: Path) -> None:
    async with client_of(server) as client, server.client() as http:
        runner = await launch(client, launch_body(place, f"echo hello\n{WAITS}exit 3"))
        assert (runner.state, runner.accepted, runner.finished) == (RunnerState.RUNNING, True, False)
        assert (runner.task_id, runner.pool_name, runner.slot_id) == ("7", "local", place.name)
        assert runner.started_at
        assert abs((datetime.now(UTC) - runner.started_at).total_seconds()) < 10
        (place / "go").touch()
        ended = await client.wait(runner.runner_id)
        assert (ended.state, ended.reason, ended.exit_code, ended.retryable) == ("failed", "exit_nonzero", 3, False)
        assert await client.get(runner.runner_id) == ended
        raw = (await http.get(f"/runners/{runner.runner_id}")).json()
        assert ended.to_dict() == raw
        assert Runner.from_dict(raw) == ended
        assert b"".join([piece async for piece in client.logs(runner.runner_id)]) == b"hello\n"
        history = await client.history(runner.runner_id)
        assert [event.type for event in history][-1] == "finished"
        assert history[-1].to_phase == "finished"


async def test_a_log_is_followed_as_it_is_written_and_to_its_end(server: Served, place: Path) -> None:
    async with client_of(server) as client:
        runner = await launch(client, launch_body(place, f"echo one; echo two\n{WAITS}printf three"))

        async def written() -> bool:
            return b"".join([piece async for piece in client.logs(runner.runner_id)]) == b"one\ntwo\n"

        await until(written)
        seen = b""
        async for piece in client.logs(runner.runner_id, tail=1, follow=True):
            seen += piece
            if seen == b"two\n":
                (place / "go").touch()
        assert seen.startswith(b"two\nthree")  # the service may add how it ended
        for since in (timedelta(minutes=10), "10m", datetime.now(UTC) - timedelta(minutes=10)):
            assert b"".join([piece async for piece in client.logs(runner.runner_id, since=since)]) == b"one\ntwo\nthree"
        ahead = datetime.now() + timedelta(hours=1)  # noqa: DTZ005 - a time of this machine's, without its zone
        assert [piece async for piece in client.logs(runner.runner_id, since=ahead)] == []
        assert (await client.get(runner.runner_id)).finished


async def test_changes_are_told_until_the_end(server: Served, place: Path) -> None:
    async with client_of(server) as client:
        runner = await launch(client, launch_body(place, WAITS))
        states = []
        async for changed in client.changes(runner.runner_id):
            states.append(changed.state)
            (place / "go").touch()
        assert (states[0], states[-1]) == ("running", "completed")


async def test_a_runner_is_stopped_and_a_wait_may_be_short(server: Served, place: Path) -> None:
    async with client_of(server) as client:
        runner = await launch(client, launch_body(place, "exec sleep 600"))
        assert not (await client.wait(runner.runner_id, timeout=0.1)).finished
        assert (await client.stop(runner.runner_id, grace=5)).phase == "stopping"
        ended = await client.wait(runner.runner_id, timeout=10)
        assert (ended.reason, ended.signal) == ("cancelled", "SIGTERM")


async def test_runners_are_listed_page_by_page_newest_first(serve: Serve, slot: Path) -> None:
    async with serve() as service, client_of(service) as client:
        made = [await launch(client, launch_body(slot.parent / f"s{number}")) for number in range(5)]
        ids = [runner.runner_id for runner in reversed(made)]
        assert [runner.runner_id async for runner in client.list(limit=2)] == ids
        page = await client.page(limit=2)
        assert ([runner.runner_id for runner in page.items], page.next_cursor is None) == (ids[:2], False)
        assert [runner.slot_id async for runner in client.list(slot_id="s3")] == ["s3"]
        assert [runner async for runner in client.list(since=datetime.now(UTC))] == []


async def test_pools_are_read_and_switched(serve: Serve, slot: Path) -> None:
    async with (
        serve({"local": local_pool(max_concurrency=2), "other": local_pool()}) as service,
        client_of(service) as client,
    ):
        await launch(client, launch_body(slot, "exec sleep 600"))
        pools = {pool.pool_name: pool for pool in await client.pools()}
        assert (pools["local"].current_running, pools["local"].utilization, pools["local"].type) == (1, 0.5, "local-process")
        assert not (await client.switch_pool("other", enabled=False)).enabled
        assert not (await client.pool("other")).enabled
        with pytest.raises(InvalidRequestError, match="switched off") as refused:
            await launch(client, launch_body(slot, pool="other"))
        assert refused.value.code == "pool-disabled"


# Launches that take their time, or fail.


async def test_a_launch_that_has_to_queue_is_waited_for(serve: Serve, slot: Path) -> None:
    async with serve({"local": local_pool(max_concurrency=1, queue_limit=1)}) as service, client_of(service) as client:
        first = await launch(client, launch_body(slot, WAITS))
        body = launch_body(slot.parent / "slot-2")
        queued = await launch(client, body, wait=0, key="second")
        assert (queued.state, queued.accepted, queued.phase) == (RunnerState.PENDING, False, "queued")
        waiting = asyncio.create_task(launch(client, body, key="second"))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        (slot / "go").touch()
        second = await waiting
        assert (second.runner_id, second.accepted) == (queued.runner_id, True)
        assert (await client.wait(first.runner_id)).state == "completed"


async def test_a_wait_that_runs_out_gives_the_record_as_it_is(serve: Serve, slot: Path) -> None:
    async with serve({"local": local_pool(max_concurrency=1, queue_limit=1)}) as service, client_of(service) as client:
        await launch(client, launch_body(slot, "exec sleep 600"))
        began = time.monotonic()
        assert (await launch(client, launch_body(slot.parent / "slot-2"), wait=1.5)).state == "pending"
        assert 1 < time.monotonic() - began < 5


async def test_a_launch_that_cannot_work_tells_its_record_and_attempts(server: Served, place: Path) -> None:
    async with client_of(server) as client:
        with pytest.raises(RunnerLaunchError, match="/no/such/program") as failed:
            await launch(client, launch_body(place, pool="broken"))
        error = failed.value
        assert error.runner
        assert (error.runner.state, error.runner.reason, error.retryable) == ("failed", "launch_rejected", False)
        assert "/no/such/program" in error.attempts[0].error
        assert error.to_dict()["runner"]["runner_id"] == error.runner.runner_id


async def test_a_launch_that_fails_while_it_waits_in_the_queue_is_told_so(serve: Serve, slot: Path) -> None:
    pools = {"local": local_pool(max_concurrency=1, queue_limit=1, launch_timeout_seconds=5)}
    async with serve(pools) as service, client_of(service) as client:
        await launch(client, launch_body(slot, "exec sleep 600"))
        with pytest.raises(RunnerLaunchError, match="no place in pool local") as failed:
            await launch(client, launch_body(slot.parent / "slot-2"), wait=20)
        assert failed.value.retryable


async def test_the_same_key_launches_nothing_again(server: Served, place: Path) -> None:
    async with client_of(server) as client:
        body = launch_body(place, "exit 0")
        first = await launch(client, body, key="one")
        await client.wait(first.runner_id)
        again = await launch(client, body, key="one")
        assert (again.runner_id, again.state) == (first.runner_id, "completed")
        assert len([runner async for runner in client.list(slot_id=place.name)]) == 1


async def test_a_cancelled_launch_is_cancelled_and_its_runner_goes_on(serve: Serve, slot: Path) -> None:
    async with serve({"local": local_pool(max_concurrency=1, queue_limit=1)}) as service, client_of(service) as client:
        await launch(client, launch_body(slot, "exec sleep 600"))
        waiting = asyncio.create_task(launch(client, launch_body(slot.parent / "slot-2")))
        await until(lambda: anything(client, state="pending"))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await anything(client, state="pending")


async def anything(client: RunnerLauncherClient, **wanted: str) -> tuple[Runner, ...]:
    return (await client.page(**wanted)).items  # type: ignore[arg-type] # strings all


# Refusals.


async def test_a_busy_slot_names_its_holder(server: Served, place: Path) -> None:
    async with client_of(server) as client:
        holder = await launch(client, launch_body(place, "exec sleep 600"))
        with pytest.raises(SlotBusyError, match=holder.runner_id) as busy:
            await launch(client, launch_body(place, "exec sleep 600"))
        assert busy.value.holder
        assert (busy.value.holder.runner_id, busy.value.status, busy.value.retryable) == (holder.runner_id, 409, True)


async def test_a_full_pool_is_asked_again_until_patience_ends(serve: Serve, slot: Path) -> None:
    async with serve({"local": local_pool(max_concurrency=1)}) as service, client_of(service, patience=3) as client:
        await launch(client, launch_body(slot, "exec sleep 600"))
        with pytest.raises(PoolFullError) as full:
            await launch(client, launch_body(slot.parent / "slot-2"))
        assert full.value.retry_after
        assert full.value.retry_after >= 1


async def test_a_full_pool_that_has_room_again_takes_the_launch(serve: Serve, slot: Path) -> None:
    async with serve({"local": local_pool(max_concurrency=1)}) as service, client_of(service, patience=30) as client:
        await launch(client, launch_body(slot, WAITS))
        waiting = asyncio.create_task(launch(client, launch_body(slot.parent / "slot-2")))
        await asyncio.sleep(0.3)
        (slot / "go").touch()
        assert (await waiting).accepted


async def test_what_is_wrong_is_told_with_its_place(server: Served, place: Path) -> None:
    async with client_of(server) as client:
        body = launch_body(place)
        body["slot"]["slot_path"] = "slot-1"
        with pytest.raises(InvalidRequestError, match="absolute") as invalid:
            await launch(client, body)
        assert [fault.pointer for fault in invalid.value.faults] == ["/slot/slot_path"]
        assert (invalid.value.status, invalid.value.retryable) == (422, False)
        assert invalid.value.request_id
        with pytest.raises(InvalidRequestError, match="no pool named nope"):
            await launch(client, launch_body(place, pool="nope"))


async def test_what_is_not_there_is_not_found(server: Served) -> None:
    async with client_of(server) as client:
        for call in (client.get, client.stop, client.wait, client.history):
            with pytest.raises(NotFoundError, match="no runner a b"):
                await call("a b")
        with pytest.raises(NotFoundError, match="no runner"):
            [piece async for piece in client.logs("runner-000000000000")]
        with pytest.raises(NotFoundError, match="no pool named"):
            await client.pool("nope")


async def test_a_wrong_token_and_none_are_told_apart(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNNER_LAUNCHER_TOKEN", raising=False)
    monkeypatch.setenv("RUNNER_LAUNCHER_STATE_DIR", str(tmp_path / "elsewhere"))
    async with serve() as service:
        async with RunnerLauncherClient(url=service.url, token="wrong") as client:  # noqa: S106
            with pytest.raises(NotPermittedError, match="is not known"):
                await client.pools()
        async with RunnerLauncherClient(url=service.url) as client:
            with pytest.raises(NotPermittedError, match="elsewhere/token cannot be read"):
                await client.pools()


async def test_address_and_token_come_from_the_environment(
    serve: Serve, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RUNNER_LAUNCHER_TOKEN", raising=False)
    async with serve() as service:
        monkeypatch.setenv("RUNNER_LAUNCHER_URL", service.url + "/")
        monkeypatch.setenv("RUNNER_LAUNCHER_STATE_DIR", str(state_dir))
        async with RunnerLauncherClient() as client:
            assert await client.pools()
        monkeypatch.setenv("RUNNER_LAUNCHER_STATE_DIR", "/nowhere")
        monkeypatch.setenv("RUNNER_LAUNCHER_TOKEN", service.token)
        async with RunnerLauncherClient() as client:
            assert await client.pools()


async def test_without_authentication_no_token_is_needed(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNNER_LAUNCHER_TOKEN", raising=False)
    monkeypatch.setenv("RUNNER_LAUNCHER_STATE_DIR", "/nowhere")
    async with serve(leave_runners=True, AUTH="off") as service, RunnerLauncherClient(url=service.url) as client:
        assert await client.pools()


# Faults on the way.


class Proxy:
    """Stands between client and service; ``cut`` so many connections lose the answer to a request that went through."""

    def __init__(self, service: Served) -> None:
        host, port = service.url.removeprefix("http://").split(":")
        self._target = host, int(port)
        self._connections: set[asyncio.Task[None]] = set()
        self.cut = 0
        self.requests: list[bytes] = []
        self.url = ""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self.connect, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(asyncio.create_task(self.serve_one(reader, writer)))

    async def serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(*self._target)
        onward = asyncio.create_task(self.pass_on(reader, back))
        try:
            while data := await there.read(65536):
                if self.cut:
                    self.cut -= 1
                    writer.transport.abort()
                    break
                writer.write(data)
                await writer.drain()
        finally:
            onward.cancel()
            for each in (writer, back):
                each.close()

    async def pass_on(self, reader: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            self.requests.append(data)
            back.write(data)
            await back.drain()


@pytest.mark.parametrize("lost", [1, 3])
async def test_a_launch_whose_answer_is_lost_is_repeated_for_one_runner(server: Served, place: Path, lost: int) -> None:
    async with (
        Proxy(server) as between,
        RunnerLauncherClient(url=between.url, token=server.token) as client,
    ):
        between.cut = lost
        runner = await launch(client, launch_body(place, "echo started >>starts; exec sleep 600"))
        assert sum(data.startswith(b"POST /runners ") for data in between.requests) == lost + 1
        assert [each.runner_id async for each in client.list(slot_id=place.name)] == [runner.runner_id]
        assert await written(place / "starts") == "started\n"
        assert alive(runner.to_dict())


async def test_a_plain_launch_whose_answer_is_lost_gives_one_runner(server: Served, place: Path) -> None:
    body = launch_body(place, "echo started >>starts; exec sleep 600")
    async with Proxy(server) as between, client_of(server) as client:
        between.cut = 2
        launcher = RunnerLauncher(url=between.url, token=server.token)
        runner = await asyncio.to_thread(launcher.launch, body["task"], body["slot"], body["pool"])
        assert [each.runner_id async for each in client.list(slot_id=place.name)] == [runner.runner_id]


async def test_reads_and_stops_are_repeated_too(server: Served, place: Path) -> None:
    async with (
        Proxy(server) as between,
        RunnerLauncherClient(url=between.url, token=server.token) as client,
    ):
        runner = await launch(client, launch_body(place, "exec sleep 600"))
        between.cut = 1
        assert (await client.get(runner.runner_id)).state == "running"
        between.cut = 1
        await client.stop(runner.runner_id)
        between.cut = 1
        assert (await client.wait(runner.runner_id)).reason == "cancelled"
        between.cut = 1
        assert [piece async for piece in client.logs(runner.runner_id)] == []


async def output(client: RunnerLauncherClient, runner: Runner, then: Callable[[], None] = lambda: None) -> bytes:
    """Follow a log, and do something once it has begun."""
    seen = b""
    async for piece in client.logs(runner.runner_id, follow=True):
        seen += piece
        then()
    return seen


async def test_a_log_that_is_cut_in_the_middle_is_no_end(serve: Serve, slot: Path) -> None:
    async with (
        serve(leave_runners=True) as service,
        client_of(service, patience=0.5) as client,
    ):
        runner = await launch(client, launch_body(slot, "echo one; exec sleep 600"))
        with pytest.raises(UnavailableError):
            await output(client, runner, service.process.kill)
        await asyncio.to_thread(service.process.wait, 20)
    async with serve() as service, client_of(service) as client:
        await client.stop(runner.runner_id, grace=0)


async def test_a_log_whose_service_goes_down_is_no_end(serve: Serve, slot: Path) -> None:
    async with serve(leave_runners=True) as service, client_of(service, patience=0.5) as client:
        runner = await launch(client, launch_body(slot, "echo one; exec sleep 600"))
        with pytest.raises(UnavailableError):
            await output(client, runner, service.process.terminate)
        await asyncio.to_thread(service.process.wait, 20)
    async with serve() as service, client_of(service) as client:
        await client.stop(runner.runner_id, grace=0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_wait_outlives_the_service(serve: Serve, slot: Path, number: signal.Signals) -> None:
    listen = f"127.0.0.1:{free_port()}"
    async with serve(leave_runners=True, LISTEN=listen) as service, client_of(service, patience=60) as client:
        runner = await launch(client, launch_body(slot, f"{WAITS}exit 5"))
        waiting = asyncio.create_task(client.wait(runner.runner_id))
        await asyncio.sleep(0.3)
        await service.end(number)
        (slot / "go").touch()
        await until(lambda: not alive(runner.to_dict()))
        assert not waiting.done()
        async with serve(LISTEN=listen):
            assert (await waiting).exit_code == 5


async def test_a_launch_waits_for_a_service_that_starts(serve: Serve, slot: Path, tmp_path: Path) -> None:
    listen = f"127.0.0.1:{free_port()}"
    write_pools(tmp_path / "pools.yaml", {"local": local_pool()})
    async with serve() as service:
        token = service.token
    async with RunnerLauncherClient(url=f"http://{listen}", token=token, patience_seconds=60) as client:
        launching = asyncio.create_task(launch(client, launch_body(slot)))
        await asyncio.sleep(0.5)
        assert not launching.done()
        async with serve(LISTEN=listen):
            assert (await launching).accepted


async def test_a_service_that_is_not_there_is_told_when_patience_ends() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    async with RunnerLauncherClient(url=url, token="any", patience_seconds=0.5) as client:  # noqa: S106
        began = time.monotonic()
        with pytest.raises(UnavailableError, match="Connection refused") as away:
            await client.pools()
        assert (away.value.code, away.value.status) == ("unreachable", None)
        assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        ("200 OK\r\nContent-Length: 5\r\n\r\nhello", UnavailableError, "something else than a Runner Launcher"),
        ("200 OK\r\nContent-Length: 2\r\n\r\n[]", UnavailableError, "something else than a Runner Launcher"),
        ('200 OK\r\nContent-Length: 15\r\n\r\n{"state":"odd"}', UnavailableError, "something else"),
        ("502 Bad Gateway\r\nContent-Length: 4\r\n\r\noops", UnavailableError, "502 Bad Gateway: oops"),
        ("404 Not Found\r\nContent-Length: 0\r\n\r\n", NotFoundError, "404 Not Found"),
    ],
)
async def test_what_is_no_runner_launcher_is_told(answer: str, kind: type[Exception], words: str) -> None:
    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {answer}".encode())
        writer.close()

    server = await asyncio.start_server(serve_one, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with RunnerLauncherClient(url=url, token="any", patience_seconds=0) as client:  # noqa: S106
            with pytest.raises(kind, match=words):
                await client.get("runner-000000000000")


# What happens to all.


async def collect(events: AsyncIterator[Event], seen: list[Event]) -> None:
    async for event in events:
        seen += [event]  # at once, for whoever looks meanwhile


async def test_all_events_are_streamed_and_taken_up_again_after_a_kill(serve: Serve, slot: Path) -> None:
    listen = f"127.0.0.1:{free_port()}"
    seen: list[Event] = []
    async with serve(LISTEN=listen) as service, client_of(service, patience=60) as client:
        watching = asyncio.create_task(collect(client.events(after=0), seen))
        first = await launch(client, launch_body(slot))
        await client.wait(first.runner_id)
        await until(lambda: seen and seen[-1].to_phase == "finished")
        await service.end(signal.SIGKILL)
        async with serve(LISTEN=listen):
            second = await launch(client, launch_body(slot))
            await client.wait(second.runner_id)
            happened = [*await client.history(first.runner_id), *await client.history(second.runner_id)]
            await until(lambda: len(seen) >= len(happened))
            assert [event.revision for event in seen] == [event.revision for event in happened]
            assert {event.runner_id for event in seen} == {first.runner_id, second.runner_id}
            assert [event async for event in client.past_events()] == happened
            assert [event async for event in client.past_events(after=happened[-2].revision)] == happened[-1:]
            watching.cancel()
            with pytest.raises(asyncio.CancelledError):
                await watching


# The drop-in.


class Ready(Enum):
    READY = "ready"


@dataclass
class DispatchersTask:
    id: str = "1.1"
    title: str = "Añadir un saludo"
    description: str = "Say hello"
    state: Ready = Ready.READY
    dependencies: list[str] = field(default_factory=lambda: ["1.0"])
    required_skill: str | None = "backend"
    reserved_branch: str | None = "feature/task-1.1"
    metadata: dict[str, Any] = field(default_factory=lambda: {"spec_name": "greetings", "priority": 3})
    created_at: datetime = field(default_factory=datetime.now)


@dataclass
class DispatchersSlot:
    slot_path: Path
    slot_id: str = "slot-1"
    repo_url: str = "https://git.example.org/a.git"
    lock: object = field(default_factory=object)


def with_agent(slot: Path, script: str) -> DispatchersSlot:
    launch_body(slot, script)
    return DispatchersSlot(slot, slot.name)


async def test_a_dispatchers_own_objects_are_launched_and_told_to_the_runner(server: Served, place: Path) -> None:
    launcher = RunnerLauncher(retry_attempts=3, url=server.url, token=server.token)
    task, workspace = DispatchersTask(), with_agent(place, f"{TELL}{WAITS}")
    pool = AgentPool("local", PoolType.LOCAL_PROCESS, 2, config={"log_level": "DEBUG"})
    runner = launcher.launch(task, workspace, pool)  # on a thread with a running loop, as the old one could be
    assert (runner.task_id, runner.pool_name, runner.slot_id) == ("1.1", "local", place.name)
    assert (runner.state, runner.state.value, bool(runner.pid)) == (RunnerState.RUNNING, "running", True)
    assert isinstance(runner.started_at, datetime)
    variables = await told(place)
    context = TaskContext.of(task, workspace)
    assert variables["TASK_CONTEXT"] == context.to_json()
    assert TaskContext.from_environment(variables) == context
    assert TaskContext.from_environment({"TASK_CONTEXT_FILE": variables["TASK_CONTEXT_FILE"]}) == context
    assert not launcher.wait(runner.runner_id, timeout=0).finished
    (place / "go").touch()
    assert launcher.wait(runner.runner_id).state is RunnerState.COMPLETED
    assert launcher.get(runner.runner_id).exit_code == 0
    launcher.close()


async def test_a_mapping_and_a_name_are_launched_as_well(server: Served, place: Path) -> None:
    body = launch_body(place, "exec sleep 600")
    with RunnerLauncher(url=server.url, token=server.token) as launcher:
        runner = launcher.launch(body["task"], body["slot"], "local")
        assert launcher.stop(runner.runner_id, grace=0).phase == "stopping"
        assert launcher.wait(runner.runner_id).reason == "cancelled"


async def test_every_way_a_launch_can_go_wrong_is_the_one_error_that_dispatchers_catch(serve: Serve, slot: Path) -> None:
    pools = {"local": local_pool(), "broken": local_pool(command=["/no/such/program"])}
    async with serve(pools) as service:
        launcher = RunnerLauncher(url=service.url, token=service.token)
        task, place = DispatchersTask(), with_agent(slot, "exec sleep 600")
        with pytest.raises(RunnerLaunchError, match="/no/such/program") as failed:
            launcher.launch(task, place, "broken")
        assert failed.value.attempts
        with pytest.raises(RunnerLaunchError, match="nope") as invalid:
            launcher.launch(task, place, AgentPool("nope", PoolType.DOCKER, 1))
        assert isinstance(invalid.value.__cause__, InvalidRequestError)
        holder = launcher.launch(task, place, "local")
        with pytest.raises(RunnerLaunchError) as busy:
            launcher.launch(task, place, "local")
        assert isinstance(busy.value.__cause__, SlotBusyError)
        assert busy.value.runner
        assert busy.value.runner.runner_id == holder.runner_id
        with pytest.raises(RunnerLaunchError, match=r"/pool/config/when: a datetime cannot travel as JSON") as not_json:
            launcher.launch(task, place, AgentPool("local", PoolType.DOCKER, 1, config={"when": datetime.now(UTC)}))
        assert isinstance(not_json.value.__cause__, InvalidRequestError)
    launcher = RunnerLauncher(url=service.url, token=service.token, patience_seconds=0.2)
    with pytest.raises(RunnerLaunchError, match="Connection refused") as away:
        launcher.launch(task, place, "local")
    assert isinstance(away.value.__cause__, UnavailableError)


async def test_a_full_pool_is_tried_as_often_as_was_asked_for(serve: Serve, slot: Path) -> None:
    async with serve({"local": local_pool(max_concurrency=1)}) as service, Proxy(service) as between:
        launcher = RunnerLauncher(retry_attempts=2, url=between.url, token=service.token)
        await asyncio.to_thread(launcher.launch, DispatchersTask(), with_agent(slot, "exec sleep 600"), "local")
        between.requests.clear()
        other = DispatchersSlot(slot, slot_id="slot-2")
        other.slot_path = slot.parent / "slot-2"
        other.slot_path.mkdir()
        with pytest.raises(RunnerLaunchError, match="local"):
            await asyncio.to_thread(launcher.launch, DispatchersTask(), other, "local")
        assert sum(data.startswith(b"POST /runners ") for data in between.requests) == 2


# An agent's side.


async def test_an_agent_reads_its_context_and_beats(serve: Serve, slot: Path) -> None:
    agent = (
        "import time\n"
        "from runner_launcher_client import Heartbeat, TaskContext\n"
        "context = TaskContext.from_environment()\n"
        "with Heartbeat(every_seconds=0.1) as heart:\n"
        "    time.sleep(6)\n"
        "print(context.task_title, heart.needed, heart.last_error)\n"
    )
    (slot / "agent.py").write_text(agent)
    pools = {"local": local_pool(heartbeat_timeout_seconds=4)}
    async with serve(pools) as service, client_of(service) as client:
        runner = await launch(client, launch_body(slot, f"exec {sys.executable} agent.py"))
        ended = await client.wait(runner.runner_id)
        assert (ended.state, ended.reason) == ("completed", None)
        assert ended.last_heartbeat
        assert b"".join([piece async for piece in client.logs(runner.runner_id)]) == b"Add a greeting True None\n"


async def test_a_log_of_a_service_that_says_nothing_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner_launcher_client.client.SILENCE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with RunnerLauncherClient(url=url, token="any", patience_seconds=0.5) as client:  # noqa: S106
            with pytest.raises(UnavailableError):
                async with asyncio.timeout(20):
                    [piece async for piece in client.logs("runner-000000000000")]
