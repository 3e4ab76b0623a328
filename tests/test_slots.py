"""Slots on machines that cannot be looked at: their paths are judged by what they say."""

from pathlib import Path

import pytest

from app.errors import InvalidRequest
from app.slots import named_place

ROOTS = (Path("/slots"), Path("/mnt/more/"))


@pytest.mark.parametrize(
    ("slot_path", "place"),
    [("/slots/a", "/slots/a"), ("/slots//a/./b/", "/slots/a/b"), ("/mnt/more/x/../y", "/mnt/more/y"), ("/slots", "/slots")],
)
def test_a_path_under_a_root_is_given_in_its_plain_form(slot_path: str, place: str) -> None:
    assert named_place(slot_path, ROOTS) == place


@pytest.mark.parametrize("slot_path", ["/slots/../etc", "/slotsX/a", "/", "/mnt/more/../../etc/passwd", "relative/a"])
def test_a_path_that_leads_elsewhere_is_refused(slot_path: str) -> None:
    with pytest.raises(InvalidRequest, match="not under any of the slot roots") as refused:
        named_place(slot_path, ROOTS)
    assert refused.value.code == "slot-outside-roots"


def test_without_roots_nothing_may_be_mounted() -> None:
    with pytest.raises(InvalidRequest, match="SLOT_ROOTS is empty"):
        named_place("/slots/a", ())
