"""A proxy in front of an engine that kills the service around a single call to it.

The service talks to the engine through the proxy, so it can die around every call of an adapter, with nothing of the adapter
replaced. A point is a call and what becomes of it: ``create-sent`` kills the service when the call is on its way, and the
engine never gets it; ``create-answered`` when the engine has acted and answered, and the service never hears of it;
``create-late`` when the call is on its way, and the engine, busy as it is, gets to it when the next service is up and has
been talking to it for a while; ``create-away`` is as ``create-answered``, and then the engine is away when the next service
comes up.

It may also stand before a database: cut it off, or hold what is said for a while.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping

LATE_SECONDS = 1.0
"""How long the next service has been up by then; no longer than the fence before it starts what it finds created."""

AWAY_SECONDS = 3.0
PIECE = 64 * 1024
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Listen = Callable[[Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]], Awaitable[asyncio.Server]]


class Proxy:
    """Passes on what goes between the service and the engine, until the point comes at which the service is to die."""

    def __init__(
        self, calls: Mapping[str, re.Pattern[bytes]], listen: Listen, connect: Callable[[], Awaitable[Connection]]
    ) -> None:
        self._calls = calls
        self._listen = listen
        self._connect = connect
        self._point, self._passes = "", 0
        self._kill: Callable[[], None] = lambda: None
        self._next_life = asyncio.Event()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def open(self) -> None:
        self._server = await self._listen(self._connected)

    async def close(self) -> None:
        self._shut()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _shut(self) -> None:
        if self._server:
            self._server.close()
            self._server = None

    def cut(self) -> None:
        """End all connections, and take no new ones until it is opened again."""
        self._shut()
        for writer in self._writers:
            writer.close()

    def hold(self) -> None:
        """Keep all that is said from now on, either way, and say nothing of it; new connections are taken, and held too."""
        self._flowing.clear()

    def flow(self) -> None:
        """Pass on what was held, and all that follows."""
        self._flowing.set()

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
        self._writers.add(writer)
        self._next_life.set()
        try:
            engine = await self._connect()
        except OSError:
            pass
        else:
            try:
                await self._carry(reader, writer, *engine)
            finally:
                engine[1].close()
        finally:
            writer.close()
            self._writers.discard(writer)
            self._connections.discard(task)

    async def _carry(
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
                if asked := self._called(data):
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
                await self._flowing.wait()
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
                await self._flowing.wait()
                writer.write(data)
                await writer.drain()

        sides = [asyncio.create_task(ask()), asyncio.create_task(answer())]
        await asyncio.wait(sides, return_when=asyncio.FIRST_COMPLETED)
        for side in sides:
            side.cancel()
        await asyncio.gather(*sides, return_exceptions=True)

    def _called(self, data: bytes) -> str:
        """Name the call that a piece begins; a client waits for each answer, so a call begins its piece."""
        return next((name for name, line in self._calls.items() if line.match(data)), "")


def missing(data: bytes) -> int:
    """Count the bytes of a call that are not among these."""
    head, _, body = data.partition(b"\r\n\r\n")
    length = _LENGTH.search(head)
    return int(length[1]) - len(body) if length else 0
