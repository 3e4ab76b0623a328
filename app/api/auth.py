"""Who asks: what a bearer token stands for, and which scope a call needs."""

import asyncio
import contextlib
import hashlib
import logging
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from app.caller import Caller, Scope
from app.errors import ConfigurationError, NotAuthenticated
from app.settings import Settings
from app.tokens import Token, find, load_tokens

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0

NOBODY = Caller("anonymous")
"""Whoever asks while authentication is off."""


def admin_token(state_dir: Path) -> str:
    """Read the token with all rights, made at first start with access for this user alone. Raises ConfigurationError."""
    path = state_dir / "token"
    fresh = state_dir / f"token.{os.getpid()}"
    fresh.unlink(missing_ok=True)  # left by a start that was killed
    with contextlib.suppress(FileExistsError):
        with os.fdopen(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
        try:
            os.link(fresh, path)  # whole or not at all, and never over an existing one
        finally:
            fresh.unlink()
    token = path.read_text().strip()
    if not token:
        raise ConfigurationError(f"{path} is empty; remove it, and a new token is made")
    return token


class Authenticator:
    """Tells callers by their tokens; until it is opened nobody is let in.

    The token file is looked at once a second. A change holds from then on, also for who was known before; a file that is
    wrong changes nothing, and the log says why.
    """

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._tokens: tuple[Token, ...] = ()
        self._admin: tuple[Token, ...] = ()
        self._off = False

    def open(self, settings: Settings) -> None:
        """Take the tokens that the settings name, or let everybody in. Raises ConfigurationError. Blocks."""
        if settings.auth == "off":
            self._off = True
            return
        self._admin = (Token(Caller("admin"), _sha256(admin_token(settings.state_dir))),)
        self._tokens = load_tokens(settings.tokens_file) if settings.tokens_file else ()

    async def keep_reading(self, path: Path) -> None:
        """Read the token file whenever it has changed, until cancelled."""
        seen = await asyncio.to_thread(_version, path)
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            version = await asyncio.to_thread(_version, path)
            if version == seen:
                continue
            seen = version
            try:
                self._tokens = await asyncio.to_thread(load_tokens, path)
            except ConfigurationError as error:
                log.error("the tokens stay as they were: %s", error)  # noqa: TRY400 - it says all there is
            except Exception:  # no defect may end revocation
                log.exception("reading the tokens failed; they stay as they were")
            else:
                log.info("the tokens were read again: %d", len(self._tokens))

    def still(self, header: str | None, caller: Caller) -> bool:
        """Say whether a header stands for the same caller as before."""
        try:
            return self.caller(header) == caller
        except NotAuthenticated:
            return False

    def caller(self, header: str | None) -> Caller:
        """Say who sends this Authorization header. Raises NotAuthenticated."""
        if self._off:
            return NOBODY
        token = find((*self._admin, *self._tokens), _sha256(bearer(header)))
        if token is None:
            raise NotAuthenticated("the bearer token is not known")
        if token.expires is not None and token.expires <= self._now():
            raise NotAuthenticated("the bearer token has expired")
        return token.caller


def needed(method: str, path: str) -> Scope:
    """Say which scope a call needs; one that nobody thought of needs the strongest."""
    match method:
        case "GET" | "HEAD" if not path.startswith("/webhooks"):
            return Scope.READ
        case "POST" if path == "/runners":
            return Scope.LAUNCH
        case "DELETE":
            return Scope.STOP
        case _:
            return Scope.ADMIN


def _version(path: Path) -> tuple[int, int, int] | None:
    with contextlib.suppress(OSError):
        stat = path.stat()
        return stat.st_ino, stat.st_mtime_ns, stat.st_size
    return None


def _sha256(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def bearer(header: str | None) -> str:
    """Take the token out of an Authorization header. Raises NotAuthenticated."""
    scheme, _, token = (header or "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise NotAuthenticated("a bearer token is needed: Authorization: Bearer TOKEN")
    return token.strip()
