"""What becomes of runners in containers when the engine, or somebody behind our back, does its worst.

All of it on real engines, through the front door. What the machine's own engine must not suffer is done to a private one, or
to the calls on their way to it, by a proxy.
"""

import asyncio
import contextlib
import json
import re
import secrets
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from conftest import (
    Json,
    Serve,
    Served,
    Service,
    finished,
    launch_body,
    launched,
    local_pool,
    problem,
    read,
    record_of,
    until,
    write_pools,
    written,
)
from docker_engine import HOST, IMAGE, Api, PrivateEngine
from docker_engine import _make_certificates as make_certificates
from fault_table import End, Verdict

from app.errors import LauncherUnavailable
from app.launcher import Exited, Gone, LaunchSpec, Running
from app.launchers.container import INSTALLATION, NAME, RUNNER_ID
from app.launchers.docker import DockerLauncher
from app.main import create_app
from app.runner import SKEW_SECONDS
from app.settings import Settings

SECONDS = 60.0
"""How long the engine may take for what it does at once when it is not busy."""

SOON = 5.0
COUNT = 'echo "$RUNNER_ID" >>started\n'
"""A script's first line: shows in its slot how often it was started."""
UNTIL_TOLD = "until [ -e go ]; do sleep 0.05; done; "

TLS = b"\x16"
"""What a client begins with that tries TLS first."""

Deed = Literal["refuse", "fail", "forbid", "mislead", "deny", "drop", "mute", "wait", "hang"]
SAID = {
    "fail": (b"500 Internal Server Error", b'{"message": "the disk is full"}'),
    "deny": (b"500 Internal Server Error", b'{"message": "the disk is full"}'),
    "forbid": (b"400 Bad Request", b'{"message": "invalid mount"}'),
    "mislead": (b"404 Not Found", b'{"message": "page not found"}'),
}


# The engine, and the way to it.


@dataclass
class Docker:
    """An engine, and one installation of the service on it."""

    api: Api
    host: str
    installation: str = field(default_factory=lambda: f"test-{secrets.token_hex(6)}")

    def pools(self, *, quotas: Json | None = None, **config: Any) -> Json:  # noqa: ANN401 - YAML
        """Describe a pool of containers that run ``agent.sh`` in their slot, and one of processes."""
        settings = {"image": IMAGE, "docker_host": self.host, "command": ["sh", "agent.sh"], "pull_policy": "never"}
        pool = {"type": "docker", "max_concurrency": 64, **(quotas or {}), "config": {**settings, **config}}
        return {"docker": pool, "local": local_pool()}

    def containers(self) -> list[Json]:
        """List what there is of this installation."""
        return self.api.containers(f"{INSTALLATION}={self.installation}")

    def container(self, runner: Json) -> Json | None:
        """Look at a runner's container."""
        found: Json | None = self.api.ask(f"/containers/{NAME}{runner['runner_id']}/json", passes=(404,))
        return found

    async def status(self, runner: Json) -> str:
        """Tell the state of a runner's container; nothing if there is none."""
        found = await asyncio.to_thread(self.container, runner)
        return str(found["State"]["Status"]) if found else ""

    async def signal(self, runner: Json, name: str) -> None:
        """Do as `docker kill` does."""
        path = f"/containers/{NAME}{runner['runner_id']}/kill"
        await asyncio.to_thread(self.api.ask, path, method="POST", params={"signal": name})

    async def make(self, name: str, labels: Json | None = None) -> str:
        """Make and start a container that is somebody else's."""
        body = {"Image": IMAGE, "Cmd": ["sleep", "600"], "Labels": labels or {}, "HostConfig": {"Init": True}}
        made = await asyncio.to_thread(self.api.ask, "/containers/create", method="POST", params={"name": name}, json=body)
        await asyncio.to_thread(self.api.ask, f"/containers/{made['Id']}/start", method="POST")
        return str(made["Id"])

    async def all_free(self, client: httpx.AsyncClient, *slots: Path) -> None:
        """Make sure that nothing is left: no container, no place in the pool taken, no slot held."""
        await until(lambda: asyncio.to_thread(lambda: not self.containers()), SECONDS)
        assert (await client.get("/pools/docker")).json()["current_running"] == 0
        for slot in slots:
            await finished(client, await launched(client, launch_body(slot, "exit 0", pool="local")))

    def left(self) -> list[str]:
        """Name the runners of which a container is there."""
        return [container["Labels"][RUNNER_ID] for container in self.containers()]

    def remove_all(self) -> list[str]:
        """Remove what there is of this installation, and name it."""
        found = self.containers()
        for container in found:
            self.api.remove(container["Id"])
        return [f"{container['Names']} {container['Status']}" for container in found]


@pytest.fixture
def docker(docker_engine: Api) -> Iterator[Docker]:
    """The machine's own engine; a test that leaves something on it fails."""
    docker = Docker(docker_engine, HOST)
    yield docker
    assert not docker.remove_all()


@pytest.fixture
def hurt(private_engine: PrivateEngine) -> Iterator[Docker]:
    """The engine that a test may hurt."""
    with private_engine.api() as api:
        yield Docker(api, private_engine.host)


