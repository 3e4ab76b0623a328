"""The engine as the crash test needs it: a proxy in front of it that kills the service, and a look at what it holds.

The service talks to the engine through the proxy, so it can die around every single call of the adapter, with nothing of
the adapter replaced. A point is a call and what becomes of it: ``create-sent`` kills the service when the call is on its
way, and the engine never gets it; ``create-answered`` when the engine has acted and answered, and the service never hears
of it; ``create-late`` when the call is on its way, and the engine, busy as it is, gets to it when the next service is up and
has been talking to it for a while; ``create-away`` is as ``create-answered``, and then the engine is away when the next
service comes up.
"""

import asyncio
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

ENGINE = Path(os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock").removeprefix("unix://"))
LABEL = "runner-launcher.installation"
RUNNER_ID = "runner-launcher.runner-id"
CALLS = {
    "create": re.compile(rb"POST \S*/containers/create\b"),
    "archive": re.compile(rb"PUT \S*/containers/[^/ ]+/archive\b"),
    "start": re.compile(rb"POST \S*/containers/[^/ ]+/start\b"),
    "inspect": re.compile(rb"GET \S*/containers/[^/ ]+/json\b"),
    "logs": re.compile(rb"GET \S*/containers/[^/ ]+/logs\b"),
    "kill": re.compile(rb"POST \S*/containers/[^/ ]+/kill\b"),
    "delete": re.compile(rb"DELETE \S*/containers/[^/ ]+"),
}
POINTS = [
    "create-sent",
    "create-answered",
    "create-late",
    "create-away",
    "archive-sent",
    "archive-answered",
    "archive-late",
    "start-sent",
    "start-answered",
    "start-late",
    "start-away",
    "inspect-answered",
    "logs-answered",
    "kill-sent",
    "kill-answered",
    "kill-late",
    "delete-sent",
    "delete-answered",
    "delete-late",
]
LATE_SECONDS = 1.0
"""How long the next service has been up by then; no longer than the fence before it starts what it finds created."""

AWAY_SECONDS = 3.0
PIECE = 64 * 1024
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Proxy:
    """Passes on what goes between the service and the engine, until the point comes at which the service is to die."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._point, self._passes = "", 0
        self._kill: Callable[[], None] = lambda: None
        self._next_life = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        self._server = await asyncio.start_unix_server(self._connected, self.path)

    async def close(self) -> None:
        self._shut()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _shut(self) -> None:
        if self._server:
            self._server.close()
            self._server = None
            self.path.unlink()

    async def come_back(self) -> None:
        """Let the engine be there again, if it is away, after the service has tried for a while."""
        if self._server is None:
            await asyncio.sleep(AWAY_SECONDS)
            await self.open()

    def arm(self, point: str, count: int, kill: Callable[[], None]) -> None:
        """Kill the service at a point, when it has come by it so many times before."""
        self._point, self._passes, self._kill = point, count, kill

    def _struck(self, point: str) -> bool:
        if point != self._point:
            return False
        self._passes -= 1
        if self._passes >= 0:
            return False
        self._point = ""
        self._next_life.clear()
        self._kill()
        return True

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._connections.add(task)
        self._next_life.set()
        try:
            engine = await asyncio.open_unix_connection(ENGINE)
        except OSError:
            pass
        else:
            try:
                await self._connect(reader, writer, *engine)
            finally:
                engine[1].close()
        finally:
            writer.close()
            self._connections.discard(task)

    async def _connect(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        engines_reader: asyncio.StreamReader,
        engines_writer: asyncio.StreamWriter,
    ) -> None:
        call = ""
        answered = asyncio.Event()

        async def ask() -> None:
            nonlocal call
            while data := await reader.read(PIECE):
                if asked := called(data):
                    call = asked
                    answered.clear()
                    data += await reader.readexactly(missing(data))
                    if self._struck(f"{call}-sent"):
                        return
                    if self._struck(f"{call}-late"):
                        await self._next_life.wait()
                        await asyncio.sleep(LATE_SECONDS)
                        engines_writer.write(data)
                        await answered.wait()
                        return
                engines_writer.write(data)
                await engines_writer.drain()

        async def answer() -> None:
            while data := await engines_reader.read(PIECE):
                if not answered.is_set():
                    answered.set()
                    if self._struck(f"{call}-answered"):
                        return
                    if self._struck(f"{call}-away"):
                        self._shut()
                        return
                writer.write(data)
                await writer.drain()

        sides = [asyncio.create_task(ask()), asyncio.create_task(answer())]
        await asyncio.wait(sides, return_when=asyncio.FIRST_COMPLETED)
        for side in sides:
            side.cancel()
        await asyncio.gather(*sides, return_exceptions=True)


def called(data: bytes) -> str:
    """Name the call that a piece begins; a client waits for each answer, so a call begins its piece."""
    return next((name for name, line in CALLS.items() if line.match(data)), "")


def missing(data: bytes) -> int:
    """Count the bytes of a call that are not among these."""
    head, _, body = data.partition(b"\r\n\r\n")
    length = _LENGTH.search(head)
    return int(length[1]) - len(body) if length else 0


async def engine_answers() -> bool:
    try:
        async with _client() as client:
            return (await client.get("/_ping")).is_success
    except httpx.TransportError:
        return False


async def listed(installation: str) -> list[dict[str, Any]]:
    """List what the engine holds of an installation, dead or alive, as it tells anybody."""
    filters = json.dumps({"label": [f"{LABEL}={installation}"]})
    async with _client() as client:
        answer = await client.get("/containers/json", params={"all": "1", "filters": filters})
        answer.raise_for_status()
        found: list[dict[str, Any]] = answer.json()
        return found


async def remove_all(installation: str) -> None:
    """Leave nothing behind, whatever the test has found."""
    async with _client() as client:
        for container in await listed(installation):
            await client.delete(f"/containers/{container['Id']}", params={"force": "1", "v": "1"})


def _client() -> httpx.AsyncClient:
    return httpx.AsyncClient(
        transport=httpx.AsyncHTTPTransport(uds=str(ENGINE)), base_url="http://engine", timeout=60, trust_env=False
    )
