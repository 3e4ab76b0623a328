"""The service as its users meet it: HTTP, on a real store and real local processes, with nothing of ours replaced.

``service`` opens it in this process, behind an ASGI transport; ``serve`` starts the real thing on a port of its own, for
what needs one: streams, clients that go away, signals. Both end every runner they started, and make sure that nothing of it
lives.
"""

import asyncio
import contextlib
import functools
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, overload

import httpx
import hypothesis
import pytest
import yaml
from blockbuster import BlockingError, blockbuster_ctx
from typing_extensions import override

from app.launchers.local_process import LocalProcessLauncher
from app.main import create_app
from app.settings import Settings

pytest_plugins = ["engines", "docker_engine", "fault_table", "postgres", "service_image"]
pytest.register_assert_rewrite("kubernetes_house", "launcher_contract")

hypothesis.settings.register_profile("patient", deadline=None)  # a machine may be busy for a moment
hypothesis.settings.load_profile("patient")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background deaf to these two,
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and what we start would inherit that

Json = dict[str, Any]
T = TypeVar("T")

SECONDS = 30.0
"""How long a test waits for what should come at once, on a machine that may be busy."""

TELL = "cat /proc/$$/environ >environ.new && mv environ.new environ\n"
"""A script's first line: shows in its slot what the runner was told."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there are several processes, keep a file in one, and all that share a cluster too: some tests stop its parts."""
    for item in items:
        group = "kubernetes" if "kubernetes" in f"{item.path.stem} {item.name}" else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))


# What a test says.


def local_pool(*, max_concurrency: int = 8, enabled: bool = True, quotas: Json | None = None, **config: Any) -> Json:  # noqa: ANN401 - YAML
    """Describe a pool whose runners run ``agent.sh`` in their slot."""
    pool = {"type": "local-process", "max_concurrency": max_concurrency, "enabled": enabled, **(quotas or {})}
    return {**pool, "config": {"command": ["sh", "agent.sh"], **config}}


def write_pools(path: Path, pools: Json) -> None:
    """Write a pool file."""
    path.write_text(yaml.safe_dump({"agent_pools": pools}))


def launch_body(slot: Path, script: str = "exit 0", *, pool: Any = "local", slot_id: str | None = None, **task: Any) -> Json:  # noqa: ANN401 - JSON
    """Write what a Dispatcher posts, and the script that the runner will be, into a slot made if need be."""
    slot.mkdir(parents=True, exist_ok=True)
    (slot / "agent.sh").write_text(script)
    return {
        "task": {"id": "7", "title": "Add a greeting", **task},
        "slot": {"slot_id": slot_id or slot.name, "slot_path": str(slot), "repo_url": "https://git.example.org/a.git"},
        "pool": pool,
    }


