"""Reading a pod's log: lines and their cursors, resumed behind any of them, and told where some are gone."""

from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import UTC, datetime

import pytest

from app.launcher import LogLine
from app.launchers.pod_log import LATE_SECONDS, LINE_BYTES, MUCH_BYTES, PART, KeptLog, LogReader, Room, from_its_start, parse


def written(seconds: Sequence[float], text: str = "line") -> list[bytes]:
    """Lines as the API gives them, at these seconds after noon."""
    return [
        f"2026-11-23T12:{int(at) // 60:02}:{int(at) % 60:02}.{round(at % 1 * 10**9):09}Z {text} {number}".encode()
        for number, at in enumerate(seconds)
    ]


def read(lines: Sequence[bytes], after: str | None = None, since: float | None = None) -> list[LogLine]:
    return [line for line in _read(lines, after, since) if not line.is_before(since)]


def _read(lines: Sequence[bytes], after: str | None, since: float | None) -> Iterator[LogLine]:
    """Answer as the API does: everything since the second that is asked for."""
    reader = LogReader(parse(after), since)
    if reader.begins:
        lines = [line for line in lines if line[:19].decode() >= reader.begins[:19]]
    data = b"".join(line + b"\n" for line in lines)
    at = 0
    while at < len(data):
        step = 1 + at * 7919 % 200  # pieces of any size
        yield from reader.feed(data[at : at + step])
        at += step
    yield from reader.finish()


SECONDS = [
    [0.0] * 7,
    [0.1, 0.2, 0.9, 1.1, 1.1, 1.1, 2.5, 9.0, 9.0, 61.5],
    [5.9999, 6.0001, 5.9998, 6.0002, 5.9997, 7.5, 6.9],  # two streams, each with times of its own
    [number * 0.01 for number in range(500)],
]


@pytest.mark.parametrize("seconds", SECONDS)
def test_reading_resumes_behind_any_line(seconds: Sequence[float]) -> None:
    lines = written(seconds)
    whole = read(lines)
    assert [line.text for line in whole] == [b"line %d" % number for number in range(len(seconds))]
    for number, line in enumerate(whole):
        rest = read(lines, line.cursor)
        assert [one.text for one in rest] == [one.text for one in whole[number + 1 :]]
        assert [one.cursor for one in rest] == [one.cursor for one in whole[number + 1 :]]


@pytest.mark.parametrize("seconds", SECONDS)
@pytest.mark.parametrize("since", [0, 0.2, 1.1, 2, 5.9998, 6, 6.99, 9, 62])
def test_reading_since_a_time_gives_all_later_lines_and_resumes_behind_any(seconds: Sequence[float], since: float) -> None:
    lines = written(seconds)
    moment = datetime(2026, 11, 23, 12, tzinfo=UTC).timestamp() + since
    later = read(lines, since=moment)
    assert [line.text for line in later] == [b"line %d" % number for number, at in enumerate(seconds) if at >= since]
    for number, line in enumerate(later):
        assert [one.text for one in read(lines, line.cursor, moment)] == [one.text for one in later[number + 1 :]]


def test_lines_that_were_rotated_away_are_told_of() -> None:
    lines = written([number * 0.1 for number in range(50)])
    cursor = read(lines)[20].cursor
    later = read(lines[30:], cursor)
    assert b"rotated" in later[0].text
    assert [line.text for line in later[1:]] == [b"line %d" % number for number in range(30, 50)]
    cut = read(lines[15:], cursor)
    assert [line.text for line in cut] == [b"line %d" % number for number in range(21, 50)]  # only such as were had are gone


def follow(lines: Sequence[bytes], after: str | None) -> list[LogLine]:
    """Read what has come so far of an answer that goes on."""
    reader = LogReader(parse(after))
    return [line for each in lines if each[:19].decode() >= (reader.begins or "")[:19] for line in reader.feed(each + b"\n")]


def test_a_quiet_follower_that_is_resumed_again_and_again_repeats_loses_and_misses_nothing() -> None:
    lines = written([*(number * 0.01 for number in range(100)), 200, 400.5, 400.4, 900])
    told: list[LogLine] = []
    for there in (10, 10, 10, 100, 100, 101, 101, 101, 103, 103, 104, 104):  # so many are there when it is cut off
        told += follow(lines[:there], told[-1].cursor if told else None)
    assert [line.text for line in told] == [b"line %d" % number for number in range(104)]
    assert not [line for line in told if line.gap]


def test_a_follower_that_is_resumed_after_a_rotation_waits_for_no_line_that_is_gone() -> None:
    lines = written([*(number * 0.01 for number in range(100)), 200, 201])
    cursor = read(lines[:100])[-1].cursor
    assert [line.text for line in follow(lines[97:], cursor)] == [b"line 100", b"line 101"]
    gap, *rest = follow(lines[100:], cursor)
    assert gap.gap
    assert [line.text for line in rest] == [b"line 100", b"line 101"]


