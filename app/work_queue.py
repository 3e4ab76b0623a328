"""Which runners want a look, each at most once, now or later.

The queue behind a level-triggered loop: it carries no news, only names. A name that is added twice is handed out once; one
that is added while it is being handled is handed out again afterwards, never to two at once.
"""

import asyncio
from collections import OrderedDict


class WorkQueue:
    """Names to be handled, in the order they were added."""

    def __init__(self) -> None:
        self._ready: OrderedDict[str, None] = OrderedDict()
        self._handling: set[str] = set()
        self._again: set[str] = set()
        self._later: dict[str, asyncio.TimerHandle] = {}
        self._wakeup = asyncio.Semaphore(0)

    def add(self, name: str) -> None:
        """Hand this name out as soon as may be."""
        if timer := self._later.pop(name, None):
            timer.cancel()
        if name in self._handling:
            self._again.add(name)
        elif name not in self._ready:
            self._ready[name] = None
            self._wakeup.release()

    def add_after(self, name: str, seconds: float) -> None:
        """Hand this name out after so long; takes the place of an earlier wish for later, not of one for now."""
        if name in self._ready or name in self._again:
            return
        if timer := self._later.pop(name, None):
            timer.cancel()
        self._later[name] = asyncio.get_running_loop().call_later(max(0.0, seconds), self._due, name)

    def add_by(self, name: str, seconds: float) -> None:
        """Hand this name out after so long at the latest; an earlier wish stays."""
        timer = self._later.get(name)
        if timer is None or timer.when() > asyncio.get_running_loop().time() + seconds:
            self.add_after(name, seconds)

    async def get(self) -> str:
        """Wait for a name; the caller must say ``done`` when it has handled it."""
        await self._wakeup.acquire()
        name, _ = self._ready.popitem(last=False)
        self._handling.add(name)
        return name

    def is_handling(self, name: str) -> bool:
        """Say whether somebody is at a name."""
        return name in self._handling

    def done(self, name: str) -> None:
        """Say that a name has been handled."""
        self._handling.discard(name)
        if name in self._again:
            self._again.discard(name)
            self.add(name)

    def close(self) -> None:
        """Forget what was to come later."""
        for timer in self._later.values():
            timer.cancel()
        self._later.clear()

    def _due(self, name: str) -> None:
        self._later.pop(name, None)
        self.add(name)
