"""A runner's output as a file: appended to by the runner, read by lines, capped in place, kept after the end.

A cursor is a byte offset. Dropping the oldest part leaves a hole at the front of the file, so offsets, and the cursors that
readers hold, stay true. Where the file system cannot make holes the file is emptied, and a reader whose cursor lies behind
its end starts again at the front. Either way the reader is given a line that says what is missing.

Lines in a file bear no times, so it is noted beside it how far it had come when (log_times.py).
"""

import asyncio
import contextlib
import ctypes
import os
import shutil
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from pathlib import Path

from app.errors import RunnerGone
from app.launcher import Handle, Launcher, LogLine
from app.log_times import Spacing, Times

BLOCK = 4096
CHUNK = 256 * 1024
FOLLOW_SECONDS = 0.1
NOT_KEPT = b"[no log of it is kept]\n"
_KEEP_SIZE, _PUNCH_HOLE = 1, 2

_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class LogFile:
    """The output of one runner."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.times = Times(path.with_name(f"{path.name}.times"))
        self._noted = 0

    def note(self) -> bool:
        """Note how far it has come by now, and say whether that is another place than at the last note. Blocks."""
        size = self.path.stat().st_size
        if size == self._noted:
            return False
        with contextlib.suppress(OSError):  # a full disk: then more counts as new than is
            self.times.note((time.time(), size))
        self._noted = size
        return True

    def trim(self, limit: int) -> bool:
        """Drop the oldest part when there are more than ``limit`` bytes; says whether any part was ever dropped. Blocks.

        A quarter of the limit is freed at a time, so that a busy runner does not cause a cut per line.
        """
        with self.path.open("r+b") as file:
            size = os.fstat(file.fileno()).st_size
            start = _first_byte(file.fileno(), 0, size)
            if size - start <= limit:
                return start > 0
            start = (size - limit * 3 // 4) // BLOCK * BLOCK
            if _fallocate(file.fileno(), _PUNCH_HOLE | _KEEP_SIZE, 0, start) != 0:
                self.times.drop()
                os.ftruncate(file.fileno(), 0)
            return True

    def tail(self, lines: int) -> int:
        """The offset at which the last so many lines begin. Blocks."""
        with self.path.open("rb") as file:
            position = size = os.fstat(file.fileno()).st_size
            hole, start = _last_hole(file.fileno(), size)
            wanted = lines + 1  # line ends to step over, the last line's own included
            while position > start:
                step = min(CHUNK, position - start)
                block = os.pread(file.fileno(), step, position - step)
                if position == size and not block.endswith(b"\n"):
                    if lines == 0:
                        return size
                    wanted -= 1
                found = block.count(b"\n")
                if found >= wanted:
                    at = len(block)
                    for _ in range(wanted):
                        at = block.rindex(b"\n", 0, at)
                    return position - step + at + 1
                wanted -= found
                position -= step
            return hole  # that before these lines, if any, included: whoever reads on from here is told of it

    def since(self, moment: float) -> int:
        """The offset before which all was surely written before a time; where a line begins, or at the end. Blocks."""
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            position = size if moment > time.time() else min(size, self.times.offset(moment))
            if position == size:
                return size
            hole, start = _last_hole(file.fileno(), size)
            while position > start:
                step = min(CHUNK, position - start)
                block = os.pread(file.fileno(), step, position - step)
                if b"\n" in block:
                    return position - step + block.rindex(b"\n") + 1
                position -= step
            return min(hole, position)  # as in tail()

    def start(self, tail: int | None, since: float | None) -> int:
        """Where to begin for the last ``tail`` lines (None: all) of what was written since a time. Blocks."""
        return max(0 if tail is None else self.tail(tail), 0 if since is None else self.since(since))

    async def chunks(self, after: int = 0, *, follow: Callable[[], bool] | None = None) -> AsyncIterator[tuple[int, bytes]]:
        """Output behind an offset, in pieces of whatever size, each with the offset behind it.

        ``follow`` is asked, before each look at the file, whether more may come; the last look is after its first no.
        """
        file = await asyncio.to_thread(self.path.open, "rb", buffering=0)
        try:
            broken = False  # whether the last piece ended within a line
            while True:
                more = follow is not None and follow()
                gap, data = await asyncio.to_thread(_read, file.fileno(), after)
                if gap:
                    after += gap
                    yield after, b"\n" * broken + _gap_note(gap)
                    broken = False
                if data:
                    after += len(data)
                    broken = not data.endswith(b"\n")
                    yield after, data
                elif not gap:  # behind a gap there may be more
                    if not more:
                        return
                    await asyncio.sleep(FOLLOW_SECONDS)
        finally:
            file.close()

    async def lines(self, after: int = 0, *, follow: Callable[[], bool] | None = None) -> AsyncIterator[tuple[int, bytes]]:
        """Output behind an offset, line by line without line ends, each with the offset behind it.

        A last line without an end comes at the end; a line longer than CHUNK comes in parts.
        """
        rest, end = b"", after
        async for offset, data in self.chunks(after, follow=follow):
            rest += data
            end = offset
            *whole, rest = rest.split(b"\n")
            at = end - len(rest) - sum(len(line) + 1 for line in whole)
            for line in whole:
                at += len(line) + 1
                yield at, line
            if len(rest) > CHUNK:
                yield end, rest
                rest = b""
        if rest:
            yield end, rest


def _first_byte(fd: int, offset: int, size: int) -> int:
    """The first offset from here on that is not in a hole."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError:  # nothing but a hole, or nothing at all, from here to the end
        return size


