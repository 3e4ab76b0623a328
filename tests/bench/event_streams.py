"""Figures of open event streams: the delay from an event's commit to each client's receipt, and the memory a stream takes.

    python tests/bench/event_streams.py [--streams 1000] [--runners 100] [--json FILE]

The service runs as its users run it, in a process of its own; clients and service share this machine's processors. Every
stream must get every event, or this fails; nothing fails on a slow machine.
"""

import argparse
import asyncio
import resource
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
from figures import Report, bench, drive, part
from served import Service

AT_ONCE = 4
OPENING_AT_ONCE = 50
POOLS = {"local": {"type": "local-process", "max_concurrency": 100, "config": {"command": ["true"]}}}


@dataclass(slots=True)
class Stream:
    """One client: when it got which revision, in seconds since the epoch."""

    got: dict[int, float] = field(default_factory=dict)

    async def read(self, service: Service, opened: asyncio.Event) -> None:
        """Open the stream and note what comes, without looking into it: that would be this process's time."""
        url = urlsplit(service.url)
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        headers = {"Host": "localhost", "Authorization": f"Bearer {service.token}", "Accept": "text/event-stream"}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"GET /events HTTP/1.1\r\n{head}\r\n".encode())
        rest = b""
        while data := await reader.read(65536):
            now = time.time()
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line == b"event: hello":
                    opened.set()
                elif line.startswith(b"id: "):
                    self.got.setdefault(int(line[4:]), now)


async def measure(home: Path, options: argparse.Namespace, report: Report) -> None:
    """Open the streams, let runners come and go, and see what the clients got."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    service = Service(home, POOLS)
    async with service.running(), service.client() as client:
        for number in range(options.runners):
            service.slot(number).mkdir()

        async def live(number: int) -> None:
            await service.until_end(client, await service.launch(client, "local", number))

        await live(0)  # so that all code is loaded
        before = service.resident_kib()
        streams, tasks = await opened(service, options.streams)
        each = (service.resident_kib() - before) / options.streams
        async with client.get("/events", params={"limit": "500"}) as answer:
            since = (await answer.json())["revision"]
        done = await drive(options.runners, AT_ONCE, live)
        events = await all_events(client, since)
        missing = await missed(streams, events)
        for task in tasks:
            task.cancel()
    delays = [at - events[number] for one in streams for number, at in one.got.items() if number in events]
    report.figures = {
        "streams": options.streams,
        "events": len(events),
        "receipts_per_second": len(delays) / done.launched,
        "p50_ms": part(delays, 0.5),
        "p99_ms": part(delays, 0.99),
        "kib_each": each,
        "missing": missing,
    }
    columns = [
        "streams",
        "events",
        "receipts a second",
        "commit to receipt p50, ms",
        "p99, ms",
        "memory each, KiB",
        "missed",
    ]
    report.table(columns, [list(report.figures.values())])
    if missing:
        raise SystemExit(f"{missing} events did not come")


async def opened(service: Service, number: int) -> tuple[list[Stream], list[asyncio.Task[None]]]:
    """Open so many streams, some at a time."""
    streams = [Stream() for _ in range(number)]
    tasks = []
    for first in range(0, number, OPENING_AT_ONCE):
        some = [(stream, asyncio.Event()) for stream in streams[first : first + OPENING_AT_ONCE]]
        tasks += [asyncio.create_task(stream.read(service, event)) for stream, event in some]
        await asyncio.gather(*(event.wait() for _, event in some))
    return streams, tasks


async def missed(streams: Iterable[Stream], events: dict[int, float]) -> int:
    """Wait until everybody has all events, or for a minute; gives how many did not come."""
    deadline = time.monotonic() + 60
    while missing := sum(len(events.keys() - one.got.keys()) for one in streams):
        if time.monotonic() > deadline:
            break
        await asyncio.sleep(0.05)
    return missing


async def all_events(client: aiohttp.ClientSession, since: int) -> dict[int, float]:
    """Read the time of every event behind a revision."""
    events: dict[int, float] = {}
    while True:
        async with client.get("/events", params={"since": str(since), "limit": "500"}) as answer:
            page = await answer.json()
        for event in page["items"]:
            events[event["revision"]] = datetime.fromisoformat(event["at"]).timestamp()
        since = page["revision"]
        if page["next_cursor"] is None:
            return events


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--runners", type=int, default=100)
    bench(parser, measure)


if __name__ == "__main__":
    main()
