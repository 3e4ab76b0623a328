"""The settings: one typed object, read once from RUNNER_LAUNCHER_* variables and passed down."""

import difflib
import ipaddress
import logging
import os
import secrets
import shlex
import socket
from collections.abc import KeysView
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.errors import ConfigurationError

PREFIX = "RUNNER_LAUNCHER_"
_OF_CLIENTS = ("URL", "TOKEN")
_MAX_PORT = 65535

_log = logging.getLogger(__name__)


def _words(line: object) -> object:
    return tuple(shlex.split(line)) if isinstance(line, str) else line


def _roots(line: object) -> object:
    return tuple(part for part in line.split(":") if part) if isinstance(line, str) else line


def _absolute(paths: tuple[Path, ...]) -> tuple[Path, ...]:
    for path in paths:
        if not path.is_absolute():
            raise ValueError(f"{path} is not an absolute path")
    return paths


def _web_address(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isprintable() or " " in url:
        raise ValueError("must look like http://host:port or https://host")
    return url.rstrip("/")


def _bracketed(url: str) -> str:
    """Put an IPv6 address in brackets: where a pod's own is put into a URL, it comes without."""
    scheme, _, place = url.partition("://")
    host, _, port = place.rpartition(":")
    return f"{scheme}://[{host}]:{port}" if ":" in host and "[" not in host else url


def _address(listen: str) -> tuple[str, int]:
    host, colon, port = listen.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    number = int(port) if port.isascii() and port.isdigit() else -1
    if not host or not colon or bracketed != (":" in host) or not 0 <= number <= _MAX_PORT:
        raise ValueError("must look like 127.0.0.1:8080 or [::1]:8080")
    return host.strip("[]"), number


def _state_home() -> Path:
    """Where the XDG rules put state; they say to ignore a relative XDG_STATE_HOME."""
    home = os.environ.get("XDG_STATE_HOME", "")
    try:
        root = Path(home) if home.startswith("/") else Path.home() / ".local" / "state"
    except RuntimeError as error:
        raise ConfigurationError(f"{PREFIX}STATE_DIR: must be set where there is no home directory") from error
    return root / "runner-launcher"


_OrOff = BeforeValidator(lambda bound: None if bound == "off" else bound)
WebAddress = Annotated[str, AfterValidator(_web_address)]


class Settings(BaseSettings):
    """What the operator says about this service. An empty variable counts as not set."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="ignore")

    listen: str = "127.0.0.1:8080"
    state_dir: Annotated[Path, AfterValidator(Path.absolute)] = Field(default_factory=_state_home)
    database_url: str | None = Field(default=None, repr=False)
    pools_file: Path | None = None
    runner_command: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_words), Field(min_length=1)] = (
        "python",
        "-m",
        "necrocode.agent_runner",
    )
    slot_roots: Annotated[tuple[Path, ...], NoDecode, BeforeValidator(_roots), AfterValidator(_absolute)] = ()
    allow_inline_pools: bool = False
    auth: Literal["on", "off"] = "on"
    tokens_file: Path | None = None
    webhooks_file: Path | None = None
    log_format: Literal["text", "json"] = "text"
    max_connections: Annotated[int, Field(ge=1)] = 8192
    public_url: WebAddress | None = None
    replica_url: Annotated[WebAddress, BeforeValidator(_bracketed)] | None = None
    node: str = Field(default_factory=socket.gethostname)
    retention_days: Annotated[Annotated[float, Field(gt=0, allow_inf_nan=False)] | None, _OrOff] = 30
    retention_records: Annotated[Annotated[int, Field(ge=0)] | None, _OrOff] = 1_000_000
    retention_logs_mib: Annotated[Annotated[int, Field(ge=0)] | None, _OrOff] = 10_240
    installation: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")] | None = None

    @field_validator("listen")
    @classmethod
    def _is_an_address(cls, listen: str) -> str:
        _address(listen)
        return listen

    @field_validator("auth")
    @classmethod
    def _off_on_loopback_only(cls, auth: str, info: ValidationInfo) -> str:
        if auth == "off" and "listen" in info.data and not _loopback(_address(info.data["listen"])[0]):
            raise ValueError(f"off is for loopback only, and {PREFIX}LISTEN is {info.data['listen']}")
        return auth

    @property
    def host(self) -> str:
        """The host to listen on, an IPv6 one without its brackets."""
        return _address(self.listen)[0]

    @property
    def port(self) -> int:
        """The port to listen on; 0 lets the kernel choose."""
        return _address(self.listen)[1]

    @property
    def database(self) -> str:
        """The database's URL; unless told otherwise, SQLite under the state directory."""
        return self.database_url or f"sqlite:///{self.state_dir}/runners.db"


def installation(settings: Settings) -> str:
    """Name this installation to its engines, which may serve several: made up at the first start, and kept.

    Replicas that share a database must be told one name. Blocks.
    """
    if settings.installation:
        return settings.installation
    path = settings.state_dir / "installation"
    if not path.exists():
        fresh = path.with_suffix(".new")
        fresh.touch(mode=0o600)
        fresh.write_text(f"{secrets.token_hex(6)}\n")
        fresh.rename(path)
    if name := path.read_text().strip():
        return name
    raise ConfigurationError(f"{path} is empty; it held the name that this installation's runners bear on their engines")


def load_settings() -> Settings:
    """Read the settings from the environment, or say of each variable that cannot be used what is wrong with it."""
    try:
        settings = Settings()
    except ValidationError as error:
        raise ConfigurationError("\n".join(map(_sentence, error.errors()))) from error
    for warning in _unknown(os.environ.keys()):
        _log.warning("%s", warning)
    return settings


def _sentence(line: ErrorDetails) -> str:
    return f"{PREFIX}{str(line['loc'][0]).upper()}: {line['msg'].removeprefix('Value error, ')}"


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _unknown(names: KeysView[str]) -> list[str]:
    """Say which variables look like settings and are none, save those that Kubernetes injects for a service of our name."""
    known = [name.upper() for name in Settings.model_fields]
    injected = ("SERVICE_", "PORT") if f"{PREFIX}SERVICE_HOST" in names else ()
    warnings = []
    for name in sorted(names):
        key = name.removeprefix(PREFIX)
        if key == name or key.upper() in (*known, *_OF_CLIENTS) or key.startswith(injected):
            continue
        close = difflib.get_close_matches(key.upper(), known, n=1)
        warnings.append(f"{name} is not a setting" + (f"; did you mean {PREFIX}{close[0]}?" if close else ""))
    return warnings
