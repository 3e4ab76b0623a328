"""Answers without an end: events as server-sent events or as lines, and how such an answer takes its leave.

A stream is silent for no longer than IDLE_SECONDS, so that nobody in between takes it for dead, and its last word says
why it ends. What it has yet to say is not kept for it: it reads on as fast as its client does.
"""

import functools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Annotated, TypeVar

from fastapi import Header, Request
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from starlette.responses import StreamingResponse

from app.api import plain
from app.api.answers import caller_of
from app.api.auth import Authenticator
from app.errors import Fault, InvalidRequest
from app.journal import KEPT, Line

IDLE_SECONDS = 15.0
RETRY_MILLISECONDS = 1000
GOING_DOWN = "the service is going down; ask again to follow on"
REVOKED = "the token is no longer good"

EVENT_STREAM = "text/event-stream"
STREAM = {"content": {**plain.TEXT["content"], EVENT_STREAM: {"schema": {"type": "string"}}}}
"""What a route that can answer in all three ways declares."""

LastEventId = Annotated[str | None, Header(alias="Last-Event-ID", description="the last revision received; beats `since`")]

Lines = AsyncIterator[Sequence[Line]]
Farewell = Callable[[], Awaitable[str]]

T = TypeVar("T")


def is_wanted(request: Request) -> bool:
    """Say whether a client asks for server-sent events."""
    return EVENT_STREAM in request.headers.get("accept", "").lower()


def told(request: Request, lines: Lines, place: int, farewell: Farewell) -> StreamingResponse:
    """Answer with events as they come, in the form that the client asks for."""
    lines, last_words = while_good(request, lines), functools.partial(parting, request, farewell)
    if is_wanted(request):  # and nothing on the way may keep them back
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", "Vary": "Accept"}
        return EventSourceResponse(_frames(lines, place, last_words), headers=headers)
    return text(_texts(lines, last_words))


def text(pieces: AsyncIterator[bytes]) -> StreamingResponse:
    """Answer with text as it comes."""
    return StreamingResponse(pieces, media_type="text/plain; charset=utf-8", headers={"X-Content-Type-Options": "nosniff"})


async def while_good(request: Request, pieces: AsyncIterator[T]) -> AsyncIterator[T]:
    """Give an answer's pieces for as long as the token that asked for it stands for the same caller."""
    async for piece in pieces:
        if not _is_good(request):
            return
        yield piece


async def parting(request: Request, farewell: Farewell) -> str:
    """Say why an answer ends."""
    return await farewell() if _is_good(request) else REVOKED


def _is_good(request: Request) -> bool:
    authenticator: Authenticator = request.app.state.authenticator
    return authenticator.still(request.headers.get("authorization"), caller_of(request))


def revision(last_event_id: str | None) -> int | None:
    """Read where a client that comes back has been. Raises InvalidRequest."""
    if last_event_id is None:
        return None
    if last_event_id.isdecimal() and last_event_id.isascii():
        return min(int(last_event_id[:20]), 2**62)
    detail = "this id was not given by this service"
    raise InvalidRequest(detail, Fault("/header/Last-Event-ID", detail))


async def _frames(batches: Lines, place: int, farewell: Farewell) -> AsyncIterator[bytes]:
    """Write events as server-sent events: first where the stream begins, at last why it ends."""
    yield format_sse_event(event="hello", data_str="{}", id=str(place), retry=RETRY_MILLISECONDS)
    async for lines in batches:
        yield b"".join(_frame(line.revision, line.json) for line in lines) or KEEPALIVE_COMMENT
    yield format_sse_event(event="bye", data_str=json.dumps({"detail": await farewell()}))


async def _texts(batches: Lines, farewell: Farewell) -> AsyncIterator[bytes]:
    """Write events as lines, and why there are no more."""
    async for lines in batches:
        for line in lines:
            yield plain.event_line(line.record).encode()
    yield f"[{await farewell()}]\n".encode()


@functools.lru_cache(maxsize=KEPT)
def _frame(revision: int, json: str) -> bytes:
    return format_sse_event(data_str=json, id=str(revision))
