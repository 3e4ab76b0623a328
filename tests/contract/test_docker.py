"""Containers keep the contract, on the machine's own engine.

What is true is read from that engine's API, from /proc and from files, not from the launcher.
"""

import asyncio
import io
import os
import secrets
import tarfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import until
from docker_engine import IMAGE, Api, Gate, PrivateEngine
from launcher_contract import HELLO, RUNS_ON, Harness, Impossible, LauncherContract, Script, exits, new_id

from app.errors import LauncherUnavailable, LaunchRejected
from app.launcher import Exit, Exited, Gone, Handle, LaunchSpec, Starting
from app.launchers.container import (
    INSTALLATION,
    MAX_STRING_BYTES,
    MAX_STRINGS_BYTES,
    NAME,
    RUNNER_ID,
    Engine,
    container_config,
)
from app.launchers.docker import DockerLauncher
from app.reason import Reason

WITNESS = 'echo "$RUNNER_ID" >>/workspace/witness\n'
"""What every script does first: bear witness that it was started."""

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
OWNER = 1234


class DockerHarness:
    """Reaches into the engine by its own API, and into the slot."""

    def __init__(self, tmp_path: Path, engine: Api, gate: Gate) -> None:
        self.engine = engine
        self.gate = gate
        self.installation = f"test-{secrets.token_hex(6)}"
        self.labels = {INSTALLATION: self.installation}
        self.slot = tmp_path / "slot"
        self.slot.mkdir()
        self.witness = self.slot / "witness"
        self.witness.touch()
        if os.geteuid() == 0:
            os.chown(self.slot, OWNER, OWNER)
        self.witness.chmod(0o666)
        self.plain = self.slot / "plain"
        self.plain.write_text("exit 0")

    def spec(self, script: Script) -> LaunchSpec:
        return LaunchSpec(
            command=("sh", "-c", WITNESS + script.sh),
            environment={"PATH": PATH},
            context=b"{}",
            working_dir=str(self.slot),
            options={"image": IMAGE, "pull_policy": "never"},
        )

    async def reopen(self) -> DockerLauncher:
        return DockerLauncher(self.gate.host, self.installation)

    def impossible(self) -> Sequence[Impossible]:
        works = self.spec(exits(0))

        def but(**options: Any) -> LaunchSpec:  # noqa: ANN401 - as pools have them
            return replace(works, options={**works.options, **options})

        big = replace(works, environment={**works.environment, "BIG": "x" * MAX_STRING_BYTES})
        return [
            Impossible("no such command", replace(works, command=("no-such-command",)), 127),
            Impossible("no such file", replace(works, command=("/no/such/file",)), 127),
            Impossible("not executable", replace(works, command=("/workspace/plain",)), 126),
            Impossible("a directory", replace(works, command=("/workspace",)), 126),
            Impossible("no such image", but(image="no-such-image:0"), "rejected"),
            Impossible("not an image", but(image="Not An Image"), "rejected"),
            Impossible("no such network", but(network="no-such-network"), "rejected"),
            Impossible("no such runtime", but(runtime="no-such-runtime"), "rejected"),
            Impossible("no such user", but(user="nobody-of-that-name"), "rejected"),
            Impossible("no such capability", but(cap_add=["NO_SUCH_CAPABILITY"]), "rejected"),
            Impossible("no such GPU", but(gpus="all"), "rejected"),
            Impossible("no such directory", replace(works, working_dir="/no/such/directory"), "rejected"),
            Impossible("no such volume", but(volumes={secrets.token_hex(8): "/data"}), "rejected"),
            Impossible("no such host directory", but(volumes={"/no/such/directory": "/data"}), "rejected"),
            Impossible("too large", big, "rejected"),
        ]

    async def kill_behind_back(self, handle: Handle) -> None:
        self._ask(handle, "kill", method="POST", params={"signal": "KILL"})

    async def delete_behind_back(self, handle: Handle) -> None:
        self.engine.remove(NAME + handle.runner_id)

    @asynccontextmanager
    async def unavailable(self) -> AsyncIterator[None]:
        await self.gate.shut()
        yield
        await self.gate.open()

    @asynccontextmanager
    async def foreign(self) -> AsyncIterator[str]:
        """Run two of another installation: one by our rules, and one without them that has a name like ours."""
        name = new_id()
        labels = {INSTALLATION: f"not-{self.installation}", RUNNER_ID: name}
        pairs = ((name, labels), (new_id(), {RUNNER_ID: name}))
        theirs = [self.create(NAME + other, "sleep", "600", Labels=labels) for other, labels in pairs]
        try:
            for container in theirs:
                self.engine.ask(f"/containers/{container}/start", method="POST")
            yield name
            for container in theirs:
                assert self.engine.ask(f"/containers/{container}/json")["State"]["Running"]
        finally:
            for container in theirs:
                self.engine.remove(container)

    async def exists(self, handle: Handle) -> bool:
        return self._ask(handle, "json", passes=(404,)) is not None

    async def copies(self, handle: Handle) -> int:
        return self.witness.read_text().split().count(handle.runner_id)

    async def processes(self, handle: Handle) -> int | None:
        """Count those that bear the runner's id, whatever the engine says; its init is the engine's own."""
        mark, found = f"RUNNER_ID={handle.runner_id}".encode(), 0
        for proc in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if mark in (proc / "environ").read_bytes().split(b"\0"):
                    found += not (proc / "cmdline").read_bytes().startswith(b"/sbin/docker-init\0")
        return found

    async def leaked(self) -> Sequence[str]:
        return [container["Names"][0] for container in self.engine.containers(f"{INSTALLATION}={self.installation}")]

    def clean(self) -> None:
        """End what a failed check has left, so that it is not there for ever."""
        for container in self.engine.containers(f"{INSTALLATION}={self.installation}"):
            self.engine.remove(container["Id"])

    @contextmanager
    def image(self, *changes: str) -> Iterator[str]:
        """Make an image of the usual one, with these lines of a Dockerfile."""
        name = f"{self.installation}:latest"
        container = self.create(self.installation, Labels=self.labels)
        try:
            made = {"container": container, "repo": self.installation, "tag": "latest", "changes": "\n".join(changes)}
            self.engine.ask("/commit", method="POST", params=made)
            yield name
        finally:
            self.engine.remove(container)
            self.engine.ask(f"/images/{name}", method="DELETE", params={"force": "1"}, passes=(404,))

    def create(self, name: str, *command: str, **more: Any) -> str:  # noqa: ANN401 - JSON
        """Create a container behind the launcher's back."""
        config = {"Image": IMAGE, "Cmd": command or ("true",), "HostConfig": {"Init": True}, **more}
        return str(self.engine.ask("/containers/create", method="POST", params={"name": name}, json=config)["Id"])

    def inspect(self, handle: Handle) -> Any:  # noqa: ANN401 - JSON
        return self._ask(handle, "json")

    def _ask(self, handle: Handle, what: str, **request: Any) -> Any:  # noqa: ANN401 - JSON
        return self.engine.ask(f"/containers/{NAME}{handle.runner_id}/{what}", **request)


