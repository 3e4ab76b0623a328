"""Logs as files: capped in place, read by offsets that stay true, and kept when their engine forgets them."""

import asyncio
import itertools
import os
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from conftest import until
from typing_extensions import override

from app.errors import LauncherUnavailable, RunnerGone
from app.launcher import Exit, Handle, LaunchSpec, LogLine
from app.launchers.fake import FakeLauncher, FakeWorld
from app.log_times import MOST, Times
from app.logs import CHUNK, NOT_KEPT, LogFile, Spool

HANDLE = Handle(runner_id="runner-1")
MIB = 2**20


@pytest.fixture
def log(tmp_path: Path) -> LogFile:
    file = LogFile(tmp_path / "runner.log")
    file.path.touch()
    return file


def numbered(count: int, start: int = 0) -> bytes:
    """So many lines of 16 bytes, each with its number."""
    return b"".join(b"line %010d\n" % number for number in range(start, start + count))


def append(log: LogFile, data: bytes) -> None:
    with log.path.open("ab") as file:
        file.write(data)


async def chunks(log: LogFile, after: int = 0) -> tuple[bytes, int]:
    """Read what is there now, and the offset behind it."""
    data, end = b"", after
    async for offset, piece in log.chunks(after):
        data, end = data + piece, offset
    return data, end


async def lines(log: LogFile, after: int = 0) -> list[bytes]:
    return [line async for _, line in log.lines(after)]


def tail(log: LogFile, count: int) -> bytes:
    return log.path.read_bytes()[log.tail(count) :]


# Reading.


async def test_an_empty_log_has_nothing_to_read(log: LogFile) -> None:
    assert await chunks(log) == (b"", 0)
    assert await lines(log) == []
    assert [log.tail(count) for count in (0, 1, 100)] == [0, 0, 0]
    assert not log.trim(MIB)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"one\n", [b"one"]),
        (b"one\ntwo\n", [b"one", b"two"]),
        (b"one\ntwo", [b"one", b"two"]),
        (b"\n\n", [b"", b""]),
        (b"\n", [b""]),
        (b"no end", [b"no end"]),
        (b"\r\nx\0y\xff\xfe\n", [b"\r", b"x\0y\xff\xfe"]),
        (b"\n" * 5 + b"x", [b""] * 5 + [b"x"]),
    ],
)
async def test_lines_are_what_line_ends_part_whatever_bytes_they_hold(
    log: LogFile, data: bytes, expected: list[bytes]
) -> None:
    append(log, data)
    assert await lines(log) == expected
    assert await chunks(log) == (data, len(data))


