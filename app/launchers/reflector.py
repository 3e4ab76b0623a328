"""A copy of one kind of object, kept by one list and then a watch: so looking at thousands costs the API nothing.

The watch has a deadline of its own (half-open connections say nothing, for ever), resumes where it was, and starts anew from
a list when the API has forgotten that place. While there is trouble the copy is not believed: ``sync`` raises.
"""

import asyncio
import contextlib
import json
import logging
import math
import random
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, TypeVar

from app.errors import LauncherUnavailable
from app.launchers.cluster import Cluster, Json, Refused

log = logging.getLogger(__name__)

T = TypeVar("T")

PAGE = 500
WATCH_SECONDS = 240
SILENCE_SECONDS = 90.0
"""After so much silence a watch is begun again, by a new list where the API had sent bookmarks, which come every minute: it
may have been set back to where this watch's version is yet to come."""

LASTING_SECONDS = 1.0
"""A watch that was open for so long was well; that it is cut or falls silent is its end then, and no failure."""

FRESH_SECONDS = 5.0
"""How long what was heard is believed without asking whether the API is still there."""

SYNC_SECONDS = 20.0
BACKOFF_SECONDS = (0.1, 10.0)
MAX_LINE = 8 * 2**20
_EXPIRED = 410


class _ExpiredError(Exception):
    """The API has forgotten the version that a watch or list goes on from."""


