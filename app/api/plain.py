"""Answers for people with curl: aligned tables, ``key: value`` lines, and errors as sentences.

What comes from elsewhere (a task's id, an engine's words) is shown on one line, with nothing in it that a terminal obeys.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime

from fastapi import Request, Response
from pydantic import BaseModel
from starlette.responses import PlainTextResponse

from app.models import (
    DiagnosisRecord,
    EnginePage,
    EventPage,
    EventRecord,
    JournalPage,
    PoolPage,
    Problem,
    RunnerPage,
    SweepReport,
    WebhookPage,
)

TEXT = {"content": {"text/plain": {"schema": {"type": "string"}}}}
"""What a route that can answer so declares."""

RUNNERS = ("runner_id", "task_id", "pool_name", "slot_id", "state", "phase", "reason", "exit_code", "created_at")
EVENTS = ("revision", "at", "type", "from", "to", "reason", "message")
POOLS = ("pool_name", "type", "enabled", "current_running", "max_concurrency", "queued", "cpu_usage", "memory_usage")


def is_wanted(request: Request) -> bool:
    """Say whether a client would rather have text than JSON. One that does not mind gets JSON."""
    accepted = request.headers.get("accept", "*/*")
    return _weight(accepted, "text/plain") > _weight(accepted, "application/json")


def shown(request: Request, response: Response, answer: BaseModel) -> Response | None:
    """Give an answer as text, with the status and headers meant for it; None for JSON."""
    response.headers["Vary"] = "Accept"
    if not is_wanted(request):
        return None
    return PlainTextResponse(text(answer), response.status_code or 200, dict(response.headers))


def text(answer: BaseModel) -> str:
    """Write an answer for people."""
    match answer:
        case RunnerPage():
            more = f"more: cursor={answer.next_cursor}\n" if answer.next_cursor else ""
            return table(RUNNERS, map(_row, answer.items)) + more
        case EventPage():
            return table(EVENTS, map(_row, answer.items))
        case JournalPage():
            more = f"more: cursor={answer.next_cursor}\n" if answer.next_cursor else ""
            return table((*EVENTS[:2], "runner_id", "task_id", *EVENTS[2:]), map(_row, answer.items)) + more
        case EnginePage(items=[]):
            return "no engine is in use\n"
        case WebhookPage(items=[]):
            return "nobody is told of runners\n"
        case SweepReport(items=[]) if not answer.problems:
            return "engines hold nothing without a record\n"
        case EnginePage() | WebhookPage():
            return "\n".join("".join(lines(_row(item))) for item in answer.items)
        case PoolPage():
            return table(POOLS, map(_row, answer.items))
        case DiagnosisRecord():
            told = ((answer.summary, ""), (answer.likely_cause, "likely cause: "), (answer.next_step, "next step: "))
            said = "".join(f"  {each.source:<7}  {one_line(each.text)}\n" for each in answer.evidence)
            return "".join(f"{name}{one_line(words)}\n" for words, name in told) + (f"evidence:\n{said}" if said else "")
        case Problem():
            return sentence(answer)
        case _:
            return "".join(lines(_row(answer)))


def sentence(problem: Problem) -> str:
    """Tell a refusal."""
    again = "; the same request may succeed later" if problem.retryable else ""
    return f"{problem.title} ({problem.code}): {_word(problem.detail)}{again}\n"


def table(columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    """Write rows below each other, every column as wide as its widest word."""
    words = [[column.upper() for column in columns], *([_word(row.get(column)) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*words, strict=True)]
    return "".join("  ".join(map(str.ljust, line, widths)).rstrip() + "\n" for line in words)


def lines(values: Mapping[str, object]) -> Iterator[str]:
    """Write each value behind its name; what is inside another is named after it, and nothing is said of what is empty."""
    flat = list(_flat(values))
    width = max((len(name) for name, _ in flat), default=0)
    for name, word in flat:
        yield f"{name + ':':<{width + 1}} {word}\n"


def event_line(event: EventRecord) -> str:
    """Write an event on a line of its own, for lists that have no end."""
    row = _row(event)
    why = " ".join(_word(row[name]) for name in ("reason", "message") if row[name])
    return f"{_word(row['at'])}  {event.runner_id}  {event.type:<14}  {event.to:<8}  {why}".rstrip() + "\n"


def one_line(words: str) -> str:
    """Show words on one line, with nothing in them that a terminal obeys."""
    return "".join(_visible(character) for character in words)


def _flat(values: Mapping[str, object], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        name = one_line(key)
        match value:
            case None | "":
                pass
            case dict():
                yield from _flat(value, f"{before}{name}.")
            case list() if any(isinstance(item, dict) for item in value):
                for number, item in enumerate(value, 1):
                    yield from _flat(item, f"{before}{name}.{number}.")
            case list():
                yield from [(f"{before}{name}", ", ".join(map(_word, value)))] if value else ()
            case _:
                yield f"{before}{name}", _word(value)


def _row(answer: BaseModel) -> dict[str, object]:
    return answer.model_dump(by_alias=True)


def _word(value: object) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:g}"
        case datetime():
            return f"{value:%Y-%m-%dT%H:%M:%S}.{value.microsecond // 1000:03}Z"
        case _:
            return one_line(str(value)) or "-"


def _visible(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def _weight(accepted: str, kind: str) -> float:
    """Say how much a header Accept wants a media type: the q of the range that names it most closely (RFC 9110, 12.5.1)."""
    ranges = {}
    for part in accepted.lower().split(","):
        name, *parameters = (word.strip() for word in part.split(";"))
        q = next((word[2:] for word in parameters if word.startswith("q=")), "1")
        ranges[name] = float(q) if q.replace(".", "", 1).isdecimal() and q.isascii() else 0.0
    for name in (kind, f"{kind.partition('/')[0]}/*", "*/*"):
        if name in ranges:
            return ranges[name]
    return 0.0
