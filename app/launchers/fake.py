"""The fourth launcher: runners that only exist in memory and do what their command says. For tests.

A command is ``fake`` and then words, taken in order; ``after`` moves the time at which the words behind it happen:

    after=SECONDS            print=LINE      write=TEXT       env=NAME        context
    starting[=PROBLEM]       running         exit=CODE        signal=NAME     oom         memory=MIB

``env`` and ``context`` print what the runner was told; ``memory`` is an ``oom`` if it is over the limit. Without an end the
runner runs for ever. Words behind ``term`` happen from its first TERM on (none: TERM is ignored); without ``term`` TERM ends
it. Bytes that are not UTF-8 are written as surrogate escapes. Any other program is rejected as no such command.

``FakeWorld`` is the engine and outlives the launchers opened on it. It is passive: what a runner is follows from its words
and the world's clock, so a test that drives a clock of its own waits for nothing; it calls ``wake`` after moving the clock,
for the sake of ``watch`` and ``logs``. It knows no children of a runner and no caps on logs. A runner to which nothing
happens costs nothing but its memory.
"""

import asyncio
import heapq
import itertools
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import JsonValue

from app.errors import LauncherError, LauncherUnavailable, LaunchRejected, RunnerGone
from app.launcher import Enforcement, Exit, Exited, Found, Gone, Handle, LaunchSpec, LogLine, Observation, Running, Starting

_Effect = bytes | Starting | Running | Exit
_Step = tuple[float, _Effect]
_Trouble = LauncherError | asyncio.Event


@dataclass(slots=True, kw_only=True)
class _FakeRunner:
    """A runner as everything that has happened to it and will."""

    handle: Handle
    installation: str
    labels: Mapping[str, str]
    created_at: float
    steps: list[_Step]
    on_term: list[_Step]
    stopped: bool = False

    def at(self, now: float) -> tuple[Observation, Sequence[tuple[float, bytes]]]:
        """What it is by now, and all it has written, each piece with its time."""
        seen: Observation = Running()
        output: list[tuple[float, bytes]] = []
        for at, effect in sorted(self.steps, key=lambda step: step[0]):
            match effect:
                case _ if at > now:
                    break
                case bytes():
                    output.append((at, effect))
                case Exit():
                    seen = Exited(replace(effect, stopped=self.stopped, finished_at=at))
                    break
                case _:
                    seen = effect
        return seen, output


