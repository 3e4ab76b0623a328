"""How a refusal is told: the one table from exceptions to statuses, and the problem document (RFC 9457)."""

import logging
import random
import re
from http import HTTPStatus
from math import ceil
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

from app.api import plain
from app.api.answers import caller_of, record
from app.errors import (
    AmbiguousId,
    ContextTooLarge,
    Fault,
    HistoryGone,
    InvalidRequest,
    Misdirected,
    NotAuthenticated,
    NotFound,
    NotPermitted,
    PoolFull,
    RequestRefused,
    RunnerEnded,
    RunnerLauncherError,
    RunnerLaunchError,
    SlotBusy,
    TooManyCalls,
    Unavailable,
)
from app.models import FaultRecord, Problem, RunnerRecord
from app.reason import Reason

log = logging.getLogger(__name__)

STATUS: dict[type[RequestRefused], HTTPStatus] = {
    NotAuthenticated: HTTPStatus.UNAUTHORIZED,
    NotPermitted: HTTPStatus.FORBIDDEN,
    NotFound: HTTPStatus.NOT_FOUND,
    AmbiguousId: HTTPStatus.CONFLICT,
    InvalidRequest: HTTPStatus.UNPROCESSABLE_ENTITY,
    ContextTooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    SlotBusy: HTTPStatus.CONFLICT,
    RunnerEnded: HTTPStatus.CONFLICT,
    HistoryGone: HTTPStatus.GONE,
    PoolFull: HTTPStatus.TOO_MANY_REQUESTS,
    TooManyCalls: HTTPStatus.TOO_MANY_REQUESTS,
    Misdirected: HTTPStatus.MISDIRECTED_REQUEST,
    Unavailable: HTTPStatus.SERVICE_UNAVAILABLE,
}
LAUNCH_STATUS = {
    Reason.CANCELLED: HTTPStatus.CONFLICT,
    Reason.LOST: HTTPStatus.CONFLICT,
}
"""What a launch that failed for a reason answers; else 503 if it may work later, and 422 if it never will."""

PLAIN_CODES = {HTTPStatus.BAD_REQUEST: "unparsable", HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "too-large"}
"""What the framework's refusals are called; others by their phrase, which must not change with the Python version."""

WORDS = {"bool_parsing": "must be true or false"}
"""What is said in place of pydantic's words, by the kind of fault."""

NO_BODY = "a JSON body is needed"
OTHERS_SLOT = "the slot is held by a runner of another pool"
SPREAD_SECONDS = 5.0

_BRACES = re.compile(r"\{\w+\}")


def install(app: FastAPI) -> None:
    """Make an application tell every error as a problem."""
    app.add_exception_handler(RunnerLauncherError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _plain)
    app.add_exception_handler(Exception, _defect)


def answer(request: Request, error: RequestRefused) -> Response:
    """Tell a refusal, with the record it is about where there is one."""
    status = next(status for kind, status in STATUS.items() if isinstance(error, kind))
    headers: dict[str, str] = {}
    runner, detail = None, str(error)
    if isinstance(error, SlotBusy):
        if caller_of(request).sees(error.holder.pool_name):
            runner = record(request, error.holder)
            headers["Location"] = runner.links.self
        else:
            detail = OTHERS_SLOT
    if isinstance(error, Misdirected) and error.url:
        asked = f"?{request.url.query}" if request.url.query else ""  # a dry run is none without it
        headers["Location"] = f"{error.url}{request.url.path}{asked}"
    if isinstance(error, NotAuthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, PoolFull | TooManyCalls | Unavailable):
        crowd = not isinstance(error, TooManyCalls)  # which is about one caller alone
        headers["Retry-After"] = _retry_after(error.retry_after, SPREAD_SECONDS if crowd else 0)
    return _problem(
        request,
        status,
        error.code,
        detail,
        retryable=error.retryable,
        faults=error.faults,
        runner=runner,
        headers=headers,
    )


def _launch_failed(request: Request, error: RunnerLaunchError) -> Response:
    runner = record(request, error.runner)
    reason = error.runner.reason or Reason.LAUNCH_REJECTED
    retryable = bool(error.runner.retryable)
    status = LAUNCH_STATUS.get(reason) or (HTTPStatus.SERVICE_UNAVAILABLE if retryable else HTTPStatus.UNPROCESSABLE_ENTITY)
    headers = {"Location": runner.links.self}
    if status is HTTPStatus.SERVICE_UNAVAILABLE:
        headers["Retry-After"] = _retry_after(None)
    code = "launch-rejected" if status is HTTPStatus.UNPROCESSABLE_ENTITY else reason.replace("_", "-")
    return _problem(request, status, code, str(error), retryable=retryable, runner=runner, headers=headers)


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestRefused):
        return answer(request, error)
    if isinstance(error, RunnerLaunchError):
        return _launch_failed(request, error)
    return await _defect(request, error)


