"""One example for every shape of an answer, made of the shapes themselves so that none of them can be wrong."""

from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel

from app.api import plain
from app.models import (
    ArrearsRecord,
    AttemptRecord,
    CloudEvent,
    DiagnosisRecord,
    EnforcementRecord,
    EnginePage,
    EngineRecord,
    EventPage,
    EventRecord,
    EvidenceRecord,
    FaultRecord,
    JournalPage,
    LimitsRecord,
    LinksRecord,
    Notice,
    PoolPage,
    PoolRecord,
    PreviewRecord,
    Problem,
    Readiness,
    RetentionReport,
    RunnerPage,
    RunnerRecord,
    StrayRecord,
    SweepReport,
    WebhookPage,
    WebhookRecord,
)
from app.reason import Reason
from app.runner import Phase, State
from app.targets import Told

_ID = "runner-3f9c1a7be204"
_AT = datetime(2026, 1, 5, 9, 30, tzinfo=UTC)
_HERE = f"/runners/{_ID}"

RUNNER = RunnerRecord(
    runner_id=_ID,
    task_id="7",
    pool_name="local",
    slot_id="example-slot1",
    state=State.FAILED,
    started_at=_AT.replace(second=1),
    pid=4242,
    container_id=None,
    job_name=None,
    phase=Phase.FINISHED,
    reason=Reason.EXIT_NONZERO,
    message="exited with code 3",
    exit_code=3,
    signal=None,
    oom_killed=False,
    retryable=False,
    attempts=[
        AttemptRecord(number=1, at=_AT, error="cannot start a process: try again", retryable=True, delay_seconds=0.12)
    ],
    created_at=_AT,
    finished_at=_AT.replace(second=5),
    observed_at=_AT.replace(second=5),
    stale=False,
    revision=42,
    node="build-1",
    image_digest=None,
    labels={"team": "core"},
    limits=LimitsRecord(cpu=1, memory_mib=512, enforced_by=EnforcementRecord(cpu="cgroup2", memory_mib="cgroup2")),
    isolation="none",
    last_heartbeat=_AT.replace(second=4),
    log_truncated=False,
    links=LinksRecord(self=_HERE, logs=f"{_HERE}/logs", events=f"{_HERE}/events", diagnosis=f"{_HERE}/diagnosis"),
)
EVENT = EventRecord(
    revision=42,
    runner_id=_ID,
    task_id="7",
    pool_name="local",
    at=_AT.replace(second=5),
    type="finished",
    from_=Phase.RUNNING,
    to=Phase.FINISHED,
    reason=Reason.EXIT_NONZERO,
    message="exited with code 3",
    data={},
)
POOL = PoolRecord(
    pool_name="local",
    type="local-process",
    enabled=True,
    max_concurrency=4,
    current_running=1,
    utilization=0.25,
    cpu_usage=1,
    memory_usage=512,
    cpu_quota=1,
    memory_quota=512,
    queued=0,
    launching=0,
)
NOTICE = CloudEvent(
    id=f"{_ID}-42",
    source="urn:runner-launcher:5f3a9c0b7d21",
    type=Told.FAILED,
    subject=_ID,
    time=_AT.replace(second=5),
    data=Notice(
        runner_id=_ID,
        task_id="7",
        slot_id="example-slot1",
        pool_name="local",
        labels={"team": "core"},
        revision=42,
        event="finished",
        state=State.FAILED,
        phase=Phase.FINISHED,
        reason=Reason.EXIT_NONZERO,
        message="exited with code 3",
        created_at=_AT,
        started_at=_AT.replace(second=1),
        finished_at=_AT.replace(second=5),
        pid=4242,
        container_id=None,
        job_name=None,
        exit_code=3,
        signal=None,
        oom_killed=False,
        retryable=False,
    ),
)
WEBHOOK = WebhookRecord(
    name="task-registry",
    url="https://registry.example.org/hooks/runners",
    events=[Told.COMPLETED, Told.FAILED],
    pools=None,
    state="failing",
    revision=41,
    behind=1,
    retrying=1,
    parked=0,
    delivered_at=_AT,
    failed_at=_AT.replace(second=6),
    error="HTTP 500: out of order",
    arrears=[
        ArrearsRecord(
            runner_id=_ID,
            revision=38,
            attempts=1,
            error="HTTP 500: out of order",
            since=_AT.replace(second=6),
            retry_at=_AT.replace(second=7),
        )
    ],
)
ANSWERS: tuple[BaseModel, ...] = (
    RUNNER,
    RunnerPage(items=[RUNNER], next_cursor="NDI"),
    EventPage(items=[EVENT]),
    JournalPage(items=[EVENT], next_cursor="NDI", revision=42),
    POOL,
    PoolPage(items=[POOL]),
    EnginePage(
        items=[
            EngineRecord(
                name="local-process",
                pools=["local"],
                answers=True,
                answered_at=_AT,
                age_seconds=2.5,
                breaker="closed",
                away_since=None,
                problem=None,
                details={"version": "Linux 6.8.0 x86_64", "cpu_limits_by": "cgroup2"},
            )
        ]
    ),
    SweepReport(
        items=[
            StrayRecord(
                engine="docker:unix:///var/run/docker.sock",
                runner_id=_ID,
                container_id="4f2b9c",
                job_name=None,
                created_at=_AT,
                fate="adopt",
                why="alive, and on no record",
            )
        ],
        problems={"kubernetes:necrocode-agents": "no answer"},
    ),
    RetentionReport(records=120, logs=131, log_bytes=52_428_800, dry_run=False),
    DiagnosisRecord(
        runner_id=_ID,
        state=State.FAILED,
        reason=Reason.EXIT_NONZERO,
        summary=f"{_ID} (task 7, pool local) failed after 4.0 s: exit_nonzero: exited with code 3",
        likely_cause="its program ended by itself with code 3, which only the program can explain",
        evidence=[EvidenceRecord(source="log", text="error: nothing to commit")],
        next_step="read its log from the end; the launcher did what it should",
    ),
    PreviewRecord(
        pool_name="local",
        engine="local-process",
        refusal=None,
        request={"command": ["python3", "-m", "my_agent"], "working_dir": "/slots/slot1"},
        task_context={"task_id": "7", "task_title": "Add a greeting"},
    ),
    WEBHOOK,
    WebhookPage(items=[WEBHOOK]),
    Readiness(ready=True, engines={"local-process": True}),
)
LAUNCH = {
    "task": {"id": "7", "title": "Add a greeting", "description": "Print hello in main.py", "dependencies": ["6"]},
    "slot": {"slot_id": "example-slot1", "slot_path": "/slots/slot1", "repo_url": "https://git.example.org/a.git"},
    "pool": "local",
}
REQUESTS = {"LaunchRequest": LAUNCH, "PoolSwitch": {"enabled": False}}
REFUSALS = {
    400: ("unparsable", "not JSON: Expecting value"),
    401: ("unauthenticated", "a bearer token is needed: Authorization: Bearer TOKEN"),
    403: ("scope-missing", "the token of dashboard has no scope launch"),
    404: ("not-found", f"no runner {_ID}"),
    409: ("slot-busy", f"slot example-slot1 is held by {_ID}, which is running"),
    410: ("history-gone", "what followed revision 7 is no longer kept; the oldest is 1000"),
    413: ("context-too-large", "the task context is 1200000 bytes long, and 1000000 is the most"),
    421: ("other-node", "pool builds belongs to node replica-1; ask http://replica-1:8080"),
    422: ("invalid", "/task/id: Field required"),
    429: ("pool-full", "pool local holds 4 runners, and its max_concurrency is 4"),
    502: ("engine-nonsense", "the engine answered what nobody understands"),
    503: ("engine-unavailable", "docker: attempt 1: connection refused; attempt 2: connection refused"),
}
_LATER = frozenset({409, 429, 503})


