"""Figures of containers beside a bare client of the same engine, from a client's clock.

    python tests/bench/docker.py [--launches 8] [--rounds 9] [--at-once 1 4 16 64] [--ends 100] [--json FILE]

Launches: the service over HTTP, and in turn with it a bare aiodocker client in a process of its own that makes the same
calls with the same configuration: create, context, start, and remove when the container has ended. A launch takes until the
answer says that it has started; a round takes until its last container is removed, as the engine's own events tell.
Ends: from the engine's die event to a client's receipt of the end, by long-poll; beside it, to the answer of a bare client
that looks at the container as soon as it hears that event. Programs end with 0, and with 3. Nothing here fails on a slow
machine.
"""

import argparse
import asyncio
import json
import os
import secrets
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import aiohttp
from aiodocker import Docker
from bare import Bare, obey, spec_of
from figures import Json, Report, Round, bench, compared, drive, in_turns, part, table_of_sides
from served import Service

from app.launchers.container import INSTALLATION, NAME, RUNNER_ID, Engine, container_config, context_archive

ENGINE = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
IMAGE = "busybox:latest"
ENDS_AT_ONCE = (1, 4)


class Events:
    """What the engine says of its containers of some installations, heard independently of everybody."""

    def __init__(self, installations: list[str]) -> None:
        self.installations = installations
        self.died: dict[str, float] = {}
        self.removed: dict[str, dict[str, float]] = {name: {} for name in installations}
        self._news = asyncio.Condition()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator["Events"]:
        params = {"filters": json.dumps({"type": ["container"], "event": ["die", "destroy"], "label": [INSTALLATION]})}
        async with client_of_engine() as docker, docker._query("events", params=params, timeout=None) as response:
            task = asyncio.create_task(self._listen(response))
            try:
                yield self
            finally:
                task.cancel()

    async def _listen(self, response: aiohttp.ClientResponse) -> None:
        async for line in response.content:
            event = json.loads(line)
            attributes = event["Actor"]["Attributes"]
            at = event["timeNano"] / 1e9
            if attributes[INSTALLATION] not in self.installations:
                continue
            if event["Action"] == "die":
                self.died[attributes[RUNNER_ID]] = at
            else:
                self.removed[attributes[INSTALLATION]][attributes[RUNNER_ID]] = at
            async with self._news:
                self._news.notify_all()

    async def until_removed(self, installation: str, number: int) -> float:
        """Wait until so many containers were removed; gives when the last one was."""
        async with self._news, asyncio.timeout(120):
            await self._news.wait_for(lambda: len(self.removed[installation]) >= number)
        return max(self.removed[installation].values())

    async def until_died(self, runner_id: str) -> None:
        async with self._news, asyncio.timeout(120):
            await self._news.wait_for(lambda: runner_id in self.died)


# The bare client: a process that is told by lines what to do.


async def bare(home: Path, installation: str) -> None:
    """Make the same calls as the service and no more; knows of ends by the engine's events, too."""
    async with client_of_engine() as docker:
        engine = Engine.told(await docker.system.info())
        removals: set[asyncio.Task[None]] = set()

        async def remove_ended(response: aiohttp.ClientResponse) -> None:
            async for line in response.content:
                container = docker.containers.container(json.loads(line)["Actor"]["ID"])
                removal = asyncio.create_task(container.delete(force=True, v=True))
                removals.add(removal)
                removal.add_done_callback(removals.discard)

        async def launch(number: int) -> None:
            await launch_bare(docker, engine, installation, home / "slots" / f"slot-{number}", "true")

        filters = {"type": ["container"], "event": ["die"], "label": [f"{INSTALLATION}={installation}"]}
        async with docker._query("events", params={"filters": json.dumps(filters)}, timeout=None) as response:
            task = asyncio.create_task(remove_ended(response))
            await obey(lambda launches, at_once: drive(launches, at_once, launch))
            task.cancel()


async def launch_bare(docker: Docker, engine: Engine, installation: str, slot: Path, *command: str) -> tuple[str, str]:
    runner_id = f"runner-{secrets.token_hex(6)}"
    spec = spec_of(runner_id, slot, command, image=IMAGE)
    owner = slot.stat().st_uid, slot.stat().st_gid
    config = container_config(runner_id, spec, installation=installation, owner=owner, engine=engine)
    container = await docker.containers.create(config, name=NAME + runner_id)
    await container.put_archive("/", context_archive(spec.context))  # type: ignore[no-untyped-call]
    await container.start()
    return runner_id, container.id


# What is measured.


