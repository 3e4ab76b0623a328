"""Frames and lines of containers' logs, made as an engine makes them: any log, any split, any place to go on from."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from app.launcher import LogLine
from app.launchers.container_log import GAP, LONGEST_LINE, Cursor, Frames, Lines

PART = 16 * 1024
SECOND = 10**9
EPOCH = 1_700_000_000 * SECOND


def stamp(time: int) -> str:
    """Write a time as the engine does, in nanoseconds and always nine digits of them."""
    return f"{datetime.fromtimestamp(time // SECOND, UTC):%Y-%m-%dT%H:%M:%S}.{time % SECOND:09d}Z"


@dataclass(frozen=True)
class Frame:
    """A frame as the engine keeps it: at ``place`` in its log, with the ``time`` of its line's beginning."""

    place: int
    stream: int
    time: int
    data: bytes = field(repr=False)  # long

    @property
    def payload(self) -> bytes:
        return stamp(self.time).encode() + b" " + self.data


@dataclass(frozen=True)
class Line:
    """A line and the frames that bring it."""

    text: bytes = field(repr=False)  # long
    frames: tuple[Frame, ...]
    whole: bool = True

    @property
    def place(self) -> tuple[bool, int, int]:
        """When it is told: with its last frame, or when the log has come to its end."""
        return not self.whole, self.frames[-1].place, self.frames[-1].stream


@dataclass(frozen=True)
class Log:
    """What an engine keeps of a container that has ended."""

    lines: tuple[Line, ...]
    local: bool

    @property
    def frames(self) -> list[Frame]:
        return sorted((frame for line in self.lines for frame in line.frames), key=lambda frame: (frame.place, frame.stream))

    @property
    def texts(self) -> list[bytes]:
        return [line.text for line in self.lines]

    def since(self, cursor: Cursor | None) -> list[Frame]:
        """Answer as the engine does when it is asked for what is not older."""
        return [frame for frame in self.frames if cursor is None or frame.time >= int(cursor.since) * SECOND]


STEPS = st.sampled_from([0, 1, 1, 1000, 5_000_000, SECOND, 3 * SECOND])
HAIRS = st.sampled_from([0, 0, 1, 1000, 900_000])
SIZES = st.one_of(st.integers(0, 30), st.sampled_from([PART - 1, PART, PART + 1, 2 * PART, 2 * PART + 7]))


@st.composite
def logs(draw: st.DrawFn) -> Log:
    """Make a log of two streams, whose frames come a little later than their times say, and long lines' much later.

    A line without an end that is not seen to be the last of its stream comes last in the log; more than one is not made.
    """
    local = draw(st.booleans())
    lines = []
    for stream in (1, 2):
        time, place = EPOCH + draw(HAIRS), EPOCH
        count = draw(st.integers(0, 6))
        for number in range(count):
            time += draw(STEPS)
            head = b"%d.%d " % (stream, number)
            text = (head + b"x" * draw(SIZES)).removesuffix(b"x")
            whole = number < count - 1 or draw(st.booleans())
            frames: list[Frame] = []
            place = max(place, time)
            for data in parts(text, whole=whole, local=local):
                place = max(place, time) + draw(STEPS if frames else HAIRS)
                frames.append(Frame(place, stream, time, data))
            lines.append(Line(text, tuple(frames), whole or (local and len(frames[-1].data) < PART)))
            time = max(time, place if len(frames) > 1 else time)
    unfinished = [line for line in lines if not line.whole]
    for line in unfinished[:-1]:
        lines[lines.index(line)] = Line(line.text, ended(line.frames))
    for line in unfinished[-1:]:
        *before, last = line.frames
        end = max(frame.place for line in lines for frame in line.frames) + 1
        frames = [*before, replace(last, place=end, time=last.time if before else end)]
        lines[lines.index(line)] = replace(line, frames=tuple(frames))
    return Log(tuple(sorted(lines, key=lambda line: line.place)), local)


def ended(frames: tuple[Frame, ...]) -> tuple[Frame, ...]:
    """Give a line its end."""
    if len(frames[-1].data) == PART:
        return (*frames, replace(frames[-1], data=b"\n"))
    return (*frames[:-1], replace(frames[-1], data=frames[-1].data + b"\n"))


def parts(text: bytes, *, whole: bool, local: bool) -> list[bytes]:
    """Cut a line as the engine does. The local driver of some engines loses the end of one that was cut."""
    end = b"\n" if whole else b""
    if len(text) < PART:
        return [text + end]
    cut = [text[at : at + PART] for at in range(0, len(text), PART)]
    if len(cut[-1]) == PART and whole:
        cut.append(b"")
    return [*cut[:-1], cut[-1] + (b"" if local else end)]