def refusal(status: int) -> Problem:
    """Give an example of a refusal."""
    code, detail = REFUSALS[status]
    faults = [FaultRecord(pointer="/task/id", detail="Field required")] if code == "invalid" else []
    return Problem(
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        code=code,
        retryable=status in _LATER,
        request_id="9d2f6c1e8a7b4035",
        errors=faults,
    )


def add(description: dict[str, Any]) -> None:
    """Put an example beside every shape in an OpenAPI description."""
    for content in description["webhooks"]["runner"]["post"]["requestBody"]["content"].values():
        content["example"] = NOTICE.model_dump(mode="json")
    shown = {type(answer).__name__: answer for answer in ANSWERS}
    for operation in (operation for methods in description["paths"].values() for operation in methods.values()):
        for content in operation.get("requestBody", {}).get("content", {}).values():
            content["example"] = REQUESTS[_shape(content)]
        for status, response in operation["responses"].items():
            name = None
            for kind, content in response.get("content", {}).items():
                name = _shape(content) or name
                if kind == "application/problem+json":
                    content["example"] = refusal(int(status)).model_dump(mode="json", exclude={"runner"})
                elif name in shown and kind == "application/json":
                    content["example"] = shown[name].model_dump(mode="json", by_alias=True)
                elif name in shown and kind == "text/plain":
                    content["example"] = plain.text(shown[name])


def _shape(content: dict[str, Any]) -> str:
    """Name the shape of a body; the first, where there are several."""
    schema = content.get("schema", {})
    schema = next(iter(schema.get("anyOf", [])), schema)
    return str(schema.get("$ref", "")).rpartition("/")[2]
