"""Tells targets what happens to runners: events of the store, sent as CloudEvents and signed as Standard Webhooks has it.

The events are written in the transaction of each change, so they are the outbox; nothing is queued a second time. A target
has a *place* in them: it was told all up to there, save its *arrears*, runners of which it did not take an event. Those go
their own way, in the order of their events and ever more slowly, while the place goes on; after so many tries a runner is
*parked* until somebody says to try again. So a runner's events come in order, each at least once; what one target does not
take holds up no other target, and no other runner. All of this is in the store, where a service that was killed takes it up:
what was sent and not yet noted is sent again, under the same id. Of several replicas one tells all targets, as long as it
has the lease for that; what it would note later is refused.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from app.errors import Misdirected, NotFound, NotOwner, Unavailable
from app.events import Event
from app.journal import Journal
from app.ledger import Arrears, Ledger
from app.models import CloudEvent, cloud_event
from app.ownership import Ownership
from app.runner import Phase, Runner, State
from app.store import Store
from app.targets import LONGEST_WISH_SECONDS, Target, Told

if TYPE_CHECKING:
    from app.courier import Answer, Courier

log = logging.getLogger(__name__)

SENDS = 8
"""How many events are on their way to one target at once, each of another runner."""

LANES = 256
"""How many runners' first tries may be under way before no more events are read."""

BACKOFF_SECONDS = (0.5, 600.0)
"""The longest first pause and the longest of all; each is drawn between nothing and twice the one before (full jitter)."""

MARK_SECONDS = 0.2
"""How often at most the place of a target is noted; a service that is killed tells this much again."""

IDLE_SECONDS = 60.0

KEY = "webhooks"
"""What the replica that tells holds the lease of."""

LOOK_SECONDS = 1.0
"""How often the others look whether they hold it now, and it whether all targets are told."""

TOLD = {
    "accepted": Told.ACCEPTED,
    "adopted": Told.ADOPTED,
    "started": Told.STARTED,
    "running": Told.RUNNING,
    "stopping": Told.STOPPING,
    "stop_asked": Told.STOPPING,
}
"""What an event is told as; an end as how it ended, others not at all."""


@dataclass(frozen=True, slots=True)
class TargetState:
    """A target and how far it was told. ``behind`` counts the events of all runners after its place."""

    target: Target
    gone: bool
    place: int
    behind: int
    arrears: tuple[Arrears, ...]
    delivered_at: float | None
    failed_at: float | None
    error: str | None


@dataclass(slots=True, eq=False)
class _Lane:
    """A runner of whose events some are to be sent: those from ``first`` on, None: none now. ``owed`` is in the ledger."""

    runner_id: str
    first: int | None
    owed: Arrears | None = None
    news: bool = True


