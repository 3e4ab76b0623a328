"""What is said of a runner in plain words: for every reason, with evidence, and over HTTP."""

from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from conftest import Service, finished, launch_body, launched, local_pool, problem, until

from app.diagnosis import LINE, Diagnosis, Evidence, diagnose
from app.events import Event
from app.launcher import Enforcement, Handle
from app.reason import Reason
from app.runner import Attempt, Phase, Policy, Runner, Stop

T = 1_767_600_000.0
RUNNER = Runner(
    runner_id="runner-00000000002a",
    task_id="7",
    pool_name="agents",
    slot_id="slot-1",
    engine="docker:unix:///var/run/docker.sock",
    phase=Phase.RUNNING,
    created_at=T,
    launch_deadline=T + 300,
    policy=Policy(run_timeout_seconds=60, heartbeat_timeout_seconds=20),
    started_at=T + 1,
    memory_mib=512,
    handle=Handle(runner_id="runner-00000000002a", container_id="c0ffee", enforced_by=Enforcement(memory_mib="engine")),
)


def ended(reason: Reason | None, message: str | None = "the engine's words", **facts: object) -> Runner:
    return replace(RUNNER, phase=Phase.FINISHED, reason=reason, message=message, finished_at=T + 11, **facts)  # type: ignore[arg-type]


def explained(runner: Runner, *log: str, away: bool = False) -> Diagnosis:
    event = Event(
        runner_id=runner.runner_id, at=T, type="finished", from_phase=Phase.RUNNING, to_phase=runner.phase, revision=1
    )
    return diagnose(runner, [event], log, away=away)


def texts(diagnosis: Diagnosis, source: str) -> list[str]:
    return [evidence.text for evidence in diagnosis.evidence if evidence.source == source]


def test_every_reason_has_a_cause_and_a_next_step_of_its_own() -> None:
    said = {reason: explained(ended(reason, exit_code=3)) for reason in Reason}
    assert len({each.likely_cause for each in said.values()}) == len(Reason)
    for reason, each in said.items():
        assert each.summary == (
            f"runner-00000000002a (task 7, pool agents) failed after 10.0 s: {reason}: the engine's words"
        )
        assert len(each.likely_cause) > 20
        assert each.next_step
        assert "None" not in f"{each.likely_cause} {each.next_step}"


@pytest.mark.parametrize("reason", Reason)
def test_what_may_pass_is_to_be_launched_again_and_nothing_else(reason: Reason) -> None:
    step = explained(ended(reason, exit_code=3)).next_step
    if reason.retryable:
        assert "launch it again" in step
    elif reason in {Reason.OOM_KILLED, Reason.LAUNCH_REJECTED, Reason.CONFIG_ERROR}:
        assert "launch it again" not in step


def test_who_completed_needs_nothing() -> None:
    said = explained(ended(None, None, exit_code=0), "done")
    assert said.summary == "runner-00000000002a (task 7, pool agents) completed after 10.0 s"
    assert said.next_step.startswith("nothing")
    assert texts(said, "log") == ["done"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (127, "cannot find"),
        (126, "may not execute"),
        (137, "ended by SIGKILL; nothing says that its memory limit did that"),
        (143, "ended by SIGTERM"),
        (3, "only the program can explain"),
        (255, "only the program can explain"),
    ],
)
def test_an_exit_code_is_explained_as_far_as_it_can_be(code: int, words: str) -> None:
    assert words in explained(ended(Reason.EXIT_NONZERO, exit_code=code)).likely_cause


def test_an_exception_in_the_log_is_noticed() -> None:
    said = explained(ended(Reason.EXIT_NONZERO, exit_code=1), "Traceback (most recent call last):", "KeyError: 'x'")
    assert "exception" in said.likely_cause


@pytest.mark.parametrize(
    ("name", "words"),
    [("SIGKILL", "out of memory"), ("SIGSEGV", "defect"), ("SIGUSR1", "it was sent SIGUSR1"), (None, "a signal")],
)
def test_a_signal_is_explained(name: str | None, words: str) -> None:
    assert words in explained(ended(Reason.SIGNALLED, signal=name)).likely_cause


