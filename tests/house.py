"""The service without its HTTP side, over the real store and the fake launcher, in simulated time.

``House`` lives in a ``FakeWorld`` that outlives it: it can crash and start again. A test moves its time; whatever is due
meanwhile happens in its turn, and nothing waits for real.
"""

import asyncio
import contextlib
import inspect
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

import pytest
from typing_extensions import override

from app.database import Fence, Write
from app.errors import Unavailable
from app.events import Change, Feed
from app.launcher import Handle, LaunchSpec
from app.launchers.fake import FakeLauncher, FakeWorld
from app.logs import Spool
from app.ownership import Ownership
from app.pools import Pool
from app.reason import Reason
from app.recent import Recent
from app.reconciler import Reconciler
from app.runner import Phase, Policy, Runner, finished, identity, stop_asked
from app.store import Intent, Store

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

SPIN = 400
"""How often the engine may be asked without time passing, before that counts as spinning."""


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop, and a clock for all else, whose time moves only when told to."""

    _ready: deque[asyncio.Handle]
    _scheduled: list[asyncio.TimerHandle]

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000_000.0
        # Less than the next float after now: a timer that fires a hair early is set again for that hair, and no time passes.
        self._clock_resolution = 0.6 * math.ulp(2.0**20)
        self.threads = 0

    @override
    def time(self) -> float:
        return self.now

    @override
    def run_in_executor(self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts) -> "asyncio.Future[T]":
        future = super().run_in_executor(executor, func, *args)
        self.threads += 1
        future.add_done_callback(self._returned)
        return future

    def _returned(self, _: object) -> None:
        self.threads -= 1

    def next_timer(self) -> float | None:
        """When the next timer is due."""
        return min((timer.when() for timer in self._scheduled if not timer.cancelled()), default=None)

    @property
    def runnable(self) -> bool:
        """Whether something can happen without time passing or a thread answering."""
        due = self.next_timer()
        return bool(self._ready) or (due is not None and due <= self.now)


class WatchedStore(Store):
    """The store, how many writes it has not answered yet, and whether it can write at all."""

    writing = 0
    full = False

    @override
    async def _write(self, write: Write[T], fence: Fence | None = None, touch: Callable[[Recent], None] | None = None) -> T:
        if self.full:
            raise Unavailable("database or disk is full")
        self.writing += 1
        try:
            return await super()._write(write, fence, touch)
        finally:
            self.writing -= 1


def pool(
    name: str = "local",
    *,
    places: int = 8,
    cpu: float | None = None,
    cpu_quota: float | None = None,
    **config: Any,  # noqa: ANN401 - YAML
) -> Pool:
    """Describe a pool of the fake."""
    resources = None if cpu is None else {"cpu_limit": cpu}
    config = {"command": ["fake"], "resources": resources, **config}
    return Pool.model_validate(
        {"name": name, "type": "local-process", "max_concurrency": places, "cpu_quota": cpu_quota, "config": config}
    )


class House:
    """A service without HTTP, in a fake world, at a time of its own."""

    store: WatchedStore
    feed: Feed
    spool: Spool
    reconciler: Reconciler

    def __init__(self, directory: Path, loop: SimulatedLoop) -> None:
        self.loop = loop
        self.world = FakeWorld(loop.time)
        self.pools = {"local": pool()}
        self.changes: list[Change] = []
        self.open_launcher: Callable[[FakeWorld], FakeLauncher] = FakeLauncher
        self.directory = directory
        self._launched = 0
        self.ahead = 0.0

    async def start(self) -> None:
        """Start the service on what an earlier one left."""
        self.feed = Feed()
        self.feed.listen(self.changes.append)
        self.spool = await asyncio.to_thread(Spool, self.directory / "logs")
        self.store = WatchedStore(f"sqlite:///{self.directory / 'runners.db'}", self.feed.publish)
        await self.store.open()
        self.reconciler = Reconciler(
            self.store,
            self.feed,
            self.spool,
            ownership=Ownership(self.store, node="node", url=""),
            open_launcher=lambda _: self.open_launcher(self.world),
            pools=lambda: self.pools,
            now=self.now,
        )
        await self.reconciler.start()

    def now(self) -> float:
        """Tell the time by the clock that can be set: so much ahead of the loop's own."""
        return self.loop.now + self.ahead

    async def crash(self) -> None:
        """Stop the service where it stands; what it was doing is not finished."""
        await self.reconciler.aclose()
        await self.store.aclose()

    async def restart(self, *, after: float = 0) -> None:
        """Crash, and start again so much later."""
        await self.crash()
        self.loop.now += after
        self.world.wake()
        await self.start()
        await self.settle()

    # Time.

    async def settle(self) -> None:
        """Let everything happen that can without time passing."""
        asked = len(self.world.calls)
        while True:
            await asyncio.sleep(0)
            if len(self.world.calls) - asked > SPIN:
                pytest.fail(f"it spins: {self.world.calls[-6:]}")
            if self.loop.runnable:
                continue
            if not self.loop.threads and not self.store.writing:
                return
            time.sleep(0.00005)  # noqa: ASYNC251 - nothing can happen on the loop but a thread's answer

    async def advance(self, seconds: float) -> None:
        """Let time pass, and everything happen when it is due."""
        end = self.loop.now + seconds
        await self.settle()
        while (due := self.loop.next_timer()) is not None and due <= end:
            self.loop.now = max(self.loop.now, due)
            await self.settle()
        self.loop.now = end
        await self.settle()

    # What users do.

    async def intend(
        self,
        *words: str,
        slot: str | None = None,
        pool_name: str = "local",
        key: str | None = None,
        queue_limit: int = 8,
        program: str = "fake",
        **policy: Any,  # noqa: ANN401 - the fields of Policy
    ) -> Runner:
        """Record a launch as the service does, and go on at once."""
        self._launched += 1
        at = self.pools[pool_name]
        now = self.loop.now
        cpu, memory = at.demand
        runner = Runner(
            runner_id=f"runner-{self._launched:012x}",
            task_id=f"task-{self._launched}",
            pool_name=pool_name,
            slot_id=slot or f"slot-{self._launched}",
            engine=at.engine,
            phase=Phase.STARTING,
            calls=1,
            created_at=now,
            placed_at=now,
            launch_deadline=now + policy.get("launch_timeout_seconds", 300),
            policy=Policy(**policy),
            cpu=cpu,
            memory_mib=memory,
        )
        spec = LaunchSpec(command=(program, *words), environment={}, context=b"{}", labels=identity(runner))
        intent = Intent(
            runner=runner,
            spec=spec,
            refusal=at.refusal,
            rate=at.rate,
            queue_limit=queue_limit,
            caller="ann",
            key=key,
            request_sha256=f"{words} {slot}",
        )
        runner, _ = await self.store.intend(intent)
        return runner

    async def launch(self, *words: str, **wishes: Any) -> str:  # noqa: ANN401 - those of intend
        """Record a launch, and let it happen as far as it can now."""
        runner = await self.intend(*words, **wishes)
        await self.settle()
        return runner.runner_id

    async def stop(self, runner_id: str, grace: float = 10) -> None:
        """Ask for a runner's end as the service does."""
        await self.change(runner_id, lambda runner: stop_asked(runner, "stopped by ann", grace, self.loop.now), "stop_asked")

    async def give_up(self, runner_id: str) -> None:
        """End a runner's record by force, as the service does."""
        await self.change(runner_id, lambda runner: finished(runner, Reason.LOST, "given up", self.loop.now), "finished")

    async def change(self, runner_id: str, how: Callable[[Runner], Runner], event: str) -> None:
        while True:
            runner = await self.store.get(runner_id)
            if (new := how(runner)) is runner or await self.store.change(runner, new, event, self.loop.now):
                break
        await self.settle()

    async def beat(self, runner_id: str) -> None:
        """Give a runner's sign of life as the service does."""
        first = (await self.get(runner_id)).last_heartbeat is None
        await self.store.beat(runner_id, self.now())
        if first:
            self.reconciler.wake(runner_id)
        await self.settle()

    # What happens to the world.

    def cut_off(self) -> None:
        """Let the engine answer nobody."""
        self.world.down = "the fake engine does not answer"

    # What is to be seen.

    async def get(self, runner_id: str) -> Runner:
        return await self.store.get(runner_id)

    async def phases(self, *runner_ids: str) -> list[Phase]:
        return [(await self.get(runner_id)).phase for runner_id in runner_ids]

    async def kinds(self, runner_id: str) -> list[str]:
        return [event.type for event in await self.store.history(runner_id)]

    async def output(self, runner_id: str) -> bytes:
        pieces = self.spool.output(FakeLauncher(self.world), Handle(runner_id=runner_id), tail=None, follow=None)
        return b"".join([piece async for piece in pieces])

    def calls(self, runner_id: str, *methods: str) -> list[str]:
        """Say which methods were called for a runner, in order."""
        return [method for method, named in self.world.calls if named == runner_id and (not methods or method in methods)]

    @contextlib.contextmanager
    def once(self, runner_id: str, event: str, act: Callable[[], Awaitable[None] | None]) -> Iterator[None]:
        """Do something at the instant at which this event of a runner is committed, before anyone reacts to it."""
        acting: list[asyncio.Future[None]] = []

        def listen(change: Change) -> None:
            if change.runner.runner_id == runner_id and change.event.type == event and not acting:
                done = act()
                acting.append(asyncio.ensure_future(done) if done else self.loop.create_future())

        self.feed.listen(listen)
        yield
        assert acting, f"no event {event}"


Test = Callable[..., Awaitable[None]]


def simulated(test: Test) -> Callable[..., None]:
    """Run a test in a house of its own, in simulated time."""

    async def inside(directory: Path, **given: object) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimulatedLoop)
        house = House(directory, loop)
        await house.start()
        await house.settle()
        try:
            await test(house, **given)
        finally:
            await house.crash()

    def run(tmp_path: Path, **given: object) -> None:
        with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
            runner.run(inside(tmp_path, **given))

    own = [name for name in inspect.signature(test).parameters if name != "house"]
    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in ("tmp_path", *own)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run