class FakeWorld:
    """The fake's engine, and a test's way to meddle with it behind the port.

    ``calls`` are the port's methods called, in order, with their runner; ``copies`` counts how often a runner was really
    started; ``silent`` are runners of which the engine says nothing now; ``progress`` is what every launch tells of itself.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self.calls: list[tuple[str, str | None]] = []
        self.copies: Counter[str] = Counter()
        self.silent: set[str] = set()
        self.progress: list[str] = []
        self.runners: dict[str, _FakeRunner] = {}
        self.removals: Counter[str] = Counter()
        self.troubles: deque[tuple[_Trouble, bool]] = deque()
        self.pulse = asyncio.Event()
        self.down: str | None = None
        self.moved: list[str] = []
        self._due: list[tuple[float, str]] = []
        self._pids = itertools.count(1000)

    # What a test does to the world.

    def finish(self, runner_id: str, code: int = 0) -> None:
        """End a runner now, with this code."""
        self.happen(runner_id, Exit(code=code))

    def happen(self, runner_id: str, effect: bytes | Starting | Running | Exit) -> None:
        """Let a runner write these bytes, become this, or end so, now."""
        self._plan(self.runners[runner_id], [(self.clock(), effect)])
        self.wake()

    def delete(self, runner_id: str) -> None:
        """Make the engine forget a runner."""
        self.runners.pop(runner_id, None)
        self.moved.append(runner_id)
        self.wake()

    def fail_launches(self, error: LauncherError, times: int = 1, *, acts: bool = False) -> None:
        """Let the next launch calls fail; with ``acts`` they have started the runner all the same."""
        self.troubles.extend([(error, acts)] * times)

    def hang_launches(self, times: int = 1, *, acts: bool = False) -> asyncio.Event:
        """Let the next launch calls hang, before or (``acts``) after the runner was started, until the gate is set."""
        gate = asyncio.Event()
        self.troubles.extend([(gate, acts)] * times)
        return gate

    @contextmanager
    def unavailable(self, message: str = "the fake engine does not answer") -> Iterator[None]:
        """Cut the engine off: every call fails and surely did nothing; runners go on."""
        self.down = message
        try:
            yield
        finally:
            self.down = None
            self.wake()

    def wake(self) -> None:
        """Tell whoever watches or follows to look again."""
        self.pulse.set()
        self.pulse = asyncio.Event()

    # What a launcher asks of it.

    async def asked(self, method: str, runner_id: str | None = None) -> None:
        """Note a call, take a moment for it as every real engine does, and fail it while the engine is cut off."""
        self.calls.append((method, runner_id))
        await asyncio.sleep(0)
        if self.down is not None:
            raise LauncherUnavailable(self.down, acted=False)

    def start(self, installation: str, runner_id: str, spec: LaunchSpec) -> Handle:
        """Start a runner, or find the one that is there."""
        if runner_id not in self.runners:
            now = self.clock()
            steps, on_term = _script(spec)
            limits = Enforcement(cpu="engine" if spec.cpu else "none", memory_mib="engine" if spec.memory_mib else "none")
            runner = self.runners[runner_id] = _FakeRunner(
                handle=Handle(runner_id=runner_id, pid=next(self._pids), enforced_by=limits),
                installation=installation,
                labels=dict(spec.labels),
                created_at=now,
                steps=[],
                on_term=on_term,
            )
            self._plan(runner, [(now, Running()), *_shifted(steps, now)])
            self.copies[runner_id] += 1
            self.wake()
        return self.runners[runner_id].handle

    def look(self, runner_id: str) -> tuple[Observation, Sequence[tuple[float, bytes]]]:
        """What became of a runner, and its output in pieces, each with its time."""
        runner = self.runners.get(runner_id)
        return runner.at(self.clock()) if runner else (Gone(), ())

    def order_stop(self, runner_id: str, *, kill: bool) -> None:
        """Deliver TERM (the first time) or KILL, unless the runner has ended."""
        runner, now = self.runners.get(runner_id), self.clock()
        if runner is None or isinstance(runner.at(now)[0], Exited):
            return
        if kill:
            self._plan(runner, [(now, Exit(signal="SIGKILL"))])
        elif not runner.stopped:
            self._plan(runner, _shifted(runner.on_term, now))
        runner.stopped = True
        self.wake()

    def moved_since(self, place: int) -> list[str]:
        """Give the runners to which something may have happened, in its order, from a place among all of them on."""
        passed = False
        while self._due and self._due[0][0] <= self.clock():
            self.moved.append(heapq.heappop(self._due)[1])
            passed = True
        if passed:
            self.wake()
        return self.moved[place:]

    async def change(self, pulse: asyncio.Event) -> None:
        """Wait until somebody calls ``wake``, or until the next word of any runner is due."""
        self.moved_since(len(self.moved))
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, self._due[0][0] - self.clock()) if self._due else None):
                await pulse.wait()

    def _plan(self, runner: _FakeRunner, steps: Sequence[_Step]) -> None:
        """Let this happen to a runner, at its times."""
        runner.steps.extend(steps)
        for at, _ in steps:
            heapq.heappush(self._due, (at, runner.handle.runner_id))


async def _befall(trouble: _Trouble | None) -> None:
    if isinstance(trouble, LauncherError):
        raise trouble
    if trouble:
        await trouble.wait()


def _shifted(steps: Sequence[_Step], seconds: float) -> list[_Step]:
    return [(at + seconds, effect) for at, effect in steps]


def _script(spec: LaunchSpec) -> tuple[list[_Step], list[_Step]]:
    """Read a command: what happens from the start on, and what from the first TERM on."""
    program, *words = spec.command or ("fake",)
    if program != "fake":
        raise LaunchRejected(f"no such command: {program}")
    main: list[_Step] = []
    on_term: list[_Step] = [(0, Exit(signal="SIGTERM"))]
    steps, at = main, 0.0
    for word in words:
        verb, _, value = word.partition("=")
        try:
            if verb == "after":
                at += float(value)
            elif verb == "term":
                steps, at = (on_term := []), 0.0
            elif effect := _effect(verb, value, spec):
                steps.append((at, effect))
        except (ValueError, KeyError) as error:
            raise LaunchRejected(f"not a word of the fake: {word}") from error
    return main, on_term


def _effect(verb: str, value: str, spec: LaunchSpec) -> _Effect | None:
    killed = Exit(signal="SIGKILL", oom_killed=True)
    effects: dict[str, Callable[[], _Effect | None]] = {
        "print": lambda: _bytes(value + "\n"),
        "write": lambda: _bytes(value),
        "env": lambda: _bytes(spec.environment.get(value, "")),
        "context": lambda: spec.context,
        "starting": lambda: Starting(value or None),
        "running": Running,
        "exit": lambda: Exit(code=int(value)),
        "signal": lambda: Exit(signal=value),
        "oom": lambda: killed,
        "memory": lambda: killed if spec.memory_mib and int(value) > spec.memory_mib else None,
    }
    return effects[verb]()


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _lines(output: Sequence[tuple[float, bytes]], *, ended: bool) -> Sequence[LogLine]:
    """Give lines, each with the time at which it was whole; a last one without an end only once the runner has ended."""
    lines: list[tuple[float, bytes]] = []
    at, rest = 0.0, b""
    for at, piece in output:
        *whole, rest = (rest + piece).split(b"\n")
        lines += [(at, text) for text in whole]
    if rest and ended:
        lines.append((at, rest))
    return [LogLine(str(number), text, at) for number, (at, text) in enumerate(lines, 1)]


class FakeLauncher:
    """Starts runners in a FakeWorld. Several launchers may share one, each for its own installation or for the same."""

    def __init__(self, world: FakeWorld, installation: str = "fake") -> None:
        self._world = world
        self._installation = installation
        self._closed = False

    async def launch(self, runner_id: str, spec: LaunchSpec, *, progress: Callable[[str], None] | None = None) -> Handle:
        world = self._world
        removals = world.removals[runner_id]
        trouble, acts = world.troubles.popleft() if world.troubles else (None, False)
        await world.asked("launch", runner_id)
        if progress:
            for text in world.progress:
                progress(text)
        if not acts:
            await _befall(trouble)
        if world.removals[runner_id] != removals:
            raise LauncherUnavailable(f"{runner_id} was removed while it was being launched", acted=False)
        handle = world.start(self._installation, runner_id, spec)
        await asyncio.sleep(0)
        if acts:
            await _befall(trouble)
        return handle

    async def observe(self, handles: Sequence[Handle]) -> Mapping[str, Observation]:
        await self._world.asked("observe")
        ids = [handle.runner_id for handle in handles]
        return {runner_id: self._world.look(runner_id)[0] for runner_id in ids if runner_id not in self._world.silent}

    async def watch(self) -> AsyncIterator[str]:
        """Yield each runner whenever it becomes something else; one that is found running is no news."""
        world, known, place = self._world, dict[str, Observation](), 0
        while not self._closed:
            pulse = world.pulse
            moved = [] if world.down else world.moved_since(place)
            place += len(moved)
            for runner_id in moved:
                seen, before = world.look(runner_id)[0], known.pop(runner_id, Running())
                if seen != Gone():
                    known[runner_id] = seen
                if seen != before:
                    yield runner_id
            await world.change(pulse)

    async def stop(self, handle: Handle, grace: float) -> None:
        await self._world.asked("stop", handle.runner_id)
        self._world.order_stop(handle.runner_id, kill=grace <= 0)

    async def logs(
        self, handle: Handle, *, after: str | None = None, since: float | None = None, follow: bool = False
    ) -> AsyncIterator[LogLine]:
        """Yield whole lines; the last one also without its end once the runner has ended. Cursors count lines."""
        await self._world.asked("logs", handle.runner_id)
        told = int(after or 0)
        while not self._closed:
            pulse = self._world.pulse
            seen, output = self._world.look(handle.runner_id)
            if isinstance(seen, Gone):
                raise RunnerGone(f"the fake world has no {handle.runner_id}")
            lines = _lines(output, ended=isinstance(seen, Exited))
            for line in lines[told:]:
                told += 1
                if not line.is_before(since):
                    yield line
            if isinstance(seen, Exited) or not follow:
                return
            await self._world.change(pulse)

    def log_file(self, handle: Handle) -> Path | None:  # noqa: ARG002 - all is in memory
        return None

    async def list(self) -> Sequence[Found]:
        await self._world.asked("list")
        mine = [runner for runner in self._world.runners.values() if runner.installation == self._installation]
        return [Found(runner.handle, runner.labels, runner.created_at) for runner in mine]

    async def remove(self, handle: Handle) -> None:
        await self._world.asked("remove", handle.runner_id)
        self._world.removals[handle.runner_id] += 1
        self._world.delete(handle.runner_id)

    async def ping(self) -> None:
        await self._world.asked("ping")

    def render(self, runner_id: str, spec: LaunchSpec) -> Mapping[str, JsonValue]:
        _script(spec)
        return {"runner_id": runner_id, "command": list(spec.command or ()), "environment": dict(spec.environment)}

    async def about(self) -> Mapping[str, JsonValue]:
        await self._world.asked("about")
        return {"version": "fake", "runners": len(self._world.runners)}

    async def aclose(self) -> None:
        self._closed = True
        self._world.wake()
