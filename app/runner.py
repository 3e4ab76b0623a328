"""A runner and what to do next about it: the pure core, with no I/O and no clock of its own.

A ``Runner`` is the whole truth about one accepted launch. ``decide`` looks at it, at what its engine says and at the time,
and names the one next step; the reconciler takes that step and asks again. Functions that return a changed Runner
(``accepted``, ``stop_asked``, ``finished``...) are the only ways a runner changes; the store writes each on the condition
that nobody else changed it since.

Times are seconds since the epoch. Deadlines are data, computed from what is stored, so they survive a restart.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import assert_never

from app.launcher import Exit, Exited, Gone, Handle, Observation, Place, Running, Starting
from app.reason import Reason

SKEW_SECONDS = 5.0
"""How far the clocks of two replicas may be apart."""

KILL_AGAIN_SECONDS = 5.0
"""How often a kill is repeated while the engine still says that the runner lives."""


class Phase(StrEnum):
    """Where a runner is on its way; `stopping` ends in `finished` like every other."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    FINISHED = "finished"


class State(StrEnum):
    """The phase as the Dispatcher knows it. This list is closed."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"


LIVE = (Phase.QUEUED, Phase.STARTING, Phase.RUNNING, Phase.STOPPING)
"""Phases that hold a slot."""

PLACED = (Phase.STARTING, Phase.RUNNING, Phase.STOPPING)
"""Phases that hold a place in the pool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What the pool said about time and tries when the launch was accepted. Seconds; None: no limit."""

    launch_timeout_seconds: float = 300
    run_timeout_seconds: float | None = None
    heartbeat_timeout_seconds: float | None = None
    retry_attempts: int = 3
    retry_base_seconds: float = 0.2
    stop_grace_seconds: float = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A launch call that did not get the engine's yes. ``acted``: the engine may have acted all the same.

    ``reason`` is why the launch has failed if this was its last attempt.
    """

    number: int
    at: float
    error: str
    retryable: bool
    delay_seconds: float | None = None
    acted: bool = True
    reason: Reason = Reason.ENGINE_UNAVAILABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """The order to end a runner: who wants it (as the reason it will bear), since when, and how patiently."""

    reason: Reason
    message: str
    at: float
    grace_seconds: float
    sent: bool = False

    @property
    def kill_at(self) -> float:
        """When patience ends."""
        return self.at + self.grace_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Runner:
    """One accepted launch, from intent to end.

    ``calls`` counts launch calls begun; it is written before each call, so a crash in the middle of one shows.
    ``slot_place`` is the slot's real path on its host, where the runner enters it. ``home`` is the node that alone can reach
    its engine, where replicas share a store. ``revision`` is that of the last event.
    ``placed_at`` is when it got its place in the pool, by which the pool's rate counts.
    ``traceparent`` is its place in a trace as it was told; ``parent_span`` the span above, empty if it has none of its own.
    ``cleaned``: the engine holds nothing of it any more and its secrets are wiped.
    """

    runner_id: str
    task_id: str
    pool_name: str
    slot_id: str
    engine: str
    phase: Phase
    created_at: float
    launch_deadline: float
    policy: Policy
    slot_place: str | None = None
    home: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    cpu: float | None = None
    memory_mib: int | None = None
    token_sha256: str = ""
    traceparent: str = ""
    parent_span: str = ""
    revision: int = 0
    placed_at: float | None = None
    calls: int = 0
    attempts: tuple[Attempt, ...] = ()
    next_attempt_at: float = 0
    handle: Handle | None = None
    started_at: float | None = None
    stop: Stop | None = None
    reason: Reason | None = None
    message: str | None = None
    exit_code: int | None = None
    signal: str | None = None
    oom_killed: bool = False
    log_truncated: bool = False
    finished_at: float | None = None
    observed_at: float | None = None
    last_heartbeat: float | None = None
    cleaned: bool = False

    @property
    def accepted(self) -> bool:
        """Whether the engine has said yes."""
        return self.started_at is not None

    @property
    def state(self) -> State:
        """The phase in the Dispatcher's words."""
        if self.phase is Phase.FINISHED:
            return State.COMPLETED if self.reason is None else State.FAILED
        return State.RUNNING if self.accepted else State.PENDING

    @property
    def retryable(self) -> bool | None:
        """Whether the same launch may succeed if asked for again; None while it lives or when it completed."""
        if self.reason is None:
            return None
        said_no = bool(self.attempts) and not self.attempts[-1].retryable
        return self.reason.retryable and not said_no

    @property
    def run_deadline(self) -> float | None:
        """When the pool's run timeout ends it."""
        limit = self.policy.run_timeout_seconds
        return None if limit is None or self.started_at is None else self.started_at + limit

    def heartbeat_deadline(self, now: float, since: float) -> float | None:
        """When silence becomes a lost heartbeat: counted from the last beat, and not while the service was down.

        ``since`` is when the service came up.
        """
        limit = self.policy.heartbeat_timeout_seconds
        if limit is None or self.last_heartbeat is None:
            return None
        by_this_clock = self.last_heartbeat <= now + SKEW_SECONDS  # which may have been set back since
        return (max(self.last_heartbeat, since) if by_this_clock else since) + limit

    @property
    def untouched(self) -> bool:
        """Whether no engine can hold anything of it: every call begun came back, and none of them did anything."""
        return self.calls == len(self.attempts) and not any(attempt.acted for attempt in self.attempts)