async def launches(service: Service, beside: Bare, events: Events, options: argparse.Namespace, report: Report) -> None:
    """Let both sides launch in turn; a round is gone when its last container is removed, as the engine's own events tell."""
    figures: dict[int, Json] = {}
    async with service.client() as client:

        async def ask(number: int) -> None:
            await service.launch(client, "at-once", number)

        async def ours(count: int, at_once: int) -> Round:
            spent = service.cpu_seconds()
            done = await until_gone(events.installations[0], count, drive(count, at_once, ask))
            done.cpu = service.cpu_seconds() - spent
            return done

        async def until_gone(installation: str, count: int, run: Awaitable[Round]) -> Round:
            events.removed[installation].clear()
            began = time.time()
            done = await run
            done.gone = await events.until_removed(installation, count) - began
            await asyncio.sleep(0.2)
            return done

        async def bare_side(count: int, at_once: int) -> Round:
            return await until_gone(events.installations[1], count, beside.run(count, at_once))

        for at_once in options.at_once:
            count = max(options.launches, 2 * at_once)
            sides = {"service": partial(ours, count, at_once), "bare client": partial(bare_side, count, at_once)}
            figures[at_once] = compared(await in_turns(options.rounds, sides))
    report.figures["launches"] = figures
    table_of_sides(report, "containers", figures)
    ratio = min(each["bare client"]["ratio_gone"] for each in figures.values())
    report.promise("Docker throughput beside a bare client, launched and gone", ratio, at_least=0.95)


async def ends(service: Service, events: Events, name: str, options: argparse.Namespace, report: Report) -> None:
    """Measure from the engine's die event to the receipt of the end, by long-poll and by a bare look."""
    figures: Json = {}
    async with client_of_engine() as docker, service.client() as client:
        engine = Engine.told(await docker.system.info())

        async def ours(pool: str, number: int) -> tuple[str, float]:
            record, received = await service.until_end(client, await service.launch(client, pool, number))
            await events.until_died(record["runner_id"])  # the service may hear of it first
            return record["runner_id"], received

        async def bare(number: int) -> tuple[str, float]:
            runner_id, container_id = await launch_bare(docker, engine, name, service.slot(number), "sleep", "0.5")
            await events.until_died(runner_id)
            container = docker.containers.container(container_id)
            await container.show()
            looked = time.time()
            await container.delete(force=True, v=True)
            return runner_id, looked

        sides: dict[str, Callable[[int], Awaitable[tuple[str, float]]]] = {
            "service, of 0": partial(ours, "later"),
            "service, of 3": partial(ours, "failing"),
            "bare look": bare,
        }
        for at_once in ENDS_AT_ONCE:
            for side, end in sides.items():
                took = await delays(end, at_once, events, options.ends)
                figures[f"{side}, {at_once} at once"] = {"p50_ms": part(took, 0.5), "p99_ms": part(took, 0.99)}
    report.figures["ends"] = figures
    report.table(["die event to receipt", "p50, ms", "p99, ms"], [[side, *each.values()] for side, each in figures.items()])
    slowest = max(each["p99_ms"] for side, each in figures.items() if "service" in side)
    report.promise("a container's end is seen, p99, ms", slowest, at_most=50.0)


async def delays(
    end: Callable[[int], Awaitable[tuple[str, float]]], at_once: int, events: Events, number: int
) -> list[float]:
    received: dict[str, float] = {}

    async def one(number: int) -> None:
        runner_id, at = await end(number)
        received[runner_id] = at

    await drive(at_once, at_once, one)  # to warm up
    received.clear()
    await drive(number, at_once, one)
    return [at - events.died[runner_id] for runner_id, at in received.items()]


@asynccontextmanager
async def client_of_engine() -> AsyncIterator[Docker]:
    if ENGINE.startswith("unix://"):
        connector: aiohttp.BaseConnector = aiohttp.UnixConnector(ENGINE.removeprefix("unix://"), limit=0)
        docker = Docker("http://docker", connector, api_version="auto")
    else:
        docker = Docker(ENGINE, connector := aiohttp.TCPConnector(limit=0), api_version="auto")
    try:
        yield docker
    finally:
        await docker.close()
        await connector.close()


async def measure(home: Path, options: argparse.Namespace, report: Report) -> None:
    name = f"bench-{secrets.token_hex(4)}"
    names = name, f"{name}-bare"
    config = {"image": IMAGE, "docker_host": ENGINE}
    commands = {"at-once": ["true"], "later": ["sleep", "0.5"], "failing": ["sh", "-c", "sleep 0.5; exit 3"]}
    pools = {
        pool: {"type": "docker", "max_concurrency": 1000, "config": {**config, "command": command}}
        for pool, command in commands.items()
    }
    service, beside = Service(home, pools, installation=name), Bare(__file__, str(home), names[1])
    for number in range(max(options.launches, options.ends, *ENDS_AT_ONCE, 2 * max(options.at_once))):
        service.slot(number).mkdir()
    try:
        async with Events([*names]).listening() as events, service.running():
            if options.ends:
                await ends(service, events, names[1], options, report)
            if options.launches:
                await beside.start()  # only now: it removes whatever of its name has ended
                await launches(service, beside, events, options, report)
    finally:
        await beside.stop()
        await tidy(names)


async def tidy(names: tuple[str, str]) -> None:
    """Remove what an interrupted run has left."""
    async with client_of_engine() as docker:
        for name in names:
            filters = json.dumps({"label": [f"{INSTALLATION}={name}"]})
            for container in await docker.containers.list(all=True, filters=filters):
                await container.delete(force=True, v=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launches", type=int, default=8, help="in a round, and at least two for each at once; 0: none")
    parser.add_argument("--rounds", type=int, default=9, help="of each side at each concurrency, after one to warm up")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--ends", type=int, default=100)
    bench(parser, measure)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--bare"]:
        asyncio.run(bare(Path(sys.argv[2]), sys.argv[3]))
    else:
        main()
