"""Local runners meet what others do not: numbers that are given anew, files that are emptied, processes that do not die."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import read, until
from engines import group_of_version_1, missing, needs_root

from app.errors import LauncherUnavailable
from app.launcher import Exit, Exited, Handle, LaunchSpec, Running, Starting
from app.launchers import cgroup
from app.launchers.local_process import SHIM, LocalProcessLauncher
from app.launchers.run_directory import RunDirectory
from app.reason import Reason

LEAVES_A_DAEMON = """
import os, sys, time
if os.fork() == 0:
    os.setpgid(0, 0)
    open("daemon", "w").write(f"{os.getpid()} ")
    os.execve("/bin/sleep", ["sleep", "1000"], {})
while not os.path.exists("go"): time.sleep(0.01)
"""
"""It keeps the session, and leaves the process group, its environment and its parent behind."""

COUNTS_TERMS = """
import signal
signal.signal(signal.SIGTERM, lambda *_: print("asked", flush=True))
print("up", flush=True)
while True: signal.pause()
"""

ENDS_ITS_FIRST_THREAD = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(1000,)).start()
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[__import__("platform").machine()], 0)
"""


@pytest.fixture
def place(tmp_path: Path, runner_id: str) -> Path:
    return tmp_path / "runners" / runner_id


@pytest.fixture
def runner_id() -> str:
    return new_id()


@pytest.fixture
def freezer() -> Iterator[Path]:
    """A control group of version 1 that keeps what is in it from dying, as a failing disk does."""
    with group_of_version_1("freezer", "this user may freeze no processes here, so all of them can be killed") as group:
        yield group
        (group / "freezer.state").write_text("THAWED")


@pytest.fixture
def daemons() -> Iterator[list[int]]:
    """Whoever is told of here is killed at last."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def new_id() -> str:
    return f"runner-{os.urandom(6).hex()}"


def spec(tmp_path: Path, runner_id: str, *command: str) -> LaunchSpec:
    environment = {"PATH": os.environ["PATH"], "RUNNER_ID": runner_id}
    return LaunchSpec(command=command, environment=environment, context=b"{}", working_dir=str(tmp_path))


async def ended(launcher: LocalProcessLauncher, handle: Handle) -> Exit:
    async def end() -> Exited | None:
        seen = (await launcher.observe([handle])).get(handle.runner_id)
        return seen if isinstance(seen, Exited) else None

    seen = await until(end)
    assert seen
    return seen.exit


async def lines(launcher: LocalProcessLauncher, handle: Handle) -> list[bytes]:
    return [line.text async for line in launcher.logs(handle)]


def stat(pid: int) -> list[str]:
    """The fields of a process: state, parent, group, session, ..., the start at 19; none if it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return []


def lives(pid: int) -> bool:
    return bool(fields := stat(pid)) and fields[0] not in "ZX"


def daemon_of_a_dead_leader() -> tuple[int, int]:
    """Start a stranger whose session's leader has ended, like many a daemon; gives the numbers of both."""
    script = "sleep 1000 >/dev/null & echo $$ $!"
    told = subprocess.run(["setsid", "sh", "-c", script], stdout=subprocess.PIPE, check=True).stdout
    session, pid = map(int, told.split())
    return session, pid


def test_what_a_late_shim_has_claimed_meanwhile_is_left_as_it_is(tmp_path: Path, place: Path, runner_id: str) -> None:
    """A look at a slot takes time, in which an order of a service that has died may be carried out."""
    wanted, run_directory = spec(tmp_path, runner_id, "true"), RunDirectory(place)
    entered = run_directory.enter(wanted)
    assert entered
    place.mkdir(parents=True)
    (place / "claim").touch()
    assert run_directory.prepare(wanted, entered.account, cgroup.probed(), "here") is None
    assert [file.name for file in place.iterdir()] == ["claim"]
    entered.close()


