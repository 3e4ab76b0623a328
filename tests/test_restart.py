"""What a service finds when it comes back: ends it has missed, runners that nobody has on record, deadlines gone by."""

import asyncio
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import Serve, alive, finished, launch_body, launched, local_pool, record_of, told, until, written
from fault_table import Verdict


async def test_an_end_while_the_service_is_dead_is_told_with_its_exit_code(serve: Serve, slot: Path) -> None:
    async with serve(leave_runners=True) as service, service.client() as client:
        runner = await launched(client, launch_body(slot, "echo working; sleep 0.5; echo done; exit 7"))
        await service.end(signal.SIGKILL)
    await until(lambda: not alive(runner))
    async with serve() as service, service.client() as client:
        record = await finished(client, runner)
        assert (record["state"], record["reason"], record["exit_code"]) == ("failed", "exit_nonzero", 7)
        assert (await client.get(f"/runners/{runner['runner_id']}/logs")).text == "working\ndone\n"


async def test_the_run_deadline_holds_though_the_service_never_comes_back(serve: Serve, slot: Path) -> None:
    pools = {"local": local_pool(run_timeout_seconds=0.3, stop_grace_seconds=0.2)}
    async with serve(pools, leave_runners=True) as service, service.client() as client:
        runner = await launched(client, launch_body(slot, "trap '' TERM; sleep 60 & wait; sleep 60"))
        await service.end(signal.SIGKILL)
    await until(lambda: not alive(runner))
    async with serve() as service, service.client() as client:
        record = await finished(client, runner)
        assert record["reason"] == "deadline_exceeded"


@pytest.mark.fault("the database is lost under live runners")
async def test_a_lost_database_kills_no_runner_and_frees_no_slot(serve: Serve, slot: Path, state_dir: Path) -> None:
    async with serve(leave_runners=True) as service, service.client() as client:
        runner = await launched(client, launch_body(slot, "cat /proc/$$/environ >environ; sleep 60"))
        token = (await told(slot))["RUNNER_TOKEN"]
        await service.end(signal.SIGKILL)
    for path in state_dir.glob("runners.db*"):
        path.unlink()
    async with serve() as service, service.client() as client:
        await service.says("lived without a record, and was adopted")
        record = await record_of(client, runner)
        assert record["phase"] == "running"
        for name in ("task_id", "slot_id", "pool_name", "pid", "node", "isolation"):
            assert record[name] == runner[name]
        events = (await client.get(f"/runners/{runner['runner_id']}/events")).json()["items"]
        assert [event["type"] for event in events] == ["adopted"]
        assert (await client.post("/runners", json=launch_body(slot))).json()["code"] == "slot-busy"
        beat = await client.post(f"/runners/{runner['runner_id']}/heartbeat", headers={"Authorization": f"Bearer {token}"})
        assert beat.status_code == 204
        await client.delete(f"/runners/{runner['runner_id']}")
        assert (await finished(client, runner))["reason"] == "cancelled"


@pytest.mark.fault("the database is restored from before the launch of live runners")
async def test_a_database_restored_from_before_the_launch_knows_the_runner_again(
    serve: Serve, slot: Path, state_dir: Path, tmp_path: Path, verdict: Verdict
) -> None:
    async with serve() as service, service.client() as client:
        before = await launched(client, launch_body(slot, "exit 0"))
        await finished(client, before)
    shutil.copytree(state_dir, tmp_path / "backup", ignore=shutil.ignore_patterns("runners", "logs"))
    async with serve(leave_runners=True) as service, service.client() as client:
        runner = await launched(
            client, launch_body(slot, 'echo "$RUNNER_ID" >>started; until [ -e go ]; do sleep 0.05; done; exit 4')
        )
        await service.end(signal.SIGKILL)
    for path in state_dir.glob("runners.db*"):
        path.unlink()
    for path in (tmp_path / "backup").glob("runners.db*"):
        shutil.copy(path, state_dir)
    async with serve() as service, service.client() as client:
        assert (await record_of(client, before))["state"] == "completed"
        verdict.over()
        await service.says("adopted")
        (slot / "go").touch()
        record = await finished(client, runner)
        assert (record["reason"], record["exit_code"]) == ("exit_nonzero", 4)
        name = runner["runner_id"]
        await verdict.judge(client, slot.parent, {name: ("failed", 4)}, lambda: [name] if alive(runner) else [])


async def test_a_run_directory_that_means_nothing_is_left_alone(serve: Serve, slot: Path, state_dir: Path) -> None:
    foreign = state_dir / "runners" / "not-a-runner"
    foreign.mkdir(parents=True)
    (foreign / "about.json").write_text("[]")
    async with serve() as service, service.client() as client:
        await finished(client, await launched(client, launch_body(slot, "exit 0")))
    assert foreign.exists()


async def test_silence_while_the_service_is_down_is_no_lost_heartbeat(serve: Serve, slot: Path) -> None:
    pools = {"local": local_pool(heartbeat_timeout_seconds=5)}
    async with serve(pools, leave_runners=True) as service, service.client() as client:
        runner = await launched(client, launch_body(slot, "cat /proc/$$/environ >environ; sleep 60"))
        token = {"Authorization": f"Bearer {(await told(slot))['RUNNER_TOKEN']}"}
        beat = f"/runners/{runner['runner_id']}/heartbeat"
        assert (await client.post(beat, headers=token)).status_code == 204
        await service.end(signal.SIGKILL)
    await asyncio.sleep(5.2)
    async with serve() as service, service.client() as client:
        began = time.monotonic()
        assert (await record_of(client, runner))["phase"] == "running"
        record = await finished(client, runner)
        assert record["reason"] == "heartbeat_lost"
        assert time.monotonic() - began > 0.5


async def test_a_stop_asked_for_before_the_crash_is_carried_out_after_it(serve: Serve, slot: Path) -> None:
    script = "trap '' TERM; echo up >up; while :; do sleep 0.1; done"
    async with serve(leave_runners=True) as service, service.client() as client:
        runner = await launched(client, launch_body(slot, script))
        await written(slot / "up")
        await client.delete(f"/runners/{runner['runner_id']}?grace=5")
        await service.end(signal.SIGKILL)
    assert alive(runner)
    async with serve() as service, service.client() as client:
        record = await finished(client, runner)
        assert (record["reason"], record["signal"]) == ("cancelled", "SIGKILL")


async def test_a_runner_whose_shim_is_killed_ends_as_lost_and_leaves_nothing(
    serve: Serve, slot: Path, state_dir: Path
) -> None:
    async with serve() as service, service.client() as client:
        runner = await launched(client, launch_body(slot, "echo up >up; sleep 60"))
        await written(slot / "up")
        shim = int((state_dir / "runners" / runner["runner_id"] / "claim").read_text().split()[0])
        os.kill(shim, signal.SIGKILL)
        record = await finished(client, runner)
        assert (record["state"], record["reason"], record["exit_code"]) == ("failed", "lost", None)
        assert not alive(runner)
