"""How a call to the service goes, apart from who waits for it: steps that an asyncio client and a plain one both take.

An exchange is a generator. It yields a ``Call`` to be sent, and is given the response or has the transport's error thrown
in; or a ``Pause`` to sleep. What it returns is the result. All that decides is here: what is repeated, for how long, what
an answer means.

A launch is repeated under one idempotency key, so an answer that was lost costs nothing: the service starts no second
runner. Every other call may be repeated as it is.
"""

import json
import logging
import os
import random
import time
import uuid
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeVar
from urllib.parse import quote

import httpx

from runner_launcher_client.address import Address
from runner_launcher_client.errors import (
    InvalidRequestError,
    NotPermittedError,
    PoolFullError,
    RunnerLauncherError,
    RunnerLaunchError,
    UnavailableError,
    refusal,
)
from runner_launcher_client.records import Record, Runner

log = logging.getLogger("runner_launcher_client")

WAIT_SECONDS = 30
"""How long one long poll asks the service to wait."""

ANSWER_SECONDS = 15.0
"""How long an answer may take beyond what it was asked to wait."""

CONNECT_SECONDS = 5.0
BASE_SECONDS, CAP_SECONDS = 0.2, 10.0

_AGAIN = frozenset({429, 502, 503, 504})
_NEVER = (httpx.UnsupportedProtocol, httpx.LocalProtocolError)


Param = str | float | tuple[str, ...] | None
"""A query parameter: None is left out, a tuple is repeated."""


@dataclass(frozen=True)
class Call:
    """One request; ``wait`` is how many seconds it asks the service to wait before its answer."""

    method: str
    path: str
    params: Mapping[str, Param] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Any = None
    wait: float = 0

    def arguments(self) -> dict[str, Any]:
        """Write it for httpx's ``build_request`` and ``request``."""
        content = {} if self.body is None else {"Content-Type": "application/json"}
        return {
            "method": self.method,
            "url": self.path,
            "params": {name: value for name, value in self.params.items() if value is not None},
            "headers": {**self.headers, **content},
            "content": None if self.body is None else json.dumps(self.body, ensure_ascii=False).encode(),
            "timeout": httpx.Timeout(self.wait + ANSWER_SECONDS, connect=CONNECT_SECONDS),
        }


@dataclass(frozen=True)
class Pause:
    """Do nothing for so many seconds."""

    seconds: float


T = TypeVar("T")
R = TypeVar("R", bound=Record)
Exchange = Generator[Call | Pause, httpx.Response | None, T]


@dataclass(frozen=True)
class Patience:
    """How long a service that is away or busy is asked again, in seconds from the first failure.

    ``refusals``: how often a pool may be full; None: as often as there is time for.
    """

    seconds: float = 60.0
    refusals: int | None = None

    def delay(self, failures: int, retry_after: float | None) -> float:
        """How long to wait after so many failures: full jitter, and not before the service wants to be asked."""
        jitter = random.uniform(0, min(CAP_SECONDS, BASE_SECONDS * 2**failures))  # noqa: S311 - spreads load
        return (retry_after or 0.0) + jitter


