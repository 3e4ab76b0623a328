"""Figures of reads, from a client's clock: records beside a constant route of the same server, pages of stores of any size.

    python tests/bench/reads.py [--seconds 2] [--rounds 7] [--records 1000 100000 1000000] [--json FILE]

Load comes from this process and is served by others. Records and the constant (``/livez``) are asked for in turn; what is
told beside requests a second is the service's own processor time for each, which other load hardly touches. Pages are asked
of one service for each size of store, in turn. Nothing here fails on a slow machine.
"""

import argparse
import asyncio
import json
import os
import shutil
import signal
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

AT_ONCE = 8
PAGES = 40
PROMISED_RATIO, PROMISED_FLAT = 0.6, 1.3
BATCH = 10_000

Json = dict[str, Any]


class Service:
    """The service in a home, in a process of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.ready_after = 0.0
        (home / "slots" / "slot").mkdir(parents=True)
        pool = "{type: local-process, max_concurrency: 10, config: {command: ['true']}}"
        (home / "pools.yaml").write_text(f"agent_pools:\n  local: {pool}\n")

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Service"]:
        settings = {
            "LISTEN": "127.0.0.1:0",
            "STATE_DIR": str(self.home / "state"),
            "POOLS_FILE": str(self.home / "pools.yaml"),
            "SLOT_ROOTS": str(self.home / "slots"),
        }
        env = {**os.environ, **{f"RUNNER_LAUNCHER_{name}": value for name, value in settings.items()}}
        log, began = self.home / "service.log", time.perf_counter()
        with log.open("wb") as file:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "app.cli", "serve", env=env, stdout=file, stderr=file
            )
        try:
            while "listening on" not in (text := log.read_text()):
                if process.returncode is not None:
                    raise SystemExit(f"the service did not start: {text}")
                await asyncio.sleep(0.005)
            self.pid, self.url = process.pid, text.split("listening on ")[1].split(";")[0]
            self.token = (self.home / "state" / "token").read_text().strip()
            await asyncio.to_thread(httpx.get, f"{self.url}/readyz")
            self.ready_after = time.perf_counter() - began
            yield self
        finally:
            process.send_signal(signal.SIGTERM)
            await process.wait()

    def processor_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def one_record(self) -> str:
        """Launch a runner and wait for its end; gives where its record is."""
        slot = {"slot_id": "slot", "slot_path": str(self.home / "slots" / "slot"), "repo_url": "none"}
        async with httpx.AsyncClient(base_url=self.url, headers={"Authorization": f"Bearer {self.token}"}) as client:
            body = {"task": {"id": "bench"}, "slot": slot, "pool": "local"}
            path = str((await client.post("/runners", json=body)).raise_for_status().headers["Location"])
            while (await client.get(path)).json()["phase"] != "finished":
                await asyncio.sleep(0.02)
            return path

    def fill(self, records: int) -> None:
        """Copy the one ended record there is, until there are so many. The service must not run."""
        [database] = (self.home / "state").glob("*.db")
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
    began, spent, count = time.perf_counter(), service.processor_seconds(), 0

    async def ask(connection: Connection) -> None:
        nonlocal count
        while time.perf_counter() < began + seconds:
            await connection.get(path, expected, **headers)
            count += 1

    await asyncio.gather(*map(ask, connections))
    took, spent = time.perf_counter() - began, service.processor_seconds() - spent
    for connection in connections:
        connection.close()
    return count / took, 1000 * spent / count


async def records(service: Service, path: str, options: argparse.Namespace) -> Json:
    tag = (await (await Connection(service).open()).get(path, 200))["etag"]
    ways: dict[str, tuple[str, int, dict[str, str]]] = {
        "constant": ("/livez", 200, {}),
        "record": (path, 200, {}),
        "304": (path, 304, {"If_None_Match": tag}),
    }
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(-1, options.rounds):  # the first is to warm up
        for name, (where, expected, headers) in ways.items():
            figures = await rate(service, options.seconds, where, expected, **headers)
            if number >= 0:
                seen[name].append(figures)
    result: Json = {}
    for name, rounds in seen.items():
        ratio = statistics.median(a[0] / b[0] for a, b in zip(rounds, seen["constant"], strict=True))
        result[name] = {
            "per_second": statistics.median(each[0] for each in rounds),
            "service_ms": statistics.median(each[1] for each in rounds),
            "ratio": ratio,
        }
        print(
            f"{name}: {result[name]['per_second']:.0f}/s, {result[name]['service_ms']:.2f} ms of the service each, "
            f"ratio {ratio:.2f}",
            flush=True,
        )
    return result


async def pages(services: dict[int, Service]) -> Json:
    """Ask each service for its first page of 100, in turn."""
    seen: dict[int, list[float]] = {records: [] for records in services}
    connections = {records: await Connection(service).open() for records, service in services.items()}
    for number in range(-3, PAGES):
        for records, connection in connections.items():
            began = time.perf_counter()
            await connection.get("/runners?limit=100", 200)
            if number >= 0:
                seen[records].append(1000 * (time.perf_counter() - began))
    medians = {str(records): statistics.median(took) for records, took in seen.items()}
    for name, median in medians.items():
        print(f"a page of 100 of {name} records: median {median:.1f} ms", flush=True)
    first, *others = medians.values()
    return {"median_ms": medians, "ratio": max(others, default=first) / first}


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=2.0, help="for each of the rounds' three ways to ask")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--records", type=int, nargs="+", default=[1000, 100_000, 1_000_000])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="bench-"))
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.2f} before")
    try:
        result: Json = {}
        services = {}
        for number in options.records:
            service = services[number] = Service(home / str(number))
            async with service.running():
                path = await service.one_record()
                if "records" not in result:
                    result["ready_after_seconds"] = service.ready_after
                    print(f"start with an empty store to ready: {service.ready_after:.2f} s")
                    result["records"] = await records(service, path, options)
            await asyncio.to_thread(service.fill, number)
        async with _all(services):
            result["pages"] = await pages(services)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    least = min(result["records"][name]["ratio"] for name in ("record", "304"))
    print(f"promised: ratio at least {PROMISED_RATIO}, here {least:.2f}")
    print(f"promised: pages within {PROMISED_FLAT} of the smallest store's, here {result['pages']['ratio']:.2f}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


@asynccontextmanager
async def _all(services: dict[int, Service]) -> AsyncIterator[None]:
    if not services:
        yield
        return
    (first, service), *others = services.items()
    del first
    async with service.running(), _all(dict(others)):
        yield


if __name__ == "__main__":
    asyncio.run(main())
