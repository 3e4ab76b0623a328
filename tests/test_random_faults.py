"""One long history of random faults: whatever happens, the counters are what the records say, and no limit is passed.

The faults are those of an engine (launches that fail, hang, or act and fail; runners that vanish, that end unseen, of which
nothing is said; the engine away), of clients (stops, requests nobody waits for) and of the service (crashes, also in the
middle of a launch). ``SEED`` repeats a history.
"""

import asyncio
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fault_table import Verdict
from house import House, pool, simulated

from app.errors import LauncherUnavailable, PoolFull, SlotBusy
from app.events import Event
from app.launcher import Exit, Exited, Gone
from app.pools import Pool, Usage
from app.runner import LIVE, PLACED, Phase, Runner, State
from app.store import Filter

SHORT, LONG = 400, 10_000
QUEUE = 6
SLOTS = 24
WORDS = (("after=3", "exit=0"), ("exit=0",), ("after=20", "exit=1"), ("term", "after=1", "exit=0"), ("term",), ())
POOLS = {
    "narrow": pool("narrow", places=3),
    "slow": pool("slow", places=6, launch_rate=0.5),
    "wary": pool("wary", places=8, launching_limit=2, cpu=0.5, cpu_quota=3),
}
POLICY: dict[str, Any] = {"launch_timeout_seconds": 20, "run_timeout_seconds": 60, "retry_attempts": 3}


