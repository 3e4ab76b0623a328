"""The reconciler over the real store and the fake launcher, in simulated time: what is recorded is what happened."""

import asyncio
import logging
import random
import time
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from house import House, pool, simulated
from typing_extensions import override

from app.errors import LauncherError, LauncherUnavailable, LaunchRejected, PoolFull, SlotBusy
from app.launcher import Exit, Handle, LaunchSpec, Place, Running
from app.launchers.fake import FakeLauncher, FakeWorld
from app.reason import Reason
from app.reconciler import GRACE_SECONDS, RESYNC_SECONDS, STALE_SECONDS, SWEEP_SECONDS
from app.runner import Phase, State, Stop, stop_asked

MANY = 150
"""More launches than any service works on at once."""

KINDS = ("accepted", "started", "running", "finished")


# A launch.


@simulated
async def test_a_runner_is_launched_runs_and_completes(house: House) -> None:
    name = await house.launch("print=hello", "after=60", "exit=0")
    runner = await house.get(name)
    assert (runner.phase, runner.state, runner.started_at) == (Phase.RUNNING, State.RUNNING, house.loop.now)
    assert runner.handle == house.world.runners[name].handle
    await house.advance(60)
    runner = await house.get(name)
    assert (runner.phase, runner.state, runner.exit_code, runner.reason) == (Phase.FINISHED, State.COMPLETED, 0, None)
    assert runner.finished_at == house.loop.now
    assert house.world.copies[name] == 1


@simulated
async def test_every_step_is_in_the_history_and_was_published_in_order(house: House) -> None:
    name = await house.launch("exit=0")
    history = await house.store.history(name)
    assert [event.type for event in history] == ["accepted", "started", "finished"]
    assert [change.event for change in house.changes] == history
    assert [(event.from_phase, event.to_phase) for event in history] == [
        (None, Phase.STARTING),
        (Phase.STARTING, Phase.STARTING),
        (Phase.STARTING, Phase.FINISHED),
    ]


@simulated
async def test_after_its_end_the_log_is_kept_the_engine_holds_nothing_and_the_secrets_are_wiped(house: House) -> None:
    name = await house.launch("print=one", "print=two", "exit=3")
    assert (await house.get(name)).cleaned
    assert name not in house.world.runners
    assert await house.store.spec(name) is None
    assert await house.output(name) == b"one\ntwo\n"


@simulated
async def test_an_engine_that_refuses_is_asked_again_and_each_attempt_is_kept(house: House) -> None:
    house.world.fail_launches(LauncherUnavailable("connection refused", acted=False), times=2)
    name = await house.launch(retry_base_seconds=4)
    assert (await house.get(name)).state is State.PENDING
    await house.advance(24)
    runner = await house.get(name)
    assert runner.phase is Phase.RUNNING
    told = [(attempt.number, attempt.error, attempt.retryable, attempt.acted) for attempt in runner.attempts]
    assert told == [(1, "connection refused", True, False), (2, "connection refused", True, False)]
    for attempt, longest in zip(runner.attempts, (8, 10), strict=True):
        assert attempt.delay_seconds is not None
        assert 0 <= attempt.delay_seconds <= longest
    assert house.world.copies[name] == 1
    kinds = ["accepted", "attempt_failed", "launching", "attempt_failed", "launching", "started", "running"]
    assert await house.kinds(name) == kinds


@simulated
async def test_an_engines_own_wish_for_a_pause_is_heeded_and_not_by_all_at_once(house: House) -> None:
    for _ in range(4):
        house.world.fail_launches(LauncherUnavailable("429", acted=False, retry_after=70))
    names = [await house.launch() for _ in range(4)]
    await house.advance(1)
    delays = [(await house.get(name)).attempts[0].delay_seconds or 0 for name in names]
    assert all(70 <= delay <= 105 for delay in delays)
    assert len(set(delays)) == 4
    await house.advance(68)
    assert {(await house.get(name)).state for name in names} == {State.PENDING}
    await house.advance(36)
    assert {(await house.get(name)).phase for name in names} == {Phase.RUNNING}


@simulated
async def test_a_wish_for_a_long_pause_keeps_no_runner_alive_that_is_to_be_stopped(house: House) -> None:
    house.world.fail_launches(LauncherUnavailable("503", retry_after=3600), acts=True)
    name = await house.launch()
    await house.stop(name, grace=0)
    await house.advance(31)
    assert (await house.get(name)).reason is Reason.CANCELLED


@simulated
async def test_a_launch_that_no_attempt_could_start_tells_the_launcher_each_attempt_and_its_cause(house: House) -> None:
    for number in range(3):
        house.world.fail_launches(LauncherUnavailable(f"refused {number}", acted=False))
    name = await house.launch()
    await house.advance(10)
    runner = await house.get(name)
    assert (runner.state, runner.reason, runner.retryable) == (State.FAILED, Reason.ENGINE_UNAVAILABLE, True)
    causes = "attempt 1: refused 0; attempt 2: refused 1; attempt 3: refused 2"
    assert runner.message == f"{runner.engine}: {causes}"
    assert runner.started_at is None
    assert house.calls(name) == ["launch"] * 3
    assert runner.cleaned


@simulated
async def test_a_create_without_an_answer_is_read_by_name_and_found_and_never_made_twice(house: House) -> None:
    house.world.fail_launches(LauncherUnavailable("no answer for 10 s"), acts=True)
    name = await house.launch()
    await house.advance(1)
    runner = await house.get(name)
    assert (runner.phase, len(runner.attempts), runner.calls) == (Phase.RUNNING, 1, 1)
    assert house.world.copies[name] == 1
    methods = [method for method, _ in house.world.calls]
    assert methods.index("observe") < len(methods) - methods[::-1].index("launch") - 1


@simulated
async def test_a_create_without_an_answer_that_made_nothing_is_made_again_after_reading(house: House) -> None:
    house.world.fail_launches(LauncherUnavailable("no answer for 10 s"))
    name = await house.launch()
    await house.advance(1)
    assert (await house.get(name)).phase is Phase.RUNNING
    assert house.world.copies[name] == 1
    assert (await house.get(name)).calls == 2


