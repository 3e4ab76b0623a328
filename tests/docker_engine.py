"""Real Docker Engines: the machine's own, to be used with care, and a private one that a test may hurt.

The private engine is a ``dockerd`` with its containerd, files, control group and network namespace of its own, so that
nothing done to it reaches the machine's: an engine without the default bridge deletes the one it finds. It needs root.
"""

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from engines import missing

IMAGE = "busybox:latest"
HOST = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
SECONDS = 60.0

_CGROUPS = Path("/sys/fs/cgroup")
_SECRET = 0o600
_RUN = """
import os, sys
if sys.argv[1] != "-":
    os.dup2(int(sys.argv[1]), 3)
    os.closerange(4, 64)
    os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execvp(sys.argv[2], sys.argv[2:])
"""
"""Starts a program with a listening socket of ours as its third file, as systemd does."""


class Api:
    """Docker's HTTP API over a unix socket, for those who look behind the launcher's back. Blocks."""

    def __init__(self, path: Path) -> None:
        self.socket = path
        self._client = httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://docker", timeout=SECONDS)

    def ask(self, path: str, *, method: str = "GET", passes: tuple[int, ...] = (), **request: Any) -> Any:  # noqa: ANN401
        """Give the answer's JSON; None for an empty one, and for those statuses that pass."""
        answer = self._client.request(method, path, **request)
        if answer.status_code in passes:
            return None
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json() if "json" in answer.headers.get("content-type", "") and answer.content else None

    def answers(self) -> bool:
        """Say whether an engine is there."""
        with contextlib.suppress(OSError, httpx.TransportError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(self.socket))  # httpx leaves a socket open that was refused
            return self._client.get("/version").is_success
        return False

    def image(self, name: str = IMAGE) -> bytes:
        """Save an image."""
        answer = self._client.get(f"/images/{name}/get")
        assert answer.is_success, answer.text
        return answer.content

    def has_image(self, name: str) -> bool:
        """Say whether the engine has an image."""
        return self._client.get(f"/images/{name}/json").is_success

    def load(self, image: bytes) -> None:
        """Load a saved image."""
        self.ask("/images/load", method="POST", content=image, headers={"Content-Type": "application/x-tar"})

    def containers(self, *labels: str) -> list[dict[str, Any]]:
        """List the containers that bear all these labels, ended ones too."""
        filters = httpx.QueryParams({"all": "1", "filters": f'{{"label": [{", ".join(_quoted(labels))}]}}'})
        listed: list[dict[str, Any]] = self.ask("/containers/json", params=filters)
        return listed

    def remove(self, container: str) -> None:
        """Remove a container, alive or not, there or not."""
        self.ask(f"/containers/{container}", method="DELETE", params={"force": "1", "v": "1"}, passes=(404, 409))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


def _quoted(labels: tuple[str, ...]) -> list[str]:
    return [f'"{label}"' for label in labels]


class Gate:
    """A unix socket in front of an engine's, which can be shut without touching the engine: streams break, too."""

    def __init__(self, behind: Path) -> None:
        self._behind = behind
        self._directory = Path(tempfile.mkdtemp(prefix="gate-"))
        self.socket = self._directory / "docker.sock"
        self.host = f"unix://{self.socket}"
        self._server: asyncio.Server | None = None
        self._passing: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Let everybody in."""
        self._server = await asyncio.start_unix_server(self._enter, self.socket)

    async def shut(self) -> None:
        """Let nobody in, and throw everybody out."""
        if self._server:
            self._server.close()
            self.socket.unlink(missing_ok=True)
            self._server = None
        await self.cut()

    async def cut(self) -> None:
        """Break every connection there is; new ones are let in."""
        passing = list(self._passing)
        for task in passing:
            task.cancel()
        await asyncio.gather(*passing, return_exceptions=True)

    async def close(self) -> None:
        """Shut it for good."""
        await self.shut()
        shutil.rmtree(self._directory)

    async def _enter(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._pass(reader, writer))
        self._passing.add(task)
        task.add_done_callback(self._passing.discard)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry bytes both ways until one side has no more."""
        try:
            with contextlib.suppress(OSError):
                engine_reader, engine_writer = await asyncio.open_unix_connection(self._behind)
                try:
                    ways = [_carry(reader, engine_writer), _carry(engine_reader, writer)]
                    tasks = [asyncio.ensure_future(way) for way in ways]
                    try:
                        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        for task in tasks:
                            task.cancel()
                        await asyncio.gather(*tasks, return_exceptions=True)
                finally:
                    engine_writer.transport.abort()
        finally:
            # What has been carried is still sent; only whoever is thrown out loses it.
            writer.close()


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()


