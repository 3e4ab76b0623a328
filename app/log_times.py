"""When a log had come how far: what `since` goes by in a file whose lines bear no times.

A mark says that by some time the log had come to some offset, so whatever lies before that offset is no newer. Marks are
made about once a second while a log grows. Where there are none (the service was down, the disk was full) more of the log
counts as new than is; never less.
"""

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

MOST = 65_536
SPACING_SECONDS = 1.0

Mark = tuple[float, int]
"""Seconds since the epoch, and bytes."""

_MARK = struct.Struct("<dQ")


class Times:
    """The marks of one log, in a file beside it. All of this blocks."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def note(self, mark: Mark) -> None:
        """Add a mark. The older half of too many is thinned out."""
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            count = os.fstat(fd).st_size // _MARK.size  # what a full disk cut off is written over
            os.pwrite(fd, _MARK.pack(*mark), count * _MARK.size)
        finally:
            os.close(fd)
        if count >= MOST:
            self.write(list(self))

    def write(self, marks: Sequence[Mark]) -> None:
        """Have these and no others."""
        if not marks:
            self.drop()
            return
        while len(marks) > MOST:
            half = len(marks) // 2
            marks = [*marks[:half:2], *marks[half:]]
        fresh = self.path.with_name(f"{self.path.name}.new")
        fresh.write_bytes(b"".join(_MARK.pack(*mark) for mark in marks))
        fresh.rename(self.path)

    def drop(self) -> None:
        """Have none."""
        self.path.unlink(missing_ok=True)

    def offset(self, since: float) -> int:
        """Give an offset before which all was written before a time, and the furthest such that is known.

        A clock that was set back makes later marks worthless for times that it has shown before.
        """
        found = 0
        for at, offset in self:
            if at >= since:
                break
            found = offset
        return found

    def __iter__(self) -> Iterator[Mark]:
        """Give all marks, the oldest first."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return
        yield from _MARK.iter_unpack(data[: len(data) // _MARK.size * _MARK.size])


class Spacing:
    """Makes the marks of a log whose lines bear times, while it is copied to a file."""

    def __init__(self) -> None:
        self.marks: list[Mark] = []
        self._newest = float("-inf")

    def line(self, time: float | None, offset: int) -> None:
        """Take a line that begins at an offset. The two streams of a runner may be out of order by a hair."""
        if time is None or time <= self._newest:
            return
        if self._newest > float("-inf") and (not self.marks or time - self.marks[-1][0] >= SPACING_SECONDS):
            self.marks.append((self._newest, offset))
        self._newest = time

    def end(self, offset: int) -> None:
        """Take the end of the log."""
        if self._newest > float("-inf"):
            self.marks.append((self._newest, offset))