@simulated
async def test_what_never_can_be_launched_fails_at_once(house: House) -> None:
    name = await house.launch(program="no-such-command")
    runner = await house.get(name)
    assert (runner.reason, runner.retryable) == (Reason.LAUNCH_REJECTED, False)
    assert runner.message == f"{runner.engine}: no such command: no-such-command"
    assert [attempt.error for attempt in runner.attempts] == ["no such command: no-such-command"]
    assert house.calls(name, "launch") == ["launch"]
    house.world.fail_launches(LaunchRejected("no such image", Reason.IMAGE_NOT_FOUND))
    assert (await house.get(await house.launch())).reason is Reason.IMAGE_NOT_FOUND


@simulated
async def test_an_engine_that_cannot_be_opened_fails_its_launches_at_once_and_no_others(house: House) -> None:
    def no_library(_: FakeWorld) -> FakeLauncher:
        raise LaunchRejected("docker pools need the library aiodocker", Reason.CONFIG_ERROR)

    house.open_launcher = no_library
    await house.restart()
    runner = await house.get(await house.launch())
    assert (runner.reason, runner.cleaned) == (Reason.CONFIG_ERROR, True)


@simulated
async def test_a_launch_of_unknown_outcome_stays_starting_past_its_attempts_and_deadline_until_it_is_read(
    house: House,
) -> None:
    house.world.fail_launches(LauncherUnavailable("no answer for 10 s"))
    runner = await house.intend(retry_attempts=1)
    with house.once(runner.runner_id, "attempt_failed", house.cut_off):
        await house.advance(1000)
    assert (await house.get(runner.runner_id)).phase is Phase.STARTING
    house.world.down = None
    await house.advance(20)
    runner = await house.get(runner.runner_id)
    assert (runner.phase, runner.reason) == (Phase.FINISHED, Reason.LAUNCH_TIMEOUT)
    assert runner.message == f"{runner.engine}: not started within 300 s; attempt 1: no answer for 10 s"
    assert house.world.copies[runner.runner_id] == 0


@simulated
async def test_a_launch_of_unknown_outcome_that_did_start_is_found_also_after_its_deadline(house: House) -> None:
    house.world.fail_launches(LauncherUnavailable("no answer for 10 s"), acts=True)
    runner = await house.intend("after=2000", "exit=0", retry_attempts=1)
    with house.once(runner.runner_id, "attempt_failed", house.cut_off):
        await house.advance(1000)
    house.world.down = None
    await house.advance(20)
    assert (await house.get(runner.runner_id)).state is State.RUNNING
    await house.advance(1000)
    assert (await house.get(runner.runner_id)).state is State.COMPLETED
    assert house.world.copies[runner.runner_id] == 1


@simulated
async def test_a_launch_that_hangs_is_given_up_at_its_deadline_and_never_starts_later(house: House) -> None:
    gate = house.world.hang_launches()
    name = await house.launch(launch_timeout_seconds=30)
    await house.advance(29)
    assert (await house.get(name)).phase is Phase.STARTING
    await house.advance(1)
    assert (await house.get(name)).reason is Reason.LAUNCH_TIMEOUT
    gate.set()
    await house.advance(10)
    assert house.world.copies[name] == 0


@simulated
async def test_what_cannot_be_launched_again_though_it_exists_is_not_asked_for_without_a_pause(house: House) -> None:
    house.world.fail_launches(LauncherUnavailable("500 while starting it"), times=40, acts=True)
    name = await house.launch()
    await house.stop(name)
    await house.advance(10)
    assert len(house.calls(name, "launch")) < 40
    house.world.troubles.clear()
    await house.advance(30)
    assert (await house.get(name)).reason is Reason.CANCELLED
    assert name not in house.world.runners


@simulated
async def test_launches_that_hang_do_not_keep_other_runners_ends_from_being_seen(house: House) -> None:
    house.pools = {"local": pool(places=2 * MANY)}
    short = await house.launch("after=5", "exit=0")
    house.world.hang_launches(times=MANY)
    for _ in range(MANY):
        await house.intend()
    await house.advance(5)
    assert (await house.get(short)).state is State.COMPLETED


# The five errors that the field repeats.


@simulated
async def test_unknown_is_not_success(house: House) -> None:
    deleted, nobody_knows = await house.launch(), await house.launch()
    house.world.delete(deleted)
    house.world.happen(nobody_knows, Exit())
    await house.settle()
    for name in (deleted, nobody_knows):
        runner = await house.get(name)
        assert (runner.state, runner.reason, runner.exit_code) == (State.FAILED, Reason.LOST, None)


@simulated
async def test_success_is_not_failure(house: House) -> None:
    at_once = await house.launch("exit=0")
    later = await house.launch("after=60", "exit=0")
    while_down = await house.launch("after=90", "exit=0")
    while_away = await house.launch("after=200", "exit=0")
    await house.advance(60)
    await house.restart(after=60)
    with house.world.unavailable():
        await house.advance(120)
    await house.advance(10)
    for name in (at_once, later, while_down, while_away):
        runner = await house.get(name)
        assert (runner.state, runner.reason, runner.exit_code) == (State.COMPLETED, None, 0)


@simulated
async def test_unreachable_is_not_absent(house: House) -> None:
    name = await house.launch("after=5000", "exit=0")
    before = await house.get(name)
    with house.world.unavailable():
        house.reconciler.wake(name)
        await house.advance(100)
        assert await house.get(name) == before
        await house.restart()
        await house.advance(1000)
        assert await house.get(name) == before
    house.world.silent.add(name)
    house.reconciler.wake(name)
    await house.advance(1000)
    assert await house.get(name) == before
    house.world.silent.clear()
    await house.advance(4000)
    assert (await house.get(name)).state is State.COMPLETED
    assert house.world.copies[name] == 1


