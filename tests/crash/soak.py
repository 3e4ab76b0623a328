"""The soak: a real service under churn for long, killed and started again, its engine too: nothing is lost, nothing grows.

    python tests/crash/soak.py [--minutes 30] [--live 200] [--containers 20] [--seed N] [--json FILE]

Each of so many Dispatchers has a slot, launches a runner in it, waits for its end and launches the next. Most runners are
processes, some are containers of an engine that is this test's own. Some end, some fail, some are stopped. All the time the
engine is restarted, killed and frozen; in the first two fifths of the time the service is killed, or told to go, as well.
The one that is started then lives to the end. A new process begins a new line of memory, so what grows is judged of this
one alone, in the second half of the time, when all that it keeps is as full as it gets: what has ended is forgotten after a
seventh of the time. How many ended in that time is chance, so of kept logs those count that no record explains. At the end
the judge of the crash test compares what the runners themselves wrote with what was told.

A slope is the median of those between all pairs of 30 medians (Theil and Sen), with its 95 % confidence interval. It is
flat if the whole interval lies below the bound, and the soak fails if the whole of it lies above. A run of less than twenty
minutes shows slopes, and says nothing by them: a young process fills its caches.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import os
import random
import secrets
import shutil
import signal
import sqlite3
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import aiohttp
import httpx
from crash import OWNER, Launch, LocalProcesses, Verdict, free_port, judge_one
from docker_engine import HOST, IMAGE, Api, PrivateEngine
from figures import Json, Report
from served import Service

STORM = 0.4
"""The share of the time in which the service dies again and again."""

SETTLED = 0.5
"""From which share of the time on what it holds should be level."""

KEPT = 0.15
"""For which share of the time the record of an end is kept; not below KEPT_SECONDS, for somebody is about to read it."""

KEPT_SECONDS = 30.0
FROZEN_SECONDS = 15.0
DRAIN_SECONDS = 600.0
LIFE_SECONDS = {"process": 90.0, "container": 120.0}
BLOCKS = 30
GROWS = 0.05
"""What may be added in an hour, as a share of the level; ``GROWS_AT_LEAST`` is always within the bound."""

GROWS_AT_LEAST = 2.0
JUDGED_SECONDS = 20 * 60.0
AGAIN = (429, 500, 502, 503)
"""Answers after which a client asks again. A service that goes down gives 500 where an engine kept it waiting."""

GIVEN_UP = ("removing", "dead")
CUT_SHORT = "CancelledError: Task cancelled, timeout graceful shutdown exceeded"

RUNNER = """
TASK=${TASK_CONTEXT#*'"task_id":"'}; TASK=${TASK%%'"'*}
PLAN=${TASK#*-}
read -r LIFE </proc/sys/kernel/random/uuid
echo "start $TASK $RUNNER_ID $LIFE" >>"$JOURNAL"
echo "$TASK has begun"; seq 2000
sleep "${PLAN%-*}"
read -r UPTIME _ </proc/uptime
echo "end $TASK $RUNNER_ID ${PLAN#*-} $UPTIME" >>"$JOURNAL"
exit "${PLAN#*-}"
"""
"""A task is called NUMBER-SECONDS-CODE."""


@dataclass
class Told:
    """A launch, and what its Dispatcher was told of it, once it has ended; times are of ``time.monotonic``."""

    launch: Launch
    asked: float
    ended: float
    records: int
    log: str
    events: list[Json]


@dataclass
class Soak:
    """One soak: who takes part, and what was seen."""

    home: Path
    service: Service
    engine: PrivateEngine | None
    rng: random.Random
    seconds: float
    verdict: Verdict
    told: list[Told] = field(default_factory=list)
    under_way: dict[str, Launch] = field(default_factory=dict)
    samples: list[Json] = field(default_factory=list)
    deaths: Counter[str] = field(default_factory=Counter)
    starts: list[float] = field(default_factory=list)
    deeds: list[tuple[str, float, float]] = field(default_factory=list)
    """What was done to the engine, from when to when."""

    ends: Counter[str] = field(default_factory=Counter)
    """How often each runner was said to end, by the stream of events."""

    forgotten: int = 0
    """How many runners a killed engine forgot, and so was said never to have started."""

    given_up: int = 0
    """How many dead containers the engine removes for ever: killed amid a start, it leaves mounts that are in its way."""

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        self.over = asyncio.Event()
        self.hurting = asyncio.Lock()
        self.numbers = itertools.count()
        self.kept = max(KEPT_SECONDS, KEPT * self.seconds)

    @property
    def passed(self) -> float:
        """The share of the time that has passed."""
        return (time.monotonic() - self.began) / self.seconds

    async def run(self, live: int, containers: int) -> None:
        """Keep so many runners alive for the time, then stop them all."""
        async with self.service.client() as self.client:
            trouble = asyncio.create_task(self.trouble())
            tasks = [asyncio.create_task(work) for work in (self.follow(), self.storm(), self.measure(), self.forget())]
            dispatchers = [
                asyncio.create_task(self.dispatch(place, "container" if place < containers else "process"))
                for place in range(live)
            ]
            together = asyncio.gather(*dispatchers)
            try:
                everybody: list[asyncio.Future[Any]] = [together, trouble, *tasks]
                await asyncio.wait(everybody, timeout=self.seconds, return_when=asyncio.FIRST_EXCEPTION)
                self.over.set()
                await trouble
                for task in tasks[1:]:
                    task.cancel()
                for outcome in await asyncio.gather(*tasks[1:], return_exceptions=True):
                    if isinstance(outcome, BaseException) and not isinstance(outcome, asyncio.CancelledError):
                        raise outcome
                await asyncio.wait([together], timeout=DRAIN_SECONDS)
                if together.done():
                    together.result()
                await self.judge()
            finally:
                for task in (rest := [trouble, *tasks, *dispatchers]):
                    task.cancel()
                await asyncio.gather(*rest, together, return_exceptions=True)

    # Who asks the service.

    async def ask(self, method: str, path: str, **request: object) -> tuple[int, Json, str]:
        """Ask until the service answers, which may be dead or going down; gives status, what it said, and the ETag."""
        while True:
            try:
                async with self.client.request(method, path, **request) as answer:  # type: ignore[arg-type] # passed on as it is
                    text = await answer.text()
                    said = json.loads(text) if "json" in answer.content_type and text else {"text": text}
                    if answer.status not in AGAIN or "runner" in said:
                        return answer.status, said, answer.headers.get("ETag", "")
            except (aiohttp.ClientError, TimeoutError):
                pass
            await asyncio.sleep(0.25)

    async def dispatch(self, place: int, pool: str) -> None:
        """Be a Dispatcher: keep one slot at work."""
        slot = self.service.slot(place)
        slot.mkdir()
        if os.geteuid() == 0:
            os.chown(slot, OWNER, OWNER)
        await asyncio.sleep(self.rng.uniform(0, 0.02 * self.seconds))
        while not self.over.is_set():
            seconds = self.rng.uniform(0.05, 2) * min(LIFE_SECONDS[pool], self.seconds / 8)
            code, stop = self.rng.choice([0, 0, 3]), self.rng.random() < 1 / 3
            name = f"{next(self.numbers)}-{3600 if stop else round(seconds, 2):g}-{code}"
            launch = self.under_way[name] = Launch(name, seconds, code, stop=stop)
            self.told.append(await self.live_through(launch, slot, pool))
            del self.under_way[name]

    async def live_through(self, launch: Launch, slot: Path, pool: str) -> Told:
        """Launch, and wait for the end, which this client brings about itself if so planned, or if the time is over."""
        task = {"id": launch.task_id, "title": "soak", "description": "x" * 2000}
        body = {"task": task, "slot": {"slot_id": slot.name, "slot_path": str(slot), "repo_url": "none"}, "pool": pool}
        asked = time.monotonic()
        while launch.runner_id is None:
            status, said, _ = await self.ask("POST", "/runners", json=body, headers={"Idempotency-Key": launch.task_id})
            launch.runner_id = said.get("runner", said).get("runner_id")
            if launch.runner_id is None:
                self.verdict.fault("refused", f"{launch.task_id}: {status} {said}")
                await asyncio.sleep(5)
        path, tag, stopped = f"/runners/{launch.runner_id}", "", False
        while launch.record.get("phase") != "finished":
            left = asked + launch.seconds - time.monotonic() if launch.stop else math.inf
            if (left <= 0 or self.over.is_set()) and not stopped:
                await self.ask("DELETE", path, params={"grace": "1"})
                launch.stop = stopped = True
            wait = f"wait={max(1, min(10, left)) if not stopped else 10:.0f}"
            status, said, tag = await self.ask("GET", path, headers={"If-None-Match": tag, "Prefer": wait})
            if status == 404:
                self.verdict.fault("lost", f"{launch.runner_id} is on no record any more")
                break
            launch.record = said if status == 200 else launch.record
        ended = time.monotonic()
        _, said, _ = await self.ask("GET", "/runners", params={"task_id": launch.task_id})
        _, log, _ = await self.ask("GET", f"{path}/logs")
        _, history, _ = await self.ask("GET", f"{path}/events")
        return Told(launch, asked, ended, len(said["items"]), str(log.get("text")), history["items"])

    async def follow(self) -> None:
        """Read all events, across all deaths of the service, and count each runner's ends."""
        place, timeout = "0", aiohttp.ClientTimeout(total=None, sock_read=60)
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                headers = {"Accept": "text/event-stream", "Last-Event-ID": place}
                async with self.client.get("/events", headers=headers, timeout=timeout) as answer:
                    if answer.status == 410:
                        self.verdict.fault("lost", f"events behind {place}: {await answer.text()}")
                        place = "0"
                    async for line in answer.content:
                        word, _, rest = line.decode().strip().partition(": ")
                        if word == "id":
                            place = rest
                        elif word == "data" and '"to":"finished"' in rest:
                            event = json.loads(rest)
                            self.ends[event["runner_id"]] += event["from"] != "finished"
            await asyncio.sleep(0.2)

    async def forget(self) -> None:
        """Have what need not be kept forgotten, as an operator with a full disk does."""
        while True:
            await asyncio.sleep(self.kept / 10)
            await self.ask("POST", "/retention")

    # What goes wrong.

    async def storm(self) -> None:
        """Let the service die again and again; the last one that is started lives on."""
        every = max(6.0, self.seconds / 60)
        await asyncio.sleep(every)
        while self.passed < STORM:
            how = self.rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
            self.deaths[how.name] += 1
            await self.service.end(how)
            self.look_into_log()
            await asyncio.sleep(self.rng.uniform(0, 3))
            self.starts.append(await self.service.start())
            await asyncio.sleep(self.rng.uniform(0.5, 1.5) * every)

    async def trouble(self) -> None:
        """Do to the engine what may befall one."""
        while self.engine:
            await asyncio.sleep(self.rng.uniform(0.5, 1.5) * max(6.0, self.seconds / 30))
            if self.over.is_set():
                return
            deed, since = self.rng.choice(["restart", "kill", "freeze"]), time.monotonic()
            async with self.hurting:
                if deed == "freeze":
                    with self.engine.frozen():
                        await asyncio.sleep(min(FROZEN_SECONDS, self.seconds / 60))
                else:
                    await asyncio.to_thread(self.engine.stop if deed == "restart" else self.engine.kill)
                    await asyncio.sleep(self.rng.uniform(0, 3))
                    await asyncio.to_thread(self.engine.start)
            self.deeds.append((deed, since, time.monotonic()))

    def look_into_log(self) -> None:
        """Find what the service itself takes for a defect."""
        text = (self.home / "service.log").read_text(errors="replace")
        if found := text.count("Traceback (most recent call last)") - text.count(CUT_SHORT):
            kept = self.home / f"service-{len(self.starts)}.log"
            kept.write_text(text)
            self.verdict.fault("defect", f"{found} tracebacks in {kept}")

    # What is seen.

    async def measure(self) -> None:
        """Note from time to time what the service holds."""
        while True:
            with contextlib.suppress(
                OSError, aiohttp.ClientError, httpx.TransportError, sqlite3.Error, IndexError
            ):  # one is dead just now
                self.samples.append(await self.sample())
                if len(self.samples) % 30 == 0:
                    print(f"{100 * self.passed:3.0f} %  {self.samples[-1]}  faults {dict(self.verdict.faults)}", flush=True)
            await asyncio.sleep(min(2.0, max(0.4, self.seconds / 600)))

    async def sample(self) -> Json:
        async with self.client.get("/metrics") as answer:
            lines = (await answer.text()).splitlines()
        pid, state = self.service.pid, self.service.state
        files, known = await asyncio.to_thread(sizes, state), await asyncio.to_thread(on_record, state)
        logs = {path: size for path, size in files.items() if path.startswith(str(state / "logs"))}
        sample: Json = {
            "at": time.monotonic() - self.began,
            "pid": pid,
            "live runners": figure(lines, "runner_launcher_pool_runners{"),
            "memory, RSS, MiB": self.service.resident_kib() / 1024,
            "memory of its own, MiB": self.service.private_kib() / 1024,
            "file descriptors": len([*Path(f"/proc/{pid}/fd").iterdir()]),
            "threads": len([*Path(f"/proc/{pid}/task").iterdir()]),
            "tasks": figure(lines, "runner_launcher_tasks "),
            "kept logs without a record": sum(Path(path).name.partition(".")[0] not in known for path in logs),
            "state directory without kept logs, MiB": (sum(files.values()) - sum(logs.values())) / 2**20,
            "state directory without kept logs, files": len(files) - len(logs),
            "database, MiB": files.get(str(state / "runners.db"), 0) / 2**20,
            "write-ahead log, MiB": files.get(str(state / "runners.db-wal"), 0) / 2**20,
        }
        if self.engine and not self.hurting.locked():
            with self.engine.api() as api:
                sample["containers on the engine"] = len(await asyncio.to_thread(api.containers))
        return sample

    # The judge.

    async def judge(self) -> None:
        """Compare what runners wrote, and what is left of them, with what was told."""
        self.look_into_log()
        for name, launch in self.under_way.items():
            self.verdict.fault("lost", f"{name}: no end in {DRAIN_SECONDS:g} s: {launch.record}")
        lines = [line.split() for line in (self.home / "witness" / "journal").read_text().splitlines()]
        starts = Counter(line[1] for line in lines if line[0] == "start")
        wrote = {line[1]: (line[2], int(line[3]), float(line[4])) for line in lines if line[0] == "end"}
        for told in self.told:
            before = self.verdict.faults.total()
            self.judge_one(told, starts[told.launch.task_id], wrote.get(told.launch.task_id))
            if self.verdict.faults.total() > before:
                print(f"    {told.launch.record}\n    {told.events}", flush=True)
        known = {told.launch.runner_id for told in self.told} | {launch.runner_id for launch in self.under_way.values()}
        for line in lines:
            if line[0] == "start" and line[2] not in known:
                self.verdict.fault("orphan", f"{line[2]} ran, and nobody was told of it")
        await self.heard_all()
        for told in self.told:
            if (times := self.ends[str(told.launch.runner_id)]) != 1:
                self.verdict.fault(
                    "doubled" if times else "lost", f"{told.launch.runner_id} has {times} ends among the events"
                )
        for runner_id, lives in (await self.left()).items():
            self.verdict.fault("orphan", f"{runner_id} {'lives' if lives else 'was left behind'}")

    def judge_one(self, told: Told, starts: int, wrote: tuple[str, int, float] | None) -> None:
        """Judge one launch as the crash test does; who was in a container while its engine was stopped may have died of it.

        But for those who had written that they ended, unless that was as their engine stopped (both by the kernel's clock).

        An engine that is killed as it starts a container forgets that it did, and says that it never ran.
        """
        launch, record = told.launch, told.launch.record
        if not record:
            return
        hurt = record["pool_name"] == "container" and any(
            deed != "freeze" and since < told.ended and until > told.asked for deed, since, until in self.deeds
        )
        amid = wrote is None or any(since - 1 < wrote[2] < until for _, since, until in self.deeds)
        if hurt and amid and starts == 1 and record["state"] == "failed" and record["exit_code"] != 0 and told.records == 1:
            self.forgotten += record["reason"] in ("engine_unavailable", "launch_timeout")
        else:
            judge_one(launch, starts, wrote and wrote[:2], [record] * told.records, self.verdict, away=hurt)
        if wrote and not record["log_truncated"] and f"{launch.task_id} has begun" not in told.log:
            self.verdict.fault("lost", f"{launch.runner_id} wrote a log that begins: {told.log[:200]}")

    async def heard_all(self) -> None:
        """Let the stream of events come to its end."""
        deadline = time.monotonic() + DRAIN_SECONDS
        while any(not self.ends[str(told.launch.runner_id)] for told in self.told) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)

    async def left(self) -> dict[str, bool]:
        """Find what is left of runners once all is settled, and whether it lives."""
        deadline = time.monotonic() + DRAIN_SECONDS
        while True:
            left = await LocalProcesses(self.home).leftovers()
            if self.engine:
                with self.engine.api() as api:
                    found = await asyncio.to_thread(api.containers)
                stuck = [container for container in found if container["State"] in GIVEN_UP]
                self.given_up = len(stuck)
                left |= {str(each["Names"]): each["State"] == "running" for each in found if each not in stuck}
            if not left or time.monotonic() > deadline:
                return left
            await asyncio.sleep(0.5)

    # What is told.

    def tell(self, report: Report, seed: int) -> None:
        """Show what happened, and which way each figure goes."""
        ends = Counter(told.launch.record.get("reason") or "completed" for told in self.told)
        deeds = Counter(deed for deed, _, _ in self.deeds)
        kinds = dict.fromkeys(("lost", "doubled", "false end", "orphan", *self.verdict.faults))
        rows: list[list[object]] = [
            ["seed", str(seed)],
            ["minutes", self.seconds / 60],
            ["launches", len(self.told)],
            ["ends", counted(ends)],
            ["the service died by", counted(self.deaths)],
            ["and was ready again after, s: median, longest", spread(self.starts)],
            ["the engine", counted(deeds)],
            ["runners that it forgot when it was killed", self.forgotten],
            ["dead containers that it tries to remove, and cannot", self.given_up],
            *([kind, self.verdict.faults[kind]] for kind in kinds),
        ]
        report.table(["soak", ""], rows)
        life = [each for each in self.samples if each["at"] > SETTLED * self.seconds]
        hours = (life[-1]["at"] - life[0]["at"]) / 3600
        if {each["pid"] for each in life} != {self.service.pid}:
            self.verdict.fault("defect", "the service did not live through the second half")
        lines, table = {}, []
        for name in [key for key in life[-1] if key not in ("at", "pid")]:
            line = lines[name] = Slope.of([(each["at"] / 3600, each[name]) for each in life if name in each])
            says = line.says if self.seconds >= JUDGED_SECONDS else "too short to say"
            table.append([name, line.level, line.an_hour, f"{line.low:+,.2f} to {line.high:+,.2f}", line.bound, says])
            if says == "GROWS":
                self.verdict.fault("grows", f"{name} by {line.an_hour:,.2f} an hour")
        print(f"one service, {60 * hours:.1f} minutes, load {os.getloadavg()[1]:.1f}, {len(life)} samples")
        report.table(["", "level", "added in an hour", "95 % sure", "bound", ""], table)
        lives = sum(told.ended - self.began > SETTLED * self.seconds for told in self.told) / hours
        each = lines["memory of its own, MiB"].an_hour * 2**20 / lives
        report.table(["", ""], [["lives in an hour", lives], ["memory that each of them leaves, bytes", each]])
        report.figures = {
            "slopes": {name: vars(line) for name, line in lines.items()},
            "faults": self.verdict.faults,
            "samples": self.samples,
        }


@dataclass(frozen=True)
class Slope:
    """Which way a figure goes: its level, what is added in an hour, and between which bounds that surely lies."""

    level: float
    an_hour: float
    low: float
    high: float

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]]) -> "Slope":
        """Draw a line through points of hours and values."""
        size = math.ceil(len(points) / BLOCKS)
        blocks = [points[first : first + size] for first in range(0, len(points), size)]
        middles = [tuple(statistics.median(each) for each in zip(*block, strict=True)) for block in blocks]
        slopes = sorted((y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in itertools.combinations(middles, 2))
        n, pairs = len(middles), len(slopes)
        wide = 1.96 * math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
        low, high = max(0, math.floor((pairs - wide) / 2)), min(pairs - 1, math.ceil((pairs + wide) / 2))
        return cls(statistics.median(y for _, y in middles), statistics.median(slopes), slopes[low], slopes[high])

    @property
    def bound(self) -> float:
        return max(GROWS * self.level, GROWS_AT_LEAST)

    @property
    def says(self) -> str:
        return "flat" if self.high <= self.bound else "GROWS" if self.low > self.bound else "not sure"


def figure(lines: Sequence[str], name: str) -> float:
    """Add up a figure of Prometheus over its labels."""
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def sizes(directory: Path) -> dict[str, int]:
    """Give what each file takes on the disk."""
    found = {}
    for path, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found[f"{path}/{name}"] = Path(path, name).stat().st_blocks * 512
    return found


def on_record(state: Path) -> set[str]:
    """Give the ids of all runners that a service knows."""
    with contextlib.closing(sqlite3.connect(f"file:{state / 'runners.db'}?mode=ro", uri=True)) as database:
        return {runner_id for (runner_id,) in database.execute("SELECT runner_id FROM runners")}


def counted(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counter.most_common()) or "none"


def spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.1f}, {max(seconds):.1f}" if seconds else "never"


