"""The core against a model: store, reconciler and fake launcher, driven by anything in any order, in simulated time.

Hypothesis looks for a sequence of launches, ends, stops, outages, crashes and hours that breaks a promise, and prints the
shortest one it finds. What is checked is what no history may change: a slot has one live runner, an end is final and true,
an accepted launch is not lost, a pool holds what its records say, and nothing lives that no record knows.
"""

import asyncio
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from house import House, SimulatedLoop, pool
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from typing_extensions import override

from app.errors import LauncherUnavailable, PoolFull, SlotBusy
from app.events import Event
from app.launcher import Exit, Exited, Gone, Observation
from app.launchers.fake import FakeWorld
from app.pools import Usage
from app.reason import Reason
from app.runner import LIVE, PLACED, Phase, Runner, State
from app.store import Filter

PLACES = {"local": 2, "other": 3}
SLOTS = 3
QUEUE = 2
POLICY: dict[str, Any] = {"launch_timeout_seconds": 30, "retry_attempts": 3, "retry_base_seconds": 0.5}

WORDS = [
    (),
    ("exit=0",),
    ("after=5", "exit=0"),
    ("after=20", "exit=7"),
    ("starting=no node", "after=10", "running"),
    ("starting=no such image",),
    ("term", "after=3", "exit=0"),
    ("term",),
    ("after=8", "oom"),
]
NUMBERS = st.integers(0, 99)
"""Picks one of what there is: what there is may depend on threads, and what is drawn must not."""


