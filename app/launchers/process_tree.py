"""Which processes belong to a runner, and how all of them end.

Where the runner has a control group, what is in it belongs to it. Elsewhere a process belongs if its environment says so
(children inherit ``RUNNER_ID``), if it is in the session of the runner's main process, or if its parent belongs; one that
clears its environment, leaves the session and outlives its parent escapes that. Numbers of processes and of sessions are
given anew: whose they are now has to be known surely, for what is found here is killed. Everything here blocks.
"""

import contextlib
import functools
import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from app.launchers.cgroup import Group

PROC = Path("/proc")


@functools.cache
def numbering() -> str:
    """Name this boot of the machine, and this namespace of processes: elsewhere their numbers mean nothing."""
    return f"{(PROC / 'sys/kernel/random/boot_id').read_text().strip()} {(PROC / 'self/ns/pid').readlink()}"


def uptime() -> float:
    """Say for how many seconds this machine is up, as shims read it."""
    return float((PROC / "uptime").read_text().split()[0])


def ticks(uptime: str) -> int:
    """Turn a time as /proc/uptime has it, in seconds since boot, into that of a process's start. Raises ValueError."""
    return round(float(uptime) * os.sysconf("SC_CLK_TCK"))


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


@dataclass(slots=True)
class Tree:
    """All processes of a runner, save its shim, which has the same environment.

    ``ended_at`` is when the main process was seen to have ended, in clock ticks since boot, if anybody saw it.
    """

    runner_id: str
    main: Process | None
    shim: Process | None
    group: Group
    ended_at: int | None = None
    _owns_session: bool = False

    def owns_session(self, members: Iterable[_Row]) -> bool:
        """Say whether the session with the main process's number is the runner's, and not of who was given the number since.

        The kernel gives no number anew while its process is not reaped, or its session has a member. So the session is the
        runner's if the main process is there, or a member that began before that ended: it was born into no other. Once
        known, this holds for the moment that a kill takes, where the killed go one after the other.
        """
        main, end = self.main, self.ended_at or 0
        if main and not self._owns_session:
            row = _row(main.pid)
            there = row is not None and row.start_time == main.start_time
            self._owns_session = there or any(main.start_time <= member.start_time <= end for member in members)
        return self._owns_session

    def processes(self) -> list[Process]:
        """Find all that live."""
        if self.group.directories:
            rows = [row for pid in self.group.processes() if (row := _row(pid)) and not row.dead]
            return [Process(row.pid, row.start_time) for row in rows]
        return _search(self)

    def signal(self, number: signal.Signals) -> bool:
        """Send a signal to all that live, the main process first: it must not take its children's end for their failure.

        False if the main process had ended.
        """
        found = self.processes()
        reached = self.main is None or self.main.kill(number)  # whose number means nothing here may well live
        for process in found:
            if process != self.main:
                process.kill(number)
        return reached

    def kill(self) -> bool:
        """Kill all that live; True if none did. What was killed takes a moment to be gone, so it is to be done again."""
        if found := self.processes():
            self.group.kill()
            for process in found:  # the kernel's kill of a group misses those whose first thread has ended
                process.kill(signal.SIGKILL)
        return not found


def _search(tree: Tree) -> list[Process]:
    rows = {row.pid: row for row in _table() if not row.dead}
    mark = f"RUNNER_ID={tree.runner_id}".encode()
    shim = tree.shim.pid if tree.shim and tree.shim.alive else None
    session = [row for row in rows.values() if tree.main and row.session == tree.main.pid]
    members = {row.pid for row in session} if tree.owns_session(session) else set()
    members |= {row.pid for row in rows.values() if mark in _environment(row.pid)}
    members -= {shim}
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
        dead = fields[0] in "ZX" and int(fields[17]) <= 1  # else its first thread has ended, and others have not
        return _Row(pid, int(fields[1]), int(fields[3]), int(fields[19]), dead)
    return None


def _environment(pid: int) -> list[bytes]:
    with contextlib.suppress(OSError):
        return (PROC / str(pid) / "environ").read_bytes().split(b"\0")
    return []