@overload
async def until(condition: Callable[[], Awaitable[T]], seconds: float = SECONDS) -> T: ...
@overload
async def until(condition: Callable[[], T], seconds: float = SECONDS) -> T: ...
async def until(condition: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """Ask again and again until the answer is a yes, and give it; fail after so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        answer = condition()
        if isinstance(answer, Awaitable):
            answer = await answer
        if answer:
            return answer
        assert time.monotonic() < deadline, f"not within {seconds:g} s; the last answer was {answer!r}"
        await asyncio.sleep(0.005)


async def written(path: Path) -> str:
    """Wait for a file that is not empty, and read it."""
    return await until(lambda: read(path))


def read(path: Path) -> str:
    """Read a file; one that is not there says nothing."""
    return path.read_text() if path.exists() else ""


async def told(slot: Path) -> dict[str, str]:
    """Read the environment that a runner which does ``TELL`` was given."""
    variables = (await written(slot / "environ")).rstrip("\0").split("\0")
    return dict(variable.split("=", 1) for variable in variables)


async def launched(client: httpx.AsyncClient, body: Json, **headers: str) -> Json:
    """Launch a runner that the engine accepts."""
    answer = await client.post("/runners", json=body, headers=headers)
    assert answer.status_code == 201, answer.text
    record: Json = answer.json()
    return record


async def record_of(client: httpx.AsyncClient, runner: Json) -> Json:
    """Read a runner's record as it is now."""
    answer = await client.get(f"/runners/{runner['runner_id']}")
    assert answer.status_code == 200, answer.text
    record: Json = answer.json()
    return record


async def finished(client: httpx.AsyncClient, runner: Json, seconds: float = SECONDS) -> Json:
    """Wait for a runner's end, and give its record."""

    async def ended() -> Json:
        record = await record_of(client, runner)
        return record if record["phase"] == "finished" else {}

    return await until(ended, seconds)


def problem(answer: httpx.Response, status: int, code: str, *pointers: str, words: str = "") -> Json:
    """Check that an answer is this problem about these places, in these words; and give it."""
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    said: Json = answer.json()
    assert (answer.status_code, said["status"], said["code"]) == (status, status, code), said
    assert [fault["pointer"] for fault in said["errors"]] == list(pointers), said
    assert words in said["detail"], said
    assert all(fault["detail"] for fault in said["errors"]), said
    assert said["title"]
    assert said["request_id"] == answer.headers["x-request-id"]
    return said


def alive(runner: Json) -> list[int]:
    """Give the processes that bear a runner's id, whoever their parents are."""
    mark = f"RUNNER_ID={runner['runner_id']}".encode()
    pids = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in environ.read_bytes().split(b"\0"):
                pids.append(int(environ.parent.name))
    return pids


def shown(pid: int) -> str:
    """Say what a process is, for whoever wonders why it lives."""
    place = Path(f"/proc/{pid}")
    return f"{pid}: {read(place / 'cmdline').replace(chr(0), ' ')}: {read(place / 'stat').rpartition(')')[2][:20]}"


# The service.


class Service(Protocol):
    """Opens the service in this process; pools not given stay as they were."""

    def __call__(
        self,
        pools: Json | None = None,
        *,
        leave_runners: bool = False,
        **settings: Any,  # noqa: ANN401 - as Settings has them
    ) -> AbstractAsyncContextManager[httpx.AsyncClient]: ...


@pytest.fixture
def slot(tmp_path: Path) -> Path:
    """A slot's directory, under the root where slots may be."""
    slot = tmp_path / "slots" / "slot-1"
    slot.mkdir(parents=True)
    return slot


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    """Where the service keeps what it knows."""
    return tmp_path / "state"


@pytest.fixture
def pools_file(tmp_path: Path) -> Path:
    """The pool file; a service makes one with a single pool, ``local``, unless the test did."""
    return tmp_path / "pools.yaml"


@pytest.fixture
def service(tmp_path: Path, state_dir: Path, pools_file: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    """Opens the service in this process, as often as a test likes."""
    for name in [name for name in os.environ if name.startswith("RUNNER_LAUNCHER_")]:
        monkeypatch.delenv(name)

    @asynccontextmanager
    async def open_service(
        pools: Json | None = None,
        *,
        leave_runners: bool = False,
        now: Callable[[], float] = time.time,
        **settings: Any,  # noqa: ANN401
    ) -> AsyncIterator[httpx.AsyncClient]:
        if pools or not read(pools_file):
            write_pools(pools_file, pools or {"local": local_pool()})
        known = {"state_dir": state_dir, "pools_file": pools_file, "slot_roots": (tmp_path / "slots",), **settings}
        app = create_app(Settings(**known), now=now)
        transport = httpx.ASGITransport(app)
        with _nothing_logged(lambda record: record.levelno >= logging.ERROR):
            async with app.router.lifespan_context(app):
                headers = {"Authorization": f"Bearer {read(state_dir / 'token').strip()}"}
                async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
                    try:
                        yield client
                    finally:
                        if not leave_runners:
                            await _end_all(client)

    return open_service


@pytest.fixture
async def client(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    """Somebody who may do everything, at a service with one pool named ``local``."""
    async with service() as client:
        yield client


@dataclass(frozen=True, slots=True)
class Served:
    """A running service process."""

    process: subprocess.Popen[bytes]
    url: str
    token: str
    output: Path

    def client(self) -> httpx.AsyncClient:
        """Somebody who may do everything."""
        return httpx.AsyncClient(base_url=self.url, headers={"Authorization": f"Bearer {self.token}"}, timeout=30)

    async def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End the process, and give its exit status."""
        self.process.send_signal(number)
        return await asyncio.to_thread(self.process.wait, 20)

    async def says(self, words: str) -> None:
        """Wait until the process has logged these words."""
        await until(lambda: words in read(self.output))


class Serve(Protocol):
    """Starts the service as a process; ``inside`` is a command that runs it, ``mishaps`` allows it to log tracebacks."""

    def __call__(
        self,
        pools: Json | None = None,
        *,
        leave_runners: bool = False,
        inside: Sequence[str] = (),
        mishaps: bool = False,
        **settings: str,
    ) -> AbstractAsyncContextManager[Served]: ...


@pytest.fixture
async def launcher(tmp_path: Path) -> AsyncIterator[LocalProcessLauncher]:
    """Starts local processes by itself, with no service about it."""
    launcher = LocalProcessLauncher(tmp_path / "runners")
    yield launcher
    for found in await launcher.list():
        await launcher.remove(found.handle)
    await launcher.aclose()


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """Starts the service as a process, as often as a test likes."""
    return functools.partial(served, tmp_path)


@asynccontextmanager
async def served(
    directory: Path,
    pools: Json | None = None,
    *,
    leave_runners: bool = False,
    inside: Sequence[str] = (),
    mishaps: bool = False,
    **settings: str,
) -> AsyncIterator[Served]:
    """Serve from a directory, until the test or this ends it."""
    if pools or not read(directory / "pools.yaml"):
        write_pools(directory / "pools.yaml", pools or {"local": local_pool()})
    output = directory / f"output-{time.monotonic_ns()}"
    environment = service_environment(directory, **settings)
    process = _start([*inside, sys.executable, "-m", "app.cli", "serve"], environment, output)
    try:
        url = await until(lambda: _listening(process, output), 3 * SECONDS)
        # Through /proc, because the process may see other file systems than we do.
        token = read(Path(f"/proc/{process.pid}/root{environment['RUNNER_LAUNCHER_STATE_DIR']}/token")).strip()
        running = Served(process, url, token, output)
        yield running
        if process.poll() is None and not leave_runners:
            async with running.client() as client:
                await _end_all(client)
        if process.poll() is None:
            assert await running.end() == 0
    finally:
        process.kill()
        process.wait()
    assert mishaps or "Traceback" not in read(output), read(output)


def service_environment(directory: Path, **settings: str) -> dict[str, str]:
    """Give a service process the environment in which it keeps everything in one directory."""
    known = {
        "LISTEN": "127.0.0.1:0",
        "STATE_DIR": str(directory / "state"),
        "POOLS_FILE": str(directory / "pools.yaml"),
        "SLOT_ROOTS": str(directory / "slots"),
        **settings,
    }
    variables = {f"RUNNER_LAUNCHER_{name}": value for name, value in known.items()}
    return {"PATH": os.environ["PATH"], "HOME": str(directory), **variables}


def _start(command: Sequence[str], environment: dict[str, str], output: Path) -> subprocess.Popen[bytes]:
    with output.open("wb") as file:
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file)


def _listening(process: subprocess.Popen[bytes], output: Path) -> str:
    """Tell where a process says it listens; nothing while it has not said."""
    assert process.poll() is None, output.read_text()
    said = re.search(r"listening on (\S+);", output.read_text())
    return said[1] if said else ""


async def _end_all(client: httpx.AsyncClient) -> None:
    """End every live runner, and make sure that nothing of any runner lives."""
    runners: list[Json] = []
    query: Json = {"limit": 500}
    while True:
        page = (await client.get("/runners", params=query)).json()
        runners += page["items"]
        if page["next_cursor"] is None:
            break
        query["cursor"] = page["next_cursor"]
    for runner in runners:
        if runner["phase"] != "finished":
            await client.delete(f"/runners/{runner['runner_id']}?grace=0")
    for runner in runners:
        await finished(client, runner)
    assert not [shown(pid) for runner in runners for pid in alive(runner)]


# What no test may see.


@pytest.fixture(autouse=True)
def _no_blocking_call_on_the_loop(request: pytest.FixtureRequest) -> Iterator[None]:
    """Make a call of the app that blocks the event loop fail, save while it starts, when nobody waits yet.

    Where the app, or a launcher, has a real loop: tests of the core may drive one of their own.
    """
    if "service" not in request.fixturenames and request.path.parent.name != "contract":
        yield
        return
    with blockbuster_ctx("app") as guard, _nothing_logged(lambda record: _is_blocking(record.exc_info)):
        for function in guard.functions.values():
            function.can_block_in("app/main.py", {"lifespan", "_take_state_dir"})
            function.can_block_in("app/launchers/cluster.py", {"_configuration"})  # on a loop of its own, in a thread
        yield


@contextmanager
def _nothing_logged(bad: Callable[[logging.LogRecord], bool]) -> Iterator[None]:
    """Fail if the app logs such a record: its loops log what goes wrong in them, and go on."""
    seen: list[logging.LogRecord] = []

    class Watch(logging.Handler):
        @override
        def emit(self, record: logging.LogRecord) -> None:
            if bad(record):
                seen.append(record)

    watch = Watch()
    logging.getLogger("app").addHandler(watch)
    try:
        yield
    finally:
        logging.getLogger("app").removeHandler(watch)
    assert not seen, "\n".join(map(logging.Formatter().format, seen))


def _is_blocking(exc_info: object) -> bool:
    return isinstance(exc_info, tuple) and isinstance(exc_info[1], BlockingError)
