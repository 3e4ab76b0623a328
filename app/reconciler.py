"""Makes what is recorded and what engines hold agree: load, observe, decide, act; alone calls launch, stop and remove.

Every runner that needs something is a name in the work queue. A worker takes the name, loads the runner, asks ``decide``
for the next step, takes it, and goes on until there is nothing to do but wait. Names get into the queue when a runner
changes, when a launcher's watch hints at it, when a deadline comes, when the resync finds a difference, and all of them at
start; so a lost hint costs time and never the truth.
"""

import asyncio
import contextlib
import functools
import logging
import random
import time
from collections import defaultdict, deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Literal, assert_never

from pydantic import JsonValue

from app import log_lines
from app.breaker import CLOSED, PATIENCE_SECONDS, Breaker, silent
from app.errors import LauncherUnavailable, LaunchRejected, NotFound, NotOwner, SlotBusy, Unavailable
from app.events import Change, Feed, Watch
from app.launcher import Exited, Found, Gone, Handle, Launcher, LaunchSpec, Observation, Running, Starting
from app.logs import Spool
from app.ownership import Ownership
from app.pools import Pool, Usage
from app.runner import (
    KILL_AGAIN_SECONDS,
    SKEW_SECONDS,
    Admit,
    Become,
    CleanUp,
    Launch,
    Look,
    Order,
    Phase,
    Runner,
    Wait,
    accepted,
    adopted,
    call_failed,
    decide,
    progressed,
    rejected,
    stop_sent,
)
from app.store import Store
from app.work_queue import WorkQueue

log = logging.getLogger(__name__)

LAUNCHES = 64
"""How many launches of one pool are asked of its engine at once: those that wait for a slow image hold up no other pool."""

RESYNC_SECONDS = 10.0
STALE_SECONDS = 3 * RESYNC_SECONDS
SWEEP_SECONDS = 300.0
START_SECONDS = 2.0
GRACE_SECONDS = 600.0
"""How long something that ended and is on no record is left alone: whoever made it may be about to record it."""

LATE_SECONDS = 5.0
"""How long an order may be on its way that a replica gave when it was the owner no longer: one that was frozen, say."""

QUEUE, SWEEP = "queue ", "sweep "
"""What precedes the name of a pool whose queue wants a look, and the key of engines that are to be swept."""

BACKOFF_SECONDS = (0.2, 10.0)
"""The first and the longest pause before an engine that did not answer is asked again."""

UNKNOWN_SECONDS = 30.0
"""As long as an engine may wish us to wait that may have started a runner: until then it cannot be stopped."""

WISH_SPREAD = 1.5
"""By how much a launch may wait longer than its engine wishes, at random."""

AWAKE_SECONDS = 2.0
"""How often we see that time passes for us as for the rest of the world."""

LOUD = 4
"""At which failure in a row a runner of which its engine says nothing is worth a warning; an engine away has its own."""


@dataclass(slots=True, eq=False)
class _Engine:
    """A launcher in use, when it last answered, and whether somebody got no answer since.

    ``blind_since``: from when on it gives signs of life, and says nothing of what runs there.
    """

    launcher: Launcher
    opened_at: float
    answered_at: float | None = None
    hinted_at: float | None = None
    blind_since: float | None = None
    breaker: Breaker = CLOSED
    doubted: asyncio.Event = field(default_factory=asyncio.Event)
    sweeping: asyncio.Lock = field(default_factory=asyncio.Lock)
    loops: tuple[asyncio.Task[None], ...] = ()
    launches: dict[str, asyncio.Semaphore] = field(default_factory=lambda: defaultdict(lambda: asyncio.Semaphore(LAUNCHES)))


@dataclass(frozen=True, slots=True)
class Stray:
    """Something of ours that an engine holds and no live record explains, and what becomes of it."""

    found: Found
    fate: Literal["adopt", "remove", "wait"]
    why: str