def _first_hole(fd: int, offset: int, size: int) -> int:
    """The first offset from here on that is in a hole, or at the end."""
    try:
        return os.lseek(fd, offset, os.SEEK_HOLE)
    except OSError:  # the file is shorter by now
        return size


def _last_hole(fd: int, size: int) -> tuple[int, int]:
    """Where the last hole begins and ends. We make one at the front alone; a runner may make more, as large as it likes."""
    begin, end = 0, _first_byte(fd, 0, size)
    while end < size and (hole := _first_hole(fd, end, size)) < size:
        begin, end = hole, _first_byte(fd, hole, size)
    return begin, end


def _read(fd: int, after: int) -> tuple[int, bytes]:
    """The next bytes behind an offset, and how many bytes are missing before them."""
    size = os.fstat(fd).st_size
    if after > size:  # emptied where holes cannot be made
        return -after, b""
    start = _first_byte(fd, after, size)
    data = os.pread(fd, min(CHUNK, max(0, _first_hole(fd, start, size) - start)), start)
    if start == after or not data:
        return start - after, data
    cut = data.find(b"\n") + 1  # the hole ends within a line
    return start - after + cut, data[cut:]


def _gap_note(gap: int) -> bytes:
    return (
        b"[the oldest output was dropped: the log is capped]\n"
        if gap < 0
        else (b"[%d bytes of older output were dropped: the log is capped]\n" % gap)
    )