async def test_a_session_that_has_the_number_of_a_dead_runner_is_left_alone(
    launcher: LocalProcessLauncher, tmp_path: Path, place: Path, runner_id: str, daemons: list[int]
) -> None:
    handle = await launcher.launch(runner_id, spec(tmp_path, runner_id, "sh", "-c", "exit 3"))
    assert (await ended(launcher, handle)).code == 3
    began = (place / "pid").read_text().split()[1]
    await asyncio.sleep(0.1)  # several clock ticks later the number is a stranger's
    session, stranger = daemon_of_a_dead_leader()
    daemons.append(stranger)
    assert stat(stranger)[3] == str(session)
    (place / "pid").write_text(f"{session} {began}\n")
    (place / "cgroups").write_text("")  # this runner had no group, whatever this machine has

    async with aclosing(LocalProcessLauncher(tmp_path / "runners")) as later:
        assert (await ended(later, handle)).code == 3
    (place / "exit").unlink()  # likewise where nobody saw when it ended
    async with aclosing(LocalProcessLauncher(tmp_path / "runners")) as later:
        assert (await ended(later, handle)).code is None
        await later.remove(handle)
    assert not place.exists()
    assert lives(stranger)


async def test_after_a_reboot_a_number_and_a_start_mean_nobody(
    launcher: LocalProcessLauncher, tmp_path: Path, place: Path, runner_id: str, daemons: list[int]
) -> None:
    handle = await launcher.launch(runner_id, spec(tmp_path, runner_id, "true"))
    await ended(launcher, handle)
    _, stranger = daemon_of_a_dead_leader()
    daemons.append(stranger)
    (place / "pid").write_text(f"{stranger} {stat(stranger)[19]}\n")
    (place / "cgroups").write_text("")
    about = json.loads((place / "about.json").read_text())
    (place / "about.json").write_text(json.dumps({**about, "numbering": "another boot"}))

    async with aclosing(LocalProcessLauncher(tmp_path / "runners")) as later:
        await ended(later, handle)
        await later.remove(handle)
    assert lives(stranger)


async def test_what_a_power_failure_has_emptied_is_one_lost_runner_and_keeps_nobody_from_looking_at_others(
    launcher: LocalProcessLauncher, tmp_path: Path, place: Path, runner_id: str
) -> None:
    lost = await launcher.launch(runner_id, spec(tmp_path, runner_id, "echo", "still here"))
    unreadable = await launcher.launch(other := new_id(), spec(tmp_path, other, "true"))
    fine = await launcher.launch(another := new_id(), spec(tmp_path, another, "sh", "-c", "exit 7"))
    for handle in (lost, unreadable, fine):
        await ended(launcher, handle)
    for name in ("about.json", "pid", "claim", "cgroups", "exit"):
        (place / name).write_bytes(b"")
    (place.with_name(other) / "about.json").unlink()
    (place.with_name(other) / "about.json").mkdir()

    async with aclosing(LocalProcessLauncher(tmp_path / "runners")) as later:
        seen = await later.observe([lost, unreadable, fine])
        assert set(seen) == {runner_id, another}  # nobody can say what became of the other
        for one, code in ((runner_id, None), (another, 7)):
            observed = seen[one]
            assert isinstance(observed, Exited)
            assert (observed.exit.code, observed.exit.signal) == (code, None)
        assert [line.text async for line in later.logs(lost)] == [b"still here"]
        for handle in (lost, unreadable):
            await later.remove(handle)
    assert not place.exists()


async def test_a_runner_that_took_long_to_start_runs_once_it_has(
    launcher: LocalProcessLauncher, tmp_path: Path, place: Path, runner_id: str
) -> None:
    handle = await launcher.launch(runner_id, spec(tmp_path, runner_id, "sleep", "1000"))
    (place / "pid").rename(place / "not yet")
    async with aclosing(LocalProcessLauncher(tmp_path / "runners", start_seconds=0.1)) as later:
        assert await later.observe([handle]) == {runner_id: Starting()}
        (place / "not yet").rename(place / "pid")
        assert await later.observe([handle]) == {runner_id: Running()}


