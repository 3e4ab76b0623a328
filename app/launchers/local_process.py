"""Runners as processes of this machine. The engine is the kernel.

Each runner has a run directory and is owned by a shim (shim.sh, which says what lies in the directory). The shim outlives
the service, so exit status and log are there when a restarted service looks. The service holds one file descriptor per
live runner, the writing end of its shim's fifo: the kernel reports an error on it when the shim ends.

A command that cannot be found or run is rejected before anything starts. One that the kernel refuses later (a script whose
interpreter is missing) exits with code 126 or 127, as in any shell. A runner whose shim is killed is killed too: nobody
could tell how it ended.
"""

import asyncio
import contextlib
import contextvars
import errno
import functools
import logging
import os
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeVar

from pydantic import JsonValue

from app import open_files
from app.errors import LauncherUnavailable, LaunchRejected, RunnerGone
from app.launcher import Exited, Found, Gone, Handle, LaunchSpec, LogLine, Observation, Running, Starting
from app.launchers import cgroup
from app.launchers.run_directory import Entered, Look, RunDirectory, command_of
from app.logs import LogFile
from app.reason import Reason
from app.slots import look_at

logger = logging.getLogger(__name__)

SHIM = Path(__file__).with_name("shim.sh")
SHIM_SLACK_SECONDS = 2.0
"""How much later than the service the shim enforces the run deadline: it is there for when the service is not."""

T = TypeVar("T")
TRIM_SECONDS = 1.0
KILL_SECONDS = 5.0
"""How long a killed process may take to be gone."""


@dataclass(frozen=True, slots=True)
class _Start:
    """All that a shim is started with."""

    command: Sequence[str]
    environment: Mapping[str, str]
    directory: int
    log: BinaryIO

    def close(self) -> None:
        self.log.close()


@dataclass(slots=True, eq=False)
class _Run:
    """A runner that this process watches: its shim is alive as long as the fifo has a reader."""

    handle: Handle
    fifo: int
    log: LogFile
    log_max: int
    ended: bool = False
    end: Exited | Gone | None = None
    concluding: asyncio.Lock = field(default_factory=asyncio.Lock)


