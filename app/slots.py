"""Where a slot really is, and whether runners may work there.

A path in a request names a directory of this machine, so it is checked against the operator's roots after every symbolic
link in it is followed; what is entered later is the real path, not the one that was given. Blocks.
"""

import posixpath
import stat
from collections.abc import Sequence
from pathlib import Path

from app.errors import Fault, InvalidRequest

POINTER = "/slot/slot_path"

_OUTSIDE = "is not under any of the slot roots (RUNNER_LAUNCHER_SLOT_ROOTS)"


def real_place(slot_path: str, roots: Sequence[Path]) -> str:
    """Give the real path of a slot. Raises InvalidRequest unless it is a directory under one of the roots."""
    if not roots:
        raise _refused("no slot may be entered: RUNNER_LAUNCHER_SLOT_ROOTS is empty", "slot-outside-roots")
    try:
        real = Path(slot_path).resolve()
    except (OSError, RuntimeError) as error:
        raise _refused(f"{slot_path} cannot be followed: {error}", "no-such-slot-path") from None
    if not any(real.is_relative_to(root.resolve()) for root in roots):  # before a word on what is there
        leads = any(Path(slot_path).is_relative_to(root) for root in roots) and str(real) != slot_path
        raise _refused(f"{slot_path}{f', which leads to {real},' if leads else ''} {_OUTSIDE}", "slot-outside-roots")
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