def test_the_evidence_is_what_is_on_record() -> None:
    attempt = Attempt(number=1, at=T, error="refused " * 100, retryable=True)
    said = explained(ended(Reason.OOM_KILLED, exit_code=137, oom_killed=True, attempts=(attempt,)), "one", "x" * 1000)
    assert texts(said, "engine") == [f"{RUNNER.engine}: it was c0ffee, exit code 137, out of memory yes"]
    assert texts(said, "limits") == ["512 MiB, enforced by engine"]
    assert texts(said, "log") == ["one", "x" * LINE + "..."]
    assert texts(said, "attempt")[0].startswith("2026-01-05T08:00:00Z: attempt 1: refused refused")
    assert said.evidence[-3] == Evidence("event", "2026-01-05T08:00:00Z: running -> finished")
    assert "512 MiB" in said.likely_cause


@pytest.mark.parametrize(
    ("runner", "words"),
    [
        (replace(RUNNER, phase=Phase.QUEUED, started_at=None), "no place"),
        (replace(RUNNER, phase=Phase.STARTING, started_at=None), "not accepted the launch yet"),
        (replace(RUNNER, phase=Phase.STARTING), "not started it yet"),
        (
            replace(RUNNER, phase=Phase.STARTING, attempts=(Attempt(number=1, at=T, error="no", retryable=True),)),
            "1 launch call failed",
        ),
        (RUNNER, "it runs"),
        (
            replace(
                RUNNER,
                phase=Phase.STOPPING,
                stop=Stop(reason=Reason.CANCELLED, message="stopped by ann", at=T, grace_seconds=1),
            ),
            "told to end: stopped by ann",
        ),
    ],
)
def test_a_live_runner_is_explained_too(runner: Runner, words: str) -> None:
    assert words in explained(runner).likely_cause
    assert explained(runner).summary.endswith(f"is {runner.phase}")
    assert "does not answer" in explained(runner, away=True).likely_cause


# Over HTTP.


async def test_a_diagnosis_shows_what_happened_and_the_last_lines(client: httpx.AsyncClient, slot: Path) -> None:
    runner = await finished(client, await launched(client, launch_body(slot, "seq 100; exec ./no-such-program")))
    answer = await client.get(runner["links"]["diagnosis"])
    said = answer.json()
    assert answer.status_code == 200
    assert (said["runner_id"], said["state"], said["reason"]) == (runner["runner_id"], "failed", "exit_nonzero")
    assert "cannot find" in said["likely_cause"]
    log = [each["text"] for each in said["evidence"] if each["source"] == "log"]
    assert len(log) == 20
    assert log[0] == "82"
    assert "no-such-program" in log[-1]
    text = (await client.get(runner["links"]["diagnosis"], headers={"Accept": "text/plain"})).text
    assert text.splitlines()[0] == said["summary"]
    assert [line for line in text.splitlines() if line.startswith("next step: ")]


async def test_a_launch_that_failed_is_diagnosed(service: Service, slot: Path) -> None:
    async with service({"local": local_pool(command=["no-such-command"])}) as client:
        runner = problem(await client.post("/runners", json=launch_body(slot)), 422, "launch-rejected")["runner"]
        said = (await client.get(runner["links"]["diagnosis"])).json()
        assert "refused the launch for good" in said["likely_cause"]
        assert any("no-such-command" in each["text"] for each in said["evidence"] if each["source"] == "attempt")


async def test_a_live_runner_is_diagnosed(client: httpx.AsyncClient, slot: Path) -> None:
    runner = await launched(client, launch_body(slot, "echo here; sleep 1000"))

    async def cause() -> bool:
        said = (await client.get(f"/runners/{runner['runner_id']}/diagnosis")).json()
        return said["likely_cause"] == "it runs" and {"source": "log", "text": "here"} in said["evidence"]

    await until(cause)
