"""What may be shown of a launch: everything but its secrets.

A secret is the runner's token, every value that its pool puts into the environment, and whatever bears a name that secrets
bear. The specification is redacted before a launcher sees it, so that no rendering can spell a secret in a way of its own;
what came out is looked through again, for templates hold secrets too.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from pydantic import JsonValue

from app.launcher import LaunchSpec

HIDDEN = "(hidden)"
ALWAYS = frozenset({"RUNNER_TOKEN"})

_SECRET = re.compile(r"token|secret|passw|credential|api_?key|access_?key|private_?key|auth$|_key$", re.IGNORECASE)


_WITH_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]+@")


def redacted(spec: LaunchSpec, hidden: Collection[str]) -> LaunchSpec:
    """Give a specification that may be shown; ``hidden`` are variables whose values are secret whatever they are called.

    The task context, which may be long, is only said to be there.
    """
    context = f"(the task context, {len(spec.context)} bytes)"
    environment = {
        name: HIDDEN if name in ALWAYS or name in hidden or _is_secret(name, value) else value
        for name, value in spec.environment.items()
    }
    if "TASK_CONTEXT" in environment:
        environment["TASK_CONTEXT"] = context
    return replace(spec, environment=environment, context=context.encode())


def without_secrets(rendered: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Hide every text in a rendering that bears a secret's name: as a key, or as a ``name`` beside a ``value``."""
    return {key: _shown(key, item) for key, item in rendered.items()}


def _is_secret(name: str, value: str) -> bool:
    return bool(_SECRET.search(name) or _WITH_PASSWORD.search(value))


def _shown(key: str, value: JsonValue) -> JsonValue:
    match value:
        case str() if _is_secret(key, value):
            return HIDDEN
        case dict():
            name = value.get("name")
            named = isinstance(name, str) and isinstance(value.get("value"), str) and _SECRET.search(name)
            return {**without_secrets(value), **({"value": HIDDEN} if named else {})}
        case list():
            return [_shown(key, item) for item in value]
        case _:
            return value
