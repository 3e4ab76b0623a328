"""Where a slot really is, and whether runners may work there.

A path in a request names a directory of this machine, so it is checked against the operator's roots after every symbolic
link in it is followed; what is entered later is the real path, not the one that was given. Slots may lie on a network disk
that does not answer, for hours: whoever looks there does it by ``look_at``.
"""

import asyncio
import contextlib
import posixpath
import stat
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from itertools import chain
from pathlib import Path
from typing import TypeVar

from app.errors import Fault, InvalidRequest

POINTER = "/slot/slot_path"

LOOK_SECONDS = 5.0
"""How long a look at a slot may take."""

T = TypeVar("T")

_looks: dict[int, tuple[str, float]] = {}
"""In which directory each look that goes on is, and since when."""

_OUTSIDE = "is not under any of the slot roots (RUNNER_LAUNCHER_SLOT_ROOTS)"


async def look_at(path: str, see: Callable[[], T], undo: Callable[[T], None] | None = None) -> T:
    """Do what looks at a slot, and may block there; what comes too late is undone.

    Each look has a thread of its own, which the process does not wait for at its end: a disk that does not answer holds up
    nobody else. Raises TimeoutError, at once where a look beside this one waits in vain or no thread can be had.
    """
    directory, late = posixpath.dirname(path), time.monotonic() - LOOK_SECONDS
    if any(where == directory and since < late for where, since in list(_looks.values())):
        raise TimeoutError(f"{path} does not answer: its disk may be away")
    answer: Future[T] = Future()

    def work() -> None:
        _looks[id(answer)] = directory, time.monotonic()
        try:
            seen = see()
        except Exception as error:  # noqa: BLE001 - it is raised where it is waited for
            with contextlib.suppress(InvalidStateError):
                answer.set_exception(error)
        else:
            try:
                answer.set_result(seen)
            except InvalidStateError:  # nobody waits any more
                if undo:
                    undo(seen)
        finally:
            del _looks[id(answer)]

    try:
        threading.Thread(target=work, name=f"look at {path}", daemon=True).start()
    except RuntimeError as error:  # the machine is full of processes
        raise TimeoutError(f"{path} cannot be looked at now: {error}") from None
    try:
        async with asyncio.timeout(LOOK_SECONDS):
            return await asyncio.wrap_future(answer)
    except BaseException as error:
        if not answer.cancel() and undo and not answer.exception():  # it came at that very moment
            undo(answer.result())
        if isinstance(error, TimeoutError):
            raise TimeoutError(f"{path} does not answer within {LOOK_SECONDS:g} s: its disk may be away") from None
        raise


def real_place(slot_path: str, roots: Sequence[Path], state_dir: Path) -> str:
    """Give the real path of a slot. Raises InvalidRequest unless it is a directory under one of the roots. Blocks.

    What the service keeps is in no slot, wherever the roots are: whoever may launch may write there.
    """
    if not roots:
        raise _refused("no slot may be entered: RUNNER_LAUNCHER_SLOT_ROOTS is empty", "slot-outside-roots")
    try:
        real = Path(slot_path).resolve()
    except (OSError, RuntimeError) as error:
        raise _refused(f"{slot_path} cannot be followed: {error}", "no-such-slot-path") from None
    # Before a word on what is there. By their names first: a root whose disk is away would be followed in vain.
    if not any(real.is_relative_to(root) for root in chain(roots, map(Path.resolve, roots))):
        leads = any(Path(slot_path).is_relative_to(root) for root in roots) and str(real) != slot_path
        raise _refused(f"{slot_path}{f', which leads to {real},' if leads else ''} {_OUTSIDE}", "slot-outside-roots")
    kept = state_dir.resolve()
    if real.is_relative_to(kept) or kept.is_relative_to(real):
        raise _refused(f"{slot_path} is, is in or holds the state directory of the service", "slot-outside-roots")
    try:
        is_directory = stat.S_ISDIR(real.stat().st_mode)
    except FileNotFoundError:
        raise _refused(f"{slot_path} does not exist", "no-such-slot-path") from None
    except OSError as error:
        raise _refused(f"{slot_path} cannot be followed: {error}", "no-such-slot-path") from None
    if not is_directory:
        raise _refused(f"{slot_path} is not a directory", "no-such-slot-path")
    return str(real)


def named_place(slot_path: str, roots: Sequence[Path]) -> str:
    """Give the path of a slot on a machine that cannot be looked at. Raises InvalidRequest unless it is under a root."""
    named = posixpath.normpath(slot_path)
    if not roots:
        raise _refused("no slot may be mounted: RUNNER_LAUNCHER_SLOT_ROOTS is empty", "slot-outside-roots")
    if not any(Path(named).is_relative_to(posixpath.normpath(root)) for root in roots):
        raise _refused(f"{slot_path} {_OUTSIDE}", "slot-outside-roots")
    return named


def _refused(detail: str, code: str) -> InvalidRequest:
    return InvalidRequest(detail, Fault(POINTER, detail), code=code)
