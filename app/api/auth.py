"""Who asks: the token file, and what a bearer token stands for."""

import contextlib
import hmac
import os
import secrets
from pathlib import Path

from app.errors import ConfigurationError, NotAuthenticated
from app.service import Caller

NOBODY = Caller("anonymous")
"""Whoever asks while authentication is off."""


def admin_token(state_dir: Path) -> str:
    """Read the token with all rights, made at first start with access for this user alone. Raises ConfigurationError."""
    path = state_dir / "token"
    with contextlib.suppress(FileExistsError):
        fresh = state_dir / f"token.{os.getpid()}"
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
    """Tells callers by their tokens; ``token`` None lets everybody in, and until it is set nobody is."""

    def __init__(self) -> None:
        self.token: str | None = secrets.token_urlsafe(32)

    def caller(self, header: str | None) -> Caller:
        """Say who sends this Authorization header. Raises NotAuthenticated."""
        if self.token is None:
            return NOBODY
        token = bearer(header)
        if not hmac.compare_digest(token.encode(), self.token.encode()):
            raise NotAuthenticated("the bearer token is not known")
        return Caller("admin")


def bearer(header: str | None) -> str:
    """Take the token out of an Authorization header. Raises NotAuthenticated."""
    scheme, _, token = (header or "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise NotAuthenticated("a bearer token is needed: Authorization: Bearer TOKEN")
    return token.strip()
