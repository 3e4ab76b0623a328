"""What a benchmark finds, and how it is told: figures for programs, tables in Markdown for people, promises beside both.

A benchmark is a function of a temporary home, its options and a ``Report``; ``bench`` runs it as a program. What it compares
are *sides*, which take turns in rounds. Ratios are the median of the rounds' own ratios, so that other load on the machine,
which meets both sides of a round, says little.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Json = dict[str, Any]
Launch = Callable[[int], Awaitable[None]]


@dataclass
class Report:
    """What a benchmark found, shown as it comes."""

    figures: Json = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)
    promises: list[Json] = field(default_factory=list)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Show a table."""
        self.tables.append(table(columns, rows))
        print(f"\n{self.tables[-1]}\n", flush=True)

    def promise(self, what: str, here: float, *, at_most: float | None = None, at_least: float | None = None) -> None:
        """Note a figure beside what was promised of it. A promise that is not kept is told, and fails nothing."""
        kept = (at_most is None or here <= at_most) and (at_least is None or here >= at_least)
        bound = f"at most {written(at_most)}" if at_most is not None else f"at least {written(at_least)}"
        self.promises.append({"what": what, "promised": bound, "here": here, "kept": kept})
        print(f"promised: {what} {bound}; here {written(here)}{'' if kept else ', NOT KEPT'}", flush=True)

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(vars(self), indent=2) + "\n")


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Write a table in Markdown; numbers with three digits that say something."""
    lines = [columns, ["---"] * len(columns), *[[written(cell) for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def written(cell: object) -> str:
    """Write a cell of a table."""
    if not isinstance(cell, float):
        return f"{cell:,}" if isinstance(cell, int) else str(cell)
    return f"{cell:,.{0 if abs(cell) >= 100 else 1 if abs(cell) >= 10 else 2}f}"


def bench(parser: argparse.ArgumentParser, measure: Callable[[Path, argparse.Namespace, Report], Awaitable[None]]) -> None:
    """Run a benchmark as a program. It fails where a run is broken, and never because it is slow."""
    parser.add_argument("--json", type=Path, help="a file for the figures")
    asyncio.run(_bench(parser.parse_args(), measure))


async def _bench(
    options: argparse.Namespace, measure: Callable[[Path, argparse.Namespace, Report], Awaitable[None]]
) -> None:
    task = asyncio.current_task()
    assert task
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    report = Report()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.2f} before", flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-") as home:
        await measure(Path(home), options, report)
    if options.json:
        report.write(options.json)


# Sides that take turns.


@dataclass
class Round:
    """What one side did: how long each launch took, all of them, all until nothing of them was left; in seconds.

    ``cpu`` is the processor time of that side's own process. None: not measured.
    """

    took: list[float]
    launched: float
    gone: float | None = None
    cpu: float | None = None


async def drive(launches: int, at_once: int, launch: Launch) -> Round:
    """Launch so many with so many at once."""
    numbers = iter(range(launches))
    took: list[float] = []

    async def work() -> None:
        for number in numbers:
            began = time.perf_counter()
            await launch(number)
            took.append(time.perf_counter() - began)

    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(at_once)))
    return Round(took, time.perf_counter() - began)


async def in_turns(rounds: int, sides: Mapping[str, Callable[[], Awaitable[Round]]]) -> dict[str, list[Round]]:
    """Let each side do its round in turn, another one first each time; one round more, to warm up, is not counted."""
    seen: dict[str, list[Round]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(-1, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            done = await sides[name]()
            if number >= 0:
                seen[name].append(done)
    return seen


def compared(seen: Mapping[str, Sequence[Round]]) -> Json:
    """Give each side's figures; those of the others say also how the first side does beside them."""
    first = next(iter(seen))
    figures: Json = {}
    for name, rounds in seen.items():
        each = [took for one in rounds for took in one.took]
        figures[name] = {"p50_ms": part(each, 0.5), "p99_ms": part(each, 0.99)}
        for what in ("launched", "gone"):
            pairs = [
                (len(one.took), getattr(one, what), getattr(our, what)) for one, our in zip(rounds, seen[first], strict=True)
            ]
            if pairs[0][1] is not None:
                figures[name][f"{what}_per_second"] = statistics.median(count / took for count, took, _ in pairs)
                if name != first:
                    figures[name][f"ratio_{what}"] = statistics.median(took / ours for _, took, ours in pairs)
        figures[name]["cpu_ms"] = 1000 * sum(one.cpu or 0.0 for one in rounds) / len(each)
    return figures


COLUMNS = {
    "p50_ms": "p50, ms",
    "p99_ms": "p99, ms",
    "launched_per_second": "a second",
    "gone_per_second": "a second until gone",
    "cpu_ms": "own processor, ms each",
    "ratio_launched": "first to it",
    "ratio_gone": "first to it, until gone",
}


def table_of_sides(report: Report, what: str, by_concurrency: Mapping[int, Json]) -> None:
    """Show what sides did, a row for each at each concurrency."""
    sides = [side for figures in by_concurrency.values() for side in figures.values()]
    keys = [key for key in COLUMNS if any(key in side for side in sides)]
    rows = [
        [at_once, name, *(side.get(key, "") for key in keys)]
        for at_once, figures in by_concurrency.items()
        for name, side in figures.items()
    ]
    report.table([f"{what}, at once", "", *(COLUMNS[key] for key in keys)], rows)


def part(seconds: Sequence[float], share: float) -> float:
    """Give the value below which such a share lies, in milliseconds."""
    ordered = sorted(seconds)
    return 1000 * ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]
