"""All events of the store in the order of their revisions, for readers who want every one of them.

The newest are kept in memory, written out once for everybody; what is older is read from the store. A reader is nothing but
a place, the revision it has read up to: one that is slow, or comes back after a restart, holds up nobody and makes nothing
grow, and is given what follows its place without a gap and without a repeat.
"""

import asyncio
import functools
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass

from app.errors import HistoryGone
from app.events import Change, Event, Feed
from app.models import EventRecord, event_record
from app.store import Store

KEPT = 1024
"""How many of the newest events are kept in memory."""

BATCH = 100
"""How many events a reader is given at once."""


@dataclass(frozen=True)
class Line:
    """An event as it is told, written out once for everybody, and not before somebody asks."""

    event: Event
    task_id: str
    pool_name: str

    @property
    def revision(self) -> int:
        """The event's place in the journal."""
        return self.event.revision

    @functools.cached_property
    def record(self) -> EventRecord:
        """What is told."""
        return event_record(self.event, task_id=self.task_id, pool_name=self.pool_name)

    @functools.cached_property
    def json(self) -> str:
        """That as JSON."""
        return self.record.model_dump_json(by_alias=True)


class Journal:
    """The events of one store."""

    def __init__(self, store: Store, feed: Feed) -> None:
        self._store = store
        self._kept: deque[Line] = deque()
        self._before = 0  # every event behind this revision is kept, up to the newest
        self._news = asyncio.Event()
        self._closed = False
        self.followers = 0
        feed.listen(self._changed)

    async def open(self, ending: asyncio.Event) -> None:
        """Begin where the store is now, before anything is written to it; followers are let go once ``ending`` is set."""
        self._before = (await self._store.span())[1]
        self._ending = asyncio.create_task(self._end(ending), name="end of the journal")

    async def aclose(self) -> None:
        """Let all followers go."""
        self._close()
        self._ending.cancel()
        await asyncio.gather(self._ending, return_exceptions=True)

    async def place(self, since: int | None) -> int:
        """Check that all that follows a revision can still be told, and give it; None is where the journal is now.

        Raises HistoryGone.
        """
        oldest, newest = await self._store.span()
        if since is None:
            return newest
        if since > newest:
            raise HistoryGone(f"there never was a revision {since} here; the newest is {newest}")
        if since < oldest - 1:
            raise HistoryGone(f"what followed revision {since} is no longer kept; the oldest is {oldest}")
        return since

    @property
    def newest(self) -> int:
        """The newest revision that was told."""
        return self._kept[-1].revision if self._kept else self._before

    async def oldest(self) -> int:
        """Give the place before everything that is kept."""
        return max(0, (await self._store.span())[0] - 1)

    async def after(self, place: int, limit: int = BATCH) -> list[Line]:
        """Give the next events behind a place, up to so many; empty at the end."""
        if place >= self._before:
            return self._kept_after(place)[:limit]
        return [Line(*row) for row in await self._store.events(place, limit)]

    async def follow(self, place: int, idle: float) -> AsyncIterator[list[Line]]:
        """Give what is behind a place, and what comes, until the service ends; an empty list after so many idle seconds."""
        self.followers += 1
        try:
            while not self._closed:
                news = self._news
                lines = await self.after(place)
                if lines:
                    place = lines[-1].revision
                    yield lines
                    continue
                try:
                    async with asyncio.timeout(idle):
                        await news.wait()
                except TimeoutError:
                    yield []
        finally:
            self.followers -= 1

    def _kept_after(self, place: int) -> list[Line]:
        """Look from the newest backwards: most readers are nearly there."""
        lines = []
        for line in reversed(self._kept):
            if line.revision <= place:
                break
            lines.append(line)
        return lines[::-1]

    def _changed(self, change: Change) -> None:
        if len(self._kept) == KEPT:
            self._before = self._kept.popleft().revision
        self._kept.append(Line(change.event, change.runner.task_id, change.runner.pool_name))
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def _end(self, ending: asyncio.Event) -> None:
        await ending.wait()
        self._close()

    def _close(self) -> None:
        self._closed = True
        self._wake()
