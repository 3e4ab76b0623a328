"""What can go wrong, each kind for another reaction of the caller.

RunnerLauncherError             everything this package raises on purpose
├── InvalidRequestError         the request can never be done as it is: mend it
├── NotPermittedError           no token, a wrong one, or one that may not do this
├── NotFoundError               no such runner or pool, or nothing there (yet) under this address
├── SlotBusyError               the slot has a live runner; ``holder`` is its record
├── PoolFullError               the pool has no room now: try again later, or another pool
├── UnavailableError            the service cannot be reached, or cannot now; nothing may be concluded
└── RunnerLaunchError           the launch was recorded and failed; ``runner`` is its record
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import httpx

from runner_launcher_client.records import Attempt, Runner

SHOWN_CHARACTERS = 200
"""How much of an answer that is no problem document is told."""


@dataclass(frozen=True)
class Fault:
    """One thing wrong in a request: where (a JSON pointer into the body), and what."""

    pointer: str
    detail: str


class RunnerLauncherError(Exception):
    """Everything this package raises on purpose.

    ``code`` is stable, for machines. ``status`` is that of the HTTP answer, None where there was none. ``retryable`` says
    whether the same request may succeed later; ``retry_after`` is the service's wish in seconds. ``runner`` is the record
    it is about, where there is one, and ``request_id`` finds the request in the service's log.
    """

    code = "error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        status: int | None = None,
        retryable: bool = False,
        retry_after: float | None = None,
        faults: Sequence[Fault] = (),
        runner: Runner | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code or type(self).code
        self.status = status
        self.retryable = retryable
        self.retry_after = retry_after
        self.faults = tuple(faults)
        self.runner = runner
        self.request_id = request_id

    def to_dict(self) -> dict[str, Any]:
        """Write it as JSON has it."""
        return {
            "error": type(self).__name__,
            "code": self.code,
            "detail": str(self),
            "status": self.status,
            "retryable": self.retryable,
            "request_id": self.request_id,
            "errors": [{"pointer": fault.pointer, "detail": fault.detail} for fault in self.faults],
            "runner": self.runner.to_dict() if self.runner else None,
        }


class InvalidRequestError(RunnerLauncherError):
    """The request can never be done as it is; ``faults`` says where it is wrong."""

    code = "invalid"


class NotPermittedError(RunnerLauncherError):
    """No token, one that is not known, or one that may not do this."""

    code = "forbidden"


class NotFoundError(RunnerLauncherError):
    """No such runner or pool, or a service that does not know this call."""

    code = "not-found"


class SlotBusyError(RunnerLauncherError):
    """The slot has a live runner; ``holder`` is its record."""

    code = "slot-busy"

    @property
    def holder(self) -> Runner | None:
        """The runner that has the slot."""
        return self.runner


class PoolFullError(RunnerLauncherError):
    """The pool has no room now."""

    code = "pool-full"


class UnavailableError(RunnerLauncherError):
    """The service cannot be reached, or cannot do it now. Whether a request sent to it was done is not known."""

    code = "unavailable"


class RunnerLaunchError(RunnerLauncherError):
    """The launch failed, and no runner lives. ``runner`` is its record, None where the service refused to make one."""

    code = "launch-failed"

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """The launch calls that the engine did not accept, each with its cause."""
        return self.runner.attempts if self.runner else ()

    @classmethod
    def of(cls, runner: Runner) -> Self:
        """Say of a record that ended before its engine had accepted it what a refused request would have said."""
        text = runner.message or f"the launch of {runner.runner_id} failed"
        return cls(text, code=runner.reason, retryable=bool(runner.retryable), runner=runner)


_KINDS: dict[int, type[RunnerLauncherError]] = {
    400: InvalidRequestError,
    401: NotPermittedError,
    403: NotPermittedError,
    404: NotFoundError,
    410: NotFoundError,
    413: InvalidRequestError,
    422: InvalidRequestError,
    429: PoolFullError,
    502: UnavailableError,
    503: UnavailableError,
    504: UnavailableError,
}


def refusal(response: httpx.Response) -> RunnerLauncherError:
    """Read an answer that is not the one hoped for; its body must have been read."""
    problem = _problem(response)
    runner = _runner(problem.get("runner"))
    code = str(problem["code"]) if "code" in problem else None
    kind = _KINDS.get(response.status_code, RunnerLauncherError)
    if code == SlotBusyError.code:
        kind = SlotBusyError
    elif code == "too-many-calls":
        kind = UnavailableError
    elif runner is not None:
        kind = RunnerLaunchError
    detail = str(problem.get("detail") or _unexplained(response))
    if kind is NotFoundError and detail == problem.get("title"):
        detail = f"this service does not know {response.request.method} {response.request.url.path}"
    return kind(
        detail,
        code=code,
        status=response.status_code,
        retryable=bool(problem.get("retryable", kind in {PoolFullError, UnavailableError})),
        retry_after=_seconds(response.headers.get("Retry-After", "")),
        faults=_faults(problem.get("errors")),
        runner=runner,
        request_id=problem.get("request_id"),
    )


def _problem(response: httpx.Response) -> dict[str, Any]:
    try:
        problem = response.json()
    except ValueError:
        return {}
    return problem if isinstance(problem, dict) else {}


def _runner(told: object) -> Runner | None:
    try:
        return Runner.from_dict(told) if isinstance(told, dict) else None
    except (TypeError, ValueError):
        return None


def _faults(told: object) -> list[Fault]:
    each = [fault for fault in told if isinstance(fault, dict)] if isinstance(told, list) else []
    return [Fault(str(fault.get("pointer", "")), str(fault.get("detail", ""))) for fault in each]


def _unexplained(response: httpx.Response) -> str:
    """Tell an answer that does not come from the service: from a proxy, or from another program at its address."""
    text = " ".join(response.text.split())[:SHOWN_CHARACTERS]
    return f"{response.request.url} answered {response.status_code} {response.reason_phrase}" + (f": {text}" if text else "")


def _seconds(header: str) -> float | None:
    return float(header) if header.isascii() and header.isdecimal() else None
