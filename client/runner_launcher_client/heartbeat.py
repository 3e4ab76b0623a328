"""An agent's signs of life, for agents that run in a pool with a ``heartbeat_timeout_seconds``.

An agent finds three variables in its environment: RUNNER_ID, RUNNER_TOKEN (its own, good for this alone) and
RUNNER_LAUNCHER_URL, which there means the service as it is reached from where the runner is.
"""

import os
import threading
from collections.abc import Mapping
from functools import cached_property
from types import TracebackType
from typing import Self

import httpx

EVERY_SECONDS = 10.0
ANSWER_SECONDS = 5.0


class Heartbeat:
    """Beats in a thread of its own while it is entered: ``with Heartbeat(): work()``.

    A beat that fails is no reason to end: the service may be down, and does not hold that against a runner. In an
    environment that is no runner's, such as a developer's, nothing is sent.
    """

    def __init__(self, every_seconds: float = EVERY_SECONDS, environment: Mapping[str, str] = os.environ) -> None:
        self._every = every_seconds
        self._runner_id = environment.get("RUNNER_ID", "")
        self._token = environment.get("RUNNER_TOKEN", "")
        self._url = environment.get("RUNNER_LAUNCHER_URL", "")
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self.last_error: str | None = None
        """Why the last beat was not heard; None if it was."""

    @property
    def needed(self) -> bool:
        """Whether this is a runner's environment."""
        return bool(self._runner_id and self._token and self._url)

    @cached_property
    def _http(self) -> httpx.Client:
        # Not through a proxy of the environment: the service wrote this address for this place.
        return httpx.Client(timeout=ANSWER_SECONDS, trust_env=False)

    def beat(self) -> bool:
        """Tell once that this runner lives; says whether the service has heard it."""
        if not self.needed:
            return False
        url = f"{self._url.rstrip('/')}/runners/{self._runner_id}/heartbeat"
        try:
            answer = self._http.post(url, headers={"Authorization": f"Bearer {self._token}"})
            self.last_error = None if answer.is_success else f"{answer.status_code} {answer.reason_phrase}"
        except httpx.HTTPError as error:
            self.last_error = str(error) or type(error).__name__
        return self.last_error is None

    def __enter__(self) -> Self:
        """Start to beat."""
        if self.needed and self._thread is None:
            self._done.clear()
            self._thread = threading.Thread(target=self._go_on, name="heartbeat", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop to beat."""
        self._done.set()
        if self._thread:
            self._thread.join(ANSWER_SECONDS)
            self._thread = None

    def _go_on(self) -> None:
        self.beat()
        while not self._done.wait(self._every):
            self.beat()
