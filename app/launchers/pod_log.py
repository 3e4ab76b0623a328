"""A container's output as a Kubernetes API gives it: lines with times, from which reading is resumed. Pure.

The API resumes by whole seconds only. So a cursor is a second to read from, how many lines from there on were had, and the
time of the last of them, which shows whether the count still fits; where it does not, lines have been rotated away.
"""

import asyncio
import re
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from typing_extensions import override

from app.launcher import LogLine

PART = 16_384
"""Engines cut lines here, and the API puts a time before every part of them."""

MAX_LINE = 4 * 2**20
KEPT_BYTES = 16 * 2**20
"""How much memory the log of a pod that is going may take until it is safe elsewhere."""

KEPT_TOGETHER = 128 * 2**20
"""How much all of them may take: when a node is drained, many pods go at once."""

LINE_BYTES = 256
"""What a line takes beside its text."""

LATE_SECONDS, MUCH_BYTES = 10.0, 2**20
"""A log of so many bytes that begins so long after its container may have lost its beginning: kubelets look every ten
seconds whether one is to be rotated."""

LOST = "lost"
_NOTHING_LEFT = b"[the log is lost: its container was taken away before it could be read]"

_TIME = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d) ")
_COMPLAINT = re.compile(rb"rpc error: |failed to (try resolving symlinks|watch|open log)|unable to retrieve container logs")
"""What a kubelet writes into a log that is being taken from it, or in its place; no program's line comes without a time."""

CUT_OFF = b"[some output may be missing here: the log could not be read to its end before its pod was gone]"
_BEGUN_LATE = b"[some output may be missing here: the log begins long after its program, and may have been rotated]"
_GAP = b"[some output is missing here: the log was rotated]"


@dataclass(frozen=True, slots=True)
class Cursor:
    """Behind a line: the second to read from, the lines to skip there, and the last one's time as it was written."""

    second: int
    count: int
    time: str

    @override
    def __str__(self) -> str:
        return f"{self.second}/{self.count}/{self.time}"

    @property
    def since(self) -> str:
        """The second as the API wants it."""
        return _written(self.second)


def parse(cursor: str | None) -> Cursor | None:
    """Read a cursor as it was handed out."""
    if not cursor or cursor == LOST:
        return None
    second, count, time = cursor.split("/", 2)
    return Cursor(int(second), int(count), time)


class LogReader:
    """Makes lines with cursors of the bytes that one request answers, which was made ``after`` a cursor.

    Without one the request may ask for lines ``since`` a time; it then ``begins`` a second earlier, because lines of that
    second are counted in the cursors of the next. Whoever makes the request notes when its answer has ``ended`` by itself.
    """

    def __init__(self, after: Cursor | None, since: float | None = None) -> None:
        self.cursor = after
        self.begins = after.since if after else None if since is None else _written(max(0, int(since) - 1))
        self.ended = False
        self._after = after
        self._skip = after.count if after else 0
        self._held: deque[tuple[bytes, bytes]] = deque()
        self._rest = b""
        self._complained = False
        self._per_second: Counter[int] = Counter()

    def feed(self, chunk: bytes) -> Iterator[LogLine]:
        """Give the lines that are whole with these bytes."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            yield from self._line(line)
        if len(self._rest) > MAX_LINE:
            rest, self._rest = self._rest, b""
            yield from self._line(rest)

    def finish(self) -> Iterator[LogLine]:
        """Give what is left once the request has ended and no more comes: a last line without an end, or word of a loss."""
        rest, self._rest = self._rest, b""
        if rest:
            yield from self._line(rest)
        if self._complained and self.cursor is None:
            yield LogLine(LOST, _NOTHING_LEFT, gap=True)
        if self._after and self._skip:  # fewer lines than were had: they were rotated away
            yield from self._resume_by_time()

    def _line(self, line: bytes) -> Iterator[LogLine]:
        time, text = _split(line)
        if not time and _COMPLAINT.match(text):
            self._complained = True
            return
        if not self._skip:
            yield self._told(time, text)
            return
        self._held.append((time, text))
        if len(self._held) == self._skip:
            if self._after and time.decode() == self._after.time:
                self._count_held()
            else:
                yield from self._resume_by_time()
        elif self._after and _second(time) > self._after.second + 1:  # none that was had is so late: some of them are gone
            yield from self._resume_by_time()

    def _count_held(self) -> None:
        for time, _ in self._held:
            self._per_second[_second(time)] += 1
        self._held.clear()
        self._skip = 0

    def _resume_by_time(self) -> Iterator[LogLine]:
        """Give what is behind the last line that was had. Where that is gone too, tell of a gap and give what is later."""
        held, last = list(self._held), self._after.time if self._after else ""
        self._held.clear()
        self._skip, self._after = 0, None
        had = max((number for number, (time, _) in enumerate(held) if time.decode() == last), default=None)
        told_gap = had is not None
        for number, (time, text) in enumerate(held):
            if time.decode() <= last if had is None else number <= had:
                self._per_second[_second(time)] += 1
                continue
            line = self._told(time, text)
            if not told_gap:
                yield LogLine(line.cursor, _GAP, gap=True)
                told_gap = True
            yield line
        if not held and last:
            yield LogLine(str(self.cursor), _GAP, gap=True)

    def _told(self, time: bytes, text: bytes) -> LogLine:
        """Count a line. One second more than the last is read again, for lines whose times are out of order."""
        moment = _moment(time)
        second = int(moment or 0)
        newest = max(second, max(self._per_second, default=second))
        self._per_second[second] += 1
        for old in [known for known in self._per_second if known < newest - 1]:
            del self._per_second[old]
        self.cursor = Cursor(newest - 1, self._per_second[newest] + self._per_second[newest - 1], time.decode())
        return LogLine(str(self.cursor), text, moment)


async def from_its_start(lines: AsyncIterator[LogLine], started_at: float) -> AsyncIterator[LogLine]:
    """Put a word before a log, read from its start, that seems to have lost it: the API gives a log's newest file only."""
    held: list[LogLine] = []
    size, late = 0, True
    async for line in lines:
        held.append(line)
        size += len(line.text)
        late = late and line.time is not None and line.time - started_at >= LATE_SECONDS
        if not late or size >= MUCH_BYTES:
            break
    if late and size >= MUCH_BYTES:
        yield LogLine(held[0].cursor, _BEGUN_LATE, gap=True)
    for line in held:
        yield line
    async for line in lines:
        yield line


