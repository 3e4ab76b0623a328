"""THE PORT: what a launcher is, for every environment. This text is the contract; tests/contract holds each sentence.

A launcher starts runners in one environment (its engine: the kernel, a Docker Engine, a Kubernetes API) and answers what
became of them. It keeps no record, decides nothing and retries nothing: the reconciler is its only caller, and repeats.

Order      ``launch`` once or more, then ``observe`` until ``Exited`` or ``Gone``, ``stop`` any number of times, ``logs`` at
           any time, ``remove`` at the end. ``list`` and ``watch`` run beside all of these.
Names      Everything made for a runner is named after its id, so a process that did not launch it finds it again.
           There is no adopt(): ``list`` and ``observe`` in a fresh launcher are adoption.
Threads    All methods may run at once for different runners; for one runner the caller runs one at a time, save ``logs``.
           None blocks the event loop. ``CancelledError`` passes through; a cancelled launch leaves one runner or none.
Errors     ``LauncherUnavailable``, ``LaunchRejected``, ``RunnerGone`` (see errors.py) and nothing else.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from pydantic import JsonValue

from app.reason import Reason

EnforcedBy = Literal["cgroup2", "cgroup1", "engine", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Enforcement:
    """What really holds a runner's limits, for each of them."""

    cpu: EnforcedBy = "none"
    memory_mib: EnforcedBy = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSpec:
    """All that a launcher needs, resolved: no defaults to look up, no templates. Holds secrets, so it never prints them.

    ``working_dir`` is where the runner starts (local) or what is mounted at /workspace (containers); None: nothing.
    ``context`` is the task context as JSON; the launcher puts it in a file and names that in ``TASK_CONTEXT_FILE``.
    ``cpu`` is cores, ``memory_mib`` MiB; None: no limit. ``options`` are the pool's keys for this launcher, validated.
    ``labels`` identify the runner to whoever lists the engine: adoption reads them back.
    """

    command: tuple[str, ...] | None
    environment: Mapping[str, str] = field(repr=False)
    context: bytes = field(repr=False)
    working_dir: str | None = None
    cpu: float | None = None
    memory_mib: int | None = None
    run_timeout_seconds: float | None = None
    stop_grace_seconds: float = 10
    log_max_mib: int = 50
    labels: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, JsonValue] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Handle:
    """A runner as its engine knows it; stored with the record."""

    runner_id: str
    pid: int | None = None
    container_id: str | None = None
    job_name: str | None = None
    node: str | None = None
    image_digest: str | None = None
    enforced_by: Enforcement = Enforcement()
    isolation: str = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """How the runner's main process ended, complete and final.

    ``code`` is what the engine says, ``signal`` a name like ``SIGKILL``; both None: nobody will ever know.
    ``reason`` is the engine's own word where it has one (out of memory, evicted, its deadline).
    ``stopped`` says whether our stop reached the runner before it ended; None: only the times can tell.
    ``finished_at`` is seconds since the epoch by the engine's clock. ``log_truncated`` is True if that is known by then;
    else whoever reads the whole log finds out, by a line that says ``gap``.
    """

    code: int | None = None
    signal: str | None = None
    oom_killed: bool = False
    reason: Reason | None = None
    message: str | None = None
    stopped: bool | None = None
    finished_at: float | None = None
    log_truncated: bool = False


@dataclass(frozen=True, slots=True)
class Starting:
    """Accepted by the engine, not running yet; ``problem`` is the engine's word on what holds it up."""

    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a runner is, and of what image, where its engine decides that after it has accepted the launch."""

    node: str | None = None
    image_digest: str | None = None


@dataclass(frozen=True, slots=True)
class Running:
    """The main process runs."""

    place: Place = field(default=Place(), compare=False)


@dataclass(frozen=True, slots=True)
class Exited:
    """The main process ended, and nothing it left behind lives. The same answer every time until ``remove``."""

    exit: Exit
    place: Place = field(default=Place(), compare=False)


@dataclass(frozen=True, slots=True)
class Gone:
    """The engine answered, and has no such runner. Never said because the engine did not answer."""


Observation = Starting | Running | Exited | Gone


@dataclass(frozen=True, slots=True)
class Found:
    """A runner that the engine holds: its whole handle, the labels it was launched with, and when (seconds)."""

    handle: Handle
    labels: Mapping[str, str]
    created_at: float


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line of output without its end, and the cursor after which reading resumes. ``text`` may hold any bytes.

    ``time`` is when it was written by the engine's clock, in seconds since the epoch, where the engine tells it.
    ``gap``: no output, but the launcher's word that lines are missing here, or may be.
    """

    cursor: str
    text: bytes
    time: float | None = None
    gap: bool = False

    def is_before(self, since: float | None) -> bool:
        """Say whether it was surely written before a time."""
        return since is not None and self.time is not None and self.time < since


