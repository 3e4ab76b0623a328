"""The crash test of two replicas: they share a database and an engine, and fail in turn with launches in flight.

    python tests/crash/replicas.py --rounds 50 --database postgresql://... [--kind kubernetes | local-process] [--seed N]
                                   [--fault frozen | --fault "frozen at stop-called"]... [--restart-database COMMAND]

Launches are asked of either replica, and so are their ends. In each round something befalls one replica at a random instant:
it is *killed*, and stays away for a while; it is *frozen* (SIGSTOP), also at a named point of its code (service.py), until
the other acts for it, and goes on where it was; it is *cut off* from the database, but not from the engine; or what the two
say to each other is *held* and delivered later. Or the database is restarted. The judge is that of the crash test.
"""

import argparse
import asyncio
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import containers
import httpx
import psycopg
from containers import NO_TLS
from crash import (
    LAUNCHES,
    OWNER,
    STOPPED,
    Containers,
    Jobs,
    Launch,
    LocalProcesses,
    Service,
    Verdict,
    World,
    dispatch,
    free_port,
    judge,
    judge_starts,
    prepare,
)
from proxy import Proxy
from typing_extensions import override

NAMES = ("one", "other")
POINTS = (
    "launch-called",
    "launch-returned",
    "started-committed",
    "end-observed",
    "finished-committed",
    "remove-called",
    "stop-called",
    "stop-returned",
)
"""Where a replica may be frozen: with an order to the engine about to be sent, or what it knows about to be written."""

AT = "frozen at "
FAULTS = ("killed", "frozen", "cut off", "held")
DATABASE = "database restarted"
SETTLE_SECONDS = 600.0
"""How long all may take to end on a machine that is busy; what is left on engines may be there for a fifth of it more."""
AWAY_SECONDS = 8.0
"""Longest that a replica stays away: sometimes longer than a lease."""

TAKE_OVER_SECONDS = 40.0
"""Longest that the other may take: a replica that is frozen in a transaction keeps the others waiting for ten."""

POINT_SECONDS = 15.0
LATE_SECONDS = 3.0


class SharedContainers(Containers):
    """Containers of an engine that both replicas reach by TCP."""

    settle_seconds = SETTLE_SECONDS

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self._port = free_port()
        self._proxy = Proxy(
            containers.CALLS,
            lambda connected: asyncio.start_server(connected, "127.0.0.1", self._port),
            lambda: asyncio.open_unix_connection(containers.ENGINE),
        )

    @override
    def pool(self, environment: dict[str, str]) -> list[str]:
        lines = super().pool(environment)
        lines.append(f'      user: "{OWNER}:{OWNER}"')
        return [f"      docker_host: tcp://127.0.0.1:{self._port}" if "docker_host" in line else line for line in lines]


class OwnProcesses(LocalProcesses):
    """Processes of either replica's node; nobody else can act for it."""

    settle_seconds = SETTLE_SECONDS

    @override
    def pool(self, environment: dict[str, str]) -> list[str]:
        return [*super().pool(environment), f"      node: {NAMES[environment['CODE'] == '0']}"]


WORLDS: dict[str, Callable[[Path], World]] = {
    "docker": SharedContainers,
    "kubernetes": Jobs,
    "local-process": OwnProcesses,
}


class Replica(Service):
    """One of them, with a way of its own to the database."""

    def __init__(self, home: Path, world: World, name: str, database: str) -> None:
        super().__init__(home, world, None)
        self.name = name
        where, port = urlsplit(database), free_port()
        self.line = Proxy(
            {},
            lambda connected: asyncio.start_server(connected, "127.0.0.1", port),
            lambda: asyncio.open_connection(where.hostname, where.port or 5432),
        )
        user = f"{where.username}@" if where.username else ""
        self.settings = {
            "STATE_DIR": str(home / name),
            "NODE": name,
            "DATABASE_URL": where._replace(netloc=f"{user}127.0.0.1:{port}").geturl(),
            "AUTH": "off",
        }

    @override
    async def start(self, point: str = "", count: int = 0) -> None:
        await super().start(point, count)
        assert self.alive, (self.home / "service.log").read_text()[-2000:]

    @property
    def frozen(self) -> bool:
        return self.alive and self.process is not None and _state(self.process.pid) == "T"

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._trap.unlink(missing_ok=True)
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self.process
        os.kill(self.process.pid or 0, number)

    async def freeze_at(self, point: str) -> str:
        """Have it frozen when it comes by a point, or after a while wherever it is; says where that was."""
        self._trap.write_text(point)
        try:
            async with asyncio.timeout(POINT_SECONDS):
                while not self.frozen:
                    await asyncio.sleep(0.005)
        except TimeoutError:
            self.freeze()
            return "frozen"
        return AT + point

    @property
    def _trap(self) -> Path:
        return self.home / self.name / "freeze"


