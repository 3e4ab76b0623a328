"""Local processes keep the contract. What is true is read from /proc and from files, not from the launcher."""

import asyncio
import os
import resource
import shutil
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from launcher_contract import RUNS_ON, CannotArrangeError, Harness, Impossible, LauncherContract, Script, exits, new_id

from app.errors import LauncherUnavailable
from app.launcher import Exited, Handle, LaunchSpec, Running
from app.launchers.local_process import LocalProcessLauncher

WITNESS = 'echo "$RUNNER_ID" >>"$WITNESS"; export TREE="$RUNNER_ID"\n'
"""What every script does first: bear witness that it was started, and mark its children."""


def processes() -> Iterator[tuple[int, bytes]]:
    """Every live process but us, with all that tells where it belongs: environment, arguments, directory, open files."""
    for proc in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state = (proc / "stat").read_text(errors="replace").rpartition(") ")[2][0]
            files = [bytes(file.readlink()) for file in ((proc / "cwd"), *(proc / "fd").iterdir())]
            about = [(proc / "environ").read_bytes(), (proc / "cmdline").read_bytes(), *files]
            if state not in "ZX" and int(proc.name) != os.getpid():
                yield int(proc.name), b"\0".join((b"", *about, b""))


def control_groups(runner_ids: set[str]) -> list[str]:
    return [f"{path}/{name}" for path, names, _ in os.walk("/sys/fs/cgroup") for name in names if name in runner_ids]


