"""The route of retention: what is outdated, and forgetting it now."""

from typing import Annotated, cast

from fastapi import APIRouter, Query, Request, Response

from app.api import plain
from app.api.answers import Who, problems
from app.errors import NotPermitted
from app.models import RetentionReport
from app.retention import Retention

router = APIRouter(prefix="/retention", tags=["retention"])


@router.post(
    "",
    summary="Forget what need not be kept",
    description=(
        "What the service does every hour, now: of runners that have ended, records and logs beyond what the settings keep "
        "go. A record that an engine still holds something of stays. With `dry_run` it only says what would go."
    ),
    response_model=RetentionReport,
    responses={200: plain.TEXT, **problems(503)},
)
async def sweep(
    request: Request,
    response: Response,
    who: Who,
    *,
    dry_run: Annotated[bool, Query(description="change nothing")] = False,
) -> RetentionReport | Response:
    if who.pools is not None:
        raise NotPermitted(f"the token of {who.name} is for some pools, and this is of all", code="pool-not-permitted")
    outdated = await cast("Retention", request.app.state.retention).sweep(dry_run=dry_run)
    answer = RetentionReport(records=outdated.records, logs=outdated.logs, log_bytes=outdated.log_bytes, dry_run=dry_run)
    return plain.shown(request, response, answer) or answer
