"""Where the service is, and the token for it: as told, or as the environment says.

    RUNNER_LAUNCHER_URL         the service; else RUNNER_LAUNCHER_LISTEN, as the service itself reads it; else 127.0.0.1:8080
    RUNNER_LAUNCHER_TOKEN       the token; else the file ``token`` in the service's state directory, which is
    RUNNER_LAUNCHER_STATE_DIR   or, for a service on this machine alone, the place where it is by default

A token file that nobody named is not sent elsewhere: a mistyped address must not get the rights of the service at home.
"""

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from runner_launcher_client.errors import InvalidRequestError

PREFIX = "RUNNER_LAUNCHER_"
LISTEN = "127.0.0.1:8080"
ANY = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - read, not bound


@dataclass(frozen=True)
class Address:
    """A service. ``token`` is None where there is none; ``missing`` then says where it was looked for."""

    url: str
    token: str | None = None
    missing: str = ""

    @property
    def local(self) -> bool:
        """Whether it is on this machine."""
        return _is_local(urlsplit(self.url).hostname or "")


def find_address(url: str | None = None, token: str | None = None, environment: Mapping[str, str] = os.environ) -> Address:
    """Find the service. Raises InvalidRequestError when the address is none."""
    url = (url or environment.get(f"{PREFIX}URL") or _where_it_listens(environment)).rstrip("/")
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable or not url.isprintable() or " " in url:
        raise InvalidRequestError(f"{PREFIX}URL: {url!r} must look like http://host:port", code="no-address")
    found = Address(url, *_find_token(token, environment, local=Address(url).local))
    if found.token and not (found.token.isascii() and found.token.isprintable() and " " not in found.token):
        raise InvalidRequestError(f"{PREFIX}TOKEN: the token must be one word of ASCII", code="no-address")
    return found


def _find_token(token: str | None, environment: Mapping[str, str], *, local: bool) -> tuple[str | None, str]:
    """Give the token; where there is none, where it was looked for."""
    token = token or environment.get(f"{PREFIX}TOKEN")
    if token:
        return token.strip(), ""
    directory = environment.get(f"{PREFIX}STATE_DIR")
    if not directory and not local:
        return None, f"{PREFIX}TOKEN is not set, nor is {PREFIX}STATE_DIR"
    path = Path(directory or _state_home(environment)) / "token"
    try:
        return path.read_text(encoding="utf-8").strip() or None, f"{PREFIX}TOKEN is not set, and {path} is empty"
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        return None, f"{PREFIX}TOKEN is not set, and {path} cannot be read ({why})"


def _where_it_listens(environment: Mapping[str, str]) -> str:
    host, _, port = (environment.get(f"{PREFIX}LISTEN") or LISTEN).rpartition(":")
    return f"http://{ANY.get(host, host)}:{port}"


def _state_home(environment: Mapping[str, str]) -> str:
    home = environment.get("XDG_STATE_HOME", "")
    root = home if home.startswith("/") else f"{environment.get('HOME') or os.path.expanduser('~')}/.local/state"  # noqa: PTH111 - never raises
    return f"{root}/runner-launcher"


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
