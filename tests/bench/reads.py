"""Figures of reads, from a client's clock: records beside a constant route of the same server, pages of stores of any size.

    python tests/bench/reads.py [--seconds 2] [--rounds 7] [--records 1000 100000 1000000]

Load comes from this process and is served by others. Records and the constant (``/livez``) are asked for in turn; what is
told beside requests a second is the service's own processor time for each, which other load hardly touches. Pages are asked
of one service for each size of store, in turn. Nothing here fails on a slow machine.
"""

import argparse
import asyncio
import sqlite3
import statistics
import time
from contextlib import AsyncExitStack
from pathlib import Path

from figures import Json, Report, bench
from served import Service

AT_ONCE = 8
PAGES = 40
BATCH = 10_000
POOLS = {"local": {"type": "local-process", "max_concurrency": 10, "config": {"command": ["true"]}}}


async def one_record(service: Service) -> str:
    """Launch a runner and wait for its end; gives where its record is."""
    service.slot(0).mkdir()
    async with service.client() as client:
        record, _ = await service.until_end(client, await service.launch(client, "local", 0))
        return str(record["links"]["self"])


def fill(service: Service, records: int) -> None:
    """Copy the one ended record there is, until there are so many. The service must not run."""
    [database] = (service.state).glob("*.db")
    connection = sqlite3.connect(database)
    connection.row_factory = sqlite3.Row
    row = dict(connection.execute("SELECT * FROM runners").fetchone())
    del row["seq"]
    names = ", ".join(row)
    insert = f"INSERT INTO runners ({names}) VALUES ({', '.join(f':{name}' for name in row)})"  # noqa: S608 - of a table
    for first in range(1, records, BATCH):
        copies = []
        for number in range(first, min(records, first + BATCH)):
            name = f"runner-{number:012x}"
            copies.append({**row, "runner_id": name, "body": row["body"].replace(row["runner_id"], name)})
        with connection:
            connection.executemany(insert, copies)
    connection.close()


class Connection:
    """A connection that is kept, and costs its client next to nothing."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def open(self) -> "Connection":
        host, port = self._service.url.removeprefix("http://").split(":")
        self._reader, self._writer = await asyncio.open_connection(host, int(port), limit=2**22)
        return self

    async def get(self, path: str, expected: int, **headers: str) -> dict[str, str]:
        """Ask, read the whole answer, and give its headers."""
        given = {"Host": "127.0.0.1", "Authorization": f"Bearer {self._service.token}", **headers}
        lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in given.items())
        self._writer.write(f"GET {path} HTTP/1.1\r\n{lines}\r\n".encode())
        status, *rest = (await self._reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        if int(status.split()[1]) != expected:
            raise SystemExit(f"{path} was answered {status}")
        told = {name.lower(): value for name, value in (line.split(": ", 1) for line in rest)}
        await self._reader.readexactly(int(told.get("content-length", "0")))
        return told

    def close(self) -> None:
        self._writer.close()


async def rate(service: Service, seconds: float, path: str, expected: int, **headers: str) -> tuple[float, float]:
    """Ask from several connections for a while; gives requests a second, and the service's milliseconds of CPU for each."""
    connections = [await Connection(service).open() for _ in range(AT_ONCE)]
    began, spent, count = time.perf_counter(), service.cpu_seconds(), 0

    async def ask(connection: Connection) -> None:
        nonlocal count
        while time.perf_counter() < began + seconds:
            await connection.get(path, expected, **headers)
            count += 1

    await asyncio.gather(*map(ask, connections))
    took, spent = time.perf_counter() - began, service.cpu_seconds() - spent
    for connection in connections:
        connection.close()
    return count / took, 1000 * spent / count


async def records(service: Service, path: str, options: argparse.Namespace, report: Report) -> None:
    tag = (await (await Connection(service).open()).get(path, 200))["etag"]
    ways: dict[str, tuple[str, int, dict[str, str]]] = {
        "constant": ("/livez", 200, {}),
        "record": (path, 200, {}),
        "304": (path, 304, {"If_None_Match": tag}),
    }
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(-1, options.rounds):  # the first is to warm up
        for name, (where, expected, headers) in ways.items():
            asked = await rate(service, options.seconds, where, expected, **headers)
            if number >= 0:
                seen[name].append(asked)
    figures: Json = {}
    for name, rounds in seen.items():
        figures[name] = {
            "per_second": statistics.median(each[0] for each in rounds),
            "service_ms": statistics.median(each[1] for each in rounds),
            "ratio": statistics.median(a[0] / b[0] for a, b in zip(rounds, seen["constant"], strict=True)),
        }
    report.figures["records"] = figures
    columns = [f"reads, {AT_ONCE} connections", "a second", "own processor, ms each", "to the constant"]
    report.table(columns, [[name, *each.values()] for name, each in figures.items()])
    for name in ("record", "304"):
        report.promise(f"{name} beside a constant", figures[name]["ratio"], at_least=0.6)


async def pages(services: dict[int, Service], report: Report) -> None:
    """Ask each service for its first page of 100, in turn."""
    seen: dict[int, list[float]] = {records: [] for records in services}
    connections = {records: await Connection(service).open() for records, service in services.items()}
    for number in range(-3, PAGES):
        for records, connection in connections.items():
            began = time.perf_counter()
            await connection.get("/runners?limit=100", 200)
            if number >= 0:
                seen[records].append(1000 * (time.perf_counter() - began))
    medians = {records: statistics.median(took) for records, took in seen.items()}
    report.figures["pages"] = medians
    report.table(["a page of 100, of so many records", "median, ms"], [list(row) for row in medians.items()])
    first, *others = medians.values()
    report.promise("pages beside those of the smallest store", max(others, default=first) / first, at_most=1.3)


async def measure(home: Path, options: argparse.Namespace, report: Report) -> None:
    services: dict[int, Service] = {}
    for number in options.records:
        service = services[number] = Service(home / str(number), POOLS)
        async with service.running():
            path = await one_record(service)
            if not report.figures:
                await records(service, path, options, report)
        await asyncio.to_thread(fill, service, number)
    async with AsyncExitStack() as stack:
        for service in services.values():
            await stack.enter_async_context(service.running())
        await pages(services, report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each of the rounds' three ways to ask")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--records", type=int, nargs="+", default=[1000, 100_000, 1_000_000])
    bench(parser, measure)


if __name__ == "__main__":
    main()