@pytest.mark.parametrize("acts", [False, True])
@simulated
async def test_launched_but_not_recorded_is_found_and_not_launched_again(house: House, *, acts: bool) -> None:
    house.world.hang_launches(acts=acts)
    name = await house.launch("after=900", "exit=4")
    assert house.world.copies[name] == acts
    await house.restart(after=20)
    runner = await house.get(name)
    assert (runner.phase, runner.calls, runner.attempts) == (Phase.RUNNING, 1, ())
    await house.advance(900)
    assert (await house.get(name)).exit_code == 4
    assert house.world.copies[name] == 1


@simulated
async def test_late_truth_is_still_the_truth(house: House) -> None:
    """A program ends, then a stop is asked for before anyone has seen the end."""
    name = await house.launch()
    steps = house.world.runners[name].steps
    steps.append((house.loop.now, Exit(code=0)))  # and nobody is told
    house.loop.now += 1
    await house.stop(name)
    runner = await house.get(name)
    assert (runner.state, runner.reason, runner.exit_code) == (State.COMPLETED, None, 0)
    assert await house.kinds(name) == ["accepted", "started", "running", "stop_asked", "finished"]


@simulated
async def test_a_change_decided_on_what_is_no_longer_so_is_not_written(house: House) -> None:
    """While the exit is being recorded a stop gets in first: the exit is decided anew, on the record with the stop."""
    name = await house.launch()
    stopping = [partial(house.store.change, event="stop_asked", at=house.loop.now)]
    runner = await house.get(name)
    slow = asyncio.create_task(house.store._write(lambda *_: time.sleep(0.02)))
    late = asyncio.create_task(stopping[0](runner, stop_asked(runner, "by ann", 10, house.loop.now)))
    house.world.finish(name)
    await house.settle()
    await asyncio.gather(slow, late)
    assert await house.kinds(name) == ["accepted", "started", "running", "stop_asked", "finished"]
    assert (await house.get(name)).state is State.COMPLETED


# The engine goes away and comes back.


@simulated
async def test_while_an_engine_is_away_nothing_changes_but_its_age_and_it_recovers(house: House) -> None:
    name = await house.launch("after=100", "exit=6")
    engine = (await house.get(name)).engine
    with house.world.unavailable():
        await house.advance(STALE_SECONDS + RESYNC_SECONDS)
        assert house.reconciler.engines() == {engine: False}
        await house.advance(200)
        assert (await house.get(name)).phase is Phase.RUNNING
        answered = house.reconciler.answered_at(engine)
        assert answered is not None
        assert answered <= house.loop.now - 200
    await house.advance(RESYNC_SECONDS)
    assert house.reconciler.engines() == {engine: True}
    runner = await house.get(name)
    assert (runner.reason, runner.exit_code) == (Reason.EXIT_NONZERO, 6)
    assert runner.started_at is not None
    assert runner.finished_at == runner.started_at + 100


@simulated
async def test_an_engine_that_gives_signs_of_life_and_tells_of_no_runner_is_not_said_to_answer(house: House) -> None:
    name = await house.launch()
    house.world.silent.add(name)
    await house.advance(STALE_SECONDS - RESYNC_SECONDS)
    assert [*house.reconciler.engines().values()] == [True]
    await house.advance(3 * RESYNC_SECONDS)
    assert [*house.reconciler.answering().values()] == [False]
    house.world.silent.clear()
    await house.advance(RESYNC_SECONDS)
    assert [*house.reconciler.answering().values()] == [True]


@simulated
async def test_an_engine_that_never_answered_is_not_said_to_have_answered(house: House) -> None:
    await house.crash()
    with house.world.unavailable():
        await house.start()
        await house.settle()
        name = await house.launch()
        await house.settle()
        engine = (await house.get(name)).engine
        assert house.reconciler.answered_at(engine) is None


@simulated
async def test_launches_while_an_engine_is_away_wait_for_it_as_long_as_their_pool_allows(house: House) -> None:
    with house.world.unavailable():
        short = await house.launch()
        long = await house.launch(retry_attempts=1000)
        await house.advance(100)
        assert (await house.get(short)).reason is Reason.ENGINE_UNAVAILABLE
        assert (await house.get(long)).phase is Phase.STARTING
    await house.advance(10)
    assert (await house.get(long)).phase is Phase.RUNNING


@simulated
async def test_an_engine_that_is_away_for_days_is_still_asked(house: House) -> None:
    name = await house.launch()
    with house.once(name, "finished", house.cut_off):
        house.world.finish(name)
        await house.settle()
    house.reconciler._failures[name] = 1022  # some two hours of asking in vain
    await house.advance(60)
    house.world.down = None
    await house.advance(20)
    assert (await house.get(name)).cleaned


@simulated
async def test_cleaning_up_is_tried_until_the_engine_answers_and_the_slot_is_free_meanwhile(house: House) -> None:
    name = await house.launch("print=last words", slot="slot-1")

    with house.once(name, "finished", house.cut_off):
        house.world.finish(name)
        await house.advance(60)
    runner = await house.get(name)
    assert (runner.state, runner.cleaned) == (State.COMPLETED, False)
    assert await house.store.spec(name) is not None
    house.world.down = None
    other = await house.launch(slot="slot-1")
    assert (await house.get(other)).phase is Phase.RUNNING
    await house.advance(20)
    assert (await house.get(name)).cleaned
    assert await house.store.spec(name) is None
    assert name not in house.world.runners
    assert await house.output(name) == b"last words\n"


@simulated
async def test_a_clean_up_that_a_crash_cut_short_is_finished_by_the_next_service(house: House) -> None:
    name = await house.launch("print=kept")

    with house.once(name, "finished", house.cut_off):
        house.world.finish(name, 2)
        await house.settle()
    await house.crash()
    house.world.down = None
    await house.start()
    await house.settle()
    runner = await house.get(name)
    assert (runner.exit_code, runner.cleaned) == (2, True)
    assert name not in house.world.runners
    assert await house.output(name) == b"kept\n"


# Stops.


@simulated
async def test_a_stop_is_a_polite_order_first_and_a_kill_after_the_grace(house: House) -> None:
    name = await house.launch("term")
    await house.stop(name, grace=10)
    runner = await house.get(name)
    assert (runner.phase, runner.state) == (Phase.STOPPING, State.RUNNING)
    await house.advance(9.9)
    assert house.calls(name, "stop") == ["stop"]
    assert (await house.get(name)).phase is Phase.STOPPING
    await house.advance(0.1)
    runner = await house.get(name)
    assert (runner.reason, runner.signal, runner.message) == (Reason.CANCELLED, "SIGKILL", "stopped by ann")
    assert house.calls(name, "stop") == ["stop", "stop"]


