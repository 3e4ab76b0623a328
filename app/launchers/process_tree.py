"""Which processes belong to a runner, and how all of them end.

Where the runner has a control group, what is in it belongs to it. Elsewhere a process belongs if its environment says so
(children inherit ``RUNNER_ID``), if it is in the session of the runner's main process, or if its parent belongs; one that
clears its environment, leaves the session and outlives its parent escapes that. Everything here blocks.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from app.launchers.cgroup import Group

PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Process:
    """A process, told apart from a later one with the same number by when it started (clock ticks since boot)."""

    pid: int
    start_time: int

    @classmethod
    def parse(cls, text: str) -> "Process":
        """Read "PID STARTTIME". Raises ValueError."""
        pid, start_time = text.split()
        return cls(int(pid), int(start_time))

    def kill(self, number: signal.Signals) -> bool:
        """Send a signal to exactly this process; False if it is gone."""
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            if (row := _row(self.pid)) is None or row.start_time != self.start_time or row.dead:
                return False
            signal.pidfd_send_signal(fd, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(fd)
        return True

    @property
    def alive(self) -> bool:
        """Whether it runs; a process that ended and was not yet reaped does not."""
        row = _row(self.pid)
        return row is not None and row.start_time == self.start_time and not row.dead


@dataclass(frozen=True, slots=True)
class _Row:
    pid: int
    parent: int
    session: int
    start_time: int
    dead: bool


@dataclass(frozen=True, slots=True)
class Tree:
    """All processes of a runner, save its shim, which has the same environment."""

    runner_id: str
    main: Process | None
    shim: Process | None
    group: Group

    def processes(self) -> list[Process]:
        """Find all that live."""
        if self.group.directories:
            rows = [row for pid in self.group.processes() if (row := _row(pid)) and not row.dead]
            return [Process(row.pid, row.start_time) for row in rows]
        return _search(self)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all that live, the main process first: it must not take its children's end for their failure."""
        for process in sorted(self.processes(), key=lambda process: process != self.main):
            process.kill(number)

    def kill(self, seconds: float = 5) -> bool:
        """Kill all, again and again until none is found; False if some still live after so long."""
        deadline = time.monotonic() + seconds
        while found := self.processes():
            if not self.group.kill():
                for process in found:
                    process.kill(signal.SIGKILL)
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True


def _search(tree: Tree) -> list[Process]:
    rows = {row.pid: row for row in _table() if not row.dead}
    mark = f"RUNNER_ID={tree.runner_id}".encode()
    main, shim = tree.main, tree.shim.pid if tree.shim and tree.shim.alive else None
    # A session's number is not given to another process while one of its members lives.
    session = main.pid if main and (main.pid not in rows or rows[main.pid].start_time == main.start_time) else None
    members = {
        row.pid for row in rows.values() if (row.session == session or mark in _environment(row.pid)) and row.pid != shim
    }
    grown = True
    while grown:
        children = {row.pid for row in rows.values() if row.parent in members} - members - {shim}
        grown = bool(children)
        members |= children
    return [Process(pid, rows[pid].start_time) for pid in members]


def _table() -> Iterator[_Row]:
    for entry in PROC.iterdir():
        if entry.name.isdecimal() and (row := _row(int(entry.name))):
            yield row


def _row(pid: int) -> _Row | None:
    with contextlib.suppress(OSError):
        text = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
        fields = text.rpartition(") ")[2].split()
        return _Row(pid, int(fields[1]), int(fields[3]), int(fields[19]), dead=fields[0] in "ZX")
    return None


def _environment(pid: int) -> list[bytes]:
    with contextlib.suppress(OSError):
        return (PROC / str(pid) / "environ").read_bytes().split(b"\0")
    return []
