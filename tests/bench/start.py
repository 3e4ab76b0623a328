"""Figures of the start: until the service is ready with an empty store, importing it, and what it then holds of memory.

    python tests/bench/start.py [--times 9] [--json FILE]

Beside it a bare interpreter, and one that imports the libraries which no such service can do without. Each takes its turn.
"""

import argparse
import asyncio
import statistics
import sys
import time
from pathlib import Path

from figures import Report, bench
from served import Service

PROGRAMS = {
    "an interpreter": "pass",
    "importing FastAPI, uvicorn, SQLAlchemy": "import fastapi, uvicorn, sqlalchemy",
    "importing the service": "import app.server",
    "importing the command line": "import app.cli",
}
POOLS = {"local": {"type": "local-process", "max_concurrency": 1, "config": {"command": ["true"]}}}


async def measure(home: Path, options: argparse.Namespace, report: Report) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in ("start to ready", "start again to ready", *PROGRAMS)}
    memory = []
    for number in range(-1 if options.warm_up else 0, options.times):
        service = Service(home / str(number), POOLS)
        took = {}
        for name in ("start to ready", "start again to ready"):
            took[name] = await service.start()
            memory.append(service.private_kib() / 1024)
            await service.end()
        for name, program in PROGRAMS.items():
            began = time.perf_counter()
            process = await asyncio.create_subprocess_exec(sys.executable, "-c", program)
            if await process.wait():
                raise SystemExit(f"{program} failed")
            took[name] = time.perf_counter() - began
        for name, each in took.items() if number >= 0 else ():
            seconds[name].append(each)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    report.figures = {"seconds": medians, "idle_mib": statistics.median(memory)}
    report.table(["start", "median, s", "longest, s"], [[name, medians[name], max(each)] for name, each in seconds.items()])
    report.table(["memory of its own, idle", "MiB"], [["service", report.figures["idle_mib"]]])
    report.promise("start to ready with an empty store, s", medians["start to ready"], at_most=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=9)
    parser.add_argument("--warm-up", action=argparse.BooleanOptionalAction, default=True, help="one time more, not counted")
    bench(parser, measure)


if __name__ == "__main__":
    main()