@simulated
async def test_a_clock_that_is_set_back_keeps_no_kill_waiting(house: House) -> None:
    name = await house.launch("term")
    runner = await house.get(name)
    stop = Stop(reason=Reason.CANCELLED, message="stopped by ann", at=house.loop.now + 3600, grace_seconds=10, sent=True)
    changed = replace(runner, phase=Phase.STOPPING, stop=stop)
    await house.store.change(runner, changed, "stop_sent", house.loop.now)
    await house.settle()
    assert (await house.get(name)).reason is Reason.CANCELLED


@simulated
async def test_a_runner_that_obeys_ends_at_once_and_keeps_the_code_it_left(house: House) -> None:
    name = await house.launch("term", "print=saved", "after=2", "exit=0")
    await house.stop(name, grace=10)
    await house.advance(2)
    runner = await house.get(name)
    assert (runner.state, runner.reason, runner.exit_code) == (State.FAILED, Reason.CANCELLED, 0)
    assert house.calls(name, "stop") == ["stop"]


@simulated
async def test_a_stop_without_grace_kills_at_once(house: House) -> None:
    name = await house.launch("term")
    await house.stop(name, grace=0)
    assert (await house.get(name)).signal == "SIGKILL"
    assert house.calls(name, "stop") == ["stop"]


@simulated
async def test_a_second_stop_shortens_the_grace_of_the_first(house: House) -> None:
    name = await house.launch("term")
    await house.stop(name, grace=1000)
    await house.advance(5)
    await house.stop(name, grace=10)
    await house.advance(10)
    assert (await house.get(name)).signal == "SIGKILL"


@simulated
async def test_a_kill_is_repeated_while_the_engine_says_that_the_runner_lives(house: House) -> None:
    name = await house.launch()
    with house.world.unavailable():
        await house.stop(name, grace=0)
        await house.advance(60)
        assert (await house.get(name)).phase is Phase.STOPPING
    await house.advance(20)
    assert (await house.get(name)).reason is Reason.CANCELLED


@simulated
async def test_a_stop_calls_off_a_launch_that_has_not_done_anything_yet(house: House) -> None:
    gate = house.world.hang_launches()
    name = await house.launch()
    await house.stop(name)
    runner = await house.get(name)
    assert (runner.phase, runner.reason, runner.started_at) == (Phase.FINISHED, Reason.CANCELLED, None)
    gate.set()
    await house.advance(60)
    assert house.world.copies[name] == 0
    assert house.world.runners == {}


@simulated
async def test_a_stop_of_a_launch_whose_answer_is_awaited_ends_what_was_started(house: House) -> None:
    house.world.hang_launches(acts=True)
    name = await house.launch()
    assert house.world.copies[name] == 1
    await house.stop(name)
    await house.advance(10)
    runner = await house.get(name)
    assert (runner.phase, runner.reason, runner.signal) == (Phase.FINISHED, Reason.CANCELLED, "SIGTERM")
    assert house.world.runners == {}


@simulated
async def test_a_stop_between_the_decision_to_launch_and_the_launch_is_not_overlooked(house: House) -> None:
    house.world.fail_launches(LauncherUnavailable("refused", acted=False))
    name = await house.launch()
    house.world.hang_launches()

    async def stop_while_reading_is_slow() -> None:
        slow = [house.store._read(lambda _: time.sleep(0.03)) for _ in range(2)]
        runner = next(change.runner for change in reversed(house.changes) if change.runner.runner_id == name)
        stop = stop_asked(runner, "by ann", 10, house.loop.now)
        await asyncio.gather(*slow, house.store.change(runner, stop, "stop_asked", house.loop.now))

    with house.once(name, "launching", stop_while_reading_is_slow):
        await house.advance(2)
    assert (await house.get(name)).reason is Reason.CANCELLED


@simulated
async def test_a_stop_of_what_waits_for_its_next_attempt_ends_it_without_another(house: House) -> None:
    house.world.fail_launches(LauncherUnavailable("refused", acted=False, retry_after=60))
    name = await house.launch()
    await house.stop(name)
    assert (await house.get(name)).reason is Reason.CANCELLED
    await house.advance(100)
    assert house.calls(name) == ["launch"]


@simulated
async def test_a_stop_while_the_engine_is_away_is_carried_out_when_it_is_back(house: House) -> None:
    name = await house.launch("term", "after=1", "exit=0")
    with house.world.unavailable():
        await house.stop(name, grace=100)
        await house.advance(50)
        assert (await house.get(name)).phase is Phase.STOPPING
    await house.advance(20)
    runner = await house.get(name)
    assert (runner.reason, runner.exit_code) == (Reason.CANCELLED, 0)


@simulated
async def test_a_stop_survives_a_restart_with_its_grace(house: House) -> None:
    name = await house.launch("term")
    await house.stop(name, grace=100)
    await house.restart(after=50)
    assert (await house.get(name)).phase is Phase.STOPPING
    assert house.calls(name, "stop") == ["stop"]
    await house.advance(50)
    assert (await house.get(name)).signal == "SIGKILL"


@simulated
async def test_giving_up_by_force_frees_the_slot_at_once_and_kills_what_may_still_live(house: House) -> None:
    name = await house.launch(slot="slot-1")
    with house.world.unavailable():
        await house.give_up(name)
        assert (await house.get(name)).reason is Reason.LOST
        other = await house.launch(slot="slot-1", retry_attempts=99)
    await house.advance(20)
    assert list(house.world.runners) == [other]


# Deadlines.