class Witness(FakeWorld):
    """A world that writes down how each runner really ended, which the service may not tell otherwise."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(clock)
        self.ends: dict[str, Observation] = {}

    @override
    def delete(self, runner_id: str) -> None:
        if runner_id in self.runners:  # the last copy counts: one deleted before its launch was answered is launched again
            self.ends[runner_id] = self.look(runner_id)[0]
        super().delete(runner_id)

    def end(self, runner_id: str) -> Observation:
        """What a runner is, or was when it was removed."""
        return self.ends.get(runner_id, self.look(runner_id)[0])


@dataclass
class Promised:
    """A launch that was accepted, and what the world alone knows of it."""

    slot: str
    pool_name: str
    deleted: bool = False
    given_up: bool = False


class Core(RuleBasedStateMachine):
    """A house, and what was done to it."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner(loop_factory=SimulatedLoop)
        self.promised: dict[str, Promised] = {}
        self.ended: dict[str, Runner] = {}
        self.keys: dict[str, tuple[str, str]] = {}
        self.away = False
        self.records: dict[str, Runner] = {}
        self.usage: dict[str, Usage] = {}
        self.histories: dict[str, list[Event]] = {}

    def do(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something and let its consequences follow, as far as they can without time passing."""

        async def and_settle() -> None:
            await work
            await self.house.settle()
            await self.look()

        self.runner.run(and_settle())

    @initialize()
    def open(self) -> None:
        async def start() -> None:
            loop = asyncio.get_running_loop()
            assert isinstance(loop, SimulatedLoop)
            self.house = House(Path(self.directory.name), loop)
            self.world = self.house.world = Witness(loop.time)
            self.house.pools = {name: pool(name, places=places) for name, places in PLACES.items()}
            await self.house.start()
            await self.house.settle()

        self.runner.run(start())

    # What happens.

    @rule(words=st.sampled_from(WORDS), slot=NUMBERS, pool_name=st.sampled_from(sorted(PLACES)), timed=st.booleans())
    def launch(self, words: tuple[str, ...], slot: int, pool_name: str, timed: bool) -> None:  # noqa: FBT001
        self.do(self.accept(words, f"slot-{slot % SLOTS}", pool_name, None, timed=timed))

    @rule(words=st.sampled_from(WORDS[:3]), key=NUMBERS)
    def launch_with_key(self, words: tuple[str, ...], key: int) -> None:
        self.do(self.accept(words, f"slot-{key % SLOTS}", "local", f"key-{key % 3}", timed=False))

    async def accept(self, words: tuple[str, ...], slot: str, pool_name: str, key: str | None, *, timed: bool) -> None:
        request = f"{words} {slot}"
        known = self.keys.get(key or "")
        if known and known[1] != request:
            return  # would be refused: test_store.py
        policy = {**POLICY, "run_timeout_seconds": 15} if timed else POLICY
        try:
            runner = await self.house.intend(*words, slot=slot, pool_name=pool_name, key=key, queue_limit=QUEUE, **policy)
        except (SlotBusy, PoolFull) as refusal:
            event(f"refused: {type(refusal).__name__}")
        else:
            assert known is None or known[0] == runner.runner_id
            if key:
                self.keys[key] = (runner.runner_id, request)
            self.promised.setdefault(runner.runner_id, Promised(slot, pool_name))

    @rule(seconds=st.sampled_from([0.1, 1, 5, 12, 40]))
    def wait(self, seconds: float) -> None:
        self.do(self.house.advance(seconds))

    @rule(number=NUMBERS, code=st.sampled_from([0, 0, 1]))
    def finish(self, number: int, code: int) -> None:
        if name := self.pick(number):
            self.world.finish(name, code)
            self.do(asyncio.sleep(0))

    @rule(number=NUMBERS)
    def delete_behind_our_back(self, number: int) -> None:
        if name := self.pick(number):
            self.promised[name].deleted = True
            self.world.delete(name)
            self.do(asyncio.sleep(0))

    @rule(number=NUMBERS)
    def end_unseen(self, number: int) -> None:
        """End a runner without a hint to whoever watches."""
        if name := self.pick(number):
            self.world.runners[name].steps.append((self.house.loop.now, Exit(code=0)))

    @rule(number=NUMBERS, grace=st.sampled_from([0, 2, 10]))
    def stop(self, number: int, grace: float) -> None:
        if name := self.pick_recorded(number):
            self.do(self.house.stop(name, grace))

    @rule(number=NUMBERS)
    def give_up_by_force(self, number: int) -> None:
        name = self.pick_recorded(number)
        if name and name not in self.ended and self.away:
            self.promised[name].given_up = True
            self.do(self.house.give_up(name))

    @rule(times=st.integers(1, 3), acts=st.booleans(), surely_nothing=st.booleans())
    def let_launches_fail(self, times: int, acts: bool, surely_nothing: bool) -> None:  # noqa: FBT001
        acted = acts or not surely_nothing
        self.world.fail_launches(LauncherUnavailable("no answer", acted=acted), times, acts=acts)

    @rule(acts=st.booleans())
    def let_a_launch_hang(self, acts: bool) -> None:  # noqa: FBT001
        self.world.hang_launches(acts=acts)

    @rule()
    def engine_goes_away(self) -> None:
        self.away = True
        self.world.down = "away"

    @rule()
    def engine_comes_back(self) -> None:
        self.away = False
        self.world.down = None
        self.world.wake()
        self.do(asyncio.sleep(0))

    @rule(after=st.sampled_from([0.0, 0.0, 3.0, 100.0]))
    def crash_and_restart(self, after: float) -> None:
        self.do(self.house.restart(after=after))

    @rule(words=st.sampled_from(WORDS[:4]), slot=NUMBERS, steps=st.integers(0, 25))
    def crash_in_the_middle_of_a_launch(self, words: tuple[str, ...], slot: int, steps: int) -> None:
        async def work() -> None:
            await self.accept(words, f"slot-{slot % SLOTS}", "local", None, timed=False)
            for _ in range(steps):
                await asyncio.sleep(0)
            await self.house.restart()

        self.do(work())

    # What is there.

    def pick(self, number: int) -> str | None:
        """One of those that live in the world."""
        living = sorted(self.living())
        return living[number % len(living)] if living else None

    def pick_recorded(self, number: int) -> str | None:
        """One of those that were accepted."""
        return sorted(self.promised)[number % len(self.promised)] if self.promised else None

    def living(self) -> list[str]:
        return [name for name in self.world.runners if not isinstance(self.world.look(name)[0], Exited | Gone)]

    async def look(self) -> None:
        """Read all records, and note who ended."""
        records, _ = await self.house.store.page(Filter(limit=1000))
        self.records = {runner.runner_id: runner for runner in records}
        self.usage = await self.house.store.usage()
        self.histories = {name: await self.house.store.history(name) for name in self.records}
        for name, runner in self.records.items():
            if runner.phase is Phase.FINISHED:
                self.ended.setdefault(name, runner)

    # What always holds.

    @invariant()
    def every_promise_is_kept(self) -> None:
        self.a_slot_has_at_most_one_live_runner()
        self.an_accepted_launch_is_not_lost()
        self.an_end_is_final()
        self.an_end_is_one_and_true()
        self.a_pool_holds_what_its_records_say_and_no_more()
        self.while_its_engine_answers_nothing_lives_that_no_live_record_knows()

    def a_slot_has_at_most_one_live_runner(self) -> None:
        slots = Counter(runner.slot_id for runner in self.records.values() if runner.phase in LIVE)
        assert max(slots.values(), default=0) <= 1
        # One given up by force may still live until its engine, gone for good, comes back after all.
        names = [name for name in self.living() if name in self.promised and not self.promised[name].given_up]
        assert max(Counter(self.promised[name].slot for name in names).values(), default=0) <= 1

    def an_accepted_launch_is_not_lost(self) -> None:
        assert set(self.records) == set(self.promised)

    def an_end_is_final(self) -> None:
        for name, end in self.ended.items():
            assert replace(self.records[name], cleaned=end.cleaned) == end

    def an_end_is_one_and_true(self) -> None:
        for name, runner in self.records.items():
            kinds = [happened.to_phase for happened in self.histories[name]]
            assert kinds.count(Phase.FINISHED) == (runner.phase is Phase.FINISHED)
            assert runner.revision == self.histories[name][-1].revision
            if runner.state is State.COMPLETED:
                end = self.world.end(name)
                assert isinstance(end, Exited)
                assert (end.exit.code, end.exit.signal, runner.exit_code) == (0, None, 0)
            if runner.reason is Reason.LOST:
                assert self.promised[name].deleted or self.promised[name].given_up

    def a_pool_holds_what_its_records_say_and_no_more(self) -> None:
        placed = Counter(runner.pool_name for runner in self.records.values() if runner.phase in PLACED)
        assert {name: used.runners for name, used in self.usage.items()} == dict(placed)
        for name, count in placed.items():
            assert count <= PLACES[name]

    def while_its_engine_answers_nothing_lives_that_no_live_record_knows(self) -> None:
        if not self.away:
            for name in self.living():
                runner = self.records[name]
                assert runner.phase in PLACED or not runner.cleaned

    @override
    def teardown(self) -> None:
        """At last: the engine answers, everything is asked to end, and everything does."""

        async def end() -> None:
            self.world.troubles.clear()
            await self.house.restart(after=1)
            for name in self.promised:
                await self.house.stop(name, grace=1)
            await self.house.advance(60)

        try:
            self.away = False
            self.world.down = None
            self.do(end())
            for name in self.promised:
                assert self.records[name].phase is Phase.FINISHED
                assert self.records[name].cleaned
                event(f"ended {self.records[name].reason or 'completed'}")
            assert self.world.runners == {}
            self.an_end_is_final()
            self.an_end_is_one_and_true()
        finally:
            with self.directory, self.runner:
                self.runner.run(self.house.crash())


EXPLORE = int(os.environ.get("EXPLORE", "0"))
"""How many histories to make up at random, to look for new faults; 0: the same few every time, so that a red run means a
change for the worse."""

TestCore = pytest.mark.timeout(900 + EXPLORE * 3)(Core.TestCase)  # a failure is made smaller, which takes its time
TestCore.settings = settings(
    max_examples=EXPLORE or 60,
    derandomize=not EXPLORE,
    stateful_step_count=25,
    print_blob=True,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