def lacking() -> str | None:
    """Say what this machine lacks for containers."""
    programs = [name for name in ("dockerd", "containerd", "runc", "unshare") if not shutil.which(name)]
    if os.geteuid() or programs:
        return f"an engine of its own needs root and {', '.join(programs) or 'nothing else that is not here'}"
    with contextlib.closing(Api(Path(HOST.removeprefix("unix://")))) as api:
        return None if api.answers() and api.has_image(IMAGE) else f"no engine at {HOST} has the image {IMAGE}"


def own_engine() -> PrivateEngine:
    """Start an engine that may be hurt, with the image that runners are made of."""
    with contextlib.closing(Api(Path(HOST.removeprefix("unix://")))) as api:
        image = api.image()
    engine = PrivateEngine()
    try:
        engine.start()
        with engine.api() as api:
            api.load(image)
    except BaseException:
        engine.close()
        raise
    return engine


def prepare(home: Path, engine: PrivateEngine | None, options: argparse.Namespace) -> Service:
    """Lay out what runners need, and set up the service."""
    witness = home / "witness"
    witness.mkdir()
    home.chmod(0o711)  # runners may be of other users
    witness.chmod(0o777)
    (witness / "runner.sh").write_text(RUNNER)
    (witness / "journal").touch(0o666)
    (witness / "journal").chmod(0o666)
    journal = {"JOURNAL": str(witness / "journal")}
    process = {"command": ["sh", str(witness / "runner.sh")], "environment": journal}
    container = {
        "image": IMAGE,
        "pull_policy": "never",
        "docker_host": engine.host if engine else "",
        "volumes": {str(witness): "/witness"},
        "command": ["sh", "/witness/runner.sh"],
        "environment": {"JOURNAL": "/witness/journal"},
    }
    pools: Json = {"process": {"type": "local-process", "max_concurrency": options.live, "config": process}}
    if engine:
        pools["container"] = {"type": "docker", "max_concurrency": options.live, "config": container}
    kept = max(KEPT_SECONDS, KEPT * options.minutes * 60)
    return Service(home, pools, listen=f"127.0.0.1:{free_port()}", retention_days=f"{kept / 86400:.6f}")


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--live", type=int, default=200, help="how many runners live at any time")
    parser.add_argument("--containers", type=int, default=20, help="how many of them are containers")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    parser.add_argument("--json", type=Path, help="a file for the figures, every sample among them")
    options = parser.parse_args()
    if options.containers and (lack := lacking()):
        print(f"without containers: {lack}", flush=True)
        options.containers = 0
    home, report, verdict = Path(tempfile.mkdtemp(prefix="soak-")), Report(), Verdict("soak", [])
    engine = await asyncio.to_thread(own_engine) if options.containers else None
    service = prepare(home, engine, options)
    try:
        async with service.running():
            rng = random.Random(options.seed)  # noqa: S311 - a plan
            soak = Soak(home, service, engine, rng, options.minutes * 60, verdict)
            await soak.run(options.live, options.containers)
            soak.tell(report, options.seed)
    finally:
        if engine:
            await asyncio.to_thread(engine.close)
    if options.json:
        report.write(options.json)
    if verdict.faults:
        print(f"faults: {counted(verdict.faults)}; kept for a look: {home}")
        return 1
    shutil.rmtree(home)
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
