"""The webhooks file: who is told what happens to runners, and by which secret they know that it was us.

A YAML list:

    - name: task-registry
      url: https://registry.example.org/hooks/runners
      secret_file: registry.secret                # beside this file, or an absolute path; see below
      events: [RunnerCompleted, RunnerFailed]     # optional: these alone
      pools: [local]                              # optional: of these alone
      timeout_seconds: 10                         # optional
      attempts: 50                                # optional: how often an event is tried before its runner is parked

A secret file holds ``whsec_`` and at least 24 bytes in base64, a line a secret. Each signs: to change a secret, put the new
one below the old, tell it to the target, take the old one out.
"""

import base64
import binascii
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from app.errors import ConfigurationError

LONGEST_WISH_SECONDS = 3600.0
"""How long a target may wish us to wait, and so the longest of all pauses."""

SECRET_BYTES = 24
PREFIX = "whsec_"
MAKE_ONE = f"write one with: echo {PREFIX}$(openssl rand -base64 32)"


class Told(StrEnum):
    """What targets are told of; the list may grow."""

    ACCEPTED = "RunnerAccepted"
    ADOPTED = "RunnerAdopted"
    STARTED = "RunnerStarted"
    RUNNING = "RunnerRunning"
    STOPPING = "RunnerStopping"
    COMPLETED = "RunnerCompleted"
    FAILED = "RunnerFailed"


def _address(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isprintable() or " " in url or parts.port == 0:
        raise ValueError("must look like https://host/path or http://host:port/path")
    if parts.username or parts.password or parts.fragment:
        raise ValueError("must hold no user, password or fragment; a target knows us by the signature")
    return url


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
    url: Annotated[str, AfterValidator(_address)]
    secret_file: Path
    events: Annotated[frozenset[Told], Field(min_length=1)] = frozenset(Told)
    pools: frozenset[str] | None = None
    timeout_seconds: Annotated[float, Field(gt=0, le=60)] = 10
    attempts: Annotated[int, Field(ge=1, le=1000)] = 50


_entries = TypeAdapter(list[_Entry])


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Who is told: of what, by which secrets, how patiently. ``pools`` None: of all pools."""

    name: str
    url: str
    secrets: tuple[bytes, ...] = field(repr=False)
    events: frozenset[Told] = frozenset(Told)
    pools: frozenset[str] | None = None
    timeout_seconds: float = 10
    attempts: int = 50


def load_targets(path: Path | None) -> tuple[Target, ...]:
    """Read the webhooks file and its secrets. Raises ConfigurationError with what is wrong with it. Blocks."""
    if path is None:
        return ()
    try:
        entries = _entries.validate_python(yaml.safe_load(path.read_bytes()) or [])
    except OSError as error:
        raise ConfigurationError(f"RUNNER_LAUNCHER_WEBHOOKS_FILE: {path}: {error.strerror}") from error
    except ValidationError as error:
        lines = [f"{path}: {_place(each['loc'])}: {each['msg'].removeprefix('Value error, ')}" for each in error.errors()]
        raise ConfigurationError("\n".join(lines)) from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigurationError(f"{path}: not YAML: {error}") from error
    names = [entry.name for entry in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigurationError(f"{path}: name: {', '.join(twice)}: named twice, and a target is known by its name")
    return tuple(_target(entry, f"{path}: {number}", path.parent) for number, entry in enumerate(entries))


def _target(entry: _Entry, place: str, directory: Path) -> Target:
    secrets = _secrets(f"{place}.secret_file", directory / entry.secret_file)
    return Target(**entry.model_dump(exclude={"secret_file"}), secrets=secrets)


def _place(location: Iterable[int | str]) -> str:
    return ".".join(map(str, location)) or "the file"


def _secrets(key: str, path: Path) -> tuple[bytes, ...]:
    try:
        lines = path.read_text("ascii").split()
    except OSError as error:
        raise ConfigurationError(f"{key}: {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{key}: {path}: not text; {MAKE_ONE}") from error
    if not lines:
        raise ConfigurationError(f"{key}: {path}: no secret in it; {MAKE_ONE}")
    return tuple(_secret(f"{key}: {path}: line {number}", line) for number, line in enumerate(lines, 1))


def _secret(place: str, line: str) -> bytes:
    """Read a secret as Standard Webhooks writes it. What is wrong with one is told without it."""
    try:
        secret = base64.b64decode(line.removeprefix(PREFIX), validate=True) if line.startswith(PREFIX) else b""
    except binascii.Error:
        secret = b""
    if len(secret) < SECRET_BYTES:
        raise ConfigurationError(f"{place}: must be {PREFIX} and at least {SECRET_BYTES} bytes in base64; {MAKE_ONE}")
    return secret