class PrivateEngine:
    """An engine of a test's own, all of it in one directory. Its methods block; ``asyncio.to_thread`` runs them aside.

    With ``tcp`` it also listens on a port of 127.0.0.1, by TLS with the files in ``certificates`` (as DOCKER_CERT_PATH).
    ``options`` are further ones of dockerd, such as ``--live-restore``.
    """

    def __init__(self, *options: str, tcp: bool = False) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="engine-"))
        self.directory.chmod(0o711)  # a container's user passes through
        self.socket = self.directory / "docker.sock"
        self.host = f"unix://{self.socket}"
        self.certificates = self.directory / "certificates"
        self.tcp_host = ""
        self._group = f"engine-{secrets.token_hex(4)}"
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0
        if tcp:
            _make_certificates(self.certificates)
            with _listen(0) as probe:
                self._port = probe.getsockname()[1]
            self.tcp_host = f"tcp://127.0.0.1:{self._port}"

    @contextlib.contextmanager
    def api(self) -> Iterator[Api]:
        """Open the engine's API, by its unix socket."""
        api = Api(self.socket)
        try:
            yield api
        finally:
            api.close()

    @property
    def pid(self) -> int:
        """Tell dockerd's process."""
        assert self._process
        return self._process.pid

    @property
    def running(self) -> bool:
        """Say whether dockerd lives."""
        return bool(self._process and self._process.poll() is None)

    def start(self) -> None:
        """Start it, and wait until it answers. Nothing if it runs."""
        if self.running:
            return
        for name in ("docker.pid", "exec/containerd/containerd.pid"):
            (self.directory / name).unlink(missing_ok=True)  # of one that was killed; to it a zombie is alive
        (self.directory / "daemon.json").write_text("{}")
        command = [
            *("dockerd", "--host", self.host, "--config-file", str(self.directory / "daemon.json")),
            *("--data-root", str(self.directory / "data"), "--exec-root", str(self.directory / "exec")),
            *("--pidfile", str(self.directory / "docker.pid"), "--cgroup-parent", f"/{self._group}"),
            *("--exec-opt", "native.cgroupdriver=cgroupfs", "--bridge", "none", "--iptables=false", "--ip-forward=false"),
            *self._options,
        ]
        if not self._port:
            self._spawn(command, "-")
        else:
            names = ("ca", "server-cert", "server-key")
            ca, certificate, key = (str(self.certificates / f"{name}.pem") for name in names)
            command += ["--host", "fd://", "--tlsverify", "--tlscacert", ca, "--tlscert", certificate, "--tlskey", key]
            with _listen(self._port) as listener:
                self._spawn(command, str(listener.fileno()), listener.fileno())
        deadline = time.monotonic() + SECONDS
        while not self._answers():
            assert self.running, self.log()
            assert time.monotonic() < deadline, f"dockerd does not answer: {self.log()}"
            time.sleep(0.05)

    def _spawn(self, command: list[str], listener: str, *files: int) -> None:
        run = ["unshare", "--net", sys.executable, "-I", "-S", "-c", _RUN, listener, *command]
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                run, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=files, start_new_session=True
            )

    def _answers(self) -> bool:
        with self.api() as api:
            return api.answers()

    def log(self) -> str:
        """What dockerd has said of late."""
        return "\n".join((self.directory / "log").read_text(errors="replace").splitlines()[-30:])

    def stop(self) -> None:
        """End dockerd as an operator does; it ends its containers first, unless it has ``--live-restore``."""
        if self._process and self.running:
            self._process.terminate()
            self._process.wait(SECONDS)

    def kill(self, *, power: bool = False) -> None:
        """Kill dockerd, and with it its containerd; containers go on. With ``power``, as by a power cut, they die too."""
        if self._process:
            self._process.kill()
            self._process.wait()
        self._kill_rest("" if power else "containerd")

    def freeze(self) -> None:
        """Let dockerd hang: connections are accepted, and nothing is answered. Its containers go on."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen dockerd go on."""
        if self.running:
            os.kill(self.pid, signal.SIGCONT)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Freeze it meanwhile."""
        self.freeze()
        try:
            yield
        finally:
            self.thaw()

    def close(self) -> None:
        """End it all and leave nothing: no process, mount, control group or file."""
        self.kill()
        sockets = [path.read_text().removeprefix("unix://") for path in self.directory.glob("exec/containerd/**/address")]
        self._kill_rest()
        for path in sockets:
            Path(path).unlink(missing_ok=True)
        for point in self.mounts():
            subprocess.run(["umount", "--lazy", point], check=True)
        for group in self.groups():
            with contextlib.suppress(FileNotFoundError):
                group.rmdir()
        shutil.rmtree(self.directory)

    def _kill_rest(self, name: str = "") -> None:
        deadline = time.monotonic() + SECONDS
        while pids := self.processes(name):
            assert time.monotonic() < deadline, f"these do not die: {pids}"
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def processes(self, name: str = "") -> list[int]:
        """Every live process of this engine: its own by their arguments, its containers' by their control group.

        With a name, those alone that bear it.
        """
        found = []
        for proc in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                ours = str(self.directory).encode() in (proc / "cmdline").read_bytes()
                ours = ours or f"/{self._group}/" in (proc / "cgroup").read_text()
                called, _, stat = (proc / "stat").read_text(errors="replace").partition("(")[2].rpartition(") ")
                if ours and name in ("", called) and stat[0] not in "ZX":
                    found.append(int(proc.name))
        return found

    def mounts(self) -> list[str]:
        """Every mount point under its directory, the last one first."""
        points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        return [point for point in reversed(points) if Path(point).is_relative_to(self.directory)]

    def groups(self) -> list[Path]:
        """Every control group of its containers, the innermost first."""
        tops = [path for path in (_CGROUPS / self._group, *_CGROUPS.glob(f"*/{self._group}")) if path.is_dir()]
        return [Path(path) for top in tops for path, _, _ in os.walk(top, topdown=False)]


@contextlib.contextmanager
def _listen(port: int) -> Iterator[socket.socket]:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(128)
        yield listener


def _make_certificates(directory: Path) -> None:
    """Make an authority, the engine's certificate and a client's (ca.pem, cert.pem, key.pem)."""
    directory.mkdir()
    for name, words in (
        ("ca", "basicConstraints=critical,CA:TRUE"),
        ("server", "subjectAltName=IP:127.0.0.1"),
        ("client", ""),
    ):
        key = directory / ("key.pem" if name == "client" else f"{name}-key.pem")
        certificate = directory / {"ca": "ca.pem", "server": "server-cert.pem", "client": "cert.pem"}[name]
        command = [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-days", "2"),
            *("-subj", f"/CN={name}", "-keyout", str(key), "-out", str(certificate)),
        ]
        if name != "ca":
            usage = {"server": "serverAuth", "client": "clientAuth"}[name]
            command += ["-CA", str(directory / "ca.pem"), "-CAkey", str(directory / "ca-key.pem")]
            command += ["-addext", f"extendedKeyUsage={usage}", "-addext", "basicConstraints=critical,CA:FALSE"]
        if words and name != "ca":
            command += ["-addext", words]
        subprocess.run(command, check=True, capture_output=True)
        key.chmod(_SECRET)


# Fixtures.


@pytest.fixture(scope="session")
def docker_engine() -> Iterator[Api]:
    """The machine's own engine, with the image that runners are made of. Others use it too."""
    if not HOST.startswith("unix://"):
        missing("docker", f"these tests need a Docker engine on a unix socket of this machine, not {HOST}")
    api = Api(Path(HOST.removeprefix("unix://")))
    try:
        if not api.answers():
            missing("docker", f"no Docker engine answers at {HOST}")
        if not api.has_image(IMAGE):
            missing("docker", f"the Docker engine at {HOST} has no image {IMAGE}; docker pull {IMAGE} gets it")
        yield api
    finally:
        api.close()


