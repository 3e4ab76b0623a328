"""Figures of local runners, from a client's clock: launches beside the bare limit, ends, memory, many at once, a restart.

    python tests/bench/local_process.py [--launches 200] [--rounds 7] [--at-once 1 4 16 64] [--ends 500] [--live 2000]
                                         [--until-refused]

Launches of ``true``: the service over HTTP, and in turn with it two bare clients, processes of their own. One starts the
same shim for the same command, in a run directory and control groups like ours; one starts the command alone, by
``asyncio.create_subprocess_exec``. A launch takes until the runner is started; a round is gone when no run directory is
left, or when the command has ended. Ends: from a runner's last act to the client's receipt of the end, by long-poll.
"""

import argparse
import asyncio
import os
import secrets
import shutil
import signal
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bare import Bare, obey, spec_of
from figures import Json, Report, Round, bench, compared, drive, in_turns, part, table_of_sides
from served import Refused, Service, private_kib
from typing_extensions import override

from app.launchers import cgroup
from app.launchers.local_process import LocalProcessLauncher
from app.launchers.run_directory import RunDirectory

ENDS_AT_ONCE = 4
LAUNCHING_AT_ONCE = 32
COMMANDS = {"at-once": ["true"], "last-act": ["sh", "last-act.sh"], "live": ["sleep", "3600"]}
POOLS = {
    name: {"type": "local-process", "max_concurrency": 100_000, "config": {"command": command}}
    for name, command in COMMANDS.items()
}


# The bare clients.