class Webhooks:
    """All targets of one service. ``source`` names the installation to them; ``told`` counts what they answer."""

    def __init__(
        self,
        store: Store,
        journal: Journal,
        ownership: Ownership,
        *,
        source: str,
        told: Callable[[str, str], None],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._ledger = Ledger(store.database)
        self._journal = journal
        self._ownership = ownership
        self._targets: Sequence[Target] = ()
        self._source = source
        self._told = told
        self._now = now
        self._hooks: dict[str, _Hook] = {}
        self._courier: Courier | None = None
        self._changing = asyncio.Lock()

    async def set(self, targets: Sequence[Target]) -> None:
        """Have these told from now on. One that was told before goes on where it was, also after it was left out."""
        self._targets = targets
        with contextlib.suppress(NotOwner, Unavailable):  # then they are a moment later
            await self._tell(targets if self._ownership.holds(KEY) else ())

    async def keep_telling(self) -> None:
        """Tell as long as this replica is the one that tells, until cancelled."""
        while True:
            try:
                async with self._ownership.holding(KEY):
                    while True:
                        await self._tell(self._targets)
                        await asyncio.sleep(LOOK_SECONDS)
            except NotOwner:
                pass
            except Unavailable as error:
                log.warning("webhooks are not told now: %s", error)
            except Exception:
                log.exception("telling webhooks failed, and goes on")
            await self._tell(())
            await asyncio.sleep(LOOK_SECONDS)

    async def _tell(self, targets: Sequence[Target]) -> None:
        async with self._changing:
            if targets and self._courier is None:
                self._courier = await asyncio.to_thread(_courier, self._now)
            for hook in [hook for hook in self._hooks.values() if hook.target not in targets]:
                await hook.aclose()
                del self._hooks[hook.target.name]
            for target in targets:
                if target.name not in self._hooks:
                    self._hooks[target.name] = await self._open(target)

    async def retry(self, name: str) -> TargetState:
        """Try again all that is parked, and a target that is gone. Raises NotFound, Misdirected."""
        if name not in {target.name for target in self._targets}:
            raise NotFound(f"no webhook target named {name} is configured")
        async with self._changing:
            hook = self._hooks.get(name)
            if hook is None:
                raise await self._elsewhere()
            del self._hooks[name]  # opened anew a moment later, should this fail
            try:
                await hook.try_again()
                self._hooks[name] = await self._open(hook.target)
            except NotOwner:
                raise await self._elsewhere() from None
            return self._hooks[name].state()

    async def _elsewhere(self) -> Misdirected:
        return Misdirected("another replica tells webhooks", await self._store.owner_url(KEY))

    def telling(self) -> list[TargetState]:
        """Give the targets that this replica tells, and how far each was told."""
        return [hook.state() for hook in self._hooks.values()]

    async def states(self) -> list[TargetState]:
        """Give all targets, and how far each was told, by whichever replica."""
        return [
            hook.state() if (hook := self._hooks.get(target.name)) else await self._stored(target)
            for target in self._targets
        ]

    async def _stored(self, target: Target) -> TargetState:
        place, gone = await self._ledger.place(target.name)
        arrears = await self._ledger.arrears(target.name)
        newest = self._journal.newest
        return TargetState(
            target=target,
            gone=gone,
            place=newest if place is None else place,
            behind=0 if place is None else max(0, newest - place),
            arrears=tuple(arrears),
            delivered_at=None,
            failed_at=None,
            error=arrears[-1].error if arrears else None,
        )

    async def needs(self) -> tuple[int | None, frozenset[str]]:
        """Say what must not be forgotten: what came after this revision, None: nothing; and these runners."""
        states = await self.states()
        places = [state.place for state in states if not state.gone]
        return min(places, default=None), frozenset(owed.runner_id for state in states for owed in state.arrears)

    async def aclose(self) -> None:
        """Stop telling; what is on its way is told again by the next service."""
        await self.set(())
        if self._courier:
            await self._courier.aclose()

    async def _open(self, target: Target) -> "_Hook":
        if self._courier is None:
            raise RuntimeError("a target without a courier")
        hook = _Hook(
            target,
            self._store,
            self._journal,
            self._ownership,
            self._courier,
            source=self._source,
            told=self._told,
            now=self._now,
        )
        await hook.open()
        return hook


class _Hook:
    """One target, told under one lease. Raises NotOwner."""

    def __init__(
        self,
        target: Target,
        store: Store,
        journal: Journal,
        ownership: Ownership,
        courier: "Courier",
        *,
        source: str,
        told: Callable[[str, str], None],
        now: Callable[[], float],
    ) -> None:
        self.target = target
        self._store = store
        self._ownership = ownership
        self._fence = ownership.fence_of(KEY)
        self._ledger = Ledger(store.database, self._fence)
        self._journal = journal
        self._courier = courier
        self._source = source
        self._told = told
        self._now = now
        self._place = 0  # as it is in the store
        self._at = 0  # up to where the events were read
        self._gone = False
        self._lanes: dict[str, _Lane] = {}
        self._waiting: dict[str, Arrears] = {}  # arrears that nobody drives: parked, or the target is gone
        self._tasks: set[asyncio.Task[None]] = set()
        self._sends = asyncio.Semaphore(SENDS)
        self._eased = asyncio.Event()
        self._moved = asyncio.Event()
        self._paused_until = 0.0
        self._delivered_at: float | None = None
        self._failed_at: float | None = None
        self._error: str | None = None

    async def open(self) -> None:
        """Go on where the store says; one that is new begins now."""
        place, self._gone = await self._ledger.place(self.target.name)
        if place is None:
            place = await self._journal.place(None)
            await self._ledger.set_place(self.target.name, place)
        self._place = self._at = place
        arrears = await self._ledger.arrears(self.target.name)
        self._waiting = {each.runner_id: each for each in arrears if each.parked or self._gone}
        if self._gone:
            return
        for each in arrears:
            if not each.parked:
                self._start(_Lane(each.runner_id, each.revision, owed=each))
        self._spawn(self._read, "read")
        self._spawn(self._mark, "mark")

    async def aclose(self) -> None:
        """Stop, and note how far this came."""
        place = self._through()  # by what is under way, before that is cut short
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if not self._gone and place > self._place:
            with contextlib.suppress(Unavailable, NotOwner):
                await self._ledger.set_place(self.target.name, place)

    async def try_again(self) -> None:
        """Stop, and note that what is parked is to be sent again, and what came since the target was gone."""
        await self.aclose()
        for each in await self._ledger.arrears(self.target.name):
            await self._ledger.owe(self.target.name, replace(each, attempts=0, retry_at=self._now(), parked=False))
        place, _ = await self._ledger.place(self.target.name)
        await self._ledger.set_place(self.target.name, place or 0)

    def state(self) -> TargetState:
        """Say how far this target was told."""
        owed = {lane.runner_id: lane.owed for lane in self._lanes.values() if lane.owed} | self._waiting
        return TargetState(
            target=self.target,
            gone=self._gone,
            place=self._place,
            behind=max(0, self._journal.newest - self._place),
            arrears=tuple(sorted(owed.values(), key=lambda each: each.revision)),
            delivered_at=self._delivered_at,
            failed_at=self._failed_at,
            error=self._error,
        )

    # The loops.

    def _spawn(
        self, work: Callable[[], Coroutine[None, None, None]], name: str, at_end: Callable[[], None] = lambda: None
    ) -> None:
        async def keep_at_it() -> None:
            with contextlib.suppress(NotOwner):  # whoever tells now takes it up
                async with self._ownership.holding(KEY):
                    failures = 0
                    while not await self._done(work):
                        failures += 1
                        await asyncio.sleep(self._pause(failures))
                at_end()

        task = asyncio.create_task(keep_at_it(), name=f"webhook {self.target.name}: {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _done(self, work: Callable[[], Coroutine[None, None, None]]) -> bool:
        """Do a piece of work; False if something went wrong on our side, which is no reason to give up."""
        try:
            await work()
        except NotOwner:
            raise
        except Unavailable as error:
            log.warning("webhook %s: %s", self.target.name, error)
        except Exception:
            log.exception("webhook %s: failed, and goes on", self.target.name)
        else:
            return True
        return False

    async def _read(self) -> None:
        async for lines in self._journal.follow(self._at, IDLE_SECONDS):
            for line in lines:
                self._at = line.revision
                if self.target.pools is None or line.pool_name in self.target.pools:
                    self._tell(line.event.runner_id, line.revision)
            self._moved.set()
            while sum(lane.owed is None for lane in self._lanes.values()) >= LANES:
                self._eased.clear()
                await self._eased.wait()

    def _tell(self, runner_id: str, revision: int) -> None:
        """Take an event up. What follows one that is parked, is parked."""
        lane = self._lanes.get(runner_id)
        if lane:
            lane.news = True
            lane.first = revision if lane.first is None else lane.first
        elif runner_id not in self._waiting:
            self._start(_Lane(runner_id, revision))

    async def _mark(self) -> None:
        while True:
            await self._moved.wait()
            self._moved.clear()
            if (place := self._through()) > self._place:
                with contextlib.suppress(Unavailable):
                    await self._ledger.set_place(self.target.name, place)
                    self._place = place
            await asyncio.sleep(MARK_SECONDS)

    def _through(self) -> int:
        """Give the revision up to which all was told, or is noted as arrears."""
        firsts = [lane.first for lane in self._lanes.values() if lane.owed is None and lane.first is not None]
        return min(firsts, default=self._at + 1) - 1

    def _ease(self) -> None:
        self._eased.set()
        self._moved.set()

    # One runner.

    def _start(self, lane: _Lane) -> None:
        self._lanes[lane.runner_id] = lane
        self._spawn(lambda: self._drive(lane), lane.runner_id, lambda: self._leave(lane))

    def _leave(self, lane: _Lane) -> None:
        del self._lanes[lane.runner_id]
        self._ease()

    async def _drive(self, lane: _Lane) -> None:
        """Send a runner's events in order, until there are no more or it is parked.

        Whether there are more is asked, and that there are none is set down, without a wait between: the place goes by it.
        """
        while lane.first is not None:
            lane.news = False
            events = await self._store.history(lane.runner_id)
            try:
                runner = await self._store.get(lane.runner_id)  # read later, so it knows of the end if one of these does
            except NotFound:  # forgotten, while this target was not configured
                await self._ledger.settle(self.target.name, lane.runner_id)
                return
            for event in events:
                if not lane.first <= event.revision <= self._at:  # of what comes after, the reader will tell
                    continue
                told = told_as(event, runner)
                if told in self.target.events and not await self._deliver(
                    lane, cloud_event(event, runner, told, self._source)
                ):
                    return
                lane.first = event.revision + 1
            if not lane.news:
                owed, lane.owed, lane.first = lane.owed, None, None
                if owed:
                    await self._ledger.settle(self.target.name, lane.runner_id)
            self._ease()

    async def _deliver(self, lane: _Lane, event: CloudEvent) -> bool:
        """Send one event until the target has it; False if it is parked, or the target gone."""
        revision = event.data.revision
        body = event.model_dump_json().encode()
        while True:
            owed = lane.owed
            if owed and owed.retry_at > self._now():
                pause = min(owed.retry_at - self._now(), LONGEST_WISH_SECONDS)  # the clock may have been set back
                await asyncio.sleep(pause)
            answer = await self._in_turn(event.id, body)
            if self._gone:
                return False
            self._note(answer)
            if answer.error is None:
                if owed:
                    lane.owed = replace(owed, revision=revision + 1, attempts=0, retry_at=0)
                    await self._ledger.owe(self.target.name, lane.owed)
                return True
            if answer.gone:
                await self._go()
                return False
            lane.owed = await self._owe(lane.runner_id, revision, owed, answer)
            self._ease()
            if lane.owed.parked:
                self._waiting[lane.runner_id] = lane.owed
                return False

    async def _owe(self, runner_id: str, revision: int, before: Arrears | None, answer: "Answer") -> Arrears:
        attempts = 1 + (before.attempts if before and before.revision == revision else 0)
        owed = Arrears(
            runner_id=runner_id,
            revision=revision,
            attempts=attempts,
            error=answer.error or "",
            since=before.since if before else self._now(),
            retry_at=self._now() + max(answer.retry_after, self._pause(attempts)),
            parked=attempts >= self.target.attempts,
        )
        await self._ledger.owe(self.target.name, owed)
        if owed.parked:
            log.warning("webhook %s: %s is parked after %d tries: %s", self.target.name, runner_id, attempts, owed.error)
        return owed

    async def _go(self) -> None:
        """The target wants to hear no more: stop, and keep its place for when it is asked again."""
        self._gone = True
        log.warning("webhook %s: the target says that it is gone; nothing is sent until it is retried", self.target.name)
        self._waiting |= {lane.runner_id: lane.owed for lane in self._lanes.values() if lane.owed}
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()
        await self._ledger.set_place(self.target.name, self._through(), gone=True)

    def _note(self, answer: "Answer") -> None:
        self._told(self.target.name, answer.outcome)
        if answer.error is None:
            self._delivered_at, self._error = self._now(), None
            return
        if self._error is None:
            log.warning("webhook %s does not take what it is told: %s", self.target.name, answer.error)
        self._failed_at, self._error = self._now(), answer.error
        if answer.retry_after:
            self._paused_until = asyncio.get_running_loop().time() + answer.retry_after

    def _pause(self, attempts: int) -> float:
        first, longest = BACKOFF_SECONDS
        return random.uniform(0, min(longest, first * 2 ** min(attempts - 1, 30)))  # noqa: S311 - full jitter

    async def _in_turn(self, event_id: str, body: bytes) -> "Answer":
        now = asyncio.get_running_loop().time
        async with self._sends:
            while (pause := self._paused_until - now()) > 0:  # noqa: ASYNC110 - which another answer may make longer
                await asyncio.sleep(pause)
            if self._ownership.fence_of(KEY) != self._fence:
                raise NotOwner(f"the lease of {KEY} is another one now")
            return await self._courier.send(self.target, event_id, body)


def _courier(now: Callable[[], float]) -> "Courier":
    """Open the way to targets: who has none loads no HTTP client, and its certificates take a while."""
    from app.courier import Courier  # noqa: PLC0415

    return Courier(now)


def told_as(event: Event, runner: Runner) -> Told | None:
    """Say what an event is told as; None: not at all."""
    if event.to_phase is Phase.FINISHED and event.from_phase is not Phase.FINISHED:
        return Told.COMPLETED if runner.state is State.COMPLETED else Told.FAILED
    return TOLD.get(event.type)
