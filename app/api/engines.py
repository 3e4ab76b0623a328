"""The route of engines: what each is and can do, and whether it answers."""

import time
from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from app.api import plain
from app.api.answers import Service, Who, problems
from app.engines import EngineState
from app.errors import NotPermitted
from app.models import EnginePage, EngineRecord, StrayRecord, SweepReport
from app.reconciler import Stray

router = APIRouter(prefix="/engines", tags=["engines"])


@router.get(
    "",
    summary="The engines, and whether they answer",
    description="Every engine that a pool names or a runner uses, as it was last heard of; nothing is asked for this.",
    response_model=EnginePage,
    responses={200: plain.TEXT, **problems()},
)
async def page(request: Request, response: Response, service: Service, who: Who) -> EnginePage | Response:
    answer = EnginePage(items=[_record(state) for state in service.engine_states(who)])
    return plain.shown(request, response, answer) or answer


@router.post(
    "/sweep",
    summary="Look for runners without a record",
    description=(
        "What the service does at its start and every few minutes, now: of this installation's own, the live are adopted "
        "and the ended removed after a grace. With `dry_run` it only says what it would do. Nothing foreign is touched."
    ),
    response_model=SweepReport,
    responses={200: plain.TEXT, **problems()},
)
async def sweep(
    request: Request,
    response: Response,
    service: Service,
    who: Who,
    *,
    dry_run: Annotated[bool, Query(description="change nothing")] = False,
) -> SweepReport | Response:
    if who.pools is not None:
        raise NotPermitted(f"the token of {who.name} is for some pools, and a sweep is of all", code="pool-not-permitted")
    items, wrong = [], {}
    for engine, found in (await service.sweep(dry_run=dry_run)).items():
        if isinstance(found, str):
            wrong[engine] = found
        else:
            items += [_stray(engine, stray) for stray in found]
    answer = SweepReport(items=items, problems=wrong)
    return plain.shown(request, response, answer) or answer


def _stray(engine: str, stray: Stray) -> StrayRecord:
    handle = stray.found.handle
    return StrayRecord(
        engine=engine,
        runner_id=handle.runner_id,
        container_id=handle.container_id,
        job_name=handle.job_name,
        created_at=datetime.fromtimestamp(stray.found.created_at, UTC),
        fate=stray.fate,
        why=stray.why,
    )


def _record(state: EngineState) -> EngineRecord:
    at = state.answered_at
    return EngineRecord(
        name=state.name,
        pools=list(state.pools),
        answers=state.answers,
        answered_at=None if at is None else datetime.fromtimestamp(at, UTC),
        age_seconds=None if at is None else max(0.0, round(time.time() - at, 3)),
        breaker="closed" if state.away_since is None else "open",
        away_since=None if state.away_since is None else datetime.fromtimestamp(state.away_since, UTC),
        problem=state.problem,
        details=dict(state.details),
    )
