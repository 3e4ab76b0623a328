"""Routes of runners: launch, read, stop, logs, history, heartbeat."""

import hashlib
import re
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Header, Path, Query, Request, Response
from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError
from starlette.responses import JSONResponse, StreamingResponse

from app.api import plain, streams
from app.api.answers import Service, Who, is_known, next_cursor, next_link, place_of, problems, record
from app.api.auth import bearer
from app.caller import Caller
from app.context import traceparent
from app.models import (
    DiagnosisRecord,
    EventPage,
    LaunchRequest,
    PreviewRecord,
    RunnerPage,
    RunnerRecord,
    diagnosis_record,
    event_record,
)
from app.runner import Phase, Runner, State
from app.service import RunnerService
from app.store import Filter

DEFAULT_WAIT_SECONDS = 30.0
MAX_WAIT_SECONDS = 300.0
MAX_PAGE = 500
MAX_GRACE_SECONDS = 86_400

router = APIRouter(tags=["runners"])

_MOMENT = re.compile(r"(\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?)([Zz]|[ +-]\d\d:?\d\d)?", re.ASCII)
_SPAN = r"^([0-9]+(\.[0-9]+)?(ms|s|m|h|d))+$"
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400}


def _written(moment: object) -> object:
    """Read a time as RFC 3339 writes it, or one so long ago; a plain number would be taken for seconds."""
    words = str(moment)
    if re.fullmatch(_SPAN, words):
        ago = sum(float(number) * _SECONDS[unit] for number, unit in re.findall(r"([0-9.]+)([a-z]+)", words))
        return datetime.fromtimestamp(max(0.0, time.time() - ago), UTC)
    if written := _MOMENT.fullmatch(words):
        return written[1] + (written[2] or "").replace(" ", "+")  # as a plus arrives that was not escaped
    raise PydanticCustomError("no_moment", "must be a time such as 2026-01-05T09:30:00Z, or a time ago such as 10m or 1h30m")


def _pair(label: str) -> str:
    if label.find("=") < 1:
        raise PydanticCustomError("no_label", "must look like key=value")
    return label


def _placed(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


Prefer = Annotated[str | None, Header(description="`wait=N` seconds for the engine's word, or `respond-async`")]
Id = Annotated[str, Path(description="a runner's id, or a beginning of it that no other has; `runner-` may be left out")]
Moment = Annotated[
    datetime,
    BeforeValidator(_written),
    AfterValidator(_placed),
    WithJsonSchema({"anyOf": [{"type": "string", "format": "date-time"}, {"type": "string", "pattern": _SPAN}]}),
]
Label = Annotated[str, AfterValidator(_pair), Field(json_schema_extra={"pattern": r"^[^=]+="})]
Key = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=255)]


@router.post(
    "/runners",
    status_code=201,
    summary="Launch a runner",
    description=(
        "Answers when the engine has accepted the launch, or with 202 when the wait is over before that. With `dry_run` "
        "nothing is launched: the answer shows what would be sent to the engine."
    ),
    response_model=RunnerRecord,
    responses={
        200: {
            "model": RunnerRecord | PreviewRecord,
            "description": "An earlier request with this Idempotency-Key, as it is now; or what a launch would be",
        },
        202: {"model": RunnerRecord, "description": "Recorded, and going on"},
        **problems(409, 413, 421, 502, 503),
    },
)
async def launch(
    request: Request,
    response: Response,
    body: LaunchRequest,
    service: Service,
    who: Who,
    *,
    dry_run: Annotated[bool, Query(description="launch nothing, and show what would be sent to the engine")] = False,
    prefer: Prefer = None,
    idempotency_key: Key = None,
) -> RunnerRecord | Response:
    trace = request.scope.get("traceparent") or traceparent(request.headers.get("traceparent"))
    if dry_run:
        preview = await _preview(service, body, who, trace)
        return plain.shown(request, response, preview) or JSONResponse(preview.model_dump(mode="json"))
    wait, applied = patience(prefer)
    launched = await service.launch(
        body,
        who,
        key=idempotency_key,
        traceparent=trace,
        wait=wait,
    )
    answer = record(request, launched.runner)
    response.headers["Location"] = answer.links.self
    if launched.replayed:
        response.headers["Idempotency-Replayed"] = "true"
    response.status_code = 202 if not launched.runner.accepted else 200 if launched.replayed else 201
    if applied:
        response.headers["Preference-Applied"] = applied
    return plain.shown(request, response, answer) or answer


