"""Routes for those who keep the service running."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from starlette.responses import PlainTextResponse

from app.api.answers import Service, Who, problems
from app.errors import NotPermitted
from app.models import Readiness

router = APIRouter(tags=["health"])
alive = APIRouter(tags=["health"])
"""What refuses nothing: who is taken for dead is killed."""


@alive.get("/livez", summary="Whether the process lives", openapi_extra={"security": []})
async def livez() -> dict[str, str]:
    return {"status": "alive"}


@router.get(
    "/metrics",
    summary="Figures for Prometheus",
    response_class=PlainTextResponse,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **problems()},
)
async def metrics(request: Request, service: Service, who: Who) -> Response:
    if who.pools is not None:
        raise NotPermitted(f"the token of {who.name} is for some pools, and figures tell of all", code="pool-not-permitted")
    text, media_type = await request.app.state.telemetry.exposition(
        request.headers.get("accept", ""),
        await service.pool_states(who),
        service.engine_states(who),
        service.journal.followers,
        request.app.state.webhooks.telling(),
    )
    return Response(text, media_type=media_type)


@router.get(
    "/readyz",
    summary="Whether requests are served",
    openapi_extra={"security": []},
    responses={**problems(), 503: {"model": Readiness, "description": "Not now"}},
)
async def readyz(
    response: Response,
    service: Service,
    engine: Annotated[str | None, Query(description="also not ready if this engine, once in use, does not answer")] = None,
) -> Readiness:
    engines = service.engines()
    detail = None
    if service.draining.is_set():
        detail = "going down"
    elif not await service.store_answers():
        detail = "the store does not answer"
    elif engine is not None and not engines.get(engine, True):
        detail = f"{engine} does not answer"
    response.status_code = 503 if detail else 200
    return Readiness(ready=detail is None, detail=detail, engines=engines)
