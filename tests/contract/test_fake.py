"""The fake keeps the contract; and what it alone can do."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from launcher_contract import HELLO, Harness, Impossible, LauncherContract, Script, new_id

from app.errors import LauncherUnavailable
from app.launcher import Exit, Exited, Gone, Handle, LaunchSpec, Running, Starting
from app.launchers.fake import FakeLauncher, FakeWorld


def spec(*words: str) -> LaunchSpec:
    return LaunchSpec(command=("fake", *words), environment={}, context=b"{}")


class FakeHarness:
    """Reaches into a FakeWorld."""

    def __init__(self) -> None:
        self.world = FakeWorld()

    def spec(self, script: Script) -> LaunchSpec:
        return spec(*script.fake)

    async def reopen(self) -> FakeLauncher:
        return FakeLauncher(self.world)

    def impossible(self) -> Sequence[Impossible]:
        other = LaunchSpec(command=("no-such-command",), environment={}, context=b"{}")
        return [
            Impossible("no such command", other, "rejected"),
            Impossible("no such word", spec("dance"), "rejected"),
            Impossible("no such image", spec("starting=ErrImagePull"), "problem"),
        ]

    async def kill_behind_back(self, handle: Handle) -> None:
        self.world.happen(handle.runner_id, Exit(signal="SIGKILL"))

    async def delete_behind_back(self, handle: Handle) -> None:
        self.world.delete(handle.runner_id)

    @asynccontextmanager
    async def unavailable(self) -> AsyncIterator[None]:
        with self.world.unavailable():
            yield

    @asynccontextmanager
    async def foreign(self) -> AsyncIterator[str]:
        name = new_id()
        self.world.start("another installation", name, spec())
        yield name
        assert self.world.look(name)[0] == Running()
        self.world.delete(name)

    async def exists(self, handle: Handle) -> bool:
        return handle.runner_id in self.world.runners

    async def copies(self, handle: Handle) -> int:
        return self.world.copies[handle.runner_id]

    async def processes(self, handle: Handle) -> int | None:
        return None if self.world.look(handle.runner_id)[0] == Running() else 0

    async def leaked(self) -> Sequence[str]:
        return list(self.world.runners)


class TestFake(LauncherContract):
    settle = 0.05

    @pytest.fixture
    def harness(self) -> Harness:
        return FakeHarness()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_outcomes_follow_a_driven_clock_without_waiting() -> None:
    clock = Clock()
    world = FakeWorld(clock)
    launcher = FakeLauncher(world)
    handle = await launcher.launch("r", spec("starting=no node yet", "after=60", "running", "after=3600", "exit=7"))
    assert await launcher.observe([handle]) == {"r": Starting("no node yet")}
    clock.now += 60
    assert await launcher.observe([handle]) == {"r": Running()}
    follower = asyncio.create_task(anext(launcher.logs(handle, follow=True), None))
    await asyncio.sleep(0)
    clock.now += 3600
    world.wake()
    assert await follower is None
    assert await launcher.observe([handle]) == {"r": Exited(Exit(code=7, stopped=False, finished_at=4660.0))}


@pytest.mark.parametrize("acts", [False, True])
async def test_launches_fail_or_hang_before_or_after_they_acted(*, acts: bool) -> None:
    world = FakeWorld()
    launcher = FakeLauncher(world)
    world.fail_launches(LauncherUnavailable("no answer"), times=2, acts=acts)
    gate = world.hang_launches(acts=acts)
    for _ in range(2):
        with pytest.raises(LauncherUnavailable):
            await launcher.launch("r", spec(*HELLO.fake))
        assert world.copies["r"] == acts
    hanging = asyncio.create_task(launcher.launch("h", spec()))
    for _ in range(5):
        await asyncio.sleep(0)
    assert world.copies["h"] == acts
    gate.set()
    await hanging
    assert (await launcher.observe([await launcher.launch("r", spec())]))["r"] != Gone()
    assert world.copies == {"r": 1, "h": 1}


async def test_a_launch_removed_while_it_hangs_makes_nothing() -> None:
    world = FakeWorld()
    launcher = FakeLauncher(world)
    gate = world.hang_launches()
    hanging = asyncio.create_task(launcher.launch("r", spec()))
    await asyncio.sleep(0)
    await launcher.remove(Handle(runner_id="r"))
    gate.set()
    with pytest.raises(LauncherUnavailable):
        await hanging
    assert await launcher.observe([Handle(runner_id="r")]) == {"r": Gone()}


async def test_silence_is_no_answer() -> None:
    world = FakeWorld()
    launcher = FakeLauncher(world)
    handle = await launcher.launch("r", spec())
    world.silent.add("r")
    assert await launcher.observe([handle]) == {}
    world.silent.clear()
    world.finish("r", 3)
    assert await launcher.observe([handle]) != {"r": Running()}
    assert world.calls == [("launch", "r"), ("observe", None), ("observe", None)]
