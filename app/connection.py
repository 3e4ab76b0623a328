"""A connection within limits: how many there are, how long the head of a request may be, and how long all of it may take.

What is refused here has no request yet, so it is told in as few words as HTTP allows. What is a request, the gate judges.
"""

import asyncio
import json
from http import HTTPStatus
from typing import Any

from typing_extensions import override
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 65_536
REQUEST_SECONDS = 30.0
"""How long a client may take to say what it wants, body included; one that says nothing holds a connection no longer."""


class Connection(HttpToolsProtocol):
    """A connection of a server that bears ``most`` of them."""

    def __init__(self, *, most: int, **given: Any) -> None:  # noqa: ANN401 - as uvicorn has it
        super().__init__(**given)
        self._most = most
        self._head: int | None = 0  # bytes of a head that is not whole yet
        self._late: asyncio.TimerHandle | None = None

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        super().connection_made(transport)
        if len(self.connections) > self._most:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "too-many-connections", f"{self._most} connections are the most")
            return
        self._late = self.loop.call_later(REQUEST_SECONDS, self._give_up)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        super().connection_lost(exc)

    @override
    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head is not None and not self.transport.is_closing():
            self._head += len(data)
            if self._head > MAX_HEAD_BYTES:
                text = f"the head of a request may have {MAX_HEAD_BYTES} bytes"
                self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "head-too-large", text)

    @override
    def on_message_begin(self) -> None:
        self._head = 0
        if self._late is None:
            self._late = self.loop.call_later(REQUEST_SECONDS, self._give_up)
        super().on_message_begin()

    @override
    def on_headers_complete(self) -> None:
        self._head = None
        super().on_headers_complete()

    @override
    def on_message_complete(self) -> None:
        self._in_time()
        super().on_message_complete()

    def _in_time(self) -> None:
        if self._late:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        if self._head is None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.close()  # amid an answer to what was not said to its end
        else:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, "request-too-slow", f"no whole request within {REQUEST_SECONDS:g} s")

    def _refuse(self, status: HTTPStatus, code: str, detail: str) -> None:
        problem = {"type": "about:blank", "title": status.phrase, "status": status, "detail": detail, "code": code}
        body = json.dumps({**problem, "retryable": status is HTTPStatus.SERVICE_UNAVAILABLE, "errors": []})
        head = f"HTTP/1.1 {status} {status.phrase}\r\nContent-Type: application/problem+json\r\nConnection: close"
        self.transport.write(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        self.transport.close()
