"""A container's output as its engine streams it: frames with times become lines with cursors. Pure.

The engine resumes by time alone, so a cursor is a frame: its time, its stream, and how many frames of that stream bore that
time by then. Reading on begins a little before it, for the two streams' times may be out of order by a hair, goes through
the same motions and keeps silent until the cursor is passed. Where the cursor is not met any more, lines are missing.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

from typing_extensions import override

from app.launcher import LogLine

SLACK_SECONDS = 1
MOST_SILENT = 1000
LONGEST_LINE = 256 * 1024
GAP = b"[older output was dropped: the log is capped]"
MAYBE_GAP = b"[older output may have been dropped: the log is capped]"
_HEADER = 8
_PART_BYTES = 16 * 1024
"""A longer line comes in parts, frames without an end that all bear the first one's time. Each but the last is this long."""


class Frames:
    """Takes an engine's stream apart: each frame is a byte for the stream, three of nothing, a length, and so many bytes."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Give the frames that are whole by now."""
        data, at = self._rest + data, 0
        while len(data) - at >= _HEADER:
            end = at + _HEADER + int.from_bytes(data[at + 4 : at + _HEADER])
            if end > len(data):
                break
            yield data[at], data[at + _HEADER : end]
            at = end
        self._rest = data[at:]


@dataclass(frozen=True, slots=True)
class Cursor:
    """A frame in a log, as text for whoever comes back. ``back`` is the time of a line that was not whole by then."""

    time: str
    stream: int
    count: int
    back: str = field(default="", compare=False)

    @override
    def __str__(self) -> str:
        """Write it."""
        return f"{self.time}/{self.stream}/{self.count}" + (f"/{self.back}" if self.back else "")

    @classmethod
    def read(cls, text: str) -> "Cursor":
        """Read what was written."""
        time, stream, count, *back = text.split("/")
        return cls(time, int(stream), int(count), *back)

    @property
    def since(self) -> str:
        """Whence to ask the engine, in seconds since the epoch."""
        whence = datetime.fromisoformat((self.back or self.time)[:19]).replace(tzinfo=UTC)
        return str(int(whence.timestamp()) - SLACK_SECONDS)


@dataclass(slots=True)
class _Stream:
    time: str = ""
    count: int = 0
    line: bytes = b""
    at: Cursor | None = None


@dataclass(slots=True)
class Lines:
    """Makes lines of frames. ``after`` is the cursor behind which they begin.

    ``local``: the log is of the engine's local driver, which in some versions drops the end of a line that came in parts.
    """

    after: Cursor | None = None
    local: bool = False
    at: Cursor | None = None
    _streams: dict[int, _Stream] = field(default_factory=dict)
    _silent: list[LogLine] = field(default_factory=list)

    def feed(self, number: int, frame: bytes) -> Iterator[LogLine]:
        """Give the lines that this frame completes."""
        stamp, _, data = frame.partition(b" ")
        stream = self._streams.setdefault(number, _Stream())
        time = stamp.decode("ascii", "replace")
        stream.count = stream.count + 1 if time == stream.time else 1
        stream.time = time
        stream.line += data
        ended = data.endswith(b"\n") or (self.local and len(data) < _PART_BYTES)
        others = (s.time for n, s in self._streams.items() if n != number and s.line and s.time < time)
        open_since = min(others, default="") if len(self._streams) > 1 else ""
        stream.at = Cursor(time, number, stream.count, open_since)
        if ended or len(stream.line) > LONGEST_LINE:
            line, stream.line = LogLine(str(stream.at), stream.line.removesuffix(b"\n"), _moment(time)), b""
            yield from self._say(stream.at, line)
        elif self._pass(stream.at):
            stream.line = b""  # it was told as the last one, without an end

    def end(self) -> Iterator[LogLine]:
        """Give what is left when no more will come: lines without an end, and those that waited in vain for the cursor."""
        for stream in self._streams.values():
            if stream.line and stream.at:
                yield from self._say(stream.at, LogLine(str(stream.at), stream.line, _moment(stream.time)))
                stream.line = b""
        if self.after and self._silent:
            yield from self._gap()

    def _say(self, at: Cursor, line: LogLine) -> Iterator[LogLine]:
        if self.after is None:
            self.at = at
            yield line
        elif self._pass(at):
            return
        elif at.time > self.after.time:
            self._silent.append(line)
            if at.stream == self.after.stream or len(self._silent) > MOST_SILENT:
                yield from self._gap()

    def _pass(self, at: Cursor) -> bool:
        """Say whether this is the frame behind which all is new."""
        if at != self.after:
            return False
        self.at, self.after = at, None
        self._silent.clear()
        return True

    def _gap(self) -> Iterator[LogLine]:
        """Give up waiting for the cursor: it was dropped, and what lay between it and here may have been too."""
        if self.after is None:
            return
        yield LogLine(str(self.after), GAP, gap=True)
        self.after = None
        for line in self._silent:
            self.at = Cursor.read(line.cursor)
            yield line
        self._silent.clear()


def _moment(time: str) -> float | None:
    """Read a frame's time; one that cannot be read is no reason to lose a line."""
    with suppress(ValueError):
        return datetime.fromisoformat(time).timestamp()
    return None