async def test_a_runner_whose_first_thread_has_ended_lives_and_can_be_stopped(
    launcher: LocalProcessLauncher, tmp_path: Path, runner_id: str
) -> None:
    handle = await launcher.launch(runner_id, spec(tmp_path, runner_id, sys.executable, "-c", ENDS_ITS_FIRST_THREAD))
    assert handle.pid
    await until(lambda: stat(handle.pid or 0)[0] == "Z")
    assert await launcher.observe([handle]) == {runner_id: Running()}
    await launcher.stop(handle, 0)
    end = await ended(launcher, handle)
    assert (end.signal, end.stopped) == ("SIGKILL", True)


async def test_a_runner_that_does_not_die_holds_up_no_thread(
    launcher: LocalProcessLauncher, tmp_path: Path, place: Path, runner_id: str, freezer: Path
) -> None:
    handle = await launcher.launch(runner_id, spec(tmp_path, runner_id, "sleep", "1000"))
    (freezer / "cgroup.procs").write_text(str(handle.pid))
    (freezer / "freezer.state").write_text("FROZEN")
    await until(lambda: read(freezer / "freezer.state") == "FROZEN\n")
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    stop = asyncio.create_task(launcher.stop(handle, 0))
    await until((place / "stop").exists)
    await asyncio.to_thread(len, "")
    await asyncio.sleep(0.1)  # a thread that the stop has just left free would be no proof: it would have ended
    assert not stop.done()
    with pytest.raises(LauncherUnavailable, match="do not die"):
        await stop
    (freezer / "freezer.state").write_text("THAWED")
    assert (await ended(launcher, handle)).signal == "SIGKILL"


@needs_root("only root can start a process as another user")
async def test_what_another_user_is_told_is_not_left_by_a_launch_that_a_crash_has_cut_short(
    launcher: LocalProcessLauncher, tmp_path: Path, place: Path, runner_id: str
) -> None:
    as_nobody = replace(spec(tmp_path, runner_id, "cat", "/dev/null"), working_dir="/", options={"user": "nobody"})
    await ended(launcher, await launcher.launch(runner_id, as_nobody))
    for name in ("about.json", "claim", "pid", "exit"):  # as if the service had died before it noted what it had made
        (place / name).unlink()
    async with aclosing(LocalProcessLauncher(tmp_path / "runners")) as later:
        handle = await later.launch(runner_id, as_nobody)
        assert list(Path(tempfile.gettempdir()).glob(f"{runner_id}*"))
        assert (await ended(later, handle)).code == 0
        await later.remove(handle)
    assert not list(Path(tempfile.gettempdir()).glob(f"{runner_id}*"))


async def test_the_end_that_a_shim_of_an_earlier_version_noted_is_read(
    launcher: LocalProcessLauncher, tmp_path: Path, place: Path, runner_id: str
) -> None:
    handle = await launcher.launch(runner_id, spec(tmp_path, runner_id, "true"))
    await ended(launcher, handle)
    (place / "exit").write_text("exit 7\n")
    about = json.loads((place / "about.json").read_text())
    del about["numbering"]
    (place / "about.json").write_text(json.dumps(about))
    async with aclosing(LocalProcessLauncher(tmp_path / "runners")) as later:
        assert (await ended(later, handle)).code == 7
        await later.remove(handle)


async def test_whoever_cancels_a_close_finds_it_cancelled(tmp_path: Path, runner_id: str) -> None:
    launcher = LocalProcessLauncher(tmp_path / "runners")
    handle = await launcher.launch(runner_id, spec(tmp_path, runner_id, "true"))
    await ended(launcher, handle)
    await launcher.remove(handle)
    closing = asyncio.create_task(launcher.aclose())
    await asyncio.sleep(0)  # it waits for its own task now
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing


