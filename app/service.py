"""What the routes call: writes what is wanted, and waits for what comes of it. Knows nothing of HTTP.

A launch belongs to the service from the moment its intent is written; the caller that goes away changes nothing.
"""

import asyncio
import functools
import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from pydantic import JsonValue

from app.caller import Caller, Scope
from app.context import Place, inherited, launch_spec
from app.diagnosis import Diagnosis, diagnose
from app.engines import Engines, EngineState
from app.errors import (
    Fault,
    InvalidRequest,
    LauncherUnavailable,
    LaunchRejected,
    Misdirected,
    NotAuthenticated,
    NotFound,
    NotOwner,
    NotPermitted,
    RunnerEnded,
    RunnerLaunchError,
    SlotBusy,
    Unavailable,
)
from app.events import Event, Feed, Watch
from app.journal import Journal, Line
from app.launcher import Handle, LaunchSpec, Renders
from app.logs import Spool
from app.models import LaunchRequest, Slot
from app.ownership import Ownership
from app.pools import Pool, Pools, Usage, load_pools, resolve, unknown_pool
from app.reason import Reason
from app.reconciler import Reconciler, Stray
from app.redaction import redacted, without_secrets
from app.runner import Phase, Runner, finished, identity, stop_asked
from app.settings import Settings
from app.slots import LOOK_SECONDS, look_at, named_place, real_place
from app.store import Filter, Intent, Store

if TYPE_CHECKING:
    from app.spans import Tracing

NO_RUNNER = "runner-000000000000"
"""The id of a runner that is only thought of."""

T = TypeVar("T")

NEWS_SECONDS = 60.0
LAST_LINES = 20
LAST_BYTES = 65_536
LAST_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Launched:
    """A launch that was accepted for recording, as far as it has come; ``replayed``: by an earlier request."""

    runner: Runner
    replayed: bool


@dataclass(frozen=True, slots=True)
class Preview:
    """A launch that was only thought of; ``rendered`` is what would be sent to the engine, None if it cannot be shown."""

    pool: Pool
    refusal: str | None
    rendered: dict[str, JsonValue] | None
    context: dict[str, Any]


@dataclass(frozen=True, slots=True)
class PoolState:
    """A pool as it is configured, switched and used."""

    pool: Pool
    enabled: bool
    usage: Usage
    queued: int