async def _invalid(request: Request, error: Exception) -> Response:
    details = error.errors() if isinstance(error, RequestValidationError) else []
    faults = [Fault.at(_place(each["loc"]), WORDS.get(each["type"], each["msg"])) for each in details]
    text = "; ".join(f"{fault.pointer or 'the body'}: {fault.detail}" for fault in faults)
    for each in details:
        if each["type"] == "json_invalid":
            return _problem(request, HTTPStatus.BAD_REQUEST, "unparsable", _not_json(error, each))
        if each["type"] == "missing" and each["loc"] == ("body",):
            return _problem(request, HTTPStatus.UNPROCESSABLE_ENTITY, "invalid", NO_BODY, faults=[Fault("", NO_BODY)])
    return _problem(request, HTTPStatus.UNPROCESSABLE_ENTITY, "invalid", text, faults=faults)


def _not_json(error: Exception, detail: dict[str, Any]) -> str:
    """Say what is no JSON, and where."""
    text, place = str(getattr(error, "body", "")), int(detail["loc"][1])
    line, column = text.count("\n", 0, place) + 1, place - text.rfind("\n", 0, place)
    return f"not JSON: {detail['ctx']['error']} (line {line}, column {column})"


async def _plain(request: Request, error: Exception) -> Response:
    """Tell what the framework refuses: no such route or method, a body that cannot be read."""
    if not isinstance(error, HTTPException):
        return await _defect(request, error)
    status = HTTPStatus(error.status_code)
    headers = dict(error.headers or {})
    if status is HTTPStatus.METHOD_NOT_ALLOWED:  # the framework names those of the first route only
        headers["Allow"] = ", ".join(_methods(request)) or headers.get("Allow", "")
    code = PLAIN_CODES.get(status) or status.phrase.lower().replace(" ", "-")
    text = f"{error.detail}: {error.__cause__}" if error.__cause__ else str(error.detail)
    if status is HTTPStatus.NOT_FOUND:
        text = f"nothing is at {request.url.path}; /openapi.json has every call"
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = headers["Allow"].split(", ")
        text = (
            f"{request.method} is not for {request.url.path}; {' and '.join(allowed)} {'is' if len(allowed) == 1 else 'are'}"
        )
    return _problem(request, status, code, text, headers=headers)


def _methods(request: Request) -> list[str]:
    """Give the methods by which a path may be called, as the description tells them."""
    paths = request.app.openapi()["paths"].items()
    here = request.url.path
    return sorted(
        {method.upper() for path, calls in paths if re.fullmatch(_BRACES.sub("[^/]+", path), here) for method in calls}
    )


async def _defect(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    text = "a defect of this service; its log has the details under the request id"
    return _problem(request, HTTPStatus.INTERNAL_SERVER_ERROR, "internal-error", text)


def _problem(
    request: Request,
    status: HTTPStatus,
    code: str,
    detail: str,
    *,
    retryable: bool = False,
    faults: tuple[Fault, ...] | list[Fault] = (),
    runner: RunnerRecord | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    problem = Problem(
        title=status.phrase,
        status=status,
        detail=detail,
        code=code,
        retryable=retryable,
        request_id=request.scope.get("request_id", ""),
        errors=[FaultRecord(pointer=fault.pointer, detail=fault.detail) for fault in faults],
        runner=runner,
    )
    headers = {**(headers or {}), "Vary": "Accept"}
    if plain.is_wanted(request):
        return PlainTextResponse(plain.text(problem), status, headers)
    text = problem.model_dump_json(by_alias=True, exclude={"runner"} if runner is None else None)
    return Response(text, status, headers, media_type="application/problem+json")


def _place(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Give the place in a body; query and header parameters keep their kind in front."""
    return location[1:] if location[:1] == ("body",) else location


def _retry_after(seconds: float | None, spread: float = SPREAD_SECONDS) -> str:
    """Spread those who were sent away over some seconds, from the first at which asking again may help."""
    return str(max(1, ceil((seconds or 0) + random.uniform(0, spread))))  # noqa: S311 - spreads load
