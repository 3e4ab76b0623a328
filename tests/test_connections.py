"""What a connection may cost: heads that are too long, too many connections, and none that say nothing for ever."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import httpx
import pytest
import pytest_asyncio
from conftest import Serve, Served, served, until

from app.connection import MAX_HEAD_BYTES, REQUEST_SECONDS

JSON = "Content-Type: application/json\r\n"
GET = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served_once(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """One service for all that it only refuses."""
    async with served(tmp_path_factory.mktemp("served")) as running:
        yield running


@asynccontextmanager
async def connected(running: Served) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    parts = urlsplit(running.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def told(reader: asyncio.StreamReader, code: str) -> None:
    """Read a refusal, and the end of the connection."""
    async with asyncio.timeout(10):
        answer = await reader.read()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert json.loads(body)["code"] == code
    assert f"HTTP/1.1 {json.loads(body)['status']} ".encode() in head
    assert b"Connection: close" in head


@pytest.mark.parametrize("head", ["one endless header", "headers without end"])
async def test_a_head_that_never_ends_is_cut_off(serve: Serve, head: str) -> None:
    piece = b"x" * 4096 if head == "one endless header" else b"X-Header: value\r\n" * 256
    async with serve() as running, connected(running) as (reader, writer):
        writer.write(GET + b"X-Long: ")
        sent = 0
        while sent <= MAX_HEAD_BYTES + 4096:
            writer.write(piece)
            sent += len(piece)
        await told(reader, "head-too-large")
        async with running.client() as client:
            assert (await client.get("/pools")).status_code == 200


async def test_a_connection_too_many_is_refused_and_a_place_that_is_free_again_is_given(serve: Serve) -> None:
    async with serve(MAX_CONNECTIONS="2") as running:
        async with connected(running) as first, connected(running) as second, connected(running) as third:
            await told(third[0], "too-many-connections")
            for reader, writer in (first, second):
                writer.write(GET + b"\r\n")
                assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")

        async def let_in() -> bool:
            async with httpx.AsyncClient(base_url=running.url) as client:
                try:
                    return (await client.get("/livez")).status_code == 200
                except httpx.TransportError:
                    return False

        await until(let_in)


@pytest.mark.slow
async def test_who_does_not_come_to_an_end_is_let_go(serve: Serve) -> None:
    """Be it that nothing is said, or not the whole head, or not the whole body."""
    async with serve() as running, contextlib.AsyncExitStack() as stack:
        post = f"POST /runners HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {running.token}\r\n{JSON}".encode()
        said = [b"", GET, post + b"Content-Length: 9\r\n\r\n{", post + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"]
        readers = []
        for words in said:
            reader, writer = await stack.enter_async_context(connected(running))
            writer.write(words)
            readers.append(reader)
        async with asyncio.timeout(REQUEST_SECONDS + 15):
            for reader in readers:
                assert b"request-too-slow" in await reader.read()


# Requests of which two readers could think differently: where one begins, or whose it is.

HEAD = "POST /runners HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer TOKEN\r\n" + JSON
SMUGGLED = "GET /runners HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer TOKEN\r\n\r\n"
CHUNKED = "\r\n\r\n2\r\n{}\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    "request_",
    [
        HEAD + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        HEAD + "Content-Length: 2\r\nContent-Length: 0\r\n\r\n{}",
        HEAD + "Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
        HEAD + "Content-Length: 2, 2\r\n\r\n{}",
        HEAD + "Content-Length: +2\r\n\r\n{}",
        HEAD + "Content-Length: -1\r\n\r\n{}",
        HEAD + "Content-Length: 0x2\r\n\r\n{}",
        HEAD + "Content-Length: 99999999999999999999999999\r\n\r\n{}",
        HEAD + "Content-Length : 2\r\n\r\n{}",
        HEAD + "Content-\r\n Length: 2\r\n\r\n{}",
        HEAD + "Transfer-Encoding: xchunked" + CHUNKED,
        HEAD + "Transfer-Encoding: chunked, identity" + CHUNKED,
        HEAD + "Transfer-Encoding : chunked" + CHUNKED,
        HEAD + "Transfer-Encoding: \x0bchunked" + CHUNKED,
        HEAD + "Transfer-Encoding: chunked" + CHUNKED.replace("2", "0x2"),
        HEAD + "Transfer-Encoding: chunked" + CHUNKED.replace("2", "2;\nx"),
        HEAD + "Transfer-Encoding: chunked" + CHUNKED.replace("2", "fffffffffffffffff"),
        "GET /livez HTTP/1.1\nHost: localhost\n\n",
        "GET /livez HTTP/1.1\rHost: localhost\r\r",
        "GET /livez HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n",
        "CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
    ids=lambda text: ascii(text.removeprefix(HEAD))[1:50],
)
async def test_a_request_that_can_be_read_in_two_ways_is_refused_and_nothing_behind_it_read(
    served_once: Served, request_: str
) -> None:
    async with connected(served_once) as (reader, writer):
        writer.write((request_ + SMUGGLED).replace("TOKEN", served_once.token).encode("latin-1"))
        async with asyncio.timeout(30):
            answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in answer


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Host: localhost", "Host: evil.example"),
        ("Origin: http://localhost", "Origin: http://evil.example"),
        ("Authorization: Bearer TOKEN", "authorization: Bearer guessed"),
        ("Content-Type: application/json", "CONTENT-TYPE: text/plain"),
    ],
)
async def test_what_decides_who_may_come_in_may_be_said_once(served_once: Served, first: str, second: str) -> None:
    whole = {name: f"{name}: {value}" for name, value in (("Host", "localhost"), ("Authorization", "Bearer TOKEN"))}
    lines = [first, second, *(line for line in whole.values() if line != first), "Connection: close"]
    async with connected(served_once) as (reader, writer):
        head = "\r\n".join(["GET /runners HTTP/1.1", *lines, "", ""])
        writer.write(head.replace("TOKEN", served_once.token).encode())
        answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 422 ")
    assert b'"code":"said-twice"' in answer
