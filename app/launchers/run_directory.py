"""The run directory of a local runner: what is laid out for its shim, and what the shim has left there (see shim.sh).

Everything here blocks, and looks at files and the kernel alone, so any process can do it, also after a crash.
"""

import contextlib
import errno
import functools
import json
import math
import os
import pwd
import secrets
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from app.errors import LauncherUnavailable, LaunchRejected
from app.launcher import Enforcement, Exit, Exited, Found, Gone, Handle, LaunchSpec
from app.launchers import cgroup, process_tree
from app.launchers.cgroup import Cgroups, Group
from app.launchers.process_tree import Process, Tree
from app.logs import LogFile
from app.reason import Reason

_END_ROOM = 63
"""How many bytes there are for the words of an end."""

_ENVIRONMENT = "environment.sh"
_TAKES_ENVIRONMENT = ("/bin/sh", "-c", '. "$0" 2>/dev/null; exec "$@"')
"""Followed by a file, and by the command that it becomes. A shell may refuse to set a variable of its own, such as UID."""


@dataclass(frozen=True, slots=True)
class Account:
    """The user that a runner runs as."""

    uid: int
    gid: int
    name: str | None
    home: str | None

    @classmethod
    def find(cls, user: str) -> "Account":
        """Look up NAME, UID or UID:GID. Raises LaunchRejected."""
        uid, _, gid = user.partition(":")
        try:
            entry = pwd.getpwuid(int(uid)) if uid.isdecimal() else pwd.getpwnam(uid)
        except KeyError:
            if not uid.isdecimal():
                raise LaunchRejected(f"no such user: {user}") from None
            return cls(int(uid), int(gid or uid), None, None)
        named = None if gid else entry.pw_name  # with a group of its own it gets no others
        return cls(entry.pw_uid, int(gid or entry.pw_gid), named, entry.pw_dir)

    @property
    def other(self) -> bool:
        """Whether this is not who we are."""
        return self.uid != os.geteuid()

    @property
    def prefix(self) -> tuple[str, ...]:
        """The command that becomes this user; a program of its own, because a fork with a user takes the slow path.

        Raises LaunchRejected.
        """
        groups = "--init-groups" if self.name else "--clear-groups"
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            raise LaunchRejected("a pool with a user needs the program setpriv", Reason.CONFIG_ERROR)
        return (setpriv, f"--reuid={self.uid}", f"--regid={self.gid}", groups, "--")