class Proxy:
    """A socket in front of an engine's or a registry's, which reads what is asked and can spoil it.

    ``refuse`` closes the connection before the call is passed on, ``fail`` answers 500 instead, ``forbid`` 400, and
    ``mislead`` 404, as somebody before the engine does who cannot find it. ``deny`` answers 500 once
    the call was carried out, ``drop`` closes the connection then, ``mute`` leaves it open. ``wait`` passes the call on when
    it is released, ``hang`` never.
    """

    def __init__(self, behind: Path | tuple[str, int], path: Path | None = None) -> None:
        self._behind = behind
        self.path = path
        self.host = f"unix://{path}"
        self.address = ""
        self.asked: list[str] = []
        self.muted = 0
        self._deeds: list[tuple[re.Pattern[str], Deed, list[None] | None]] = []
        self._released = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.Task[None], str] = {}

    async def open(self) -> None:
        """Listen."""
        if self.path:
            self._server = await asyncio.start_unix_server(self._enter, self.path)
        else:
            self._server = await asyncio.start_server(self._enter, "127.0.0.1", 0)
            self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        """Listen no more; connections to it are refused."""
        if self._server:
            self._server.close()
            self._server = None
        await self.cut("")

    def spoil(self, call: str, deed: Deed, times: int | None = 1) -> None:
        """Do this to the next so many calls whose method and path match; None: to all of them."""
        self._released.clear()
        self._deeds.append((re.compile(call), deed, None if times is None else [None] * times))

    def heal(self) -> None:
        """Spoil nothing any more; what waits goes on, what hangs is cut off."""
        self._deeds.clear()
        self._released.set()

    async def cut(self, call: str) -> int:
        """Break the open connections of calls that match, and count them."""
        cut = [task for task, asked in self._open.items() if re.search(call, asked)]
        for task in cut:
            task.cancel()
        await asyncio.gather(*cut, return_exceptions=True)
        return len(cut)

    def count(self, call: str) -> int:
        """Count the calls that match."""
        return sum(bool(re.search(call, asked)) for asked in self.asked)

    def open_calls(self) -> list[str]:
        """Name the calls that are under way."""
        return [asked for asked in self._open.values() if asked]

    async def seen(self, call: str, times: int = 1) -> str:
        """Wait for a call, and give it."""
        await until(lambda: self.count(call) >= times, SECONDS)
        return [asked for asked in self.asked if re.search(call, asked)][-1]

    async def _enter(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._open[task] = ""
        task.add_done_callback(lambda _: self._open.pop(task))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one call; the client is told to open a connection for each."""
        try:
            with suppress(OSError, asyncio.IncompleteReadError):
                head = await reader.readexactly(1)
                if head == TLS:
                    return
                head += await reader.readuntil(b"\r\n\r\n")
                asked = re.sub(r"/v1\.\d+/", "/", head.decode("latin-1").partition(" HTTP/")[0], count=1)
                size = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
                body = await reader.readexactly(int(size[1])) if size else b""
                if task := asyncio.current_task():
                    self._open[task] = asked
                self.asked.append(asked)
                await self._do(self._deed(asked), head[:-2] + b"Connection: close\r\n\r\n" + body, reader, writer)
        finally:
            writer.close()

    def _deed(self, asked: str) -> Deed | None:
        for call, deed, left in self._deeds:
            if call.search(asked) and left != []:
                if left:
                    left.pop()
                return deed
        return None

    async def _do(self, deed: Deed | None, call: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if deed in ("wait", "hang"):
            await self._released.wait()
        if deed in ("refuse", "hang"):
            return
        if deed not in ("fail", "forbid", "mislead"):
            await self._pass(call, reader, writer, mute=deed in ("deny", "drop", "mute"))
        if deed == "mute":
            self.muted += 1
            await self._released.wait()
        if deed in SAID:
            status, text = SAID[deed]
            writer.write(b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nConnection: close\r\n" % status)
            writer.write(b"Content-Length: %d\r\n\r\n%s" % (len(text), text))
            await writer.drain()

    async def _pass(self, call: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, mute: bool) -> None:
        behind = self._behind
        opening = asyncio.open_unix_connection(behind) if isinstance(behind, Path) else asyncio.open_connection(*behind)
        engine_reader, engine_writer = await opening

        async def answer() -> None:
            with suppress(OSError):
                while data := await engine_reader.read(65_536):
                    if not mute:
                        writer.write(data)
                        await writer.drain()

        engine_writer.write(call)
        sides = [asyncio.create_task(answer()), asyncio.create_task(reader.read())]
        try:
            await asyncio.wait(sides, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for side in sides:
                side.cancel()
            await asyncio.gather(*sides, return_exceptions=True)
            engine_writer.transport.abort()


@pytest.fixture
async def proxy(docker: Docker, tmp_path: Path) -> AsyncIterator[Proxy]:
    """A way to the machine's engine on which calls can be spoilt."""
    proxy = Proxy(docker.api.socket, tmp_path / "proxy.sock")
    await proxy.open()
    docker.host = proxy.host
    yield proxy
    await proxy.close()


def slot_of(slot: Path, number: int) -> Path:
    """Name one more slot beside this."""
    return slot.with_name(f"slot-{number}")


async def history(client: httpx.AsyncClient, runner: Json) -> list[Json]:
    """Give a runner's events."""
    items: list[Json] = (await client.get(f"/runners/{runner['runner_id']}/events")).json()["items"]
    return items


async def output(client: httpx.AsyncClient, runner: Json) -> str:
    """Give a runner's whole log."""
    return (await client.get(f"/runners/{runner['runner_id']}/logs")).text


async def asked_for(client: httpx.AsyncClient, body: Json) -> Json:
    """Ask for a launch without waiting for the engine's word."""
    answer = await client.post("/runners", json=body, headers={"Prefer": "respond-async"})
    assert answer.status_code == 202, answer.text
    record: Json = answer.json()
    return record


# A slot that is something else once it was checked.


async def test_a_slot_that_became_a_link_while_its_container_was_made_is_not_mounted(
    *, service: Service, docker: Docker, proxy: Proxy, slot: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    launch_body(outside, "echo here >was")
    async with service(docker.pools(), installation=docker.installation) as client:
        proxy.spoil(CREATE, "wait")
        runner = await asked_for(client, launch_body(slot, COUNT, pool="docker"))
        await proxy.seen(CREATE)
        slot.rename(slot.with_name("away"))
        slot.symlink_to(outside)
        proxy.heal()
        record = await finished(client, runner, SECONDS)
        await until(lambda: asyncio.to_thread(lambda: not docker.containers()), SECONDS)
    assert (record["reason"], proxy.count(START)) == ("config_error", 0)
    assert "leads elsewhere than when it was checked" in record["message"]
    assert not (outside / "was").exists()


# A lying engine: whatever it says, there is one container, started once.

CREATE = r"POST /containers/create"
ARCHIVE = r"PUT /containers/\w+/archive"
START = r"POST /containers/\w+/start"
INSPECT = r"GET /containers/[\w-]+/json"


@pytest.mark.fault("an engine that lies: 500 after it acted, answers cut off, calls refused")
@pytest.mark.parametrize("deed", ["refuse", "fail", "deny", "drop"])
@pytest.mark.parametrize(
    "call",
    [CREATE, pytest.param(ARCHIVE, marks=pytest.mark.slow), START, INSPECT],
    ids=["create", "archive", "start", "inspect"],
)
async def test_a_call_that_fails_or_whose_answer_is_lost_makes_one_container_started_once(
    *, service: Service, docker: Docker, proxy: Proxy, slot: Path, call: str, deed: Deed, verdict: Verdict
) -> None:
    async with service(docker.pools(), installation=docker.installation) as client:
        proxy.spoil(call, deed)
        runner = await launched(client, launch_body(slot, COUNT + "cat $TASK_CONTEXT_FILE >context; exit 3", pool="docker"))
        record = await finished(client, runner, SECONDS)
        assert (record["reason"], record["exit_code"]) == ("exit_nonzero", 3)
        assert read(slot / "started") == f"{runner['runner_id']}\n"
        assert json.loads(read(slot / "context"))["task_id"] == "7"
        if deed in ("fail", "deny") or call.startswith("POST"):  # what repeats itself unharmed is asked again at once
            (told,) = (attempt["error"] for attempt in record["attempts"])
            assert docker.host in told
            assert "the disk is full" in told or deed in ("refuse", "drop")
        await verdict.judge(client, slot.parent, {runner["runner_id"]: ("failed", 3)}, docker.left)
        await docker.all_free(client, slot)


async def test_what_runs_is_found_though_creating_it_again_is_refused_and_is_gone_by_the_engines_own_word_alone(
    docker: Docker, proxy: Proxy
) -> None:
    spec = LaunchSpec(command=("sleep", "600"), environment={}, context=b"{}", options={"image": IMAGE})
    async with contextlib.aclosing(DockerLauncher(proxy.host, docker.installation)) as launcher:
        handle = await launcher.launch(f"runner-{secrets.token_hex(6)}", spec)
        proxy.spoil(CREATE, "forbid")
        assert await launcher.launch(handle.runner_id, spec) == handle
        assert proxy.count(CREATE) == 2
        proxy.spoil(INSPECT, "mislead", None)
        with pytest.raises(LauncherUnavailable, match="page not found"):
            await launcher.observe([handle])
        proxy.heal()
        assert (await launcher.observe([handle])) == {handle.runner_id: Running()}
        await launcher.remove(handle)
        assert (await launcher.observe([handle])) == {handle.runner_id: Gone()}


@pytest.mark.timeout(60)
async def test_no_call_is_waited_for_longer_than_a_call_may_take(docker: Docker, proxy: Proxy) -> None:
    patient, launcher = (DockerLauncher(proxy.host, docker.installation, **much) for much in ({}, {"call_seconds": 1.0}))
    spec = LaunchSpec(command=("sleep", "600"), environment={}, context=b"{}", options={"image": IMAGE})
    handle = await patient.launch(f"runner-{secrets.token_hex(6)}", spec)

    async def answers() -> bool:
        with contextlib.suppress(LauncherUnavailable):
            await launcher.ping()  # and so the version is settled: what hangs below are the calls themselves
            return True
        return False

    await until(answers, SECONDS)
    proxy.spoil("", "hang", None)
    calls = [
        lambda: launcher.stop(handle, 10),
        lambda: launcher.stop(handle, 0),
        lambda: launcher.remove(handle),
        lambda: launcher.observe([handle]),
        launcher.list,
        launcher.ping,
    ]
    for call in calls:
        with pytest.raises(LauncherUnavailable):
            await call()
    proxy.heal()
    await patient.remove(handle)
    await patient.aclose()
    await launcher.aclose()


async def test_memory_that_ran_out_is_told_also_where_the_engine_says_so_after_the_death(
    docker: Docker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.launchers.docker.OOM_SECONDS", SECONDS)  # the machine may be busy
    launcher = DockerLauncher(docker.host, docker.installation)
    spec = LaunchSpec(
        command=("sh", "-c", "exit 137"), environment={}, context=b"{}", memory_mib=64, options={"image": IMAGE}
    )
    handle = await launcher.launch(f"runner-{secrets.token_hex(6)}", spec)

    await until(lambda: not docker.api.ask(f"/containers/{handle.container_id}/json")["State"]["Running"], SECONDS)
    looking = asyncio.create_task(launcher.observe([handle]))
    await asyncio.sleep(0.2)
    launcher._heard("oom", {"ID": handle.container_id}, time.time())
    seen = (await looking)[handle.runner_id]
    assert isinstance(seen, Exited)
    assert seen.exit.oom_killed
    await launcher.remove(handle)
    await launcher.aclose()


# Somebody behind our back.


async def test_a_container_removed_by_hand_is_no_success(service: Service, docker: Docker, slot: Path) -> None:
    async with service(docker.pools(), installation=docker.installation) as client:
        runner = await launched(client, launch_body(slot, COUNT + "sleep 60", pool="docker"))
        await written(slot / "started")
        await asyncio.to_thread(docker.api.remove, runner["container_id"])
        record = await finished(client, runner, SECONDS)
        assert record["state"] == "failed"
        if record["reason"] == "lost":
            assert record["exit_code"] is None
            assert "no longer knows it" in record["message"]
        else:  # it was seen dead just before it was gone
            assert (record["reason"], record["exit_code"]) == ("exit_nonzero", 137)
        await docker.all_free(client, slot)


@pytest.mark.parametrize(("name", "code"), [("SIGKILL", 137), ("SIGTERM", 143), ("SIGUSR1", 138)])
async def test_a_container_killed_by_hand_tells_the_code_and_is_not_called_out_of_memory(
    service: Service, docker: Docker, slot: Path, name: str, code: int
) -> None:
    async with service(docker.pools(), installation=docker.installation) as client:
        runner = await launched(client, launch_body(slot, COUNT + "sleep 60", pool="docker"))
        await written(slot / "started")
        await docker.signal(runner, name)
        record = await finished(client, runner, SOON)
        assert (record["state"], record["reason"], record["exit_code"]) == ("failed", "exit_nonzero", code)
        assert (record["oom_killed"], record["signal"]) == (False, None)
        assert record["message"] == f"exited with code {code}, as a program does that {name} ends"
        await docker.all_free(client, slot)


async def test_a_pause_by_hand_is_no_end_and_a_stop_still_works(service: Service, docker: Docker, slot: Path) -> None:
    async with service(docker.pools(), installation=docker.installation) as client:
        runner = await launched(client, launch_body(slot, COUNT + "sleep 60", pool="docker"))
        await written(slot / "started")
        await asyncio.to_thread(docker.api.ask, f"/containers/{runner['container_id']}/pause", method="POST")
        assert (await record_of(client, runner))["state"] == "running"
        await client.delete(f"/runners/{runner['runner_id']}?grace=0.2")
        assert (await finished(client, runner, SECONDS))["reason"] == "cancelled"
        await docker.all_free(client, slot)


async def test_a_restart_by_hand_is_still_one_runner_with_one_end(service: Service, docker: Docker, slot: Path) -> None:
    async with service(docker.pools(), installation=docker.installation) as client:
        runner = await launched(client, launch_body(slot, COUNT + "sleep 60", pool="docker"))
        await written(slot / "started")
        path = f"/containers/{runner['container_id']}/restart"
        with suppress(AssertionError):  # the container may be removed before it is started anew
            await asyncio.to_thread(docker.api.ask, path, method="POST", params={"t": "0"})
        if (await record_of(client, runner))["phase"] != "finished":
            await client.delete(f"/runners/{runner['runner_id']}?grace=0")
        assert (await finished(client, runner, SECONDS))["state"] == "failed"
        await docker.all_free(client, slot)


@pytest.mark.parametrize("labels", [{}, {RUNNER_ID: "runner-0123456789ab", INSTALLATION: "somebody-else"}])
async def test_a_foreign_container_of_our_name_is_told_of_and_left_alone(
    service: Service, docker: Docker, proxy: Proxy, slot: Path, labels: Json
) -> None:
    async with service(docker.pools(), installation=docker.installation) as client:
        proxy.spoil(CREATE, "wait")
        runner = await asked_for(client, launch_body(slot, COUNT, pool="docker"))
        await proxy.seen(CREATE)
        foreign = await docker.make(NAME + runner["runner_id"], labels)
        try:
            proxy.heal()
            record = await finished(client, runner, SECONDS)
            assert (record["state"], record["reason"], record["retryable"]) == ("failed", "config_error", False)
            assert f"the name {NAME}{runner['runner_id']} is taken by a container that is not ours" in record["message"]
            await docker.all_free(client, slot)
            found = docker.container(runner)
            assert found
            assert (found["Id"], found["State"]["Running"]) == (foreign, True)
        finally:
            docker.api.remove(foreign)


# What the pool or the request gets wrong.


@pytest.mark.parametrize(
    ("config", "reason", "words"),
    [
        ({"network": "no-such-network"}, "launch_rejected", "network no-such-network not found"),
        ({"runtime": "no-such-runtime"}, "config_error", "no-such-runtime"),
        ({"volumes": {"no-such-volume-of-anybody": "/data"}}, "config_error", "no-such-volume-of-anybody"),
        ({"volumes": {"/no/such/directory": "/data"}}, "config_error", "/no/such/directory"),
        ({"slot_path_map": {"/": "/no/such/root"}}, "config_error", "/no/such/root"),
        ({"gpus": "all"}, "config_error", "device driver"),
        ({"gpus": "some"}, "config_error", "gpus must be a number, all or device=ID,ID"),
        ({"image": "no-such-image-here:latest"}, "image_not_found", "no-such-image-here:latest; pull_policy is never"),
        ({"image": "Not:a:NAME"}, "config_error", "invalid reference format"),
        ({"cap_add": ["NO_SUCH_POWER"]}, "config_error", "NO_SUCH_POWER"),
        ({"user": "nobody-of-this-name"}, "config_error", "nobody-of-this-name"),
        ({"command": ["sh", "-c", "x" * 131_072]}, "config_error", "xxx... is 131073 bytes long"),
        ({"command": ["sh", *(["x" * 131_071] * 16)]}, "config_error", "command and environment are"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
async def test_what_can_never_work_is_refused_at_once_with_the_engines_words(
    *, service: Service, docker: Docker, slot: Path, config: Json, reason: str, words: str
) -> None:
    async with service(docker.pools(**config), installation=docker.installation) as client:
        said = problem(
            await client.post("/runners", json=launch_body(slot, pool="docker")), 422, "launch-rejected", words=words
        )
        record = said["runner"]
        assert (record["state"], record["reason"], said["retryable"]) == ("failed", reason, False)
        assert len(record["attempts"]) == 1
        assert record["attempts"][0]["retryable"] is False
        assert record["exit_code"] is None
        await docker.all_free(client, slot)
    assert not Path("/no/such").exists()
    assert not [volume for volume in docker.api.ask("/volumes")["Volumes"] or () if "no-such" in volume["Name"]]


@pytest.mark.parametrize(("command", "code"), [("no-such-program", 127), ("/etc/passwd", 126)])
async def test_a_command_that_cannot_be_run_is_named_by_the_record(
    service: Service, docker: Docker, slot: Path, command: str, code: int
) -> None:
    async with service(docker.pools(command=[command]), installation=docker.installation) as client:
        record = await finished(client, await launched(client, launch_body(slot, pool="docker")), SECONDS)
        assert (record["state"], record["exit_code"]) == ("failed", code)
        assert command in record["message"]
        await docker.all_free(client, slot)


async def test_the_engines_socket_is_never_in_a_slot(service: Service, docker: Docker, slot: Path) -> None:
    proxy = Proxy(docker.api.socket, slot / "docker.sock")
    await proxy.open()
    docker.host = proxy.host
    try:
        async with service(docker.pools(), installation=docker.installation) as client:
            answer = await client.post("/runners", json=launch_body(slot, pool="docker"))
            problem(answer, 422, "launch-rejected", words=f"{slot} holds the engine's own socket")
            assert not proxy.count(CREATE)
            await docker.all_free(client, slot)
    finally:
        await proxy.close()


async def test_a_slot_outside_of_the_roots_is_not_mounted_whatever_its_path_says(
    service: Service, docker: Docker, proxy: Proxy, slot: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    link = slot_of(slot, 2)
    link.symlink_to(outside)
    async with service(docker.pools(), installation=docker.installation) as client:
        for path in (outside, link, Path(f"{slot}/../../outside"), Path("/var/run"), Path("/")):
            body = launch_body(slot, pool="docker")
            body["slot"]["slot_path"] = str(path)
            problem(await client.post("/runners", json=body), 422, "slot-outside-roots", "/slot/slot_path")
        assert not proxy.count(CREATE)


async def test_a_slot_behind_a_link_is_mounted_by_its_real_path(service: Service, docker: Docker, slot: Path) -> None:
    link = slot_of(slot, 2)
    link.symlink_to(slot)
    async with service(docker.pools(), installation=docker.installation) as client:
        runner = await launched(client, launch_body(link, COUNT + "sleep 60", pool="docker"))
        await written(slot / "started")
        found = docker.container(runner)
        assert found
        assert [(mount["Type"], mount["Source"], mount["RW"]) for mount in found["Mounts"]] == [("bind", str(slot), True)]
        second = await client.post("/runners", json=launch_body(slot, slot_id="another", pool="docker"))
        assert (second.status_code, second.json()["code"]) == (409, "slot-busy")
        await client.delete(f"/runners/{runner['runner_id']}?grace=0")
        await finished(client, runner, SECONDS)
        await docker.all_free(client, slot)


# What runners do.


async def test_one_that_ignores_term_is_killed_with_all_it_started(service: Service, docker: Docker, slot: Path) -> None:
    script = COUNT + "trap '' TERM; (sleep 61 & sleep 62) & while :; do sleep 0.1; done"
    async with service(docker.pools(), installation=docker.installation) as client:
        runner = await launched(client, launch_body(slot, script, pool="docker"))
        await written(slot / "started")
        began = time.monotonic()
        await client.delete(f"/runners/{runner['runner_id']}?grace=1")
        record = await finished(client, runner, SECONDS)
        assert 1 <= time.monotonic() - began < 1 + SOON
        assert (record["reason"], record["exit_code"], record["oom_killed"]) == ("cancelled", 137, False)
        await docker.all_free(client, slot)


async def test_one_that_obeys_term_keeps_its_code_and_its_last_words(service: Service, docker: Docker, slot: Path) -> None:
    script = COUNT + "trap 'echo bye; exit 9' TERM; while :; do sleep 0.05; done"
    async with service(docker.pools(), installation=docker.installation) as client:
        runner = await launched(client, launch_body(slot, script, pool="docker"))
        await written(slot / "started")
        await client.delete(f"/runners/{runner['runner_id']}?grace=30")
        record = await finished(client, runner, SOON)
        assert (record["reason"], record["exit_code"]) == ("cancelled", 9)
        assert "bye" in (await output(client, runner)).splitlines()
        await docker.all_free(client, slot)


async def test_what_a_runner_leaves_running_dies_before_its_slot_is_free(
    service: Service, docker: Docker, slot: Path
) -> None:
    script = COUNT + "(trap '' TERM HUP; while :; do date >>alive; sleep 0.05; done) & sleep 0.3; exit 0"
    async with service(docker.pools(), installation=docker.installation) as client:
        runner = await launched(client, launch_body(slot, script, pool="docker"))
        record = await finished(client, runner, SECONDS)
        alive = read(slot / "alive")
        assert (record["state"], record["exit_code"]) == ("completed", 0)
        await docker.all_free(client, slot)
        assert read(slot / "alive") == alive


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_fifty_launches_at_once_all_start_once_and_end(service: Service, docker: Docker, slot: Path) -> None:
    slots = [slot_of(slot, number) for number in range(50)]
    async with service(docker.pools(), installation=docker.installation) as client:
        bodies = [launch_body(each, COUNT + f"exit {number}", pool="docker") for number, each in enumerate(slots)]
        runners = await asyncio.gather(*[asked_for(client, body) for body in bodies])
        records = [await finished(client, runner, 240) for runner in runners]
        assert [record["exit_code"] for record in records] == list(range(50))
        assert [record["state"] for record in records] == ["completed"] + ["failed"] * 49
        assert not [record["attempts"] for record in records if record["attempts"]]
        assert [read(each / "started").split() for each in slots] == [[runner["runner_id"]] for runner in runners]
        await docker.all_free(client)


# What they say.


async def test_a_log_beyond_its_cap_keeps_the_newest_and_says_that_older_is_gone(
    service: Service, docker: Docker, slot: Path
) -> None:
    script = "seq 1 60000 | sed 's/$/ and so much more to say of it all over again/'; echo up >up; " + UNTIL_TOLD
    async with service(docker.pools(log_max_mib=1), installation=docker.installation) as client:
        runner = await launched(client, launch_body(slot, script, pool="docker"))
        await until(lambda: read(slot / "up"), SECONDS)

        async def copied() -> bool:
            return (await client.get(f"/runners/{runner['runner_id']}/logs?tail=1")).text.startswith("60000 ")

        await until(copied, SECONDS)
        live = await output(client, runner)
        tail = await client.get(f"/runners/{runner['runner_id']}/logs?tail=2")
        (slot / "go").touch()
        record = await finished(client, runner, SECONDS)
        assert record["state"] == "completed"
        await docker.all_free(client)
        late = (await client.get(f"/runners/{runner['runner_id']}")).json()
        assert late == {**record, "log_truncated": True, "revision": late["revision"], "observed_at": late["observed_at"]}
        assert (await history(client, runner))[-1]["type"] == "log_truncated"
        for text in (live, await output(client, runner)):
            note, *lines = text.splitlines()
            assert note == "[older output may have been dropped: the log is capped]"
            numbers = [int(line.split()[0]) for line in lines]
            assert numbers == list(range(numbers[0], 60_001))
            assert len(text) > 2**19
        assert [line.split()[0] for line in tail.text.splitlines()] == ["59999", "60000"]


async def test_who_follows_a_log_misses_and_repeats_nothing_when_the_stream_breaks(
    service: Service, docker: Docker, proxy: Proxy, slot: Path
) -> None:
    script = "for i in $(seq 1 400); do echo $i; [ $((i % 3)) = 0 ] && echo err $i >&2; sleep 0.005; done; "
    script += UNTIL_TOLD + "echo -n last"
    async with service(docker.pools(), installation=docker.installation) as client:
        runner = await launched(client, launch_body(slot, script, pool="docker"))
        following = asyncio.create_task(client.get(f"/runners/{runner['runner_id']}/logs?follow=true", timeout=SECONDS))
        cuts = 0
        while cuts < 4:
            await proxy.seen(r"GET /containers/\w+/logs\?.*follow=1", times=cuts + 1)
            await asyncio.sleep(0.2)  # so that it has read a part
            cuts += await proxy.cut(r"GET /containers/\w+/logs\?.*follow=1")
        (slot / "go").touch()
        text = (await following).text
        *lines, ending = text.splitlines()
        assert ending == f"[{runner['runner_id']} completed]"
        assert [line for line in lines if not line.startswith("err")] == [*map(str, range(1, 401)), "last"]
        assert [line for line in lines if line.startswith("err")] == [f"err {number}" for number in range(3, 401, 3)]
        await finished(client, runner, SECONDS)
        assert sorted((await output(client, runner)).splitlines()) == sorted(lines)
        await docker.all_free(client)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_runner_that_prints_200_mb_costs_the_service_no_memory(serve: Serve, docker: Docker, slot: Path) -> None:
    script = "yes 'so much to say of it all over again, and again' | head -c 200000000; echo; echo the end"
    async with serve(docker.pools(log_max_mib=10), INSTALLATION=docker.installation) as service, service.client() as client:
        await finished(client, await launched(client, launch_body(slot, "echo a short one", pool="docker")), SECONDS)
        before = peak_of(service)
        runner = await launched(client, launch_body(slot, script, pool="docker"))
        async with client.stream("GET", f"/runners/{runner['runner_id']}/logs?follow=true", timeout=240) as answer:
            size, end = 0, b""
            async for piece in answer.aiter_bytes():
                size, end = size + len(piece), (end + piece)[-200:]
        assert end.endswith(b" completed]\n")
        assert size > 10 * 2**20 or b"[the rest is in the log that was kept: read it again]\n" in end
        record = await finished(client, runner, SOON)
        assert record["state"] == "completed"
        await docker.all_free(client, slot)
        assert (await client.get(f"/runners/{runner['runner_id']}")).json()["log_truncated"]
        async with client.stream("GET", f"/runners/{runner['runner_id']}/logs", timeout=60) as answer:
            pieces = [piece async for piece in answer.aiter_bytes()]
        text = b"".join(pieces)
        assert text.startswith(b"[older output may have been dropped: the log is capped]\n")
        assert text.endswith(b"\nthe end\n")
        assert 5 * 2**20 <= len(text) <= 16 * 2**20  # the engine counts what it notes of each line
        grown = peak_of(service) - before
        assert grown < 32 * 1024, grown


async def test_a_follower_of_a_quiet_container_is_let_go_when_the_service_goes_down(
    serve: Serve, docker: Docker, slot: Path
) -> None:
    pools = docker.pools()
    async with serve(pools, leave_runners=True, INSTALLATION=docker.installation) as running, running.client() as client:
        runner = await launched(client, launch_body(slot, "echo ready\n" + UNTIL_TOLD, pool="docker"))
        async with client.stream("GET", runner["links"]["logs"], params={"follow": "true"}) as answer:
            lines = answer.aiter_lines()
            assert await anext(lines) == "ready"
            async with asyncio.timeout(8):  # less than the server's own patience with connections
                ended = asyncio.create_task(running.end(signal.SIGTERM))
                assert [line async for line in lines] == ["[the service is going down; ask again to follow on]"]
                assert await ended == 0
    (slot / "go").touch()
    async with serve(pools, INSTALLATION=docker.installation) as running, running.client() as client:
        assert (await finished(client, runner, SECONDS))["state"] == "completed"
        await docker.all_free(client, slot)


def peak_of(service: Served) -> int:
    """Tell the most memory that a service ever had, in KiB."""
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


# A service that dies, or is not there.


@pytest.mark.parametrize(
    ("call", "deed"),
    [
        pytest.param(CREATE, "hang", marks=pytest.mark.slow),
        pytest.param(ARCHIVE, "hang", marks=pytest.mark.slow),
        (START, "hang"),
        pytest.param(CREATE, "mute", marks=pytest.mark.slow),
        (START, "mute"),
    ],
    ids=["create", "archive", "start", "create-acted", "start-acted"],
)
async def test_a_service_killed_in_the_middle_of_a_launch_starts_it_once(
    *, serve: Serve, docker: Docker, proxy: Proxy, slot: Path, call: str, deed: Deed
) -> None:
    script = COUNT + UNTIL_TOLD + "exit 4"
    async with (
        serve(docker.pools(), leave_runners=True, INSTALLATION=docker.installation) as service,
        service.client() as client,
    ):
        proxy.spoil(call, deed)
        runner = await asked_for(client, launch_body(slot, script, pool="docker"))
        await proxy.seen(call)
        if deed == "mute":
            await until(lambda: proxy.muted, SECONDS)
        await service.end(signal.SIGKILL)
    proxy.heal()
    assert await docker.status(runner) == {CREATE: "created" if deed == "mute" else "", ARCHIVE: "created"}.get(
        call, "running" if deed == "mute" else "created"
    )
    async with serve(docker.pools(), INSTALLATION=docker.installation) as service, service.client() as client:
        await until(lambda: read(slot / "started"), SECONDS)
        (slot / "go").touch()
        record = await finished(client, runner, SECONDS)
        assert (record["reason"], record["exit_code"]) == ("exit_nonzero", 4)
        assert read(slot / "started") == f"{runner['runner_id']}\n"
        await docker.all_free(client, slot)


async def test_ends_while_the_service_is_down_are_told_whole_and_only_then_is_anything_removed(
    serve: Serve, docker: Docker, slot: Path
) -> None:
    script = f"echo working; {UNTIL_TOLD} echo done; exit "
    slots = {code: slot_of(slot, code) for code in (0, 7)}
    async with (
        serve(docker.pools(), leave_runners=True, INSTALLATION=docker.installation) as service,
        service.client() as client,
    ):
        bodies = [launch_body(each, f"{script} {code}", pool="docker") for code, each in slots.items()]
        runners = [await launched(client, body) for body in bodies]
        gone = await launched(client, launch_body(slot, COUNT + "sleep 60", pool="docker"))
        await written(slot / "started")
        await service.end(signal.SIGKILL)
    for each in slots.values():
        (each / "go").touch()
    await asyncio.to_thread(docker.api.remove, gone["container_id"])
    for runner in runners:
        await until(partial(is_status, docker, runner, "exited"), SECONDS)
    async with serve(docker.pools(), INSTALLATION=docker.installation) as service, service.client() as client:
        records = [await finished(client, runner, SECONDS) for runner in runners]
        assert [(record["state"], record["exit_code"]) for record in records] == [("completed", 0), ("failed", 7)]
        assert [await output(client, runner) for runner in runners] == ["working\ndone\n"] * 2
        record = await finished(client, gone, SECONDS)
        assert (record["state"], record["reason"], record["exit_code"]) == ("failed", "lost", None)
        await docker.all_free(client, slot, *slots.values())


async def is_status(docker: Docker, runner: Json, status: str) -> bool:
    """Say whether a runner's container is in this state."""
    return await docker.status(runner) == status


@asynccontextmanager
async def serving(
    docker: Docker,
    tmp_path: Path,
    *,
    now: Callable[[], float] = time.time,
) -> AsyncIterator[httpx.AsyncClient]:
    """Open the service in this process at a time of the test's choice; its runners are left alone."""
    write_pools(tmp_path / "pools.yaml", docker.pools())
    settings = Settings(
        state_dir=tmp_path / "state",
        pools_file=tmp_path / "pools.yaml",
        slot_roots=(tmp_path / "slots",),
        installation=docker.installation,
    )
    app = create_app(settings, now=now)
    async with app.router.lifespan_context(app):
        headers = {"Authorization": f"Bearer {read(tmp_path / 'state' / 'token').strip()}"}
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
            yield client


async def test_containers_on_no_record_are_adopted_alive_removed_when_ended_for_long_and_not_touched_when_foreign(
    docker: Docker, slot: Path, tmp_path: Path
) -> None:
    foreign = [
        await docker.make(f"{NAME}runner-{secrets.token_hex(6)}"),
        await docker.make(
            f"other-{secrets.token_hex(6)}", {RUNNER_ID: "runner-0123456789ab", INSTALLATION: "somebody-else"}
        ),
    ]
    other = slot_of(slot, 2)
    try:
        async with serving(docker, tmp_path) as client:
            live = await launched(client, launch_body(slot, COUNT + UNTIL_TOLD + "exit 4", pool="docker"))
            dead = await launched(client, launch_body(other, COUNT + UNTIL_TOLD, pool="docker"))
            await written(slot / "started")
            await written(other / "started")
        for path in (tmp_path / "state").glob("runners.db*"):
            path.unlink()
        (other / "go").touch()
        await until(lambda: is_status(docker, dead, "exited"), SECONDS)
        async with serving(docker, tmp_path) as client:

            async def adopted() -> Json:
                answer = await client.get(f"/runners/{live['runner_id']}")
                return answer.json() if answer.status_code == 200 else {}

            record = await until(adopted, SECONDS)
            for name in (
                "runner_id",
                "task_id",
                "slot_id",
                "pool_name",
                "container_id",
                "node",
                "isolation",
                "image_digest",
            ):
                assert record[name] == live[name]
            assert record["phase"] == "running"
            assert [event["type"] for event in await history(client, live)] == ["adopted"]
            assert (await client.post("/runners", json=launch_body(slot, pool="docker"))).json()["code"] == "slot-busy"
            assert (await client.get(f"/runners/{dead['runner_id']}")).status_code == 404
            assert await docker.status(dead) == "exited"
        async with serving(docker, tmp_path, now=lambda: time.time() + 3600) as client:
            await until(lambda: is_status(docker, dead, ""), SECONDS)
            (slot / "go").touch()
            record = await finished(client, live, SECONDS)
            assert (record["reason"], record["exit_code"]) == ("exit_nonzero", 4)
            await docker.all_free(client, slot, other)
        for each in foreign:
            assert docker.api.ask(f"/containers/{each}/json")["State"]["Running"]
    finally:
        for each in foreign:
            docker.api.remove(each)


@pytest.mark.parametrize("acted", [False, True])
async def test_an_image_deleted_between_attempts_is_told_unless_the_container_is_there(
    service: Service, docker: Docker, proxy: Proxy, slot: Path, *, acted: bool
) -> None:
    image = f"runner-launcher-test-{secrets.token_hex(4)}:1"
    name, tag = image.split(":")
    docker.api.ask(f"/images/{IMAGE}/tag", method="POST", params={"repo": name, "tag": tag})
    try:
        async with service(docker.pools(image=image, retry_base_seconds=0), installation=docker.installation) as client:
            proxy.spoil(CREATE, "deny" if acted else "fail")
            proxy.spoil(CREATE if not acted else INSPECT, "wait", 1)
            runner = await asked_for(client, launch_body(slot, COUNT, pool="docker"))
            await proxy.seen(CREATE if not acted else INSPECT, times=1 if acted else 2)
            await asyncio.to_thread(docker.api.ask, f"/images/{image}", method="DELETE", params={"force": "1"})
            proxy.heal()
            record = await finished(client, runner, SECONDS)
            if acted:
                assert record["state"] == "completed"
                assert read(slot / "started") == f"{runner['runner_id']}\n"
            else:
                assert (record["state"], record["reason"], record["retryable"]) == ("failed", "image_not_found", False)
                assert image in record["message"]
            await docker.all_free(client, slot)
    finally:
        with suppress(AssertionError):
            docker.api.ask(f"/images/{image}", method="DELETE")


# An engine that is away.


async def live_runners(client: httpx.AsyncClient, slot: Path, ends: dict[int, str]) -> dict[int, Json]:
    """Launch a runner for each slot; each ends as told once its slot holds a file `go`, and says so."""
    runners = {}
    for number, end in ends.items():
        script = f"{COUNT} echo working; {UNTIL_TOLD} touch gone; {end}"
        runners[number] = await launched(client, launch_body(slot_of(slot, number), script, pool="docker"))
    for number, runner in runners.items():
        await until(partial(read, slot_of(slot, number) / "started"), SECONDS)
        await until(partial(_runs, client, runner), SECONDS)
    return runners


async def _runs(client: httpx.AsyncClient, runner: Json) -> bool:
    return bool((await record_of(client, runner))["phase"] == "running")


def let_go(slot: Path, *numbers: int) -> None:
    """Let runners end."""
    for number in numbers:
        (slot_of(slot, number) / "go").touch()


@pytest.mark.fault("an engine that hangs: it accepts and never answers")
@pytest.mark.timeout(240)
@pytest.mark.parametrize("seconds", [6, pytest.param(35, marks=pytest.mark.slow)])
async def test_an_engine_that_hangs_changes_nothing_but_stale_and_all_is_told_when_it_goes_on(
    *, service: Service, hurt: Docker, private_engine: PrivateEngine, slot: Path, seconds: int, verdict: Verdict
) -> None:
    async with service(hurt.pools(), installation=hurt.installation) as client:
        runners = await live_runners(client, slot, {0: "exit 0", 7: "exit 7", 2: "exit 2"})
        for runner in runners.values():
            await until(partial(is_phase, client, runner, "running"), SECONDS)
        with private_engine.frozen():
            began = time.monotonic()
            let_go(slot, 0, 7)
            coming = await asked_for(client, launch_body(slot, COUNT + "exit 5", pool="docker"))
            stopped = await asked_for(client, launch_body(slot_of(slot, 9), COUNT + "exit 5", pool="docker"))
            await client.delete(f"/runners/{stopped['runner_id']}")
            await until((slot_of(slot, 7) / "gone").exists, SECONDS)
            while time.monotonic() - began < seconds:
                records = [await record_of(client, runner) for runner in runners.values()]
                assert [record["phase"] for record in records] == ["running"] * 3
                assert (await record_of(client, coming))["state"] == "pending"
                assert not (time.monotonic() - began < 25 and any(record["stale"] for record in records))
                await asyncio.sleep(0.1)
            if seconds > 30:
                await until(lambda: is_stale(client, runners[2]), SOON)
                assert (await client.get("/readyz")).status_code == 200
        verdict.over()
        ended = [await finished(client, runners[code], SOON * 2) for code in (0, 7)]
        assert [(record["state"], record["exit_code"], record["stale"]) for record in ended] == [
            ("completed", 0, False),
            ("failed", 7, False),
        ]
        record = await finished(client, coming, SECONDS)
        assert (record["exit_code"], len(record["attempts"])) == (5, 0)
        assert read(slot / "started") == f"{coming['runner_id']}\n"
        assert (await finished(client, stopped, SECONDS))["reason"] == "cancelled"
        record = await record_of(client, runners[2])
        assert record["phase"] == "running"
        await until(lambda: is_fresh(client, runners[2]), SECONDS)
        verdict.right()
        let_go(slot, 2)
        assert (await finished(client, runners[2], SECONDS))["exit_code"] == 2
        right: dict[str, End] = {runners[code]["runner_id"]: ("failed", code) for code in (2, 7)}
        right |= {runners[0]["runner_id"]: ("completed", 0), coming["runner_id"]: ("failed", 5)}
        await verdict.judge(client, slot.parent, right, hurt.left)
        await hurt.all_free(client, slot, slot_of(slot, 9), slot_of(slot, 0))


async def is_phase(client: httpx.AsyncClient, runner: Json, phase: str) -> bool:
    """Say whether a runner is in this phase."""
    return bool((await record_of(client, runner))["phase"] == phase)


async def is_stale(client: httpx.AsyncClient, runner: Json) -> bool:
    """Say whether a record may be old."""
    return bool((await record_of(client, runner))["stale"])


async def is_fresh(client: httpx.AsyncClient, runner: Json) -> bool:
    """Say whether a record is not old."""
    return not await is_stale(client, runner)


@pytest.mark.fault("an engine that is killed under live runners, and comes back")
@pytest.mark.timeout(240)
async def test_an_engine_killed_under_live_runners_and_restarted_tells_no_false_success(
    service: Service, hurt: Docker, private_engine: PrivateEngine, slot: Path, verdict: Verdict
) -> None:
    async with service(hurt.pools(retry_attempts=100), installation=hurt.installation) as client:
        runners = await live_runners(client, slot, {0: "exit 0", 7: "exit 7", 3: "exit 0"})
        await asyncio.to_thread(private_engine.kill)
        let_go(slot, 0, 7)
        coming = await asked_for(client, launch_body(slot, COUNT + "exit 5", pool="docker"))
        await until(lambda: all((slot_of(slot, code) / "gone").exists() for code in (0, 7)), SECONDS)
        assert [(await record_of(client, runner))["phase"] for runner in runners.values()] == ["running"] * 3
        await asyncio.to_thread(private_engine.start)
        verdict.over()
        records = {code: await finished(client, runner, SECONDS) for code, runner in runners.items()}
        ends = {code: (record["state"], record["exit_code"]) for code, record in records.items()}
        assert ends == {0: ("completed", 0), 7: ("failed", 7), 3: ("failed", ends[3][1])}  # the engine ends what lives
        record = await finished(client, coming, SECONDS)
        assert (record["reason"], record["exit_code"]) == ("exit_nonzero", 5)
        assert read(slot / "started") == f"{coming['runner_id']}\n"
        assert all(hurt.host in attempt["error"] for attempt in record["attempts"])
        right = {runner["runner_id"]: ends[code] for code, runner in runners.items()}
        await verdict.judge(client, slot.parent, right | {coming["runner_id"]: ("failed", 5)}, hurt.left)
        await hurt.all_free(client, slot, *[slot_of(slot, number) for number in runners])


async def says_working(client: httpx.AsyncClient, runner: Json) -> bool:
    return await output(client, runner) == "working\n"


@pytest.mark.fault("a power cut of an engine")
@pytest.mark.timeout(240)
async def test_a_power_cut_ends_runners_and_none_as_a_success(
    service: Service, hurt: Docker, private_engine: PrivateEngine, slot: Path
) -> None:
    async with service(hurt.pools(), installation=hurt.installation) as client:
        runners = await live_runners(client, slot, {0: "exit 0", 7: "exit 7"})
        for runner in runners.values():
            await until(partial(says_working, client, runner), SECONDS)
        await asyncio.to_thread(private_engine.kill, power=True)
        await asyncio.to_thread(private_engine.start)
        for runner in runners.values():
            record = await finished(client, runner, SECONDS)
            assert record["state"] == "failed"
            assert record["exit_code"] != 0
            assert await output(client, runner) == "working\n"
        await hurt.all_free(client, *[slot_of(slot, number) for number in runners])


@pytest.mark.fault("an engine that is stopped politely, and comes back")
@pytest.mark.timeout(240)
async def test_an_engine_stopped_politely_ends_its_runners_and_none_as_a_success(
    service: Service, hurt: Docker, private_engine: PrivateEngine, slot: Path
) -> None:
    async with service(hurt.pools(), installation=hurt.installation) as client:
        runners = await live_runners(client, slot, {0: "exit 0", 7: "exit 7"})
        await asyncio.to_thread(private_engine.stop)
        await asyncio.to_thread(private_engine.start)
        for runner in runners.values():
            record = await finished(client, runner, SECONDS)
            assert (record["state"], record["reason"]) == ("failed", "exit_nonzero")
            assert record["exit_code"] in (137, 143)
            assert await output(client, runner) == "working\n"
        await hurt.all_free(client, *[slot_of(slot, number) for number in runners])


async def test_an_engine_that_fails_launches_gets_them_later_and_what_it_never_takes_is_told(
    service: Service, docker: Docker, proxy: Proxy, slot: Path
) -> None:
    pools = docker.pools(retry_attempts=20, retry_base_seconds=0.5)
    pools["hasty"] = {
        **pools["docker"],
        "config": {**pools["docker"]["config"], "retry_attempts": 2, "retry_base_seconds": 0},
    }
    async with service(pools, installation=docker.installation) as client:
        proxy.spoil(CREATE, "refuse", None)
        answer = await client.post("/runners", json=launch_body(slot, pool="hasty"))
        said = problem(answer, 503, "engine-unavailable", words=docker.host)
        assert (said["retryable"], said["runner"]["reason"]) == (True, "engine_unavailable")
        assert [attempt["number"] for attempt in said["runner"]["attempts"]] == [1, 2]
        assert "Retry-After" in answer.headers
        runner = await asked_for(client, launch_body(slot, COUNT + "exit 3", pool="docker"))
        await until(lambda: has_attempts(client, runner), SECONDS)
        proxy.heal()
        assert (await finished(client, runner, SECONDS))["exit_code"] == 3
        assert read(slot / "started") == f"{runner['runner_id']}\n"
        await docker.all_free(client, slot)


async def test_a_container_whose_engine_went_away_before_it_was_started_is_not_forgotten(
    service: Service, docker: Docker, proxy: Proxy, slot: Path
) -> None:
    async with service(docker.pools(retry_attempts=1), installation=docker.installation) as client:
        proxy.spoil(ARCHIVE, "wait")  # what breaks here is asked again at once, and the connection then is refused
        runner = await asked_for(client, launch_body(slot, COUNT + "exit 3", pool="docker"))
        await proxy.seen(ARCHIVE)
        await proxy.close()
        await until(lambda: has_attempts(client, runner), SECONDS)
        assert (await record_of(client, runner))["phase"] == "starting"
        proxy.heal()
        await proxy.open()
        assert (await finished(client, runner, SECONDS))["exit_code"] == 3
        assert read(slot / "started") == f"{runner['runner_id']}\n"
        await docker.all_free(client, slot)


@pytest.mark.fault("an engine that is away: launches refused at once, until it is back")
@pytest.mark.timeout(240)
async def test_launches_for_an_engine_that_is_not_there_are_refused_at_once_until_it_comes(
    service: Service, hurt: Docker, private_engine: PrivateEngine, slot: Path, verdict: Verdict
) -> None:
    await asyncio.to_thread(private_engine.kill)
    began = time.monotonic()
    async with service(hurt.pools(), installation=hurt.installation) as client:
        assert time.monotonic() - began < SOON
        await refused_while_away(client, hurt, slot)
        await asyncio.to_thread(private_engine.start)
        verdict.over()
        await until(lambda: breaker_is(client, "closed"), SECONDS)
        verdict.right()
        runner = await launched(client, launch_body(slot, COUNT + "exit 3", pool="docker"))
        assert (await finished(client, runner, SECONDS))["exit_code"] == 3
        assert read(slot / "started") == f"{runner['runner_id']}\n"
        await verdict.judge(client, slot.parent, {runner["runner_id"]: ("failed", 3)}, hurt.left)
        await hurt.all_free(client, slot)


@pytest.mark.fault("an engine that is away: launches refused at once, until it is back")
@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("deed", ["stop", "freeze"])
async def test_launches_for_an_engine_that_goes_away_are_refused_at_once_until_it_is_back(
    *, service: Service, hurt: Docker, private_engine: PrivateEngine, slot: Path, deed: str, verdict: Verdict
) -> None:
    async with service(hurt.pools(), installation=hurt.installation) as client:
        await asyncio.to_thread(getattr(private_engine, deed))
        first = await asked_for(client, launch_body(slot_of(slot, 2), COUNT + "exit 2", pool="docker"))
        await refused_while_away(client, hurt, slot)
        await asyncio.to_thread(private_engine.thaw)
        await asyncio.to_thread(private_engine.start)
        verdict.over()
        await until(lambda: breaker_is(client, "closed"), SECONDS)
        verdict.right()
        runner = await launched(client, launch_body(slot, COUNT + "exit 3", pool="docker"))
        assert (await finished(client, runner, SECONDS))["exit_code"] == 3
        assert read(slot / "started") == f"{runner['runner_id']}\n"
        record = await finished(client, first, SECONDS)
        started = read(slot_of(slot, 2) / "started")
        assert (record["reason"], started) in [("engine_unavailable", ""), ("exit_nonzero", f"{first['runner_id']}\n")]
        await hurt.all_free(client, slot)


async def refused_while_away(client: httpx.AsyncClient, docker: Docker, slot: Path) -> None:
    """Wait until an engine is taken to be away, and see that a launch for it is refused in less than a second."""
    await until(lambda: breaker_is(client, "open"), SECONDS)
    began = time.monotonic()
    answer = await client.post("/runners", json=launch_body(slot, COUNT, pool="docker"))
    assert time.monotonic() - began < 1
    problem(answer, 503, "engine-unavailable", words=f"docker:{docker.host} is away")
    assert int(answer.headers["Retry-After"]) >= 1


async def breaker_is(client: httpx.AsyncClient, state: str) -> bool:
    """Say whether launches for the containers' engine are taken."""
    engines = (await client.get("/engines")).json()["items"]
    return [engine["breaker"] for engine in engines if "docker" in engine["pools"]] == [state]


async def has_attempts(client: httpx.AsyncClient, runner: Json) -> bool:
    """Say whether a launch was refused once."""
    return bool((await record_of(client, runner))["attempts"])


async def test_an_engine_that_accepts_and_never_answers_holds_a_launch_open_until_it_is_known(
    service: Service, docker: Docker, proxy: Proxy, slot: Path
) -> None:
    async with service(docker.pools(launch_timeout_seconds=1), installation=docker.installation) as client:
        proxy.spoil("", "hang", None)
        began = time.monotonic()
        runner = await asked_for(client, launch_body(slot, COUNT, pool="docker"))
        await until(lambda: time.monotonic() - began > 3, SECONDS)
        assert (await record_of(client, runner))["state"] == "pending"
        second = await client.post("/runners", json=launch_body(slot, pool="docker"))
        assert second.json()["code"] == "slot-busy"
        proxy.heal()
        record = await finished(client, runner, SECONDS)
        assert (record["state"], record["reason"]) == ("failed", "launch_timeout")
        assert "not started within 1 s" in record["message"]
        assert not read(slot / "started")
        await docker.all_free(client, slot)


async def test_a_start_that_outlasts_the_launch_timeout_is_undone_before_the_launch_is_called_failed(
    service: Service, docker: Docker, proxy: Proxy, slot: Path
) -> None:
    async with service(docker.pools(launch_timeout_seconds=1), installation=docker.installation) as client:
        proxy.spoil(START, "wait")
        runner = await asked_for(client, launch_body(slot, COUNT + "sleep 60", pool="docker"))
        record = await finished(client, runner, SECONDS)
        assert (record["state"], record["reason"]) == ("failed", "launch_timeout")
        await docker.all_free(client, slot)
        proxy.heal()
        assert not read(slot / "started")


async def test_ends_are_seen_at_once_again_after_the_event_stream_was_cut(
    service: Service, docker: Docker, proxy: Proxy, slot: Path
) -> None:
    async with service(docker.pools(), installation=docker.installation) as client:
        runners = await live_runners(client, slot, {0: "exit 0", 7: "exit 7"})
        await proxy.seen("GET /events")
        for code, runner in runners.items():
            seen = proxy.count("GET /events")
            assert await proxy.cut("GET /events") == 1
            let_go(slot, code)
            assert (await finished(client, runner, SOON))["exit_code"] == code
            await proxy.seen("GET /events", seen + 1)
        await docker.all_free(client, slot)


async def test_an_end_is_told_by_the_engines_event_alone_save_one_that_may_be_for_lack_of_memory(
    service: Service, docker: Docker, proxy: Proxy, slot: Path
) -> None:
    async with service(docker.pools(quotas={"memory_quota": 64}), installation=docker.installation) as client:
        runners = await live_runners(client, slot, {0: "exit 0", 7: "exit 7"})
        await proxy.seen("GET /events")
        proxy.spoil(r"GET /containers/", "wait", None)  # as when the engine takes long to take a network down
        let_go(slot, 0, 7)
        record = await finished(client, runners[0], SOON)
        assert (record["state"], record["exit_code"], record["stale"]) == ("completed", 0, False)
        about = docker.api.ask(f"/containers/{record['container_id']}/json")["State"]
        told, known = (datetime.fromisoformat(text) for text in (record["finished_at"], about["FinishedAt"]))
        assert abs((told - known).total_seconds()) < 1
        assert (await client.get(runners[7]["links"]["self"])).json()["phase"] != "finished"
        proxy.heal()
        assert (await finished(client, runners[7], SECONDS))["exit_code"] == 7
        assert (await client.get(runners[0]["links"]["self"])).json() == record
        await docker.all_free(client, slot)


async def test_one_that_we_stop_is_looked_at_whatever_the_event_says(
    service: Service, docker: Docker, proxy: Proxy, slot: Path
) -> None:
    async with service(docker.pools(), installation=docker.installation) as client:
        script = "trap 'exit 0' TERM; echo up >up; while :; do sleep 0.05; done"
        runner = await launched(client, launch_body(slot, script, pool="docker"))
        await until(lambda: read(slot / "up"), SECONDS)
        looks = proxy.count(r"GET /containers/\w+/json")
        await client.delete(runner["links"]["self"])
        record = await finished(client, runner, SECONDS)
        assert (record["state"], record["reason"], record["exit_code"]) == ("failed", "cancelled", 0)
        assert proxy.count(r"GET /containers/\w+/json") > looks
        await docker.all_free(client)


@pytest.mark.parametrize(
    "deed", ["hang", pytest.param("refuse", marks=pytest.mark.slow), pytest.param("fail", marks=pytest.mark.slow)]
)
async def test_ends_are_seen_without_any_event_stream(
    service: Service, docker: Docker, proxy: Proxy, slot: Path, deed: Deed
) -> None:
    proxy.spoil("GET /events", deed, None)
    async with service(docker.pools(), installation=docker.installation) as client:
        runners = await live_runners(client, slot, {7: "exit 7"})
        let_go(slot, 7)
        assert (await finished(client, runners[7], 15))["exit_code"] == 7
        assert proxy.count("GET /events") < 30
        await docker.all_free(client, slot)


@pytest.mark.parametrize("deed", ["refuse", "fail"])
async def test_logs_of_a_live_runner_whose_engine_is_away_are_a_503(
    service: Service, docker: Docker, proxy: Proxy, slot: Path, deed: Deed
) -> None:
    async with service(docker.pools(), installation=docker.installation) as client:
        runners = await live_runners(client, slot, {0: "exit 0"})
        proxy.spoil("", deed, None)
        answer = await client.get(f"/runners/{runners[0]['runner_id']}/logs")
        said = problem(answer, 503, "engine-unavailable", words=docker.host)
        assert said["retryable"] is True
        proxy.heal()
        let_go(slot, 0)
        assert (await finished(client, runners[0], SECONDS))["state"] == "completed"
        await docker.all_free(client, slot)


# An engine behind a network address.


async def test_an_engine_by_tcp_and_tls_runs_what_the_one_by_its_socket_does(
    service: Service, hurt: Docker, private_engine: PrivateEngine, slot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
    monkeypatch.setenv("DOCKER_CERT_PATH", str(private_engine.certificates))
    hurt.host = private_engine.tcp_host
    async with service(hurt.pools(user="image"), installation=hurt.installation) as client:
        runner = await launched(client, launch_body(slot, COUNT + "echo done; exit 3", pool="docker"))
        assert (await finished(client, runner, SECONDS))["exit_code"] == 3
        assert await output(client, runner) == "done\n"
        await hurt.all_free(client, slot)


@pytest.mark.parametrize(
    ("verify", "certificates", "status", "words"),
    [
        ("1", "none", 422, "the certificates ca.pem, cert.pem and key.pem in"),
        ("1", "foreign", 503, "certificate verify failed"),
        ("", "", 503, "HTTP request to an HTTPS server"),
    ],
)
async def test_an_engine_by_tls_without_the_right_certificate_is_told_clearly(
    *,
    service: Service,
    hurt: Docker,
    private_engine: PrivateEngine,
    slot: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    verify: str,
    certificates: str,
    status: int,
    words: str,
) -> None:
    folder = tmp_path / "certificates"
    if certificates == "foreign":
        make_certificates(folder)
    monkeypatch.setenv("DOCKER_TLS_VERIFY", verify)
    monkeypatch.setenv("DOCKER_CERT_PATH", str(folder))
    hurt.host = private_engine.tcp_host
    pools = hurt.pools(user="image", retry_base_seconds=0)
    async with service(pools, installation=hurt.installation) as client:
        answer = await client.post("/runners", json=launch_body(slot, pool="docker"))
        problem(answer, status, "launch-rejected" if status == 422 else "engine-unavailable", words=words)
        assert hurt.host in answer.json()["detail"]


async def test_who_ended_by_itself_while_a_stop_could_not_be_sent_keeps_its_own_end(
    service: Service, docker: Docker, proxy: Proxy, slot: Path
) -> None:
    async with service(docker.pools(), installation=docker.installation) as client:
        runner = await launched(
            client, launch_body(slot, COUNT + "until [ -e go ]; do sleep 0.05; done; exit 3", pool="docker")
        )
        await written(slot / "started")
        later = launch_body(slot.with_name("slot-2"), "exit 0", pool="docker")
        await finished(client, await launched(client, later), SECONDS)  # whose events are the last ones heard
        await asyncio.sleep(SKEW_SECONDS)  # before which another service might have sent it
        await proxy.close()
        answer = await client.delete(runner["links"]["self"])
        assert answer.status_code == 202
        (slot / "go").touch()
        await until(lambda: _exited(docker, runner), SECONDS)
        await proxy.open()
        record = await finished(client, runner, SECONDS)
        assert (record["state"], record["exit_code"], record["reason"]) == ("failed", 3, "exit_nonzero")
        await docker.all_free(client, slot)


async def _exited(docker: Docker, runner: Json) -> bool:
    return await docker.status(runner) == "exited"


async def test_a_log_that_an_engine_has_cut_by_little_is_told_as_cut(service: Service, docker: Docker, slot: Path) -> None:
    """Lines as long as agents print them, of which the engine keeps a little less than the cap when it has cut."""
    script = "n=0; while [ $n -lt 322 ]; do n=$((n + 1)); printf '%03d%03996d\\n' $n 0; done"
    async with service(docker.pools(log_max_mib=1), installation=docker.installation) as client:
        runner = await launched(client, launch_body(slot, script, pool="docker"))
        await finished(client, runner, SECONDS)
        await docker.all_free(client, slot)
        first = (await client.get(f"{runner['links']['self']}/logs")).text.splitlines()[0]
        record = await record_of(client, runner)
        assert first.startswith("001") != record["log_truncated"]