class Side(ABC):
    """Launches so many with so many at once, and waits until all have ended."""

    def __init__(self, home: Path) -> None:
        self._slots = home / "slots"
        self._ending: set[asyncio.Task[Any]] = set()

    async def drive(self, launches: int, at_once: int) -> Round:
        began = time.perf_counter()
        done = await drive(launches, at_once, self._launch)
        while self._ending:
            await asyncio.wait(self._ending)
        done.gone = time.perf_counter() - began
        return done

    @abstractmethod
    async def _launch(self, number: int) -> None: ...

    def _ends_by(self, end: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(end)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


class Shims(Side):
    """Starts shims as the launcher does, and does nothing else: no store, no watch, no record."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self._runs = home / "bare"
        self._runs.mkdir(exist_ok=True)
        pattern = self._runs / "pattern"
        spec = spec_of(pattern.name, self._slots / "slot-0", ("true",))
        self._spec = replace(spec, environment={**spec.environment, "PATH": os.environ["PATH"]})
        entered = RunDirectory(pattern).enter(self._spec)
        assert entered
        prepared = LocalProcessLauncher(self._runs)._prepare(RunDirectory(pattern), self._spec, entered)
        assert prepared
        prepared.close()
        entered.close()
        self._pattern, self._command, self._environment = str(pattern), prepared.command, prepared.environment
        RunDirectory(pattern).remove()

    @override
    async def _launch(self, number: int) -> None:
        place = self._runs / f"runner-{secrets.token_hex(6)}"
        place.mkdir()
        (place / "context.json").write_bytes(self._spec.context)
        group = cgroup.probed().create(place.name, None, None)
        (place / "cgroups").write_text(str(group))
        os.mkfifo(place / "alive")
        ready, told = os.pipe()
        with (place / "log").open("ab") as log:
            shim = await asyncio.create_subprocess_exec(
                *(str(place) if word == self._pattern else word for word in self._command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=told,
                stderr=log,
                cwd=self._slots / f"slot-{number}",
                env={**self._environment, "RUNNER_ID": place.name, "TASK_CONTEXT_FILE": str(place / "context.json")},
                start_new_session=True,
            )
        os.close(told)
        await readable(ready)
        if os.read(ready, 100) != b"started\n":
            raise SystemExit(f"a shim did not start: {(place / 'log').read_text()}")
        os.close(ready)
        await shim.wait()
        self._ends_by(self._end(place, group))

    async def _end(self, place: Path, group: cgroup.Group) -> None:
        """Wait until a shim has ended, which its fifo tells, and remove what was made for it."""
        try:
            alive = os.open(place / "alive", os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # it has ended already
            pass
        else:
            await readable(alive)
            os.close(alive)
        if (place / "exit").read_text().split()[:2] != ["exit", "0"]:
            raise SystemExit(f"a runner ended with {(place / 'exit').read_text()}")
        group.remove()
        shutil.rmtree(place)


class Commands(Side):
    """Starts the command, and waits for it."""

    @override
    async def _launch(self, number: int) -> None:
        nothing = asyncio.subprocess.DEVNULL
        slot = self._slots / f"slot-{number}"
        process = await asyncio.create_subprocess_exec(*COMMANDS["at-once"], stdin=nothing, stdout=nothing, cwd=slot)
        self._ends_by(process.wait())


async def readable(fd: int) -> None:
    """Wait until there is something to read, or until the other end of a pipe is closed."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(fd, lambda: None if ready.done() else ready.set_result(None))
    await ready
    loop.remove_reader(fd)


# What is measured.


async def launches(service: Service, options: argparse.Namespace, report: Report) -> None:
    """Let the three launch in turn."""
    sides = {name: Bare(__file__, name, str(service.home)) for name in ("shim", "command")}
    for side in sides.values():
        await side.start()
    figures: dict[int, Json] = {}
    async with service.client() as client:

        async def ours(count: int, at_once: int) -> Round:
            async def launch(number: int) -> None:
                await service.launch(client, "at-once", number)

            spent, began = service.cpu_seconds(), time.perf_counter()
            done = await drive(count, at_once, launch)
            runs = service.state / "runners"
            while any(runs.iterdir()):
                await asyncio.sleep(0.002)
            done.gone, done.cpu = time.perf_counter() - began, service.cpu_seconds() - spent
            return done

        for at_once in options.at_once:
            count = max(options.launches, 2 * at_once)
            turns = {"service": partial(ours, count, at_once)}
            turns |= {f"bare {name}": partial(side.run, count, at_once) for name, side in sides.items()}
            figures[at_once] = compared(await in_turns(options.rounds, turns))
    for side in sides.values():
        await side.stop()
    report.figures["launches"] = figures
    table_of_sides(report, "local launches", figures)
    alone = figures[min(figures)]
    for key, most in (("p50_ms", 5.0), ("p99_ms", 25.0)):
        beyond = alone["service"][key] - alone["bare shim"][key]
        report.promise(f"local launch beyond the bare shim, {key.replace('_', ', ')}", beyond, at_most=most)
    ratio = min(each["bare shim"]["ratio_gone"] for each in figures.values())
    report.promise("local throughput beside the bare shim, launched and gone", ratio, at_least=0.6)


async def ends(service: Service, options: argparse.Namespace, report: Report) -> None:
    """Measure from a runner's last act to the client's receipt of its end."""
    delays: list[float] = []
    async with service.client() as client:

        async def one(number: int) -> None:
            slot = service.slot(number)
            (slot / "last-act.sh").write_text("sleep 0.2; date +%s.%N >ended")
            record, received = await service.until_end(client, await service.launch(client, "last-act", number))
            if record["state"] != "completed":
                raise SystemExit(f"a runner did not complete: {record}")
            delays.append(received - float((slot / "ended").read_text()))

        await drive(options.ends, ENDS_AT_ONCE, one)
    figures = {"p50_ms": part(delays, 0.5), "p99_ms": part(delays, 0.99), "ends": len(delays)}
    report.figures["ends"] = figures
    report.table(
        ["local ends", "p50, ms", "p99, ms"], [[f"last act to receipt, {ENDS_AT_ONCE} at once", *figures.values()][:3]]
    )
    report.promise("a local end is seen, p99, ms", figures["p99_ms"], at_most=20.0)


async def many(service: Service, live: int, report: Report, *, until_refused: bool) -> None:
    """Have many alive at once; kill the service and start it again."""
    idle = service.private_kib()
    refusals: list[Refused] = []
    async with service.client() as client:

        async def launch(number: int) -> None:
            if not refusals:
                try:
                    await service.launch(client, "live", number)
                except Refused as refusal:
                    if not until_refused:
                        raise
                    refusals.append(refusal)

        done = await drive(live, LAUNCHING_AT_ONCE, launch)
        if refusals:
            live = len(await service.live(client, "live"))
            print(f"with {live:,} live, {refusals[0]}", flush=True)
        shims = [int(path.read_text().split()[0]) for path in (service.state / "runners").glob("*/claim")]
        figures: Json = {
            "live": live,
            "launched_per_second": live / done.launched,
            "idle_mib": idle / 1024,
            "kib_each": (service.private_kib() - idle) / live,
            "shim_kib": statistics.median(map(private_kib, shims)),
        }
    await service.end(signal.SIGKILL)
    figures["restart_seconds"] = await service.start()
    async with service.client() as client:
        began = time.perf_counter()
        if (found := await service.stop_all(client, "live")) != live:
            raise SystemExit(f"of {live} runners {found} were found again")
        figures["stopped_per_second"] = live / (time.perf_counter() - began)
    report.figures["many"] = figures
    names = {
        "launched_per_second": f"launched a second, {LAUNCHING_AT_ONCE} at once",
        "idle_mib": "service memory before, MiB",
        "kib_each": "service memory for each, KiB",
        "shim_kib": "memory of a shim, KiB",
        "restart_seconds": "killed and started again: ready after, s",
        "stopped_per_second": "stopped a second",
    }
    report.table([f"{live:,} live local runners", ""], [[name, figures[key]] for key, name in names.items()])
    report.promise(f"memory for each of {live} live runners, KiB", figures["kib_each"], at_most=20.0)
    report.promise(f"restart to ready with {live} live runners, s", figures["restart_seconds"], at_most=5.0)


async def measure(home: Path, options: argparse.Namespace, report: Report) -> None:
    service = Service(home, POOLS)
    for number in range(max(options.launches, options.ends, options.live, 2 * max(options.at_once))):
        service.slot(number).mkdir()
    async with service.running():
        if options.launches:
            await launches(service, options, report)
        if options.ends:
            await ends(service, options, report)
        if options.live:
            await many(service, options.live, report, until_refused=options.until_refused)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launches", type=int, default=200, help="in a round, and at least two for each at once; 0: none")
    parser.add_argument("--rounds", type=int, default=7, help="of each side at each concurrency, after one to warm up")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--ends", type=int, default=500)
    parser.add_argument("--live", type=int, default=2000)
    parser.add_argument("--until-refused", action="store_true", help="as many live as the machine bears, at most --live")
    bench(parser, measure)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--bare"]:
        kind, home = sys.argv[2:]
        asyncio.run(obey((Shims if kind == "shim" else Commands)(Path(home)).drive))
    else:
        main()