@simulated
async def test_a_runner_that_runs_too_long_is_ended(house: House) -> None:
    name = await house.launch("term", run_timeout_seconds=60, stop_grace_seconds=5)
    await house.advance(59.9)
    assert (await house.get(name)).phase is Phase.RUNNING
    await house.advance(0.1)
    assert (await house.get(name)).phase is Phase.STOPPING
    await house.advance(5)
    runner = await house.get(name)
    assert (runner.reason, runner.signal, runner.retryable) == (Reason.DEADLINE_EXCEEDED, "SIGKILL", False)
    assert runner.message == "not done 60 s after it was started"


@simulated
async def test_a_run_deadline_that_passes_while_the_service_is_down_is_kept_at_the_restart(house: House) -> None:
    name = await house.launch(run_timeout_seconds=60)
    await house.restart(after=1000)
    assert (await house.get(name)).reason is Reason.DEADLINE_EXCEEDED


@simulated
async def test_a_runner_that_never_gets_going_is_ended_with_what_held_it_up(house: House) -> None:
    name = await house.launch("starting=ImagePullBackOff: no such tag", launch_timeout_seconds=30)
    assert (await house.get(name)).state is State.RUNNING
    assert (await house.get(name)).phase is Phase.STARTING
    await house.advance(30)
    runner = await house.get(name)
    assert (runner.reason, runner.retryable) == (Reason.LAUNCH_TIMEOUT, True)
    assert runner.message == "not running 30 s after it was asked for: ImagePullBackOff: no such tag"
    assert house.world.runners == {}


@simulated
async def test_what_a_long_launch_is_at_is_told_and_does_not_call_it_off(house: House) -> None:
    house.world.progress = ["pulling busybox", "pulling busybox: 3 of 9 MiB"]
    gate = house.world.hang_launches()
    name = await house.launch()
    pending = await house.get(name)
    assert (pending.state, pending.message) == (State.PENDING, "pulling busybox: 3 of 9 MiB")
    gate.set()
    await house.settle()
    runner = await house.get(name)
    assert (runner.state, runner.message) == (State.RUNNING, None)
    told = [event.message for event in await house.store.history(name) if event.type == "progress"]
    assert told == house.world.progress
    assert house.world.copies[name] == 1
    assert [call for call in house.world.calls if call == ("launch", name)] == [("launch", name)]


@pytest.mark.parametrize("error", [LaunchRejected("no such image"), LauncherUnavailable("gone", acted=False)])
@simulated
async def test_a_launch_that_fails_after_it_told_what_it_was_at_fails_as_any_other(
    house: House, *, error: LauncherError
) -> None:
    house.world.progress = ["pulling busybox"]
    house.world.fail_launches(error, 3, acts=False)
    name = await house.launch()
    await house.advance(60)
    runner = await house.get(name)
    assert runner.phase is Phase.FINISHED
    assert str(error) in str(runner.message)


@simulated
async def test_a_stop_calls_off_a_launch_that_is_telling_what_it_is_at(house: House) -> None:
    house.world.progress = ["pulling busybox"]
    house.world.hang_launches()
    name = await house.launch()
    await house.stop(name)
    assert (await house.get(name)).reason is Reason.CANCELLED
    assert house.world.copies[name] == 0


@simulated
async def test_a_runner_that_starts_slowly_has_no_launch_deadline_once_it_runs(house: House) -> None:
    name = await house.launch("starting=pulling", "after=20", "running", "after=500", "exit=0", launch_timeout_seconds=30)
    await house.advance(20)
    assert (await house.get(name)).phase is Phase.RUNNING
    await house.advance(500)
    assert (await house.get(name)).state is State.COMPLETED


@simulated
async def test_a_runner_that_falls_silent_is_ended_and_one_that_beats_is_not(house: House) -> None:
    name = await house.launch(heartbeat_timeout_seconds=20)
    await house.advance(100)
    assert (await house.get(name)).phase is Phase.RUNNING  # silence counts from the first beat
    for _ in range(5):
        await house.beat(name)
        await house.advance(15)
    assert (await house.get(name)).phase is Phase.RUNNING
    await house.advance(5)
    runner = await house.get(name)
    assert (runner.reason, runner.message) == (Reason.HEARTBEAT_LOST, "no heartbeat for 20 s")


@simulated
async def test_silence_while_the_service_was_down_is_no_silence(house: House) -> None:
    name = await house.launch(heartbeat_timeout_seconds=20)
    await house.beat(name)
    await house.restart(after=100)
    await house.advance(19)
    assert (await house.get(name)).phase is Phase.RUNNING
    await house.advance(1)
    assert (await house.get(name)).reason is Reason.HEARTBEAT_LOST


@pytest.mark.parametrize("how", ["stood still", "clock set forward", "clock set back"])
@simulated
async def test_silence_while_the_service_stood_still_or_its_clock_was_set_is_no_silence(house: House, *, how: str) -> None:
    name = await house.launch(heartbeat_timeout_seconds=20)
    await house.beat(name)
    if how == "stood still":
        house.loop.now += 600
    else:
        house.ahead += 600 if "forward" in how else -600
    house.reconciler.wake(name)
    await house.settle()
    await house.advance(19)
    assert (await house.get(name)).phase is Phase.RUNNING
    await house.advance(3)
    assert (await house.get(name)).reason is Reason.HEARTBEAT_LOST


@simulated
async def test_a_heartbeat_that_another_replica_heard_of_first_counts_though_it_did_not_tell(house: House) -> None:
    name = await house.launch(heartbeat_timeout_seconds=20)
    await house.store.beat(name, house.loop.now)
    await house.advance(20 + RESYNC_SECONDS)
    assert (await house.get(name)).reason is Reason.HEARTBEAT_LOST


@simulated
async def test_a_heartbeat_that_comes_while_its_loss_is_being_decided_is_heard(house: House) -> None:
    name = await house.launch(heartbeat_timeout_seconds=20)
    await house.beat(name)
    house.loop.now += 20
    slow = asyncio.create_task(house.store._write(lambda *_: time.sleep(0.03)))
    await asyncio.sleep(0)
    beat = asyncio.create_task(house.store.beat(name, house.loop.now))
    await house.settle()
    await asyncio.gather(slow, beat)
    assert (await house.get(name)).phase is Phase.RUNNING


# The queue.


