"""What became of a runner, in plain words: what happened, the likely cause, what says so, and what to do next.

Pure: from what is recorded and the last lines of the log to a text. It asks nobody and decides nothing. What only looks
likely is called so; the evidence is there for whoever wants to judge alone.
"""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, assert_never

from app.events import Event
from app.launcher import Handle
from app.reason import Reason
from app.runner import Phase, Runner

EVENTS = 5
"""How many of the last events are shown as evidence."""

LINE = 400
"""How much of one line is shown."""

NOT_FOUND, NOT_EXECUTABLE, SIGNAL_BASE = 127, 126, 128

Source = Literal["engine", "attempt", "limits", "event", "log"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """One thing that was seen, and where."""

    source: Source
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What happened to a runner."""

    summary: str
    likely_cause: str
    evidence: tuple[Evidence, ...]
    next_step: str


def diagnose(runner: Runner, events: Sequence[Event], log: Sequence[str], *, away: bool) -> Diagnosis:
    """Explain a runner by its record, its events (the first one first) and the last lines of its output.

    ``away``: its engine does not answer.
    """
    cause, next_step = _live(runner, away=away) if runner.phase is not Phase.FINISHED else _ended(runner, log)
    evidence = (*_engine(runner), *_attempts(runner), *_limits(runner), *_events(events), *_lines(log))
    return Diagnosis(summary=_summary(runner), likely_cause=cause, evidence=evidence, next_step=next_step)


def _summary(runner: Runner) -> str:
    name = f"{runner.runner_id} (task {runner.task_id}, pool {runner.pool_name})"
    if runner.phase is not Phase.FINISHED:
        return f"{name} is {runner.phase}"
    if runner.reason is None:
        return f"{name} completed{_duration(runner)}"
    return f"{name} failed{_duration(runner)}: {runner.reason}" + (f": {runner.message}" if runner.message else "")


def _duration(runner: Runner) -> str:
    if runner.started_at is None or runner.finished_at is None:
        return ""
    return f" after {max(0.0, runner.finished_at - runner.started_at):.1f} s"


# Why, and what now.


def _live(runner: Runner, *, away: bool) -> tuple[str, str]:
    if away and not runner.accepted:
        return (
            f"{runner.engine} does not answer; the launch was accepted, and is tried again within its attempts and its time",
            f"bring {runner.engine} back (GET /engines says since when it is away and why), or stop the runner",
        )
    if away:
        return (
            f"{runner.engine} does not answer, so this may be out of date; the runner itself most likely goes on",
            f"bring {runner.engine} back; only if it is gone for good, end the record with DELETE ...?force=true",
        )
    match runner.phase:
        case Phase.QUEUED:
            return (
                f"pool {runner.pool_name} has no place for it yet",
                "wait, raise the pool's limits, or stop something in it",
            )
        case Phase.STARTING if runner.attempts:
            calls = "1 launch call" if len(runner.attempts) == 1 else f"{len(runner.attempts)} launch calls"
            return (
                f"{calls} failed so far; what can pass is tried again until its time is over",
                "read the attempts below; if the last error will not pass by itself, mend its cause or stop the runner",
            )
        case Phase.STARTING if not runner.accepted:
            return "the engine has not accepted the launch yet", "wait"
        case Phase.STARTING:
            return (
                "the engine has accepted it and not started it yet: an image is pulled, or a node is looked for",
                "wait; when its time to launch is over it ends as launch_timeout, with what held it up",
            )
        case Phase.RUNNING:
            return "it runs", "nothing; follow its log with GET .../logs?follow=true"
        case _:
            why = f": {runner.stop.message}" if runner.stop else ""
            return f"it was told to end{why}", "wait; it is killed when its grace is over"


def _ended(runner: Runner, log: Sequence[str]) -> tuple[str, str]:  # a flat list, one entry for each reason
    policy, config = runner.policy, f"pool {runner.pool_name}"
    match runner.reason:
        case None:
            return "its program ended with exit code 0", "nothing; what it did is in its slot and in its log"
        case Reason.EXIT_NONZERO:
            return _exit(runner, log)
        case Reason.SIGNALLED:
            return _signal(runner)
        case Reason.OOM_KILLED:
            limit = "its limit" if runner.memory_mib is None else f"{runner.memory_mib} MiB"
            return (
                f"it used more memory than {limit}, and the kernel killed it",
                f"give it more (memory_quota or resources of {config}) or a smaller task; the same launch ends the same",
            )
        case Reason.CANCELLED:
            return f"somebody asked for its end: {runner.message or 'it does not say who'}", "nothing, if that was meant"
        case Reason.DEADLINE_EXCEEDED:
            return (
                f"it was not done {_seconds(policy.run_timeout_seconds)} after its start (run_timeout_seconds of {config})",
                "see in message and log whether it waited, hung or was slow; raise the limit, or make the task smaller",
            )
        case Reason.HEARTBEAT_LOST:
            return (
                f"it was silent for {_seconds(policy.heartbeat_timeout_seconds)}: it hung, or could not reach this service",
                "see where its log stops, and whether it could reach RUNNER_LAUNCHER_URL; then launch it again",
            )
        case Reason.LAUNCH_REJECTED:
            return (
                f"{runner.engine} refused the launch for good: what {config} or the task asks for cannot be done there",
                f"mend what the message names, in {config} or in the request; the same launch is refused again",
            )
        case Reason.LAUNCH_TIMEOUT:
            return (
                f"it was not running after {_seconds(policy.launch_timeout_seconds)} (launch_timeout_seconds)",
                "see what held it up: failed attempts, a slow pull, no node with room; then launch it again",
            )
        case Reason.QUEUE_TIMEOUT:
            return (
                f"no place in {config} became free within {_seconds(policy.launch_timeout_seconds)}",
                "raise max_concurrency or the quotas of the pool, see at GET /pools what fills it, or launch it again later",
            )
        case Reason.ENGINE_UNAVAILABLE:
            return (
                f"{runner.engine} did not take the launch in {len(runner.attempts)} attempts; surely nothing was started",
                f"bring {runner.engine} back (GET /engines says whether it answers), then launch it again",
            )
        case Reason.IMAGE_NOT_FOUND:
            return (
                f"the image of {config} is not where it is looked for, or its registry hides it from these credentials",
                "check its name and tag, push it, or give the pool credentials for its registry; then launch it again",
            )
        case Reason.IMAGE_PULL_FAILED:
            return (
                f"the image of {config} exists perhaps, and could not be pulled: the registry or the way to it failed",
                "see the engine's words below; mostly it passes, so launch it again",
            )
        case Reason.CONFIG_ERROR:
            return (
                f"{config} asks for what this installation or its engine does not have, such as a secret or a library",
                f"mend {config}, or install what is missing; the same launch fails again",
            )
        case Reason.INIT_FAILED:
            return (
                "what prepares its workspace, such as the git clone, failed before its own program started",
                "see the log and the engine's words below; check repo_url, branch and credentials, then launch it again",
            )
        case Reason.UNSCHEDULABLE:
            return (
                "no node had room for it, or none matches what the pool asks for",
                f"add nodes, or ask for less in {config} (resources, node_selector, tolerations); then launch it again",
            )
        case Reason.QUOTA_EXCEEDED:
            return (
                "the namespace's quota does not allow one more of its size",
                "wait until others there have ended, raise the quota, or ask for less; then launch it again",
            )
        case Reason.EVICTED:
            return (
                "its node ran out of memory, disk or process numbers, and put it out",
                f"launch it again; if it happens often, ask for what it really needs in resources of {config}",
            )
        case Reason.PREEMPTED:
            return (
                "its node needed the room for something of higher priority, or was taken out of service",
                "launch it again; a higher priorityClassName in the pool's job_template protects it",
            )
        case Reason.NODE_LOST:
            return (
                "its node is gone or no longer answers, so how far it came is unknown",
                "see that the node is really gone, for the runner may still have written somewhere; then launch it again",
            )
        case Reason.DELETED:
            return (
                "somebody other than this service deleted it on its engine",
                "find out who cleans up there and spares nothing of ours; then launch it again",
            )
        case Reason.LOST:
            return (
                "nobody can tell how it ended: its engine no longer knows it, or its record was given up by hand",
                "look at its slot before it is used again, for the task may be half done; then launch it again",
            )
        case _:
            assert_never(runner.reason)


def _exit(runner: Runner, log: Sequence[str]) -> tuple[str, str]:
    code = runner.exit_code or 0
    if code == NOT_FOUND:
        return (
            "127 is what a shell says of a program that it cannot find, or of a script whose interpreter is missing",
            "check the command and what it calls, and the PATH where the runner runs",
        )
    if code == NOT_EXECUTABLE:
        return (
            "126 is what a shell says of a file that it may not execute",
            "check that the file is executable, and its file system not mounted noexec",
        )
    if code > SIGNAL_BASE and (name := _signal_name(code - SIGNAL_BASE)):
        return (
            f"{code} tells that a program of its own was ended by {name}; nothing says that its memory limit did that",
            "see in its log which of its programs was ended; if it may have been memory, look at the kernel's log",
        )
    if "Traceback (most recent call last):" in log:
        return (
            "its program ended by an exception of its own, told in its log",
            "mend what the log says, then launch it again",
        )
    return (
        f"its program ended by itself with code {code}, which only the program can explain",
        "read its log from the end; the launcher did what it should",
    )


def _signal(runner: Runner) -> tuple[str, str]:
    match runner.signal:
        case "SIGKILL":
            return (
                "somebody other than the launcher killed it; a machine that runs out of memory does that too",
                "look at the kernel's log (dmesg) and at who else ends processes there; then launch it again",
            )
        case "SIGSEGV" | "SIGBUS" | "SIGILL" | "SIGFPE" | "SIGABRT" as name:
            return (
                f"its program broke ({name}): a defect in it or in a library that it uses",
                "see its log; the same task may well break it again",
            )
        case name:
            return (
                f"it was sent {name or 'a signal'}, and not by the launcher",
                "find out who ends processes there; then launch it again",
            )


def _signal_name(number: int) -> str | None:
    try:
        return signal.Signals(number).name
    except ValueError:
        return None


def _seconds(seconds: float | None) -> str:
    return "its time" if seconds is None else f"{seconds:g} s"


# What says so.


def _engine(runner: Runner) -> Iterator[Evidence]:
    handle = runner.handle or Handle(runner_id=runner.runner_id)
    where = handle.container_id or handle.job_name or (f"process {handle.pid}" if handle.pid else None)
    parts = {
        "it was": where and f"{where} on {handle.node}" if handle.node else where,
        "exit code": None if runner.exit_code is None else str(runner.exit_code),
        "signal": runner.signal,
        "out of memory": "yes" if runner.oom_killed else None,
        "image": handle.image_digest,
    }
    said = ", ".join(f"{name} {value}" for name, value in parts.items() if value)
    if said:
        yield Evidence("engine", f"{runner.engine}: {said}")
    if runner.log_truncated:
        yield Evidence("log", "the oldest part of the log was dropped, because the log is capped")


def _attempts(runner: Runner) -> Iterator[Evidence]:
    for attempt in runner.attempts:
        yield Evidence("attempt", f"{_time(attempt.at)}: attempt {attempt.number}: {_clipped(attempt.error)}")


def _limits(runner: Runner) -> Iterator[Evidence]:
    enforced = (runner.handle or Handle(runner_id=runner.runner_id)).enforced_by
    if runner.cpu is not None:
        yield Evidence("limits", f"{runner.cpu:g} core{'s' * (runner.cpu != 1)}, {_held(enforced.cpu)}")
    if runner.memory_mib is not None:
        yield Evidence("limits", f"{runner.memory_mib} MiB, {_held(enforced.memory_mib)}")


def _held(by: str) -> str:
    return "which nothing enforces" if by == "none" else f"enforced by {by}"


def _events(events: Sequence[Event]) -> Iterator[Evidence]:
    for event in events[-EVENTS:]:
        why = ": ".join(filter(None, (event.reason, event.message)))
        yield Evidence("event", f"{_time(event.at)}: {_what(event)}" + (f": {_clipped(why)}" if why else ""))


def _what(event: Event) -> str:
    """Say what kind of event it was, and the step from phase to phase where it was one."""
    if event.from_phase in (None, event.to_phase):
        return event.type
    step = f"{event.from_phase} -> {event.to_phase}"
    return step if event.type == event.to_phase else f"{event.type}, {step}"


def _lines(log: Sequence[str]) -> Iterator[Evidence]:
    for line in log:
        yield Evidence("log", _clipped(line))


def _clipped(text: str) -> str:
    return text if len(text) <= LINE else f"{text[:LINE]}..."


def _time(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}"
