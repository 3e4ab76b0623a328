"""The crash test of two replicas: they share a database and an engine, and die in turn with launches in flight.

    python tests/crash/replicas.py --rounds 50 --database postgresql://... [--seed N] [--restart-database COMMAND]

Launches are asked of either replica, and so are their ends. In each round one replica dies by SIGKILL at a random instant
and stays away for a while, or the database is restarted. The judge is that of the crash test.
"""

import argparse
import asyncio
import contextlib
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import ClassVar

import containers
import httpx
from crash import LAUNCHES, OWNER, STOPPED, Containers, Launch, Service, Verdict, dispatch, judge, prepare
from typing_extensions import override

SETTLE_SECONDS = 120.0
AWAY_SECONDS = 8.0
"""Longest that a replica stays away: sometimes longer than a lease."""


class SharedContainers(Containers):
    """Containers of an engine that both replicas reach by TCP."""

    settle_seconds = SETTLE_SECONDS

    @override
    async def open(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)

    @override
    async def close(self) -> None:
        self._server.close()
        await containers.remove_all(self._name)

    @override
    async def calm(self) -> None: ...

    @override
    def arm(self, point: str, count: int, service: Service) -> None: ...

    @override
    def pool(self, environment: dict[str, str]) -> list[str]:
        lines = super().pool(environment)
        lines.append(f'      user: "{OWNER}:{OWNER}"')
        return [f"      docker_host: tcp://127.0.0.1:{self.port}" if "docker_host" in line else line for line in lines]

    port = 0
    _tasks: ClassVar[set[asyncio.Task[None]]] = set()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)  # nobody else holds it
        task.add_done_callback(self._tasks.discard)
        there, back = await asyncio.open_unix_connection(containers.ENGINE)
        await asyncio.gather(pass_on(reader, back), pass_on(there, writer), return_exceptions=True)
        writer.close()
        back.close()


async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    with contextlib.suppress(OSError, RuntimeError):
        writer.write_eof()


class Replica(Service):
    """One of them."""

    def __init__(self, home: Path, world: SharedContainers, name: str, database: str) -> None:
        super().__init__(home, world, None)
        self.settings = {
            "STATE_DIR": str(home / name),
            "NODE": name,
            "DATABASE_URL": database,
            "AUTH": "off",
            **world.settings,
        }

    @override
    async def start(self, point: str = "", count: int = 0) -> None:
        known, self.world.settings = self.world.settings, self.settings
        try:
            await super().start(point, count)
        finally:
            self.world.settings = known
        assert self.alive, (self.home / "service.log").read_text()[-2000:]


class Either(httpx.AsyncBaseTransport):
    """Asks the one and the other, as it comes."""

    def __init__(self, ports: list[int], rng: random.Random) -> None:
        self._ports = ports
        self._rng = rng
        self._transport = httpx.AsyncHTTPTransport()

    @override
    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        request.url = request.url.copy_with(port=self._rng.choice(self._ports))
        request.headers["host"] = f"127.0.0.1:{request.url.port}"
        return await self._transport.handle_async_request(request)

    @override
    async def aclose(self) -> None:
        await self._transport.aclose()


class Replicas(Service):
    """All of them, as a Dispatcher sees them."""

    def __init__(self, home: Path, world: SharedContainers, each: list[Replica], rng: random.Random) -> None:
        super().__init__(home, world, None)
        self.each = each
        self._rng = rng

    @override
    def client(self) -> httpx.AsyncClient:
        transport = Either([replica.port for replica in self.each], self._rng)
        return httpx.AsyncClient(base_url="http://127.0.0.1:1", transport=transport, timeout=60)


async def play(service: Replicas, number: int, rng: random.Random, verdict: Verdict, restart: str | None) -> None:
    launches = [
        Launch(f"task-{number}-{index}", rng.choice([0, 0, 0.05, 0.2]), rng.choice([0, 0, 3]), stop=index < STOPPED)
        for index in range(LAUNCHES)
    ]
    dispatchers = []
    for index, launch in enumerate(launches):
        if launch.stop:
            launch.seconds = 20
        slot = service.home / "slots" / f"slot-{index}"
        if not slot.exists():
            slot.mkdir(parents=True)
            os.chown(slot, OWNER, OWNER) if os.geteuid() == 0 else None
        dispatchers.append(asyncio.create_task(dispatch(service, launch, slot)))
        await asyncio.sleep(rng.uniform(0, 0.1))
    await asyncio.sleep(rng.uniform(0, 1.5))
    flying = sum(launch.asked and launch.record.get("phase") != "finished" for launch in launches)
    if restart and number % 5 == 4:
        point = "database"
        process = await asyncio.create_subprocess_shell(restart, stdout=asyncio.subprocess.DEVNULL)
        await process.wait()
    else:
        point = f"replica {number % 2}"
        victim = service.each[number % 2]
        await victim.kill()
        await asyncio.sleep(rng.uniform(0, AWAY_SECONDS))
        await victim.start()
    try:
        async with asyncio.timeout(SETTLE_SECONDS):
            await asyncio.gather(*dispatchers)
    except TimeoutError:
        waiting = [launch.record or launch.task_id for launch in launches if launch.record.get("phase") != "finished"]
        verdict.fault("lost", f"after {point}: no end in {SETTLE_SECONDS:g} s: {waiting}")
        for task in dispatchers:
            task.cancel()
        await asyncio.gather(*dispatchers, return_exceptions=True)
    if flying:
        verdict.rounds += 1
        verdict.kills[point] += 1
        verdict.in_flight[flying] += 1
    else:
        verdict.uncounted += 1
    await judge(service, launches, verdict, point)


async def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--database", required=True, help="an empty database, or a schema in its search path")
    parser.add_argument("--restart-database", help="a command that restarts its server")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    options = parser.parse_args()
    rng = random.Random(options.seed)  # noqa: S311 - a schedule, to be repeated by its seed
    home = Path(tempfile.mkdtemp(prefix="crash-"))
    world = SharedContainers(home)
    world.port = Service(home, world, None).port
    prepare(home, world)
    each = [Replica(home, world, name, options.database) for name in ("one", "other")]
    service, verdict = (
        Replicas(home, world, each, rng),
        Verdict("docker, two replicas", ["replica 0", "replica 1", "database"]),
    )
    await world.open()
    number = 0
    try:
        await asyncio.gather(each[0].start())
        await each[1].start()
        while verdict.rounds < options.rounds and number < 2 * options.rounds + 20:
            await play(service, number, rng, verdict, options.restart_database)
            number += 1
            print(f"{verdict.rounds} rounds, faults: {dict(verdict.faults)}", flush=True)
    finally:
        for replica in each:
            await replica.kill()
        await world.close()
    print(verdict.table(options.seed))
    if verdict.faults or verdict.rounds < options.rounds:
        print(f"kept for a look: {home}")
        return 1
    shutil.rmtree(home)
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
