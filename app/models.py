"""What travels: the launch request, and the answers.

A request is read strictly (an id that is a number is a mistake) and generously (keys we do not know are the Dispatcher's).
What passes here can be written to JSON, to an environment and to a store as it is.
"""

import math
import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    JsonValue,
    TypeAdapter,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from app.diagnosis import Diagnosis, Source
from app.events import Event
from app.launcher import EnforcedBy, Handle
from app.reason import Reason
from app.runner import Phase, Runner, State
from app.targets import Told

MAX_DEPTH = 100
"""How deep objects and lists in metadata may nest."""

MAX_PATH_BYTES = 4095

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")

# The launch request.


def _whole(text: str) -> str:
    """Refuse half of a surrogate pair: JSON can spell it, UTF-8 cannot."""
    if _SURROGATE.search(text):
        raise PydanticCustomError("lone_surrogate", "must not hold half of a surrogate pair")
    return text


def _plain(text: str) -> str:
    if _CONTROL.search(text):
        raise PydanticCustomError("control_character", "must not hold control characters")
    return text


def _absolute(path: str) -> str:
    if not path.startswith("/"):
        raise PydanticCustomError("relative_path", "must be an absolute path")
    if len(path.encode()) > MAX_PATH_BYTES:
        raise PydanticCustomError("long_path", f"must not be longer than {MAX_PATH_BYTES} bytes")
    return path


def _json_fault(value: object) -> str | None:
    """Why a value cannot travel as JSON, None if it can. Level by level, so no depth can exhaust the stack."""
    level, depth = [value], 0
    while level:
        below: list[object] = []
        for item in level:
            match item:
                case dict():
                    below += [*item, *item.values()]
                case list():
                    below += item
                case str() if _SURROGATE.search(item):
                    return "must not hold half of a surrogate pair"
                case float() if not math.isfinite(item):
                    return "must not hold NaN or Infinity"
                case str() | int() | float() | None:
                    pass
                case _:
                    return f"must be JSON, and {type(item).__name__} is not"
        depth += any(isinstance(item, dict | list) for item in level)
        if depth > MAX_DEPTH:
            return f"must not nest deeper than {MAX_DEPTH}"
        level = below
    return None


def _json(value: dict[str, Any]) -> dict[str, Any]:
    fault = _json_fault(value)
    if fault:
        raise PydanticCustomError("not_json", "{fault}", {"fault": fault})
    return value


Text = Annotated[str, AfterValidator(_whole)]
Identifier = Annotated[
    Text,
    Field(min_length=1, max_length=1024, json_schema_extra={"pattern": r"^[^\u0000-\u001f\u007f]*$"}),
    AfterValidator(_plain),
]
SlotPath = Annotated[
    Text,
    Field(json_schema_extra={"pattern": r"^/[^\u0000-\u001f\u007f]*$"}),
    AfterValidator(_plain),
    AfterValidator(_absolute),
]
Metadata = Annotated[dict[str, Any], AfterValidator(_json)]

_READ = ConfigDict(strict=True, frozen=True, extra="ignore", hide_input_in_errors=True)


class Task(BaseModel):
    """The task as the Dispatcher posts it; a null stands for a key left out."""

    model_config = _READ

    id: Identifier
    title: Text = ""
    description: Text = ""
    dependencies: Annotated[list[Identifier], FailFast()] = []  # a fault for each entry could fill the memory
    required_skill: Identifier | None = None
    reserved_branch: Identifier | None = None
    metadata: Metadata = {}
    spec_name: Identifier | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, task: object) -> object:
        return {key: value for key, value in task.items() if value is not None} if isinstance(task, dict) else task

    @property
    def spec(self) -> str:
        """The name of its specification: its own, else its metadata's, else `unknown`."""
        named = self.metadata.get("spec_name")
        return self.spec_name or (named if isinstance(named, str) and named else "unknown")


class Slot(BaseModel):
    """The workspace: a checked-out repository that is this runner's alone."""

    model_config = _READ

    slot_id: Identifier
    slot_path: SlotPath
    repo_url: Text


class InlinePool(BaseModel):
    """A pool given as an object. All but its name waits until it is known that no configured pool bears that name."""

    model_config = _READ

    name: Identifier


_NAME = TypeAdapter[str](Identifier)
_POOL_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "object", "properties": {"name": {"type": "string", "minLength": 1}}, "required": ["name"]},
    ],
    "title": "Pool",
    "description": "a configured pool's name, or an object: one that bears a configured name means that pool",
}


def _named(pool: object) -> object:
    if isinstance(pool, dict):
        InlinePool.model_validate(_json(pool))
    elif isinstance(pool, str):
        _NAME.validate_python(pool)
    else:
        raise PydanticCustomError("pool_type", "must be a pool's name, or an object with one")
    return pool