class History:
    """A house, the faults that befall it, and the looks at its counters."""

    def __init__(self, house: House, seed: int) -> None:
        self.house = house
        self.world = house.world
        self.rng = random.Random(seed)  # noqa: S311 - a history, to be repeated by its seed
        self.faults: Counter[str] = Counter()
        self.began: dict[str, dict[str, float]] = {name: {} for name in POOLS}
        self.refused = 0

    async def befall(self) -> None:
        """Let one random fault happen, amid launches and time that passes."""
        for _ in range(self.rng.randrange(3)):
            await self.launch()
        kinds: dict[Callable[[], Awaitable[None]], int] = {
            self.launches_fail: 6,
            self.a_launch_hangs: 3,
            self.a_runner_vanishes: 4,
            self.a_runner_ends_unseen: 6,
            self.nothing_is_said_of_a_runner: 3,
            self.the_engine_goes_away: 2,
            self.a_client_stops_a_runner: 8,
            self.a_client_goes_away: 3,
            self.the_service_crashes: 1,
            self.the_service_crashes_amid_a_launch: 1,
        }
        (fault,) = self.rng.choices(list(kinds), list(kinds.values()))
        await fault()
        self.faults[fault.__name__] += 1
        await self.house.settle()
        await self.look()
        if self.rng.random() < 0.7:
            await self.house.advance(self.rng.choice([0.1, 0.5, 2, 8]))
            await self.look()

    async def launch(self) -> None:
        name = self.rng.choice(list(POOLS))
        slot = f"slot-{self.rng.randrange(SLOTS)}"
        try:
            await self.house.intend(*self.rng.choice(WORDS), slot=slot, pool_name=name, queue_limit=QUEUE, **POLICY)
        except (PoolFull, SlotBusy):
            self.refused += 1

    # Faults.

    async def launches_fail(self) -> None:
        acts = self.rng.random() < 0.5
        error = LauncherUnavailable("no answer", acted=acts or self.rng.random() < 0.5)
        self.world.fail_launches(error, self.rng.randrange(1, 4), acts=acts)
        await self.launch()

    async def a_launch_hangs(self) -> None:
        self.world.hang_launches(acts=self.rng.random() < 0.5)
        await self.launch()

    async def a_runner_vanishes(self) -> None:
        if name := self.living():
            self.world.delete(name)

    async def a_runner_ends_unseen(self) -> None:
        if name := self.living():
            self.world.runners[name].steps.append((self.house.loop.now, Exit(code=self.rng.choice([0, 1]))))

    async def nothing_is_said_of_a_runner(self) -> None:
        if name := self.living():
            self.world.silent = {name}

    async def the_engine_goes_away(self) -> None:
        with self.world.unavailable():
            await self.launch()
            await self.house.advance(self.rng.choice([0.2, 1, 12, 40]))
            await self.look()

    async def a_client_stops_a_runner(self) -> None:
        if records := await self.records():
            await self.house.stop(self.rng.choice(records).runner_id, self.rng.choice([0, 2]))

    async def a_client_goes_away(self) -> None:
        going = asyncio.create_task(self.launch())
        for _ in range(self.rng.randrange(4)):
            await asyncio.sleep(0)
        going.cancel()
        await asyncio.gather(going, return_exceptions=True)
        await self.house.store.beat("nobody", 0)  # what was asked for before is written by then

    async def the_service_crashes(self) -> None:
        await self.house.restart(after=self.rng.choice([0, 3, 30]))

    async def the_service_crashes_amid_a_launch(self) -> None:
        await self.launch()
        for _ in range(self.rng.randrange(25)):
            await asyncio.sleep(0)
        await self.house.restart()

    def living(self) -> str | None:
        """Choose one of those that live in the world."""
        live = [name for name in self.world.runners if not isinstance(self.world.look(name)[0], Exited | Gone)]
        return self.rng.choice(live) if live else None

    # Looks.

    async def records(self) -> list[Runner]:
        """Read the records of all that live."""
        pages = [await self.house.store.page(Filter(phase=phase, limit=1000)) for phase in LIVE]
        return [runner for page, _ in pages for runner in page]

    async def look(self) -> None:
        """Compare every counter with what the records say, and with the limits."""
        records = await self.records()
        usage, queued = await self.house.store.usage(), await self.house.store.queue_lengths()
        for name, limits in POOLS.items():
            mine = [runner for runner in records if runner.pool_name == name]
            waiting = sum(runner.phase is Phase.QUEUED for runner in mine)
            assert usage.get(name, Usage()) == truth(mine)
            assert queued.get(name, 0) == waiting <= QUEUE
            self.within(limits, truth(mine))
            self.not_too_fast(limits, mine)
        slots = Counter(runner.slot_id for runner in records)
        assert max(slots.values(), default=0) <= 1
        assert max(self.world.copies.values(), default=0) <= 2  # a second only once the first was deleted, unseen

    def within(self, limits: Pool, used: Usage) -> None:
        assert used.runners <= limits.max_concurrency
        assert limits.config.launching_limit is None or used.launching <= limits.config.launching_limit
        assert limits.cpu_quota is None or used.cpu <= limits.cpu_quota

    def not_too_fast(self, limits: Pool, live: list[Runner]) -> None:
        """Check the pool's rate on all launches whose beginning was ever seen."""
        began = self.began[limits.name]
        began |= {runner.runner_id: runner.placed_at for runner in live if runner.placed_at is not None}
        if limits.rate:
            at = sorted(began.values())[-50:]
            for first, beyond in zip(at, at[limits.rate.launches :], strict=False):
                assert beyond - first >= limits.rate.seconds - 1e-6

    async def end(self, verdict: Verdict) -> int:
        """Let all of it end, see that each has one end and holds nothing any more, and count them."""
        self.world.troubles.clear()
        self.world.silent.clear()
        await self.house.restart(after=1)
        for runner in await self.records():
            await self.house.stop(runner.runner_id, 0)
        await self.house.advance(60)
        await self.look()
        assert await self.records() == []
        ends = Counter(runner_id for runner_id, event in self.told() if event.to_phase is Phase.FINISHED != event.from_phase)
        verdict.rounds = self.faults.total()
        verdict.lost = len({runner_id for runner_id, _ in self.told()} - set(ends))
        verdict.orphans = len(self.world.runners)
        assert (verdict.lost, verdict.orphans) == (0, 0)
        assert set(ends.values()) == {1}
        assert [name for name in ends if not (await self.house.get(name)).cleaned] == []
        return len(ends)

    def told(self) -> list[tuple[str, Event]]:
        """Give all events that were ever told, with their runners."""
        return [(change.runner.runner_id, change.event) for change in self.house.changes]


def truth(records: list[Runner]) -> Usage:
    """Count what the records of a pool say."""
    placed = [runner for runner in records if runner.phase in PLACED]
    return Usage(
        runners=len(placed),
        cpu=sum(runner.cpu or 0 for runner in placed),
        memory_mib=sum(runner.memory_mib or 0 for runner in placed),
        launching=sum(runner.state is State.PENDING for runner in placed),
    )


@pytest.mark.fault("random faults of everything, on the fake engine")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a file that a crash left open
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("faults", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)])
@simulated
async def test_every_counter_is_what_the_records_say_after_every_fault(house: House, faults: int, verdict: Verdict) -> None:
    seed = int(os.environ.get("SEED") or (1 if faults == SHORT else random.SystemRandom().randrange(10**6)))
    random.seed(seed)  # for the service's own jitter
    house.pools = dict(POOLS)
    history = History(house, seed)
    try:
        for _ in range(faults):
            await history.befall()
        accepted = await history.end(verdict)
        assert history.faults.total() == faults
        assert accepted > faults / 3
        assert history.refused > faults / 30
    except Exception as error:
        error.add_note(f"SEED={seed} repeats it")
        raise
