"""The pure core by tables: what to do next with a runner, how it changes, and that its end is told truthfully."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import assert_never

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from app.launcher import Enforcement, Exit, Exited, Gone, Handle, Observation, Place, Running, Starting
from app.reason import Reason
from app.runner import (
    LIVE,
    PLACED,
    Action,
    Admit,
    Attempt,
    Become,
    CleanUp,
    Launch,
    Look,
    Order,
    Phase,
    Policy,
    Runner,
    State,
    Stop,
    Wait,
    accepted,
    admitted,
    call_begun,
    call_failed,
    decide,
    ended,
    finished,
    progressed,
    rejected,
    stop_asked,
    stop_sent,
    vanished,
)

T = 1000.0
"""When every runner here was asked for."""

HANDLE = Handle(runner_id="runner-1", pid=7, enforced_by=Enforcement(cpu="cgroup2", memory_mib="cgroup2"))
EXIT_0 = Exited(Exit(code=0))
CANCEL = Stop(reason=Reason.CANCELLED, message="stopped by ann", at=T + 50, grace_seconds=10)
NO_CALL = Attempt(number=1, at=T, error="refused", retryable=True, delay_seconds=1, acted=False)
NO_ANSWER = replace(NO_CALL, error="timed out", acted=True)


def starting(**facts: object) -> Runner:
    """Make a runner that has its place, with one launch call begun."""
    start = Runner(
        runner_id="runner-1",
        task_id="1.1",
        pool_name="local",
        slot_id="slot-1",
        engine="local-process",
        phase=Phase.STARTING,
        created_at=T,
        launch_deadline=T + 300,
        policy=Policy(),
        calls=1,
    )
    return replace(start, **facts)  # type: ignore[arg-type]


def yes(**facts: object) -> Runner:
    """Make a runner that the engine has accepted."""
    return starting(**{"handle": HANDLE, "started_at": T + 1, **facts})


def running(**facts: object) -> Runner:
    return yes(**{"phase": Phase.RUNNING, **facts})


def stopping(stop: Stop = CANCEL, **facts: object) -> Runner:
    return yes(**{"phase": Phase.STOPPING, "stop": stop, **facts})


def queued(**facts: object) -> Runner:
    return starting(**{"phase": Phase.QUEUED, "calls": 0, **facts})


def tried(*attempts: Attempt, **facts: object) -> Runner:
    """Make a runner whose launch calls all came back so; the next is due a second after the start."""
    return starting(**{"calls": len(attempts), "attempts": attempts, "next_attempt_at": T + 1, **facts})


def told(action: Action) -> str:
    """Say an action in a few words."""
    match action:
        case Wait(until=until):
            return "wait" if until is None else f"wait {until - T:g}"
        case Order(grace=grace):
            return f"order {grace:g}"
        case Become(runner=runner, event=name, discard=discard):
            reason = runner.reason or (runner.stop.reason if runner.stop else None)
            return " ".join(filter(None, (name, runner.phase, reason, "discard" if discard else None)))
        case Admit() | Launch() | Look() | CleanUp():
            return type(action).__name__.lower()
        case _:
            assert_never(action)


# Before the engine has said yes.


@pytest.mark.parametrize(
    ("runner", "now", "step"),
    [
        (queued(), T, "admit"),
        (queued(), T + 299.9, "admit"),
        (queued(), T + 300, "finished finished queue_timeout"),
        (queued(stop=CANCEL), T, "finished finished cancelled"),
        (queued(stop=CANCEL), T + 300, "finished finished cancelled"),
    ],
)
def test_a_queued_runner_takes_a_place_until_its_patience_ends(runner: Runner, now: float, step: str) -> None:
    for seen in (None, Gone(), Running(), EXIT_0):
        assert told(decide(runner, seen, now, T)) == step


@pytest.mark.parametrize("seen", [Starting(), Starting("no node"), Running(), EXIT_0, Exited(Exit(code=3))])
@pytest.mark.parametrize(
    "runner",
    [
        starting(),
        starting(stop=CANCEL),
        tried(NO_ANSWER),
        tried(NO_ANSWER, NO_ANSWER, NO_ANSWER),
        tried(NO_ANSWER, calls=2),
    ],
    ids=["first call", "stop asked", "once unknown", "exhausted", "second call under way"],
)
@pytest.mark.parametrize("now", [T + 2, T + 1000])
def test_what_exists_already_is_found_by_launching_again_unless_it_has_not_begun_and_nobody_wants_it_any_more(
    runner: Runner, seen: Observation, now: float
) -> None:
    step = told(decide(runner, seen, now, T))
    if isinstance(seen, Starting) and (runner.stop or now > runner.launch_deadline):
        assert step in ("finished finished cancelled discard", "finished finished launch_timeout discard")
    else:
        assert step == "launch"


@pytest.mark.parametrize(
    ("runner", "seen", "now", "step"),
    [
        (starting(), None, T, "launch"),
        (starting(), Gone(), T, "launch"),
        (starting(calls=2, attempts=(NO_CALL,)), None, T, "launch"),
        (starting(calls=3, attempts=(NO_ANSWER, NO_ANSWER)), None, T, "launch"),
    ],
)
def test_a_call_begun_and_not_come_back_is_made_again(
    runner: Runner, seen: Observation | None, now: float, step: str
) -> None:
    assert told(decide(runner, seen, now, T)) == step


@pytest.mark.parametrize(
    ("runner", "seen", "now", "step"),
    [
        (tried(NO_CALL), None, T + 0.5, "wait 1"),
        (tried(NO_CALL), None, T + 1, "launching starting"),
        (tried(NO_CALL, next_attempt_at=T + 900), None, T + 0.5, "wait 300"),
        (tried(NO_ANSWER), None, T + 0.5, "wait 1"),
        (tried(NO_ANSWER), None, T + 1, "look"),
        (tried(NO_ANSWER), Gone(), T + 1, "launching starting"),
        (tried(NO_CALL, NO_ANSWER), None, T + 1, "look"),
        (tried(NO_ANSWER, NO_CALL), None, T + 1, "launching starting"),
    ],
)
def test_a_create_without_an_answer_is_read_by_name_before_another_create(
    runner: Runner, seen: Observation | None, now: float, step: str
) -> None:
    assert told(decide(runner, seen, now, T)) == step


def test_the_next_call_is_counted_before_it_is_made() -> None:
    action = decide(tried(NO_CALL), None, T + 1, T)
    assert isinstance(action, Become)
    assert action.runner.calls == 2
    assert decide(action.runner, None, T + 1, T) == Launch()


STOPPED, LATE = {"stop": CANCEL}, {"launch_deadline": T}


@pytest.mark.parametrize(
    ("runner", "seen", "step"),
    [
        (tried(NO_CALL, NO_CALL, NO_CALL), None, "finished finished engine_unavailable"),
        (tried(NO_ANSWER, NO_CALL, NO_CALL), None, "look"),
        (tried(NO_CALL, NO_ANSWER, NO_CALL), Gone(), "finished finished engine_unavailable discard"),
        (tried(NO_CALL, **STOPPED), None, "finished finished cancelled"),
        (tried(NO_ANSWER, **STOPPED), None, "look"),
        (tried(NO_ANSWER, **STOPPED), Gone(), "finished finished cancelled discard"),
        (starting(**STOPPED), None, "look"),
        (starting(**STOPPED), Gone(), "finished finished cancelled discard"),
        (tried(NO_CALL, **LATE), None, "finished finished launch_timeout"),
        (tried(NO_ANSWER, **LATE), None, "look"),
        (tried(NO_ANSWER, **LATE), Gone(), "finished finished launch_timeout discard"),
        (starting(**LATE), None, "look"),
        (starting(**LATE), Gone(), "finished finished launch_timeout discard"),
        (starting(**STOPPED, **LATE), Gone(), "finished finished cancelled discard"),
        (tried(NO_CALL, NO_CALL, NO_CALL, **STOPPED), None, "finished finished cancelled"),
        (tried(NO_CALL, NO_CALL, NO_CALL, **LATE), None, "finished finished launch_timeout"),
        (starting(calls=3, attempts=(NO_CALL, NO_CALL)), None, "launch"),
        (starting(calls=4, attempts=(NO_CALL,) * 3, **LATE), None, "look"),
    ],
)
def test_a_launch_is_given_up_only_once_it_is_known_that_nothing_was_started(
    runner: Runner, seen: Observation | None, step: str
) -> None:
    assert told(decide(runner, seen, T + 2, T)) == step


@pytest.mark.parametrize(
    ("runner", "untouched"),
    [
        (queued(), True),
        (starting(), False),
        (tried(NO_CALL), True),
        (tried(NO_CALL, NO_CALL), True),
        (tried(NO_ANSWER), False),
        (tried(NO_ANSWER, NO_CALL), False),
        (tried(NO_CALL, calls=2), False),
    ],
)
def test_an_engine_is_untouched_only_if_every_call_begun_came_back_and_none_acted(runner: Runner, untouched: bool) -> None:  # noqa: FBT001
    assert runner.untouched is untouched


def test_giving_up_names_the_engine_and_every_attempt_and_its_cause() -> None:
    runner = starting(policy=Policy(retry_attempts=2))
    runner = call_failed(runner, "connection refused", acted=False, delay=0.1, now=T)
    runner = call_failed(call_begun(runner), "no answer for 10 s", acted=False, delay=0.3, now=T + 1)
    end = decide(runner, None, T + 2, T)
    assert isinstance(end, Become)
    assert end.runner.message == "local-process: attempt 1: connection refused; attempt 2: no answer for 10 s"
    late = decide(replace(runner, launch_deadline=T), None, T + 2, T)
    assert isinstance(late, Become)
    assert late.runner.message == (
        "local-process: not started within 300 s; attempt 1: connection refused; attempt 2: no answer for 10 s"
    )


# After the engine has said yes.

ACCEPTED = {"starting": yes(), "running": running(), "stopping": stopping()}


@pytest.mark.parametrize("phase", ACCEPTED)
@pytest.mark.parametrize("now", [T + 2, T + 55, T + 10_000])
def test_an_engine_that_was_not_asked_or_cannot_say_is_asked_and_changes_nothing(phase: str, now: float) -> None:
    assert decide(ACCEPTED[phase], None, now, T) == Look()


@pytest.mark.parametrize("phase", ACCEPTED)
@pytest.mark.parametrize("now", [T + 2, T + 10_000])
def test_an_exit_or_a_disappearance_ends_it_in_every_phase_whatever_the_time(phase: str, now: float) -> None:
    runner = ACCEPTED[phase]
    assert decide(runner, EXIT_0, now, T) == Become(ended(runner, Exit(code=0), now), "finished")
    assert decide(runner, Gone(), now, T) == Become(vanished(runner, now), "finished")


@pytest.mark.parametrize(
    ("runner", "seen", "now", "step"),
    [
        (yes(), Starting(), T + 2, "wait 300"),
        (yes(), Starting("pulling"), T + 300, "stopping stopping launch_timeout"),
        (yes(), Running(), T + 2, "running running"),
        (yes(), Running(), T + 300, "running running"),
        (running(), Running(), T + 2, "wait"),
        (running(), Running(), T + 10_000, "wait"),
        (running(), Starting(), T + 2, "wait 300"),
        (stopping(), Running(), T + 52, "order 8"),
        (stopping(), Starting(), T + 52, "order 8"),
        (stopping(replace(CANCEL, sent=True)), Running(), T + 52, "wait 60"),
        (stopping(replace(CANCEL, sent=True)), Running(), T + 60, "order 0"),
        (stopping(replace(CANCEL, sent=True)), Starting(), T + 60, "order 0"),
        (stopping(replace(CANCEL, grace_seconds=0)), Running(), T + 50, "order 0"),
        (stopping(CANCEL, policy=Policy(run_timeout_seconds=1)), Running(), T + 52, "order 8"),
    ],
)
def test_a_live_runner_runs_on_or_is_being_ended(runner: Runner, seen: Observation, now: float, step: str) -> None:
    assert told(decide(runner, seen, now, T)) == step


@pytest.mark.parametrize("seen", [Running, lambda place: Exited(Exit(code=0), place)])
def test_where_it_is_fills_only_what_is_not_known_yet(seen: Callable[[Place], Observation]) -> None:
    for known, told_now, then in (
        ((None, None), ("n1", "sha256:1"), ("n1", "sha256:1")),
        (("n1", None), ("n2", "sha256:2"), ("n1", "sha256:2")),
        (("n1", "sha256:1"), (None, None), ("n1", "sha256:1")),
    ):
        runner = yes(handle=replace(HANDLE, node=known[0], image_digest=known[1]))
        step = decide(runner, seen(Place(node=told_now[0], image_digest=told_now[1])), T + 2, T)
        assert isinstance(step, Become)
        assert step.runner.handle == replace(HANDLE, node=then[0], image_digest=then[1])


TIMED = Policy(run_timeout_seconds=60, heartbeat_timeout_seconds=20)


@pytest.mark.parametrize(
    ("runner", "seen", "now", "step"),
    [
        (running(policy=Policy(run_timeout_seconds=60)), Running(), T + 60.9, "wait 61"),
        (running(policy=Policy(run_timeout_seconds=60)), Running(), T + 61, "stopping stopping deadline_exceeded"),
        (yes(policy=Policy(run_timeout_seconds=60)), Starting(), T + 61, "stopping stopping deadline_exceeded"),
        (running(policy=TIMED), Running(), T + 55, "wait 61"),
        (running(policy=TIMED, last_heartbeat=T + 10), Running(), T + 29, "wait 30"),
        (running(policy=TIMED, last_heartbeat=T + 10), Running(), T + 30, "stopping stopping heartbeat_lost"),
        (running(policy=TIMED, last_heartbeat=T + 50), Running(), T + 60, "wait 61"),
        (running(policy=TIMED, last_heartbeat=T + 30), Running(), T + 70, "stopping stopping heartbeat_lost"),
        (yes(policy=Policy(run_timeout_seconds=900)), Starting(), T + 300, "stopping stopping launch_timeout"),
    ],
)
def test_the_nearest_deadline_is_waited_for_and_the_earliest_missed_names_the_reason(
    runner: Runner, seen: Observation, now: float, step: str
) -> None:
    assert told(decide(runner, seen, now, T)) == step


def test_what_held_a_runner_up_until_its_time_was_over_is_told() -> None:
    step = decide(yes(policy=Policy(run_timeout_seconds=60)), Starting("no node has room"), T + 61, T)
    assert isinstance(step, Become)
    assert step.runner.stop
    assert step.runner.stop.message == "not done 60 s after it was started: no node has room"


@pytest.mark.parametrize(("since", "step"), [(T, "stopping stopping heartbeat_lost"), (T + 35, "wait 55")])
def test_silence_does_not_count_while_the_service_was_down(since: float, step: str) -> None:
    runner = running(policy=Policy(heartbeat_timeout_seconds=20), last_heartbeat=T + 10)
    assert told(decide(runner, Running(), T + 40, since)) == step


def test_a_missed_launch_deadline_tells_what_held_the_runner_up() -> None:
    action = decide(yes(), Starting("ImagePullBackOff: no such tag"), T + 300, T)
    assert isinstance(action, Become)
    assert action.runner.stop == Stop(
        reason=Reason.LAUNCH_TIMEOUT,
        message="not running 300 s after it was asked for: ImagePullBackOff: no such tag",
        at=T + 300,
        grace_seconds=10,
    )


def test_a_finished_runner_is_only_ever_cleaned_up_once() -> None:
    end = finished(running(), None, None, T + 9)
    for seen in (None, Starting(), Running(), EXIT_0, Gone()):
        assert decide(end, seen, T + 9999, T) == CleanUp()
        assert decide(replace(end, cleaned=True), seen, T + 9999, T) == Wait(None)


# The truth of an end.

NEVER = None
OURS = Stop(reason=Reason.DEADLINE_EXCEEDED, message="not done 60 s after it was started", at=T + 61, grace_seconds=10)


@pytest.mark.parametrize(
    ("end", "reason", "oom_killed"),
    [
        (Exit(code=0), None, False),
        (Exit(code=7), Reason.EXIT_NONZERO, False),
        (Exit(code=-1), Reason.EXIT_NONZERO, False),
        (Exit(code=137), Reason.EXIT_NONZERO, False),
        (Exit(code=143), Reason.EXIT_NONZERO, False),
        (Exit(signal="SIGKILL"), Reason.SIGNALLED, False),
        (Exit(code=137, oom_killed=True), Reason.OOM_KILLED, True),
        (Exit(signal="SIGKILL", oom_killed=True), Reason.OOM_KILLED, True),
        (Exit(code=1, oom_killed=True), Reason.OOM_KILLED, True),
        (Exit(code=0, oom_killed=True), None, False),
        (Exit(code=0, oom_killed=True, reason=Reason.OOM_KILLED), None, False),
        (Exit(), Reason.LOST, False),
        (Exit(oom_killed=True), Reason.LOST, False),
        (Exit(code=137, reason=Reason.EVICTED), Reason.EVICTED, False),
        (Exit(reason=Reason.NODE_LOST), Reason.NODE_LOST, False),
        (Exit(code=137, oom_killed=True, reason=Reason.OOM_KILLED), Reason.OOM_KILLED, True),
        (Exit(code=143, reason=Reason.DEADLINE_EXCEEDED), Reason.DEADLINE_EXCEEDED, False),
    ],
)
def test_an_end_of_its_own_is_told_as_the_engine_tells_it(end: Exit, reason: Reason | None, oom_killed: bool) -> None:  # noqa: FBT001
    runner = ended(running(), end, T + 100)
    assert (runner.reason, runner.oom_killed) == (reason, oom_killed)
    assert (runner.exit_code, runner.signal) == (end.code, end.signal)
    assert runner.state is (State.FAILED if reason else State.COMPLETED)
    assert (runner.message is None) is (reason is None)


@pytest.mark.parametrize("stop", [CANCEL, OURS], ids=lambda stop: stop.reason)
@pytest.mark.parametrize(
    ("end", "ours"),
    [
        (Exit(code=0, stopped=True), True),
        (Exit(code=5, stopped=True), True),
        (Exit(signal="SIGKILL", stopped=True), True),
        (Exit(code=137, oom_killed=True, stopped=True), True),
        (Exit(stopped=True), True),
        (Exit(code=0, stopped=True, finished_at=T + 10), True),
        (Exit(code=0, stopped=False), False),
        (Exit(code=5, stopped=False), False),
        (Exit(code=0, stopped=False, finished_at=T + 99), False),
        (Exit(code=0), True),
        (Exit(code=0, finished_at=T + 99), True),
        (Exit(code=0, finished_at=T + 10), False),
        (Exit(code=5, finished_at=T + 10), False),
    ],
)
def test_our_order_wins_over_the_code_unless_the_program_ended_before_the_order_reached_it(
    stop: Stop,
    end: Exit,
    ours: bool,  # noqa: FBT001
) -> None:
    runner = ended(stopping(stop), end, T + 100)
    if ours:
        assert (runner.reason, runner.message) == (stop.reason, stop.message)
    else:
        assert runner.reason is (Reason.EXIT_NONZERO if end.code else None)
    assert (runner.exit_code, runner.signal) == (end.code, end.signal)


@pytest.mark.parametrize(
    ("end", "at"),
    [
        (Exit(code=0), T + 100),
        (Exit(code=0, finished_at=T + 40), T + 40),
        (Exit(code=0, finished_at=T - 40), T + 1),
    ],
)
def test_an_end_is_dated_by_the_engine_and_never_before_the_start(end: Exit, at: float) -> None:
    assert ended(running(), end, T + 100).finished_at == at


def test_the_engines_own_words_are_the_message() -> None:
    end = Exit(code=137, reason=Reason.EVICTED, message="The node was low on resource: memory.")
    assert ended(running(), end, T).message == "The node was low on resource: memory."


def test_a_truncated_log_is_remembered() -> None:
    assert ended(running(), Exit(code=0, log_truncated=True), T).log_truncated
    assert ended(running(log_truncated=True), Exit(code=0), T).log_truncated


def test_what_vanished_is_lost_and_never_completed() -> None:
    runner = vanished(running(), T + 9)
    assert (runner.state, runner.reason, runner.exit_code) == (State.FAILED, Reason.LOST, None)
    assert vanished(stopping(), T + 99).reason is Reason.CANCELLED


# How a runner changes.


def test_a_stop_is_asked_of_every_phase_in_its_own_way() -> None:
    assert stop_asked(queued(), "why", 5, T + 3).reason is Reason.CANCELLED
    unaccepted = stop_asked(starting(), "why", 5, T + 3)
    assert (unaccepted.phase, unaccepted.state) == (Phase.STARTING, State.PENDING)
    for runner in (yes(), running()):
        asked = stop_asked(runner, "why", 5, T + 3)
        assert asked.phase is Phase.STOPPING
        assert asked.stop == Stop(reason=Reason.CANCELLED, message="why", at=T + 3, grace_seconds=5)
    end = finished(running(), None, None, T)
    assert stop_asked(end, "why", 5, T + 3) is end


def test_an_order_that_comes_late_is_still_polite_first() -> None:
    runner = stopping()
    assert told(decide(runner, Running(), T + 500, T)) == "order 10"
    sent = stop_sent(runner, T + 500)
    assert told(decide(sent, Running(), T + 509, T)) == "wait 510"
    assert told(decide(sent, Running(), T + 510, T)) == "order 0"
    hurried = stop_asked(runner, "now", 0, T + 500)
    assert told(decide(hurried, Running(), T + 501, T)) == "order 0"


def test_an_order_given_after_the_clock_was_set_back_has_its_grace_from_then_on_and_no_more() -> None:
    runner = stopping()
    assert told(decide(runner, Running(), T - 3600, T)) == "order 10"
    sent = stop_sent(runner, T - 3600)
    assert told(decide(sent, Running(), T - 3591, T)) == "wait -3590"
    assert told(decide(sent, Running(), T - 3590, T)) == "order 0"


def test_a_launch_that_is_out_of_tries_bears_the_reason_of_the_last() -> None:
    runner = starting()
    for reason in (Reason.ENGINE_UNAVAILABLE, Reason.ENGINE_UNAVAILABLE, Reason.IMAGE_PULL_FAILED):
        runner = call_failed(
            call_begun(runner) if runner.attempts else runner, "no", acted=False, delay=1, now=T, reason=reason
        )
    action = decide(runner, None, T + 5, T)
    assert isinstance(action, Become)
    assert action.runner.reason is Reason.IMAGE_PULL_FAILED


def test_a_launch_that_took_too_long_says_what_it_was_at() -> None:
    runner = progressed(starting(), "pulling busybox: 3 of 9 MiB")
    action = decide(runner, Gone(), runner.launch_deadline + 1, T)
    assert isinstance(action, Become)
    assert action.runner.reason is Reason.LAUNCH_TIMEOUT
    assert "pulling busybox: 3 of 9 MiB" in str(action.runner.message)


def test_asking_to_stop_again_only_ever_shortens_the_patience() -> None:
    runner = stop_sent(stopping(), T + 50)
    assert stop_asked(runner, "again", 10, T + 55) is runner
    assert stop_asked(runner, "again", 5, T + 55) is runner
    sooner = stop_asked(runner, "again", 2, T + 55).stop
    assert sooner == replace(CANCEL, grace_seconds=7, sent=False)
    now = stop_asked(runner, "again", 0, T + 55)
    assert told(decide(now, Running(), T + 55, T)) == "order 0"


def test_asking_to_stop_does_not_change_why_a_runner_is_being_ended() -> None:
    runner = stopping(OURS)
    asked = stop_asked(runner, "by hand", 0, T + 62)
    assert asked.stop is not None
    assert (asked.stop.reason, asked.stop.message) == (OURS.reason, OURS.message)


def test_a_stop_asked_while_launching_starts_with_the_engines_yes() -> None:
    runner = accepted(stop_asked(starting(), "why", 5, T + 3), HANDLE, T + 4)
    assert (runner.phase, runner.started_at, runner.handle) == (Phase.STOPPING, T + 4, HANDLE)
    assert accepted(starting(), HANDLE, T + 4).phase is Phase.STARTING


def test_a_place_in_the_pool_starts_the_time_to_launch_anew() -> None:
    runner = admitted(queued(), T + 200)
    assert (runner.phase, runner.calls, runner.launch_deadline) == (Phase.STARTING, 1, T + 500)
    assert decide(runner, None, T + 200, T) == Launch()


def test_a_rejected_launch_ends_at_once_with_the_engines_reason_and_counts_as_an_attempt() -> None:
    runner = rejected(tried(NO_CALL, calls=2), Reason.IMAGE_NOT_FOUND, "no such image", T + 5)
    assert (runner.phase, runner.reason, runner.retryable) == (Phase.FINISHED, Reason.IMAGE_NOT_FOUND, False)
    assert runner.message == "local-process: no such image"
    assert [(attempt.number, attempt.retryable) for attempt in runner.attempts] == [(1, True), (2, False)]


def test_the_last_attempt_announces_no_delay() -> None:
    runner = starting(policy=Policy(retry_attempts=2))
    runner = call_failed(runner, "no", acted=True, delay=0.5, now=T)
    assert (runner.attempts[-1].delay_seconds, runner.next_attempt_at) == (0.5, T + 0.5)
    runner = call_failed(call_begun(runner), "no", acted=True, delay=0.5, now=T + 1)
    assert [attempt.number for attempt in runner.attempts] == [1, 2]
    assert runner.attempts[-1].delay_seconds is None


@pytest.mark.parametrize(
    ("runner", "state"),
    [
        (queued(), State.PENDING),
        (starting(), State.PENDING),
        (starting(stop=CANCEL), State.PENDING),
        (yes(), State.RUNNING),
        (running(), State.RUNNING),
        (stopping(), State.RUNNING),
        (finished(running(), None, None, T), State.COMPLETED),
        (finished(running(), Reason.LOST, "", T), State.FAILED),
        (finished(queued(), Reason.CANCELLED, "", T), State.FAILED),
    ],
)
def test_the_dispatcher_is_told_one_of_four_states(runner: Runner, state: State) -> None:
    assert runner.state is state


def test_the_states_phases_and_reasons_are_those_of_the_contract() -> None:
    assert [*State] == ["pending", "running", "completed", "failed"]
    assert [*Phase] == ["queued", "starting", "running", "stopping", "finished"]
    assert set(LIVE) == set(Phase) - {Phase.FINISHED}
    assert set(PLACED) == set(LIVE) - {Phase.QUEUED}
    words = """exit_nonzero signalled oom_killed cancelled deadline_exceeded heartbeat_lost launch_rejected
        launch_timeout queue_timeout engine_unavailable image_not_found image_pull_failed config_error init_failed
        unschedulable quota_exceeded evicted preempted node_lost deleted lost"""
    assert set(words.split()) <= set(Reason)


@pytest.mark.parametrize("reason", Reason)
def test_whether_to_ask_again_is_a_property_of_the_reason(reason: Reason) -> None:
    its_own_or_its_callers_doing = {"exit_nonzero", "signalled", "oom_killed", "cancelled", "deadline_exceeded"}
    never_will = {"launch_rejected", "image_not_found", "config_error", "init_failed"}
    assert reason.retryable is (reason not in its_own_or_its_callers_doing | never_will)
    assert finished(running(), reason, "", T).retryable is reason.retryable


def test_nobody_can_say_yet_whether_to_ask_again_while_a_runner_lives_or_when_it_completed() -> None:
    assert running().retryable is None
    assert finished(running(), None, None, T).retryable is None


# Whatever happens, in whatever order.

SEEN: tuple[Observation | None, ...] = (
    None,
    Starting(),
    Starting("no node"),
    Running(),
    EXIT_0,
    Exited(Exit()),
    Exited(Exit(signal="SIGTERM", stopped=True)),
    Gone(),
)
RUNNERS = [
    replace(runner, stop=stop, policy=policy, last_heartbeat=beat)
    for runner in (queued(), starting(), tried(NO_CALL), tried(NO_ANSWER), tried(*(NO_CALL,) * 3), yes(), running())
    for stop in (None, CANCEL, replace(CANCEL, sent=True))
    for policy in (Policy(), TIMED)
    for beat in (None, T + 10)
]


@pytest.mark.parametrize("seen", SEEN, ids=repr)
def test_no_phase_observation_request_or_deadline_leads_to_an_illegal_step(seen: Observation | None) -> None:
    times = (T, T + 1, T + 30, T + 60, T + 61, T + 300, T + 10_000)
    for runner, now, since in itertools.product(RUNNERS, times, (T, T + 50)):
        start = replace(runner, phase=Phase.STOPPING) if runner.stop and runner.accepted else runner
        check_step(start, seen, decide(start, seen, now, since), now)


def check_step(runner: Runner, seen: Observation | None, action: Action, now: float) -> None:
    """Assert what must hold of every step in every situation."""
    match action:
        case Launch():
            assert runner.phase is Phase.STARTING
            assert not runner.accepted
            assert not isinstance(seen, Gone) or runner.calls > len(runner.attempts)
        case Order():
            assert isinstance(seen, Starting | Running)
            assert runner.stop is not None
        case Admit():
            assert runner.phase is Phase.QUEUED
        case CleanUp():
            assert runner.phase is Phase.FINISHED
        case Wait(until=until):
            assert until is None or until > now
            assert runner.phase is not Phase.QUEUED
        case Look():
            assert not isinstance(seen, Gone)
            assert seen is None or not runner.accepted
        case Become(runner=changed, discard=discard):
            assert ORDER.index(changed.phase) >= ORDER.index(runner.phase)
            assert changed.phase is not Phase.FINISHED or not runner.accepted or isinstance(seen, Exited | Gone)
            if changed.phase is Phase.FINISHED and not runner.accepted:
                assert runner.untouched or isinstance(seen, Gone | Starting)
                assert discard is not runner.untouched
        case _:
            assert_never(action)


ORDER = [*Phase]


@dataclass
class Life:
    """A runner driven as the reconciler drives it, by an engine that answers anything."""

    runner: Runner
    now: float = T
    yeses: int = 0
    history: list[Runner] = field(default_factory=list)

    def become(self, runner: Runner) -> None:
        self.history.append(self.runner)
        self.runner = runner


@st.composite
def endings(draw: st.DrawFn) -> Exit:
    return Exit(
        code=draw(st.sampled_from([None, 0, 0, 1, 137])),
        signal=draw(st.sampled_from([None, None, "SIGKILL"])),
        oom_killed=draw(st.booleans()),
        stopped=draw(st.sampled_from([None, True, False])),
        finished_at=draw(st.sampled_from([None, T - 5, T + 30, T + 500])),
        reason=draw(st.sampled_from([None, None, Reason.EVICTED])),
    )


SIGHTS = st.one_of(st.none(), st.just(Starting()), st.just(Running()), endings().map(Exited), st.just(Gone()))
POLICIES = st.builds(
    Policy,
    launch_timeout_seconds=st.sampled_from([5.0, 300.0]),
    run_timeout_seconds=st.sampled_from([None, 60.0]),
    heartbeat_timeout_seconds=st.sampled_from([None, 20.0]),
    retry_attempts=st.integers(1, 3),
)


@settings(max_examples=300)
@given(data=st.data(), policy=POLICIES, wait_first=st.booleans())
def test_a_runner_has_one_end_and_tells_it_once_whatever_happens_in_whatever_order(
    data: st.DataObject,
    policy: Policy,
    wait_first: bool,  # noqa: FBT001
) -> None:
    life = Life(replace(queued() if wait_first else starting(), policy=policy))
    for _ in range(data.draw(st.integers(1, 40))):
        life.now += data.draw(st.sampled_from([0, 0, 1, 15, 100]))
        if data.draw(st.integers(0, 9)) == 0:
            life.become(stop_asked(life.runner, "by hand", data.draw(st.sampled_from([0, 10])), life.now))
        if data.draw(st.integers(0, 9)) == 0 and life.runner.phase is not Phase.FINISHED:
            life.runner = replace(life.runner, last_heartbeat=life.now)
        take_step(life, data)
        check_life(life)
    event(f"ends {life.runner.phase} {life.runner.reason}")


def take_step(life: Life, data: st.DataObject) -> None:
    runner, seen = life.runner, data.draw(SIGHTS)
    action = decide(runner, seen, life.now, T)
    check_step(runner, seen, action, life.now)
    match action:
        case Become(runner=changed):
            life.become(changed)
        case Admit():
            life.become(admitted(runner, life.now))
        case Order(grace=grace) if grace > 0:
            life.become(stop_sent(runner, life.now))
        case CleanUp():
            life.runner = replace(runner, cleaned=True)
        case Launch():
            match data.draw(st.sampled_from(["yes", "no", "unknown", "refused", "called off"])):
                case "yes":
                    life.yeses += 1
                    life.become(accepted(runner, HANDLE, life.now))
                case "no":
                    life.become(rejected(runner, Reason.LAUNCH_REJECTED, "no such command", life.now))
                case "unknown":
                    life.become(call_failed(runner, "timed out", acted=True, delay=1, now=life.now))
                case "refused":
                    life.become(call_failed(runner, "refused", acted=False, delay=1, now=life.now))
                case "called off" | _:
                    pass
        case Order() | Look() | Wait():
            pass
        case _:
            assert_never(action)


def check_life(life: Life) -> None:
    runner = life.runner
    done = runner.phase is Phase.FINISHED
    assert (runner.reason is not None) is (runner.state is State.FAILED)
    assert (runner.state in {State.COMPLETED, State.FAILED}) is done
    assert (runner.finished_at is not None) is done
    assert (runner.started_at is not None) is (runner.handle is not None) is (life.yeses == 1)
    assert life.yeses <= 1
    assert runner.state is not State.COMPLETED or (runner.exit_code == 0 and runner.signal is None)
    assert not runner.oom_killed or runner.exit_code or runner.signal
    assert runner.finished_at is None or runner.finished_at >= runner.created_at
    ends = [past for past in life.history if past.phase is Phase.FINISHED]
    assert all(replace(runner, cleaned=past.cleaned) == past for past in ends)
    phases = [ORDER.index(past.phase) for past in (*life.history, runner)]
    assert phases == sorted(phases)


def test_the_reason_of_a_newer_version_is_kept_as_it_is() -> None:
    """Replicas of two versions share a database while one takes over from the other."""
    reason = TypeAdapter(Reason).validate_json('"sunburnt"')
    assert (reason, str(reason), reason.retryable) == ("sunburnt", "sunburnt", False)
    assert TypeAdapter(Reason).dump_json(reason) == b'"sunburnt"'
