"""A schema of a real PostgreSQL server for a test, dropped after it, and what may come between a client and the server.

``TEST_POSTGRES`` names a database where schemas may be made, by default that of this machine.
"""

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Literal
from urllib.parse import urlsplit

import psycopg
import pytest
from engines import missing
from psycopg.conninfo import conninfo_to_dict, make_conninfo

SERVER = os.environ.get("TEST_POSTGRES", "postgresql://postgres@127.0.0.1:5432/postgres")


@contextmanager
def fresh_schema(server: str = SERVER) -> Iterator[str]:
    """Make a schema, give a URL that leads to it, and drop it."""
    with _made(server, "SCHEMA", "CASCADE") as name:
        yield f"{server}?options=-csearch_path%3D{name}"


@contextmanager
def fresh_database(server: str = SERVER) -> Iterator[str]:
    """Make a database for what would disturb others on this server, give its URL, and drop it."""
    with _made(server, "DATABASE", "WITH (FORCE)") as name:
        yield urlsplit(server)._replace(path=f"/{name}").geturl()


@contextmanager
def _made(server: str, what: str, how_dropped: str) -> Iterator[str]:
    name = f"test_{secrets.token_hex(6)}"
    with psycopg.connect(server, autocommit=True, connect_timeout=5) as connection:
        connection.execute(f"CREATE {what} {name}")
    try:
        yield name
    finally:
        with psycopg.connect(server, autocommit=True, connect_timeout=5) as connection:
            connection.execute(f"DROP {what} {name} {how_dropped}")


class Proxy:
    """Stands between clients and the server: may cut or hold them, or lose what is said around a commit."""

    def __init__(self) -> None:
        self.lose: Literal["", "commit", "answer"] = ""
        self.lost = 0
        self._away = False
        self.flows = asyncio.Event()
        """While it is not set nothing comes through, and nobody is told."""

        self.flows.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._open: set[asyncio.StreamWriter] = set()

    @asynccontextmanager
    async def serving(self, url: str) -> AsyncIterator[str]:
        """Serve, and give the URL that leads through here."""
        where = conninfo_to_dict(url)
        self._server_at = (str(where["host"]), int(where.get("port") or 5432))
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        try:
            port = server.sockets[0].getsockname()[1]
            yield url.replace(f"{self._server_at[0]}:{self._server_at[1]}", f"127.0.0.1:{port}")
        finally:
            server.close()
            self.cut()

    def cut(self, *, away: bool = False) -> None:
        """End all connections, and while away every new one too."""
        self._away = away
        for writer in self._open:
            writer.close()
        self._open.clear()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._away:
            writer.close()
            return
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)  # nobody else holds it
        there, back = await asyncio.open_connection(*self._server_at)
        self._open |= {writer, back}
        await asyncio.gather(self._pass(reader, back, watch=True), self._pass(there, writer), return_exceptions=True)
        writer.close()
        back.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, watch: bool = False) -> None:
        while data := await reader.read(65536):
            await self.flows.wait()
            if watch and self.lose and b"COMMIT" in data:
                self.lost += 1
                if self.lose == "answer":
                    writer.write(data)
                    await writer.drain()
                    await asyncio.sleep(0.05)
                self.lose = ""
                self.cut()
                return
            writer.write(data)
            await writer.drain()


@pytest.fixture
def postgres() -> Iterator[str]:
    """The URL of an empty schema."""
    try:
        psycopg.connect(make_conninfo(SERVER, connect_timeout=5)).close()
    except psycopg.OperationalError as error:
        missing("postgres", f"needs a PostgreSQL server (TEST_POSTGRES): {error}")
    with fresh_schema() as url:
        yield url