@router.get(
    "/runners",
    summary="List runners, newest first",
    description="With `If-None-Match` it answers 304 while nothing in the page has changed; `Link` leads to the next page.",
    response_model=RunnerPage,
    responses={200: plain.TEXT, 304: {"description": "Unchanged"}, **problems(422)},
)
async def page(
    request: Request,
    response: Response,
    service: Service,
    who: Who,
    *,
    state: State | None = None,
    phase: Phase | None = None,
    pool: str | None = None,
    task_id: str | None = None,
    slot_id: str | None = None,
    label: Annotated[list[Label], Query(max_length=32, description="`key=value`; repeated: all of them")] = [],  # noqa: B006 - FastAPI copies it
    since: Annotated[Moment | None, Query(description="created at or after; or so long ago, as `1h30m`")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
    cursor: str | None = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> RunnerPage | Response:
    wanted = Filter(
        state=state,
        phase=phase,
        pool=pool,
        task_id=task_id,
        slot_id=slot_id,
        labels=tuple((key, value) for key, _, value in (each.partition("=") for each in label)),
        since=since.timestamp() if since else None,
        before=place_of(cursor) if cursor else None,
        limit=limit,
    )
    runners, more = await service.page(wanted, who)
    headers = {"ETag": _page_tag(service, runners, more)}
    if more is not None:
        headers["Link"] = next_link(request, next_cursor(more))
    if is_known(if_none_match, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    response.headers.update(headers)
    items = [record(request, runner) for runner in runners]
    answer = RunnerPage(items=items, next_cursor=None if more is None else next_cursor(more))
    return plain.shown(request, response, answer) or answer


@router.get(
    "/runners/{runner_id}",
    summary="What became of a runner",
    description="With `If-None-Match` and `Prefer: wait=N` it answers when the record changes, or with 304 after N seconds.",
    response_model=RunnerRecord,
    responses={200: plain.TEXT, 304: {"description": "Unchanged"}, **problems(404, 409)},
)
async def read(
    request: Request,
    response: Response,
    runner_id: Id,
    service: Service,
    who: Who,
    if_none_match: Annotated[str | None, Header()] = None,
    prefer: Prefer = None,
) -> RunnerRecord | Response:
    runner = await service.get(runner_id, who)
    answer = record(request, runner)
    if is_known(if_none_match, _tag(answer)) and (wait := patience(prefer, 0)[0]):
        answer = record(request, await service.next(runner, wait))
    if is_known(if_none_match, _tag(answer)):
        return Response(status_code=304, headers={"ETag": _tag(answer)})
    response.headers["ETag"] = _tag(answer)
    return plain.shown(request, response, answer) or answer


@router.delete(
    "/runners/{runner_id}",
    summary="Stop a runner",
    description="TERM to the whole tree, and KILL after `grace` seconds. Idempotent: 202 until it has ended, then 200.",
    response_model=RunnerRecord,
    responses={
        200: plain.TEXT,
        202: {"model": RunnerRecord, "description": "Being stopped"},
        **problems(404, 409, 421, 422),
    },
)
async def stop(
    request: Request,
    response: Response,
    runner_id: Id,
    service: Service,
    who: Who,
    grace: Annotated[float | None, Query(ge=0, le=MAX_GRACE_SECONDS, description="seconds; default: the pool's")] = None,
    force: Annotated[bool, Query(description="end the record of a runner whose engine is gone for good")] = False,
) -> RunnerRecord | Response:
    runner = await service.stop(runner_id, who, grace=grace, force=force)
    response.status_code = 200 if runner.phase is Phase.FINISHED else 202
    answer = record(request, runner)
    return plain.shown(request, response, answer) or answer


@router.get(
    "/runners/{runner_id}/logs",
    summary="A runner's output",
    description=(
        "While it runs, and after its end. `since` goes by the engine's clock. Output of local processes bears no times: "
        "of theirs a second or so more may come; nothing is left out that was written since."
    ),
    response_class=StreamingResponse,
    responses={200: plain.TEXT, **problems(404, 409, 421, 422)},
)
async def logs(
    request: Request,
    runner_id: Id,
    service: Service,
    who: Who,
    tail: Annotated[int | None, Query(ge=0, le=1_000_000, description="only the last so many lines")] = None,
    since: Annotated[Moment | None, Query(description="only what was written since; or so long ago, as `10m`")] = None,
    follow: Annotated[bool, Query(description="go on until the runner ends, and say how in a last line")] = False,
) -> StreamingResponse:
    runner = await service.get(runner_id, who)
    output = await service.logs(runner, tail=tail, since=since.timestamp() if since else None, follow=follow)
    if follow:
        output = streams.while_good(request, output)
        output = _with_ending(output, lambda: streams.parting(request, lambda: _ending(service, runner)))
    return streams.text(output)


@router.get(
    "/runners/{runner_id}/events",
    summary="A runner's history",
    description=(
        "With `follow` it goes on, in lines of text, until the runner ends; with `Accept: text/event-stream` as server-sent "
        "events, whose last one, `bye`, says how it ended. Who comes back after the end is answered 204, and need not again."
    ),
    response_model=EventPage,
    responses={200: streams.STREAM, 204: {"description": "It has ended, and was told"}, **problems(404, 409, 422)},
)
async def history(
    request: Request,
    response: Response,
    runner_id: Id,
    service: Service,
    who: Who,
    follow: Annotated[bool, Query(description="go on until the runner ends")] = False,
    last_event_id: streams.LastEventId = None,
) -> EventPage | Response:
    runner = await service.get(runner_id, who)
    if streams.is_wanted(request) or follow:
        place = streams.revision(last_event_id)
        if place and place >= runner.revision and runner.phase is Phase.FINISHED:
            return Response(status_code=204)
        lines = service.follow(runner, place or 0, streams.IDLE_SECONDS)
        return streams.told(request, lines, place or 0, lambda: _ending(service, runner))
    events = [
        event_record(event, task_id=runner.task_id, pool_name=runner.pool_name) for event in await service.history(runner)
    ]
    answer = EventPage(items=events)
    return plain.shown(request, response, answer) or answer


@router.get(
    "/runners/{runner_id}/diagnosis",
    summary="What happened to a runner, in plain words",
    description="What happened, the likely cause, what says so, and what to do next.",
    response_model=DiagnosisRecord,
    responses={200: plain.TEXT, **problems(404, 409)},
)
async def diagnosis(
    request: Request, response: Response, runner_id: Id, service: Service, who: Who
) -> DiagnosisRecord | Response:
    runner = await service.get(runner_id, who)
    answer = diagnosis_record(runner, await service.diagnosis(runner))
    return plain.shown(request, response, answer) or answer


@router.post(
    "/runners/{runner_id}/heartbeat",
    status_code=204,
    summary="A runner's sign of life",
    description="With the runner's own token, which it finds in `RUNNER_TOKEN`.",
    responses=problems(409),
)
async def heartbeat(runner_id: str, service: Service, authorization: Annotated[str | None, Header()] = None) -> None:
    await service.beat(runner_id, bearer(authorization))


def patience(prefer: str | None, default: float = DEFAULT_WAIT_SECONDS) -> tuple[float, str | None]:
    """Read how long a client would wait (RFC 7240), in seconds, and by which wish; what is not understood is ignored."""
    wishes = {
        name.strip().lower(): value.strip()
        for name, _, value in (part.partition("=") for part in re.split("[,;]", prefer or ""))
    }
    if "respond-async" in wishes:
        return 0, "respond-async"
    wish = wishes.get("wait", "")
    if not (wish.isdecimal() and wish.isascii()):
        return default, None
    wait = min(float(wish), MAX_WAIT_SECONDS)
    return wait, f"wait={wait:g}"


async def _preview(service: RunnerService, body: LaunchRequest, who: Caller, trace: str) -> PreviewRecord:
    preview = await service.preview(body, who, trace)
    return PreviewRecord(
        pool_name=preview.pool.name,
        engine=preview.pool.engine,
        refusal=preview.refusal,
        request=preview.rendered,
        task_context=preview.context,
    )


async def _with_ending(output: AsyncIterator[bytes], farewell: streams.Farewell) -> AsyncIterator[bytes]:
    """Say behind a followed log, on a line of its own, why it ends."""
    data = b"\n"
    async for data in output:
        yield data
    line = f"[{await farewell()}]\n".encode()
    yield line if data.endswith(b"\n") else b"\n" + line


async def _ending(service: RunnerService, runner: Runner) -> str:
    """Say how a runner ended, or that this is not known yet because the service goes first."""
    runner = await service.ended(runner)
    if runner.phase is not Phase.FINISHED:
        return streams.GOING_DOWN
    return plain.one_line(": ".join(filter(None, (f"{runner.runner_id} {runner.state}", runner.reason, runner.message))))


def _tag(answer: RunnerRecord) -> str:
    """Tag a record by what it says of its runner; a heartbeat changes nothing."""
    return f'W/"{answer.revision}{"s" if answer.stale else ""}"'


def _page_tag(service: RunnerService, runners: list[Runner], more: int | None) -> str:
    """Tag a page by what it says: its runners, each as it is, and whether there are more."""
    parts = [f"{runner.runner_id}:{runner.revision}:{service.heard(runner)[1]}" for runner in runners]
    return f'W/"{hashlib.sha256(f"{parts}{more}".encode()).hexdigest()[:32]}"'
