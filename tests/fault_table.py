"""The table of faults: what the fault tests counted, printed once all have run.

A test bears ``@pytest.mark.fault("what happens")`` and so is a round of that fault. It counts with the fixture ``verdict``:
how long all took to be right again, and, with ``judge``, who was lost, started twice, told an end that was none, or left
behind, from what runners themselves wrote into their slots and what is left of them. What no test counted is a dash, not a
zero.
"""

import asyncio
import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

COLUMNS = ("lost", "doubled", "false_ends", "orphans")
SECONDS = 60.0

End = tuple[str, int | None]
"""A state and an exit code."""


@dataclass
class Verdict:
    """What one round came to; None: not counted. ``seconds`` is from the end of the fault until all was right again."""

    rounds: int = 1
    lost: int | None = None
    doubled: int | None = None
    false_ends: int | None = None
    orphans: int | None = None
    seconds: float | None = None

    def over(self) -> None:
        """Say that the fault is over: from here the time counts."""
        self._over = time.monotonic()

    def right(self) -> None:
        """Say that all is right again."""
        self.seconds = time.monotonic() - self._over

    async def judge(
        self, client: httpx.AsyncClient, slots: Path, right: Mapping[str, End], left: Callable[[], Collection[str]]
    ) -> None:
        """Compare the records with what ``started`` in each slot, written by the runners, and the right ends say.

        Waits for the ends, and for what they leave. ``left`` gives the ids of runners of which something is there still.
        """
        from conftest import until  # noqa: PLC0415 - which loads this as a plugin

        records: defaultdict[str, dict[str, Any]] = defaultdict(dict)

        async def ended() -> bool:
            for runner_id in right:
                answer = await client.get(f"/runners/{runner_id}")
                records[runner_id] = answer.json() if answer.status_code == httpx.codes.OK else {}
            return all(record.get("phase") == "finished" for record in records.values())

        try:
            await until(ended, SECONDS)
            with contextlib.suppress(AssertionError):  # which is what is counted
                await until(lambda: asyncio.to_thread(lambda: not left()))
        finally:
            ends = {name: (record["state"], record["exit_code"]) for name, record in records.items() if record}
            starts = Counter(line for file in slots.glob("*/started") for line in file.read_text().split())
            self.lost = sum(record.get("phase") != "finished" for record in records.values())
            self.doubled = sum(count - 1 for count in starts.values())
            self.false_ends = sum(ends[name] != right[name] for name in ends if records[name]["phase"] == "finished")
            over = [name for name in await asyncio.to_thread(left) if records[name].get("phase") in {None, "finished"}]
            self.orphans = len(over) + sum(name not in right for name in starts)
        if self.seconds is None:
            self.right()
        assert (self.lost, self.doubled, self.false_ends, self.orphans) == (0, 0, 0, 0), (ends, starts, over)


@pytest.fixture
def verdict(request: pytest.FixtureRequest) -> Iterator[Verdict]:
    """What this round of a fault comes to."""
    verdict = Verdict()
    verdict.over()
    yield verdict
    request.node.user_properties.append(("verdict", asdict(verdict)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have each round bear the name of its fault, also where another process runs it."""
    for item in items:
        if mark := item.get_closest_marker("fault"):
            item.user_properties.append(("fault", mark.args[0]))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table, if there was any fault."""
    rounds: dict[str, dict[str, Any]] = {}
    for outcome in ("", "passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, ()):
            told = dict(getattr(report, "user_properties", ()))
            if "fault" in told:
                seen = rounds.setdefault(report.nodeid, {"fault": told["fault"], "failed": False, "ran": False})
                seen["failed"] |= bool(report.failed)
                seen["ran"] |= report.failed or report.when == "call"
                seen |= told.get("verdict", {})
    rows: dict[str, list[dict[str, Any]]] = {}
    for seen in rounds.values():
        if seen["ran"]:
            rows.setdefault(seen["fault"], []).append(seen)
    if rows:
        terminalreporter.section("faults")
        for line in table(rows):
            terminalreporter.write_line(line)


def table(rows: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """Write the rows of each fault, one for each round, as lines of a table."""
    cells = [["fault", "rounds", "failed", *(name.replace("_", " ") for name in COLUMNS), "right again after"]]
    for fault, rounds in sorted(rows.items()):
        counts = [[each[name] for each in rounds if each.get(name) is not None] for name in COLUMNS]
        seconds = [each["seconds"] for each in rounds if each.get("seconds") is not None]
        cells.append(
            [
                fault,
                str(sum(each.get("rounds", 1) for each in rounds)),
                str(sum(each["failed"] for each in rounds)),
                *(str(sum(count)) if count else "-" for count in counts),
                f"{max(seconds):.1f} s" if seconds else "-",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