# What to do next. Each action is one step; the reconciler takes it and decides again.


@dataclass(frozen=True, slots=True)
class Admit:
    """Take a place in the pool if there is one."""


@dataclass(frozen=True, slots=True)
class Launch:
    """Call the launcher; it starts the runner or finds the one that exists."""


@dataclass(frozen=True, slots=True)
class Look:
    """Ask the engine, then decide with its answer."""


@dataclass(frozen=True, slots=True)
class Order:
    """Tell the engine to end it, with this grace in seconds."""

    grace: float


@dataclass(frozen=True, slots=True)
class Become:
    """Write this change with an event of this type. ``discard``: first make sure that the engine will never start it."""

    runner: Runner
    event: str
    discard: bool = False


@dataclass(frozen=True, slots=True)
class CleanUp:
    """Keep the log, free what the engine holds, wipe the secrets."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do until this time, or until something changes."""

    until: float | None


Action = Admit | Launch | Look | Order | Become | CleanUp | Wait


def decide(runner: Runner, seen: Observation | None, now: float, since: float) -> Action:
    """Name the next step for a runner.

    ``seen`` is the engine's answer, None if it was not asked or could not say; ``since`` is when this service came up.
    """
    match runner.phase:
        case Phase.FINISHED:
            return Wait(None) if runner.cleaned else CleanUp()
        case Phase.QUEUED:
            return _queued(runner, now)
        case Phase.STARTING if not runner.accepted:
            return _launching(runner, seen, now)
        case Phase.STARTING | Phase.RUNNING | Phase.STOPPING:
            return _live(runner, seen, now, since)
        case _:
            assert_never(runner.phase)


def _queued(runner: Runner, now: float) -> Action:
    if runner.stop:
        return Become(finished(runner, runner.stop.reason, runner.stop.message, now), "finished")
    if now >= runner.launch_deadline:
        text = f"no place in pool {runner.pool_name} within {runner.policy.launch_timeout_seconds:g} s"
        return Become(finished(runner, Reason.QUEUE_TIMEOUT, text, now), "finished")
    return Admit()