async def test_what_is_left_in_a_runners_session_ends_with_it_also_without_a_group(
    launcher: LocalProcessLauncher, tmp_path: Path, place: Path, runner_id: str, daemons: list[int]
) -> None:
    handle = await launcher.launch(runner_id, spec(tmp_path, runner_id, sys.executable, "-c", LEAVES_A_DAEMON))
    (place / "cgroups").write_text("")
    left = int(await until(lambda: (tmp_path / "daemon").exists() and (tmp_path / "daemon").read_text()))
    daemons.append(left)
    await until(lambda: Path(f"/proc/{left}/environ").read_bytes() == b"")
    (tmp_path / "go").touch()
    assert (await ended(launcher, handle)).code == 0
    assert not lives(left)


async def test_the_deadline_brings_a_stop_no_second_term_and_its_kill_not_before_its_grace_is_over(
    launcher: LocalProcessLauncher, tmp_path: Path, runner_id: str
) -> None:
    wanted = spec(tmp_path, runner_id, sys.executable, "-c", COUNTS_TERMS)
    handle = await launcher.launch(runner_id, replace(wanted, run_timeout_seconds=2, stop_grace_seconds=0.1))
    await until(lambda: lines_are(launcher, handle, b"up"))
    asked = time.time()
    await launcher.stop(handle, 6)  # and nobody comes to kill it, as if the service had died
    await launcher.stop(handle, 6)
    end = await ended(launcher, handle)
    assert (end.signal, end.stopped, end.reason) == ("SIGKILL", True, None)
    assert end.finished_at
    assert end.finished_at - asked > 5.9
    assert await lines(launcher, handle) == [b"up", b"asked"]


async def test_a_stop_brings_no_second_term_where_the_deadline_has_brought_one(
    launcher: LocalProcessLauncher, tmp_path: Path, runner_id: str
) -> None:
    wanted = spec(tmp_path, runner_id, sys.executable, "-c", COUNTS_TERMS)
    handle = await launcher.launch(runner_id, replace(wanted, run_timeout_seconds=2, stop_grace_seconds=2))
    await until(lambda: lines_are(launcher, handle, b"up", b"asked"))
    await launcher.stop(handle, 10)
    end = await ended(launcher, handle)
    assert (end.signal, end.reason) == ("SIGKILL", Reason.DEADLINE_EXCEEDED)
    assert await lines(launcher, handle) == [b"up", b"asked"]


async def lines_are(launcher: LocalProcessLauncher, handle: Handle, *texts: bytes) -> bool:
    return await lines(launcher, handle) == [*texts]


async def test_an_order_whose_term_was_never_sent_is_made_good_by_the_deadline(
    launcher: LocalProcessLauncher, tmp_path: Path, place: Path, runner_id: str
) -> None:
    wanted = spec(tmp_path, runner_id, sys.executable, "-c", COUNTS_TERMS)
    handle = await launcher.launch(runner_id, replace(wanted, run_timeout_seconds=2, stop_grace_seconds=0.2))
    (place / "stop").touch()  # and the service dies
    end = await ended(launcher, handle)
    assert (end.signal, end.stopped) == ("SIGKILL", True)
    assert await lines(launcher, handle) == [b"up", b"asked"]


async def test_who_ends_by_itself_before_the_signal_comes_was_not_stopped(
    launcher: LocalProcessLauncher, tmp_path: Path
) -> None:
    """The moment is short: whoever sees that a stop is noted ends at once, and some are faster than the signal."""
    script = 'echo up; until [ -e "${TASK_CONTEXT_FILE%/*}/stop" ]; do :; done; exit 7'
    for attempt in range(300):
        handle = await launcher.launch(runner_id := new_id(), spec(tmp_path, runner_id, "sh", "-c", script))
        groups = tmp_path / "runners" / runner_id / "cgroups"
        made = groups.read_text()
        groups.write_text("")  # to find the others takes longer then
        await until(lambda: lines_are(launcher, handle, b"up"))  # noqa: B023 - it is awaited here
        await launcher.stop(handle, attempt % 2 * 10)
        end = await ended(launcher, handle)
        groups.write_text(made)
        await launcher.remove(handle)
        if (end.code, end.stopped) == (7, False):
            return
    pytest.fail("all were stopped")


