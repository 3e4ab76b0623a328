"""What routes share in answering: the service behind a request, who asks, and how a runner is told."""

from typing import Annotated, cast

from fastapi import Depends, Request

from app.models import Problem, RunnerRecord, runner_record
from app.runner import Runner
from app.service import Caller, RunnerService


def service_of(request: Request) -> RunnerService:
    """Give the service behind this application."""
    return cast("RunnerService", request.app.state.service)


def caller_of(request: Request) -> Caller:
    """Give who asks; the gate has made sure of it."""
    return cast("Caller", request.scope["caller"])


Service = Annotated[RunnerService, Depends(service_of)]
Who = Annotated[Caller, Depends(caller_of)]


def record(request: Request, runner: Runner) -> RunnerRecord:
    """Tell a runner, with how fresh the news of its engine is."""
    answered_at, stale = service_of(request).heard(runner)
    return runner_record(runner, answered_at=answered_at, stale=stale)


def problems(*statuses: int) -> dict[int | str, dict[str, object]]:
    """Declare which problems a route may answer; every route may refuse who asks or how."""
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"model": Problem, "content": content} for status in sorted({400, 401, 403, *statuses})}
