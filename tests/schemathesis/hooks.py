"""What Schemathesis cannot know: which slots and runners there are, and that a stream of all events has no end.

Well-formed launches are given a slot that exists and a pool that is configured, so that real runners start. What is
malformed on purpose stays so.
"""

import itertools
import os
from pathlib import Path
from typing import Any

import schemathesis

SLOTS = Path(os.environ["SCHEMATHESIS_SLOTS"])
_numbers = itertools.count()


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:  # noqa: ANN401, ARG001 - as it is called
    """Change a request before it is sent."""
    query = case.query or {}
    if case.path == "/events" and str(query.get("follow")).lower() not in {"false", "none"}:
        case.query = {**query, "follow": "false"}
    positive = case.meta is not None and case.meta.generation.mode.is_positive
    if case.method == "POST" and case.path == "/runners" and positive and isinstance(case.body, dict):
        number = next(_numbers)
        slot = SLOTS / f"slot-{number}"
        slot.mkdir(exist_ok=True)
        case.body = {
            **case.body,
            "slot": {**case.body["slot"], "slot_id": slot.name, "slot_path": str(slot)},
            "pool": "local",
        }