@simulated
async def test_queued_runners_are_admitted_in_order_as_places_become_free(house: House) -> None:
    house.pools = {"local": pool(places=1)}
    first, *waiting = [await house.launch() for _ in range(4)]
    assert await house.phases(first, *waiting) == [Phase.RUNNING, *[Phase.QUEUED] * 3]
    for number, name in enumerate(waiting):
        house.world.finish(first)
        await house.settle()
        expected = [Phase.RUNNING, *[Phase.QUEUED] * (2 - number)]
        assert await house.phases(*waiting[number:]) == expected
        first = name
    assert await house.kinds(first) == ["accepted", "admitted", "started", "running"]


@simulated
async def test_a_queued_runner_is_not_launched_before_it_has_a_place_and_one_too_many_is_refused(house: House) -> None:
    house.pools = {"local": pool(places=1)}
    await house.launch()
    name = await house.launch(queue_limit=1)
    with pytest.raises(PoolFull):
        await house.launch(queue_limit=1)
    await house.advance(100)
    assert house.calls(name) == []
    history = await house.store.history(name)
    assert history[0].message == "pool local holds 1 runner, and its max_concurrency is 1"


@simulated
async def test_who_waits_too_long_for_a_place_is_told_so_and_lets_the_next_go_first(house: House) -> None:
    house.pools = {"local": pool(places=1)}
    running = await house.launch()
    impatient, patient = await house.launch(launch_timeout_seconds=30), await house.launch(launch_timeout_seconds=900)
    await house.advance(30)
    runner = await house.get(impatient)
    assert (runner.reason, runner.message, runner.retryable) == (
        Reason.QUEUE_TIMEOUT,
        "no place in pool local within 30 s",
        True,
    )
    house.world.finish(running)
    await house.settle()
    assert (await house.get(patient)).phase is Phase.RUNNING


@simulated
async def test_the_time_to_launch_counts_from_the_place_not_from_the_request(house: House) -> None:
    house.pools = {"local": pool(places=1)}
    running = await house.launch()
    name = await house.launch("starting=pulling", launch_timeout_seconds=30)
    await house.advance(25)
    house.world.finish(running)
    await house.advance(25)
    assert (await house.get(name)).phase is Phase.STARTING
    await house.advance(5)
    assert (await house.get(name)).reason is Reason.LAUNCH_TIMEOUT


@pytest.mark.parametrize("end", ["forced", "rejected", "lost", "stopped"])
@simulated
async def test_every_way_to_end_makes_room_for_the_next(house: House, *, end: str) -> None:
    house.pools = {"local": pool(places=1)}
    house.world.hang_launches()
    name = await house.launch()
    waiting = await house.launch()
    match end:
        case "forced":
            await house.give_up(name)
        case "stopped":
            await house.stop(name)
        case "rejected":
            await house.restart()
            await house.stop(name, grace=0)
        case _:
            await house.restart()
            house.world.delete(name)
    await house.advance(1)
    assert await house.phases(name, waiting) == [Phase.FINISHED, Phase.RUNNING]


@simulated
async def test_when_the_first_in_the_queue_is_cancelled_the_next_gets_its_turn(house: House) -> None:
    house.pools = {
        "small": pool("small", places=4, cpu=1, cpu_quota=2),
    }
    small = await house.launch(pool_name="small")
    house.pools["small"] = pool("small", places=4, cpu=2, cpu_quota=2)
    big = await house.launch(pool_name="small")
    house.pools["small"] = pool("small", places=4, cpu=1, cpu_quota=2)
    next_in_line = await house.launch(pool_name="small")
    assert await house.phases(small, big, next_in_line) == [Phase.RUNNING, Phase.QUEUED, Phase.QUEUED]
    house.pools["small"] = pool("small", places=1, cpu=1, cpu_quota=2)
    await house.stop(big)
    assert (await house.get(next_in_line)).phase is Phase.QUEUED
    await house.give_up(small)
    await house.advance(1)
    assert (await house.get(next_in_line)).phase is Phase.RUNNING


@simulated
async def test_a_pool_taken_out_of_the_file_serves_what_it_accepted_one_after_another(house: House) -> None:
    house.pools = {"local": pool(places=2)}
    names = [await house.launch() for _ in range(4)]
    house.pools = {}
    house.world.finish(names[0])
    await house.settle()
    assert await house.phases(*names) == [Phase.FINISHED, Phase.RUNNING, Phase.QUEUED, Phase.QUEUED]
    for number in (1, 2):
        house.world.finish(names[number])
        await house.settle()
        assert await house.phases(*names[number : number + 2]) == [Phase.FINISHED, Phase.RUNNING]


@simulated
async def test_the_queue_survives_a_restart_in_its_order(house: House) -> None:
    house.pools = {"local": pool(places=1)}
    first, second, third = [await house.launch() for _ in range(3)]
    await house.crash()
    house.world.finish(first)
    await house.start()
    await house.settle()
    assert await house.phases(first, second, third) == [Phase.FINISHED, Phase.RUNNING, Phase.QUEUED]


# Crashes.


@simulated
async def test_a_restarted_service_finds_what_runs_what_ended_and_what_was_being_launched(house: House) -> None:
    running = await house.launch()
    ended = await house.launch("after=30", "signal=SIGSEGV")
    house.world.hang_launches(acts=False)
    before = await house.launch()
    house.world.hang_launches(acts=True)
    after = await house.launch()
    await house.restart(after=60)
    assert await house.phases(running, ended, before, after) == [
        Phase.RUNNING,
        Phase.FINISHED,
        Phase.RUNNING,
        Phase.RUNNING,
    ]
    runner = await house.get(ended)
    assert (runner.reason, runner.signal) == (Reason.SIGNALLED, "SIGSEGV")
    assert set(house.world.copies.values()) == {1}
    assert house.calls(running, "launch", "stop", "remove") == ["launch"]


