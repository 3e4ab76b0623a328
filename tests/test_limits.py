"""Limits of local runners, held by real control groups: version 1, or version 2, whichever this machine has."""

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import until
from engines import REQUIRED, missing

from app.launcher import EnforcedBy, Exit, Exited, Handle, LaunchSpec, Running
from app.launchers import cgroup
from app.launchers.local_process import LocalProcessLauncher

VERSIONS = {"cgroup1", "cgroup2"} & REQUIRED
SECONDS = 120.0
BUSY = """
import time
began, used = time.monotonic(), time.process_time()
while time.monotonic() - began < 3: pass
print((time.process_time() - used) / (time.monotonic() - began))
"""
EAT = (
    "import mmap; block = mmap.mmap(-1, 256 << 20); [block.write(b'x' * 4096) for _ in range(256 << 8)]; print('ate it all')"
)


def version() -> EnforcedBy:
    enforced = cgroup.probed().enforcement(1, 1)
    assert enforced.cpu == enforced.memory_mib
    return enforced.cpu


@pytest.fixture(autouse=True)
def _limits_exist() -> None:
    if VERSIONS:
        assert version() in VERSIONS
    elif version() == "none":
        pytest.skip("this user may make no control groups with limits on this machine")


def test_whoever_probes_at_the_same_time_finds_the_same() -> None:
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: cgroup.Cgroups.probe(), range(400)))
    assert [each for each in found if each != cgroup.probed()] == []


async def run(
    launcher: LocalProcessLauncher, tmp_path: Path, script: str, cpu: float | None = None, memory_mib: int | None = None
) -> tuple[Handle, Exit, str]:
    runner_id = f"runner-{os.urandom(6).hex()}"
    spec = LaunchSpec(
        command=("sh", "-c", script),
        environment={"PATH": os.environ["PATH"], "RUNNER_ID": runner_id, "EAT": EAT, "BUSY": BUSY},
        context=b"{}",
        working_dir=str(tmp_path),
        cpu=cpu,
        memory_mib=memory_mib,
    )
    handle = await launcher.launch(runner_id, spec)

    async def ended() -> Exited | None:
        seen = (await launcher.observe([handle]))[runner_id]
        return seen if isinstance(seen, Exited) else None

    seen = await until(ended, SECONDS)
    assert seen
    output = "".join([line.text.decode() + "\n" async for line in launcher.logs(handle)])
    return handle, seen.exit, output


@pytest.mark.timeout(300)
async def test_a_runner_over_its_memory_is_killed_and_that_is_told(launcher: LocalProcessLauncher, tmp_path: Path) -> None:
    handle, end, output = await run(launcher, tmp_path, 'exec python3 -c "$EAT"', memory_mib=96)
    assert handle.enforced_by.memory_mib == version()
    assert handle.enforced_by.cpu == "none"  # no limit, so nothing holds one
    assert end.oom_killed
    assert end.signal == "SIGKILL"
    assert "ate it all" not in output


@pytest.mark.timeout(300)
async def test_a_runner_within_its_memory_is_left_alone(launcher: LocalProcessLauncher, tmp_path: Path) -> None:
    _, end, output = await run(launcher, tmp_path, 'exec python3 -c "$EAT"', memory_mib=512)
    assert (end.code, end.oom_killed) == (0, False)
    assert "ate it all" in output


@pytest.mark.timeout(300)
async def test_half_a_core_is_near_half_a_core(launcher: LocalProcessLauncher, tmp_path: Path) -> None:
    handle, end, output = await run(launcher, tmp_path, 'exec python3 -c "$BUSY"', cpu=0.5)
    assert handle.enforced_by.cpu == version()
    assert end.code == 0
    assert float(output) == pytest.approx(0.5, abs=0.1)


@pytest.mark.timeout(300)
async def test_the_shim_is_outside_the_runners_group(launcher: LocalProcessLauncher, tmp_path: Path) -> None:
    runner_id = "runner-00000000abcd"
    spec = LaunchSpec(
        command=("sleep", "1000"), environment={"PATH": os.environ["PATH"]}, context=b"{}", working_dir="/", memory_mib=64
    )
    handle = await launcher.launch(runner_id, spec)
    assert isinstance((await launcher.observe([handle]))[runner_id], Running)
    shim = (tmp_path / "runners" / runner_id / "claim").read_text().split()[0]
    assert runner_id in Path(f"/proc/{handle.pid}/cgroup").read_text()
    assert runner_id not in Path(f"/proc/{shim}/cgroup").read_text()


