"""How far one replica goes: a simulation with the fake launcher, whose runners are only in memory.

    python tests/bench/scale.py [--live 1000 3000 10000] [--rates 25 50 100 200 400] [--database URL] [--json FILE]

The service is real, with its HTTP, its store and its reconciler, in a process of its own; only the engine costs nothing.
First it holds more and more live runners, and beside them launches some that end at once: the curve of throughput and memory
against live runners. With the most of them it is killed and started again. Then another one is asked for such launches at
higher and higher rates, whether or not it has answered: the curve against the launch rate, up to the first that it does not
keep up with. What the fake engine itself takes of memory is subtracted, and the time to give it its runners back.
"""

import argparse
import asyncio
import json
import signal
import sqlite3
import sys
import time
from collections import defaultdict
from contextlib import closing
from functools import partial
from pathlib import Path

import aiohttp
from bare import spec_of
from figures import Report, bench, drive, part
from served import Service, private_kib

from app.launchers.fake import FakeLauncher, FakeWorld
from app.log_lines import write_log
from app.main import create_app
from app.server import serve_until_told
from app.settings import load_settings

AT_ONCE = 16
FILLING_AT_ONCE = 64
KEPT_UP = 0.95
"""The share of a rate that must be answered within its time, for it to count as kept up with."""

RECALLED = "the engine was given its runners back in "

COMMANDS = {"live": ["fake"], "brief": ["fake", "after=0.05", "exit=0"]}
POOLS = {
    name: {"type": "kubernetes", "max_concurrency": 1_000_000, "config": {"image": "none", "command": command}}
    for name, command in COMMANDS.items()
}


async def serve() -> None:
    """Be the service, with an engine that is only in memory."""
    write_log("text")
    worlds: defaultdict[str, FakeWorld] = defaultdict(FakeWorld)
    settings, began, spent = load_settings(), time.perf_counter(), time.process_time()
    recall(settings.state_dir / "runners.db", worlds)
    print(f"{RECALLED}{time.perf_counter() - began:.3f} s, {time.process_time() - spent:.3f} s on a processor", flush=True)
    await serve_until_told(settings, partial(create_app, launchers=lambda engine: FakeLauncher(worlds[engine])))


def recall(database: Path, worlds: defaultdict[str, FakeWorld]) -> None:
    """Give the engine its runners back, which died with a service that was killed."""
    if not database.exists():
        return
    live = "SELECT runner_id, json_extract(body, '$.engine') FROM runners WHERE phase != 'finished'"
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        for runner_id, engine in connection.execute(live):
            worlds[engine].start("fake", runner_id, spec_of(runner_id, Path("/slots/slot"), ("fake",)))


def weigh(runners: int) -> float:
    """Say how many KiB each of so many runners takes of the fake engine alone; meant for a process of its own."""
    world, spec = FakeWorld(), spec_of("runner-000000000000", Path("/slots/slot"), ("fake",))
    before = private_kib("self")
    for number in range(runners):
        world.start("bench", f"runner-{number:012x}", spec)
    return (private_kib("self") - before) / runners


async def fake_weight(runners: int) -> float:
    command = (sys.executable, __file__, "--weigh", str(runners))
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    said, _ = await process.communicate()
    return float(json.loads(said))


async def against_live(service: Service, client: aiohttp.ClientSession, options: argparse.Namespace, report: Report) -> None:
    """Hold more and more runners, and see what each takes and what a launch beside them costs."""
    numbers = iter(range(1_000_000_000))

    async def launch(pool: str, _: int) -> None:
        await service.launch(client, pool, next(numbers))

    fresh = service.private_kib()
    await drive(options.launches, AT_ONCE, partial(launch, "brief"))  # so that all code is loaded
    empty, rows, held = service.private_kib(), list[list[float]](), 0
    fake = await fake_weight(max(options.live))
    for live in sorted(options.live):
        await drive(live - held, FILLING_AT_ONCE, partial(launch, "live"))
        held = live
        each = (service.private_kib() - empty) / live - fake
        spent, began = service.cpu_seconds(), time.perf_counter()
        await asyncio.sleep(options.rest)
        rest = (service.cpu_seconds() - spent) / (time.perf_counter() - began)
        spent = service.cpu_seconds()
        done = await drive(options.launches, AT_ONCE, partial(launch, "brief"))
        await ended(client, "brief")
        cpu = 1000 * (service.cpu_seconds() - spent) / options.launches
        rows.append(
            [live, each, 100 * rest, options.launches / done.launched, *(part(done.took, p) for p in (0.5, 0.99)), cpu]
        )
        print(f"{live} live", flush=True)
    columns = ["live runners", "memory each, KiB", "of a core at rest, %", f"launches a second, {AT_ONCE} at once"]
    columns += ["p50, ms", "p99, ms", "own processor for each life, ms"]
    report.figures["against live runners"] = [dict(zip(columns, row, strict=True)) for row in rows]
    report.table(columns, rows)
    report.promise(f"memory for each of {max(options.live)} live runners, KiB", rows[-1][1], at_most=20.0)
    if not options.database:
        await again(service, options, fresh + fake * max(options.live), report)