@simulated
async def test_a_launch_cut_short_long_ago_is_found_if_it_started_and_given_up_if_not(house: House) -> None:
    house.world.hang_launches(acts=False)
    nothing = await house.launch(launch_timeout_seconds=30)
    house.world.hang_launches(acts=True)
    lives = await house.launch("after=5000", "exit=0", launch_timeout_seconds=30)
    house.world.hang_launches(acts=True)
    ended = await house.launch("after=60", "exit=3", launch_timeout_seconds=30)
    await house.restart(after=3600)
    await house.advance(10)
    assert (await house.get(nothing)).reason is Reason.LAUNCH_TIMEOUT
    assert (await house.get(ended)).exit_code == 3
    assert (await house.get(lives)).state is State.RUNNING
    await house.advance(2000)
    assert (await house.get(lives)).state is State.COMPLETED
    assert house.world.copies[nothing] == 0


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 17, 22, 30, 45])
@simulated
async def test_a_crash_at_any_instant_of_a_launch_neither_loses_nor_doubles_it(house: House, *, steps: int) -> None:
    names = [(await house.intend("after=50", "exit=9")).runner_id for _ in range(3)]
    for _ in range(steps):
        await asyncio.sleep(0)
    await house.restart(after=1)
    await house.advance(60)
    for name in names:
        runner = await house.get(name)
        assert (runner.exit_code, house.world.copies[name]) == (9, 1)
        assert (await house.kinds(name)).count("finished") == 1
    assert house.world.runners == {}


@simulated
async def test_a_launch_whose_success_could_not_be_written_is_not_called_failed_because_its_engine_goes_away(
    house: House,
) -> None:
    class FillsTheDisk(FakeLauncher):
        @override
        async def launch(self, *args: Any, **more: Any) -> Handle:
            handle = await super().launch(*args, **more)
            house.store.full = True
            return handle

    house.open_launcher = FillsTheDisk
    await house.restart()
    name = await house.launch()
    assert house.world.copies[name] == 1
    house.cut_off()
    house.open_launcher, house.store.full = FakeLauncher, False
    await house.advance(60)
    assert (await house.get(name)).state is State.PENDING
    await house.restart()
    house.world.down = None
    house.world.wake()
    await house.advance(60)
    runner = await house.get(name)
    assert (runner.state, house.world.copies[name]) == (State.RUNNING, 1)


@pytest.mark.parametrize("after", [1, -3600])
@simulated
async def test_a_launch_cut_short_is_not_called_failed_because_its_engine_is_away_after_the_crash(
    house: House, after: float
) -> None:
    house.world.hang_launches(acts=True)
    name = await house.launch()
    assert house.world.copies[name] == 1
    house.cut_off()
    await house.restart(after=after)
    await house.advance(60)
    assert (await house.get(name)).state is State.PENDING
    house.world.down = None
    house.world.wake()
    await house.advance(60)
    runner = await house.get(name)
    assert (runner.state, house.world.copies[name]) == (State.RUNNING, 1)


@simulated
async def test_a_launch_cut_short_is_not_called_failed_because_its_engine_cannot_be_opened_any_more(house: House) -> None:
    def no_library(_: FakeWorld) -> FakeLauncher:
        raise LaunchRejected("docker pools need the library aiodocker", Reason.CONFIG_ERROR)

    house.world.hang_launches(acts=True)
    name = await house.launch("after=100", "exit=3")
    house.open_launcher = no_library
    await house.restart(after=1)
    await house.advance(20)
    assert (await house.get(name)).phase is Phase.STARTING
    house.open_launcher = FakeLauncher
    await house.restart()
    await house.advance(100)
    assert (await house.get(name)).exit_code == 3


@simulated
async def test_crash_after_crash_every_launch_has_one_copy_and_one_end(house: House) -> None:
    dice = random.Random(2)  # noqa: S311 - the same every time
    names = []
    for number in range(25):
        house.world.fail_launches(LauncherUnavailable("no answer"), times=dice.randrange(2), acts=dice.random() < 0.5)
        names.append((await house.intend("after=3", f"exit={number % 2}", retry_attempts=99)).runner_id)
        for _ in range(dice.randrange(40)):
            await asyncio.sleep(dice.choice([0, 0, 0, 0.2]) and 0)
        if dice.random() < 0.5:
            await house.restart(after=dice.choice([0, 1, 5]))
        else:
            await house.advance(dice.choice([0, 0.1, 1]))
    await house.advance(60)
    for number, name in enumerate(names):
        runner = await house.get(name)
        assert (runner.exit_code, house.world.copies[name], runner.cleaned) == (number % 2, 1, True)
    assert house.world.runners == {}


# News that does not come.


@simulated
async def test_an_end_that_the_watch_missed_is_found_by_the_resync(house: House) -> None:
    name = await house.launch()
    starting = await house.launch("starting=pulling")
    for runner_id, effect in ((name, Exit(code=8)), (starting, Running())):
        house.world.runners[runner_id].steps.append((house.loop.now, effect))
    house.world.runners[name].steps.append((house.loop.now, Exit(code=8)))
    await house.settle()
    assert (await house.get(name)).phase is Phase.RUNNING
    await house.advance(RESYNC_SECONDS)
    assert (await house.get(name)).exit_code == 8
    assert (await house.get(starting)).phase is Phase.RUNNING


@simulated
async def test_where_a_runner_is_gets_on_record_when_its_engine_tells(house: House) -> None:
    name = await house.launch("starting=no node yet")
    assert (await house.get(name)).handle == house.world.runners[name].handle
    house.world.happen(name, Running(Place(node="node-1", image_digest="sha256:1")))
    await house.settle()
    handle = (await house.get(name)).handle
    assert handle == replace(house.world.runners[name].handle, node="node-1", image_digest="sha256:1")


@simulated
async def test_a_deletion_that_the_watch_missed_is_found_by_the_resync(house: House) -> None:
    name = await house.launch()
    del house.world.runners[name]
    await house.advance(RESYNC_SECONDS)
    assert (await house.get(name)).reason is Reason.LOST


@simulated
async def test_the_resync_asks_each_engine_once_however_many_runners_it_holds(house: House) -> None:
    house.pools = {"local": pool(places=50)}
    for _ in range(30):
        await house.intend()
    await house.settle()
    before = len(house.world.calls)
    await house.advance(RESYNC_SECONDS)
    assert sorted(method for method, _ in house.world.calls[before:]) == ["observe", "ping"]


