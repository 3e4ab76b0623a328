"""Figures of open event streams: the delay from an event's commit to each client's receipt, and the memory a stream takes.

    python tests/bench/event_streams.py [--streams 1000] [--runners 100]

The service runs as its users run it, in a process of its own; clients and service share this machine's processors. Every
stream must get every event, or this fails; nothing fails on a slow machine.
"""

import argparse
import asyncio
import os
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

AT_ONCE = 4
OPENING_AT_ONCE = 50


@dataclass(slots=True)
class Stream:
    """One client: when it got which revision, in seconds since the epoch."""

    got: dict[int, float] = field(default_factory=dict)

    async def read(self, url: httpx.URL, token: str, opened: asyncio.Event) -> None:
        """Open the stream and note what comes, without looking into it: that would be this process's time."""
        reader, writer = await asyncio.open_connection(url.host, url.port)
        head = (
            f"GET /events HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\nAccept: text/event-stream\r\n\r\n"
        )
        writer.write(head.encode())
        rest = b""
        while data := await reader.read(65536):
            now = time.time()
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line == b"event: hello":
                    opened.set()
                elif line.startswith(b"id: "):
                    self.got.setdefault(int(line[4:]), now)


async def measure(home: Path, streams: int, runners: int) -> None:
    """Open the streams, let runners come and go, and print what the clients saw."""
    for name in ("slots", "state"):
        (home / name).mkdir()
    (home / "pools.yaml").write_text(
        "agent_pools:\n  local: {type: local-process, max_concurrency: 100, config: {command: ['true']}}\n"
    )
    settings = {
        "LISTEN": "127.0.0.1:0",
        "STATE_DIR": str(home / "state"),
        "POOLS_FILE": str(home / "pools.yaml"),
        "SLOT_ROOTS": str(home / "slots"),
    }
    environment = {**os.environ, **{f"RUNNER_LAUNCHER_{name}": value for name, value in settings.items()}}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "app.cli", "serve", env=environment, stderr=asyncio.subprocess.PIPE
    )
    try:
        assert process.stderr
        while b"listening on" not in (line := await process.stderr.readline()):
            if not line:
                raise SystemExit("the service did not start")
        drain = asyncio.create_task(process.stderr.read())
        url = httpx.URL(line.decode().split("listening on ")[1].split(";")[0])
        token = (home / "state" / "token").read_text().strip()
        async with httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=60) as client:
            await measure_with(client, process.pid, home / "slots", (streams, runners))
        process.terminate()
        await process.wait()
        await drain
    finally:
        if process.returncode is None:
            process.kill()


async def measure_with(client: httpx.AsyncClient, pid: int, slots: Path, counts: tuple[int, int]) -> None:
    """Measure on a service that runs."""
    streams, runners = counts
    token = client.headers["Authorization"].split()[1]
    await launch(client, slots, 0)  # so that all code is loaded
    before = memory(pid)
    clients = [Stream() for _ in range(streams)]
    opened = [asyncio.Event() for _ in clients]
    tasks = []
    for first in range(0, streams, OPENING_AT_ONCE):
        some = range(first, min(first + OPENING_AT_ONCE, streams))
        tasks += [asyncio.create_task(clients[number].read(client.base_url, token, opened[number])) for number in some]
        await asyncio.gather(*(opened[number].wait() for number in some))
    each = (memory(pid) - before) / streams
    since = (await client.get("/events", params={"limit": 500})).json()["revision"]
    turns = asyncio.Semaphore(AT_ONCE)

    async def in_turn(number: int) -> None:
        async with turns:
            await launch(client, slots, number)

    began = time.perf_counter()
    await asyncio.gather(*(in_turn(number) for number in range(1, runners + 1)))
    took = time.perf_counter() - began
    events = await all_events(client, since)
    last = max(events)
    deadline = time.monotonic() + 60
    while any(last not in one.got for one in clients) and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    for task in tasks:
        task.cancel()
    missing = sum(len(events.keys() - one.got.keys()) for one in clients)
    delays = sorted((at - events[number]) * 1000 for one in clients for number, at in one.got.items() if number in events)
    median, p99 = statistics.median(delays), delays[len(delays) * 99 // 100]
    print(
        f"{streams} streams; {len(events)} events of {runners} runners in {took:.1f} s; {len(delays) / took:,.0f} receipts/s"
    )
    print(f"delay from an event's own time to its receipt: median {median:.1f} ms, p99 {p99:.1f} ms")
    print(f"memory of the service per stream: {each:.1f} KiB")
    print(f"events that a stream did not get: {missing}")
    if missing:
        raise SystemExit(1)


async def launch(client: httpx.AsyncClient, slots: Path, number: int) -> None:
    """Launch a runner in a slot of its own, and wait for its end."""
    slot = slots / str(number)
    slot.mkdir()
    body: dict[str, Any] = {
        "task": {"id": str(number)},
        "slot": {"slot_id": str(number), "slot_path": str(slot), "repo_url": "https://git.example.org/a.git"},
        "pool": "local",
    }
    record = (await client.post("/runners", json=body)).raise_for_status().json()
    path = record["links"]["self"]
    while record["phase"] != "finished":
        tag = f'W/"{record["revision"]}"'
        answer = await client.get(path, headers={"If-None-Match": tag, "Prefer": "wait=10"})
        record = answer.json() if answer.status_code == httpx.codes.OK else record


async def all_events(client: httpx.AsyncClient, since: int) -> dict[int, float]:
    """Read the time of every event behind a revision."""
    events: dict[int, float] = {}
    while True:
        page = (await client.get("/events", params={"since": since, "limit": 500})).json()
        for event in page["items"]:
            events[event["revision"]] = datetime.fromisoformat(event["at"]).timestamp()
        since = page["revision"]
        if page["next_cursor"] is None:
            return events


def memory(pid: int) -> float:
    """Give a process's memory in KiB."""
    return float(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--runners", type=int, default=100)
    wanted = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(measure(Path(directory), wanted.streams, wanted.runners))