@dataclass(slots=True)
class Room:
    """The room that all kept logs have together, in bytes."""

    size: int = KEPT_TOGETHER
    taken: int = 0


class KeptLog:
    """The log of a pod that is going: as many of its newest lines as there is room for.

    ``begun`` is set once it is being read, ``whole`` when nothing more comes.
    """

    def __init__(self, room: Room, most: int = KEPT_BYTES) -> None:
        self._room, self._most = room, most
        self.begun, self.whole = asyncio.Event(), asyncio.Event()
        self.stopped = False
        self._lines: deque[LogLine] = deque()
        self._bytes = 0
        self._dropped = False

    def stop(self) -> None:
        """Nobody will read this any more."""
        self.stopped = True
        self._lines.clear()
        self._take(-self._bytes)

    def add(self, line: LogLine) -> None:
        """Keep one more line."""
        if self.stopped:
            return
        self._lines.append(line)
        self._take(LINE_BYTES + len(line.text))
        while (self._bytes > self._most or self._room.taken > self._room.size) and len(self._lines) > 1:
            self._take(-LINE_BYTES - len(self._lines.popleft().text))
            self._dropped = True

    def _take(self, size: int) -> None:
        self._bytes += size
        self._room.taken += size

    def after(self, cursor: str | None) -> Sequence[LogLine]:
        """Give the lines behind a cursor, a word of what is missing before them included."""
        lines = list(self._lines)
        found = next((number for number, line in enumerate(lines) if line.cursor == cursor), None)
        if found is not None:
            return lines[found + 1 :]
        known = parse(cursor)
        later = [line for line in lines if known is None or line.cursor == LOST or _cursor_time(line) > known.time]
        gap = [LogLine(later[0].cursor, _GAP, gap=True)] if later and (self._dropped or known) else []
        return [*gap, *later]


def _cursor_time(line: LogLine) -> str:
    cursor = parse(line.cursor)
    return cursor.time if cursor else ""


def _split(line: bytes) -> tuple[bytes, bytes]:
    """Split a line into its time and its text, without the times before its further parts."""
    found = _TIME.match(line)
    if not found:
        return b"", line
    time, text = found[0].strip(), line[found.end() :]
    if len(text) <= PART:
        return time, text
    parts, at = [], 0
    while True:
        parts.append(text[at : at + PART])
        at += PART
        again = _TIME.match(text, at)
        if not again:
            parts.append(text[at:])
            return time, b"".join(parts)
        at = again.end()


def _second(time: bytes) -> int:
    return int(_moment(time) or 0)


def _moment(time: bytes) -> float | None:
    return datetime.fromisoformat(time.decode()).timestamp() if time else None


def _written(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