class Launcher(Protocol):
    """Starts runners in one environment."""

    async def launch(self, runner_id: str, spec: LaunchSpec, *, progress: Callable[[str], None] | None = None) -> Handle:
        """Start the runner, or find the one already started under this id; returns when the engine has accepted.

        ``progress`` is told in a sentence, at most every few seconds, what a launch that takes long is at.

        Idempotent on ``runner_id``: called again, also by another process, also after the runner has exited, it returns
        the handle of what exists. Never a second copy. Raises LaunchRejected or LauncherUnavailable.
        """
        ...

    async def observe(self, handles: Sequence[Handle]) -> Mapping[str, Observation]:
        """What became of these, by runner id; one call to the engine where it can.

        A handle with nothing but its ``runner_id`` is enough. An id left out means "cannot say now".
        Raises LauncherUnavailable when nothing can be said of any.
        """
        ...

    def watch(self) -> AsyncIterator[str]:
        """Ids worth observing, for ever: a hint that may repeat and may miss, and carries no state. Reconnects inside."""
        ...

    async def stop(self, handle: Handle, grace: float) -> None:
        """Ask the whole tree to end (TERM); ``grace`` 0 kills it. Returns once the engine has taken the order.

        Idempotent, and nothing on an exited or unknown runner. The caller keeps the time: after ``grace`` seconds it
        calls again with 0.
        """
        ...

    def logs(
        self, handle: Handle, *, after: str | None = None, since: float | None = None, follow: bool = False
    ) -> AsyncIterator[LogLine]:
        """Output in order, stdout and stderr together, before and after the exit, until ``remove``.

        ``after`` resumes behind a line's cursor without a repeat or a gap; where lines are gone (rotation, the cap) a
        line says so. ``since`` (seconds since the epoch) leaves out lines that were surely written before, by the engine's
        clock: maybe not all of them, and none that is newer. ``follow`` waits for more and ends after the last line once the
        runner has exited.
        Raises RunnerGone when there is no such runner.
        """
        ...

    def log_file(self, handle: Handle) -> Path | None:
        """A file on this machine with the whole output so far, if the launcher keeps one; else None."""
        ...

    async def list(self) -> Sequence[Found]:
        """Everything of this installation on the engine, exited ones too, whoever launched it."""
        ...

    async def remove(self, handle: Handle) -> None:
        """Free all that was made for this runner, killing it first if need be.

        A launch still under way somewhere is kept from making it later. Idempotent; afterwards ``observe`` says Gone.
        """
        ...

    async def ping(self) -> None:
        """Raise LauncherUnavailable unless the engine answers."""
        ...

    async def aclose(self) -> None:
        """End watches, followers and connections. Never stops a runner. Idempotent."""
        ...


@runtime_checkable
class Renders(Protocol):
    """What a launcher may do besides: show what it would send to its engine."""

    def render(self, runner_id: str, spec: LaunchSpec) -> Mapping[str, JsonValue]:
        """What ``launch`` would do with this: the command, container configuration or manifest. May block.

        Asks no engine and makes nothing. Raises LaunchRejected for what surely does not work.
        """
        ...


@runtime_checkable
class Tells(Protocol):
    """What a launcher may do besides: say what its engine is and can do."""

    async def about(self) -> Mapping[str, JsonValue]:
        """The engine's version, what limits it holds, which permissions we have. Raises LauncherUnavailable."""
        ...
