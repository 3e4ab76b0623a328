"""The crash test itself, in a short form, and proof that it would notice."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from crash import Launch, Verdict, judge_one, judge_starts, judge_told

SCRIPT = Path(__file__).parent / "crash" / "crash.py"
SOAK = Path(__file__).parent / "crash" / "soak.py"
AROUND_CALLS = (
    "create-answered",
    "archive-answered",
    "start-answered",
    "start-late",
    "kill-answered",
    "delete-answered",
    "end-observed",
    "random",
)


def crash(*options: str, script: Path = SCRIPT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, check=False)


@pytest.mark.timeout(400)
def test_twenty_crashes_lose_and_double_nothing() -> None:
    done = crash("--rounds", "20")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rounds 20" in done.stdout
    assert "lost 0   doubled 0   false end 0   orphan 0" in done.stdout


@pytest.mark.timeout(200)
def test_an_intent_written_after_the_launch_turns_the_crash_test_red() -> None:
    done = crash("--rounds", "5", "--seed", "1", "--plant", "late-intent")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "DOUBLED" in done.stdout
    assert "ORPHAN" in done.stdout


@pytest.mark.timeout(400)
@pytest.mark.usefixtures("docker_engine")
def test_eight_crashes_around_the_calls_to_an_engine_lose_and_double_nothing() -> None:
    points = [word for point in AROUND_CALLS for word in ("--point", point)]
    done = crash("--kind", "docker", "--rounds", "8", *points)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kind docker" in done.stdout
    assert "rounds 8" in done.stdout
    assert "lost 0   doubled 0   false end 0   orphan 0" in done.stdout


@pytest.mark.timeout(200)
@pytest.mark.usefixtures("docker_engine")
def test_a_launch_before_its_intent_turns_the_crash_test_red_on_an_engine_too() -> None:
    done = crash("--kind", "docker", "--rounds", "2", "--seed", "1", "--plant", "late-intent")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "DOUBLED" in done.stdout


@pytest.mark.timeout(600)
def test_a_soak_of_half_a_minute_loses_nothing_and_tells_what_each_figure_does(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = crash("--minutes", "0.5", "--live", "12", "--containers", "0", "--json", str(file), script=SOAK)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SIGKILL" in done.stdout or "SIGTERM" in done.stdout
    figures = json.loads(file.read_text())["figures"]
    assert not figures["faults"]
    assert {"memory of its own, MiB", "file descriptors", "tasks", "kept logs without a record"} <= figures["slopes"].keys()
    assert figures["slopes"]["tasks"]["level"] > 1


COMPLETED = {"phase": "finished", "state": "completed", "reason": None, "exit_code": 0, "signal": None, "finished_at": "1"}
FAILED = {**COMPLETED, "state": "failed", "reason": "exit_nonzero", "exit_code": 3}
CANCELLED = {**FAILED, "reason": "cancelled", "exit_code": None, "signal": "SIGTERM"}
RUNS = {**COMPLETED, "phase": "running", "state": "running", "exit_code": None, "finished_at": None}


def asked(told: dict[str, Any] | None = None, *, stop: bool = False) -> Launch:
    return Launch("task", 1, 0, stop=stop, record=told or {})


@pytest.mark.parametrize(
    ("launch", "starts", "end", "items", "fault"),
    [
        (asked(), 1, ("r", 0), [COMPLETED], None),
        (asked(COMPLETED), 1, ("r", 0), [COMPLETED], None),
        (asked(RUNS), 1, ("r", 0), [COMPLETED], None),
        (asked(stop=True), 1, None, [CANCELLED], None),
        (asked(stop=True), 0, None, [CANCELLED], None),
        (asked(), 1, ("r", 0), [], "lost"),
        (asked(), 1, ("r", 0), [RUNS], "lost"),
        (asked(), 0, None, [COMPLETED], "lost"),
        (asked(), 2, ("r", 0), [COMPLETED], "doubled"),
        (asked(), 1, ("r", 0), [COMPLETED, COMPLETED], "doubled"),
        (asked(), 1, ("r", 3), [COMPLETED], "false end"),
        (asked(), 1, None, [COMPLETED], "false end"),
        (asked(), 1, ("r", 0), [FAILED], "false end"),
        (asked(), 1, ("r", 0), [CANCELLED], "false end"),
        (asked(stop=True), 1, None, [{**CANCELLED, "exit_code": 0}], "false end"),  # a 0 that nobody wrote
        (asked(FAILED), 1, ("r", 0), [COMPLETED], "false end"),  # told one end, and on record as another
        (asked({**COMPLETED, "finished_at": "2"}), 1, ("r", 0), [COMPLETED], "false end"),
    ],
)
def test_the_judge_finds_what_it_is_there_to_find(
    launch: Launch, starts: int, end: tuple[str, int] | None, items: list[dict[str, Any]], fault: str | None
) -> None:
    verdict = Verdict("any", ["random"])
    items = [{"message": "", **item} for item in items]
    judge_told(launch, items, verdict)
    judge_one(launch, starts, end, items, verdict, away=False)
    assert [*verdict.faults] == ([fault] if fault else [])


def test_the_judge_finds_who_was_started_again_in_a_later_round(tmp_path: Path) -> None:
    (tmp_path / "witness").mkdir()
    lines = ["start 1 r life", "end 1 r 0", "start 2 r life", "start 1 r another"]
    (tmp_path / "witness" / "journal").write_text("\n".join(lines))
    verdict = Verdict("any", ["random"])
    judge_starts(tmp_path, verdict)
    assert verdict.faults == {"doubled": 1}