class LocalProcessLauncher:
    """Starts runners as local processes under ``directory``, which must be on a local file system. Opening it blocks.

    A shim is given ``start_seconds`` to start its runner before anybody is told that it has not yet.
    """

    def __init__(self, directory: Path, start_seconds: float = 10) -> None:
        self._directory = directory
        self._start_seconds = start_seconds
        self._runs: dict[str, _Run] = {}
        self._changed: asyncio.Queue[str | None] = asyncio.Queue()
        self._trimmer: asyncio.Task[None] | None = None
        self._node = socket.gethostname()
        cgroup.probed()  # now, and not by many launches at once
        self._open_files = open_files.raise_limit()  # what runners may have

    async def launch(
        self,
        runner_id: str,
        spec: LaunchSpec,
        *,
        progress: Callable[[str], None] | None = None,  # noqa: ARG002 - it takes milliseconds
    ) -> Handle:
        place = self._place(runner_id)
        with contextlib.ExitStack() as opened:
            start = None
            if entered := await _enter(place, spec):
                opened.callback(entered.close)
                start = await _in_thread(self._prepare, place, spec, entered, undo=_close)
                opened.callback(_close, start)
            try:
                if start:
                    await _start_shim(start, spec.working_dir, self._start_seconds)
                return (await self._launched(place)).handle
            except LauncherUnavailable as error:
                error.acted = True  # there is a run directory, and maybe a shim that lives
                raise

    async def _launched(self, place: RunDirectory) -> _Run:
        run = await self._find(place.runner_id)
        if run is None:
            words = await _in_thread(place.last_words)
            raise LauncherUnavailable(f"the shim of {place.runner_id} did not start: {words}")
        return run

    async def observe(self, handles: Sequence[Handle]) -> Mapping[str, Observation]:
        seen: dict[str, Observation] = {}
        failure = None
        for handle in handles:
            try:
                if observation := await self._see(handle):
                    seen[handle.runner_id] = observation
            except LauncherUnavailable as error:  # its own files cannot be read, maybe: that is nothing to the others
                failure = error
        if failure and not seen:
            raise failure
        return seen

    async def _see(self, handle: Handle) -> Observation | None:
        run = await self._find(handle.runner_id)
        if run is None:
            return Gone()
        if run.ended:
            return await self._conclude(run)
        if run.handle.pid is None:  # it took long to start, and may have by now
            run.handle = await _in_thread(self._place(handle.runner_id).handle)
        return Running() if run.handle.pid else Starting()

    async def watch(self) -> AsyncIterator[str]:
        while (runner_id := await self._changed.get()) is not None:
            yield runner_id
        self._changed.put_nowait(None)  # for other watches

    async def stop(self, handle: Handle, grace: float) -> None:
        run = await self._find(handle.runner_id)
        if run and not run.ended:
            async with run.concluding:  # what is noted of the order may be taken back
                _insist(await _until_gone(functools.partial(self._place(handle.runner_id).order_end, grace)), handle)

    async def logs(
        self, handle: Handle, *, after: str | None = None, since: float | None = None, follow: bool = False
    ) -> AsyncIterator[LogLine]:
        run = await self._find(handle.runner_id)
        if run is None:
            raise RunnerGone(f"no runner {handle.runner_id} on this machine")
        log = LogFile(self._place(handle.runner_id).log)
        try:
            start = max(int(after or 0), await asyncio.to_thread(log.start, None, since))
            async for offset, text in log.lines(start, follow=(lambda: not run.ended) if follow else None):
                yield LogLine(str(offset), text)
        except FileNotFoundError as error:
            raise RunnerGone(f"no runner {handle.runner_id} on this machine") from error

    def log_file(self, handle: Handle) -> Path | None:
        return self._place(handle.runner_id).log

    async def list(self) -> Sequence[Found]:
        return await _in_thread(self._list)

    async def remove(self, handle: Handle) -> None:
        if run := self._runs.pop(handle.runner_id, None):
            run.ended = True
            _unwatch(run)
        _insist(await _until_gone(self._place(handle.runner_id).remove), handle)

    async def ping(self) -> None:
        if not await asyncio.to_thread(os.access, self._directory.parent, os.W_OK):
            raise LauncherUnavailable(f"{self._directory.parent} cannot be written")

    def render(self, runner_id: str, spec: LaunchSpec) -> Mapping[str, JsonValue]:
        context = str(self._place(runner_id).path / "context.json")
        enforced = cgroup.probed().enforcement(spec.cpu, spec.memory_mib)
        return {
            "command": list(command_of(spec)),
            "working_dir": spec.working_dir or "/",
            "environment": {**spec.environment, "TASK_CONTEXT_FILE": context},
            "limits": {"cpu": spec.cpu, "memory_mib": spec.memory_mib},
            "enforced_by": {"cpu": enforced.cpu, "memory_mib": enforced.memory_mib},
            "run_timeout_seconds": spec.run_timeout_seconds,
            "stop_grace_seconds": spec.stop_grace_seconds,
        }

    async def about(self) -> Mapping[str, JsonValue]:
        return await _in_thread(_about)

    async def aclose(self) -> None:
        self._changed.put_nowait(None)
        for run in self._runs.values():
            run.ended = True  # ends followers; the runner itself lives on
            _unwatch(run)
        self._runs.clear()
        if trimmer := self._trimmer:
            self._trimmer = None
            trimmer.cancel()
            await asyncio.gather(trimmer, return_exceptions=True)

    def _place(self, runner_id: str) -> RunDirectory:
        return RunDirectory(self._directory / runner_id)

    def _prepare(self, place: RunDirectory, spec: LaunchSpec, entered: Entered) -> _Start | None:
        """Lay out all that a shim needs: the log, the shim's command and its environment; None if it was started before."""
        prepared = place.prepare(spec, entered.account, cgroup.probed(), self._node)
        if prepared is None:
            return None
        deadline = "-" if spec.run_timeout_seconds is None else f"{spec.run_timeout_seconds + SHIM_SLACK_SECONDS:.3f}"
        grace = f"{spec.stop_grace_seconds:.3f}"
        setsid, sleep = _tool("setsid"), _tool("sleep")
        shim = (setsid, _shell(), str(SHIM), str(place.path), deadline, grace, self._open_files, setsid, sleep)
        command = (*shim, *_with_default_signals(), *prepared.prefix, *(spec.command or ()))
        return _Start(command, prepared.environment, entered.directory, prepared.log)

    async def _find(self, runner_id: str) -> _Run | None:
        """Give a runner that was started by whomever, watched from now on; None if none was."""
        if run := self._runs.get(runner_id):
            return run
        deadline = time.monotonic() + self._start_seconds
        while True:
            look = await _in_thread(self._place(runner_id).look, undo=_close_fifo)
            if look is None or runner_id in self._runs:
                _close_fifo(look)
                return self._runs.get(runner_id)
            if look.handle.pid or look.fifo < 0 or time.monotonic() > deadline:
                break
            _close_fifo(look)  # its shim is just about to start it
            await asyncio.sleep(0.005)
        run = self._runs[runner_id] = _Run(
            look.handle, look.fifo, LogFile(self._place(runner_id).log), look.log_max, ended=look.fifo < 0
        )
        if not run.ended:
            asyncio.get_running_loop().add_reader(run.fifo, self._ended, run)
        if self._trimmer is None:
            self._trimmer = asyncio.create_task(self._trim(), name="trim logs")
        return run

    def _ended(self, run: _Run) -> None:
        run.ended = True
        _unwatch(run)
        self._changed.put_nowait(run.handle.runner_id)

    async def _conclude(self, run: _Run) -> Exited | Gone | None:
        """Say how it ended, once nothing of it lives; None while something still does."""
        async with run.concluding:
            place = self._place(run.handle.runner_id)
            if run.end is None or not await _in_thread(place.path.exists):
                run.end = await _until_gone(functools.partial(place.conclude, run.log_max))
            return run.end

    async def _trim(self) -> None:
        """Keep the log of every live runner under its cap, and note how far it has come."""
        while True:
            await asyncio.sleep(TRIM_SECONDS)
            logs = [(run.log, run.log_max) for run in self._runs.values() if not run.ended]
            await asyncio.to_thread(_trim_all, logs)

    def _list(self) -> Sequence[Found]:
        if not self._directory.is_dir():
            return []
        return [found for path in self._directory.iterdir() if (found := RunDirectory(path).found())]


