"""What every launcher promises: each sentence of app/launcher.py as a check, run against the fake and every real engine.

A subclass supplies the fixture ``harness``, which reaches behind the port: it arranges and checks the world, never by means
of the launcher under test. What an engine cannot do is declared in ``deviations``, as the check's name and the reason; such
a check is still run and must fail, so a deviation that has gone is noticed. Each check polls with a deadline, for engines
that take milliseconds and for those that take seconds.

A runner's behaviour is a ``Script``: the same in the words of a POSIX shell and in those of the fake.
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol, TypeVar

import pytest

from app.errors import LauncherError, LauncherUnavailable, LaunchRejected, RunnerGone
from app.launcher import Exit, Exited, Gone, Handle, Launcher, LaunchSpec, LogLine, Observation, Running, Starting

T = TypeVar("T")

COUNT = 200
LINES = [b"line %d" % number for number in range(COUNT)]
MANY = 500_000
STRANGE = "two\nlines \r \"double\" 'single' $(id) $(OTHER) ${OTHER} $$ `id` %s \\n \\ # ü 🚀 \t =;&| end "
LOOP = "exec 2>/dev/null; while :; do sleep 0.05; done"  # a shell may print how its child ended


@dataclass(frozen=True, slots=True)
class Script:
    """What a runner does: as a small POSIX shell script, and as the fake's words."""

    sh: str
    fake: tuple[str, ...]


def exits(code: int) -> Script:
    return Script(f"exit {code}", (f"exit={code}",))


def prints_variables(*names: str) -> Script:
    return Script(
        "".join(f"printf '<%s>' \"${name}\"\n" for name in names),
        (*(word for name in names for word in ("write=<", f"env={name}", "write=>")), "exit=0"),
    )


HELLO = Script("echo hello", ("print=hello", "exit=0"))
RUNS_ON = Script(f"echo ready; {LOOP}", ("print=ready",))
HANDLES_TERM = Script(
    f"trap 'echo bye; exit 9' TERM; echo ready; {LOOP}", ("print=ready", "term", "print=bye", "after=0.05", "exit=9")
)
WHOLE_TREE_HANDLES_TERM = Script(
    f"trap 'wait; exit 9' TERM; sh -c 'trap \"echo child; exit 0\" TERM; echo ready; {LOOP}' & wait",
    ("print=ready", "term", "print=child", "after=0.05", "exit=9"),
)
STUBBORN_TREE = Script(
    "trap '' TERM; sh -c 'sleep 600 & sleep 600 & wait' & setsid sh -c 'sleep 600 & wait' & sleep 0.2\n"
    f"trap 'echo asked' TERM; echo ready; {LOOP}",
    ("print=ready", "term", "print=asked"),
)
LEAVES_CHILDREN = Script("sleep 600 & setsid sleep 600 & sleep 0.2; exit 3", ("after=0.2", "exit=3"))
PRINTS_CONTEXT = Script('cat "$TASK_CONTEXT_FILE"', ("context", "exit=0"))
COUNTS = Script(
    f'i=0; while [ "$i" -lt {COUNT} ]; do echo "line $i"; i=$((i + 1)); done',
    (*(f"print=line {number}" for number in range(COUNT)), "exit=0"),
)
COUNTS_SLOWLY = Script(
    'i=0; while [ "$i" -lt 40 ]; do echo "line $i"; i=$((i + 1)); sleep 0.03; done',
    (*(word for number in range(40) for word in (f"print=line {number}", "after=0.03")), "exit=0"),
)
PRINTS_MUCH = Script(
    f"yes {'x' * 99} | head -n 50000; echo done", (f"write={('x' * 99 + chr(10)) * 50_000}", "print=done", "exit=0")
)
PRINTS_BYTES = Script(
    r"printf 'a\377\376\303\n\n\r\000b\r\nlast'",
    ("print=a\udcff\udcfe\udcc3", "print=", "print=\r\0b\r", "write=last", "exit=0"),
)
PRINTS_LONG_LINES = Script(
    "head -c 100000 /dev/zero | tr '\\0' x; echo; head -c 1000000 /dev/zero | tr '\\0' y; echo; echo next",
    (f"print={'x' * 100_000}", f"print={'y' * 1_000_000}", "print=next", "exit=0"),
)
PRINTS_OVER_THE_CAP = Script(f"seq {MANY}", ("write=" + "".join(f"{n}\n" for n in range(1, MANY + 1)), "exit=0"))
PRINTS_IN_PIECES = Script(
    "printf pie; sleep 0.3; echo ces; sleep 0.3; echo more >&2; sleep 0.3; echo end",
    ("write=pie", "after=0.3", "print=ces", "after=0.3", "print=more", "after=0.3", "print=end", "exit=0"),
)
HUNGRY = Script("x=xxxxxxxx; while [ ${#x} -lt 200000000 ]; do x=$x$x; done; exit 0", ("memory=256", "exit=0"))


class CannotArrangeError(Exception):
    """The harness has no way to bring its world into this state."""


