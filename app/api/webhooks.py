"""Routes of webhooks: who is told, how far, and what waits for somebody to try it again."""

from datetime import UTC, datetime

from fastapi import APIRouter, Request, Response

from app.api import plain
from app.api.answers import Who, problems
from app.caller import Caller
from app.errors import NotPermitted
from app.ledger import Arrears
from app.models import ArrearsRecord, WebhookPage, WebhookRecord
from app.webhooks import TargetState, Webhooks

SHOWN = 100

router = APIRouter(prefix="/webhooks", tags=["webhooks"])


@router.get(
    "",
    summary="Who is told of runners, and how far",
    description="Every target of the webhooks file: whether it takes what it is told, and what it did not take.",
    response_model=WebhookPage,
    responses={200: plain.TEXT, **problems()},
)
async def page(request: Request, response: Response, who: Who) -> WebhookPage | Response:
    answer = WebhookPage(items=[_record(state) for state in await _webhooks(request, who).states()])
    return plain.shown(request, response, answer) or answer


@router.post(
    "/{name}/retry",
    summary="Try a target again",
    description="What is parked is sent again, in order, and so is all that a target has missed that said it was gone.",
    response_model=WebhookRecord,
    responses={200: plain.TEXT, **problems(404, 421, 503)},
)
async def retry(request: Request, response: Response, name: str, who: Who) -> WebhookRecord | Response:
    answer = _record(await _webhooks(request, who).retry(name))
    return plain.shown(request, response, answer) or answer


def _webhooks(request: Request, who: Caller) -> Webhooks:
    if who.pools is not None:
        raise NotPermitted(f"the token of {who.name} is for some pools, and targets hear of all", code="pool-not-permitted")
    webhooks: Webhooks = request.app.state.webhooks
    return webhooks


def _record(state: TargetState) -> WebhookRecord:
    target = state.target
    parked = sum(each.parked for each in state.arrears)
    return WebhookRecord(
        name=target.name,
        url=target.url,
        events=sorted(target.events),
        pools=None if target.pools is None else sorted(target.pools),
        state="gone" if state.gone else "failing" if state.error else "ok",
        revision=state.place,
        behind=state.behind,
        retrying=len(state.arrears) - parked,
        parked=parked,
        delivered_at=_time(state.delivered_at),
        failed_at=_time(state.failed_at),
        error=state.error,
        arrears=[_arrears(each) for each in state.arrears[:SHOWN]],
    )


def _arrears(arrears: Arrears) -> ArrearsRecord:
    return ArrearsRecord(
        runner_id=arrears.runner_id,
        revision=arrears.revision,
        attempts=arrears.attempts,
        error=arrears.error,
        since=datetime.fromtimestamp(arrears.since, UTC),
        retry_at=None if arrears.parked else datetime.fromtimestamp(arrears.retry_at, UTC),
    )


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