@simulated
async def test_a_restart_asks_each_engine_once_of_all_that_run_and_keeps_their_deadlines(house: House) -> None:
    house.pools = {"local": pool(places=50)}
    names = [await house.launch("after=50", "exit=3", run_timeout_seconds=1000)]
    names += [await house.launch(run_timeout_seconds=100) for _ in range(30)]
    await house.crash()
    house.loop.now += 60
    before = len(house.world.calls)
    await house.start()
    await house.settle()
    asked = [method for method, _ in house.world.calls[before:]]
    assert asked.count("observe") <= 2  # and once for the one that has ended
    assert (await house.get(names[0])).exit_code == 3
    await house.advance(40)
    assert {(await house.get(name)).reason for name in names[1:]} == {Reason.DEADLINE_EXCEEDED}


@simulated
async def test_a_watch_that_breaks_is_begun_again(house: House, caplog: pytest.LogCaptureFixture) -> None:
    class Breaks(FakeLauncher):
        broken = False

        @override
        async def watch(self) -> Any:
            if not Breaks.broken:
                Breaks.broken = True
                raise RuntimeError("a defect")
            async for name in super().watch():
                yield name

    house.open_launcher = Breaks
    await house.restart()
    name = await house.launch("after=3", "exit=0")
    await house.advance(3)
    assert (await house.get(name)).state is State.COMPLETED
    assert "a defect" in caplog.text


@simulated
async def test_a_defect_in_one_runners_way_is_logged_and_tried_again_and_holds_up_no_other(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    class Defective(FakeLauncher):
        @override
        async def stop(self, handle: Handle, grace: float) -> None:
            if house.loop.now < 1_000_100:
                raise RuntimeError("a defect")
            await super().stop(handle, grace)

    house.open_launcher = Defective
    await house.restart()
    one, other = await house.launch(), await house.launch("after=50", "exit=0")
    await house.stop(one)
    await house.advance(50)
    assert await house.phases(one, other) == [Phase.STOPPING, Phase.FINISHED]
    await house.advance(60)
    assert (await house.get(one)).reason is Reason.CANCELLED
    assert caplog.messages
    assert {record.levelno for record in caplog.records} <= {logging.ERROR, logging.WARNING, logging.INFO}


# What an engine holds without a record.


@simulated
async def test_a_live_runner_without_a_record_is_adopted_and_ends_as_it_ends(house: House) -> None:
    name = await house.launch("after=900", "exit=5", slot="slot-1", run_timeout_seconds=5000)
    before = await house.get(name)
    await house.crash()
    for file in house.directory.glob("runners.db*"):
        file.unlink()
    await house.start()
    await house.settle()
    runner = await house.get(name)
    assert replace(runner, revision=0, observed_at=None) == replace(before, revision=0, observed_at=None)
    assert (await house.kinds(name))[0] == "adopted"
    with pytest.raises(SlotBusy):
        await house.launch(slot="slot-1")
    assert house.calls(name, "launch", "stop", "remove") == ["launch"]
    await house.advance(900)
    assert (await house.get(name)).exit_code == 5
    assert house.world.copies[name] == 1


@simulated
async def test_a_live_runner_that_a_restored_database_never_knew_is_adopted_beside_those_it_knows(
    house: House,
) -> None:
    known = await house.launch()
    await house.crash()
    saved = {file: file.read_bytes() for file in house.directory.glob("runners.db*")}
    await house.start()
    unknown = await house.launch()
    await house.crash()
    for file in house.directory.glob("runners.db*"):
        file.unlink()
    for file, data in saved.items():
        file.write_bytes(data)
    await house.start()
    await house.settle()
    assert await house.phases(known, unknown) == [Phase.RUNNING, Phase.RUNNING]


@simulated
async def test_what_cannot_be_removed_keeps_no_live_runner_from_being_adopted(house: House) -> None:
    class Stuck(FakeLauncher):
        @override
        async def remove(self, handle: Handle) -> None:
            raise LauncherUnavailable("device or resource busy")

    house.open_launcher = Stuck
    spec = LaunchSpec(command=("fake", "exit=0"), environment={}, context=b"{}", labels={})
    house.world.start("fake", "runner-nobodys", spec)
    await house.advance(GRACE_SECONDS + 1)
    name = await house.launch()
    await house.crash()
    for file in house.directory.glob("runners.db*"):
        file.unlink()
    await house.start()
    await house.settle()
    assert (await house.get(name)).phase is Phase.RUNNING


@simulated
async def test_what_ended_without_a_record_is_removed_after_a_grace_and_nobody_elses_ever(house: House) -> None:
    spec = LaunchSpec(command=("fake", "exit=0"), environment={}, context=b"{}", labels={})
    house.world.start("fake", "runner-nobodys", spec)
    house.world.start("another installation", "runner-theirs", spec)
    strays = await house.reconciler.strays("local-process")
    assert [(stray.found.handle.runner_id, stray.fate) for stray in strays] == [("runner-nobodys", "wait")]
    await house.advance(2 * SWEEP_SECONDS - 1)
    assert set(house.world.runners) == {"runner-nobodys", "runner-theirs"}
    await house.advance(2 * SWEEP_SECONDS)
    assert set(house.world.runners) == {"runner-theirs"}


@simulated
async def test_what_comes_back_after_its_record_was_closed_is_removed(house: House) -> None:
    name = await house.launch("exit=0")
    spec = LaunchSpec(command=("fake",), environment={}, context=b"{}", labels={})
    house.world.start("fake", name, spec)
    before = await house.get(name)
    await house.advance(SWEEP_SECONDS)
    assert house.world.runners == {}
    assert await house.get(name) == before


@simulated
async def test_a_live_runner_whose_labels_tell_too_little_is_left_alone_and_reported(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    spec = LaunchSpec(command=("fake",), environment={}, context=b"{}", labels={"runner_id": "runner-odd"})
    house.world.start("fake", "runner-odd", spec)
    await house.advance(5 * SWEEP_SECONDS)
    assert set(house.world.runners) == {"runner-odd"}
    assert "runner-odd" in caplog.text