def _about() -> Mapping[str, JsonValue]:
    """Say what this machine is, and what this service may do on it."""
    machine, enforced = os.uname(), cgroup.probed().enforcement(1, 1)
    return {
        "version": f"{machine.sysname} {machine.release} {machine.machine}",
        "node": machine.nodename,
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        "cpu_limits_by": enforced.cpu,
        "memory_limits_by": enforced.memory_mib,
        "may_run_as_other_users": os.geteuid() == 0 and shutil.which("setpriv") is not None,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
    }


async def _enter(place: RunDirectory, spec: LaunchSpec) -> Entered | None:
    """Look at where a runner is to work; None if it was started there before."""
    try:
        return await look_at(spec.working_dir or "/", lambda: place.enter(spec), undo=_close)
    except OSError as error:
        raise LauncherUnavailable(str(error), acted=False) from error


async def _in_thread(call: Callable[..., T], *arguments: object, undo: Callable[[T], None] | None = None) -> T:
    """Do what blocks in a thread, and wait for its end also when cancelled: it goes on anyway, and may hold what to undo."""
    context = contextvars.copy_context()  # as to_thread has it, which would need a task here
    work = asyncio.get_running_loop().run_in_executor(None, functools.partial(context.run, call, *arguments))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait({work})
        if undo and not work.exception():
            undo(work.result())
        raise
    except OSError as error:  # no files left, no memory, a disk that fails
        raise LauncherUnavailable(str(error), acted=False) from error


