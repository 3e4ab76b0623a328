"""What every request passes before a route sees it: its id, its Host and Origin, its token, the size of its body.

Host and Origin are checked because a page that a browser shows must not be able to talk to a service on this machine, be it
by a name that suddenly means 127.0.0.1. An address in digits cannot be made to mean another, so the service answers to it; a
page that comes from an address may call if it is this one, or this machine's. Heartbeats come by any name: that of a pool,
and with a runner's own token, which is in no page.
"""

import functools
import ipaddress
import logging
import re
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import log_lines
from app.api import page, plain
from app.api.auth import NOBODY, Authenticator, needed
from app.api.problems import answer
from app.caller import Caller
from app.context import Place, traceparent
from app.errors import ContextTooLarge, InvalidRequest, NotPermitted, RequestRefused, TooManyCalls

if TYPE_CHECKING:
    from app.spans import Tracing

MAX_BODY_BYTES = 4 * 1024 * 1024
"""Room for the largest context, also when a client writes every character beyond ASCII as an escape."""

OPEN = frozenset({"/livez", "/readyz", *page.FILES})
UNTRACED = OPEN | {"/metrics"}
HEARTBEAT = re.compile(r"/runners/[^/]+/heartbeat")
"""The one call that a runner makes, with a token of its own that the route checks."""

HARMLESS = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing, and leave no line in the audit log."""

audit = logging.getLogger("audit")

ONCE = ("host", "origin", "authorization", "content-type")
"""What decides who may come in; said twice, a proxy before us may have looked at the other one."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Gate:
    """Lets in requests that may come in, and names every one of them."""

    def __init__(self, app: ASGIApp, authenticator: Authenticator, public_url: str | None) -> None:
        self._app = app
        self._authenticator = authenticator
        self._due: dict[str, float] = {}
        names = {"localhost", socket.gethostname().lower(), urlsplit(public_url or "").hostname or "localhost"}
        self._names = frozenset(names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        scope["request_id"] = request_id
        log_lines.request_id.set(request_id)
        span = self._span(scope, headers)

        bodiless, told, received = scope["method"] == "HEAD", False, 0

        async def send_named(message: Message) -> None:
            nonlocal told
            if bodiless and message["type"] == "http.response.body":
                if told:
                    return
                told, message = True, {"type": "http.response.body"}  # the end of it, also of a stream that has none
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                if scope["method"] not in HARMLESS and not HEARTBEAT.fullmatch(scope["path"]):
                    _note(scope, message["status"], headers.get("location"))
                if span:
                    span.answered(scope, message["status"])
            await send(message)

        async def receive_bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES:
                raise HTTPException(413, f"the body is too long: {MAX_BODY_BYTES} is the most")
            return message

        try:
            self._admit(scope, headers)
        except RequestRefused as error:
            await answer(Request(scope), error)(scope, receive, send_named)
        else:
            # What HEAD asks for is what GET would give.
            await self._app({**scope, "method": "GET"} if bodiless else scope, receive_bounded, send_named)

    def _span(self, scope: Scope, headers: Mapping[str, str]) -> "_Span | None":
        """Begin to trace a request, if somebody wants that; those that only look whether we live are none."""
        tracing: Tracing | None = scope["app"].state.tracing
        if tracing is None or scope["path"] in UNTRACED or HEARTBEAT.fullmatch(scope["path"]):
            return None
        given = headers.get("traceparent")
        caller = traceparent(given) if given and traceparent(given) == given else None
        span = _Span(tracing, tracing.begin(scope["method"], caller), caller, time.time())
        log_lines.trace_id.set(span.place.trace_id)
        scope["traceparent"] = str(span.place)
        return span

    def _admit(self, scope: Scope, headers: Headers) -> None:
        """Raise RequestRefused unless this may come in; notes who asks."""
        if len(headers) > len(set(headers)):  # seldom, and mostly harmless
            _check_doubles(headers)
        beats = HEARTBEAT.fullmatch(scope["path"]) is not None
        self._check_names(headers, any_host=beats)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > MAX_BODY_BYTES:
            raise ContextTooLarge(f"the body is {length} bytes long, and {MAX_BODY_BYTES} is the most", code="too-large")
        if beats or scope["path"] in OPEN:
            scope["caller"] = NOBODY
        else:
            scope["caller"] = self._authenticator.caller(headers.get("authorization"))
            scope["caller"].require(needed(scope["method"], scope["path"]))
            self._count(scope["caller"])
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if (length != "0" or "transfer-encoding" in headers) and kind != "application/json":
            raise InvalidRequest("the body must be application/json, and say so in Content-Type", code="content-type")

    def _count(self, caller: Caller) -> None:
        """Refuse a call beyond a caller's rate. What is kept is when their calls so far are worked off at that rate."""
        if caller.rate is None:
            return
        now = time.monotonic()
        due = max(now, self._due.get(caller.name, now)) + 1 / caller.rate
        if (early := due - now - max(1.0, 1 / caller.rate)) > 0:
            text = f"the token of {caller.name} is for {caller.rate:g} calls a second"
            raise TooManyCalls(text, retry_after=early)
        self._due[caller.name] = due

    def _check_names(self, headers: Mapping[str, str], *, any_host: bool) -> None:
        host = _host(f"//{headers.get('host', '')}")
        if not any_host and host not in self._names and not _is_address(host):
            raise NotPermitted(f"this service does not answer for the host {host!r}", code="foreign-host")
        origin = headers.get("origin")
        if origin is not None and _host(origin) not in {*self._names, host} and not _is_loopback(_host(origin)):
            raise NotPermitted(f"pages of {origin} may not call this service", code="foreign-origin")


@dataclass(frozen=True, slots=True)
class _Span:
    """A request under way in a trace; it ends when its answer begins, for some answers have no end."""

    tracing: "Tracing"
    place: Place
    caller: str | None
    begun: float

    def answered(self, scope: Scope, status: int) -> None:
        route = getattr(scope.get("route"), "path", None)
        told = {
            "http.request.method": scope["method"],
            "http.route": route,
            "url.path": scope["path"],
            "http.response.status_code": status,
            "request.id": scope["request_id"],
        }
        name = f"{scope['method']} {route}" if route else scope["method"]
        failed = status >= HTTPStatus.INTERNAL_SERVER_ERROR
        self.tracing.request(self.place, name, self.caller, self.begun, told, failed=failed)


def _note(scope: Scope, status: int, location: str | None) -> None:
    """Write a line on a call that would change something, whatever came of it. Heartbeats, which are many, leave none."""
    query = f"?{scope['query_string'].decode('latin-1')}" if scope["query_string"] else ""
    called = plain.one_line(f"{scope['method']} {scope['path']}{query}")
    caller = scope["caller"].name if "caller" in scope else "nobody known"
    audit.info("%s: %s: %d%s (request %s)", caller, called, status, f" {location}" * bool(location), scope["request_id"])


def _check_doubles(headers: Headers) -> None:
    for name in ONCE:
        if len(headers.getlist(name)) > 1:
            raise InvalidRequest(f"a request may say {name} once", code="said-twice")


@functools.lru_cache(256)  # asked of every request, and mostly the same
def _host(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:
        return ""


@functools.lru_cache(256)
def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return _is_address(host) and ipaddress.ip_address(host).is_loopback