@dataclass(frozen=True, slots=True)
class Impossible:
    """A launch that can never work, and how this environment says so: an exit code stands for the shell's own word."""

    what: str
    spec: LaunchSpec
    answer: Literal["rejected", "problem"] | int


class Harness(Protocol):
    """Reaches behind the port: arranges the world and tells what is true there, without the launcher under test."""

    def spec(self, script: Script) -> LaunchSpec:
        """What to launch so that this script runs here."""
        ...

    async def reopen(self) -> Launcher:
        """Open one more launcher on the same world, as a restarted service would. The caller closes it."""
        ...

    def impossible(self) -> Sequence[Impossible]:
        """Launches that can never work here."""
        ...

    async def kill_behind_back(self, handle: Handle) -> None:
        """Send KILL to the main process."""
        ...

    async def delete_behind_back(self, handle: Handle) -> None:
        """Make the engine forget the runner, as somebody with a shell would."""
        ...

    def unavailable(self) -> AbstractAsyncContextManager[None]:
        """Cut the engine off. Raises CannotArrangeError where that is impossible."""
        ...

    def foreign(self) -> AbstractAsyncContextManager[str]:
        """Put something that is not ours beside our runners; its name. It must be there at the end."""
        ...

    async def exists(self, handle: Handle) -> bool:
        """Whether the engine holds anything for this runner."""
        ...

    async def copies(self, handle: Handle) -> int:
        """How many times a main process was started for this runner, by the world's own count."""
        ...

    async def processes(self, handle: Handle) -> int | None:
        """How many processes of this runner live; None where that cannot be seen."""
        ...

    async def leaked(self) -> Sequence[str]:
        """All that is left in the world when every runner has been removed."""
        ...


def new_id() -> str:
    return f"runner-{secrets.token_hex(6)}"


def unknown() -> Handle:
    return Handle(runner_id=new_id())