class Conversation:
    """All calls to one service, as exchanges."""

    def __init__(self, address: Address, patience: Patience) -> None:
        self._address = address
        self._patience = patience

    def headers(self) -> dict[str, str]:
        """What every request bears."""
        token = self._address.token
        return {"Authorization": f"Bearer {token}"} if token else {}

    # Launch.

    def launch(self, request: Mapping[str, Any], *, key: str | None = None, wait: float | None = None) -> Exchange[Runner]:
        """Launch a runner, and give it once its engine has accepted it, or as it is after ``wait`` seconds."""
        key = str(uuid.uuid4()) if key is None else key
        if not (key.isascii() and key.isprintable()):
            raise InvalidRequestError(f"the idempotency key {key!r} cannot travel in a header: printable ASCII can")
        until = _Until(wait)
        seconds = until.next()
        call = Call(
            "POST",
            "/runners",
            headers={
                "Idempotency-Key": key,
                "Prefer": f"wait={seconds}" if seconds else "respond-async",
            },
            body=request,
            wait=seconds,
        )
        runner = _read(Runner, (yield from self.ask(call)))
        tag: str | None = None
        while not (runner.accepted or runner.finished or until.over):
            changed = yield from self.change(runner.runner_id, tag, until.next())
            runner, tag = changed or (runner, tag)
        if runner.finished and not runner.accepted:
            raise RunnerLaunchError.of(runner)
        return runner

    def preview(self, kind: type[R], request: Mapping[str, Any]) -> Exchange[R]:
        """Say what a launch would be."""
        return _read(kind, (yield from self.ask(Call("POST", "/runners", params={"dry_run": "true"}, body=request))))

    def launch_again(self, request: Mapping[str, Any], *, attempts: int) -> Exchange[Runner]:
        """Launch a runner; a launch that failed for a cause that can pass is made anew, each under a key of its own.

        That is safe: a launch that is told as failed has left nothing that lives.
        """
        for number in count(1):
            try:
                return (yield from self.launch(request))
            except RunnerLaunchError as error:
                if number >= attempts or not error.retryable:
                    raise
                yield Pause(self._patience.delay(number, error.retry_after))
        raise AssertionError

    # Read.

    def get(self, runner_id: str) -> Exchange[Runner]:
        """Give a runner as it is now."""
        return _read(Runner, (yield from self.ask(Call("GET", _runner(runner_id)))))

    def change(self, runner_id: str, tag: str | None, wait: int) -> Exchange[tuple[Runner, str] | None]:
        """Give a runner that is not as it was under this tag, with its tag; None if it stays so for ``wait`` seconds."""
        headers = {"If-None-Match": tag, "Prefer": f"wait={wait}"} if tag else {}
        asked = time.monotonic()
        response = yield from self.ask(Call("GET", _runner(runner_id), headers=headers, wait=wait))
        if response.status_code != httpx.codes.NOT_MODIFIED:
            runner = _read(Runner, response)
            now = response.headers.get("ETag") or f'W/"{runner.revision}"'
            if now != tag:
                return runner, now
        if time.monotonic() - asked < wait / 2:  # it does not wait for us now: it goes down, or something stands between
            yield Pause(random.uniform(0.1, 0.5))  # noqa: S311 - spreads load
        return None

    def finished(self, runner_id: str, timeout: float | None = None) -> Exchange[Runner]:
        """Give a runner once it has ended, or as it is after ``timeout`` seconds."""
        until = _Until(timeout)
        runner: Runner | None = None
        tag: str | None = None
        while runner is None or not (runner.finished or until.over):
            changed = yield from self.change(runner_id, tag, until.next())
            runner, tag = changed or (runner, tag)
        return runner

    def read(self, kind: type[R], path: str, **params: Param) -> Exchange[R]:
        """Give one record of any kind."""
        return _read(kind, (yield from self.ask(Call("GET", path, params=params))))

    def items(self, kind: type[R], path: str, **params: Param) -> Exchange[tuple[R, ...]]:
        """Give the records of one page."""
        response = yield from self.ask(Call("GET", path, params=params))
        return tuple(_made(kind, each, response) for each in _json(response).get("items") or ())

    # Change.

    def stop(self, runner_id: str, *, grace: float | None = None, force: bool = False) -> Exchange[Runner]:
        """Ask for a runner's end."""
        params = {"grace": grace, "force": "true" if force else None}
        return _read(Runner, (yield from self.ask(Call("DELETE", _runner(runner_id), params=params))))

    def switch(self, kind: type[R], name: str, *, enabled: bool) -> Exchange[R]:
        """Switch a pool on or off."""
        return _read(kind, (yield from self.ask(Call("PATCH", f"/pools/{quote(name, safe='')}", body={"enabled": enabled}))))

    def retry(self, kind: type[R], name: str) -> Exchange[R]:
        """Have a target of webhooks tried again."""
        return _read(kind, (yield from self.ask(Call("POST", f"/webhooks/{quote(name, safe='')}/retry"))))

    # Every call.

    def ask(self, call: Call) -> Exchange[httpx.Response]:
        """Send a call until it is answered, or refused for good, or patience ends. Raises RunnerLauncherError."""
        trouble = Trouble(self._patience, self._address)
        while True:
            try:
                response = yield call
            except httpx.RequestError as error:
                delay = trouble.with_transport(error)
            else:
                if response is None:
                    raise RuntimeError("a call without its response")
                if response.status_code < httpx.codes.BAD_REQUEST:
                    return response
                delay = trouble.with_answer(response)
            yield Pause(delay)