async def again(service: Service, options: argparse.Namespace, without: float, report: Report) -> None:
    """Kill a service with many live runners and start it again; ``without`` runners it would take so many KiB."""
    live = max(options.live)
    await service.end(signal.SIGKILL)
    took = await service.start()
    spent = service.cpu_seconds()
    said = (service.home / "service.log").read_text().split(RECALLED)[1].split()
    recalled, recalling = float(said[0]), float(said[2])
    async with service.client() as client:
        began = time.perf_counter()
        await service.launch(client, "brief", 1_000_000_000)
        launched = time.perf_counter() - began
        await asyncio.sleep(options.rest)
        async with client.get("/pools/live") as answer:
            if (found := (await answer.json())["current_running"]) != live:
                raise SystemExit(f"of {live} runners {found} were found again")
    figures = {
        "live": live,
        "ready_seconds": took - recalled,
        "ready_cpu_seconds": spent - recalling,
        "recalled_seconds": recalled,
        "first_launch_seconds": launched,
        "cpu_seconds": service.cpu_seconds() - recalling,
        "kib_each": (service.private_kib() - without) / live,
    }
    report.figures["killed and started again"] = figures
    names = {
        "ready_seconds": "ready after, s",
        "ready_cpu_seconds": "of that on a processor, s",
        "recalled_seconds": "beside what the fake engine took for its own, s",
        "first_launch_seconds": "a launch at that moment takes, s",
        "cpu_seconds": f"processor until it has looked at all, at most {options.rest:g} s later, s",
        "kib_each": "memory for each then, KiB",
    }
    head = [f"killed with {live:,} live runners, and started again", ""]
    report.table(head, [[names[key], figures[key]] for key in names])
    report.promise(f"restart to ready with {live} live runners, s", figures["ready_seconds"], at_most=5.0)


async def against_rate(service: Service, client: aiohttp.ClientSession, options: argparse.Namespace, report: Report) -> None:
    """Ask for launches at higher and higher rates; a launch that is late counts from when it was due."""
    rows = []
    for rate in sorted(options.rates):
        count = max(1, round(rate * options.seconds))
        took: list[float] = []
        began, spent = time.perf_counter(), service.cpu_seconds()

        async def launch(number: int, began: float = began, rate: float = rate, took: list[float] = took) -> None:
            due = began + number / rate
            await asyncio.sleep(due - time.perf_counter())
            await service.launch(client, "brief", number)
            took.append(time.perf_counter() - due)

        await asyncio.gather(*(launch(number) for number in range(count)))
        reached = count / (time.perf_counter() - began)
        await ended(client, "brief")
        cpu = 1000 * (service.cpu_seconds() - spent) / count
        rows.append([rate, reached, part(took, 0.5), part(took, 0.99), cpu, service.private_kib() / 1024])
        if reached < KEPT_UP * count / (options.seconds + 1 / rate):
            break
    columns = ["asked a second", "answered a second", "p50, ms", "p99, ms", "own processor for each life, ms", "memory, MiB"]
    report.figures["against the launch rate"] = [dict(zip(columns, row, strict=True)) for row in rows]
    report.table(columns, rows)


async def ended(client: aiohttp.ClientSession, pool: str) -> None:
    """Wait until nothing of a pool lives."""
    while True:
        async with client.get(f"/pools/{pool}") as answer:
            if not (await answer.json())["current_running"]:
                return
        await asyncio.sleep(0.02)


async def measure(home: Path, options: argparse.Namespace, report: Report) -> None:
    settings = {"database_url": options.database} if options.database else {}
    for name, curve in {"live": against_live, "rate": against_rate}.items():
        service = Service(home / name, POOLS, command=(sys.executable, __file__, "--serve"), **settings)
        async with service.running(), service.client() as client:
            await curve(service, client, options, report)
    life = report.figures["against the launch rate"][-1]["own processor for each life, ms"]
    most = report.figures["against live runners"][-1]
    rows = [
        ["1,000 launches a second: cores of service for whole lives", life],
        ["1,000,000 live runners: GiB of service memory", most["memory each, KiB"] * 1_000_000 / 2**20],
        ["1,000,000 live runners: cores at rest", most["of a core at rest, %"] / 100 * 1_000_000 / most["live runners"]],
    ]
    report.table(["carried on in a straight line", ""], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--live", type=int, nargs="+", default=[1000, 3000, 10_000])
    parser.add_argument("--launches", type=int, default=500, help="beside the live ones, at each step")
    parser.add_argument("--rest", type=float, default=21.0, help="seconds; what runs is compared with the engine every 10")
    parser.add_argument("--rates", type=float, nargs="+", default=[25, 50, 100, 200, 400])
    parser.add_argument("--seconds", type=float, default=20.0, help="at each rate")
    parser.add_argument("--database", help="an empty PostgreSQL database, in place of SQLite")
    bench(parser, measure)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        asyncio.run(serve())
    elif sys.argv[1:2] == ["--weigh"]:
        print(json.dumps(weigh(int(sys.argv[2]))))
    else:
        main()