@pytest.mark.timeout(300)
async def test_nothing_of_the_groups_is_left_after_remove(launcher: LocalProcessLauncher, tmp_path: Path) -> None:
    handle, _, _ = await run(launcher, tmp_path, "sleep 0.01 & exit 0", cpu=1, memory_mib=64)
    text = (tmp_path / "runners" / handle.runner_id / "cgroups").read_text()
    directories = [Path(line.split(" ", 1)[1]) for line in text.splitlines()]
    assert directories
    assert all(directory.exists() for directory in directories)
    await launcher.remove(handle)
    assert not any(directory.exists() for directory in directories)


@pytest.mark.timeout(300)
async def test_a_process_that_leaves_session_and_environment_behind_dies_with_its_group(
    launcher: LocalProcessLauncher, tmp_path: Path
) -> None:
    script = "env -i setsid setsid sh -c 'echo $$ >escaped; exec sleep 1000' & while [ ! -s escaped ]; do sleep 0.01; done"
    _, end, _ = await run(launcher, tmp_path, script)
    assert end.code == 0
    pid = (tmp_path / "escaped").read_text().strip()
    status = Path(f"/proc/{pid}/status")
    assert not status.exists() or re.search(r"State:\s+Z", status.read_text())


def needs_version_2() -> Path:
    """Give the home of runners' groups."""
    if not (home := cgroup.probed().unified):
        missing("cgroup2", "this user may make no control groups of version 2 on this machine")
    return home


def test_a_process_that_left_one_hierarchy_is_found_in_another() -> None:
    group = cgroup.probed().group("runner-00000000abcf", "cpu", "memory")
    if not (group.unified and group.legacy):
        missing("cgroup1", "this user may make no control groups of both versions on this machine")
    for directory in group.directories:
        directory.mkdir()
    with subprocess.Popen(["sleep", "1000"]) as process:
        try:
            (group.legacy["memory"] / "cgroup.procs").write_text(str(process.pid))
            assert set(group.processes()) == {process.pid}
            assert not group.remove()
        finally:
            process.kill()
    while not group.remove():
        time.sleep(0.01)
    assert not any(directory.exists() for directory in group.directories)


@pytest.mark.timeout(300)
async def test_a_runner_that_makes_a_group_of_threads_can_be_stopped_and_removed(
    launcher: LocalProcessLauncher, tmp_path: Path
) -> None:
    home, runner_id = needs_version_2(), "runner-00000000abce"
    group = home / runner_id
    script = f"mkdir {group}/own && echo threaded >{group}/own/cgroup.type && echo 0 >{group}/own/cgroup.procs && "
    spec = LaunchSpec(
        command=("sh", "-c", f"{script} echo $$ >up; exec sleep 1000"),
        environment={"PATH": os.environ["PATH"]},
        context=b"{}",
        working_dir=str(tmp_path),
    )
    handle = await launcher.launch(runner_id, spec)
    await until((tmp_path / "up").exists, SECONDS)
    await launcher.stop(handle, 0)

    async def ended() -> bool:
        return isinstance((await launcher.observe([handle]))[runner_id], Exited)

    await until(ended, SECONDS)
    await launcher.remove(handle)
    assert not group.exists()


@pytest.mark.timeout(300)
def test_processes_in_a_group_of_threads_are_found() -> None:
    """Where no controllers are handed on a runner may do this to its own group."""
    above = needs_version_2().with_name("test-of-threads")
    group = cgroup.Group(above / "threads")
    (above / "threads").mkdir(parents=True)
    try:
        (above / "threads" / "cgroup.type").write_text("threaded")
        script = "import threading, time; threading.Thread(target=time.sleep, args=(1000,)).start(); print(flush=True)"
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout
                process.stdout.readline()
                (above / "threads" / "cgroup.procs").write_text(str(process.pid))
                assert set(group.processes()) == {process.pid}
            finally:
                process.kill()
    finally:
        while not group.remove():
            time.sleep(0.01)
        above.rmdir()