def _state(pid: int | None) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""  # it has just died


class Either(httpx.AsyncBaseTransport):
    """Asks the one and the other, as it comes, but none that is frozen; goes where it is sent."""

    def __init__(self, each: list[Replica], rng: random.Random) -> None:
        self._each = each
        self._rng = rng
        self._transport = httpx.AsyncHTTPTransport(verify=NO_TLS)

    @override
    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self._ask(self._rng.choice([replica for replica in self._each if not replica.frozen]).port, request)
        if response.status_code == httpx.codes.MISDIRECTED_REQUEST and (place := response.headers.get("location")):
            await response.aclose()
            response = await self._ask(urlsplit(place).port or 0, request)
        return response

    async def _ask(self, port: int, request: httpx.Request) -> httpx.Response:
        request.url = request.url.copy_with(port=port)
        request.headers["host"] = f"127.0.0.1:{port}"
        return await self._transport.handle_async_request(request)

    @override
    async def aclose(self) -> None:
        await self._transport.aclose()


class Replicas(Service):
    """All of them, as a Dispatcher sees them."""

    def __init__(self, home: Path, world: World, each: list[Replica], database: str, rng: random.Random) -> None:
        super().__init__(home, world, None)
        self.each = each
        self._database = database
        self._rng = rng

    @override
    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url="http://127.0.0.1:1", transport=Either(self.each, self._rng), timeout=20)

    async def owner(self) -> Replica | None:
        """Say who acts on the engine that they share; None: nobody now, or they share none."""
        query = """SELECT node FROM leases WHERE key != 'webhooks' AND key NOT LIKE 'node %'
                   AND expires_at > extract(epoch FROM clock_timestamp())"""
        async with await psycopg.AsyncConnection.connect(self._database) as connection:
            row = await (await connection.execute(query)).fetchone()
        return next((replica for replica in self.each if row and replica.name == row[0]), None)

    async def taken_over_from(self, victim: Replica) -> bool:
        """Wait until somebody else acts for a replica; False if that takes too long."""
        try:
            async with asyncio.timeout(TAKE_OVER_SECONDS):
                while await self.owner() in (victim, None):
                    await asyncio.sleep(0.1)
        except TimeoutError:
            return False
        return True


