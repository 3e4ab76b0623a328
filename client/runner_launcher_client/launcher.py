"""The launcher that a Dispatcher had in its own process, as a client of the service."""

import time
import weakref
from types import TracebackType
from typing import Self, TypeVar

import httpx

from runner_launcher_client.address import find_address
from runner_launcher_client.errors import RunnerLauncherError, RunnerLaunchError
from runner_launcher_client.exchange import Conversation, Exchange, Patience, Pause
from runner_launcher_client.records import Runner
from runner_launcher_client.request import launch_request

T = TypeVar("T")


class RunnerLauncher:
    """Launches runners, synchronously; may be used by several threads, and inside a running event loop, which it blocks.

    ``retry_attempts`` is how often a launch is tried when its pool is full, or it fails for a cause that can pass, such as
    an engine that is away. A service that does not answer, or restarts, is another matter: that is tried for
    ``patience_seconds``, under one key, so it costs no second runner. Address and token come from the environment unless
    given.
    """

    def __init__(
        self,
        retry_attempts: int = 3,
        *,
        url: str | None = None,
        token: str | None = None,
        patience_seconds: float = Patience.seconds,
    ) -> None:
        address = find_address(url, token)
        self._attempts = max(1, retry_attempts)
        self._calls = Conversation(address, Patience(patience_seconds, refusals=self._attempts))
        self._http = httpx.Client(base_url=address.url, headers=self._calls.headers(), trust_env=not address.local)
        self._closing = weakref.finalize(self, self._http.close)

    def __enter__(self) -> Self:
        """Give itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Close the connections; whoever forgets it loses nothing. Runners are not touched."""
        self._closing()

    def launch(self, task: object, slot: object, pool: object) -> Runner:
        """Launch a runner for a task in a slot, and give it once its engine has accepted it.

        Each may be the Dispatcher's own object, read by its attributes, or a mapping; the pool may be a name. A pool that
        bears the name of one that the service has configured means that one.
        Raises RunnerLaunchError, whose cause tells the kind where the service refused to make a record.
        """
        try:
            return self._take(self._calls.launch_again(launch_request(task, slot, pool), attempts=self._attempts))
        except RunnerLaunchError:
            raise
        except RunnerLauncherError as error:
            raise RunnerLaunchError(
                str(error),
                code=error.code,
                status=error.status,
                retryable=error.retryable,
                retry_after=error.retry_after,
                faults=error.faults,
                runner=error.runner,
                request_id=error.request_id,
            ) from error

    def get(self, runner_id: str) -> Runner:
        """Give a runner as it is now. Raises RunnerLauncherError."""
        return self._take(self._calls.get(runner_id))

    def wait(self, runner_id: str, timeout: float | None = None) -> Runner:
        """Give a runner once it has ended, or as it is after ``timeout`` seconds. Raises RunnerLauncherError."""
        return self._take(self._calls.finished(runner_id, timeout))

    def stop(self, runner_id: str, grace: float | None = None) -> Runner:
        """Ask for a runner's end, and do not wait for it. Raises RunnerLauncherError."""
        return self._take(self._calls.stop(runner_id, grace=grace))

    def _take(self, steps: Exchange[T]) -> T:
        """Take the steps of an exchange."""
        try:
            step = next(steps)
            while True:
                if isinstance(step, Pause):
                    time.sleep(step.seconds)
                    step = next(steps)
                    continue
                try:
                    response = self._http.request(**step.arguments())
                except httpx.RequestError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(response)
        except StopIteration as end:
            result: T = end.value
            return result