@pytest.mark.parametrize("length", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 5])
async def test_lines_across_the_borders_of_pieces_are_whole(log: LogFile, length: int) -> None:
    """Lines of three lengths lie on every border of a piece, one after the other."""
    for size in (7, 100, 4096):
        data = (b"x" * (size - 1) + b"\n") * (length // size) + b"y" * (length % size)
        log.path.write_bytes(data)
        assert await lines(log) == data.removesuffix(b"\n").split(b"\n")
        assert (await chunks(log))[0] == data


async def test_a_line_that_is_too_long_comes_in_parts_and_nothing_of_it_is_missing(log: LogFile) -> None:
    data = b"short\n" + b"x" * (5 * CHUNK + 17) + b"\nlast\n"
    append(log, data)
    parts = await lines(log)
    assert parts[0] == b"short"
    assert parts[-1] == b"last"
    assert b"".join(parts[1:-1]) == b"x" * (5 * CHUNK + 17)
    assert max(map(len, parts)) <= 2 * CHUNK


async def test_reading_resumes_behind_any_line_without_a_gap_or_a_repeat(log: LogFile) -> None:
    append(log, b"one\n\nthree\n" + b"x" * (CHUNK + 5) + b"\nfive\nsix")
    whole = [(offset, line) async for offset, line in log.lines()]
    for number, (offset, _) in enumerate(whole):
        rest = [line async for _, line in log.lines(offset)]
        assert rest == [line for _, line in whole[number + 1 :]]


async def test_what_is_written_behind_a_last_line_without_an_end_comes_next(log: LogFile) -> None:
    append(log, b"one\ntw")
    [(_, _), (end, line)] = [item async for item in log.lines()]
    assert line == b"tw"
    append(log, b"o\nthree\n")
    assert await lines(log, end) == [b"o", b"three"]


# The tail.


@pytest.mark.parametrize(
    ("data", "count", "expected"),
    [
        (b"one\ntwo\nthree\n", 1, b"three\n"),
        (b"one\ntwo\nthree\n", 2, b"two\nthree\n"),
        (b"one\ntwo\nthree\n", 3, b"one\ntwo\nthree\n"),
        (b"one\ntwo\nthree\n", 99, b"one\ntwo\nthree\n"),
        (b"one\ntwo\nthree\n", 0, b""),
        (b"one\ntwo\nthr", 1, b"thr"),
        (b"one\ntwo\nthr", 2, b"two\nthr"),
        (b"one\ntwo\nthr", 0, b""),
        (b"x", 0, b""),
        (b"x", 1, b"x"),
        (b"\n", 1, b"\n"),
        (b"\n\n\n", 2, b"\n\n"),
    ],
)
def test_a_tail_is_the_last_lines(log: LogFile, data: bytes, count: int, expected: bytes) -> None:
    append(log, data)
    assert 0 <= log.tail(count) <= len(data)
    assert tail(log, count) == expected


@pytest.mark.parametrize("shift", [0, 1, 15])
def test_a_tail_is_found_across_the_borders_of_pieces(log: LogFile, shift: int) -> None:
    append(log, b"x" * shift + numbered(3 * CHUNK // 16 + 1))
    for count in (1, CHUNK // 16 - 1, CHUNK // 16, CHUNK // 16 + 1, 2 * CHUNK // 16, 3 * CHUNK // 16):
        assert tail(log, count) == numbered(count, start=3 * CHUNK // 16 + 1 - count)


def test_a_tail_of_very_long_lines_is_found(log: LogFile) -> None:
    long = b"x" * (2 * CHUNK) + b"\n"
    append(log, long * 3)
    assert tail(log, 2) == long * 2
    append(log, b"y" * (CHUNK + 1))
    assert tail(log, 2) == long + b"y" * (CHUNK + 1)


# The cap.


def test_a_log_below_its_cap_is_left_alone(log: LogFile) -> None:
    append(log, numbered(1000))
    assert not log.trim(16_000)
    assert log.path.read_bytes() == numbered(1000)


def test_beyond_the_cap_the_oldest_part_is_dropped_in_place_and_its_space_is_given_back(log: LogFile) -> None:
    append(log, numbered(4 * MIB // 16))
    assert log.trim(MIB)
    assert log.path.stat().st_size == 4 * MIB
    assert log.path.stat().st_blocks * 512 <= MIB
    assert tail(log, 100) == numbered(100, start=4 * MIB // 16 - 100)


def test_once_part_of_a_log_was_dropped_it_stays_known(log: LogFile) -> None:
    append(log, numbered(2 * MIB // 16))
    assert log.trim(MIB)
    assert log.trim(MIB)
    assert log.trim(100 * MIB)


def test_a_busy_log_is_not_cut_for_every_line(log: LogFile) -> None:
    append(log, numbered(2 * MIB // 16))
    log.trim(MIB)
    blocks = log.path.stat().st_blocks
    append(log, numbered(MIB // 8 // 16))
    log.trim(MIB)
    assert log.path.stat().st_blocks > blocks


async def test_a_capped_log_begins_with_a_line_that_says_what_is_missing_and_then_whole_lines(log: LogFile) -> None:
    total = 4 * MIB // 16
    append(log, numbered(total))
    log.trim(MIB)
    note, *rest = await lines(log)
    kept = b"\n".join(rest) + b"\n"
    assert note == b"[%d bytes of older output were dropped: the log is capped]" % (16 * total - len(kept))
    assert kept == numbered(len(kept) // 16, start=total - len(kept) // 16)
    assert MIB // 2 < len(kept) <= MIB


async def test_offsets_stay_true_when_the_oldest_part_is_dropped(log: LogFile) -> None:
    append(log, numbered(2 * MIB // 16))
    cursors = [offset async for offset, _ in log.lines()]
    log.trim(MIB)
    assert await lines(log, cursors[-11]) == numbered(10, start=2 * MIB // 16 - 10).splitlines()
    assert await chunks(log, 2 * MIB - 160) == (numbered(10, start=2 * MIB // 16 - 10), 2 * MIB)


@pytest.mark.parametrize("read", [0, 16, 800 * 16, MIB - 16, MIB])
async def test_a_reader_that_is_overtaken_is_told_how_much_it_missed_and_nothing_comes_twice(
    log: LogFile, read: int
) -> None:
    total = 4 * MIB // 16
    append(log, numbered(total))
    log.trim(MIB)
    note, *rest = await lines(log, read)
    kept = b"\n".join(rest) + b"\n"
    assert note == b"[%d bytes of older output were dropped: the log is capped]" % (16 * total - len(kept) - read)
    assert numbered(total).endswith(kept)
    again = [offset async for offset, _ in log.lines(read)]
    assert await lines(log, again[0]) == rest
    assert await lines(log, again[-1]) == []


async def test_a_log_cut_while_it_is_read_goes_on_with_a_note_on_a_line_of_its_own(log: LogFile) -> None:
    append(log, b"x" + numbered(4 * MIB // 16))  # so that no piece ends where a line does
    got: list[bytes] = []
    async for _, line in log.lines():
        got.append(line)
        if len(got) == 10:
            await asyncio.to_thread(log.trim, MIB)
    notes = [line for line in got if b"dropped" in line]
    assert len(notes) == 1
    assert notes[0].startswith(b"[")
    assert notes[0].endswith(b"]")
    assert got[-1] == b"line %010d" % (4 * MIB // 16 - 1)
    numbers = [int(line.removeprefix(b"line ")) for line in got if line.startswith(b"line ") and len(line) == 15]
    assert numbers == sorted(set(numbers))


async def test_a_hole_that_ends_in_a_line_as_long_as_a_piece_loses_nothing_behind_it(log: LogFile) -> None:
    append(log, b"a" * (4 * MIB) + b"b" * (CHUNK - 1) + b"\nafter\n")
    with log.path.open("r+b") as file:
        punch(file.fileno(), 4 * MIB)
    assert (await lines(log))[-1] == b"after"


async def test_the_tail_of_a_capped_log_says_so_when_it_reaches_the_hole(log: LogFile) -> None:
    total = 4 * MIB // 16
    log.path.write_bytes(b"x" + numbered(total)[:-1])  # so that no hole ends where a line does
    log.trim(MIB)
    data, _ = await chunks(log, await asyncio.to_thread(log.tail, 10 * total))
    first, second = data.split(b"\n")[:2]
    assert b"dropped: the log is capped" in first
    assert len(second) == 15


def punch(fd: int, length: int) -> None:
    """Make a hole at the front of a file as the service would."""
    subprocess.run(["fallocate", "--punch-hole", "--length", str(length), f"/proc/self/fd/{fd}"], check=True, pass_fds=[fd])


# Where holes cannot be made.


async def test_a_log_that_was_emptied_begins_again_with_a_line_that_says_so(log: LogFile) -> None:
    append(log, numbered(1000))
    os.truncate(log.path, 0)
    append(log, b"new\n")
    assert await lines(log, 16_000) == [b"[the oldest output was dropped: the log is capped]", b"new"]
    assert await chunks(log, 16_000) == (b"[the oldest output was dropped: the log is capped]\nnew\n", 4)


async def test_the_marks_of_a_log_that_is_emptied_go_with_it(log: LogFile) -> None:
    append(log, numbered(1000))
    log.note()
    moment = time.time()
    log.times.drop()  # as trim() does it first
    os.truncate(log.path, 0)
    append(log, numbered(2000))
    assert log.since(moment) == 0
    log.note()
    assert log.since(time.time()) == 32_000


# Since a time.


def test_what_was_written_since_a_time_begins_behind_the_last_mark_before_it(log: LogFile) -> None:
    append(log, b"one\n")
    assert log.note()
    assert not log.note()
    moment = time.time()
    append(log, b"two\n")
    assert log.since(moment) == 4
    assert log.since(time.time()) == 4  # there is no mark behind it yet: more comes, not less
    assert log.note()
    assert log.since(moment) == 4
    assert log.since(time.time()) == 8
    assert log.since(0) == 0


def test_a_log_without_marks_is_all_new_and_a_time_to_come_has_nothing_yet(log: LogFile) -> None:
    append(log, b"one\ntwo")
    assert log.since(time.time() - 1) == 0
    assert log.since(time.time() + 3_600) == 7
    log.note()
    assert log.since(time.time()) == 7


def test_a_line_that_was_half_written_at_that_time_comes_whole(log: LogFile) -> None:
    append(log, b"one\n" + b"x" * (2 * CHUNK))
    log.note()
    moment = time.time()
    append(log, b"y\n")
    assert log.since(moment) == 4


def test_a_time_from_which_all_was_dropped_leads_to_the_line_that_says_so(log: LogFile) -> None:
    append(log, numbered(100))
    log.note()
    moment = time.time()
    append(log, numbered(2 * MIB // 16))
    log.trim(MIB)
    assert log.since(moment) == 0
    append(log, numbered(1))
    log.note()
    append(log, b"new\n")
    assert log.since(time.time()) == 1_616 + 2 * MIB


def test_tail_and_since_together_are_what_both_let_through(log: LogFile) -> None:
    append(log, numbered(10))
    log.note()
    moment = time.time()
    append(log, numbered(10))
    log.note()
    assert log.start(tail=3, since=moment) == 17 * 16
    assert log.start(tail=13, since=moment) == 10 * 16
    assert log.start(tail=None, since=moment) == 10 * 16
    assert log.start(tail=3, since=None) == 17 * 16


def test_a_mark_that_a_full_disk_cut_off_is_written_over(tmp_path: Path) -> None:
    times = Times(tmp_path / "times")
    times.note((1.0, 10))
    with times.path.open("ab") as file:
        file.write(b"\x07" * 9)
    assert list(times) == [(1.0, 10)]
    times.note((2.0, 20))
    assert list(times) == [(1.0, 10), (2.0, 20)]


def test_a_clock_that_is_set_back_loses_nothing(tmp_path: Path) -> None:
    times = Times(tmp_path / "times")
    times.write([(100.0, 1), (200.0, 2), (50.0, 3), (60.0, 4)])
    assert [times.offset(since) for since in (55, 100.5, 150, 200.5)] == [0, 1, 1, 4]


def test_marks_are_bounded_and_the_newest_stay_exact(tmp_path: Path) -> None:
    times = Times(tmp_path / "times")
    times.write([(float(second), second) for second in range(3 * MOST)])
    for second in range(3 * MOST, 3 * MOST + 10):
        times.note((float(second), second))
    marks = list(times)
    assert len(marks) <= MOST
    assert times.path.stat().st_size == 16 * len(marks)
    assert marks == sorted(marks)
    assert marks[-100:] == [(float(second), second) for second in range(3 * MOST - 90, 3 * MOST + 10)]
    spaces = [after[0] - before[0] for before, after in itertools.pairwise(marks)]
    assert max(spaces) < 64


# Following.


async def test_a_follower_hears_what_is_written_and_ends_after_the_last_line(log: LogFile) -> None:
    append(log, b"one\n")
    alive = asyncio.Event()
    alive.set()
    got: list[bytes] = []
    async for _, line in log.lines(follow=alive.is_set):
        got.append(line)
        if line == b"one":
            await asyncio.to_thread(append, log, b"two\nthr")
        if line == b"two":
            await asyncio.to_thread(append, log, b"ee\nlast words")
            alive.clear()
    assert got == [b"one", b"two", b"three", b"last words"]


async def test_a_follower_of_an_ended_runner_reads_all_and_ends(log: LogFile) -> None:
    append(log, numbered(100))
    assert b"".join([data async for _, data in log.chunks(follow=lambda: False)]) == numbered(100)


async def test_a_follower_that_goes_away_closes_the_file(log: LogFile) -> None:
    append(log, b"one\n")
    reading = log.chunks(follow=lambda: True)
    assert await anext(reading) == (4, b"one\n")
    await reading.aclose()  # type: ignore[attr-defined]
    held = [fd.readlink() for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    assert log.path not in held


# The spool.


class Files(FakeLauncher):
    """A launcher that keeps output in files, as the local one does."""

    def __init__(self, world: FakeWorld, directory: Path) -> None:
        super().__init__(world)
        self._directory = directory

    @override
    def log_file(self, handle: Handle) -> Path | None:
        return self._directory / handle.runner_id


@pytest.fixture
def world() -> FakeWorld:
    return FakeWorld()


@pytest.fixture
def engine(world: FakeWorld) -> FakeLauncher:
    return FakeLauncher(world)


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "logs")


def start(world: FakeWorld, *words: str) -> None:
    world.start("fake", HANDLE.runner_id, LaunchSpec(command=("fake", *words), environment={}, context=b""))


async def output(
    spool: Spool,
    launcher: FakeLauncher,
    *,
    tail: int | None = None,
    since: float | None = None,
    follow: Callable[[], bool] | None = None,
) -> bytes:
    return b"".join([data async for data in spool.output(launcher, HANDLE, tail=tail, since=since, follow=follow)])


async def test_a_log_is_kept_whole_when_its_engine_forgets_it(world: FakeWorld, engine: FakeLauncher, spool: Spool) -> None:
    start(world, *[f"print=line {number}" for number in range(1000)], "write=no end", "exit=0")
    await spool.keep(engine, HANDLE)
    await spool.keep(engine, HANDLE)
    await engine.remove(HANDLE)
    expected = b"".join(b"line %d\n" % number for number in range(1000)) + b"no end\n"
    assert await output(spool, engine) == expected
    assert await output(spool, engine, tail=2) == b"line 999\nno end\n"


async def test_a_log_is_kept_also_on_another_file_system_than_the_engines(tmp_path: Path) -> None:
    class HasFile(FakeLauncher):
        @override
        def log_file(self, handle: Handle) -> Path | None:
            return tmp_path / "output.log"

    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        assert Path(elsewhere).stat().st_dev != tmp_path.stat().st_dev
        (log := LogFile(tmp_path / "output.log")).path.write_bytes(numbered(MIB // 4))
        log.trim(MIB)
        spool, launcher = Spool(Path(elsewhere)), HasFile(FakeWorld())
        for _ in range(2):
            await spool.keep(launcher, HANDLE)
        kept, first = Path(elsewhere) / "runner-1.log", log.path.read_bytes()
        assert kept.read_bytes() == first
        assert kept.stat().st_blocks * 512 < 2 * MIB < kept.stat().st_size
        assert {file.name for file in Path(elsewhere).iterdir()} == {"runner-1.log"}


async def test_keeping_again_after_the_engine_forgot_it_keeps_what_is_kept(
    world: FakeWorld, engine: FakeLauncher, spool: Spool, tmp_path: Path
) -> None:
    start(world, "print=one", "exit=0")
    await spool.keep(engine, HANDLE)
    await engine.remove(HANDLE)
    await spool.keep(engine, HANDLE)
    assert await output(spool, engine) == b"one\n"
    assert {file.name for file in (tmp_path / "logs").iterdir()} == {"runner-1.log", "runner-1.log.times"}


async def test_keeping_again_what_the_engine_has_lost_by_now_keeps_what_is_kept(
    world: FakeWorld, engine: FakeLauncher, spool: Spool, tmp_path: Path
) -> None:
    class Loses(FakeLauncher):
        @override
        async def logs(
            self, handle: Handle, *, after: str | None = None, since: float | None = None, follow: bool = False
        ) -> AsyncIterator[LogLine]:
            yield LogLine("lost", b"[lost]", gap=True)

    assert await spool.keep(Loses(world), HANDLE)
    assert await output(spool, engine) == b"[lost]\n"
    start(world, "print=one, and more of it", "print=two", "exit=0")
    assert not await spool.keep(engine, HANDLE)
    await engine.remove(HANDLE)
    assert not await spool.keep(Loses(world), HANDLE)
    assert await output(spool, engine) == b"one, and more of it\ntwo\n"
    assert {file.name for file in (tmp_path / "logs").iterdir()} == {"runner-1.log", "runner-1.log.times"}


async def test_a_log_that_cannot_be_read_now_is_not_taken_for_an_empty_one(
    world: FakeWorld, engine: FakeLauncher, spool: Spool
) -> None:
    start(world, "print=one", "exit=0")
    with world.unavailable(), pytest.raises(LauncherUnavailable):
        await spool.keep(engine, HANDLE)
    assert not spool.file(HANDLE.runner_id).path.exists()
    await spool.keep(engine, HANDLE)
    assert await output(spool, engine) == b"one\n"


async def test_a_log_that_breaks_off_while_it_is_kept_is_kept_whole_by_the_next_try(
    world: FakeWorld, engine: FakeLauncher, spool: Spool
) -> None:
    class Breaks(FakeLauncher):
        @override
        async def logs(
            self, handle: Handle, *, after: str | None = None, since: float | None = None, follow: bool = False
        ) -> AsyncIterator[LogLine]:
            async for line in super().logs(handle, after=after, since=since, follow=follow):
                yield line
                raise LauncherUnavailable("the connection broke")

    start(world, "print=one", "print=two", "exit=0")
    with pytest.raises(LauncherUnavailable):
        await spool.keep(Breaks(world), HANDLE)
    assert not spool.file(HANDLE.runner_id).path.exists()
    await spool.keep(engine, HANDLE)
    assert await output(spool, engine) == b"one\ntwo\n"


async def test_a_runner_without_output_has_an_empty_log_and_an_unknown_one_none(
    world: FakeWorld, engine: FakeLauncher, spool: Spool, tmp_path: Path
) -> None:
    await spool.keep(engine, HANDLE)
    assert list((tmp_path / "logs").iterdir()) == []
    assert await output(spool, engine) == NOT_KEPT
    start(world, "exit=0")
    await spool.keep(engine, HANDLE)
    assert await output(spool, engine) == b""


async def test_the_output_of_a_live_runner_is_its_engines(world: FakeWorld, engine: FakeLauncher, spool: Spool) -> None:
    start(world, "print=one", "print=two", "print=three")
    assert await output(spool, engine) == b"one\ntwo\nthree\n"
    assert [await output(spool, engine, tail=count) for count in (0, 1, 2, 9)] == [
        b"",
        b"three\n",
        b"two\nthree\n",
        b"one\ntwo\nthree\n",
    ]


@pytest.mark.parametrize(("tail", "expected"), [(None, b"one\ntwo\nthree\n"), (1, b"two\nthree\n"), (0, b"three\n")])
async def test_who_follows_hears_the_rest_and_the_end(
    world: FakeWorld, engine: FakeLauncher, spool: Spool, tail: int | None, expected: bytes
) -> None:
    start(world, "print=one", "print=two")
    following = asyncio.create_task(output(spool, engine, tail=tail, follow=lambda: True))
    await until(lambda: world.calls.count(("logs", HANDLE.runner_id)) == (1 if tail is None else 2))
    world.happen(HANDLE.runner_id, b"three\n")
    world.happen(HANDLE.runner_id, Exit(code=0))
    async with asyncio.timeout(8):
        assert await following == expected


async def test_a_log_file_is_kept_by_its_name_and_read_by_it_once_its_directory_is_gone(
    world: FakeWorld, spool: Spool, tmp_path: Path
) -> None:
    launcher = Files(world, tmp_path)
    source = tmp_path / HANDLE.runner_id
    assert await output(spool, launcher) == NOT_KEPT
    source.write_bytes(b"one\ntwo\n")
    assert await output(spool, launcher) == b"one\ntwo\n"
    await spool.keep(launcher, HANDLE)
    source.unlink()
    await spool.keep(launcher, HANDLE)
    assert await output(spool, launcher) == b"one\ntwo\n"
    assert await output(spool, launcher, tail=1) == b"two\n"


async def test_a_follower_of_a_file_is_not_disturbed_when_it_is_moved_to_where_it_is_kept(
    world: FakeWorld, spool: Spool, tmp_path: Path
) -> None:
    launcher = Files(world, tmp_path)
    source = tmp_path / HANDLE.runner_id
    source.write_bytes(b"one\n")
    alive = asyncio.Event()
    alive.set()
    got = b""
    async for data in spool.output(launcher, HANDLE, tail=None, follow=alive.is_set):
        got += data
        if data == b"one\n":
            await asyncio.to_thread(append, LogFile(source), b"last\n")
            await spool.keep(launcher, HANDLE)
            await asyncio.to_thread(source.unlink)
            alive.clear()
    assert got == b"one\nlast\n"


async def test_what_was_written_since_a_time_is_the_same_before_and_after_its_engine_forgot_it(spool: Spool) -> None:
    now = 1_000.0
    world = FakeWorld(clock=lambda: now)
    engine = FakeLauncher(world)
    words = ("print=0", "after=10", "print=10", "print=10 too", "after=0.5", "print=10.5", "after=0.2", "print=10.7")
    start(world, *words, "after=10", "print=20.7")
    now += 30
    world.finish(HANDLE.runner_id)
    expected = {
        0: b"0\n10\n10 too\n10.5\n10.7\n20.7\n",
        1_000: b"0\n10\n10 too\n10.5\n10.7\n20.7\n",
        1_000.1: b"10\n10 too\n10.5\n10.7\n20.7\n",
        1_010: b"10\n10 too\n10.5\n10.7\n20.7\n",
        1_011: b"20.7\n",
        1_020.6: b"20.7\n",
        1_020.8: b"",
        9e9: b"",
    }
    assert {moment: await output(spool, engine, since=moment) for moment in expected} == expected
    await spool.keep(engine, HANDLE)
    await engine.remove(HANDLE)
    assert {moment: await output(spool, engine, since=moment) for moment in expected} == expected
    assert await output(spool, engine, since=1_010.6) == b"10.5\n10.7\n20.7\n"  # a second's worth more, and no less
    assert await output(spool, engine, since=1_005, tail=2) == b"10.7\n20.7\n"
    assert await output(spool, engine, since=1_015, tail=2) == b"20.7\n"


async def test_a_time_to_come_is_now_for_who_follows(world: FakeWorld, engine: FakeLauncher, spool: Spool) -> None:
    start(world, "print=old")
    following = asyncio.create_task(output(spool, engine, since=time.time() + 3_600, follow=lambda: True))
    await until(lambda: ("logs", HANDLE.runner_id) in world.calls)
    world.happen(HANDLE.runner_id, b"new\n")
    world.finish(HANDLE.runner_id)
    async with asyncio.timeout(8):
        assert await following == b"new\n"


async def test_the_marks_of_a_log_file_are_kept_counted_and_forgotten_with_it(
    world: FakeWorld, spool: Spool, tmp_path: Path
) -> None:
    launcher = Files(world, tmp_path)
    source = LogFile(tmp_path / HANDLE.runner_id)
    source.path.write_bytes(b"old\n")
    source.note()
    moment = time.time()
    append(source, b"new\n")
    source.note()
    assert await output(spool, launcher, since=moment) == b"new\n"
    await spool.keep(launcher, HANDLE)
    await spool.keep(launcher, HANDLE)
    source.path.unlink()
    source.times.drop()
    assert await output(spool, launcher, since=moment) == b"new\n"
    kept = list((tmp_path / "logs").iterdir())
    assert len(kept) == 2
    assert spool.sizes()[HANDLE.runner_id][1] == sum(path.stat().st_blocks * 512 for path in kept)
    spool.forget([HANDLE.runner_id])
    assert list((tmp_path / "logs").iterdir()) == []


async def test_a_runner_that_is_gone_before_anything_was_kept_has_no_log(
    world: FakeWorld, engine: FakeLauncher, spool: Spool
) -> None:
    start(world, "print=one")
    world.delete(HANDLE.runner_id)
    with pytest.raises(RunnerGone):
        await anext(engine.logs(HANDLE))
    await spool.keep(engine, HANDLE)
    assert await output(spool, engine, follow=lambda: True) == NOT_KEPT


@pytest.mark.timeout(20)
async def test_a_runner_that_makes_holes_in_its_log_keeps_nobody_busy(log: LogFile) -> None:
    append(log, b"first\n")
    os.truncate(log.path, 1 << 42)
    append(log, b"cut\nlast\n")
    log.note()
    for start in (log.tail(5), log.since(time.time() - 1), 0):
        data, _ = await chunks(log, start)
        assert data.replace(b"\0", b"").endswith(b"last\n")
        assert len(data) < MIB