async def run_shim(shell: str, place: Path, environment: Mapping[str, str], *command: str) -> tuple[str, bytes]:
    """Let a shell be the shim of a command; gives its word of the end, and the output."""
    program, *applet = shell.split()
    setsid, sleep = shutil.which("setsid"), shutil.which("sleep")
    if not (path := shutil.which(program)):
        missing("shells", f"there is no {program} on this machine")
    assert setsid
    assert sleep
    place.mkdir()
    os.mkfifo(place / "alive")
    for name in ("cgroups", "exit"):
        (place / name).touch()
    shim = [path, *applet, str(SHIM), str(place), "1000", "1", "1000", setsid, sleep, *command]
    process = await asyncio.create_subprocess_exec(
        *shim, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    _, output = await process.communicate()
    assert process.returncode == 0
    return read(place / "exit"), output


SHELLS = pytest.mark.parametrize("shell", ["dash", "bash", "busybox sh"])


@SHELLS
async def test_the_environment_is_the_callers_whatever_the_shim_calls_its_own(shell: str, tmp_path: Path) -> None:
    words = set(re.findall(r"[A-Za-z]\w*", SHIM.read_text())) - {"BASH_VERSION", "PATH"}
    environment = {**dict.fromkeys(words, "kept"), "LC_ALL": "C.UTF-8", "LANG": "C.UTF-8"}
    end, said = await run_shim(shell, tmp_path / "run", environment, "/bin/cat", "/proc/self/environ")
    assert end.startswith("exit 0 ")
    told = dict(line.split("=", 1) for line in said.decode().split("\0") if line)
    assert {name: told.get(name) for name in environment} == environment


@SHELLS
@pytest.mark.parametrize(("deed", "word"), [("exit 137", "exit 137 "), ("exit 0", "exit 0 "), ("kill -9 $$", "signal 9 ")])
async def test_an_exit_is_told_from_a_kill_in_any_language_and_mode(
    shell: str, deed: str, word: str, tmp_path: Path
) -> None:
    french = {"LANG": "C.UTF-8", "LANGUAGE": "fr"}  # in which bash knows another word for `Exit`, where it knows any
    end, _ = await run_shim(shell, tmp_path / "run", {**french, "POSIXLY_CORRECT": "1"}, "/bin/sh", "-c", deed)
    assert end.startswith(word)


async def test_a_runner_that_cannot_be_named_is_not_started(
    launcher: LocalProcessLauncher, tmp_path: Path, place: Path, runner_id: str
) -> None:
    (place / "pid").mkdir(parents=True)  # as a full disk does it, and longer
    handle = await launcher.launch(runner_id, spec(tmp_path, runner_id, "touch", "ran"))
    assert (await ended(launcher, handle)).code == 125
    assert not (tmp_path / "ran").exists()


async def test_what_a_launch_that_could_not_be_prepared_has_left_is_not_taken_for_nothing(
    launcher: LocalProcessLauncher, tmp_path: Path, place: Path, runner_id: str
) -> None:
    (place / "about.json").mkdir(parents=True)
    with pytest.raises(LauncherUnavailable) as failure:
        await launcher.launch(runner_id, spec(tmp_path, runner_id, "true"))
    assert failure.value.acted
    (place / "about.json").rmdir()
    handle = Handle(runner_id=runner_id)
    await launcher.remove(handle)
    assert not place.exists()