class RunnerService:
    """Launch, read, stop and hear of runners."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        feed: Feed,
        spool: Spool,
        reconciler: Reconciler,
        *,
        ownership: Ownership,
        journal: Journal,
        pools: Pools,
        url: str,
        tracing: "Tracing | None" = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._tracing = tracing
        self._settings = settings
        self._store = store
        self._feed = feed
        self._spool = spool
        self._reconciler = reconciler
        self._ownership = ownership
        self._now = now
        self.journal = journal
        self.pools = pools
        self.url = url
        self.draining = asyncio.Event()
        self._waits: set[asyncio.Timeout] = set()
        self._engines = Engines(reconciler, lambda: self.pools.by_name, now)

    # Launch.

    async def launch(
        self, request: LaunchRequest, caller: Caller, *, key: str | None, traceparent: str, wait: float
    ) -> Launched:
        """Record a launch and wait up to so many seconds for the engine's word on it.

        Raises RequestRefused when nothing was recorded, RunnerLaunchError when the launch failed.
        """
        digest = _sha256(request.model_dump_json()) if key else ""
        if key and (known := await self._store.replayed(caller.name, key, digest)):
            return Launched(await self._launched(known, wait), replayed=True)
        if self.draining.is_set():
            raise Unavailable("the service is going down and takes no more launches", code="draining")
        pool = await self._pool_of(request, caller)
        place = await self._place(request.slot, pool)
        above = Place.read(traceparent) if self._tracing else None
        runner, spec = self._prepare(request, pool, place, str(above.below()) if above else traceparent)
        runner = replace(runner, traceparent=spec.environment["TRACEPARENT"], parent_span=above.span_id if above else "")
        self._check_engine(pool.engine)
        begun = self._now()
        intent = Intent(
            runner=runner,
            spec=spec,
            refusal=pool.refusal,
            queue_limit=pool.config.queue_limit,
            caller=caller.name,
            key=key,
            request_sha256=digest,
            rate=pool.rate,
        )
        runner, replayed = await self._store.intend(intent)
        if self._tracing and not replayed:
            self._tracing.intent(runner, begun)
        return Launched(await self._launched(runner, wait), replayed)

    def _check_engine(self, engine: str) -> None:
        """Raise Unavailable while an engine is away, so that nobody waits for it."""
        breaker = self._reconciler.breaker(engine)
        if breaker.open:
            text = f"{engine} is away, and is asked until it answers: {breaker.problem}"
            raise Unavailable(text, code="engine-unavailable", retry_after=breaker.pause)

    async def preview(self, request: LaunchRequest, caller: Caller, traceparent: str) -> Preview:
        """Show what a launch would be, without making anything. Raises RequestRefused as a launch would."""
        pool = await self._pool_of(request, caller)
        place = await self._place(request.slot, pool)
        runner, spec = self._prepare(request, pool, place, traceparent)
        runner = replace(runner, runner_id=NO_RUNNER)
        environment = {**spec.environment, "RUNNER_ID": NO_RUNNER}
        shown = redacted(replace(spec, environment=environment, labels=identity(runner)), pool.config.environment)
        try:
            launcher = await self._reconciler.launcher(pool.engine)
            rendered = None
            if isinstance(launcher, Renders):
                rendered = await _looked(spec.working_dir or "/", functools.partial(launcher.render, NO_RUNNER, shown))
        except LaunchRejected as error:
            raise InvalidRequest(f"{pool.engine}: {error}", code="launch-rejected") from error
        return Preview(
            pool=pool,
            refusal=await self._refusal(runner, pool, caller),
            rendered=None if rendered is None else without_secrets(rendered),
            context=json.loads(spec.context),
        )

    async def _refusal(self, runner: Runner, pool: Pool, caller: Caller) -> str | None:
        """Say why a runner could not start now."""
        try:
            await self._store.check_slot(runner)
        except SlotBusy as error:
            return str(error) if caller.sees(error.holder.pool_name) else "the slot is held by a runner of another pool"
        try:
            self._check_engine(pool.engine)
        except Unavailable as error:
            return str(error)
        return pool.refusal((await self._store.usage()).get(pool.name, Usage()))

    async def _pool_of(self, request: LaunchRequest, caller: Caller) -> Pool:
        """Find the pool that a request means. Raises InvalidRequest, NotPermitted."""
        named = request.pool if isinstance(request.pool, str) else request.pool["name"]
        if caller.pools is not None and not (caller.sees(named) and named in self.pools.by_name):
            text = f"the token of {caller.name} is not for pool {named}"
            raise NotPermitted(text, Fault("/pool", text), code="pool-not-permitted")
        pool = resolve(self.pools, request.pool, allow_inline=self._settings.allow_inline_pools)
        if not (await self._store.pool_switches()).get(pool.name, pool.enabled):
            text = f"pool {pool.name} is switched off"
            raise InvalidRequest(text, Fault("/pool", text), code="pool-disabled")
        if pool.node not in (None, self._settings.node):
            await self._send_to(pool.node, f"pool {pool.name} belongs to node {pool.node}")
        return pool

    async def _send_to(self, node: str, why: str) -> NoReturn:
        """Raise Misdirected, with where the replica of a node is reached, unless it is away."""
        if not self._ownership.lives(node):
            raise Misdirected(f"{why}, which is away", None)
        raise Misdirected(why, await self._store.url_of(node))

    async def _place(self, slot: Slot, pool: Pool) -> str | None:
        """Find where a slot really is, for pools whose runners work there; on another machine nobody can follow links."""
        if not pool.works_in_slot:
            return None
        path, roots = slot.slot_path, self._settings.slot_roots
        if not pool.enters_slot:
            return named_place(path, roots)
        return await _looked(path, lambda: real_place(path, roots, self._settings.state_dir))

    def _prepare(self, request: LaunchRequest, pool: Pool, place: str | None, traceparent: str) -> tuple[Runner, LaunchSpec]:
        """Make a runner of a request, as it starts if there is room, and how to launch it."""
        runner_id = f"runner-{secrets.token_hex(6)}"
        token = secrets.token_urlsafe(32)
        spec = launch_spec(
            pool,
            request,
            runner_id=runner_id,
            token=token,
            url=self.url,
            traceparent=traceparent,
            inherited=inherited(os.environ),
            default_command=self._settings.runner_command,
            working_dir=place,
        )
        now = round(self._now(), 6)  # as it is told, so that asking for what was created since then finds it
        runner = Runner(
            runner_id=runner_id,
            task_id=request.task.id,
            pool_name=pool.name,
            slot_id=request.slot.slot_id,
            slot_place=place and f"{self._settings.node if pool.enters_slot else pool.engine}:{place}",
            engine=pool.engine,
            home=self._ownership.home(pool.engine),
            phase=Phase.STARTING,
            calls=1,
            created_at=now,
            placed_at=now,
            launch_deadline=now + pool.policy.launch_timeout_seconds,
            policy=pool.policy,
            labels=dict(pool.config.labels),
            cpu=spec.cpu,
            memory_mib=spec.memory_mib,
            token_sha256=_sha256(token),
        )
        return runner, replace(spec, labels=identity(runner))

    async def _launched(self, runner: Runner, wait: float) -> Runner:
        """Wait until the engine has said yes or no, or the time is up; whatever is known then."""
        deadline = asyncio.get_running_loop().time() + wait
        with self._feed.watching(runner.runner_id) as watch:
            runner = await self._store.get(runner.runner_id)
            while not runner.accepted and runner.phase is not Phase.FINISHED:
                news = await self._news(watch, deadline - asyncio.get_running_loop().time())
                if news is None:
                    break
                runner = news
        if runner.phase is Phase.FINISHED and not runner.accepted:
            raise RunnerLaunchError(runner)
        return runner

    async def _news(self, watch: Watch, seconds: float) -> Runner | None:
        """Wait for a change; None when the time is up or the service goes down."""
        limit = asyncio.timeout(0 if self.draining.is_set() else max(0.0, seconds))
        try:
            async with limit:
                self._waits.add(limit)
                return (await watch.change()).runner
        except TimeoutError:
            return None
        finally:
            self._waits.discard(limit)

    def drain(self) -> None:
        """Take no more launches, and let everybody go who waits for news."""
        self.draining.set()
        for limit in self._waits:
            if not limit.expired():
                limit.reschedule(0)

    # Read.

    async def get(self, given: str, caller: Caller) -> Runner:
        """Give the runner that is meant, by its id or an unambiguous beginning of it. Raises NotFound, AmbiguousId."""
        return await self._store.named(given, caller.pools)

    async def next(self, runner: Runner, wait: float) -> Runner:
        """Give a runner as it is after its next change, or as it is after so many seconds."""
        now = asyncio.get_running_loop().time
        until = now() + wait
        with self._feed.watching(runner.runner_id) as watch:
            latest = await self._store.get(runner.runner_id)
            while latest.revision == runner.revision and (news := await self._news(watch, until - now())):
                latest = max(latest, news, key=lambda each: each.revision)  # a replica may hear late of what it has read
        return latest

    async def page(self, wanted: Filter, caller: Caller) -> tuple[list[Runner], int | None]:
        """Give runners, newest first, and where the next page begins."""
        return await self._store.page(replace(wanted, pools=caller.pools))

    async def history(self, runner: Runner) -> list[Event]:
        """Give a runner's events."""
        return await self._store.history(runner.runner_id)

    async def follow(self, runner: Runner, place: int, idle: float) -> AsyncIterator[list[Line]]:
        """Give a runner's events behind a revision, those there are and those that come; ends with it, or with the service.

        An empty list says that nothing happened for so many seconds.
        """
        with self._feed.watching(runner.runner_id) as watch:
            while True:
                events = await self._store.history(runner.runner_id)
                if new := [event for event in events if event.revision > place]:
                    place = new[-1].revision
                    yield [Line(event, runner.task_id, runner.pool_name) for event in new]
                if not events or events[-1].to_phase is Phase.FINISHED:
                    return
                if await self._news(watch, idle) is None:
                    if self.draining.is_set():
                        return
                    yield []

    async def ended(self, runner: Runner) -> Runner:
        """Give a runner as it is at its end, or when the service goes down."""
        with self._feed.watching(runner.runner_id) as watch:
            runner = await self._store.get(runner.runner_id)
            while runner.phase is not Phase.FINISHED and not self.draining.is_set():
                runner = await self._news(watch, NEWS_SECONDS) or runner
        return runner

    def engine_states(self, caller: Caller) -> list[EngineState]:
        """Give the engines that pools name or runners use, as far as they are the caller's business, as last heard of."""
        states = self._engines.states()
        if caller.pools is None:
            return states
        states = [replace(state, pools=tuple(filter(caller.sees, state.pools))) for state in states]
        return [state for state in states if state.pools]

    async def sweep(self, *, dry_run: bool) -> dict[str, list[Stray] | str]:
        """Say of every engine what it holds of ours and no live record explains, or why it cannot be asked.

        Unless it is a dry run, the live are adopted and the ended removed, as it happens every few minutes anyway.
        """
        look = self._reconciler.strays if dry_run else self._reconciler.sweep
        found: dict[str, list[Stray] | str] = {}
        for name in sorted({pool.engine for pool in self.pools.by_name.values()} | self._reconciler.engines().keys()):
            try:
                found[name] = await look(name)
            except (LauncherUnavailable, LaunchRejected, NotOwner) as error:
                found[name] = str(error)
        return found

    async def keep_asking_engines(self) -> None:
        """Ask engines what they are and can do, again and again, until cancelled."""
        await self._engines.keep_asking()

    async def diagnosis(self, runner: Runner) -> Diagnosis:
        """Explain a runner, with the last lines of its log if they can be had."""
        events = await self._store.history(runner.runner_id)
        here = not self._ownership.elsewhere(runner)
        away = self.heard(runner)[1] or (here and self._reconciler.breaker(runner.engine).open)
        return diagnose(runner, events, await self._last_lines(runner), away=away)

    async def _last_lines(self, runner: Runner) -> list[str]:
        last = b""
        try:
            async with asyncio.timeout(LAST_SECONDS):
                async for data in await self.logs(runner, tail=LAST_LINES, follow=False):
                    last = (last + data)[-LAST_BYTES:]
        except (Misdirected, Unavailable) as error:
            return [f"(the log cannot be read now: {error})"]
        except TimeoutError:
            return [f"(the log cannot be read now: no answer for {LAST_SECONDS:g} s)"]
        return last.decode(errors="replace").splitlines()[-LAST_LINES:]

    def heard(self, runner: Runner) -> tuple[float | None, bool]:
        """Say when a runner's engine last answered, and whether that is too long ago to rely on.

        Of an engine that only another node reaches, nothing is heard here but whether that node is alive.
        """
        if self._ownership.elsewhere(runner):
            return None, not self._ownership.served(runner)
        answers = self._reconciler.engines().get(runner.engine, True)
        return self._reconciler.answered_at(runner.engine), not answers

    def engines(self) -> dict[str, bool]:
        """Say of every engine in use whether it answers."""
        return self._reconciler.answering()

    async def logs(
        self, runner: Runner, *, tail: int | None, follow: bool, since: float | None = None
    ) -> AsyncIterator[bytes]:
        """Give a runner's output, while it runs and after its end; ``follow`` goes on until its end.

        ``since`` (seconds since the epoch) leaves out what was surely written before.
        Raises Unavailable when its engine does not answer; a log that has begun ends with a line that says so.
        """
        node = runner.home
        if runner.cleaned and self._ownership.shared:
            node = await self._store.log_kept_by(runner.runner_id)
        if node and node != self._settings.node and self._ownership.shared:
            await self._send_to(node, f"the log of {runner.runner_id} is at node {node}")
        output = self._output(runner, tail, since, follow=follow)
        if follow:
            return output
        first = await anext(output, None)  # so that an engine that is away refuses the request, and does not break an answer
        return _behind(first, output)

    async def _output(self, runner: Runner, tail: int | None, since: float | None, *, follow: bool) -> AsyncGenerator[bytes]:
        with self._feed.watching(runner.runner_id) as watch:
            runner = await self._store.get(runner.runner_id)
            while follow and not runner.accepted and runner.phase is not Phase.FINISHED and not self.draining.is_set():
                runner = await self._news(watch, NEWS_SECONDS) or runner
            if not runner.accepted:
                return
            handle = runner.handle or Handle(runner_id=runner.runner_id)

            def more() -> bool:
                ended = watch.latest and watch.latest.runner.phase is Phase.FINISHED
                return not ended and not self.draining.is_set()

            live = follow and runner.phase is not Phase.FINISHED
            begun = follow
            try:
                launcher = await self._reconciler.launcher(runner.engine)
                output = self._spool.output(launcher, handle, tail=tail, since=since, follow=more if live else None)
                async for data in _until(self.draining, output) if live else output:
                    begun = True
                    yield data
            except (LauncherUnavailable, LaunchRejected) as error:
                if not begun:
                    raise Unavailable(f"the log is not at hand: {error}", code="engine-unavailable") from error
                yield f"[the log breaks off here: {error}]\n".encode()

    # Stop, and signs of life.

    async def stop(self, given: str, caller: Caller, *, grace: float | None, force: bool = False) -> Runner:
        """Ask for a runner's end; idempotent. ``force`` ends the record of one whose engine is gone for good, for admins."""
        if force:
            caller.require(Scope.ADMIN)
        while True:
            runner = await self._store.get((await self.get(given, caller)).runner_id)
            queued = runner.phase is Phase.QUEUED  # no engine knows it, and any replica may end it
            if self._ownership.elsewhere(runner) and runner.home and not force and not queued:
                await self._send_to(runner.home, f"{runner.runner_id} runs on node {runner.home}")
            now = self._now()
            if force and runner.phase is not Phase.FINISHED:
                text = f"given up by {caller.name}: its engine is gone for good"
                changed = finished(runner, Reason.LOST, text, now)
            else:
                patience = runner.policy.stop_grace_seconds if grace is None else grace
                changed = stop_asked(runner, f"stopped by {caller.name}", patience, now)
            if changed is runner:
                return runner
            event = "finished" if changed.phase is Phase.FINISHED else "stop_asked"
            if written := await self._store.change(runner, changed, event, now):
                return written

    async def beat(self, runner_id: str, token: str) -> None:
        """Note a runner's sign of life. Raises NotAuthenticated unless the token is that runner's own, RunnerEnded."""
        try:
            runner = await self._store.get(runner_id)
        except NotFound:
            raise NotAuthenticated("not the token of this runner") from None
        if not hmac.compare_digest(_sha256(token), runner.token_sha256):
            raise NotAuthenticated("not the token of this runner")
        if runner.phase is Phase.FINISHED:
            raise RunnerEnded(f"{runner_id} has ended: {runner.reason or 'completed'}")
        try:
            await self._store.beat(runner_id, self._now())
        except Unavailable:
            self._reconciler.excuse_silence()  # it is we who cannot hear
            raise
        if runner.last_heartbeat is None:
            self._reconciler.wake(runner_id)
            await self._store.hint(runner_id)  # its deadline counts from here

    # Pools.

    async def pool_states(self, caller: Caller) -> list[PoolState]:
        """Give all configured pools, as far as they are the caller's business, with their use."""
        usage, switches = await self._store.usage(), await self._store.pool_switches()
        queued = await self._store.queue_lengths()
        return [
            PoolState(
                pool,
                enabled=switches.get(name, pool.enabled),
                usage=usage.get(name, Usage()),
                queued=queued.get(name, 0),
            )
            for name, pool in self.pools.by_name.items()
            if caller.sees(name)
        ]

    async def pool_state(self, name: str, caller: Caller) -> PoolState:
        """Give one pool. Raises NotFound."""
        states = {state.pool.name: state for state in await self.pool_states(caller)}
        if name not in states:
            raise NotFound(unknown_pool(name, states))
        return states[name]

    async def switch_pool(self, name: str, caller: Caller, *, enabled: bool) -> PoolState:
        """Switch a pool on or off; it stays so, whatever its file says. Raises NotFound."""
        await self.pool_state(name, caller)
        await self._store.switch_pool(name, enabled=enabled)
        await self._reconciler.wake_queue(name)
        return await self.pool_state(name, caller)

    async def reload_pools(self, path: Path | None) -> None:
        """Read the pool file again; a wrong one raises ConfigurationError and changes nothing."""
        before, self.pools = self.pools, await asyncio.to_thread(load_pools, path)
        for name in {**before.by_name, **self.pools.by_name}:
            self._reconciler.look_at_queue(name)  # only here: what others admit is by files of their own

    async def store_answers(self) -> bool:
        """Say whether the store can be read."""
        try:
            await self._store.queue_lengths()
        except Unavailable:
            return False
        return True


async def _looked(path: str, see: Callable[[], T]) -> T:
    """Do what looks at a slot. Raises Unavailable where its disk does not answer."""
    try:
        return await look_at(path, see)
    except TimeoutError as error:
        raise Unavailable(str(error), code="slot-silent", retry_after=LOOK_SECONDS) from error


async def _until(down: asyncio.Event, output: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Give what comes until the service goes down: a quiet engine would keep a reader, and the shutdown, waiting."""
    going = asyncio.create_task(down.wait())
    try:
        while not down.is_set():
            piece = asyncio.ensure_future(anext(output, None))
            try:
                await asyncio.wait({piece, going}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not piece.done():
                    piece.cancel()
                    await asyncio.wait({piece})
            if piece.cancelled() or (data := piece.result()) is None:
                return
            yield data
    finally:
        going.cancel()


async def _behind(first: bytes | None, rest: AsyncGenerator[bytes]) -> AsyncIterator[bytes]:
    """Give a piece, and what comes behind it."""
    async with aclosing(rest):
        if first is not None:
            yield first
            async for piece in rest:
                yield piece


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