class Round:
    """One round: its launches, and what befalls a replica meanwhile."""

    def __init__(self, service: Replicas, number: int, rng: random.Random, verdict: Verdict) -> None:
        self._service = service
        self._victim = service.each[number % 2]
        self._patient = number % 3 == 0
        self._rng = rng
        self._verdict = verdict
        self._flying = 0
        self.launches = [
            Launch(
                f"task-{number}-{index}",
                rng.choice([0, 0, 0.05, 0.2]),
                rng.choice([0, 0, 3]),
                stop=index < STOPPED,
                stop_early=rng.random() < service.world.early_stops,
            )
            for index in range(LAUNCHES)
        ]
        self._dispatchers: list[asyncio.Task[None]] = []

    async def play(self, fault: str, restart: str) -> None:
        """Launch, let it happen, wait for all ends, and judge."""
        trap = None
        if fault.startswith("frozen"):
            self._victim = await self._service.owner() or self._victim
        if fault.startswith(AT):
            trap = asyncio.create_task(self._victim.freeze_at(fault.removeprefix(AT)))
        await self._launch()
        if not trap:
            await asyncio.sleep(self._rng.uniform(0, 1.5))
        match fault:
            case "killed":
                self._count()
                await self._victim.kill()
                await self._away()
                await self._victim.start()
            case "cut off":
                self._count()
                self._victim.line.cut()
                await self._away()
                await self._victim.line.open()
            case "held":
                self._count()
                self._victim.line.hold()
                await self._away()
                self._victim.line.flow()
            case _ if fault == DATABASE:
                self._count()
                await (await asyncio.create_subprocess_shell(restart, stdout=asyncio.subprocess.DEVNULL)).wait()
            case _:
                if trap:
                    fault = await trap
                self._victim.freeze()
                self._count()
                await self._frozen(fault)
        await self._settle(fault)
        if self._flying:
            self._verdict.rounds += 1
            self._verdict.kills[fault] += 1
            self._verdict.in_flight[self._flying] += 1
        else:
            self._verdict.uncounted += 1
        await judge(self._service, self.launches, self._verdict, fault)

    async def _launch(self) -> None:
        for index, launch in enumerate(self.launches):
            if launch.stop:
                launch.seconds = 20
            slot = self._service.home / "slots" / f"slot-{index}"
            if not slot.exists():
                slot.mkdir(parents=True)
                os.chown(slot, OWNER, OWNER) if os.geteuid() == 0 else None
            self._dispatchers.append(asyncio.create_task(dispatch(self._service, launch, slot)))
            await asyncio.sleep(self._rng.uniform(0, self._service.world.spread_seconds))

    def _count(self) -> None:
        self._flying = sum(launch.asked and launch.record.get("phase") != "finished" for launch in self.launches)

    async def _away(self) -> None:
        await asyncio.sleep(self._rng.uniform(0, AWAY_SECONDS))

    async def _frozen(self, fault: str) -> None:
        """Thaw it once another acts for it: at once, a little later, or when all has ended."""
        victim, owner = self._victim, await self._service.owner()
        if owner is None:  # nobody can
            await asyncio.sleep(self._rng.uniform(AWAY_SECONDS / 2, 2 * AWAY_SECONDS))
        else:
            if not await self._service.taken_over_from(victim):
                self._verdict.fault("lost", f"after {fault}: nobody acts for it after {TAKE_OVER_SECONDS:g} s")
            if self._patient:
                await asyncio.wait(self._dispatchers, timeout=SETTLE_SECONDS / 2)
            await asyncio.sleep(self._rng.choice([0, self._rng.uniform(0, LATE_SECONDS)]))
        victim.thaw()

    async def _settle(self, fault: str) -> None:
        seconds = max(SETTLE_SECONDS, self._service.world.settle_seconds)
        _, waiting = await asyncio.wait(self._dispatchers, timeout=seconds)
        if waiting:
            still = [launch.record or launch.task_id for launch in self.launches if launch.record.get("phase") != "finished"]
            self._verdict.fault("lost", f"after {fault}: no end in {seconds:g} s: {still}")
        for task in waiting:
            task.cancel()
        await asyncio.gather(*self._dispatchers, return_exceptions=bool(waiting))


def faults(wanted: list[str] | None, restart: str | None) -> list[str]:
    """Give the faults of a whole turn: what was wished for, or each often and freezing at every point."""
    kinds = [*FAULTS, *([DATABASE] if restart else [])]
    return wanted or [fault for point in POINTS for fault in (AT + point, *kinds)]


async def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--kind", default="docker", choices=[*WORLDS])
    parser.add_argument("--database", required=True, help="an empty database, or a schema in its search path")
    parser.add_argument("--restart-database", help="a command that restarts its server")
    parser.add_argument(
        "--fault",
        action="append",
        choices=[*FAULTS, *(AT + point for point in POINTS)],
        help="what befalls them: this alone, or these in turn",
    )
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    options = parser.parse_args()
    rng = random.Random(options.seed)  # noqa: S311 - a schedule, to be repeated by its seed
    home = Path(tempfile.mkdtemp(prefix="crash-"))
    world = WORLDS[options.kind](home)
    turn = faults(options.fault, options.restart_database)
    each = [Replica(home, world, name, options.database) for name in NAMES]
    service = Replicas(home, world, each, options.database, rng)
    verdict = Verdict(f"{options.kind}, two replicas", [*turn, "frozen"])
    number = 0
    try:
        await world.open()
        prepare(home, world)
        for replica in each:
            await replica.line.open()
            await replica.start()
        while verdict.rounds < options.rounds and number < 2 * options.rounds + 20:
            await Round(service, number, rng, verdict).play(turn[number % len(turn)], options.restart_database or "")
            number += 1
            print(f"{verdict.rounds} rounds, faults: {dict(verdict.faults)}", flush=True)
        judge_starts(home, verdict)
    finally:
        for replica in each:
            await replica.kill()
            await replica.line.close()
        await world.close()
    print(verdict.table(options.seed))
    if verdict.faults or verdict.rounds < options.rounds:
        print(f"kept for a look: {home}")
        return 1
    shutil.rmtree(home)
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