@dataclass(frozen=True, slots=True)
class Entered:
    """Where a runner is to work, and as whom. The directory is open: nobody can put another one in its place any more."""

    account: Account | None
    directory: int

    def close(self) -> None:
        """Let go of the directory."""
        os.close(self.directory)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is left to do after the run directory is laid out: start the shim with this, and its log, which is open."""

    log: BinaryIO
    prefix: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Look:
    """What a run directory shows: its shim's fifo opened for writing (-1: no shim is alive), and the handle.

    The handle has no pid as long as the shim has not started the runner.
    """

    fifo: int
    handle: Handle
    log_max: int


@dataclass(frozen=True, slots=True)
class _End:
    """How a main process ended, and when: in clock ticks since boot, and in seconds since the epoch."""

    code: int | None
    signal: str | None
    ticks: int | None
    finished_at: float


class RunDirectory:
    """One runner's directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log = path / "log"

    @property
    def runner_id(self) -> str:
        """Whose directory it is."""
        return self.path.name

    @property
    def _handed_over(self) -> Path:
        """Where a runner that is another user finds what it is told: as noted, and before it is, by a name that is known."""
        with contextlib.suppress(OSError, KeyError):
            return Path(self._about()["handed_over"])
        return Path(tempfile.gettempdir(), f"{self.runner_id}-context")

    # Before the start.

    def enter(self, spec: LaunchSpec) -> Entered | None:
        """Look at where the runner is to work; None if a shim has claimed the place already.

        Raises LaunchRejected for a command, directory or user that surely does not work, OSError.
        """
        return None if self._claimed else Entered(_check(spec), _enter(spec))

    @property
    def _claimed(self) -> bool:
        """Whether a shim has claimed the place, and what lies here may be in use."""
        return (self.path / "claim").exists()

    def prepare(self, spec: LaunchSpec, account: Account | None, cgroups: Cgroups, node: str) -> Prepared | None:
        """Lay out what the shim and the runner need; None if one that a dead service had under way was first after all.

        Raises LaunchRejected, LauncherUnavailable.
        """
        if self._claimed:  # a look at the slot takes time
            return None
        prefix = account.prefix if account else ()
        fresh = not self.path.exists()
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            context, environment = self._tell(spec, account)
            if account and account.other:
                # Nothing that still runs as root is started with what a pool sets: LD_LIBRARY_PATH may lead into the slot.
                prefix = (*prefix, *_TAKES_ENVIRONMENT, str(context.with_name(_ENVIRONMENT)))
                environment = {name: environment[name] for name in ("RUNNER_ID",) if name in environment}
            group = cgroups.create(self.runner_id, spec.cpu, spec.memory_mib)
            self._write("cgroups", str(group).encode())
            enforced = cgroups.enforcement(spec.cpu, spec.memory_mib)
            about = {
                "labels": dict(spec.labels),
                "log_max": spec.log_max_mib << 20,
                "handed_over": str(self._handed_over),
                "numbering": process_tree.numbering(),
                "node": node,
                "cpu": enforced.cpu,
                "memory_mib": enforced.memory_mib,
                "isolation": "user" if account else "none",
            }
            self._write("about.json", json.dumps(about).encode())
            self._keep_room_for_the_end()
            self._write("unstopped", b"")
            with contextlib.suppress(FileExistsError):
                os.mkfifo(self.path / "alive", 0o600)
            log = open(self.log, "ab", opener=_private)  # noqa: SIM115 - closed by whoever starts the shim
        except OSError as error:
            if fresh:
                with contextlib.suppress(LauncherUnavailable, OSError):
                    self.remove()
            left = self.path.exists()  # with the context in it, so that it is to be removed
            raise LauncherUnavailable(f"cannot prepare {self.runner_id}: {error}", acted=left) from error
        return Prepared(log, prefix, environment)

    def _tell(self, spec: LaunchSpec, account: Account | None) -> tuple[Path, dict[str, str]]:
        """Put the context where the runner can read it, and its environment too if it is another user, who cannot come here.

        Such a user owns their directory only once all is in it: until then nobody can put a link in our way.
        """
        if account is None or not account.other:
            self._write("context.json", spec.context)
            context = self.path / "context.json"
            return context, {**_home(account), **spec.environment, "TASK_CONTEXT_FILE": str(context)}
        context = self._handed_over / "context.json"
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._handed_over)  # of a launch that was not finished
        self._handed_over.mkdir(mode=0o700)
        environment = {**_home(account), **spec.environment, "TASK_CONTEXT_FILE": str(context)}
        exports = "".join(f"command export {name}={shlex.quote(value)}\n" for name, value in environment.items())
        told = {context: spec.context, context.with_name(_ENVIRONMENT): os.fsencode(exports)}
        for path, data in told.items():
            with open(path, "wb", opener=_private) as file:
                file.write(data)
        for path in (*told, context.parent):
            os.chown(path, account.uid, account.gid)
        return context, environment

    def _write(self, name: str, data: bytes) -> None:
        """Write a file that is never seen half-written."""
        fresh = self.path / f"{name}.{secrets.token_hex(4)}"
        with open(fresh, "wb", opener=_private) as file:
            file.write(data)
        fresh.rename(self.path / name)

    def _keep_room_for_the_end(self) -> None:
        """Let the shim note the end in a block that is there already: the disk may be full by then.

        A shim that a dead service had under way may be writing it just now, before this byte.
        """
        file = os.open(self.path / "exit", os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(file, b"\n", _END_ROOM)
        finally:
            os.close(file)

    # While it runs.

    def look(self) -> Look | None:
        """See whether a runner was started here; None if not."""
        try:
            about = self._about()
            fifo = self._open_fifo()
            if fifo < 0:
                if not (self.path / "claim").exists():
                    return None
                fifo = self._open_fifo()  # a shim opens it before it claims, so now the answer is final
        except FileNotFoundError:
            return None
        return Look(fifo, self._handle_of(about), about.get("log_max", sys.maxsize))

    def found(self) -> Found | None:
        """Say what was launched here, and with which labels; None if this is no whole run directory."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            about = self._about()
            return Found(self._handle_of(about), about["labels"], (self.path / "about.json").stat().st_mtime)
        return None

    def handle(self) -> Handle:
        """Give the handle as it is by now. Raises OSError."""
        return self._handle_of(self._about())

    def _handle_of(self, about: dict[str, Any]) -> Handle:
        main = self._process("pid")
        return Handle(
            runner_id=self.runner_id,
            pid=main.pid if main else None,
            node=about.get("node"),
            enforced_by=Enforcement(cpu=about.get("cpu", "none"), memory_mib=about.get("memory_mib", "none")),
            isolation=about.get("isolation", "none"),
        )

    def order_end(self, grace: float) -> bool:
        """Send TERM to the whole tree, once, or kill it with a grace of 0; notes first that the end was ordered.

        Nothing on a runner that has ended. False while what was killed is not gone. Raises LauncherUnavailable.
        """
        main, stop, unstopped, kill = self._process("pid"), self.path / "stop", self.path / "unstopped", grace <= 0
        if main is None:
            raise LauncherUnavailable(f"{self.runner_id} is just being started")
        if self._end() or not main.alive:
            return True
        if not kill and (self.path / "deadline").exists():  # its shim has sent TERM, and is to kill it
            return True
        before = stop.read_text() if stop.exists() else None
        if before is None:
            try:
                unstopped.rename(stop)  # which takes no room on a full disk
            except FileNotFoundError:  # begun by a version that did not lay it there
                stop.touch()
        if kill:
            reached, gone = main.kill(signal.SIGKILL), self._tree.kill()
        else:
            reached, gone = bool(before) or self._tree.signal(signal.SIGTERM), True
        if before is None and not reached:  # it has ended by itself meanwhile
            with contextlib.suppress(FileNotFoundError):
                stop.rename(unstopped)
        elif not kill:
            with contextlib.suppress(OSError):  # on a full disk its deadline may bring TERM again
                self._write("stop", f"{math.ceil(process_tree.uptime() + grace)}\n".encode())
        return gone

    # After the end of its shim.

    def conclude(self, log_max: int) -> Exited | Gone | None:
        """Make sure that nothing lives, then say how it ended; None while something that was killed still does."""
        if not self._tree.kill():
            return None
        if not (self.path / "about.json").exists():
            return Gone()
        truncated = False
        if self.log.exists():
            log = LogFile(self.log)
            log.note()
            truncated = log.trim(log_max)
        oom_killed = self._group().oom_kills() > 0
        end = self._end()
        if end is None:
            text = "how it ended is unknown: its shim was killed, or could not note it"
            return Exited(Exit(message=text, oom_killed=oom_killed, log_truncated=truncated))
        deadline = (self.path / "deadline").exists()
        return Exited(
            Exit(
                code=end.code,
                signal=end.signal,
                oom_killed=oom_killed,
                reason=Reason.DEADLINE_EXCEEDED if deadline else None,
                message="ran into its deadline while the service was away" if deadline else None,
                stopped=(self.path / "stop").exists(),
                finished_at=end.finished_at,
                log_truncated=truncated,
            )
        )

    def remove(self) -> bool:
        """Kill what lives and delete all that was made; False while what was killed is not gone. Raises LauncherUnavailable.

        Claims the place first: a shim that a dead service had under way then finds it taken, or gone. Then the shim dies,
        and only then the tree: what starts nothing any more is killed for good.
        """
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            os.close(os.open(self.path / "claim", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        if self._shim_lives():
            if shim := self._process("claim"):
                shim.kill(signal.SIGKILL)
            return False
        if not self._tree.kill():
            return False
        if not self._group().remove():
            return False
        shutil.rmtree(self._handed_over, ignore_errors=True)
        shutil.rmtree(self.path, ignore_errors=True)
        if self.path.exists():
            raise LauncherUnavailable(f"{self.path} cannot be removed")
        return True

    def last_words(self) -> str:
        """What a shim that failed to start has said."""
        with contextlib.suppress(OSError):
            return self.log.read_bytes()[-500:].decode(errors="replace").strip() or "it said nothing"
        return "it left nothing"

    # What lies here.

    def _about(self) -> dict[str, Any]:
        """Read what was noted before the start; nothing if a power failure has emptied the file. Raises OSError."""
        text = (self.path / "about.json").read_bytes()
        with contextlib.suppress(ValueError):
            if isinstance(about := json.loads(text), dict):
                return about
        return {}

    def _open_fifo(self) -> int:
        try:
            return os.open(self.path / "alive", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nobody reads: its shim is dead, or not there yet
                return -1
            raise

    def _shim_lives(self) -> bool:
        try:
            fifo = self._open_fifo()
        except FileNotFoundError:
            return False
        if fifo >= 0:
            os.close(fifo)
        return fifo >= 0

    def _process(self, name: str) -> Process | None:
        with contextlib.suppress(OSError, ValueError):
            return Process.parse((self.path / name).read_text())
        return None

    def _group(self) -> Group:
        with contextlib.suppress(OSError, ValueError):
            return Group.parse((self.path / "cgroups").read_text())
        return cgroup.probed().group(self.runner_id, *cgroup.CONTROLLERS)

    @functools.cached_property
    def _tree(self) -> Tree:
        """Its processes; by their numbers only where these mean what they meant to its shim."""
        with contextlib.suppress(OSError):
            if self._about().get("numbering") == process_tree.numbering():
                end = self._end()
                ended_at = end.ticks if end else None
                return Tree(self.runner_id, self._process("pid"), self._process("claim"), self._group(), ended_at)
        return Tree(self.runner_id, None, None, self._group())

    def _end(self) -> _End | None:
        """Read what the shim has noted of the end; None if it has not."""
        with contextlib.suppress(OSError, ValueError):
            how, number, *uptime = (self.path / "exit").read_text().replace("\0", " ").split()
            return _End(
                code=int(number) if how == "exit" else None,
                signal=_signal_name(int(number)) if how == "signal" else None,
                ticks=process_tree.ticks(uptime[0]) if uptime else None,  # which shims once did not note
                finished_at=(self.path / "exit").stat().st_mtime,
            )
        return None


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _home(account: Account | None) -> dict[str, str]:
    return {"HOME": account.home} if account and account.home else {}


def command_of(spec: LaunchSpec) -> tuple[str, ...]:
    """Give the whole command of a runner, with what makes it another user. Raises LaunchRejected as a launch would."""
    account = _check(spec)
    return (*(account.prefix if account else ()), *(spec.command or ()))


def _check(spec: LaunchSpec) -> Account | None:
    """Give the user to run as. Raises LaunchRejected for a user, command or directory that surely does not work."""
    user = spec.options.get("user")
    account = Account.find(str(user)) if user is not None else None
    if account and os.geteuid() not in (0, account.uid):
        raise LaunchRejected(f"only a service that runs as root can start a runner as {user}")
    directory = spec.working_dir or "/"
    if not Path(directory).is_dir():
        raise LaunchRejected(f"{directory} is not a directory")
    if not os.access(directory, os.X_OK):
        raise LaunchRejected(f"{directory} may not be entered")
    if not spec.command:
        raise LaunchRejected("there is no command to run")
    program = spec.command[0]
    if "/" in program:
        path = Path(directory, program)
        if not path.exists():
            raise LaunchRejected(f"no such command: {program}")
        if path.is_dir() or not os.access(path, os.X_OK):
            raise LaunchRejected(f"the command is not executable: {program}")
    elif not shutil.which(program, path=spec.environment.get("PATH", os.defpath)):
        raise LaunchRejected(f"no such command in PATH: {program}")
    return account


def _enter(spec: LaunchSpec) -> int:
    """Open the directory to start in: whatever its path comes to mean from here on, it is this one.

    A slot was checked under its real path; a pool's own working_dir may be a link. Raises LaunchRejected, OSError.
    """
    path = spec.working_dir or "/"
    directory = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    if spec.options.get("working_dir") is None and str(Path(f"/proc/self/fd/{directory}").readlink()) != path:
        os.close(directory)
        raise LaunchRejected(f"{path} leads elsewhere than when it was checked", Reason.CONFIG_ERROR)
    return directory


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"