def _launching(runner: Runner, seen: Observation | None, now: float) -> Action:
    """Before the engine has said yes: try, try again, or give up, but only once it is known that nothing was started."""
    giving_up = _reason_to_give_up(runner, now)
    hopeless = giving_up and len(runner.attempts) > runner.policy.retry_attempts  # finding it was tried too
    unwanted = isinstance(seen, Starting) and (runner.stop or now >= runner.launch_deadline or hopeless)
    if isinstance(seen, Starting | Running | Exited) and not unwanted:  # it exists after all: launching again finds it
        return Launch() if now >= runner.next_attempt_at else Wait(runner.next_attempt_at)
    if giving_up:
        if runner.untouched or unwanted or isinstance(seen, Gone):
            return Become(finished(runner, *giving_up, now), "finished", discard=not runner.untouched)
        return Look()
    if runner.calls > len(runner.attempts):
        return Launch()  # our own call, or one that a crash cut short
    if now < runner.next_attempt_at:
        return Wait(min(runner.next_attempt_at, runner.launch_deadline))
    if runner.attempts[-1].acted and not isinstance(seen, Gone):
        return Look()  # it may have worked: read by name before creating again
    return Become(call_begun(runner), "launching")


def _reason_to_give_up(runner: Runner, now: float) -> tuple[Reason, str] | None:
    if runner.stop:
        return runner.stop.reason, runner.stop.message
    told = "; ".join(f"attempt {attempt.number}: {attempt.error}" for attempt in runner.attempts)
    if now >= runner.launch_deadline:
        text = f"{runner.engine}: not started within {runner.policy.launch_timeout_seconds:g} s"
        return Reason.LAUNCH_TIMEOUT, "; ".join(filter(None, (text, runner.message, told)))
    if len(runner.attempts) >= runner.policy.retry_attempts and runner.calls <= len(runner.attempts):
        return runner.attempts[-1].reason, f"{runner.engine}: {told}"
    return None


def _live(runner: Runner, seen: Observation | None, now: float, since: float) -> Action:
    """After the engine has said yes, only its word ends a runner."""
    match seen:
        case None:
            return Look()
        case Exited(exit=end, place=place):
            return Become(ended(placed(runner, place), end, now), "finished")
        case Gone():
            return Become(vanished(runner, now), "finished")
        case Running(place=place) if runner.phase is Phase.STARTING:
            return Become(replace(placed(runner, place), phase=Phase.RUNNING, observed_at=now), "running")
        case Starting() | Running():
            return _stopping(runner.stop, now) if runner.stop else _overdue(runner, seen, now, since)
        case _:
            assert_never(seen)


def _stopping(stop: Stop, now: float) -> Action:
    """Ask first, then kill. An order that could not be given in time is still given politely.

    A clock that was set back since would let it live on for as much as that: then its time is up.
    """
    if stop.grace_seconds <= 0 or (stop.sent and not stop.at - SKEW_SECONDS <= now < stop.kill_at):
        return Order(0)
    if stop.sent:
        return Wait(stop.kill_at)
    return Order(min(stop.kill_at - now, stop.grace_seconds) if now < stop.kill_at else stop.grace_seconds)


def _overdue(runner: Runner, seen: Starting | Running, now: float, since: float) -> Action:
    """Start the end of a runner that has outlived one of its deadlines, or wait for the nearest."""
    policy = runner.policy
    deadlines: list[tuple[float, Reason, str]] = []
    problem = f": {seen.problem}" if isinstance(seen, Starting) and seen.problem else ""
    if isinstance(seen, Starting):
        text = f"not running {policy.launch_timeout_seconds:g} s after it was asked for{problem}"
        deadlines.append((runner.launch_deadline, Reason.LAUNCH_TIMEOUT, text))
    if runner.run_deadline is not None:
        text = f"not done {policy.run_timeout_seconds:g} s after it was started{problem}"
        deadlines.append((runner.run_deadline, Reason.DEADLINE_EXCEEDED, text))
    heartbeat = runner.heartbeat_deadline(now, since)
    if heartbeat is not None:
        text = f"no heartbeat for {policy.heartbeat_timeout_seconds:g} s"
        deadlines.append((heartbeat, Reason.HEARTBEAT_LOST, text))
    if not deadlines:
        return Wait(None)
    due, reason, text = min(deadlines)
    if now < due:
        return Wait(due)
    stop = Stop(reason=reason, message=text, at=now, grace_seconds=policy.stop_grace_seconds)
    return Become(replace(runner, phase=Phase.STOPPING, stop=stop), "stopping")