class LaunchRequest(BaseModel):
    """What to run, where it works, and the pool that says how. A pool object stays as it came."""

    model_config = _READ

    task: Task
    slot: Slot
    pool: Annotated[str | dict[str, Any], BeforeValidator(_named), WithJsonSchema(_POOL_SCHEMA)]


# The answers.

_SAY = ConfigDict(frozen=True)


class AttemptRecord(BaseModel):
    """One launch call that the engine did not accept."""

    model_config = _SAY

    number: int
    at: datetime
    error: str
    retryable: bool
    delay_seconds: float | None


class EnforcementRecord(BaseModel):
    """What really holds each limit."""

    model_config = _SAY

    cpu: EnforcedBy
    memory_mib: EnforcedBy


class LimitsRecord(BaseModel):
    """What the runner may use (null: no limit), and what makes it so."""

    model_config = _SAY

    cpu: float | None = Field(description="cores")
    memory_mib: int | None = Field(description="MiB")
    enforced_by: EnforcementRecord


class LinksRecord(BaseModel):
    """Where the rest about a runner is."""

    model_config = _SAY

    self: str
    logs: str
    events: str
    diagnosis: str


class RunnerRecord(BaseModel):
    """What became of a launch. The first nine fields are those of the system that this service replaces."""

    model_config = _SAY

    runner_id: str
    task_id: str
    pool_name: str
    slot_id: str
    state: State = Field(description="a closed list")
    started_at: datetime | None = Field(description="when the engine accepted")
    pid: int | None
    container_id: str | None
    job_name: str | None
    phase: Phase
    reason: Reason | None = Field(description="why it failed; the list may grow")
    message: str | None
    exit_code: int | None = Field(description="what the engine says; null where a signal ended a local process")
    signal: str | None
    oom_killed: bool
    retryable: bool | None = Field(description="whether the same launch may succeed if asked for again; null unless failed")
    attempts: list[AttemptRecord]
    created_at: datetime
    finished_at: datetime | None
    observed_at: datetime | None = Field(description="when the engine was last heard on this")
    stale: bool = Field(description="the engine has not answered lately, so this may be out of date")
    revision: int
    node: str | None
    image_digest: str | None
    labels: dict[str, str]
    limits: LimitsRecord
    isolation: str
    last_heartbeat: datetime | None
    log_truncated: bool
    links: LinksRecord


class RunnerPage(BaseModel):
    """Runners, newest first."""

    model_config = _SAY

    items: list[RunnerRecord]
    next_cursor: str | None


class EventRecord(BaseModel):
    """One line of a runner's history."""

    model_config = _SAY

    revision: int
    runner_id: str
    task_id: str
    pool_name: str
    at: datetime
    type: str
    from_: Phase | None = Field(serialization_alias="from")
    to: Phase
    reason: Reason | None
    message: str | None
    data: dict[str, JsonValue]


class EventPage(BaseModel):
    """A runner's history, the first event first."""

    model_config = _SAY

    items: list[EventRecord]


class JournalPage(BaseModel):
    """Events of all runners in the order of their revisions. ``revision`` is where to go on later: as `since`."""

    model_config = _SAY

    items: list[EventRecord]
    next_cursor: str | None
    revision: int


class Notice(BaseModel):
    """What a webhook tells: an event and its runner. The fields of an end are null before it, as in a record."""

    model_config = _SAY

    runner_id: str
    task_id: str
    slot_id: str
    pool_name: str
    labels: dict[str, str]
    revision: int = Field(description="rises with every event; of one runner they arrive in this order")
    event: str
    state: State
    phase: Phase
    reason: Reason | None
    message: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    pid: int | None
    container_id: str | None
    job_name: str | None
    exit_code: int | None
    signal: str | None
    oom_killed: bool
    retryable: bool | None


class CloudEvent(BaseModel):
    """A CloudEvent 1.0 in structured mode. ``id`` is the same however often it is sent."""

    model_config = _SAY

    specversion: Literal["1.0"] = "1.0"
    id: str
    source: str
    type: Told
    subject: str = Field(description="the runner's id")
    time: datetime
    datacontenttype: Literal["application/json"] = "application/json"
    data: Notice


class ArrearsRecord(BaseModel):
    """A runner of which a target did not take an event; ``revision`` is that of the event."""

    model_config = _SAY

    runner_id: str
    revision: int
    attempts: int
    error: str
    since: datetime
    retry_at: datetime | None = Field(description="null: parked, until the target is retried")


