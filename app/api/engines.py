"""The route of engines: what each is and can do, and whether it answers."""

import time
from datetime import UTC, datetime

from fastapi import APIRouter, Request, Response

from app.api import plain
from app.api.answers import Service, Who, problems
from app.engines import EngineState
from app.models import EnginePage, EngineRecord

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


def _record(state: EngineState) -> EngineRecord:
    at = state.answered_at
    return EngineRecord(
        name=state.name,
        pools=list(state.pools),
        answers=state.answers,
        answered_at=None if at is None else datetime.fromtimestamp(at, UTC),
        age_seconds=None if at is None else max(0.0, round(time.time() - at, 3)),
        problem=state.problem,
        details=dict(state.details),
    )