class TestDocker(LauncherContract):
    deviations = {  # noqa: RUF012 - declared once, as in the contract
        "test_death_by_sigterm_is_told_apart_from_exit_143": "the engine tells a code alone, and 128 more for a signal",
    }
    patience = 60
    world: DockerHarness

    @pytest.fixture
    async def harness(self, tmp_path: Path, docker_engine: Api, gate: Gate) -> AsyncIterator[Harness]:
        harness = DockerHarness(tmp_path, docker_engine, gate)
        yield harness
        harness.clean()

    async def log(self, script: str, **changes: Any) -> list[str]:  # noqa: ANN401 - as LaunchSpec has them
        """Run a script to its end, which must be a good one, and read what it said."""
        runner_id = new_id()
        spec = self.spec(Script(script, ()), runner_id)
        options = {**spec.options, **changes.pop("options", {})}
        handle = await self.launcher.launch(runner_id, replace(spec, **changes, options=options))
        lines = [line.decode() for line in await self.follow(handle)]
        assert (await self.end(handle)).code == 0, lines
        return lines

    async def test_a_runner_is_the_slots_owner_and_has_no_powers(self) -> None:
        look = "id -u; id -g; grep -E 'Cap(Prm|Eff|Bnd)|NoNewPrivs' /proc/self/status; pwd; touch mine; "
        uid, gid, *powers, place, mode = await self.log(look + 'stat -c "%a %u" "$TASK_CONTEXT_FILE"')
        slot = self.world.slot.stat()
        assert (int(uid), int(gid), place, mode) == (slot.st_uid, slot.st_gid, "/workspace", "444 0")
        assert [line.split()[1].strip("0") for line in powers] == ["", "", "", "1"]
        assert (self.world.slot / "mine").stat().st_uid == slot.st_uid

    async def test_a_runner_is_the_user_that_it_is_told_to_be(self) -> None:
        with self.world.image("USER 4321:8765") as image:
            assert await self.log("id -u; id -g", options={"image": image, "user": "image"}) == ["4321", "8765"]
            owner = str(self.world.slot.stat().st_uid)
            assert await self.log("id -u", options={"image": image}) == [owner]
            assert await self.log("id -u; id -g", options={"image": image, "user": "77:88"}) == ["77", "88"]
            assert await self.log("id -u", working_dir=None, options={"image": image}, command=("id", "-u")) == ["4321"]
            await self._remove_all()

    async def test_what_an_image_calls_a_volume_goes_with_the_runner(self) -> None:
        with self.world.image("VOLUME /data") as image:
            runner_id = new_id()
            spec = self.spec(RUNS_ON, runner_id)
            handle = await self.launcher.launch(runner_id, replace(spec, options={**spec.options, "image": image}))
            [volume] = [mount["Name"] for mount in self.world.inspect(handle)["Mounts"] if mount["Type"] == "volume"]
            assert self.world.engine.ask(f"/volumes/{volume}")
            await self.launcher.remove(handle)
            assert self.world.engine.ask(f"/volumes/{volume}", passes=(404,)) is None

    async def _remove_all(self) -> None:
        for found in await self.launcher.list():
            await self.launcher.remove(found.handle)

    async def test_the_kernel_takes_what_passes_the_check_and_no_byte_more(self) -> None:
        room = MAX_STRING_BYTES - 1 - len("BIG=")
        runner_id = new_id()
        spec = self.spec(Script('echo "${#BIG}"', ()), runner_id, BIG="x" * room)
        handle = await self.launcher.launch(runner_id, spec)
        assert await self.follow(handle) == [b"%d" % room]
        more = self.world.create(
            f"{self.world.installation}-more", "true", Labels=self.world.labels, Env=["BIG=x" + "x" * room]
        )
        self.world.engine.ask(f"/containers/{more}/start", method="POST")
        assert self.world.engine.ask(f"/containers/{more}/wait", method="POST")["StatusCode"] != 0
        self.world.engine.remove(more)

    @pytest.mark.filterwarnings("ignore:Sending a large body")
    async def test_the_kernel_takes_as_much_in_all_as_passes_the_check(self) -> None:
        count = (MAX_STRINGS_BYTES - 1000) // (100_000 + len("_100=") + 1)
        environment = {f"_{100 + number}": "x" * 100_000 for number in range(count)}
        assert await self.log("echo started", environment=environment) == ["started"]

    async def test_a_name_that_somebody_else_has_is_theirs(self) -> None:
        runner_id = new_id()
        theirs = self.world.create(NAME + runner_id, "sleep", "600")
        try:
            with pytest.raises(LaunchRejected, match="not ours"):
                await self.launcher.launch(runner_id, self.spec(HELLO, runner_id))
            handle = Handle(runner_id=runner_id)
            assert await self.see(handle) == Gone()
            await self.launcher.stop(handle, 10)
            await self.launcher.stop(handle, 0)
            await self.launcher.remove(handle)
            assert self.world.inspect(handle)["State"]["Status"] == "created"
            self.world.engine.ask(f"/containers/{theirs}/start", method="POST")
            await self.launcher.stop(handle, 10)
            await self.launcher.stop(handle, 0)
            await asyncio.sleep(self.settle)
            assert self.world.inspect(handle)["State"]["Running"]
        finally:
            self.world.engine.remove(theirs)

    async def test_a_container_created_and_never_started_is_started_once(self) -> None:
        """A service was killed in between; one after another, two others find what it left."""
        runner_id = new_id()
        handle, spec = Handle(runner_id=runner_id), self.spec(HELLO, runner_id)
        sent = container_config(runner_id, spec, installation=self.world.installation, owner=None, engine=Engine())
        name = {"name": NAME + runner_id}
        self.world.engine.ask("/containers/create", method="POST", params=name, json={**sent, "User": "0:0"})
        assert await self.see(handle) == Starting()
        assert await self.listed() == [runner_id]
        async with aclosing(await self.world.reopen()) as other:
            first, second = await self.launcher.launch(runner_id, spec), await other.launch(runner_id, spec)
        assert first == second
        assert (await self.end(first)).code == 0
        assert await self.read(first) == [b"hello"]
        assert await self.world.copies(first) == 1

    @pytest.mark.parametrize("path", ["/sbin/docker-init", "/usr/sbin/docker-init"])
    async def test_a_container_that_was_begun_and_is_said_not_to_be_is_not_started(self, path: str) -> None:
        """As an engine says that is killed while it starts one: the init process lies in the container by then."""
        runner_id = new_id()
        handle, spec = Handle(runner_id=runner_id), self.spec(HELLO, runner_id)
        sent = container_config(runner_id, spec, installation=self.world.installation, owner=None, engine=Engine())
        name = NAME + runner_id
        self.world.engine.ask("/containers/create", method="POST", params={"name": name}, json={**sent, "User": "0:0"})
        with tarfile.open(fileobj=(archive := io.BytesIO()), mode="w") as file:
            file.addfile(tarfile.TarInfo(path.lstrip("/")))
        put = f"/containers/{name}/archive?path=/"
        self.world.engine.ask(put, method="PUT", content=archive.getvalue())
        with pytest.raises(LauncherUnavailable, match="it is not started again"):
            await self.launcher.launch(runner_id, spec)
        assert self.world.inspect(handle)["State"]["Status"] == "created"
        await self.launcher.remove(handle)

    async def test_a_command_that_cannot_be_run_says_so(self) -> None:
        runner_id = new_id()
        spec = replace(self.spec(HELLO, runner_id), command=("no-such-command",))
        end = await self.end(await self.launcher.launch(runner_id, spec))
        assert (end.code, end.reason) == (127, Reason.CONFIG_ERROR)
        assert end.message
        assert "no-such-command" in end.message


