"""What the service answers, as frozen records.

A newer service may say more than this version knows: that is kept in ``extra``, so ``to_dict`` gives back all that
``from_dict`` was given. Times are aware datetimes in UTC.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Self


class RunnerState(StrEnum):
    """How far a runner is, in the Dispatcher's words. This list is closed."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Record:
    """How every record is read and written: by its fields, whose metadata say where JSON has another name or type."""

    extra: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what ``to_dict`` or the service wrote. Raises TypeError, ValueError where it is something else."""
        rest = dict(data)
        values: dict[str, Any] = {}
        for each in fields(cls):
            name = each.metadata.get("name", each.name)
            if name in rest and each.name != "extra":
                value = rest.pop(name)
                read = each.metadata.get("read")
                values[each.name] = value if read is None or value is None else read(value)
        return cls(**values, extra=rest)

    def to_dict(self) -> dict[str, Any]:
        """Write it as JSON has it."""
        written: dict[str, Any] = {}
        for each in fields(self):
            if each.name != "extra":
                value = getattr(self, each.name)
                write = each.metadata.get("write")
                written[each.metadata.get("name", each.name)] = value if write is None or value is None else write(value)
        return {**written, **self.extra}


def _as(read: Callable[[Any], Any], write: Callable[[Any], Any]) -> dict[str, Any]:
    return {"read": read, "write": write}


def _written(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


_TIME = _as(datetime.fromisoformat, _written)


@dataclass(frozen=True)
class Attempt(Record):
    """One launch call that the engine did not accept; ``delay_seconds`` passed before the next one."""

    number: int
    at: datetime = field(metadata=_TIME)
    error: str
    retryable: bool = False
    delay_seconds: float | None = None


_ATTEMPTS = _as(
    lambda attempts: tuple(Attempt.from_dict(each) for each in attempts),
    lambda attempts: [each.to_dict() for each in attempts],
)


@dataclass(frozen=True)
class Runner(Record):
    """What became of a launch; the service's interface describes every field. The first nine are the old system's."""

    runner_id: str
    task_id: str
    pool_name: str
    slot_id: str
    state: RunnerState = field(metadata=_as(RunnerState, str))
    started_at: datetime | None = field(default=None, metadata=_TIME)
    pid: int | None = None
    container_id: str | None = None
    job_name: str | None = None
    phase: str | None = None
    reason: str | None = None
    message: str | None = None
    exit_code: int | None = None
    signal: str | None = None
    oom_killed: bool = False
    retryable: bool | None = None
    attempts: tuple[Attempt, ...] = field(default=(), metadata=_ATTEMPTS)
    created_at: datetime | None = field(default=None, metadata=_TIME)
    finished_at: datetime | None = field(default=None, metadata=_TIME)
    observed_at: datetime | None = field(default=None, metadata=_TIME)
    stale: bool = False
    revision: int = 0
    node: str | None = None
    image_digest: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)
    isolation: str | None = None
    last_heartbeat: datetime | None = field(default=None, metadata=_TIME)
    log_truncated: bool = False
    links: Mapping[str, str] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether it has ended; nothing about it changes any more."""
        return self.state in {RunnerState.COMPLETED, RunnerState.FAILED}

    @property
    def accepted(self) -> bool:
        """Whether its engine has accepted it."""
        return self.started_at is not None


_RUNNERS = _as(
    lambda runners: tuple(Runner.from_dict(each) for each in runners),
    lambda runners: [each.to_dict() for each in runners],
)


@dataclass(frozen=True)
class RunnerPage(Record):
    """Runners, newest first, and where the next page begins; None at the end."""

    items: tuple[Runner, ...] = field(default=(), metadata=_RUNNERS)
    next_cursor: str | None = None


@dataclass(frozen=True)
class Event(Record):
    """One line of a runner's history. ``revision`` rises over all events of a service."""

    revision: int
    at: datetime = field(metadata=_TIME)
    type: str
    from_phase: str | None = field(default=None, metadata={"name": "from"})
    to_phase: str | None = field(default=None, metadata={"name": "to"})
    reason: str | None = None
    message: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    runner_id: str | None = None
    task_id: str | None = None
    pool_name: str | None = None


_EVENTS = _as(
    lambda events: tuple(Event.from_dict(each) for each in events),
    lambda events: [each.to_dict() for each in events],
)


@dataclass(frozen=True)
class EventPage(Record):
    """Events in the order of their revisions, and where the next page begins; None at the end."""

    items: tuple[Event, ...] = field(default=(), metadata=_EVENTS)
    next_cursor: str | None = None


@dataclass(frozen=True)
class PoolStatus(Record):
    """A pool and its use. ``cpu_usage`` (cores) and ``memory_usage`` (MiB) are sums of its live runners' limits."""

    pool_name: str
    type: str
    enabled: bool = True
    max_concurrency: int = 0
    current_running: int = 0
    utilization: float = 0.0
    cpu_usage: float | None = None
    memory_usage: int | None = None
    cpu_quota: float | None = None
    memory_quota: int | None = None
    queued: int = 0


@dataclass(frozen=True)
class Engine(Record):
    """What launchers talk to, as the service last heard of it; ``details`` say what it is and can do."""

    name: str
    pools: tuple[str, ...] = field(default=(), metadata=_as(tuple, list))
    answers: bool = True
    answered_at: datetime | None = field(default=None, metadata=_TIME)
    age_seconds: float | None = None
    problem: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Preview(Record):
    """What a launch would be. ``refusal`` says why it could not start now, ``request`` what its engine would be sent."""

    pool_name: str
    engine: str
    refusal: str | None = None
    request: Mapping[str, Any] | None = None
    task_context: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Webhook(Record):
    """A target of the service's webhooks: ``ok``, ``failing`` or ``gone``. ``arrears`` is what it did not take."""

    name: str
    url: str = ""
    events: tuple[str, ...] = field(default=(), metadata=_as(tuple, list))
    pools: tuple[str, ...] | None = field(default=None, metadata=_as(tuple, list))
    state: str = "ok"
    revision: int = 0
    behind: int = 0
    retrying: int = 0
    parked: int = 0
    delivered_at: datetime | None = field(default=None, metadata=_TIME)
    failed_at: datetime | None = field(default=None, metadata=_TIME)
    error: str | None = None
    arrears: tuple[Mapping[str, Any], ...] = field(default=(), metadata=_as(tuple, list))


@dataclass(frozen=True)
class Diagnosis(Record):
    """What happened to a runner, in plain words. ``evidence`` are ``{"source": ..., "text": ...}``."""

    runner_id: str
    state: str
    summary: str
    reason: str | None = None
    likely_cause: str = ""
    evidence: tuple[Mapping[str, str], ...] = field(default=(), metadata=_as(tuple, list))
    next_step: str = ""
