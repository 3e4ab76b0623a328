"""What a connection may cost: heads that are too long, too many connections, and none that say nothing for ever."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import httpx
import pytest
from conftest import Serve, Served, until

from app.connection import HEAD_SECONDS, MAX_HEAD_BYTES

GET = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n"


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
async def test_who_says_nothing_is_let_go(serve: Serve) -> None:
    async with serve() as running, connected(running) as (silent, _), connected(running) as (slow, writer):
        writer.write(GET)
        async with asyncio.timeout(HEAD_SECONDS + 10):
            assert b"head-too-slow" in await silent.read()
            assert b"head-too-slow" in await slow.read()