class Reflector(Generic[T]):
    """Keeps a copy of the objects of a kind that a selector names, each as ``read`` makes it.

    ``changed`` is told of each change: what was, and what is, None where there is nothing.
    """

    def __init__(
        self,
        cluster: Cluster,
        kind: str,
        selector: dict[str, str],
        read: Callable[[Json], T],
        changed: Callable[[T | None, T | None], None],
    ) -> None:
        self.objects: dict[str, T] = {}
        self._cluster = cluster
        self._path = cluster.path(kind)
        self._selector = selector
        self._read = read
        self._changed = changed
        self._version: str | None = None
        self._bookmarked = False
        self._ahead: dict[str, int] = {}
        self._heard_at = 0.0
        self._trouble: LauncherUnavailable | None = None
        self._synced = False
        self._outcome = asyncio.Event()
        self._poke = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def sync(self) -> None:
        """Return when the copy can be believed; raises LauncherUnavailable if it cannot now."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"reflect {self._path}")
        if self._trouble or not self._synced:
            self._outcome.clear()
            self._poke.set()
            try:
                async with asyncio.timeout(SYNC_SECONDS):
                    await self._outcome.wait()
            except TimeoutError as error:
                raise LauncherUnavailable(f"{self._path} could not be listed in {SYNC_SECONDS:g} s") from error
            if self._trouble:
                raise LauncherUnavailable(str(self._trouble), retry_after=self._trouble.retry_after) from self._trouble

    @property
    def quiet(self) -> bool:
        """Whether nothing was heard for so long that the API should be asked whether it is there."""
        return time.monotonic() - self._heard_at > FRESH_SECONDS

    def heard(self) -> None:
        """Note that the API is there."""
        self._heard_at = time.monotonic()

    def put(self, obj: Json) -> None:
        """Take in an object that a call has just answered, ahead of the watch."""
        name, version = obj["metadata"]["name"], _number(obj["metadata"]["resourceVersion"])
        if version > _number(self._version):  # else the watch has seen it, and what came after it
            self._ahead[name] = version
            self._replace(name, self._made(name, obj))

    def drop(self, name: str) -> None:
        """Take in that there is no such object, ahead of the watch."""
        self._replace(name, None)

    async def aclose(self) -> None:
        """Stop."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        failures = 0
        while True:
            began = time.monotonic()
            try:
                if self._version is None:
                    self._version = await self._list()
                await self._watch()
                failures = 0
            except _ExpiredError:
                self._begin_anew()
            except (LauncherUnavailable, Refused) as error:
                failures += 1
                log.log(logging.WARNING if failures == 1 else logging.DEBUG, "%s: %s", self._path, error)
                refused = LauncherUnavailable(f"{self._path}: {error}")
                self._fail(error if isinstance(error, LauncherUnavailable) else refused)
            except Exception as error:  # nobody watches this task, and a copy that nobody keeps would be believed for ever
                failures += 1
                log.exception("%s: its copy is made anew", self._path)
                self._version = None
                self._fail(LauncherUnavailable(f"{self._path}: what the API answered is not understood: {error!r}"))
            if failures or time.monotonic() - began < LASTING_SECONDS:
                await self._pause(failures)

    async def _pause(self, failures: int) -> None:
        first, longest = BACKOFF_SECONDS
        pause = min(longest, first * 2 ** min(failures, 20)) * random.uniform(0.5, 1)  # noqa: S311 - spreads load
        if self._trouble and self._trouble.retry_after:
            pause = max(pause, self._trouble.retry_after)
        self._poke.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await self._poke.wait()

    def _begin_anew(self) -> None:
        """Go by a list from here on. It shows all that calls have answered so far, also where the API was set back."""
        self._version = None
        self._ahead.clear()

    async def _list(self) -> str:
        """Read all pages, and give the version that they show."""
        found: dict[str, T] = {}
        page: dict[str, str | int] = {**self._selector, "limit": PAGE}
        while True:
            try:
                answer = await self._cluster.call("GET", self._path, query=page)
            except Refused as refused:
                if refused.status == _EXPIRED:
                    raise _ExpiredError from refused
                raise
            for item in answer["items"]:
                name = item["metadata"]["name"]
                if (value := self._made(name, item)) is not None:
                    found[name] = value
            if token := answer["metadata"].get("continue"):
                page["continue"] = token
                continue
            break
        version = str(answer["metadata"]["resourceVersion"])
        self._ahead = {name: number for name, number in self._ahead.items() if number > _number(version)}
        for name in {*self.objects, *found} - self._ahead.keys():
            self._replace(name, found.get(name))
        self._well()
        return version

    async def _watch(self) -> None:
        """Follow the changes until the watch ends, by the API's will or by that of what lies before it."""
        opened = heard = math.inf
        limit = random.randint(WATCH_SECONDS, WATCH_SECONDS * 5 // 4)  # noqa: S311 - spreads load
        query: dict[str, str | int] = {
            **self._selector,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version or "",
            "timeoutSeconds": limit,
        }
        try:
            async with self._cluster.stream(self._path, query, silence=SILENCE_SECONDS) as chunks:
                self._well()
                opened = heard = time.monotonic()
                async for line in _lines(chunks):
                    heard = time.monotonic()
                    self._take(line)
        except Refused as refused:
            if refused.status == _EXPIRED:
                raise _ExpiredError from refused
            raise
        except LauncherUnavailable as error:
            if time.monotonic() - opened < LASTING_SECONDS:
                raise
            self._trouble = error  # until the next one is open
            if self._bookmarked and time.monotonic() - heard > SILENCE_SECONDS - LASTING_SECONDS:
                self._begin_anew()
            log.debug("%s: a watch ended: %s", self._path, error)

    def _take(self, line: bytes) -> None:
        try:
            event: dict[str, Any] = json.loads(line)
            kind, obj = event["type"], event["object"]
            if kind == "ERROR":
                if obj.get("code") == _EXPIRED:
                    raise _ExpiredError
                raise LauncherUnavailable(f"{self._path}: {obj.get('message')}")
            self._version = obj["metadata"]["resourceVersion"]
            self._bookmarked = self._bookmarked or kind == "BOOKMARK"
            self.heard()
            if kind in {"ADDED", "MODIFIED", "DELETED"} and not self._overtaken(obj):
                self._replace(obj["metadata"]["name"], self._made(obj["metadata"]["name"], obj))
            if kind == "DELETED":  # after its last words
                self._replace(obj["metadata"]["name"], None)
        except (ValueError, KeyError, TypeError) as error:
            raise LauncherUnavailable(f"{self._path}: not an event: {line[:200]!r}") from error

    def _made(self, name: str, obj: Json) -> T | None:
        """Read an object; one that cannot be read, because others have a hand in it, is left as it was known."""
        try:
            return self._read(obj)
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            log.warning("%s: %s cannot be read, and is left aside: %r", self._path, name, error)
            return self.objects.get(name)

    def _overtaken(self, obj: Json) -> bool:
        """Whether an event is older than what a call has answered meanwhile."""
        name, version = obj["metadata"]["name"], _number(obj["metadata"]["resourceVersion"])
        if version < self._ahead.get(name, 0):
            return True
        self._ahead.pop(name, None)
        return False

    def _replace(self, name: str, value: T | None) -> None:
        before = self.objects.pop(name, None)
        if value is not None:
            self.objects[name] = value
        if value != before:
            self._changed(before, value)

    def _fail(self, trouble: LauncherUnavailable) -> None:
        self._trouble = trouble
        self._outcome.set()

    def _well(self) -> None:
        self._synced = True
        self._trouble = None
        self.heard()
        self._outcome.set()


async def _lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line
        if len(rest) > MAX_LINE:
            raise LauncherUnavailable(f"a watch sent more than {MAX_LINE} bytes without an end of line")


def _number(version: str | None) -> int:
    """Read a version as what it is in every Kubernetes: a number that grows."""
    return int(version) if version and version.isdigit() else 0
