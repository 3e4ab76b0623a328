"""The exception tree. Each kind means a different reaction of its caller; there is no HTTP in it.

RunnerLauncherError
├── ConfigurationError      a setting or pool file is wrong: the start stops, a reload keeps the old one
├── LauncherError           raised by launchers alone
│   ├── LauncherUnavailable     cannot ask, or the outcome is unknown: changes nothing, ask again
│   ├── LaunchRejected          never will work as asked: the launch ends with this reason
│   └── RunnerGone              the engine has no such runner
├── NotOwner                another replica acts on this: nothing to do here
├── RequestRefused          a request that changed nothing; ``code`` names it for machines
│   ├── NotAuthenticated, NotPermitted, NotFound, InvalidRequest, ContextTooLarge
│   ├── AmbiguousId, RunnerEnded, HistoryGone
│   └── SlotBusy, PoolFull, TooManyCalls, Misdirected, Unavailable
└── RunnerLaunchError       an accepted request whose launch failed; carries the runner
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from app.reason import Reason

if TYPE_CHECKING:
    from app.runner import Runner


class RunnerLauncherError(Exception):
    """Everything this service raises on purpose."""


class ConfigurationError(RunnerLauncherError):
    """A setting, pool file or token file that cannot be used; the text names the file, the key and the reason."""


class LauncherError(RunnerLauncherError):
    """What a launcher may raise; anything else that leaves a launcher is a defect."""


class LauncherUnavailable(LauncherError):
    """The engine cannot be asked now, or did not tell the outcome. Nothing may be concluded from it.

    ``acted`` is False only when the engine surely did nothing (a refused connection, a fork that failed).
    ``retry_after`` is the engine's own wish in seconds, where it gave one; ``reason`` is why a launch has failed once its
    attempts are used up.
    """

    def __init__(
        self,
        message: str,
        *,
        acted: bool = True,
        retry_after: float | None = None,
        reason: Reason = Reason.ENGINE_UNAVAILABLE,
    ) -> None:
        super().__init__(message)
        self.acted = acted
        self.retry_after = retry_after
        self.reason = reason


class LaunchRejected(LauncherError):
    """The engine or the machine refuses this launch for good: no such command, image, permission."""

    def __init__(self, message: str, reason: Reason = Reason.LAUNCH_REJECTED) -> None:
        super().__init__(message)
        self.reason = reason


class RunnerGone(LauncherError):
    """The engine has no runner under this handle."""


class NotOwner(RunnerLauncherError):
    """Another replica acts on this, or may by now."""


@dataclass(frozen=True)
class Fault:
    """One thing wrong in a request: a JSON pointer into the body (empty: the whole), or `/query/NAME`, and a sentence."""

    pointer: str
    detail: str

    @classmethod
    def at(cls, place: Iterable[int | str], detail: str) -> Self:
        """Say what is wrong in a place, given as the names and numbers that lead there."""
        return cls("".join(f"/{str(part).replace('~', '~0').replace('/', '~1')}" for part in place), detail)


class RequestRefused(RunnerLauncherError):
    """A request that changed nothing. ``code`` is stable, for machines; the text is for people."""

    code = "refused"
    retryable = False

    def __init__(self, message: str, *faults: Fault, code: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.faults = faults
        self.code = code or type(self).code
        self.retry_after = retry_after


class NotAuthenticated(RequestRefused):
    """No token, or one that is not known or no longer valid."""

    code = "unauthenticated"


class NotPermitted(RequestRefused):
    """A known caller who may not do this."""

    code = "forbidden"


class NotFound(RequestRefused):
    """No runner or pool under that name."""

    code = "not-found"


class AmbiguousId(RequestRefused):
    """The beginning of more than one runner's id; the text names some of them."""

    code = "ambiguous-id"


class InvalidRequest(RequestRefused):
    """Well-formed, and still nothing that could be done."""

    code = "invalid"


class ContextTooLarge(RequestRefused):
    """The task context is over the limit that holds in every environment."""

    code = "context-too-large"


class SlotBusy(RequestRefused):
    """The slot has a live runner; ``holder`` is its record."""

    code = "slot-busy"
    retryable = True

    def __init__(self, message: str, holder: "Runner") -> None:
        super().__init__(message)
        self.holder = holder


class RunnerEnded(RequestRefused):
    """The runner has ended already, and so cannot do this."""

    code = "runner-ended"


class HistoryGone(RequestRefused):
    """What followed the revision that a reader has read up to can no longer be told without a gap."""

    code = "history-gone"


class PoolFull(RequestRefused):
    """The pool has no room now, in runners, cores or memory."""

    code = "pool-full"
    retryable = True


class TooManyCalls(RequestRefused):
    """The caller asks more often than their token allows."""

    code = "too-many-calls"
    retryable = True


class Misdirected(RequestRefused):
    """What is asked for belongs to another node; ``url`` is where its replica is reached, where that is known."""

    code = "other-node"

    def __init__(self, message: str, url: str | None) -> None:
        super().__init__(f"{message}; ask {url}" if url else message)
        self.url = url


class Unavailable(RequestRefused):
    """The service cannot accept this now: it is draining, or its store refused the write."""

    code = "unavailable"
    retryable = True


class RunnerLaunchError(RunnerLauncherError):
    """The request was accepted and recorded, and the launch failed; the text names the launcher and each attempt."""

    def __init__(self, runner: "Runner") -> None:
        super().__init__(runner.message or f"the launch of {runner.runner_id} failed")
        self.runner = runner
