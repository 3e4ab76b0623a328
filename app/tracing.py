"""Whether traces are sent: if the standard OTEL_* variables ask for it.

Only then is OpenTelemetry's SDK loaded, which is an extra of this distribution.
"""

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from app.errors import ConfigurationError

if TYPE_CHECKING:
    from app.spans import Tracing

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL = "http/protobuf"


def open_tracing(environ: Mapping[str, str], now: Callable[[], float] = time.time) -> "Tracing | None":
    """Begin to trace if the environment asks for it. Raises ConfigurationError."""
    exporter = environ.get("OTEL_TRACES_EXPORTER", "").strip()
    endpoint = next((name for name in ENDPOINTS if environ.get(name)), None)
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or exporter == "none" or not (endpoint or exporter):
        return None
    if exporter not in ("", "otlp"):
        raise ConfigurationError(f"OTEL_TRACES_EXPORTER: only otlp and none are understood, not {exporter!r}")
    for name in PROTOCOLS:
        if environ.get(name, PROTOCOL) != PROTOCOL:
            raise ConfigurationError(f"{name}: only {PROTOCOL} is spoken, not {environ[name]!r}")
    try:
        from app.spans import Tracing  # noqa: PLC0415 - needs the extra
    except ImportError as error:
        asked = endpoint or "OTEL_TRACES_EXPORTER"
        text = f"{asked}: traces need a library that is not there: in a clone, pip install ./client '.[telemetry]'"
        raise ConfigurationError(text) from error
    named = environ.get("OTEL_SERVICE_NAME") or "service.name=" in environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    try:
        return Tracing(now, name=None if named else "runner-launcher")
    except ValueError as error:
        raise ConfigurationError(f"OTEL_*: {error}") from error
