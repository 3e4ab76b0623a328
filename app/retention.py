"""What is kept of runners that have ended, and for how long: records with all that hangs on them, and logs.

Only a runner of which its engine holds nothing any more is ever forgotten. Its log goes before its record: a crash in
between leaves a record without a log, which the next sweep finds, and never a log that nobody knows of.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import dataclass

from app.errors import Unavailable
from app.logs import Spool
from app.store import Store

log = logging.getLogger(__name__)

DAY = 86_400.0
SWEEP_SECONDS = 3600.0
FRESH_SECONDS = 3600.0
"""How long the record of an end stays whatever the bounds: somebody may be about to read it."""

BATCH = 200
"""How many runners are forgotten in one transaction: launches wait for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """How much is kept of runners that have ended: days from the end, the newest records; None: no bound."""

    days: float | None = None
    records: int | None = None
    logs_mib: int | None = None


@dataclass(frozen=True, slots=True)
class Outdated:
    """What is over the bounds: records, logs (those of these records included), and how many bytes of disk logs take."""

    records: int
    logs: int
    log_bytes: int


class Retention:
    """Forgets what need not be kept. ``needed`` names a revision behind which all is needed still, and runners that are."""

    def __init__(
        self,
        store: Store,
        spool: Spool,
        keep: Keep,
        *,
        needed: Callable[[], Awaitable[tuple[int | None, Collection[str]]]],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._needed = needed
        self._store = store
        self._spool = spool
        self._keep = keep
        self._now = now
        self._sweeping = asyncio.Lock()

    async def sweep(self, *, dry_run: bool = False) -> Outdated:
        """Forget what is over the bounds, and say how much that was; a dry run only says it. Raises Unavailable."""
        async with self._sweeping:
            sizes = await asyncio.to_thread(self._spool.sizes)
            outdated = [runner_id async for runner_id in self._records(dry_run=dry_run)]
            logs = {runner_id: sizes.pop(runner_id)[1] for runner_id in outdated if runner_id in sizes}
            logs |= await self._unknown(sizes)
            logs |= self._too_much({runner_id: size for runner_id, size in sizes.items() if runner_id not in logs})
            if not dry_run:
                await asyncio.to_thread(self._spool.forget, logs)
        return Outdated(len(outdated), len(logs), sum(logs.values()))

    async def keep_sweeping(self) -> None:
        """Sweep now and from time to time, until cancelled."""
        while True:
            try:
                gone = await self.sweep()
            except (OSError, Unavailable) as error:
                log.warning("what is outdated cannot be forgotten now: %s", error)
            except Exception:  # no defect may let disks fill up without a word
                log.exception("forgetting what is outdated failed, and is tried again")
            else:
                if gone.records or gone.logs:
                    log.info("forgot %d records and %d logs of %d bytes", gone.records, gone.logs, gone.log_bytes)
            await asyncio.sleep(SWEEP_SECONDS)

    async def _records(self, *, dry_run: bool) -> AsyncIterator[str]:
        """Give the runners whose records are over the bounds, oldest launch first, forgetting them on the way."""
        now = self._now()
        place: int | None = 0
        ended_before = None if self._keep.days is None else now - self._keep.days * DAY
        while place is not None:
            told, owed = await self._needed()
            found, place = await self._store.outdated(
                ended_before, self._keep.records, fresh=now - FRESH_SECONDS, told=told, after=place, limit=BATCH
            )
            batch = [runner_id for runner_id in found if runner_id not in owed]
            if not dry_run:
                await asyncio.to_thread(self._spool.forget, batch)
                await self._store.forget(batch)
            for runner_id in batch:
                yield runner_id

    async def _unknown(self, sizes: dict[str, tuple[float, int]]) -> dict[str, int]:
        """Find old logs without a record, which a lost database leaves."""
        if self._keep.days is None:
            return {}
        old = [name for name, (written_at, _) in sizes.items() if written_at < self._now() - self._keep.days * DAY]
        known = await self._store.known(old)
        return {name: sizes[name][1] for name in old if name not in known}

    def _too_much(self, sizes: dict[str, tuple[float, int]]) -> dict[str, int]:
        """Choose the oldest logs that are too many bytes together."""
        if self._keep.logs_mib is None:
            return {}
        left = sum(size for _, size in sizes.values())
        chosen = {}
        for name, (_, size) in sorted(sizes.items(), key=lambda item: item[1]):
            if left <= self._keep.logs_mib << 20:
                break
            chosen[name] = size
            left -= size
        return chosen
