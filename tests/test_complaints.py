"""What users of other systems of this kind complain about, and the test that keeps each complaint away.

``KEPT_AWAY`` is an index: each entry names a test elsewhere, and fails here when that test is gone. Complaints that no other
test answers have theirs below.
"""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Service, finished, launch_body, launched

from app.launchers.process_tree import Process
from app.launchers.run_directory import RunDirectory

HERE = Path(__file__).parent

KEPT_AWAY = {
    "a service that dies leaves its runners 'running' for ever": "test_an_end_while_the_service_is_dead_is_told_with_its_exit_code",
    "an error of the engine is taken for a death": "test_while_an_engine_is_away_nothing_changes_but_its_age_and_it_recovers",
    "an ambiguous create ends in a second copy": "test_launched_but_not_recorded_is_found_and_not_launched_again",
    "live runners are marked failed at the start": "test_crash_after_crash_every_launch_has_one_copy_and_one_end",
    "a client that disconnects leaves a launch pending": "test_a_client_that_goes_away_while_it_waits_changes_nothing",
    "cancel kills the parent only": "test_a_stop_ends_the_whole_tree_also_what_left_the_session",
    "others' processes are removed": "test_a_run_directory_that_means_nothing_is_left_alone",
    "output that nobody reads blocks the program": "test_much_output_that_nobody_reads_does_not_block_the_runner",
    "a workload outlives a launcher that is gone for good": "test_the_run_deadline_holds_though_the_service_never_comes_back",
    "timeouts are noticed minutes late": "test_a_runner_deaf_to_term_is_killed_after_its_deadline_and_the_pools_grace",
    "a counter leaks until nothing is launched": "test_every_way_to_end_makes_room_for_the_next",
    "what was cancelled in the queue is created all the same": "test_a_queued_runner_that_is_stopped_ends_at_once_and_never_starts",
    "there is no queue, only a refusal": "test_launches_wait_in_order_for_a_place_up_to_the_queues_limit",
    "argument list too long": "test_a_context_too_long_for_a_variable_travels_by_the_file_alone",
    "the launcher's secrets reach the agent": "test_a_runner_finds_its_environment_as_the_contract_says_and_nothing_else",
    "a lost database kills the agents": "test_a_lost_database_kills_no_runner_and_frees_no_slot",
}


@pytest.mark.parametrize("name", KEPT_AWAY.values(), ids=list(KEPT_AWAY))
def test_a_complaint_is_kept_away_by_a_test(name: str) -> None:
    assert any(f"def {name}(" in path.read_text() for path in HERE.rglob("*.py"))


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        process.kill()


def test_a_stale_pid_file_does_not_point_at_whoever_has_the_number_now(
    stranger: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    stale = Process(stranger.pid, 1)
    assert not stale.alive
    assert not stale.kill(signal.SIGKILL)
    place = RunDirectory(tmp_path / "runner-0123456789ab")
    place.path.mkdir()
    for name in ("pid", "claim"):
        (place.path / name).write_text(f"{stranger.pid} 1\n")
    place.remove()
    assert stranger.poll() is None


@pytest.mark.parametrize(
    ("script", "reason"),
    [("exit 137", "exit_nonzero"), ("kill -KILL $$", "signalled")],
)
async def test_137_alone_is_no_want_of_memory(service: Service, slot: Path, script: str, reason: str) -> None:
    async with service() as client:
        record = await finished(client, await launched(client, launch_body(slot, script)))
    assert (record["reason"], record["oom_killed"]) == (reason, False)


async def test_an_end_leaves_no_zombie_that_this_service_would_have_to_reap(service: Service, slot: Path) -> None:
    async with service() as client:
        runner = await launched(client, launch_body(slot, "sleep 0.01 & exit 0"))
        await finished(client, runner)
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(") ")[2].split()[1])
            command = path.read_text().partition("(")[2].rpartition(")")[0]
        except OSError:
            continue
        assert parent != os.getpid() or command not in ("dash", "setsid", "sh", "sleep")