# What an engine keeps of a runner, enough to make a record again after the database is lost.


def identity(runner: Runner) -> dict[str, str]:
    """Write a runner as labels for its engine."""
    labels = {
        "runner_id": runner.runner_id,
        "task_id": runner.task_id,
        "pool_name": runner.pool_name,
        "slot_id": runner.slot_id,
        "policy": json.dumps(asdict(runner.policy)),
        "token_sha256": runner.token_sha256,
    }
    for name in ("slot_place", "cpu", "memory_mib"):
        value = getattr(runner, name)
        if value is not None:
            labels[name] = str(value)
    return labels


def adopted(labels: Mapping[str, str], handle: Handle, engine: str, started_at: float) -> Runner:
    """Make a record of a live runner that has none, from its labels. Raises KeyError, TypeError, ValueError."""
    policy = Policy(**json.loads(labels["policy"]))
    return Runner(
        runner_id=labels["runner_id"],
        task_id=labels["task_id"],
        pool_name=labels["pool_name"],
        slot_id=labels["slot_id"],
        slot_place=labels.get("slot_place"),
        engine=engine,
        phase=Phase.RUNNING,
        calls=1,
        created_at=started_at,
        placed_at=started_at,
        launch_deadline=started_at + policy.launch_timeout_seconds,
        policy=policy,
        cpu=float(labels["cpu"]) if "cpu" in labels else None,
        memory_mib=int(labels["memory_mib"]) if "memory_mib" in labels else None,
        token_sha256=labels["token_sha256"],
        handle=handle,
        started_at=started_at,
    )


# How a runner changes.


def call_begun(runner: Runner) -> Runner:
    """The runner with one more launch call begun; written before the call is made."""
    return replace(runner, calls=runner.calls + 1)


def admitted(runner: Runner, now: float) -> Runner:
    """The runner with a place in its pool; its time to launch counts from here."""
    deadline = now + runner.policy.launch_timeout_seconds
    return replace(runner, phase=Phase.STARTING, launch_deadline=deadline, placed_at=now, calls=1)


def call_failed(
    runner: Runner, error: str, *, acted: bool, delay: float, now: float, reason: Reason = Reason.ENGINE_UNAVAILABLE
) -> Runner:
    """The runner after a launch call that the engine did not answer with a yes or a no."""
    number = len(runner.attempts) + 1
    last = number >= runner.policy.retry_attempts
    attempt = Attempt(
        number=number,
        at=now,
        error=error,
        retryable=True,
        delay_seconds=None if last else delay,
        acted=acted,
        reason=reason,
    )
    return replace(runner, attempts=(*runner.attempts, attempt), next_attempt_at=now + delay)


def rejected(runner: Runner, reason: Reason, error: str, now: float) -> Runner:
    """The runner after the engine's no."""
    attempt = Attempt(number=len(runner.attempts) + 1, at=now, error=error, retryable=False)  # a no may leave something too
    runner = replace(runner, attempts=(*runner.attempts, attempt))
    return finished(runner, reason, f"{runner.engine}: {error}", now)


def accepted(runner: Runner, handle: Handle, now: float) -> Runner:
    """The runner after the engine's yes. A stop asked for meanwhile starts now."""
    phase = Phase.STOPPING if runner.stop else Phase.STARTING
    return replace(runner, phase=phase, handle=handle, started_at=now, observed_at=now, message=None)


