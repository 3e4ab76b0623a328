"""Routes of pools: how they are configured and used, and the switch."""

from fastapi import APIRouter, Request, Response

from app.api import plain
from app.api.answers import Service, Who, problems
from app.models import PoolPage, PoolRecord, PoolSwitch
from app.service import PoolState

router = APIRouter(prefix="/pools", tags=["pools"])


@router.get("", summary="All pools and their use", response_model=PoolPage, responses={200: plain.TEXT, **problems()})
async def page(request: Request, response: Response, service: Service, who: Who) -> PoolPage | Response:
    answer = PoolPage(items=[_record(state) for state in await service.pool_states(who)])
    return plain.shown(request, response, answer) or answer


@router.get(
    "/{name:path}", summary="A pool and its use", response_model=PoolRecord, responses={200: plain.TEXT, **problems(404)}
)
async def read(request: Request, response: Response, name: str, service: Service, who: Who) -> PoolRecord | Response:
    answer = _record(await service.pool_state(name, who))
    return plain.shown(request, response, answer) or answer


@router.patch(
    "/{name:path}",
    summary="Switch a pool on or off",
    response_model=PoolRecord,
    responses={200: plain.TEXT, **problems(404, 413, 422)},
)
async def switch(
    request: Request, response: Response, name: str, body: PoolSwitch, service: Service, who: Who
) -> PoolRecord | Response:
    answer = _record(await service.switch_pool(name, who, enabled=body.enabled))
    return plain.shown(request, response, answer) or answer


def _record(state: PoolState) -> PoolRecord:
    return PoolRecord(
        pool_name=state.pool.name,
        type=state.pool.type,
        enabled=state.enabled,
        max_concurrency=state.pool.max_concurrency,
        current_running=state.usage.runners,
        utilization=state.usage.runners / state.pool.max_concurrency,
        cpu_usage=state.usage.cpu,
        memory_usage=state.usage.memory_mib,
        cpu_quota=state.pool.cpu_quota,
        memory_quota=state.pool.memory_quota,
        queued=state.queued,
        launching=state.usage.launching,
    )