async def _until_gone(kill: Callable[[], T]) -> T:
    """Do what kills until it says that nothing lives any more, or KILL_SECONDS are over; gives its last word.

    It waits here and not in a thread, of which there are few: what a failing disk keeps from dying holds up nobody else.
    """
    deadline, pause = time.monotonic() + KILL_SECONDS, 0.002
    while not (gone := await _in_thread(kill)) and time.monotonic() < deadline:
        await asyncio.sleep(pause)
        pause = min(pause * 2, 0.1)
    return gone


def _insist(gone: bool, handle: Handle) -> None:  # noqa: FBT001 - it is all there is to say
    if not gone:
        raise LauncherUnavailable(f"{handle.runner_id} has processes that do not die")


def _close(opened: _Start | Entered | None) -> None:
    if opened:
        opened.close()


def _close_fifo(look: Look | None) -> None:
    if look and look.fifo >= 0:
        os.close(look.fifo)


async def _start_shim(start: _Start, directory: str | None, seconds: float) -> None:
    """Start a shim, and wait until it has started the runner or found that another shim did.

    The command begins with `setsid`, which forks because it is made a group's leader: the shim is nobody's child, needs no
    reaping here, and outlives this process.
    """
    ready, told = os.pipe()
    try:
        try:
            shim = await asyncio.create_subprocess_exec(
                *start.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=told,
                stderr=start.log,
                cwd=f"/proc/self/fd/{start.directory}",
                env=start.environment,
                start_new_session=True,
            )
        finally:
            os.close(told)
        async with asyncio.timeout(seconds):
            await _readable(ready)
        await shim.wait()
    except TimeoutError as error:
        raise LauncherUnavailable(f"the shim said nothing for {seconds:g} s") from error
    except OSError as error:
        raise _start_error(error, directory) from error
    finally:
        os.close(ready)


def _start_error(error: OSError, directory: str | None) -> LauncherUnavailable | LaunchRejected:
    if error.errno == errno.E2BIG:
        return LaunchRejected("the command and its environment are larger than the kernel takes")
    if error.errno in (errno.ENOENT, errno.EACCES, errno.ENOTDIR):
        return LaunchRejected(f"cannot start in {directory}: {error.strerror}")
    return LauncherUnavailable(f"cannot start a process: {error}")


def _unwatch(run: _Run) -> None:
    if run.fifo >= 0:
        asyncio.get_running_loop().remove_reader(run.fifo)
        os.close(run.fifo)
        run.fifo = -1


def _trim_all(logs: Sequence[tuple[LogFile, int]]) -> None:
    for log, limit in logs:
        try:
            if log.note():
                log.trim(limit)
        except FileNotFoundError:
            pass  # it was just removed
        except OSError as error:
            logger.warning("%s cannot be kept under its cap: %s", log.path, error)


async def _readable(fd: int) -> None:
    """Wait until there is something to read, an end included."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(fd, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(fd)


@functools.cache
def _shell() -> str:
    """The shell for shims: the smallest that tells `exit 137` from a kill."""
    return shutil.which("dash") or shutil.which("bash") or "/bin/sh"


@functools.cache
def _tool(name: str) -> str:
    """Find a program by the service's own PATH: the runner's may be anything."""
    if path := shutil.which(name):
        return path
    raise LaunchRejected(f"local pools need the program {name}, and it is not in the service's PATH", Reason.CONFIG_ERROR)


@functools.cache
def _with_default_signals() -> tuple[str, ...]:
    """A prefix that undoes the shell's habit to start background jobs deaf to INT and QUIT, where `env` can."""
    prefix = (_tool("env"), "--default-signal=INT,QUIT")
    works = subprocess.run([*prefix, "true"], check=False, capture_output=True).returncode == 0  # noqa: S603 - fixed words
    return prefix if works else ()
