"""What routes share in answering: the service behind a request, who asks, and how a runner is told."""

import base64
from http import HTTPStatus
from typing import Annotated, Any, Literal, cast

from fastapi import Depends, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from app.api import examples
from app.caller import Caller
from app.errors import Fault, InvalidRequest
from app.models import CloudEvent, Problem, RunnerRecord, runner_record
from app.runner import Runner
from app.service import RunnerService
from app.spelling import meant

API_VERSION = "0.5.0"
"""The version of the HTTP interface, apart from that of the program: whatever changes in the one raises it."""

MAX_FAULTS = 20
"""How many names that are none are told of one query."""


def service_of(request: Request) -> RunnerService:
    """Give the service behind this application."""
    return cast("RunnerService", request.app.state.service)


def caller_of(request: Request) -> Caller:
    """Give who asks; the gate has made sure of it."""
    return cast("Caller", request.scope["caller"])


async def _service(request: Request) -> RunnerService:  # what FastAPI calls without a wait is to be async: else by a thread
    return service_of(request)


async def _caller(request: Request) -> Caller:
    return caller_of(request)


Service = Annotated[RunnerService, Depends(_service)]
Who = Annotated[Caller, Depends(_caller)]


def record(request: Request, runner: Runner) -> RunnerRecord:
    """Tell a runner, with how fresh the news of its engine is."""
    answered_at, stale = service_of(request).heard(runner)
    return runner_record(runner, answered_at=answered_at, stale=stale)


def is_known(if_none_match: str | None, tag: str) -> bool:
    """Say whether a client has what bears this weak tag already (RFC 9110, 13.1.2)."""
    known = [each.strip().removeprefix("W/") for each in (if_none_match or "").split(",")]
    return tag.removeprefix("W/") in known or known == ["*"]


def next_cursor(place: int) -> str:
    """Write a place in a list so that nobody reckons with it."""
    return base64.urlsafe_b64encode(b"%d" % place).decode().rstrip("=")


def place_of(cursor: str) -> int:
    """Read a place in a list. Raises InvalidRequest."""
    try:
        place = int(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    except ValueError:
        place = -1
    if not 0 <= place <= 2**62:
        text = "this cursor was not given by this service"
        raise InvalidRequest(text, Fault("/query/cursor", text))
    return place


async def known_parameters(request: Request) -> None:
    """Refuse a query that names what the call does not know: a misspelt `dry_run` would launch. Raises InvalidRequest."""
    if not request.scope["query_string"]:
        return
    known = [field.alias for field in request.scope["route"].dependant.query_params]
    unknown = [name for name in request.query_params if name not in known][:MAX_FAULTS]
    faults = [Fault.at(("query", name), f"is not a parameter of this call{meant(name, known)}") for name in unknown]
    if faults:
        raise InvalidRequest("; ".join(f"{fault.pointer}: {fault.detail}" for fault in faults), *faults)


def next_link(request: Request, cursor: str) -> str:
    """Write the header Link that leads to the next page (RFC 8288); without a host, so that it is right behind any proxy."""
    url = request.url.include_query_params(cursor=cursor)
    return f'<{url.path}?{url.query}>; rel="next"'


def problems(*statuses: int) -> dict[int | str, dict[str, object]]:
    """Declare which problems a route may answer; every route may refuse who asks, or how."""
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {
        status: {"description": HTTPStatus(status).phrase, "content": content}
        for status in sorted({400, 401, 403, 422, 429, *statuses})
    }


WEBHOOK: dict[str, Any] = {
    "tags": ["webhooks"],
    "summary": "What targets of webhooks are told",
    "description": (
        "Of one runner in order, each at least once: `webhook-id`, which is the event's `id`, tells a repeat. Anything but "
        "2xx, or no answer in time, is tried again, ever more slowly; 410 ends it; `Retry-After` is heeded."
    ),
    "operationId": "webhooks_told",
    "security": [],
    "parameters": [
        {"name": name, "in": "header", "required": True, "description": text, "schema": {"type": "string"}}
        for name, text in {
            "webhook-id": "the event's id",
            "webhook-timestamp": "seconds since the epoch, of this try",
            "webhook-signature": "`v1,` and HMAC-SHA256 of `ID.TIMESTAMP.BODY` in base64; by each secret, a space between",
        }.items()
    ],
    "requestBody": {
        "required": True,
        "content": {"application/cloudevents+json": {"schema": {"$ref": "#/components/schemas/CloudEvent"}}},
    },
    "responses": {"2XX": {"description": "Taken; the body is not looked at"}},
}
"""What OpenAPI says of the calls that this service makes (the signature is that of Standard Webhooks)."""


def describe(app: FastAPI) -> dict[str, Any]:
    """Tell in OpenAPI also what routes cannot: the shape of problems, and that a token is needed."""
    if not app.openapi_schema:
        described = get_openapi(
            title=app.title,
            version=app.version,
            summary=app.summary,
            license_info=app.license_info,
            servers=[{"url": "/"}],
            routes=app.routes,
        )
        components = described["components"]
        told: list[tuple[type[BaseModel], Literal["serialization"]]]
        told = [(Problem, "serialization"), (CloudEvent, "serialization")]
        shapes = models_json_schema(told, ref_template="#/components/schemas/{model}")[1]["$defs"]
        components["schemas"] = dict(sorted({**components["schemas"], **shapes}.items()))
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        described["security"] = [{"token": []}]
        described["webhooks"] = {"runner": {"post": WEBHOOK}}
        examples.add(described)
        app.openapi_schema = described
    return app.openapi_schema