class WebhookRecord(BaseModel):
    """A target of webhooks, and how far it was told."""

    model_config = _SAY

    name: str
    url: str
    events: list[Told]
    pools: list[str] | None = Field(description="null: all")
    state: Literal["ok", "failing", "gone"] = Field(description="by its last answer; `gone`: nothing is sent until retried")
    revision: int = Field(description="it was told all up to here, save its arrears")
    behind: int = Field(description="events of all runners after that revision")
    retrying: int = Field(description="runners of which it did not take an event, and is asked again")
    parked: int = Field(description="runners of which it did not take an event, and is asked no more until retried")
    delivered_at: datetime | None = Field(description="null: not since the service's start")
    failed_at: datetime | None
    error: str | None = Field(description="what came instead of a yes; null once there is one again")
    arrears: list[ArrearsRecord] = Field(description="the oldest hundred")


class WebhookPage(BaseModel):
    """All targets of webhooks."""

    model_config = _SAY

    items: list[WebhookRecord]


class PreviewRecord(BaseModel):
    """What a launch would be, if it were asked for now. Nothing was made, and no engine was asked."""

    model_config = _SAY

    pool_name: str
    engine: str
    refusal: str | None = Field(description="why it would not start now though it could: the slot or the pool is taken")
    request: dict[str, JsonValue] | None = Field(description="what the launcher would send to its engine, secrets hidden")
    task_context: dict[str, Any] = Field(description="what the runner would be told of its task")


class EvidenceRecord(BaseModel):
    """One thing that was seen, and where."""

    model_config = _SAY

    source: Source
    text: str


class DiagnosisRecord(BaseModel):
    """What happened to a runner, in plain words."""

    model_config = _SAY

    runner_id: str
    state: State
    reason: Reason | None
    summary: str
    likely_cause: str
    evidence: list[EvidenceRecord]
    next_step: str


class PoolRecord(BaseModel):
    """A pool and its use. ``cpu_usage`` and ``memory_usage`` are the sums of its live runners' limits, in cores and MiB."""

    model_config = _SAY

    pool_name: str
    type: str
    enabled: bool
    max_concurrency: int
    current_running: int
    utilization: float = Field(description="current_running / max_concurrency")
    cpu_usage: float
    memory_usage: int
    cpu_quota: float | None
    memory_quota: int | None
    queued: int
    launching: int = Field(description="of current_running, those that the engine has not accepted yet")


class PoolPage(BaseModel):
    """All configured pools."""

    model_config = _SAY

    items: list[PoolRecord]


class EngineRecord(BaseModel):
    """What launchers of some pools talk to, as it was last heard of."""

    model_config = _SAY

    name: str
    pools: list[str]
    answers: bool
    answered_at: datetime | None
    age_seconds: float | None = Field(description="since the last answer")
    breaker: Literal["closed", "open"] = Field(description="`open` while it is away: launches for it are refused")
    away_since: datetime | None = Field(description="when the breaker opened")
    problem: str | None = Field(description="what came instead of an answer")
    details: dict[str, JsonValue] = Field(description="what the engine is and can do, in its launcher's words")


class EnginePage(BaseModel):
    """All engines that pools name or runners use."""

    model_config = _SAY

    items: list[EngineRecord]


class StrayRecord(BaseModel):
    """A runner of this installation that an engine holds and no live record explains."""

    model_config = _SAY

    engine: str
    runner_id: str
    container_id: str | None
    job_name: str | None
    created_at: datetime
    fate: Literal["adopt", "remove", "wait"] = Field(description="what the sweep does with it")
    why: str


class SweepReport(BaseModel):
    """What the sweep found, and which engines could not be asked."""

    model_config = _SAY

    items: list[StrayRecord]
    problems: dict[str, str] = Field(description="by engine")


class RetentionReport(BaseModel):
    """What was forgotten, or with ``dry_run`` would be."""

    model_config = _SAY

    records: int = Field(description="records, each with its events, its idempotency key and its log")
    logs: int = Field(description="logs, those of these records included")
    log_bytes: int = Field(description="what these logs took of the disk")
    dry_run: bool