def placed(runner: Runner, place: Place) -> Runner:
    """The runner with what its engine has told since of where it is; what is known already stays."""
    handle = runner.handle
    if handle is None:
        return runner
    node, digest = handle.node or place.node, handle.image_digest or place.image_digest
    return replace(runner, handle=replace(handle, node=node, image_digest=digest))


def stop_asked(runner: Runner, message: str, grace: float, now: float) -> Runner:
    """The runner after somebody asked for its end. Asking again may only shorten the patience."""
    if runner.phase is Phase.FINISHED:
        return runner
    if runner.stop:
        late = not runner.stop.sent and now >= runner.stop.kill_at
        if now + grace >= (now + runner.stop.grace_seconds if late else runner.stop.kill_at):
            return runner
        shorter = 0.0 if grace <= 0 else now + grace - runner.stop.at
        return replace(runner, stop=replace(runner.stop, grace_seconds=shorter, sent=False))
    stop = Stop(reason=Reason.CANCELLED, message=message, at=now, grace_seconds=grace)
    if runner.phase is Phase.QUEUED:
        return finished(runner, stop.reason, stop.message, now)
    return replace(runner, stop=stop, phase=Phase.STOPPING if runner.accepted else runner.phase)


def stop_sent(runner: Runner, now: float) -> Runner:
    """The runner after the engine took the order to end it; the patience of one given late counts from here."""
    stop = runner.stop
    if stop is None:
        return runner
    late = max(0.0, now - stop.at) if now >= stop.kill_at else 0.0
    at = min(stop.at, now)  # it was asked for before the clock was set back
    return replace(runner, stop=replace(stop, at=at, sent=True, grace_seconds=stop.grace_seconds + late))


def progressed(runner: Runner, text: str) -> Runner:
    """The runner while its launch takes time, with what it is at."""
    return replace(runner, message=text)


def ended(runner: Runner, end: Exit, now: float) -> Runner:
    """The runner after its main process ended: what we ordered wins over the code it left, unless it ended first."""
    nonzero = end.signal is not None or end.code not in (0, None)
    runner = replace(
        runner,
        exit_code=end.code,
        signal=end.signal,
        oom_killed=end.oom_killed and nonzero,
        log_truncated=runner.log_truncated or end.log_truncated,
        observed_at=now,
    )
    at = max(end.finished_at or now, runner.started_at or runner.created_at)
    if runner.stop and _stop_came_first(runner.stop, end):
        return finished(runner, runner.stop.reason, runner.stop.message, at)
    reason, text = _own_end(end, nonzero=nonzero)
    return finished(runner, reason, end.message or text, at)


def _stop_came_first(stop: Stop, end: Exit) -> bool:
    if end.stopped is not None:
        return end.stopped
    return end.finished_at is None or end.finished_at >= stop.at


def _own_end(end: Exit, *, nonzero: bool) -> tuple[Reason | None, str | None]:
    if end.reason and (end.reason is not Reason.OOM_KILLED or nonzero):
        return end.reason, f"the engine says {end.reason}"
    if end.oom_killed and nonzero:
        return Reason.OOM_KILLED, "killed because it ran out of memory"
    if end.signal:
        return Reason.SIGNALLED, f"ended by {end.signal}"
    if end.code is None:
        return Reason.LOST, "it ended, and nothing tells how"
    return (Reason.EXIT_NONZERO, f"exited with code {end.code}") if end.code else (None, None)


def vanished(runner: Runner, now: float) -> Runner:
    """The runner after its engine answered that it has no such thing."""
    runner = replace(runner, observed_at=now)
    if runner.stop:
        return finished(runner, runner.stop.reason, runner.stop.message, now)
    return finished(runner, Reason.LOST, f"{runner.engine} no longer knows it, and how it ended is unknown", now)


def finished(runner: Runner, reason: Reason | None, message: str | None, at: float) -> Runner:
    """The runner at its end. Nothing that is set here ever changes."""
    return replace(runner, phase=Phase.FINISHED, reason=reason, message=message, finished_at=at)
