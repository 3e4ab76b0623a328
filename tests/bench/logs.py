"""Figures of logs, from a client's clock: how fast one is followed while it is written, and read when its runner has ended.

    python tests/bench/logs.py [--mib 32] [--rounds 5]

Runners print so many MiB in lines of 50 bytes as fast as they can, below the cap of their logs. Beside the service, in turn
with it: the same command with its output in a bare pipe; and where there is a Docker Engine a bare client, which reads the
log when the container has ended, for engines lose lines to who follows. Nothing here fails on a slow machine.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp
from bench import lacking
from docker import ENGINE, IMAGE, client_of_engine
from figures import Json, Report, bench
from served import Service

LINE = "so much to say of it all over again and once more"
PIECE = 65_536
MIB = 2**20


def command(mib: int) -> list[str]:
    """Print so much."""
    return ["sh", "-c", f"yes '{LINE}' | head -c {mib * MIB}"]


async def count(pieces: AsyncIterator[bytes], expected: int) -> float:
    """Read it all; gives how long that took."""
    began, read = time.perf_counter(), 0
    async for piece in pieces:
        read += len(piece)
    if read < expected:
        raise SystemExit(f"{read} bytes came, of {expected}")
    return time.perf_counter() - began


class Served:
    """The log of a new runner of a pool, followed and then read again."""

    def __init__(self, service: Service, client: aiohttp.ClientSession, pool: str, mib: int) -> None:
        self._service = service
        self._client = client
        self._pool = pool
        self._bytes = mib * MIB
        self._record: Json = {}
        self.cpu: dict[str, list[float]] = {"followed": [], "read after its end": []}

    async def followed(self) -> float:
        self._record = await self._service.launch(self._client, self._pool, 0)
        took = await self._all("followed", follow="true")
        await self._service.until_end(self._client, self._record)
        return took

    async def read(self) -> float:
        return await self._all("read after its end")

    async def _all(self, way: str, **query: str) -> float:
        spent = self._service.cpu_seconds()
        async with self._client.get(self._record["links"]["logs"], params=query) as answer:
            took = await count(answer.content.iter_any(), self._bytes)
        self.cpu[way].append(self._service.cpu_seconds() - spent)
        return took


async def bare_pipe(mib: int) -> float:
    process = await asyncio.create_subprocess_exec(*command(mib), stdout=asyncio.subprocess.PIPE, limit=PIECE)
    assert process.stdout

    async def pieces(stream: asyncio.StreamReader) -> AsyncIterator[bytes]:
        while piece := await stream.read(PIECE):
            yield piece

    took = await count(pieces(process.stdout), mib * MIB)
    await process.wait()
    return took


async def bare_container(mib: int) -> float:
    async with client_of_engine() as docker:
        container = await docker.containers.create({"Image": IMAGE, "Cmd": command(mib)})
        await container.start()
        try:
            await container.wait()
            asked = {"stdout": 1, "stderr": 1}
            async with docker._query(f"containers/{container.id}/logs", params=asked, timeout=None) as answer:
                return await count(answer.content.iter_any(), mib * MIB)
        finally:
            await container.delete(force=True)


async def measure(home: Path, options: argparse.Namespace, report: Report) -> None:
    kept = {"log_max_mib": 8 * options.mib}  # an engine adds to each line
    pools: Json = {
        "local": {"type": "local-process", "max_concurrency": 1, "config": kept | {"command": command(options.mib)}}
    }
    if not lacking("docker"):
        made = kept | {"command": command(options.mib), "image": IMAGE, "pull_policy": "never", "docker_host": ENGINE}
        pools["docker"] = {"type": "docker", "max_concurrency": 1, "config": made}
    service = Service(home, pools)
    service.slot(0).mkdir()
    async with service.running(), service.client() as client:
        served = {pool: Served(service, client, pool, options.mib) for pool in pools}
        ways: dict[str, Callable[[], Awaitable[float]]] = {}
        for pool, each in served.items():
            ways |= {f"{pool}, followed": each.followed, f"{pool}, read after its end": each.read}
            bare = {"local": bare_pipe, "docker": bare_container}[pool]
            ways[f"{pool}, bare"] = lambda bare=bare: bare(options.mib)  # type: ignore[misc]
        seen: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(-1, options.rounds):  # the first is to warm up
            for name, way in ways.items():
                took = await way()
                if number >= 0:
                    seen[name].append(took)
    cpu = {f"{pool}, {way}": spent[1:] for pool, each in served.items() for way, spent in each.cpu.items()}
    figures = {
        name: {
            "mib_per_second": options.mib / statistics.median(took),
            "service_ms_per_mib": 1000 * statistics.median(cpu[name]) / options.mib if name in cpu else "",
        }
        for name, took in seen.items()
    }
    report.figures["logs"] = figures
    columns = [f"a log of {options.mib} MiB", "MiB a second", "the service's processor, ms a MiB"]
    report.table(columns, [[name, *each.values()] for name, each in figures.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    bench(parser, measure)


if __name__ == "__main__":
    main()