class PoolSwitch(BaseModel):
    """Switch a pool on or off; kept over restarts, and stronger than the pool file."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    enabled: bool


class Readiness(BaseModel):
    """Whether requests are served, and which engines in use answer."""

    model_config = _SAY

    ready: bool
    detail: str | None = None
    engines: dict[str, bool] = {}


class FaultRecord(BaseModel):
    """One thing wrong in a request."""

    model_config = _SAY

    pointer: str = Field(description="JSON pointer into the request")
    detail: str


class Problem(BaseModel):
    """Why a request was not done (RFC 9457)."""

    model_config = _SAY

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str = Field(description="stable, for machines")
    retryable: bool = Field(description="whether the same request may succeed later")
    request_id: str
    errors: list[FaultRecord] = []
    runner: RunnerRecord | None = Field(
        default=None, description="the record, once there is one; of the holder, if a slot is busy"
    )


def runner_record(runner: Runner, *, answered_at: float | None, stale: bool) -> RunnerRecord:
    """Say what is known of a runner; ``answered_at`` is when its engine last answered anything."""
    handle = runner.handle or Handle(runner_id=runner.runner_id)
    live = runner.phase is not Phase.FINISHED
    observed = max(runner.observed_at, answered_at or 0) if live and runner.observed_at else runner.observed_at
    here = f"/runners/{runner.runner_id}"
    return RunnerRecord(
        runner_id=runner.runner_id,
        task_id=runner.task_id,
        pool_name=runner.pool_name,
        slot_id=runner.slot_id,
        state=runner.state,
        started_at=_time(runner.started_at),
        pid=handle.pid,
        container_id=handle.container_id,
        job_name=handle.job_name,
        phase=runner.phase,
        reason=runner.reason,
        message=runner.message,
        exit_code=runner.exit_code,
        signal=runner.signal,
        oom_killed=runner.oom_killed,
        retryable=runner.retryable,
        attempts=[
            AttemptRecord(
                number=attempt.number,
                at=_moment(attempt.at),
                error=attempt.error,
                retryable=attempt.retryable,
                delay_seconds=attempt.delay_seconds,
            )
            for attempt in runner.attempts
        ],
        created_at=_moment(runner.created_at),
        finished_at=_time(runner.finished_at),
        observed_at=_time(observed),
        stale=stale and live,
        revision=runner.revision,
        node=handle.node,
        image_digest=handle.image_digest,
        labels=runner.labels,
        limits=LimitsRecord(
            cpu=runner.cpu,
            memory_mib=runner.memory_mib,
            enforced_by=EnforcementRecord(cpu=handle.enforced_by.cpu, memory_mib=handle.enforced_by.memory_mib),
        ),
        isolation=handle.isolation,
        last_heartbeat=_time(runner.last_heartbeat),
        log_truncated=runner.log_truncated,
        links=LinksRecord(self=here, logs=f"{here}/logs", events=f"{here}/events", diagnosis=f"{here}/diagnosis"),
    )


def diagnosis_record(runner: Runner, diagnosis: Diagnosis) -> DiagnosisRecord:
    """Say what happened to a runner."""
    return DiagnosisRecord(
        runner_id=runner.runner_id,
        state=runner.state,
        reason=runner.reason,
        summary=diagnosis.summary,
        likely_cause=diagnosis.likely_cause,
        evidence=[EvidenceRecord(source=each.source, text=each.text) for each in diagnosis.evidence],
        next_step=diagnosis.next_step,
    )


def event_record(event: Event, *, task_id: str, pool_name: str) -> EventRecord:
    """Say what happened, and to whose runner."""
    return EventRecord(
        revision=event.revision,
        runner_id=event.runner_id,
        task_id=task_id,
        pool_name=pool_name,
        at=_moment(event.at),
        type=event.type,
        from_=event.from_phase,
        to=event.to_phase,
        reason=event.reason,
        message=event.message,
        data=event.data,
    )


def cloud_event(event: Event, runner: Runner, told: Told, source: str) -> CloudEvent:
    """Tell an event to somebody who was not asking. ``runner`` may have gone on since; what came later is left out."""
    end = event.to_phase is Phase.FINISHED
    begun = told is Told.STARTED or event.to_phase in (Phase.RUNNING, Phase.STOPPING, Phase.FINISHED)
    handle = (runner.handle if begun else None) or Handle(runner_id=runner.runner_id)
    live = State.RUNNING if begun and runner.started_at is not None else State.PENDING
    return CloudEvent(
        id=f"{runner.runner_id}-{event.revision}",
        source=source,
        type=told,
        subject=runner.runner_id,
        time=_moment(event.at),
        data=Notice(
            runner_id=runner.runner_id,
            task_id=runner.task_id,
            slot_id=runner.slot_id,
            pool_name=runner.pool_name,
            labels=runner.labels,
            revision=event.revision,
            event=event.type,
            state=runner.state if end else live,
            phase=event.to_phase,
            reason=event.reason,
            message=event.message,
            created_at=_moment(runner.created_at),
            started_at=_time(runner.started_at) if begun else None,
            finished_at=_time(runner.finished_at) if end else None,
            pid=handle.pid,
            container_id=handle.container_id,
            job_name=handle.job_name,
            exit_code=runner.exit_code if end else None,
            signal=runner.signal if end else None,
            oom_killed=runner.oom_killed and end,
            retryable=runner.retryable if end else None,
        ),
    )


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else _moment(seconds)