@pytest.mark.parametrize(
    ("first", "length", "told"),
    [
        (LATE_SECONDS + 1, MUCH_BYTES, True),
        (LATE_SECONDS + 1, MUCH_BYTES // 2, False),  # a program that had nothing to say for a while
        (LATE_SECONDS - 1, MUCH_BYTES, False),
    ],
)
async def test_a_large_log_that_begins_long_after_its_program_may_have_lost_its_beginning(
    first: float, length: int, *, told: bool
) -> None:
    lines = read(written([first + number for number in range(20)], "x" * (length // 20)))
    started_at = datetime(2026, 11, 23, 12, tzinfo=UTC).timestamp()

    async def give() -> AsyncIterator[LogLine]:
        for line in lines:
            yield line

    given = [line async for line in from_its_start(give(), started_at)]
    assert [b"rotated" in line.text for line in given if line.gap] == [True] * told
    assert given[told:] == lines


def test_a_log_that_is_empty_by_now_is_a_gap() -> None:
    cursor = read(written([0.1, 0.2]))[1].cursor
    assert [b"rotated" in line.text for line in read([], cursor)] == [True]


@pytest.mark.parametrize(
    "complaint",
    [
        b"unable to retrieve container logs for docker://2485dd403e2a",
        b"rpc error: code = Unknown desc = Error: No such container: 2485dd403e2a",
    ],
)
def test_a_node_that_complains_in_place_of_a_log_has_lost_it(complaint: bytes) -> None:
    assert [line.text for line in read([complaint])] == [
        b"[the log is lost: its container was taken away before it could be read]"
    ]
    cursor = read(written([0.1, 0.2]))[1].cursor
    assert [b"rotated" in line.text for line in read([complaint], cursor)] == [True]
    assert [line.text for line in read([*written([0.1]), complaint])] == [b"line 0"]


def test_nothing_new_is_no_gap() -> None:
    lines = written([0.1, 0.2])
    assert read(lines, read(lines)[1].cursor) == []


def test_a_long_line_is_one_line_without_the_times_of_its_parts() -> None:
    time, text = b"2026-11-23T12:00:00.000000001Z ", b"".join(b"%06d" % number for number in range(20_000))
    parts = [text[at : at + PART] for at in range(0, len(text), PART)]
    assert [line.text for line in read([time + time.join(parts)])] == [text]
    assert [line.text for line in read([time + text])] == [text]


def test_a_last_line_without_an_end_comes_at_the_end() -> None:
    reader = LogReader(None)
    assert [line.text for line in reader.feed(b"2026-11-23T12:00:00.1Z one\n2026-11-23T12:00:00.2Z tw")] == [b"one"]
    assert [line.text for line in reader.finish()] == [b"tw"]


def test_what_a_kubelet_complains_of_is_no_line_of_the_log() -> None:
    reader = LogReader(None)
    lines = [
        *reader.feed(b"2024-01-01T00:00:00.5Z bye\nrpc error: code = Unknown desc = No such container"),
        *reader.finish(),
    ]
    assert [line.text for line in lines] == [b"bye"]


def test_a_kept_log_is_resumed_behind_any_line_and_tells_what_it_dropped() -> None:
    kept = KeptLog(Room(), most=3 * (len("line 0") + LINE_BYTES))
    lines = list(LogReader(None).feed(b"".join(b"2024-01-01T00:00:0%d.5Z line %d\n" % (n, n) for n in range(5))))
    for line in lines[:3]:
        kept.add(line)
    assert kept.after(None) == lines[:3]
    assert all(kept.after(line.cursor) == lines[number + 1 : 3] for number, line in enumerate(lines[:3]))
    for line in lines[3:]:
        kept.add(line)
    gap = b"[some output is missing here: the log was rotated]"
    assert [line.text for line in kept.after(lines[0].cursor)] == [gap, b"line 2", b"line 3", b"line 4"]
    assert [line.text for line in kept.after(lines[2].cursor)] == [b"line 3", b"line 4"]


def test_kept_logs_take_no_more_than_they_may_together_and_give_it_back() -> None:
    line = LogLine("0/1/2024", b"x" * 1000)
    room = Room(size=100 * (1000 + LINE_BYTES))
    logs = [KeptLog(room) for _ in range(5)]
    for log, lines in zip(logs, (60, 3, 3, 60, 60), strict=True):
        for _ in range(lines):
            log.add(line)
        assert room.taken <= room.size + len(logs) * (1000 + LINE_BYTES)  # a line of each is always kept
    assert [len(log.after(None)) for log in logs[:3]] == [60, 3, 3]
    for log in logs:
        log.stop()
        log.add(line)
    assert room.taken == 0