class Reconciler:
    """Drives every runner of one store to its end."""

    def __init__(
        self,
        store: Store,
        feed: Feed,
        spool: Spool,
        *,
        ownership: Ownership,
        open_launcher: Callable[[str], Launcher],
        pools: Callable[[], Mapping[str, Pool]],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._feed = feed
        self._spool = spool
        self._ownership = ownership
        self._open_launcher = open_launcher
        self._pools = pools
        self._now = now
        self._since = now()
        self._ahead: float | None = None
        self._queue = WorkQueue()
        self._engines: dict[str, _Engine] = {}
        self._failures: dict[str, int] = {}
        self._opening = asyncio.Lock()
        self._swept = asyncio.Event()
        self._begun: set[str] = set()
        self._ordered: set[str] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._working: set[asyncio.Task[None]] = set()
        feed.listen(self._changed)
        store.heed(self._heard)
        ownership.on_gain(lambda key: self._begin(self._take_over(key)))
        ownership.on_loss(lambda key: self._begin(self._hand_over(key)))

    async def start(self) -> None:
        """Take up every runner that needs something, and keep at it.

        Returns when the engines were swept once, so that no slot is given away whose runner lives and is not on record; an
        engine that does not answer holds this up for a moment only.
        """
        self._mind_the_clock()
        self._begun.update(await self._store.unclean())
        await self._take_up()
        loops = [self._forever(step) for step in (self._hand_out, self._sweep, self._stay_awake)]
        self._tasks = [asyncio.create_task(loop, name=f"reconciler {number}") for number, loop in enumerate(loops)]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_SECONDS):
                await self._swept.wait()

    async def aclose(self) -> None:
        """Stop working; runners live on."""
        self._queue.close()
        tasks = [*self._tasks, *self._working, *(loop for engine in self._engines.values() for loop in engine.loops)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for engine in self._engines.values():
            await engine.launcher.aclose()

    def wake(self, runner_id: str) -> None:
        """Look at a runner now."""
        self._queue.add(runner_id)

    def excuse_silence(self) -> None:
        """Count all heartbeats from now on: those of before may not have been heard."""
        self._since = self._now()

    def look_at_queue(self, pool_name: str) -> None:
        """Look at the first that waits for a place in this pool: there may be one now."""
        self._queue.add(QUEUE + pool_name)

    async def wake_queue(self, pool_name: str) -> None:
        """Do that, on every replica."""
        self.look_at_queue(pool_name)
        await self._store.hint(QUEUE + pool_name)

    async def launcher(self, engine: str) -> Launcher:
        """Give the launcher of an engine, opened at first use. Raises LaunchRejected."""
        return (await self._engine(engine)).launcher

    def answered_at(self, engine: str) -> float | None:
        """Say when an engine last answered; None if it was not asked since the start."""
        known = self._engines.get(engine)
        return known.answered_at if known else None

    def hinted_at(self, engine: str) -> float | None:
        """Say when an engine's watch last told of something; None if not since the start."""
        known = self._engines.get(engine)
        return known.hinted_at if known else None

    def breaker(self, engine: str) -> Breaker:
        """Say whether an engine is taken to be away, and new launches for it are to be refused."""
        known = self._engines.get(engine)
        return known.breaker if known else CLOSED

    def engines(self) -> dict[str, bool]:
        """Say of every engine in use whether it has answered lately."""
        limit = self._now() - STALE_SECONDS
        return {
            name: min(engine.answered_at or engine.opened_at, engine.blind_since or limit) >= limit
            for name, engine in self._engines.items()
        }

    def answering(self) -> dict[str, bool]:
        """Say of every engine in use whether it is there: it has answered lately, and launches for it are taken."""
        return {name: lately and not self.breaker(name).open for name, lately in self.engines().items()}

    async def _engine(self, name: str) -> _Engine:
        async with self._opening:
            if name not in self._engines:
                launcher = await asyncio.to_thread(self._open_launcher, name)  # loads the engine's library
                engine = self._engines[name] = _Engine(launcher, opened_at=self._now())
                engine.loops = (
                    asyncio.create_task(self._forever(lambda: self._watch(name, engine)), name=f"watch {name}"),
                    asyncio.create_task(self._forever(lambda: self._resync(name, engine)), name=f"resync {name}"),
                    asyncio.create_task(self._forever(lambda: self._probe(name, engine)), name=f"probe {name}"),
                )
            return self._engines[name]

    def _changed(self, change: Change) -> None:
        if not self._queue.is_handling(change.runner.runner_id):  # else whoever is at it watches, and may have made it
            self._queue.add(change.runner.runner_id)
        if self._makes_room(change):
            self._queue.add(QUEUE + change.runner.pool_name)

    def _makes_room(self, change: Change) -> bool:
        """Whether the first that waits for a place in the pool may have one now, or is another one now."""
        event, pool = change.event, self._pools().get(change.runner.pool_name)
        if event.type == "started":
            return bool(pool and pool.config.launching_limit)
        return event.from_phase is Phase.QUEUED or (
            event.to_phase is Phase.FINISHED and event.from_phase is not event.to_phase
        )

    def _heard(self, text: str) -> None:
        if text.startswith(("runner-", QUEUE)):
            self._queue.add(text)
        elif text.startswith(SWEEP):
            self._begin(self._sweep_under(text.removeprefix(SWEEP)))

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._working.add(task)
        task.add_done_callback(self._working.discard)

    async def _take_up(self) -> None:
        """Have every runner looked at that needs something; those that run all at once, for there may be very many."""
        running: dict[str, list[Runner]] = defaultdict(list)
        wanting = dict.fromkeys(await self._store.unclean())
        for runner in await self._store.accepted():
            if runner.phase is Phase.RUNNING:
                running[runner.engine].append(runner)
                wanting.pop(runner.runner_id, None)
        for runner_id in wanting:
            self._queue.add(runner_id)
        for engine, runners in running.items():
            self._begin(self._look_at_all(engine, runners))

    async def _look_at_all(self, engine: str, runners: Sequence[Runner]) -> None:
        """Ask an engine of runners in one call, and look at those that need more than to wait."""
        seen: Mapping[str, Observation] = {}
        try:
            seen = await (await self.launcher(engine)).observe([_handle(runner) for runner in runners])
        except (LauncherUnavailable, LaunchRejected):
            pass  # each sees for itself
        except Exception:
            log.exception("%s: the first look at what runs there failed", engine)
        for runner in runners:
            self._weigh(runner, seen.get(runner.runner_id))

    def _weigh(self, runner: Runner, seen: Observation | None) -> None:
        """Have a runner looked at, at once or at its next deadline: it may have changed meanwhile."""
        with contextlib.suppress(NotOwner):  # whoever becomes the owner takes it up
            match decide(runner, seen, self._now(), self._since_of(runner)):
                case Wait(until=until):
                    if until is not None:
                        self._queue.add_by(runner.runner_id, until - self._now())
                case _:
                    self._queue.add(runner.runner_id)

    async def _take_over(self, key: str) -> None:
        """Take up what another replica has left, engines without a record included."""
        await self._insist(key, self._take_up)
        await self._sweep_under(key)

    async def _insist(self, key: str, step: Callable[[], Coroutine[None, None, None]]) -> None:
        """Take a step until the store allows it; one whose lease is lost meanwhile is the next owner's."""
        while self._ownership.holds(key):
            try:
                await step()
            except Unavailable as error:
                log.warning("%s cannot be taken over yet: %s", key, error)
                await asyncio.sleep(1)
            else:
                return

    async def _hand_over(self, key: str) -> None:
        """Have the next owner find what comes of an order that we gave too late."""
        await asyncio.sleep(LATE_SECONDS)
        await self._store.hint(SWEEP + key)

    async def _sweep_under(self, key: str) -> None:
        for name in {pool.engine for pool in self._pools().values()} | set(self._engines):
            if self._ownership.key_of(name) == key:
                await self._insist(key, functools.partial(self._sweep_engine, name))

    # The loops.

    async def _forever(self, step: Callable[[], Coroutine[None, None, None]]) -> None:
        """Take a step again and again; a defect in it is logged, and does not end the loop."""
        while True:
            try:
                await step()
            except asyncio.CancelledError:
                raise
            except NotOwner:
                await asyncio.sleep(1)
            except Exception:
                log.exception("a loop of the reconciler failed, and goes on")
                await asyncio.sleep(1)

    async def _hand_out(self) -> None:
        """Start on the next runner that wants a look; the queue gives none to two at once."""
        self._begin(self._work(await self._queue.get()))

    async def _work(self, name: str) -> None:
        pause: float | None = None
        try:
            if name.startswith(QUEUE):
                await self._look_at_first(name.removeprefix(QUEUE))
            else:
                log_lines.runner_id.set(name)
                pause = await self._reconcile(name)
            self._failures.pop(name, None)
            if pause is not None:
                self._queue.add_after(name, pause)
        except NotOwner:
            pass  # whoever becomes the owner takes it up
        except (LauncherUnavailable, LaunchRejected) as error:
            pause = self._back_off(name)
            level = logging.WARNING if self._failures[name] == LOUD else logging.DEBUG
            log.log(level, "%s: %s; asking again in %.1f s", name, error, pause)
            self._queue.add_after(name, pause)
        except Exception:
            pause = self._back_off(name)
            log.exception("%s: failed, and will be tried again in %.1f s", name, pause)
            self._queue.add_after(name, pause)
        finally:
            self._queue.done(name)

    async def _look_at_first(self, pool_name: str) -> None:
        """Look at the first that waits for a place in a pool."""
        if runner_id := await self._store.next_in_line(pool_name, self._ownership.node):
            self._queue.add(runner_id)

    def _back_off(self, name: str) -> float:
        failures = self._failures[name] = self._failures.get(name, 0) + 1
        first, longest = BACKOFF_SECONDS
        return random.uniform(first / 2, min(longest, first * 2 ** min(failures, 30)))  # noqa: S311 - spreads load

    async def _watch(self, name: str, engine: _Engine) -> None:
        async with self._ownership.holding(self._ownership.key_of(name)):
            async for runner_id in engine.launcher.watch():
                engine.hinted_at = self._now()
                self._queue.add(runner_id)

    async def _resync(self, name: str, engine: _Engine) -> None:
        """Compare all that runs on an engine with what it says, in one call."""
        await asyncio.sleep(RESYNC_SECONDS)
        mine = self._ownership.holds(self._ownership.key_of(name))
        running = {runner.runner_id: runner for runner in (await self._store.accepted(name) if mine else [])}
        seen: Mapping[str, Observation] = {}
        with contextlib.suppress(LauncherUnavailable):
            seen = await engine.launcher.observe([_handle(runner) for runner in running.values()]) if running else {}
        if running and not seen:
            engine.doubted.set()
            engine.blind_since = engine.blind_since or self._now()
        else:
            engine.blind_since = None
        for runner_id, observation in seen.items():
            self._weigh(running[runner_id], observation)

    async def _probe(self, name: str, engine: _Engine) -> None:
        """Ask an engine for a sign of life, from time to time, and at once when it is doubted."""
        held = engine.breaker
        if held.missed:
            await asyncio.sleep(held.pause)
        else:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RESYNC_SECONDS):
                    await engine.doubted.wait()
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await engine.launcher.ping()
        except (LauncherUnavailable, TimeoutError) as error:
            problem = str(error) or f"no sign of life for {PATIENCE_SECONDS:g} s"
            engine.breaker = silent(held, problem, self._now())
            if engine.breaker.open and not held.open:
                log.warning("%s is away, and launches for it are refused until it answers: %s", name, problem)
            return
        engine.breaker, engine.answered_at = CLOSED, self._now()
        engine.doubted.clear()
        if held.open:
            log.warning("%s answers again", name)

    async def _stay_awake(self) -> None:
        """Notice that we stood still: whoever beat meanwhile was not heard."""
        now = asyncio.get_running_loop().time
        due = now() + AWAKE_SECONDS
        await asyncio.sleep(AWAKE_SECONDS)
        if (late := now() - due) > SKEW_SECONDS:
            log.warning("stood still for %.0f s; heartbeats count from now", late)
            self.excuse_silence()

    def _mind_the_clock(self) -> None:
        """Notice that the clock was set, by another that never is: what it said of the last heartbeats means nothing now."""
        ahead = self._now() - asyncio.get_running_loop().time()
        if self._ahead is not None and abs(ahead - self._ahead) > SKEW_SECONDS:
            log.warning("the clock was set by %.0f s; heartbeats count from now", ahead - self._ahead)
            self.excuse_silence()
        self._ahead = ahead

    async def _sweep(self) -> None:
        """Find what engines hold of ours that is on no record, at start and from time to time."""
        configured = {pool.engine for pool in self._pools().values()}
        await asyncio.gather(*[self._sweep_engine(name) for name in configured | set(self._engines)])
        self._swept.set()
        await asyncio.sleep(SWEEP_SECONDS)

    async def _sweep_engine(self, name: str) -> None:
        try:
            await self.sweep(name)
        except (LaunchRejected, LauncherUnavailable) as error:
            log.warning("%s cannot be swept: %s", name, error)
            self._doubt(name)
        except NotOwner:
            pass  # its owner does it

    async def sweep(self, name: str) -> list[Stray]:
        """Adopt a live runner without a record, for a lost database must not kill an agent; remove what ended, later.

        Gives what was found. Raises LauncherUnavailable, LaunchRejected.
        """
        engine = await self._engine(name)
        async with self._ownership.holding(self._ownership.key_of(name)), engine.sweeping:
            return await self._settle(name, engine.launcher)

    async def _settle(self, name: str, launcher: Launcher) -> list[Stray]:
        strays = await self.strays(name)
        for stray in sorted(strays, key=lambda stray: stray.fate):  # who lives first: its slot must not be given away
            if stray.fate == "adopt":
                await self._adopt(name, stray.found)
            elif stray.fate == "remove":
                handle = stray.found.handle
                log.warning("%s: %s is %s; removing what is left of it", name, handle.runner_id, stray.why)
                try:
                    await launcher.remove(handle)
                except LauncherUnavailable as error:
                    log.warning("%s: %s cannot be removed now: %s", name, handle.runner_id, error)
        return strays

    async def _adopt(self, name: str, found: Found) -> None:
        runner_id = found.handle.runner_id
        try:
            runner = adopted(found.labels, found.handle, name, found.created_at)
            runner = replace(runner, home=self._ownership.home(name))
            await self._store.adopt(runner, self._now(), self._ownership.fence(runner))
        except (KeyError, TypeError, ValueError, SlotBusy) as error:
            log.error("%s: %s lives without a record and cannot be adopted: %r", name, runner_id, error)  # noqa: TRY400
        else:
            log.warning("%s: %s lived without a record, and was adopted", name, runner_id)

    async def strays(self, name: str) -> list[Stray]:
        """Say what an engine holds of ours that no live record explains, and what the sweep does with it. Changes nothing.

        Raises LauncherUnavailable, LaunchRejected.
        """
        launcher = await self.launcher(name)
        listed = await launcher.list()
        cleaned = await self._store.known([found.handle.runner_id for found in listed])
        unexplained = [found for found in listed if cleaned.get(found.handle.runner_id) is not False]
        seen = await launcher.observe([found.handle for found in unexplained]) if unexplained else {}
        strays = []
        for found in unexplained:
            runner_id = found.handle.runner_id
            match seen.get(runner_id):
                case Gone() | None:
                    pass
                case _ if runner_id in cleaned:
                    strays.append(Stray(found, "remove", "done with, and there again"))
                case Exited() if self._now() - found.created_at > GRACE_SECONDS:
                    strays.append(Stray(found, "remove", "ended, and on no record"))
                case Exited():
                    strays.append(Stray(found, "wait", "ended, and on no record yet"))
                case Starting() | Running():
                    strays.append(Stray(found, "adopt", "alive, and on no record"))
        return strays

    # One runner.

    async def _reconcile(self, runner_id: str) -> float | None:
        """Take steps until there is nothing to do but wait; says for how many seconds, None: until something changes."""
        with self._feed.watching(runner_id) as watch:
            try:
                return await self._drive(runner_id, watch)
            finally:
                if watch.is_behind:
                    self._queue.add(runner_id)

    async def _drive(self, runner_id: str, watch: Watch) -> float | None:
        try:
            runner = await self._store.get(runner_id)
        except NotFound:
            return None
        if runner.traceparent:
            log_lines.trace_id.set(runner.traceparent.split("-")[1])
        if self._ownership.elsewhere(runner) and runner.phase in (Phase.QUEUED, Phase.FINISHED) and not runner.calls:
            return await self._without_engine(runner)
        async with self._ownership.owning(runner):
            try:
                return await self._steps(runner, watch)
            except LauncherUnavailable:
                self._doubt(runner.engine)
                raise

    async def _without_engine(self, runner: Runner) -> float | None:
        """End one that waited too long on another node, which may be dead, and wipe its secrets if that does not."""
        late = self._now() - LATE_SECONDS
        match decide(runner, None, late, late):
            case Become(runner=changed, event=event):
                await self._store.change(runner, changed, event, self._now())
            case CleanUp() if (left := (runner.finished_at or 0) - late) > 0:
                return left
            case CleanUp():
                await self._store.forget_spec(runner.runner_id)
            case Admit():
                return runner.launch_deadline - late
            case _:
                pass
        return None

    def _doubt(self, engine: str) -> None:
        """Have an engine asked for a sign of life, because somebody got no answer from it."""
        if known := self._engines.get(engine):
            known.doubted.set()

    async def _steps(self, runner: Runner | None, watch: Watch) -> float | None:
        seen: Observation | None = None
        while runner:
            watch.known = runner.revision
            action = decide(runner, seen, self._now(), self._since_of(runner))
            match action:
                case Wait(until=until):
                    return None if until is None else until - self._now()
                case Look():
                    seen = self._unordered(runner, await self._look(runner))
                case Become(runner=changed, event=event, discard=discard):
                    if discard:
                        await (await self.launcher(runner.engine)).remove(_handle(runner))
                    runner = await self._write(runner, changed, event)
                case Launch():
                    runner, seen = await self._launch(runner, watch), None
                case Order(grace=grace):
                    await self._order(runner, grace)
                    if grace <= 0:
                        return KILL_AGAIN_SECONDS
                    runner, seen = await self._write(runner, stop_sent(runner, self._now()), "stop_sent"), None
                case Admit():
                    return await self._admit(runner)
                case CleanUp():
                    await self._clean_up(runner)
                    return None
                case _:
                    assert_never(action)
        return 0

    def _since_of(self, runner: Runner) -> float:
        """Say since when we look after a runner. Raises NotOwner."""
        self._mind_the_clock()
        return max(self._since, self._ownership.since(runner))

    async def _write(self, old: Runner, new: Runner, event: str, **data: JsonValue) -> Runner | None:
        """Write a change; None if somebody else was first, and then everything is to be decided anew."""
        return await self._store.change(old, new, event, self._now(), data, fence=self._ownership.fence(old))

    async def _order(self, runner: Runner, grace: float) -> None:
        """Give an order to end a runner, and note that it may have gone out."""
        launcher, before = await self.launcher(runner.engine), runner.runner_id in self._ordered
        self._ordered.add(runner.runner_id)
        try:
            await launcher.stop(_handle(runner), grace)
        except LauncherUnavailable as error:
            if not (error.acted or before):
                self._ordered.discard(runner.runner_id)
            raise

    def _unordered(self, runner: Runner, seen: Observation) -> Observation:
        """Say of an end of which the engine tells the time alone that it came of itself, where no stop has gone out yet.

        That of an order that a service before this one, or another replica, may have given only the times tell.
        """
        stop = runner.stop
        if not isinstance(seen, Exited) or seen.exit.stopped is not None or stop is None or stop.sent:
            return seen
        others_may = stop.at <= self._since_of(runner) + SKEW_SECONDS
        if others_may or runner.runner_id in self._ordered:
            return seen
        return replace(seen, exit=replace(seen.exit, stopped=False))

    async def _look(self, runner: Runner) -> Observation:
        """Ask the engine. Raises LauncherUnavailable also where it cannot say anything of this runner now."""
        engine = await self._engine(runner.engine)
        seen = await engine.launcher.observe([_handle(runner)])
        engine.answered_at = self._now()
        if runner.runner_id not in seen:
            raise LauncherUnavailable(f"{runner.engine} cannot say now what became of it")
        return seen[runner.runner_id]

    async def _launch(self, runner: Runner, watch: Watch) -> Runner | None:
        latest: Runner | None = runner
        begun_before = self._may_be_known(runner)
        try:
            engine = await self._engine_for_launch(runner)
            spec = await self._store.spec(runner.runner_id)
            if spec is None:
                raise RuntimeError(f"the specification of {runner.runner_id} is gone")
            told: deque[str] = deque()

            def progress(text: str) -> None:
                told.append(text)
                watch.stir()

            turn = engine.launches[runner.pool_name]
            call = asyncio.create_task(_launch_in_turn(turn, engine.launcher, runner.runner_id, spec, progress))
            call.add_done_callback(lambda _: watch.stir())
            self._begun.add(runner.runner_id)
            latest = await self._until_answered(runner, watch, call, told)
            if latest is None or call.cancelled():
                return None
            handle = call.result()
        except LaunchRejected as error:
            runner = latest or runner
            return await self._write(runner, rejected(runner, error.reason, str(error), self._now()), "rejected")
        except LauncherUnavailable as error:
            return await self._launch_failed(latest or runner, error, begun_before=begun_before)
        engine.answered_at = self._now()
        return await self._write(latest, accepted(latest, handle, self._now()), "started")

    async def _engine_for_launch(self, runner: Runner) -> _Engine:
        """Open an engine. Failing to is the launch's end only if nothing can have been launched in it."""
        try:
            return await self._engine(runner.engine)
        except LaunchRejected as error:
            if self._may_be_known(runner) and not runner.untouched:
                raise LauncherUnavailable(f"{runner.engine} cannot be opened: {error}") from error
            raise

    async def _until_answered(
        self, runner: Runner, watch: Watch, call: asyncio.Task[Handle], told: deque[str]
    ) -> Runner | None:
        """Wait for a launch, writing down what it tells of itself; gives the runner as it then is.

        The call is cancelled when a stop was asked for or its time is up. A launch that is begun after its time is there
        to find what exists, and gets the whole time for that.
        """
        left = runner.launch_deadline - self._now()
        deadline = self._now() + (left if left > 0 else runner.policy.launch_timeout_seconds)
        latest: Runner | None = runner
        try:
            while latest and not call.done() and (left := deadline - self._now()) > 0:
                watch.known = latest.revision
                if watch.is_behind:  # somebody else has changed it
                    break
                if told:
                    latest = await self._write(latest, progressed(latest, told.popleft()), "progress")
                    continue
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await watch.stirred()
        finally:
            if not call.done():
                call.cancel()
                await asyncio.wait({call})
        return latest

    async def _launch_failed(self, runner: Runner, error: LauncherUnavailable, *, begun_before: bool) -> Runner | None:
        self._doubt(runner.engine)
        longest = min(BACKOFF_SECONDS[1], runner.policy.retry_base_seconds * 2 ** min(len(runner.attempts), 30))
        # Full jitter; those who were told to wait by one answer do not come back at one instant.
        wish = error.retry_after
        delay = wish * random.uniform(1, WISH_SPREAD) if wish else random.uniform(0, longest)  # noqa: S311
        # That nothing was done now says nothing of a call that was begun before, by us or a service before this one, and of
        # which the outcome is not on record.
        acted = error.acted or begun_before
        delay = min(delay, UNKNOWN_SECONDS) if acted else delay
        failed = call_failed(runner, str(error), acted=acted, delay=delay, now=self._now(), reason=error.reason)
        written = await self._write(runner, failed, "attempt_failed", attempt=asdict(failed.attempts[-1]))
        if written:
            self._begun.discard(runner.runner_id)
        return written

    def _may_be_known(self, runner: Runner) -> bool:
        """Whether its engine may know it by a call whose outcome is not on record."""
        return runner.runner_id in self._begun or runner.created_at < self._ownership.since(runner) + SKEW_SECONDS

    async def _admit(self, runner: Runner) -> float | None:
        """Give a runner its place if there is one now; else says when to look again, if nothing changes before."""
        pool = self._pools().get(runner.pool_name)

        def refusal(usage: Usage) -> str | None:
            if pool:
                return pool.refusal(usage)
            # A pool taken out of its file still serves what it accepted: one after another, for its limits went with it.
            return "it is in no pool file" if usage.runners else None

        left = runner.launch_deadline - self._now()
        if (breaker := self.breaker(runner.engine)).open:
            return min(left, breaker.pause)
        fence, rate = self._ownership.fence(runner), pool.rate if pool else None
        wait = await self._store.admit(runner, refusal, self._now(), fence, rate)
        return min(left, wait) if wait else None

    async def _clean_up(self, runner: Runner) -> None:
        """Make the log safe, free what the engine holds, wipe the secrets."""
        if runner.accepted:
            launcher = await self.launcher(runner.engine)
            cut = await self._spool.keep(launcher, _handle(runner))
            cut_too = replace(runner, log_truncated=True)
            if cut and not runner.log_truncated and not await self._write(runner, cut_too, "log_truncated"):
                return  # it was changed meanwhile, and so comes again
            await launcher.remove(_handle(runner))
        elif not runner.untouched:
            with contextlib.suppress(LaunchRejected):  # no launcher, so nothing was ever launched
                await (await self.launcher(runner.engine)).remove(_handle(runner))
        await self._store.forget_spec(runner.runner_id, self._ownership.fence(runner), self._ownership.node)
        self._begun.discard(runner.runner_id)
        self._ordered.discard(runner.runner_id)


async def _launch_in_turn(
    turn: asyncio.Semaphore, launcher: Launcher, runner_id: str, spec: LaunchSpec, progress: Callable[[str], None]
) -> Handle:
    async with turn:
        return await launcher.launch(runner_id, spec, progress=progress)


def _handle(runner: Runner) -> Handle:
    """Name a runner to its launcher; before the engine has accepted, its id is all there is, and enough."""
    return runner.handle or Handle(runner_id=runner.runner_id)