@asynccontextmanager
async def closing(iterator: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """Leave an iterator early without leaving it open."""
    try:
        yield iterator
    finally:
        close = getattr(iterator, "aclose", None)
        if close:
            await close()


class LauncherContract:
    """One check per promise. ``patience`` is how long anything may take here, ``settle`` how long nothing must happen."""

    deviations: ClassVar[Mapping[str, str]] = {}
    patience: ClassVar[float] = 30
    settle: ClassVar[float] = 0.5
    world: Harness
    launcher: Launcher

    @pytest.fixture(autouse=True)
    def _deviate(self, request: pytest.FixtureRequest) -> None:
        """Expect a declared deviation, and no other error in its place."""
        unheard_of = [name for name in self.deviations if not hasattr(self, name)]
        assert not unheard_of, "deviations name checks that do not exist"
        reason = self.deviations.get(request.function.__name__)
        if reason:
            failures = (AssertionError, pytest.fail.Exception, TimeoutError, CannotArrangeError)
            request.node.add_marker(pytest.mark.xfail(reason=reason, strict=True, raises=failures))

    @pytest.fixture(autouse=True)
    async def _open(self, harness: Harness) -> AsyncIterator[None]:
        """Open a launcher; afterwards a fresh one finds and removes every runner, and then nothing may be left."""
        self.world = harness
        async with aclosing(await harness.reopen()) as self.launcher:
            yield
        async with aclosing(await harness.reopen()) as sweeper:
            for found in await sweeper.list():
                await sweeper.remove(found.handle)
        await self.until("nothing is leaked", self._nothing_leaked)

    async def _nothing_leaked(self) -> str | None:
        leaked = await self.world.leaked()
        return f"still there: {leaked}" if leaked else None

    # How checks speak.

    async def until(self, what: str, check: Callable[[], Awaitable[str | None]]) -> None:
        """Poll until a check has no objection any more."""
        deadline = time.monotonic() + self.patience
        while objection := await check():
            assert time.monotonic() < deadline, f"not within {self.patience} s: {what}; {objection}"
            await asyncio.sleep(0.02)

    def spec(self, script: Script, runner_id: str, **environment: str) -> LaunchSpec:
        spec = self.world.spec(script)
        return replace(spec, environment={**spec.environment, **environment, "RUNNER_ID": runner_id})

    async def start(self, script: Script, **environment: str) -> Handle:
        runner_id = new_id()
        return await self.launcher.launch(runner_id, self.spec(script, runner_id, **environment))

    async def see(self, handle: Handle, launcher: Launcher | None = None) -> Observation | None:
        return (await (launcher or self.launcher).observe([handle])).get(handle.runner_id)

    async def end(self, handle: Handle, launcher: Launcher | None = None) -> Exit:
        """Wait for the runner's end. It must not be called gone on the way."""
        seen: Observation | None = None

        async def exited() -> str | None:
            nonlocal seen
            seen = await self.see(handle, launcher)
            assert not isinstance(seen, Gone), "it exists, and was said to be gone"
            return None if isinstance(seen, Exited) else f"seen is {seen}"

        await self.until("exited", exited)
        assert isinstance(seen, Exited)
        return seen.exit

    async def running(self, handle: Handle, launcher: Launcher | None = None) -> None:
        async def runs() -> str | None:
            seen = await self.see(handle, launcher)
            assert isinstance(seen, Starting | Running | None), "it should run on"
            return None if isinstance(seen, Running) else f"seen is {seen}"

        await self.until("running", runs)

    async def gone(self, handle: Handle, launcher: Launcher | None = None) -> None:
        async def is_gone() -> str | None:
            seen = await self.see(handle, launcher)
            return None if isinstance(seen, Gone) else f"seen is {seen}"

        await self.until("gone", is_gone)

    async def read(self, handle: Handle, launcher: Launcher | None = None, *, after: str | None = None) -> list[bytes]:
        lines = (launcher or self.launcher).logs(handle, after=after)
        async with asyncio.timeout(self.patience):
            return [line.text async for line in lines]

    async def follow(self, handle: Handle, launcher: Launcher | None = None, *, after: str | None = None) -> list[bytes]:
        """Follow the log to its end."""
        lines = (launcher or self.launcher).logs(handle, after=after, follow=True)
        async with asyncio.timeout(self.patience):
            return [line.text async for line in lines]

    async def since(
        self, handle: Handle, moment: float, launcher: Launcher | None = None, *, follow: bool = False
    ) -> list[bytes]:
        lines = (launcher or self.launcher).logs(handle, since=moment, follow=follow)
        async with asyncio.timeout(self.patience):
            return [line.text async for line in lines]

    async def said(self, handle: Handle, text: bytes) -> None:
        """Wait until the runner has printed this line; then it also runs."""

        async def found() -> str | None:
            lines = await self.read(handle)
            return None if text in lines else f"its log is {lines[-5:]}"

        await self.until(f"{text!r} in the log", found)

    async def ready(self, script: Script) -> Handle:
        """Start a runner and wait until it says that it is ready."""
        handle = await self.start(script)
        await self.said(handle, b"ready")
        await self.running(handle)
        return handle

    async def listed(self, launcher: Launcher | None = None) -> list[str]:
        return [found.handle.runner_id for found in await (launcher or self.launcher).list()]

    # launch

    @pytest.mark.parametrize("code", [0, 1, 7, 126, 127, 137, 143, 255])
    async def test_the_exit_code_is_told(self, code: int) -> None:
        end = await self.end(await self.start(exits(code)))
        assert (end.code, end.signal, end.oom_killed, end.reason) == (code, None, False, None)
        assert end.stopped is not True

    async def test_times_of_the_end_are_plausible(self) -> None:
        before = time.time()
        end = await self.end(await self.start(HELLO))
        assert end.finished_at is not None
        assert before - 2 < end.finished_at < time.time() + 2

    @pytest.mark.timeout(300)
    async def test_a_launch_that_can_never_work_is_rejected_or_says_why(self) -> None:
        for impossible in self.world.impossible():
            handle = Handle(runner_id=new_id())
            spec = replace(impossible.spec, environment={**impossible.spec.environment, "RUNNER_ID": handle.runner_id})
            match impossible.answer:
                case "rejected":
                    with pytest.raises(LaunchRejected) as rejected:
                        await self.launcher.launch(handle.runner_id, spec)
                    assert str(rejected.value), impossible.what
                    assert isinstance(await self.see(handle), Gone), impossible.what
                case "problem":
                    handle = await self.launcher.launch(handle.runner_id, spec)
                    await self.until(impossible.what, lambda handle=handle: self._no_problem(handle))  # type: ignore[misc]
                case code:
                    handle = await self.launcher.launch(handle.runner_id, spec)
                    assert (await self.end(handle)).code == code, impossible.what
            await self.launcher.remove(handle)

    async def _no_problem(self, handle: Handle) -> str | None:
        seen = await self.see(handle)
        return None if isinstance(seen, Starting) and seen.problem else f"seen is {seen}"

    async def test_the_environment_arrives_byte_for_byte(self) -> None:
        handle = await self.start(prints_variables("STRANGE", "EMPTY", "OTHER"), STRANGE=STRANGE, EMPTY="", OTHER="no")
        assert (await self.end(handle)).code == 0
        assert b"\n".join(await self.read(handle)) == f"<{STRANGE}><><no>".encode()

    async def test_nothing_of_our_own_environment_arrives(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SECRET_OF_THE_SERVICE", "told")
        handle = await self.start(prints_variables("SECRET_OF_THE_SERVICE"))
        assert (await self.end(handle)).code == 0
        assert await self.read(handle) == [b"<>"]

    async def test_the_context_file_holds_the_whole_context(self) -> None:
        context = json.dumps(["ü 🚀 $(id)" * 10] * 7_200, ensure_ascii=False, indent=1).encode()
        assert 900_000 < len(context) <= 1_000_000
        handle = unknown()
        spec = replace(self.spec(PRINTS_CONTEXT, handle.runner_id), context=context)
        handle = await self.launcher.launch(handle.runner_id, spec)
        assert (await self.end(handle)).code == 0
        assert b"\n".join(await self.read(handle)) == context

    async def test_labels_and_time_are_found_again(self) -> None:
        runner_id, before = new_id(), time.time()
        labels = {"task-id": "T-1 ü/" + "x" * 100, "pool": "p"}
        handle = await self.launcher.launch(runner_id, replace(self.spec(HELLO, runner_id), labels=labels))
        found = {found.handle.runner_id: found for found in await self.launcher.list()}[runner_id]
        assert {key: found.labels.get(key) for key in labels} == labels
        assert before - 2 < found.created_at < time.time() + 2
        assert handle.runner_id == runner_id
        await self.end(found.handle)

    async def test_launching_again_finds_the_same_copy(self) -> None:
        handle = await self.ready(RUNS_ON)
        assert await self.launcher.launch(handle.runner_id, self.spec(HELLO, handle.runner_id)) == handle
        async with aclosing(await self.world.reopen()) as other:
            assert await other.launch(handle.runner_id, self.spec(HELLO, handle.runner_id)) == handle
        await self.running(handle)
        assert await self.world.copies(handle) == 1

    async def test_launching_again_after_the_exit_starts_nothing(self) -> None:
        handle = await self.start(exits(7))
        end = await self.end(handle)
        assert await self.launcher.launch(handle.runner_id, self.spec(HELLO, handle.runner_id)) == handle
        async with aclosing(await self.world.reopen()) as other:
            assert await other.launch(handle.runner_id, self.spec(HELLO, handle.runner_id)) == handle
        assert await self.end(handle) == end
        assert await self.world.copies(handle) == 1

    async def test_launches_of_one_id_at_once_make_one_copy(self) -> None:
        runner_id = new_id()
        async with aclosing(await self.world.reopen()) as other:
            launches = [
                launcher.launch(runner_id, self.spec(HELLO, runner_id))
                for launcher in (self.launcher, other, self.launcher, other, self.launcher)
            ]
            results = await asyncio.gather(*launches, return_exceptions=True)
        handles = [result for result in results if isinstance(result, Handle)]
        others = [result for result in results if not isinstance(result, Handle | LauncherUnavailable)]
        assert handles
        assert not others
        assert len(set(handles)) == 1
        assert (await self.end(handles[0])).code == 0
        assert await self.read(handles[0]) == [b"hello"]
        assert await self.world.copies(handles[0]) == 1

    async def test_a_cancelled_launch_leaves_one_runner_or_none(self) -> None:
        await asyncio.gather(*[self._cancelled_launch(seconds) for seconds in self.moments()])

    def moments(self) -> Iterator[float]:
        """Moments in the course of a launch, early ones first: at once, then ever later."""
        yield 0
        for step in range(12):
            yield 0.0005 * 1.7**step

    async def cancel_after(self, seconds: float, runner_id: str, spec: LaunchSpec) -> None:
        launch = asyncio.create_task(self.launcher.launch(runner_id, spec))
        await asyncio.sleep(seconds)
        launch.cancel()
        with suppress(asyncio.CancelledError):
            await launch
            return
        assert launch.cancelled()

    async def _cancelled_launch(self, seconds: float) -> None:
        handle = unknown()
        spec = self.spec(HELLO, handle.runner_id)
        await self.cancel_after(seconds, handle.runner_id, spec)

        async def one_or_none() -> str | None:
            seen, listed = await self.see(handle), handle.runner_id in await self.listed()
            return None if listed or isinstance(seen, Gone) else f"after {seconds} s seen is {seen}, {listed=}"

        await self.until("what is seen is listed", one_or_none)
        handle = await self.launcher.launch(handle.runner_id, spec)
        assert (await self.end(handle)).code == 0
        assert await self.read(handle) == [b"hello"]
        assert await self.world.copies(handle) == 1

    async def test_twenty_launches_at_once(self) -> None:
        handles = await asyncio.gather(*[self.start(prints_variables("MINE"), MINE=str(number)) for number in range(20)])
        ends = await asyncio.gather(*[self.end(handle) for handle in handles])
        assert [end.code for end in ends] == [0] * 20
        assert await asyncio.gather(*[self.read(handle) for handle in handles]) == [[b"<%d>" % n] for n in range(20)]
        assert sorted(await self.listed()) == sorted(handle.runner_id for handle in handles)

    async def test_a_memory_limit_is_held_or_not_claimed(self) -> None:
        runner_id = new_id()
        handle = await self.launcher.launch(runner_id, replace(self.spec(HUNGRY, runner_id), memory_mib=64, cpu=1))
        end = await self.end(handle)
        if handle.enforced_by.memory_mib == "none":
            assert (end.code, end.oom_killed) == (0, False)
        else:
            assert end.oom_killed
            assert end.code != 0
        assert end.stopped is not True

    # observe

    async def test_an_unknown_runner_is_gone(self) -> None:
        handle = unknown()
        assert await self.launcher.observe([handle]) == {handle.runner_id: Gone()}
        assert await self.launcher.observe([]) == {}

    async def test_many_are_observed_in_one_call_by_their_ids_alone(self) -> None:
        live, dead = await self.ready(RUNS_ON), await self.start(exits(7))
        end, nobody = await self.end(dead), unknown()
        bare = [Handle(runner_id=handle.runner_id) for handle in (live, dead, nobody)]
        async with aclosing(await self.world.reopen()) as other:
            for launcher in (self.launcher, other):
                seen = await launcher.observe(bare)
                assert seen == {
                    live.runner_id: Running(),
                    dead.runner_id: Exited(end),
                    nobody.runner_id: Gone(),
                }

    async def test_exited_stays_the_same(self) -> None:
        handle = await self.start(exits(3))
        end = await self.end(handle)
        await self.launcher.stop(handle, 0)
        async with aclosing(await self.world.reopen()) as other:
            for launcher in (self.launcher, other, self.launcher):
                assert await self.see(handle, launcher) == Exited(end)

    async def test_what_the_main_process_leaves_behind_is_dead_when_exited_is_seen(self) -> None:
        handle = await self.start(LEAVES_CHILDREN)
        assert (await self.end(handle)).code == 3
        assert not await self.world.processes(handle)

    async def test_a_runner_killed_behind_our_back_is_not_a_success(self) -> None:
        handle = await self.ready(STUBBORN_TREE)
        await self.world.kill_behind_back(handle)
        end = await self.end(handle)
        assert (end.code, end.signal) in [(None, "SIGKILL"), (137, None), (137, "SIGKILL")]
        assert end.stopped is not True
        assert not end.oom_killed
        assert not await self.world.processes(handle)

    async def test_a_runner_deleted_behind_our_back_is_gone(self) -> None:
        handle = await self.ready(RUNS_ON)
        await self.world.delete_behind_back(handle)
        await self.gone(handle)
        assert handle.runner_id not in await self.listed()
        with pytest.raises(RunnerGone):
            await self.read(handle)
        await self.launcher.stop(handle, 10)
        await self.launcher.stop(handle, 0)
        await self.launcher.remove(handle)
        assert await self.see(handle) == Gone()

    async def test_an_exit_deleted_behind_our_back_is_gone_for_a_fresh_launcher(self) -> None:
        handle = await self.start(exits(0))
        await self.end(handle)
        await self.world.delete_behind_back(handle)
        async with aclosing(await self.world.reopen()) as other:
            await self.gone(handle, other)
            await other.remove(handle)

    async def test_watch_hints_at_an_exit(self) -> None:
        handle = await self.ready(HANDLES_TERM)
        async with closing(self.launcher.watch()) as ids, asyncio.timeout(self.patience):
            await self.launcher.stop(handle, 10)
            async for runner_id in ids:
                if runner_id == handle.runner_id and isinstance(await self.see(handle), Exited):
                    break

    # restart

    async def test_a_fresh_launcher_finds_everything(self) -> None:
        handle = await self.ready(HANDLES_TERM)
        await self.launcher.aclose()
        async with aclosing(await self.world.reopen()) as other:
            assert await self.listed(other) == [handle.runner_id]
            await self.running(handle, other)
            assert await self.read(handle, other) == [b"ready"]
            await other.stop(handle, 10)
            end = await self.end(handle, other)
            assert end.code == 9
            assert await self.read(handle, other) == [b"ready", b"bye"]
            await other.remove(handle)
            await self.gone(handle, other)

    async def test_an_exit_while_nobody_looked_is_known(self) -> None:
        handle = await self.start(Script("sleep 0.5; echo done; exit 7", ("after=0.5", "print=done", "exit=7")))
        before = time.time()
        await self.launcher.aclose()
        await asyncio.sleep(1 + self.settle)  # the runner ends meanwhile, where the engine is quick
        async with aclosing(await self.world.reopen()) as other:
            assert await self.listed(other) == [handle.runner_id]
            end = await self.end(handle, other)
            assert (end.code, end.stopped is True) == (7, False)
            assert end.finished_at is not None
            assert before - 2 < end.finished_at < time.time() + 2
            assert await self.read(handle, other) == [b"done"]

    async def test_closing_ends_watches_and_followers_and_no_runner(self) -> None:
        handle = await self.ready(RUNS_ON)
        watcher, seen = asyncio.create_task(self._watch()), list[bytes]()

        async def follow() -> None:
            async for line in self.launcher.logs(handle, follow=True):
                seen.append(line.text)

        async def begun() -> str | None:
            return None if seen or follower.done() else "no line yet"

        follower = asyncio.create_task(follow())
        await self.until("it follows", begun)
        await asyncio.sleep(self.settle)
        await self.launcher.aclose()
        await self.launcher.aclose()
        async with asyncio.timeout(self.patience):
            await follower
            await watcher
        assert seen == [b"ready"]
        async with aclosing(await self.world.reopen()) as other:
            await self.running(handle, other)

    async def _watch(self) -> None:
        async for _ in self.launcher.watch():
            pass

    async def test_cancelled_watches_and_followers_end_as_cancelled(self) -> None:
        handle = await self.ready(RUNS_ON)
        tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self.follow(handle))]
        await asyncio.sleep(self.settle)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=self.patience)
        assert [task.cancelled() for task in tasks] == [True, True]
        await self.running(handle)

    # an engine that does not answer

    async def test_unavailable_is_neither_gone_nor_an_end(self) -> None:
        live, dead = await self.ready(RUNS_ON), await self.start(exits(7))
        end = await self.end(dead)
        async with self.world.unavailable():
            for handles in ([live], [unknown()]):
                with pytest.raises(LauncherUnavailable):
                    await self.launcher.observe(handles)
            for handles in ([dead], [live, dead]):
                try:
                    seen = await self.launcher.observe(handles)
                except LauncherUnavailable:
                    continue
                assert seen == {dead.runner_id: Exited(end)}  # a known end may be told without asking
            with pytest.raises(LauncherUnavailable):
                await self.launcher.list()
            with pytest.raises(LauncherUnavailable):
                await self.launcher.ping()
        await self.launcher.ping()
        await self.running(live)
        assert await self.end(dead) == end
        assert sorted(await self.listed()) == sorted([live.runner_id, dead.runner_id])

    async def test_a_launch_while_unavailable_can_be_repeated(self) -> None:
        runner_id = new_id()
        async with self.world.unavailable():
            with pytest.raises(LauncherUnavailable):
                await self.launcher.launch(runner_id, self.spec(HELLO, runner_id))
        handle = await self.launcher.launch(runner_id, self.spec(HELLO, runner_id))
        assert (await self.end(handle)).code == 0
        assert await self.world.copies(handle) == 1

    async def test_orders_while_unavailable_say_so(self) -> None:
        handle = await self.ready(RUNS_ON)
        async with self.world.unavailable():
            for grace in (10, 0):
                with pytest.raises(LauncherUnavailable):
                    await self.launcher.stop(handle, grace)
            with pytest.raises(LauncherUnavailable):
                await self.launcher.remove(handle)
            with pytest.raises(LauncherUnavailable):
                await self.read(handle)
        await self.running(handle)
        assert await self.read(handle) == [b"ready"]

    async def test_a_watch_survives_an_engine_that_was_away(self) -> None:
        handle = await self.ready(HANDLES_TERM)
        async with closing(self.launcher.watch()) as ids:
            async with self.world.unavailable():
                first = asyncio.ensure_future(anext(ids))
                await asyncio.sleep(self.settle)
            await self.launcher.stop(handle, 10)
            async with asyncio.timeout(self.patience):
                runner_id = await first
                while runner_id != handle.runner_id or not isinstance(await self.see(handle), Exited):
                    runner_id = await anext(ids)

    # stop

    async def test_a_stopped_runner_may_choose_its_exit_code(self) -> None:
        handle = await self.ready(HANDLES_TERM)
        asked = time.time()
        await self.launcher.stop(handle, 10)
        end = await self.end(handle)
        assert (end.code, end.signal) == (9, None)
        assert self.came_after(end, asked)

    def came_after(self, end: Exit, asked: float) -> bool:
        """Whether the stop came first: the launcher's word, and else the times; as the reconciler judges it."""
        if end.stopped is not None:
            return end.stopped
        return end.finished_at is None or end.finished_at >= asked

    async def test_a_stop_asks_the_whole_tree(self) -> None:
        handle = await self.ready(WHOLE_TREE_HANDLES_TERM)
        await self.launcher.stop(handle, 10)
        assert (await self.end(handle)).code == 9
        assert await self.read(handle) == [b"ready", b"child"]

    async def test_death_by_sigterm_is_told_apart_from_exit_143(self) -> None:
        by_exit = await self.end(await self.start(exits(143)))
        handle = await self.ready(RUNS_ON)
        await self.launcher.stop(handle, 10)
        by_signal = await self.end(handle)
        assert (by_signal.code, by_signal.signal) in [(None, "SIGTERM"), (143, "SIGTERM"), (143, None)]
        assert (by_exit.code, by_exit.signal) != (by_signal.code, by_signal.signal)

    async def test_a_runner_that_ended_before_the_stop_keeps_its_end(self) -> None:
        handle = await self.start(exits(7))
        await self.follow(handle)  # its end, without a look at it
        await asyncio.sleep(self.settle)
        asked = time.time()
        await self.launcher.stop(handle, 10)
        await self.launcher.stop(handle, 0)
        end = await self.end(handle)
        assert (end.code, end.signal) == (7, None)
        assert not self.came_after(end, asked)

    async def test_a_stop_without_grace_kills_the_whole_tree(self) -> None:
        handle = await self.ready(STUBBORN_TREE)

        async def grown() -> str | None:
            count = await self.world.processes(handle)
            return None if count is None or count >= 6 else f"{count} are seen"

        await self.until("the harness sees the children, their children and those who left the session", grown)
        await self.launcher.stop(handle, 60)
        await self.said(handle, b"asked")
        await self.running(handle)
        asked = time.time()
        await self.launcher.stop(handle, 0)
        end = await self.end(handle)
        assert (end.code, end.signal) in [(None, "SIGKILL"), (137, None), (137, "SIGKILL")]
        assert self.came_after(end, asked)
        assert not await self.world.processes(handle)

    async def test_a_kill_needs_no_polite_stop_before_it(self) -> None:
        handle = await self.ready(HANDLES_TERM)
        await self.launcher.stop(handle, 0)
        end = await self.end(handle)
        assert (end.code, end.signal) in [(None, "SIGKILL"), (137, None), (137, "SIGKILL")]
        assert await self.read(handle) == [b"ready"]

    async def test_stopping_twice_is_stopping_once(self) -> None:
        handle = await self.ready(HANDLES_TERM)
        await self.launcher.stop(handle, 10)
        await self.launcher.stop(handle, 10)
        assert (await self.end(handle)).code == 9
        assert await self.read(handle) == [b"ready", b"bye"]
        await self.launcher.stop(handle, 10)

    async def test_stopping_an_unknown_runner_does_nothing(self) -> None:
        handle = unknown()
        await self.launcher.stop(handle, 10)
        await self.launcher.stop(handle, 0)
        assert await self.see(handle) == Gone()

    # logs

    async def test_logs_can_be_read_before_during_and_after(self) -> None:
        handle = await self.start(HANDLES_TERM)
        assert await self.read(handle) in ([], [b"ready"])
        await self.said(handle, b"ready")
        await self.launcher.stop(handle, 10)
        await self.end(handle)
        assert await self.read(handle) == [b"ready", b"bye"]

    async def test_a_follower_gets_lines_as_they_come_and_ends_with_the_runner(self) -> None:
        handle = await self.start(HANDLES_TERM)
        async with closing(self.launcher.logs(handle, follow=True)) as lines, asyncio.timeout(self.patience):
            assert (await anext(lines)).text == b"ready"
            await self.running(handle)
            await self.launcher.stop(handle, 10)
            assert [line.text async for line in lines] == [b"bye"]

    async def test_following_an_exited_runner_ends(self) -> None:
        handle = await self.start(COUNTS)
        await self.end(handle)
        assert await self.follow(handle) == LINES

    async def test_reading_resumes_behind_any_line(self) -> None:
        handle = await self.start(COUNTS)
        await self.end(handle)
        lines = [line async for line in self.launcher.logs(handle)]
        assert [line.text for line in lines] == LINES
        async with aclosing(await self.world.reopen()) as other:
            for launcher in (self.launcher, other):
                for number in (0, 1, 98, COUNT - 2, COUNT - 1):
                    assert await self.read(handle, launcher, after=lines[number].cursor) == LINES[number + 1 :]

    async def test_following_resumes_in_a_fresh_launcher_without_gap_or_repeat(self) -> None:
        handle = await self.start(COUNTS_SLOWLY)
        first: list[LogLine] = []
        async with (
            aclosing(await self.world.reopen()) as other,
            asyncio.timeout(self.patience),
            closing(other.logs(handle, follow=True)) as lines,
        ):
            while len(first) < 5:
                first.append(await anext(lines))
        rest = await self.follow(handle, after=first[-1].cursor)
        assert [line.text for line in first] + rest == LINES[:40]

    async def test_lines_since_a_time_are_the_newer_ones_while_it_runs_and_after_its_end(self) -> None:
        handle = await self.ready(HANDLES_TERM)

        async def noted() -> str | None:
            lines = await self.since(handle, time.time())
            return f"{lines} still count as new" if lines else None

        await self.until("what is old is known to be old", noted)
        moment = time.time()
        following = asyncio.create_task(self.since(handle, moment, follow=True))
        await self.launcher.stop(handle, 10)
        await self.end(handle)
        assert await following == [b"bye"]
        async with aclosing(await self.world.reopen()) as other:
            for launcher in (self.launcher, other):
                for follow in (False, True):
                    assert await self.since(handle, moment, launcher, follow=follow) == [b"bye"]
                    assert await self.since(handle, 0, launcher, follow=follow) == [b"ready", b"bye"]
                    assert await self.since(handle, time.time() + 1, launcher, follow=follow) == []

    async def test_much_output_that_nobody_reads_does_not_block_the_runner(self) -> None:
        handle = await self.start(PRINTS_MUCH)
        assert (await self.end(handle)).code == 0
        lines = await self.read(handle)
        assert len(lines) == 50_001
        assert set(lines[:-1]) == {b"x" * 99}
        assert lines[-1] == b"done"

    async def test_any_bytes_and_a_last_line_without_an_end_arrive(self) -> None:
        handle = await self.start(PRINTS_BYTES)
        await self.end(handle)
        assert await self.read(handle) == [b"a\xff\xfe\xc3", b"", b"\r\0b\r", b"last"]
        assert await self.follow(handle) == [b"a\xff\xfe\xc3", b"", b"\r\0b\r", b"last"]

    async def test_a_long_line_is_one_line_and_a_huge_one_is_whole_or_cut_with_a_mark(self) -> None:
        handle = await self.start(PRINTS_LONG_LINES)
        await self.end(handle)
        first, *huge, last = await self.read(handle)
        assert first == b"x" * 100_000
        assert b"".join(huge) == b"y" * 1_000_000 or (len(huge) == 1 and huge[0].startswith(b"y") and huge[0].strip(b"y"))
        assert last == b"next"

    async def test_lines_missing_from_a_capped_log_are_told_of(self) -> None:
        runner_id = new_id()
        before = time.time() - 1
        handle = await self.launcher.launch(runner_id, replace(self.spec(PRINTS_OVER_THE_CAP, runner_id), log_max_mib=1))
        end = await self.end(handle)
        assert end.code == 0
        told = [line async for line in self.launcher.logs(handle)]
        lines = [line.text for line in told]
        assert await self.since(handle, before) == lines
        everything = [b"%d" % number for number in range(1, MANY + 1)]
        if end.log_truncated or told[0].gap:
            assert lines[0] not in everything
            lines = lines[1:]
            assert 0 < len(lines) < MANY
        else:
            assert len(lines) == MANY
        assert lines == everything[-len(lines) :]

    async def test_a_line_written_in_pieces_is_one_line_and_both_streams_are_one(self) -> None:
        handle = await self.start(PRINTS_IN_PIECES)
        assert await self.follow(handle) == [b"pieces", b"more", b"end"]
        assert await self.read(handle) == [b"pieces", b"more", b"end"]

    async def test_the_log_file_holds_the_whole_output(self) -> None:
        handle = await self.start(PRINTS_BYTES)
        await self.end(handle)
        path = self.launcher.log_file(handle)
        assert path is None or await asyncio.to_thread(path.read_bytes) == b"a\xff\xfe\xc3\n\n\r\0b\r\nlast"

    async def test_an_unknown_runner_has_no_logs(self) -> None:
        with pytest.raises(RunnerGone):
            await self.read(unknown())
        with pytest.raises(RunnerGone):
            await self.follow(unknown())

    # list and remove

    async def test_the_list_shows_ours_alone_and_the_rest_is_left_alone(self) -> None:
        live, dead = await self.ready(RUNS_ON), await self.start(exits(7))
        await self.end(dead)
        async with self.world.foreign() as name:
            assert sorted(await self.listed()) == sorted([live.runner_id, dead.runner_id])
            assert name not in await self.listed()
            await self.launcher.remove(dead)
            assert await self.listed() == [live.runner_id]

    async def test_removing_kills_and_frees_everything(self) -> None:
        live, dead = await self.ready(STUBBORN_TREE), await self.start(exits(7))
        await self.end(dead)
        for handle in (live, dead):
            assert await self.world.exists(handle)
            await self.launcher.remove(handle)
            await self.launcher.remove(handle)
            await self.gone(handle)
            await self.until("nothing of it exists", lambda handle=handle: self._something_exists(handle))  # type: ignore[misc]
            with pytest.raises(RunnerGone):
                await self.read(handle)
        assert await self.listed() == []

    async def _something_exists(self, handle: Handle) -> str | None:
        exists, processes = await self.world.exists(handle), await self.world.processes(handle)
        return f"{exists=}, {processes=}" if exists or processes else None

    async def test_removing_an_unknown_runner_does_nothing(self) -> None:
        await self.launcher.remove(unknown())
        assert await self.listed() == []

    async def test_removing_by_a_fresh_launcher_is_noticed(self) -> None:
        handle = await self.ready(RUNS_ON)
        async with aclosing(await self.world.reopen()) as other:
            await other.remove(Handle(runner_id=handle.runner_id))
        await self.gone(handle)

    async def test_removing_keeps_a_launch_under_way_from_making_it_later(self) -> None:
        handles = [unknown() for _ in self.moments()]
        moments = zip(self.moments(), handles, strict=True)
        await asyncio.gather(*[self._removed_early(seconds, handle) for seconds, handle in moments])
        await asyncio.sleep(self.settle)
        assert set((await self.launcher.observe(handles)).values()) == {Gone()}
        assert [await self.world.exists(handle) for handle in handles] == [False] * len(handles)
        assert [await self.world.processes(handle) or 0 for handle in handles] == [0] * len(handles)

    async def _removed_early(self, seconds: float, handle: Handle) -> None:
        with suppress(LauncherError):
            await self.cancel_after(seconds, handle.runner_id, self.spec(RUNS_ON, handle.runner_id))
        await self.launcher.remove(handle)
        await self.gone(handle)
