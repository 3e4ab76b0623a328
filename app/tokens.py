"""The token file: who may call besides the one whose token was made at the first start.

A YAML list. Of each token it holds the SHA-256 alone, so the file tells nobody how to call:

    - name: dispatcher            # told in the history; two tokens may share it while one replaces the other
      sha256: 9f86d08...          # printf %s "$TOKEN" | sha256sum
      scopes: [launch, read]      # of launch, read, stop, admin
      pools: [local]              # optional: nothing else is seen or touched
      expires: 2027-01-01         # optional: a date (its beginning, UTC) or a time
      rate: 20                    # optional: calls a second, and as many at once
"""

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from app.caller import Caller, Scope
from app.errors import ConfigurationError

RESERVED = frozenset({"admin", "anonymous"})
"""Names that mean somebody already."""


def _not_reserved(name: str) -> str:
    if name in RESERVED or not name.isprintable():
        raise ValueError("is not a name for a token")
    return name


def _moment(value: object) -> object:
    """Read a date as its beginning; where no zone is named, it is UTC."""
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day, tzinfo=UTC)
    if isinstance(value, datetime) and value.tzinfo is None:
        value = value.replace(tzinfo=UTC)
    return value


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    name: Annotated[str, Field(min_length=1, max_length=255), AfterValidator(_not_reserved)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    scopes: Annotated[frozenset[Scope], Field(min_length=1)]
    pools: frozenset[str] | None = None
    expires: Annotated[datetime, BeforeValidator(_moment)] | None = None
    rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


_entries = TypeAdapter(list[_Entry])


@dataclass(frozen=True, slots=True)
class Token:
    """A caller, by the digest of their token; ``expires`` in seconds since the epoch, None: never."""

    caller: Caller
    sha256: str
    expires: float | None = None


def load_tokens(path: Path) -> tuple[Token, ...]:
    """Read a token file. Raises ConfigurationError with all that is wrong with it. Blocks."""
    try:
        entries = _entries.validate_python(yaml.safe_load(path.read_bytes()) or [])
    except OSError as error:
        raise ConfigurationError(f"RUNNER_LAUNCHER_TOKENS_FILE: {path}: {error.strerror}") from error
    except ValidationError as error:
        lines = [f"{path}: {'.'.join(map(str, each['loc'])) or 'the file'}: {each['msg']}" for each in error.errors()]
        raise ConfigurationError("\n".join(lines)) from error
    except (
        yaml.YAMLError,
        RecursionError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
    ) as error:  # a 30th of February
        raise ConfigurationError(f"{path}: not YAML") from error  # whose text may hold a token written there by mistake
    return tuple(
        Token(
            Caller(entry.name, entry.scopes, entry.pools, entry.rate),
            entry.sha256,
            None if entry.expires is None else entry.expires.timestamp(),
        )
        for entry in entries
    )


def find(tokens: Sequence[Token], sha256: str) -> Token | None:
    """Find the token of this digest, in a time that does not tell how near a guess came."""
    found = None
    for token in tokens:
        if hmac.compare_digest(token.sha256, sha256):
            found = token
    return found
