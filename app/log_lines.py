"""How the service writes its log: lines for people, or JSON for programs, with what they are about.

Whoever works on a request or on a runner says so here once; every line written on the way bears it.
"""

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

from typing_extensions import override

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
runner_id: ContextVar[str | None] = ContextVar("runner_id", default=None)
trace_id: ContextVar[str | None] = ContextVar("trace_id", default=None)

ABOUT = (request_id, runner_id, trace_id)


class JsonLines(logging.Formatter):
    """A line of JSON a record."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **{about.name: value for about in ABOUT if (value := about.get())},
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def write_log(form: Literal["text", "json"]) -> None:
    """Write the log of this process to standard error."""
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonLines() if form == "json" else text)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
