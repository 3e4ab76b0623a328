"""What happened to runners, and who in this process waits to hear of it.

An ``Event`` is one line of a runner's history, written with the change it tells of. The store publishes changes here after
they are committed, in the order of their revisions; nothing here is remembered, so a reader that starts late, or falls
behind, reads the store.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from pydantic import JsonValue

from app.reason import Reason
from app.runner import Phase, Runner


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One line of a runner's history. ``revision`` rises over all events of a store; ``at`` is seconds since the epoch."""

    runner_id: str
    at: float
    type: str
    from_phase: Phase | None
    to_phase: Phase
    reason: Reason | None = None
    message: str | None = None
    data: dict[str, JsonValue] = field(default_factory=dict)
    revision: int = 0


@dataclass(frozen=True, slots=True)
class Change:
    """A committed change: the runner as it now is, and the event that says so."""

    runner: Runner
    event: Event


class Watch:
    """The news of one runner; what was not read when newer news came is skipped."""

    def __init__(self) -> None:
        self.latest: Change | None = None
        self.known = 0  # the revision that whoever watches has gone by
        self._news = asyncio.Event()

    @property
    def is_behind(self) -> bool:
        """Whether there is news beyond what is known."""
        return self.latest is not None and self.latest.runner.revision > self.known

    def tell(self, change: Change) -> None:
        """Hand over a change."""
        self.latest = change
        self._news.set()

    def stir(self) -> None:
        """Have whoever waits look: there is something else than a change."""
        self._news.set()

    async def stirred(self) -> None:
        """Wait for a change that was not waited for yet, or for something else to look at."""
        await self._news.wait()
        self._news.clear()

    async def change(self) -> Change:
        """Wait for a change that was not read yet, and give the latest."""
        await self.stirred()
        if self.latest is None:
            raise RuntimeError("news without a change")
        return self.latest


class Feed:
    """Hands every committed change to those who asked, on the event loop, without waiting for anyone."""

    def __init__(self) -> None:
        self._listeners: list[Callable[[Change], None]] = []
        self._watches: dict[str, set[Watch]] = {}

    def listen(self, listener: Callable[[Change], None]) -> None:
        """Call this for every change from now on; it must not block and not raise."""
        self._listeners.append(listener)

    def publish(self, changes: Sequence[Change]) -> None:
        """Tell of changes that are committed."""
        for change in changes:
            for listener in self._listeners:
                listener(change)
            for watch in self._watches.get(change.runner.runner_id, ()):
                watch.tell(change)

    @contextlib.contextmanager
    def watching(self, runner_id: str) -> Iterator[Watch]:
        """Give the news of a runner. Watch first, then read the store: nothing is missed."""
        watch = Watch()
        self._watches.setdefault(runner_id, set()).add(watch)
        try:
            yield watch
        finally:
            self._watches[runner_id].discard(watch)
            if not self._watches[runner_id]:
                del self._watches[runner_id]