def kill(pids: Sequence[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class LocalHarness:
    """Reaches into run directories and /proc."""

    def __init__(self, tmp_path: Path) -> None:
        self.runs = tmp_path / "runs"
        self.slot = tmp_path / "slot"
        self.slot.mkdir()
        self.witness = tmp_path / "witness"
        self.witness.touch()

    def spec(self, script: Script) -> LaunchSpec:
        environment = {"PATH": os.environ["PATH"], "WITNESS": str(self.witness)}
        command = ("/bin/sh", "-c", WITNESS + script.sh)
        return LaunchSpec(command=command, environment=environment, context=b"{}", working_dir=str(self.slot))

    async def reopen(self) -> LocalProcessLauncher:
        return await asyncio.to_thread(LocalProcessLauncher, self.runs)

    def impossible(self) -> Sequence[Impossible]:
        works, plain = self.spec(exits(0)), self.slot / "plain"
        plain.write_text("exit 0")
        return [
            Impossible("no such command", replace(works, command=("no-such-command",)), "rejected"),
            Impossible("no such file", replace(works, command=("/no/such/file",)), "rejected"),
            Impossible("not executable", replace(works, command=(str(plain),)), "rejected"),
            Impossible("no command", replace(works, command=None), "rejected"),
            Impossible("no such directory", replace(works, working_dir="/no/such/directory"), "rejected"),
            Impossible("too large", replace(works, environment={**works.environment, "BIG": "x" * 200_000}), "rejected"),
        ]

    async def kill_behind_back(self, handle: Handle) -> None:
        os.kill(self._main(handle), signal.SIGKILL)

    async def delete_behind_back(self, handle: Handle) -> None:
        run = self.runs / handle.runner_id
        kill([pid for pid, about in processes() if bytes(run) in about])  # its shim, and the runner by its context's name
        kill(self._tree(handle))
        shutil.rmtree(run)

    def unavailable(self) -> AbstractAsyncContextManager[None]:
        raise CannotArrangeError("the kernel always answers")

    @asynccontextmanager
    async def foreign(self) -> AsyncIterator[str]:
        names = ["lost+found", "README", "runner-notes"]
        for name in names:
            (self.runs / name).mkdir()
        yield names[-1]
        for name in names:
            (self.runs / name).rmdir()

    async def exists(self, handle: Handle) -> bool:
        return (self.runs / handle.runner_id).exists() or bool(control_groups({handle.runner_id}))

    async def copies(self, handle: Handle) -> int:
        return self.witness.read_text().split().count(handle.runner_id)

    async def processes(self, handle: Handle) -> int | None:
        return len(self._tree(handle))

    async def leaked(self) -> Sequence[str]:
        return self._leaked()

    def _leaked(self) -> Sequence[str]:
        ours = [fd.resolve() for fd in Path("/proc/self/fd").iterdir()]
        return [
            *(path.name for path in self.runs.glob("*")),
            *control_groups(set(self.witness.read_text().split())),
            *(f"process {pid}" for pid, about in processes() if bytes(self.runs) in about),
            *(f"open file {path}" for path in ours if path.is_relative_to(self.runs)),
        ]

    def clean(self) -> None:
        """End what a failed check has left, so that it is not there for ever."""
        while left := [pid for pid, about in processes() if bytes(self.witness) in about]:
            kill(left)
        for group in control_groups(set(self.witness.read_text().split())):
            with suppress(OSError):
                Path(group).rmdir()

    def _main(self, handle: Handle) -> int:
        return int((self.runs / handle.runner_id / "pid").read_text().split()[0])

    def _tree(self, handle: Handle) -> list[int]:
        mark = f"\0TREE={handle.runner_id}\0".encode()
        with suppress(OSError):
            main = self._main(handle)
            return [pid for pid, about in processes() if pid == main or mark in about]
        return [pid for pid, about in processes() if mark in about]


@contextmanager
def no_free_descriptors() -> Iterator[None]:
    """Let nothing be opened, as when the limit of open files is reached."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


KERNEL = "the kernel always answers"


class TestLocalProcess(LauncherContract):
    deviations = {  # noqa: RUF012 - declared once, as in the contract
        "test_unavailable_is_neither_gone_nor_an_end": KERNEL,
        "test_a_launch_while_unavailable_can_be_repeated": KERNEL,
        "test_orders_while_unavailable_say_so": KERNEL,
        "test_a_watch_survives_an_engine_that_was_away": KERNEL,
    }

    @pytest.fixture
    def harness(self, tmp_path: Path) -> Iterator[Harness]:
        harness = LocalHarness(tmp_path)
        yield harness
        harness.clean()

    async def test_without_free_descriptors_nothing_is_gone_and_a_launch_can_be_repeated(self) -> None:
        live, dead, runner_id = await self.ready(RUNS_ON), await self.start(exits(7)), new_id()
        end = await self.end(dead)
        async with aclosing(await self.world.reopen()) as other:
            with no_free_descriptors():
                for launcher in (self.launcher, other):
                    for handle, truth in ((live, Running()), (dead, Exited(end))):
                        with suppress(LauncherUnavailable):
                            assert await self.see(handle, launcher) in (None, truth)
                    with pytest.raises(LauncherUnavailable):
                        await launcher.launch(runner_id, self.spec(exits(5), runner_id))
        await self.running(live)
        handle = await self.launcher.launch(runner_id, self.spec(exits(5), runner_id))
        assert (await self.end(handle)).code == 5
        assert await self.world.copies(handle) == 1

    async def test_a_signal_bears_its_name(self) -> None:
        for name in ("USR1", "SEGV", "KILL", "TERM"):
            end = await self.end(await self.start(Script(f"kill -{name} $$; sleep 9", ())))
            assert (end.code, end.signal, end.stopped) == (None, f"SIG{name}", False)

    async def test_a_runner_starts_in_its_directory_with_nothing_open_and_default_signals(self) -> None:
        look = "pwd; readlink /proc/self/fd/0; ls /proc/$$/fd; grep -E 'Sig(Ign|Blk)' /proc/self/status; cat"
        handle = await self.start(Script(look, ()))
        assert (await self.end(handle)).code == 0
        lines = [line.decode() for line in await self.read(handle)]
        assert lines[0] == self.world.spec(exits(0)).working_dir
        assert lines[1:5] == ["/dev/null", "0", "1", "2"]
        masks = [int(line.split()[1], 16) for line in lines[5:]]
        # The C library keeps 32 and 33 to itself, and posix_spawn, by which make starts us, leaves them ignored.
        assert [mask & ~(0b11 << 31) for mask in masks] == [0, 0]