class Spool:
    """Where the logs of ended runners are kept, whatever their engine has forgotten."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def file(self, runner_id: str) -> LogFile:
        """Give the kept log of a runner; there may be none."""
        return LogFile(self._directory / f"{runner_id}.log")

    async def keep(self, launcher: Launcher, handle: Handle) -> bool:
        """Make a runner's whole output safe before its engine forgets it; again is no harm. Raises LauncherUnavailable.

        Says whether reading it showed that some of it is missing. What was kept before, by a service that was killed right
        after, is kept where the engine has less of it by now.
        """
        kept = self.file(handle.runner_id).path
        if source := launcher.log_file(handle):
            await asyncio.to_thread(_link, LogFile(source), LogFile(kept))
            return False
        fresh, spacing, size, gaps = kept.with_suffix(".new"), Spacing(), 0, 0
        try:
            async for piece, missing in _pieces(launcher.logs(handle), spacing):
                gaps += missing
                await asyncio.to_thread(_put, fresh, piece, size)
                size += len(piece)
        except RunnerGone:
            await asyncio.to_thread(fresh.unlink, missing_ok=True)
            return False
        spacing.end(size)
        return await asyncio.to_thread(_take, fresh, size, LogFile(kept), spacing, gaps)

    def sizes(self) -> dict[str, tuple[float, int]]:
        """Say of each kept log when it was last written to, and how many bytes of disk it takes; by runner. Blocks."""
        sizes: dict[str, tuple[float, int]] = {}
        for path in self._directory.glob("runner-*.log*"):
            with contextlib.suppress(FileNotFoundError):
                stat, name = path.stat(), path.name.partition(".")[0]
                written_at, size = sizes.get(name, (0.0, 0))
                sizes[name] = max(written_at, stat.st_mtime), size + stat.st_blocks * 512
        return sizes

    def forget(self, runner_ids: Iterable[str]) -> None:
        """Remove the logs of these runners, where there are any. Blocks."""
        for runner_id in runner_ids:
            log = self.file(runner_id)
            log.times.drop()
            log.path.unlink(missing_ok=True)

    async def output(
        self,
        launcher: Launcher,
        handle: Handle,
        *,
        tail: int | None,
        follow: Callable[[], bool] | None,
        since: float | None = None,
    ) -> AsyncIterator[bytes]:
        """Give a runner's output wherever it is now, in pieces; the last ``tail`` lines of it, or all.

        ``since`` (seconds since the epoch) leaves out what was surely written before; a time to come means now.
        ``follow`` says whether more may come; None: only what is there.
        """
        for path in filter(None, (launcher.log_file(handle), self.file(handle.runner_id).path)):
            if await asyncio.to_thread(path.exists):
                with contextlib.suppress(FileNotFoundError):  # it was just moved to where it is kept
                    log = LogFile(path)
                    start = await asyncio.to_thread(log.start, tail, since)
                    async for _, data in log.chunks(start, follow=follow):
                        yield data
                    return
        given = 0
        try:
            async for piece in _gathered(_lines(launcher, handle, tail, since, follow=follow is not None)):
                given += len(piece)
                yield piece
        except RunnerGone:  # its engine was told to forget it, when its log was safe
            kept = self.file(handle.runner_id)
            if not await asyncio.to_thread(kept.path.exists):
                yield b"[the rest of its log is not kept]\n" if given else NOT_KEPT
                return
            part = tail is not None or since is not None
            if given and (part or given > (await asyncio.to_thread(kept.path.stat)).st_size):
                yield b"[the rest is in the log that was kept: read it again]\n"
            else:
                start = await asyncio.to_thread(kept.start, tail, since) if part else given
                async for _, data in kept.chunks(start):
                    yield data


async def _lines(
    launcher: Launcher, handle: Handle, tail: int | None, since: float | None, *, follow: bool
) -> AsyncGenerator[LogLine]:
    """Give the last lines that an engine has, then those that come."""
    after = None
    since = None if since is None else min(since, time.time())
    if tail is not None:
        last: deque[LogLine] = deque(maxlen=tail)
        async for line in launcher.logs(handle, since=since):
            last.append(line)
            after = line.cursor
        for line in last:
            yield line
        if not follow:
            return
    async for line in launcher.logs(handle, after=after, since=since, follow=follow):
        yield line


async def _gathered(lines: AsyncGenerator[LogLine]) -> AsyncIterator[bytes]:
    """Join the lines that come together, for to wake a reader for each costs many times what a line does."""
    piece, more, room = bytearray(), asyncio.Event(), asyncio.Event()

    async def gather() -> None:
        try:
            async with contextlib.aclosing(lines):
                async for line in lines:
                    piece.extend(line.text + b"\n")
                    more.set()
                    if len(piece) >= CHUNK:
                        room.clear()
                        await room.wait()
        finally:
            more.set()

    gathering = asyncio.create_task(gather())
    try:
        while piece or not gathering.done():
            if piece:
                together = bytes(piece)
                piece.clear()
                room.set()
                yield together
            else:
                await more.wait()
                more.clear()
        await gathering
    finally:
        gathering.cancel()
        await asyncio.gather(gathering, return_exceptions=True)


async def _pieces(lines: AsyncIterator[LogLine], spacing: Spacing) -> AsyncIterator[tuple[bytes, int]]:
    """Join lines to pieces that are worth a write, each with how many gaps it tells of, and note their times."""
    piece, written, gaps = bytearray(), 0, 0
    async for line in lines:
        spacing.line(line.time, written + len(piece))
        piece += line.text + b"\n"
        gaps += line.gap
        if len(piece) >= CHUNK:
            yield bytes(piece), gaps
            written += len(piece)
            piece.clear()
            gaps = 0
    if piece:
        yield bytes(piece), gaps


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _put(fresh: Path, piece: bytes, offset: int) -> None:
    """Write the next piece of a log that is being copied; the first one makes the file anew."""
    with fresh.open("ab" if offset else "wb") as file:
        file.write(piece)


def _take(fresh: Path, size: int, kept: LogFile, spacing: Spacing, gaps: int) -> bool:
    """Keep a log that was copied, unless it has gaps and more of it was kept before; says whether it was and has gaps."""
    if not size:
        _put(fresh, b"", 0)
    if gaps and size < _size(kept.path):
        fresh.unlink()
        return False
    kept.times.write(spacing.marks)
    _to_disk(fresh)
    fresh.rename(kept.path)
    _to_disk(kept.path.parent)  # before the engine is told to forget it
    return gaps > 0


def _to_disk(path: Path) -> None:
    """Wait until the disk has a file, or the names in a directory, as they are now."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _link(source: LogFile, kept: LogFile) -> None:
    for old, new in ((source.times.path, kept.times.path), (source.path, kept.path)):
        try:
            os.link(old, new)
        except (FileNotFoundError, FileExistsError):
            pass
        except OSError:  # on another file system, or one that knows no links
            _copy(old, new)


def _copy(old: Path, new: Path) -> None:
    """Copy a log as it lies on the disk: what was dropped of it is a hole, and stays one."""
    fresh = new.with_name(f"{new.name}.new")
    try:
        with old.open("rb") as source, fresh.open("wb") as target:
            end = os.fstat(source.fileno()).st_size
            at = _first_byte(source.fileno(), 0, end)
            target.truncate(end)
            source.seek(at)
            target.seek(at)
            shutil.copyfileobj(source, target)
        _to_disk(fresh)
        fresh.rename(new)
        _to_disk(new.parent)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