@pytest.mark.parametrize("scheme", ["tcp", "https"])
async def test_an_engine_on_a_port_is_reached_by_tls_alone(
    scheme: str, private_engine: PrivateEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner_id = new_id()
    spec = LaunchSpec(
        command=("cat", "/task-context/context.json"), environment={}, context=b"told", options={"image": IMAGE}
    )
    host = private_engine.tcp_host.replace("tcp:", f"{scheme}:")
    monkeypatch.setenv("DOCKER_CERT_PATH", str(private_engine.certificates))
    if scheme == "tcp":
        monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
    async with aclosing(DockerLauncher(host, "installation-1")) as launcher:
        await launcher.ping()
        handle = await launcher.launch(runner_id, spec)
        assert [line.text async for line in launcher.logs(handle, follow=True)] == [b"told"]
        await launcher.remove(handle)
    monkeypatch.delenv("DOCKER_TLS_VERIFY", raising=False)
    async with aclosing(DockerLauncher(private_engine.tcp_host, "installation-1")) as stranger:
        with pytest.raises(LauncherUnavailable):
            await stranger.ping()
    monkeypatch.setenv("DOCKER_CERT_PATH", str(private_engine.certificates / "nothing"))
    with pytest.raises(LaunchRejected, match="certificates"):
        DockerLauncher(host.replace("tcp:", "https:"), "installation-1")


async def test_whether_a_stop_came_first_on_another_machine_is_told_by_that_machines_clock(
    private_engine: PrivateEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_CERT_PATH", str(private_engine.certificates))
    monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
    async with aclosing(DockerLauncher(private_engine.tcp_host, "installation-1")) as launcher:
        for script, came_first in (("trap 'exit 3' TERM; echo ready; sleep 60 & wait", True), ("echo ready; exit 3", False)):
            runner_id = new_id()
            command = ("sh", "-c", script)
            handle = await launcher.launch(
                runner_id, LaunchSpec(command=command, environment={}, context=b"{}", options={"image": IMAGE})
            )
            lines = launcher.logs(handle, follow=True)
            assert (await anext(lines)).text == b"ready"
            if not came_first:
                assert [line async for line in lines] == []  # it has ended
            await launcher.stop(handle, 10)

            async def seen(handle: Handle = handle) -> Exit | None:
                observation = (await launcher.observe([handle]))[handle.runner_id]
                return observation.exit if isinstance(observation, Exited) else None

            end = await until(seen)
            assert end
            assert (end.code, end.stopped) == (3, came_first)
            await launcher.remove(handle)
