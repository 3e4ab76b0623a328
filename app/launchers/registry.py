"""Credentials for image registries, and what an engine's answer to a pull means.

Credentials come from the file that a pool names or from the Docker configuration of whoever runs the service; they go into
one header of one request, and nowhere else.
"""

import asyncio
import base64
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError
from typing_extensions import override

from app.errors import LauncherError, LauncherUnavailable, LaunchRejected
from app.reason import Reason

_HUB = "https://index.docker.io/v1/"
_HUB_NAMES = ("docker.io", "index.docker.io", "registry-1.docker.io")
_HELPER_SECONDS = 30.0
_NOT_FOUND = re.compile(
    r"manifest unknown|manifest for .* not found|no such image|name unknown|no matching manifest"
    r"|(?<!sha256:.{64}): not found$",  # of a layer it may be found later
    re.IGNORECASE,
)
_REFUSED = re.compile(
    r"access denied|unauthorized|authentication required|no basic auth|forbidden|denied:|incorrect username", re.IGNORECASE
)
_MALFORMED = re.compile(r"invalid reference format|invalid tag format|repository name must be", re.IGNORECASE)


class _Auth(BaseModel):
    """What a Docker configuration says of one registry."""

    auth: str | None = None
    username: str | None = None
    password: str | None = None
    identitytoken: str | None = None


class _Configuration(BaseModel):
    """What we read of a Docker configuration, and the two keys of the plain form."""

    auths: dict[str, _Auth] = Field(default_factory=dict)
    cred_helpers: dict[str, str] = Field(default_factory=dict, alias="credHelpers")
    creds_store: str | None = Field(default=None, alias="credsStore")
    username: str | None = None
    password: str | None = None


def registry_of(image: str) -> str:
    """Name the registry that an image comes from, as the Docker configuration does."""
    first, slash, _ = image.partition("/")
    named = slash and ("." in first or ":" in first or first == "localhost")
    return _HUB if not named or first in _HUB_NAMES else first


def with_tag(image: str) -> str:
    """Name one image: without a tag or a digest the engine would pull every tag there is."""
    last = image.rsplit("/", 1)[-1]
    return image if ":" in last or "@" in last else f"{image}:latest"


async def auth_header(image: str, registry_auth: str | None, environ: Mapping[str, str] = os.environ) -> str | None:
    """Give the value of X-Registry-Auth for a pull; None: there are no credentials. Raises LaunchRejected."""
    registry = registry_of(image)
    if registry_auth:
        found = await _from_file(Path(registry_auth), registry)
        if found is None:
            raise LaunchRejected(f"{registry_auth}: holds no credentials for {registry}", Reason.CONFIG_ERROR)
    else:
        home = environ.get("DOCKER_CONFIG") or os.path.join(environ.get("HOME", "/nonexistent"), ".docker")  # noqa: PTH118
        path = Path(home) / "config.json"
        found = await _from_file(path, registry) if await asyncio.to_thread(os.path.isfile, path) else None
    return base64.urlsafe_b64encode(json.dumps(found).encode()).decode() if found else None


async def _from_file(path: Path, registry: str) -> dict[str, str] | None:
    """Read a Docker configuration, or the plain form {"username": ..., "password": ...}."""
    try:
        config = _Configuration.model_validate_json(await asyncio.to_thread(path.read_bytes))
    except OSError as error:
        raise LaunchRejected(f"{path}: {error.strerror}", Reason.CONFIG_ERROR) from None
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise LaunchRejected(
            f"{path}: {where}: {first['msg']}" if where else f"{path}: not JSON", Reason.CONFIG_ERROR
        ) from None
    if config.username is not None and config.password is not None:
        return {"username": config.username, "password": config.password, "serveraddress": registry}
    helper = config.cred_helpers.get(registry) or config.creds_store
    if helper and (found := await _ask_helper(helper, registry)):
        return found
    return _from_auths(config.auths, registry, path)


def _from_auths(auths: Mapping[str, "_Auth"], registry: str, path: Path) -> dict[str, str] | None:
    for name, entry in auths.items():
        host = name if name == _HUB else re.sub(r"^https?://", "", name).split("/")[0]
        if host != registry and not (registry == _HUB and host in _HUB_NAMES):
            continue
        found = {"serveraddress": registry}
        if entry.identitytoken:
            return found | {"identitytoken": entry.identitytoken}
        if entry.auth:
            try:
                username, _, password = base64.b64decode(entry.auth.encode(), validate=True).decode().partition(":")
            except ValueError:
                raise LaunchRejected(f"{path}: auths.{name}.auth is not base64", Reason.CONFIG_ERROR) from None
            return found | {"username": username, "password": password}
        if entry.username:
            return found | {"username": entry.username, "password": entry.password or ""}
    return None


async def _ask_helper(helper: str, registry: str) -> dict[str, str] | None:
    """Ask a credential helper by Docker's protocol: the registry on its input, JSON on its output."""
    program = f"docker-credential-{helper}"
    pipe, nothing = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    try:
        process = await asyncio.create_subprocess_exec(program, "get", stdin=pipe, stdout=pipe, stderr=nothing)
    except OSError as error:
        raise LaunchRejected(f"{program}: {error.strerror}", Reason.CONFIG_ERROR) from error
    try:
        async with asyncio.timeout(_HELPER_SECONDS):
            told, _ = await process.communicate(registry.encode())
    except TimeoutError:
        raise LauncherUnavailable(f"{program} does not answer", acted=False, reason=Reason.IMAGE_PULL_FAILED) from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        return None  # it has none for this registry
    try:
        answer = json.loads(told)
        name, secret = answer["Username"], answer["Secret"]
    except (ValueError, KeyError, TypeError):
        raise LaunchRejected(f"{program}: its answer cannot be read", Reason.CONFIG_ERROR) from None
    if name == "<token>":
        return {"identitytoken": secret, "serveraddress": registry}
    return {"username": name, "password": secret, "serveraddress": registry}


def pull_error(image: str, said: str) -> LauncherError:
    """Tell a pull that can never work from one that may work later."""
    if _MALFORMED.search(said):
        return LaunchRejected(f"{image}: {said}", Reason.CONFIG_ERROR)
    if _REFUSED.search(said):
        return LaunchRejected(f"{image}: the pull was refused: {said}", Reason.IMAGE_PULL_FAILED)
    if _NOT_FOUND.search(said):
        return LaunchRejected(f"{image}: there is no such image: {said}", Reason.IMAGE_NOT_FOUND)
    return LauncherUnavailable(f"{image}: the pull failed: {said}", acted=False, reason=Reason.IMAGE_PULL_FAILED)


class Progress:
    """Sums up what an engine says of a pull's layers."""

    def __init__(self, image: str) -> None:
        self._image = image
        self._layers: dict[str, tuple[int, int]] = {}

    def feed(self, message: Mapping[str, Any]) -> None:
        """Take one message of the stream."""
        detail = message.get("progressDetail") or {}
        if message.get("status") == "Downloading" and "total" in detail:
            self._layers[message["id"]] = detail.get("current", 0), detail["total"]

    @override
    def __str__(self) -> str:
        """Say how far it is."""
        if not self._layers:
            return f"pulling {self._image}"
        done, total = (sum(part) / 2**20 for part in zip(*self._layers.values(), strict=True))
        return f"pulling {self._image}: {done:.0f} of {total:.0f} MiB"