def read(frames: Iterable[Frame], *, local: bool, after: Cursor | None = None) -> list[LogLine]:
    lines = Lines(after, local=local)
    told = [line for frame in frames for line in lines.feed(frame.stream, frame.payload)]
    return told + list(lines.end())


def texts(lines: Sequence[LogLine]) -> list[bytes]:
    return [line.text for line in lines]


@given(logs(), st.data())
def test_a_stream_cut_anywhere_gives_the_same_frames(log: Log, data: st.DataObject) -> None:
    sent = [(frame.stream, frame.payload) for frame in log.frames]
    stream = b"".join(bytes([number, 0, 0, 0]) + len(frame).to_bytes(4) + frame for number, frame in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    frames = Frames()
    edges = [0, *cuts, len(stream)]
    pieces = [stream[begin:end] for begin, end in itertools.pairwise(edges)]
    assert [frame for piece in pieces for frame in frames.feed(piece)] == sent


@given(logs())
def test_frames_become_the_lines_that_were_written(log: Log) -> None:
    lines = read(log.frames, local=log.local)
    assert texts(lines) == log.texts
    assert len({line.cursor for line in lines}) == len(lines)


@given(logs())
@settings(max_examples=400)
def test_behind_any_line_comes_exactly_the_rest(log: Log) -> None:
    lines = read(log.frames, local=log.local)
    for number, line in enumerate(lines):
        after = Cursor.read(line.cursor)
        assert str(after) == line.cursor
        rest = read(log.since(after), local=log.local, after=after)
        assert texts(rest) == log.texts[number + 1 :], f"behind {line.cursor}"
        assert [line.cursor for line in rest] == [line.cursor for line in lines[number + 1 :]]


@given(logs(), st.data())
@settings(max_examples=400)
def test_what_was_dropped_behind_a_cursor_is_told(log: Log, data: st.DataObject) -> None:
    lines = read(log.frames, local=log.local)
    assume(len(lines) > 1)
    number = data.draw(st.integers(0, len(lines) - 2))
    kept = log.lines[data.draw(st.integers(number + 1, len(lines) - 1)) :]
    dropped = log.lines[: len(log.lines) - len(kept)]
    # An engine drops whole files of its log, so no line here has begun before the last dropped one came to its end.
    last = max(frame.place for line in dropped for frame in line.frames)
    assume(all(frame.place > last for line in kept for frame in line.frames))
    after = Cursor.read(lines[number].cursor)
    # Where frames of one stream bear one time, and some are dropped, which of them it was cannot be told.
    assume(all(frame.stream != after.stream or stamp(frame.time) != after.time for line in kept for frame in line.frames))
    newer = [line.text for line in kept if stamp(line.frames[0].time) > after.time]
    assume(newer)
    rest = texts(read(Log(kept, log.local).since(after), local=log.local, after=after))
    assert rest[0] == GAP
    assert GAP not in rest[1:]
    assert [text for text in rest if text in newer] == newer
    assert set(rest[1:]) <= {line.text for line in kept}


@given(logs())
def test_a_reader_thrown_out_anywhere_has_missed_and_repeated_nothing(log: Log) -> None:
    whole = texts(read(log.frames, local=log.local))
    for cut in range(len(log.frames)):
        lines = Lines(local=log.local)
        told = [line for frame in log.frames[:cut] for line in lines.feed(frame.stream, frame.payload)]
        assert str(lines.at or "") == (told[-1].cursor if told else "")
        again = read(log.since(lines.at), local=log.local, after=lines.at)
        assert texts(told + again) == whole


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("more", [0, 1, PART])
def test_a_line_without_measure_is_cut_and_nothing_of_it_is_lost(more: int, *, local: bool) -> None:
    text = b"y" * (3 * LONGEST_LINE + more)
    cut = parts(text, whole=True, local=local)
    frames = [
        *(Frame(EPOCH + number, 1, EPOCH, data) for number, data in enumerate(cut)),
        Frame(EPOCH + SECOND, 1, EPOCH + SECOND, b"next\n"),
    ]
    lines = read(frames, local=local)
    assert b"".join(texts(lines)) == text + b"next"
    assert all(len(line.text) <= LONGEST_LINE + PART for line in lines)
    for number, line in enumerate(lines):
        assert texts(read(frames, local=local, after=Cursor.read(line.cursor))) == texts(lines[number + 1 :])


def test_a_cursor_asks_the_engine_for_a_little_more_than_it_needs() -> None:
    assert Cursor.read(f"{stamp(EPOCH + 7 * SECOND + 5)}/2/3").since == str(EPOCH // SECOND + 6)
