"""Makes what is recorded and what engines hold agree: load, observe, decide, act; alone calls launch, stop and remove.

Every runner that needs something is a name in the work queue. A worker takes the name, loads the runner, asks ``decide``
for the next step, takes it, and goes on until there is nothing to do but wait. Names get into the queue when a runner
changes, when a launcher's watch hints at it, when a deadline comes, when the resync finds a difference, and all of them at
start; so a lost hint costs time and never the truth.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict, dataclass, field
from typing import assert_never

from pydantic import JsonValue

from app.errors import LauncherUnavailable, LaunchRejected, NotFound, SlotBusy
from app.events import Change, Feed, Watch
from app.launcher import Exited, Found, Gone, Handle, Launcher, LaunchSpec, Observation, Running, Starting
from app.logs import Spool
from app.pools import Pool, Usage
from app.runner import (
    KILL_AGAIN_SECONDS,
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
    rejected,
    stop_sent,
)
from app.store import Store
from app.work_queue import WorkQueue

log = logging.getLogger(__name__)

LAUNCHES = 64
"""How many launches are asked of one engine at once; the others wait, and hold up nothing but themselves."""

RESYNC_SECONDS = 10.0
STALE_SECONDS = 3 * RESYNC_SECONDS
SWEEP_SECONDS = 300.0
START_SECONDS = 2.0
GRACE_SECONDS = 600.0
"""How long something that ended and is on no record is left alone: whoever made it may be about to record it."""

BACKOFF_SECONDS = (0.2, 10.0)
"""The first and the longest pause before an engine that did not answer is asked again."""


@dataclass(slots=True, eq=False)
class _Engine:
    """A launcher in use, and when it last answered."""

    launcher: Launcher
    watcher: asyncio.Task[None]
    opened_at: float
    answered_at: float | None = None
    launches: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(LAUNCHES))


class Reconciler:
    """Drives every runner of one store to its end."""

    def __init__(
        self,
        store: Store,
        feed: Feed,
        spool: Spool,
        *,
        open_launcher: Callable[[str], Launcher],
        pools: Callable[[], Mapping[str, Pool]],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._feed = feed
        self._spool = spool
        self._open_launcher = open_launcher
        self._pools = pools
        self._now = now
        self._since = now()
        self._queue = WorkQueue()
        self._engines: dict[str, _Engine] = {}
        self._failures: dict[str, int] = {}
        self._swept = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._working: set[asyncio.Task[None]] = set()
        feed.listen(self._changed)

    async def start(self) -> None:
        """Take up every runner that needs something, and keep at it.

        Returns when the engines were swept once, so that no slot is given away whose runner lives and is not on record; an
        engine that does not answer holds this up for a moment only.
        """
        for runner_id in await self._store.unclean():
            self._queue.add(runner_id)
        loops = [self._forever(step) for step in (self._hand_out, self._resync, self._sweep)]
        self._tasks = [asyncio.create_task(loop, name=f"reconciler {number}") for number, loop in enumerate(loops)]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._swept.wait(), START_SECONDS)

    async def aclose(self) -> None:
        """Stop working; runners live on."""
        self._queue.close()
        tasks = [*self._tasks, *self._working, *(engine.watcher for engine in self._engines.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for engine in self._engines.values():
            await engine.launcher.aclose()

    def wake(self, runner_id: str) -> None:
        """Look at a runner now."""
        self._queue.add(runner_id)

    async def wake_queued(self, pool_name: str) -> None:
        """Look at the first that waits for a place in this pool: there may be one now."""
        for runner_id in (await self._store.queued(pool_name))[:1]:
            self._queue.add(runner_id)

    def launcher(self, engine: str) -> Launcher:
        """Give the launcher of an engine, opened at first use. Raises LaunchRejected."""
        return self._engine(engine).launcher

    def answered_at(self, engine: str) -> float | None:
        """Say when an engine last answered; None if it was not asked since the start."""
        known = self._engines.get(engine)
        return known.answered_at if known else None

    def engines(self) -> dict[str, bool]:
        """Say of every engine in use whether it has answered lately."""
        limit = self._now() - STALE_SECONDS
        return {name: (engine.answered_at or engine.opened_at) >= limit for name, engine in self._engines.items()}

    def _engine(self, name: str) -> _Engine:
        if name not in self._engines:
            launcher = self._open_launcher(name)
            watcher = asyncio.create_task(self._forever(lambda: self._watch(launcher)), name=f"watch {name}")
            self._engines[name] = _Engine(launcher, watcher, opened_at=self._now())
        return self._engines[name]

    def _changed(self, change: Change) -> None:
        self._queue.add(change.runner.runner_id)

    # The loops.

    async def _forever(self, step: Callable[[], Coroutine[None, None, None]]) -> None:
        """Take a step again and again; a defect in it is logged, and does not end the loop."""
        while True:
            try:
                await step()
            except asyncio.CancelledError:
                raise
            except Exception:
                log.exception("a loop of the reconciler failed, and goes on")
                await asyncio.sleep(1)

    async def _hand_out(self) -> None:
        """Start on the next runner that wants a look; the queue gives none to two at once."""
        task = asyncio.create_task(self._work(await self._queue.get()))
        self._working.add(task)
        task.add_done_callback(self._working.discard)

    async def _work(self, runner_id: str) -> None:
        try:
            pause = await self._reconcile(runner_id)
            self._failures.pop(runner_id, None)
            if pause is not None:
                self._queue.add_after(runner_id, pause)
        except asyncio.CancelledError:
            raise
        except (LauncherUnavailable, LaunchRejected) as error:
            pause = self._back_off(runner_id)
            log.warning("%s: %s; asking again in %.1f s", runner_id, error, pause)
            self._queue.add_after(runner_id, pause)
        except Exception:
            pause = self._back_off(runner_id)
            log.exception("%s: failed, and will be tried again in %.1f s", runner_id, pause)
            self._queue.add_after(runner_id, pause)
        finally:
            self._queue.done(runner_id)

    def _back_off(self, runner_id: str) -> float:
        failures = self._failures[runner_id] = self._failures.get(runner_id, 0) + 1
        first, longest = BACKOFF_SECONDS
        return random.uniform(first / 2, min(longest, first * 2 ** min(failures, 30)))  # noqa: S311 - spreads load

    async def _watch(self, launcher: Launcher) -> None:
        async for runner_id in launcher.watch():
            self._queue.add(runner_id)

    async def _resync(self) -> None:
        """Compare all that runs with what the engines say, one call for each engine."""
        await asyncio.sleep(RESYNC_SECONDS)
        handles: dict[str, list[Handle]] = {}
        phases: dict[str, Phase] = {}
        for runner in await self._store.accepted():
            handles.setdefault(runner.engine, []).append(runner.handle or Handle(runner_id=runner.runner_id))
            phases[runner.runner_id] = runner.phase
        for name in {*handles, *self._engines}:
            try:
                engine = self._engine(name)
                seen = await engine.launcher.observe(handles.get(name, []))
                await engine.launcher.ping()
            except (LauncherUnavailable, LaunchRejected) as error:
                log.warning("%s does not answer: %s", name, error)
                continue
            engine.answered_at = self._now()
            for runner_id, observation in seen.items():
                if isinstance(observation, Exited | Gone) or (
                    isinstance(observation, Running) and phases[runner_id] is Phase.STARTING
                ):
                    self._queue.add(runner_id)

    async def _sweep(self) -> None:
        """Find what engines hold of ours that is on no record, at start and from time to time."""
        configured = {pool.engine for pool in self._pools().values()}
        for name in configured | set(self._engines):
            try:
                await self._sweep_engine(name)
            except (LauncherUnavailable, LaunchRejected) as error:
                log.warning("%s cannot be swept: %s", name, error)
        self._swept.set()
        await asyncio.sleep(SWEEP_SECONDS)

    async def _sweep_engine(self, name: str) -> None:
        launcher = self.launcher(name)
        listed = await launcher.list()
        known = await self._store.known([found.handle.runner_id for found in listed])
        for found in listed:
            if found.handle.runner_id not in known:
                await self._settle_unknown(name, launcher, found)
            elif known[found.handle.runner_id] and not await _gone(launcher, found.handle):
                log.warning("%s: %s is done with, and is there again; removing it", name, found.handle.runner_id)
                await launcher.remove(found.handle)

    async def _settle_unknown(self, engine: str, launcher: Launcher, found: Found) -> None:
        """Adopt a live runner without a record, for a lost database must not kill an agent; remove an ended one later."""
        runner_id = found.handle.runner_id
        seen = (await launcher.observe([found.handle])).get(runner_id)
        if isinstance(seen, Starting | Running):
            try:
                await self._store.adopt(adopted(found.labels, found.handle, engine, found.created_at), self._now())
            except (KeyError, TypeError, ValueError, SlotBusy) as error:
                log.error("%s: %s lives without a record and cannot be adopted: %r", engine, runner_id, error)  # noqa: TRY400
            else:
                log.warning("%s: %s lived without a record, and was adopted", engine, runner_id)
        elif seen is not None and self._now() - found.created_at > GRACE_SECONDS:
            log.warning("%s: %s ended without a record; removing what is left of it", engine, runner_id)
            await launcher.remove(found.handle)

    # One runner.

    async def _reconcile(self, runner_id: str) -> float | None:
        """Take steps until there is nothing to do but wait; says for how many seconds, None: until something changes."""
        with self._feed.watching(runner_id) as watch:
            return await self._drive(runner_id, watch)

    async def _drive(self, runner_id: str, watch: Watch) -> float | None:
        try:
            runner: Runner | None = await self._store.get(runner_id)
        except NotFound:
            return None
        seen: Observation | None = None
        while runner:
            action = decide(runner, seen, self._now(), self._since)
            seen = None
            match action:
                case Wait(until=until):
                    return None if until is None else until - self._now()
                case Look():
                    seen = await self._look(runner)
                case Become(runner=changed, event=event, discard=discard):
                    if discard:
                        await self.launcher(runner.engine).remove(_handle(runner))
                    runner = await self._write(runner, changed, event)
                case Launch():
                    runner = await self._launch(runner, watch)
                case Order(grace=grace):
                    await self.launcher(runner.engine).stop(_handle(runner), grace)
                    if grace <= 0:
                        return KILL_AGAIN_SECONDS
                    runner = await self._write(runner, stop_sent(runner), "stop_sent")
                case Admit():
                    if not await self._admit(runner):
                        return runner.launch_deadline - self._now()
                    return None
                case CleanUp():
                    await self.wake_queued(runner.pool_name)
                    await self._clean_up(runner)
                    return None
                case _:
                    assert_never(action)
        return 0

    async def _write(self, old: Runner, new: Runner, event: str, **data: JsonValue) -> Runner | None:
        """Write a change; None if somebody else was first, and then everything is to be decided anew."""
        return await self._store.change(old, new, event, self._now(), data)

    async def _look(self, runner: Runner) -> Observation:
        """Ask the engine. Raises LauncherUnavailable also where it cannot say anything of this runner now."""
        engine = self._engine(runner.engine)
        seen = await engine.launcher.observe([_handle(runner)])
        engine.answered_at = self._now()
        if runner.runner_id not in seen:
            raise LauncherUnavailable(f"{runner.engine} cannot say now what became of it")
        return seen[runner.runner_id]

    async def _launch(self, runner: Runner, watch: Watch) -> Runner | None:
        try:
            engine = self._engine_for_launch(runner)
            spec = await self._store.spec(runner.runner_id)
            if spec is None:
                raise RuntimeError(f"the specification of {runner.runner_id} is gone")
            handle = await self._unless_stopped(runner, watch, _launch_in_turn(engine, runner.runner_id, spec))
        except LaunchRejected as error:
            return await self._write(runner, rejected(runner, error.reason, str(error), self._now()), "rejected")
        except LauncherUnavailable as error:
            return await self._launch_failed(runner, error)
        if handle is None:
            return None
        engine.answered_at = self._now()
        return await self._write(runner, accepted(runner, handle, self._now()), "started")

    def _engine_for_launch(self, runner: Runner) -> _Engine:
        """Open an engine. Failing to is the launch's end only if no service before this one can have launched it."""
        try:
            return self._engine(runner.engine)
        except LaunchRejected as error:
            if runner.created_at < self._since and not runner.untouched:
                raise LauncherUnavailable(f"{runner.engine} cannot be opened: {error}") from error
            raise

    async def _unless_stopped(self, runner: Runner, watch: Watch, launching: Coroutine[None, None, Handle]) -> Handle | None:
        """Wait for a launch; None if it was called off because a stop was asked for or its time is up.

        A launch that is begun after its time is there to find what exists, and gets the whole time for that.
        """
        call = asyncio.create_task(launching)
        news = asyncio.create_task(_changed_since(watch, runner.revision))
        try:
            left = runner.launch_deadline - self._now()
            patience = left if left > 0 else runner.policy.launch_timeout_seconds
            await asyncio.wait({call, news}, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            if call.done():
                return call.result()
        finally:
            for task in (call, news):
                task.cancel()
            await asyncio.wait({call, news})
        with contextlib.suppress(asyncio.CancelledError):
            return call.result()
        return None

    async def _launch_failed(self, runner: Runner, error: LauncherUnavailable) -> Runner | None:
        longest = min(BACKOFF_SECONDS[1], runner.policy.retry_base_seconds * 2 ** min(len(runner.attempts), 30))
        delay = error.retry_after or random.uniform(0, longest)  # noqa: S311 - full jitter
        failed = call_failed(runner, str(error), acted=error.acted, delay=delay, now=self._now())
        return await self._write(runner, failed, "attempt_failed", attempt=asdict(failed.attempts[-1]))

    async def _admit(self, runner: Runner) -> bool:
        pool = self._pools().get(runner.pool_name)

        def refusal(usage: Usage) -> str | None:
            return pool.refusal(usage) if pool else None  # a pool taken out of its file still serves what it accepted

        admitted = await self._store.admit(runner, refusal, self._now())
        if admitted:
            await self.wake_queued(runner.pool_name)
        return admitted

    async def _clean_up(self, runner: Runner) -> None:
        """Make the log safe, free what the engine holds, wipe the secrets."""
        if not runner.untouched or runner.accepted:
            with contextlib.suppress(LaunchRejected):  # no launcher, so nothing was ever launched
                launcher = self.launcher(runner.engine)
                if runner.accepted:
                    await self._spool.keep(launcher, _handle(runner))
                await launcher.remove(_handle(runner))
        await self._store.forget_spec(runner.runner_id)


async def _gone(launcher: Launcher, handle: Handle) -> bool:
    return isinstance((await launcher.observe([handle])).get(handle.runner_id), Gone)


async def _launch_in_turn(engine: _Engine, runner_id: str, spec: LaunchSpec) -> Handle:
    async with engine.launches:
        return await engine.launcher.launch(runner_id, spec)


async def _changed_since(watch: Watch, revision: int) -> None:
    """Wait until a runner is changed by somebody else."""
    while (await watch.change()).runner.revision <= revision:
        pass


def _handle(runner: Runner) -> Handle:
    """Name a runner to its launcher; before the engine has accepted, its id is all there is, and enough."""
    return runner.handle or Handle(runner_id=runner.runner_id)