class Trouble:
    """A row of failures of one call: says how long to wait before the next try, or raises what ends it."""

    def __init__(self, patience: Patience, address: Address) -> None:
        self._patience = patience
        self._address = address
        self._failures = 0
        self._refusals = 0
        self._since = 0.0

    def over(self) -> None:
        """Forget it: the service has answered."""
        self._failures = self._refusals = 0

    def with_transport(self, error: httpx.RequestError) -> float:
        """Count a request that got no answer."""
        told = unreachable(self._address, error)
        if isinstance(error, _NEVER):
            raise told from error
        return self._again(told, error)

    def with_answer(self, response: httpx.Response) -> float:
        """Count an answer that is a refusal; raises it at once if the same request would be refused again."""
        refused = refusal(response)
        if response.status_code == httpx.codes.UNAUTHORIZED and not self._address.token:
            raise NotPermittedError(f"a token is needed: {self._address.missing}", code=refused.code, status=refused.status)
        if response.status_code not in _AGAIN or isinstance(refused, RunnerLaunchError):
            raise refused
        self._refusals += isinstance(refused, PoolFullError)
        return self._again(refused, None)

    def _again(self, error: RunnerLauncherError, cause: Exception | None) -> float:
        now = time.monotonic()
        self._since = now if self._failures == 0 else self._since
        self._failures += 1
        delay = self._patience.delay(self._failures, error.retry_after)
        tired = self._patience.refusals is not None and self._refusals >= self._patience.refusals
        if tired or now + delay > self._since + self._patience.seconds:
            raise error from cause
        if self._failures == 1:
            log.info("%s; trying again for %g s", error, self._patience.seconds)
        return delay


class _Until:
    """A time that passes, in long polls of whole seconds; None: as long as it takes."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def over(self) -> bool:
        return self._end is not None and time.monotonic() >= self._end

    def next(self) -> int:
        """How long the next poll may wait; at least a second while there is any time left."""
        if self._end is None:
            return WAIT_SECONDS
        left = self._end - time.monotonic()
        return 0 if left <= 0 else max(1, min(WAIT_SECONDS, int(left)))


def unreachable(address: Address, error: httpx.RequestError) -> UnavailableError:
    """Say that there was no answer, and why."""
    return UnavailableError(f"no answer from {address.url}: {_why(error)}", code="unreachable", retryable=True)


def _why(error: BaseException) -> str:
    """Find the system's own words under those of the libraries: `Connection refused`."""
    cause: BaseException | None = error
    while cause:
        if isinstance(cause, OSError) and cause.errno:
            return os.strerror(cause.errno) if cause.errno > 0 else str(cause.strerror)  # a name that means nothing: below 0
        cause = cause.__cause__ or cause.__context__
    return str(error) or type(error).__name__


def _runner(runner_id: str) -> str:
    return f"/runners/{quote(runner_id, safe='')}"


def _read(kind: type[R], response: httpx.Response) -> R:
    return _made(kind, _json(response), response)


def _made(kind: type[R], data: object, response: httpx.Response) -> R:
    try:
        if isinstance(data, Mapping):
            return kind.from_dict(data)
    except (TypeError, ValueError, AttributeError):
        pass
    raise _not_ours(response)


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        data = response.json()
    except ValueError:
        raise _not_ours(response) from None
    if not isinstance(data, dict):
        raise _not_ours(response)
    return data


def _not_ours(response: httpx.Response) -> UnavailableError:
    text = f"{response.request.url} answered something else than a Runner Launcher would"
    return UnavailableError(text, code="not-understood", status=response.status_code)
