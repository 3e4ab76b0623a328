"""What a Dispatcher holds, written as the service reads it.

Tasks, slots and pools may be the Dispatcher's own objects or mappings; only what the launch contract names is taken from
them. What JSON cannot carry is refused here, with its place: sent as something else it would reach the agent as a lie.
"""

import math
import os
from collections.abc import Mapping
from enum import Enum
from typing import Any

from runner_launcher_client.errors import Fault, InvalidRequestError

TASK = ("id", "title", "description", "dependencies", "required_skill", "reserved_branch", "metadata", "spec_name")
SLOT = ("slot_id", "slot_path", "repo_url")
POOL = ("name", "type", "max_concurrency", "cpu_quota", "memory_quota", "enabled", "config")
MAX_DEPTH = 100


def launch_request(task: object, slot: object, pool: object) -> dict[str, Any]:
    """Write a launch; ``pool`` may be a name. Raises InvalidRequestError."""
    return {
        "task": task_fields(task),
        "slot": slot_fields(slot),
        "pool": pool if isinstance(pool, str) else _fields(pool, "pool", POOL, required=("name",)),
    }


def task_fields(task: object) -> dict[str, Any]:
    """Take what the contract names from a task. Raises InvalidRequestError."""
    return _fields(task, "task", TASK, required=("id",))


def slot_fields(slot: object) -> dict[str, Any]:
    """Take what the contract names from a slot. Raises InvalidRequestError."""
    return _fields(slot, "slot", SLOT, required=SLOT)


def _fields(source: object, noun: str, names: tuple[str, ...], *, required: tuple[str, ...]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in names:
        value = source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)
        if value is not None:
            values[name] = _plain(value, f"/{noun}/{name}")
        elif name in required:
            raise _fault(f"/{noun}/{name}", f"is missing in this {type(source).__name__}")
    return values


def _plain(value: object, place: str, depth: int = 0) -> Any:  # noqa: ANN401 - JSON
    """Give a value as JSON carries it."""
    if depth > MAX_DEPTH:
        raise _fault(place, f"nests deeper than {MAX_DEPTH}")
    match value:
        case Enum():
            return _plain(value.value, place, depth)
        case None | bool() | int():
            return value
        case str():
            return _text(value, place)
        case float() if math.isfinite(value):
            return value
        case os.PathLike():
            return _plain(os.fspath(value), place, depth)
        case Mapping():
            return {_key(key, place): _plain(each, f"{place}/{key}", depth + 1) for key, each in value.items()}
        case list() | tuple():
            return [_plain(each, f"{place}/{index}", depth + 1) for index, each in enumerate(value)]
        case _:
            raise _fault(place, f"a {type(value).__name__} cannot travel as JSON: {value!r:.100}")


def _key(key: object, place: str) -> str:
    if not isinstance(key, str):
        raise _fault(place, f"JSON knows text alone as keys, and {key!r:.100} is none")
    return _text(str(key), place)


def _text(text: str, place: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _fault(place, "holds half of a surrogate pair, which UTF-8 cannot carry") from None
    return str(text)


def _fault(pointer: str, detail: str) -> InvalidRequestError:
    return InvalidRequestError(f"{pointer}: {detail}", faults=[Fault(pointer, detail)])