@pytest.fixture(scope="session")
def private_engines(docker_engine: Api) -> Iterator["PrivateEngines"]:
    """Makes private engines, with the image that runners are made of."""
    lacking = [name for name in ("dockerd", "containerd", "runc", "unshare", "openssl") if not shutil.which(name)]
    if lacking or os.geteuid():
        missing("docker", f"a private Docker engine needs root and {', '.join(lacking) or 'nothing else that is not here'}")
    engines = PrivateEngines(docker_engine.image())
    yield engines
    engines.close()


class PrivateEngines:
    """Makes private engines and ends them all."""

    def __init__(self, image: bytes) -> None:
        self._image = image
        self._made: list[PrivateEngine] = []

    def make(self, *options: str, tcp: bool = False) -> PrivateEngine:
        """Start one more."""
        engine = PrivateEngine(*options, tcp=tcp)
        self._made.append(engine)
        engine.start()
        with engine.api() as api:
            api.load(self._image)
        return engine

    def close(self) -> None:
        """End them all."""
        while self._made:
            self._made.pop().close()


@pytest.fixture(scope="session")
def _private_engine(private_engines: PrivateEngines) -> PrivateEngine:
    return private_engines.make(tcp=True)


@pytest.fixture
def private_engine(_private_engine: PrivateEngine) -> Iterator[PrivateEngine]:
    """A private engine, also at ``tcp_host``: it runs when the test begins, and holds no containers."""
    yield _private_engine
    _private_engine.thaw()
    _private_engine.start()
    with _private_engine.api() as api:
        for container in api.containers():
            api.remove(container["Id"])


@pytest.fixture
async def gate(docker_engine: Api) -> AsyncIterator[Gate]:
    """A way to the machine's engine that a test may shut."""
    gate = Gate(docker_engine.socket)
    await gate.open()
    yield gate
    await gate.close()
