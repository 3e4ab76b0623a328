"""Slots on machines that cannot be looked at, whose paths are judged by what they say; and on disks that do not answer."""

import asyncio
import contextlib
import ctypes
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from conftest import Serve, Service, finished, launch_body, launched, problem, until
from engines import missing
from launcher_contract import new_id

from app import slots
from app.errors import InvalidRequest, LauncherUnavailable, LaunchRejected
from app.launcher import LaunchSpec
from app.launchers.local_process import LocalProcessLauncher
from app.slots import look_at, named_place

ROOTS = (Path("/slots"), Path("/mnt/more/"))


@pytest.mark.parametrize(
    ("slot_path", "place"),
    [("/slots/a", "/slots/a"), ("/slots//a/./b/", "/slots/a/b"), ("/mnt/more/x/../y", "/mnt/more/y"), ("/slots", "/slots")],
)
def test_a_path_under_a_root_is_given_in_its_plain_form(slot_path: str, place: str) -> None:
    assert named_place(slot_path, ROOTS) == place


@pytest.mark.parametrize("slot_path", ["/slots/../etc", "/slotsX/a", "/", "/mnt/more/../../etc/passwd", "relative/a"])
def test_a_path_that_leads_elsewhere_is_refused(slot_path: str) -> None:
    with pytest.raises(InvalidRequest, match="not under any of the slot roots") as refused:
        named_place(slot_path, ROOTS)
    assert refused.value.code == "slot-outside-roots"


def test_without_roots_nothing_may_be_mounted() -> None:
    with pytest.raises(InvalidRequest, match="SLOT_ROOTS is empty"):
        named_place("/slots/a", ())


# Disks that do not answer.


MNT_DETACH = 2
Disk = tuple[Path, Callable[[], None]]


@pytest.fixture
def silent_disk(tmp_path: Path) -> Iterator[Disk]:
    """A directory of a file system whose server never answers, as with a network disk that is away; and what ends that."""
    directory, libc = tmp_path / "slots" / "lost", ctypes.CDLL(None, use_errno=True)
    directory.mkdir(parents=True)
    device = tmp_path / "fuse"
    with contextlib.ExitStack() as mounted:
        try:
            os.mknod(device, 0o600 | stat.S_IFCHR, os.makedev(10, 229))  # as /dev/fuse is, which a container may lack
            server = os.open(device, os.O_RDWR)
        except OSError as error:
            missing("root", f"no file system can be served here: {error}")
        mounted.callback(os.close, server)
        told = f"fd={server},rootmode=40000,user_id=0,group_id=0".encode()
        if libc.mount(b"lost", os.fsencode(directory), b"fuse", 0, told):
            missing("root", f"nothing may be mounted here: {os.strerror(ctypes.get_errno())}")
        mounted.callback(libc.umount2, os.fsencode(directory), MNT_DETACH)
        end = mounted.pop_all()
    with contextlib.closing(end):
        yield directory, end.close


async def test_slots_on_a_disk_that_does_not_answer_are_refused_and_hold_up_nobody_else(
    serve: Serve, slot: Path, silent_disk: Disk
) -> None:
    lost, _ = silent_disk
    async with serve() as running:
        async with running.client() as client:
            body = launch_body(slot, "echo here")

            async def launch_there(number: int) -> httpx.Response:
                there = {"slot_id": f"s{number}", "slot_path": str(lost / f"s{number}")}
                return await client.post("/runners", json={**body, "slot": {**body["slot"], **there}})

            asking = [asyncio.create_task(launch_there(number)) for number in range(40)]  # more than threads that all share
            ended = await finished(client, await launched(client, body))
            assert (await client.get(f"/runners/{ended['runner_id']}/logs")).text == "here\n"
            for answer in await asyncio.gather(*asking):
                problem(answer, 503, "slot-silent", words="does not answer")
        began = time.monotonic()
        await running.end(signal.SIGTERM)
        assert time.monotonic() < began + 8


async def test_a_slot_root_whose_disk_does_not_answer_holds_up_neither_a_start_nor_slots_elsewhere(
    serve: Serve, slot: Path, silent_disk: Disk
) -> None:
    lost, _ = silent_disk
    async with serve(SLOT_ROOTS=f"{lost}:{slot.parent}") as running, running.client() as client:
        assert (await finished(client, await launched(client, launch_body(slot))))["exit_code"] == 0
        said = running.output.read_text()
        assert f"no slot can be under {lost} (RUNNER_LAUNCHER_SLOT_ROOTS) now: {lost}/ does not answer within 5 s" in said
        body = launch_body(slot)
        there = {**body["slot"], "slot_id": "there", "slot_path": str(lost / "s")}
        problem(await client.post("/runners", json={**body, "slot": there}), 503, "slot-silent")


async def test_a_launch_in_a_directory_that_does_not_answer_says_so_and_did_nothing(
    launcher: LocalProcessLauncher, silent_disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, end = silent_disk
    monkeypatch.setattr(slots, "LOOK_SECONDS", 0.2)
    runner_id = new_id()
    spec = LaunchSpec(command=("true",), environment={}, context=b"{}", working_dir=str(lost / "s"))
    with pytest.raises(LauncherUnavailable, match=r"does not answer within 0\.2 s") as silent:
        await launcher.launch(runner_id, spec)
    assert not silent.value.acted
    assert await launcher.list() == []
    with pytest.raises(LauncherUnavailable, match="its disk may be away"):  # at once, with no thread more
        await launcher.launch(runner_id, spec)
    assert len([thread for thread in threading.enumerate() if thread.name.startswith("look at")]) == 1
    end()

    async def answers() -> None:
        with contextlib.suppress(LauncherUnavailable):
            await launcher.launch(runner_id, spec)

    with pytest.raises(LaunchRejected, match="is not a directory"):
        await until(answers)


async def test_what_a_late_look_has_opened_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "LOOK_SECONDS", 0.05)
    go, undone = threading.Event(), list[str]()

    def see() -> str:
        go.wait()
        return "opened"

    with pytest.raises(TimeoutError, match=r"/slots/a does not answer within 0\.05 s"):
        await look_at("/slots/a", see, undone.append)
    assert not undone
    go.set()
    await until(lambda: undone == ["opened"])
    assert await look_at("/slots/a", see, undone.append) == "opened"
    assert undone == ["opened"]


async def test_what_the_service_keeps_is_no_slot(service: Service, state_dir: Path, tmp_path: Path) -> None:
    async with service(slot_roots=(tmp_path,)) as client:
        for place in (state_dir, state_dir / "runners", tmp_path):
            body = launch_body(tmp_path / "slots" / "slot-1")
            body["slot"]["slot_path"] = str(place)
            answer = await client.post("/runners", json=body)
            problem(answer, 422, "slot-outside-roots", "/slot/slot_path", words="the state directory of the service")
