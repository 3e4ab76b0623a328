"""The crash test: a real service is killed again and again with launches in flight, and nothing may be lost or doubled.

    python tests/crash/crash.py --rounds 500 [--seed N] [--plant late-intent]

A round starts a fresh set of launches, as Dispatchers do: each with a key, repeated until it is answered. In the middle the
service dies by SIGKILL, at a random instant or at a named point of its code (service.py), and is started again. When all
launches have ended the judge compares, from outside: what the runners themselves wrote into a journal, which processes and
run directories there are, and only then the records. A round in which nothing was in flight at the kill does not count.
"""

import argparse
import asyncio
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

POINTS = [
    "random",
    "accepted-committed",
    "launch-called",
    "shim-starting",
    "shim-started",
    "launch-returned",
    "started-committed",
    "running-committed",
    "end-observed",
    "finished-committed",
    "remove-called",
    "remove-returned",
    "stop-called",
    "stop-returned",
]
LAUNCHES = 8
STOPPED = 2
"""How many of them are stopped by a client while they run."""

SETTLE_SECONDS = 15.0
RUNNER = """
echo "start $TASK $RUNNER_ID" >>"$JOURNAL"
sleep "$SECONDS_TO_RUN"
echo "end $TASK $RUNNER_ID $CODE" >>"$JOURNAL"
exit "$CODE"
"""


@dataclass
class Launch:
    """One task and what its Dispatcher knows."""

    task_id: str
    seconds: float
    code: int
    stop: bool
    asked: bool = False
    runner_id: str | None = None
    record: dict[str, Any] = field(default_factory=dict)


@dataclass
class Verdict:
    """What the judge has found so far."""

    rounds: int = 0
    uncounted: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    in_flight: Counter[int] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)

    def fault(self, kind: str, text: str) -> None:
        self.faults[kind] += 1
        print(f"  {kind.upper()}: {text}", flush=True)

    def table(self, seed: int) -> str:
        points = "  ".join(f"{point} {self.kills[point]}" for point in POINTS if self.kills[point])
        flight = "  ".join(f"{number}:{times}" for number, times in sorted(self.in_flight.items()))
        kinds = ("lost", "doubled", "false end", "orphan")
        faults = "   ".join(f"{kind} {self.faults[kind]}" for kind in kinds)
        return (
            f"kind local-process   seed {seed}\nrounds {self.rounds}   (nothing in flight, not counted: {self.uncounted})\n"
            f"kills by point: {points}\nrounds by launches in flight at the kill: {flight}\n{faults}"
        )


class Service:
    """The service as a process of its own, started again after each death on the same port and state."""

    def __init__(self, home: Path, plant: str | None) -> None:
        self.home = home
        self.port = free_port()
        self.plant = plant
        self.process: asyncio.subprocess.Process | None = None

    async def start(self, point: str = "", count: int = 0) -> None:
        settings = {
            "LISTEN": f"127.0.0.1:{self.port}",
            "STATE_DIR": str(self.home / "state"),
            "POOLS_FILE": str(self.home / "pools.yaml"),
            "SLOT_ROOTS": str(self.home),
        }
        env = {**os.environ, **{f"RUNNER_LAUNCHER_{name}": value for name, value in settings.items()}}
        env |= {"CRASH_POINT": point, "CRASH_COUNT": str(count), "PLANT": self.plant or ""}
        with (self.home / "service.log").open("ab") as log:
            script = str(Path(__file__).with_name("service.py"))
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, script, env=env, stdout=log, stderr=log, stdin=asyncio.subprocess.DEVNULL
            )
        async with asyncio.timeout(SETTLE_SECONDS):
            while not await self._ready():
                await asyncio.sleep(0.02)

    async def _ready(self) -> bool:
        if self.process and self.process.returncode is not None:
            return True  # dead already: the point lay in its start
        try:
            async with httpx.AsyncClient() as client:
                return (await client.get(f"http://127.0.0.1:{self.port}/readyz")).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.returncode is None

    async def kill(self) -> None:
        if self.process:
            if self.process.returncode is None:
                self.process.send_signal(signal.SIGKILL)
            await self.process.wait()

    def client(self) -> httpx.AsyncClient:
        token = (self.home / "state" / "token").read_text().strip()
        return httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{self.port}", headers={"Authorization": f"Bearer {token}"}, timeout=10
        )


async def dispatch(service: Service, launch: Launch, slot: Path) -> None:
    """Be a Dispatcher: repeat the request until it is answered, then wait for the end, and stop it half-way if so told."""
    body = {
        "task": {"id": launch.task_id, "title": "crash"},
        "slot": {"slot_id": slot.name, "slot_path": str(slot), "repo_url": "none"},
        "pool": f"crash-{launch.code}-{launch.seconds:g}",
    }
    async with service.client() as client:
        stopped = False
        while True:
            try:
                launch.asked = True
                if launch.runner_id is None:
                    answer = await client.post("/runners", json=body, headers={"Idempotency-Key": launch.task_id})
                    if answer.status_code in (200, 201, 202):
                        launch.runner_id = answer.json()["runner_id"]
                    continue
                if launch.stop and not stopped:
                    await client.delete(f"/runners/{launch.runner_id}", params={"grace": 0.2})
                    stopped = True
                launch.record = (await client.get(f"/runners/{launch.runner_id}")).json()
                if launch.record.get("phase") == "finished":
                    return
            except (httpx.TransportError, KeyError):
                pass
            await asyncio.sleep(0.02)


async def play(service: Service, number: int, point: str, rng: random.Random, verdict: Verdict) -> None:
    """Play one round, and judge it."""
    home = service.home
    launches = [
        Launch(f"task-{number}-{index}", rng.choice([0, 0, 0.05, 0.2]), rng.choice([0, 0, 3]), stop=index < STOPPED)
        for index in range(LAUNCHES)
    ]
    await service.start(point, rng.randrange(STOPPED if point.startswith("stop") else LAUNCHES - 1))
    journal = home / "journal"
    dispatchers = []
    for index, launch in enumerate(launches):
        if launch.stop:
            launch.seconds = 20
        slot = home / "slots" / f"slot-{index}"
        slot.mkdir(parents=True, exist_ok=True)
        dispatchers.append(asyncio.create_task(dispatch(service, launch, slot)))
        await asyncio.sleep(rng.uniform(0, 0.02))
    if point == "random":
        await asyncio.sleep(rng.uniform(0, 0.35))
        await service.kill()
    else:
        try:
            async with asyncio.timeout(5):
                await service.process.wait()  # type: ignore[union-attr] # it was just started
        except TimeoutError:
            await service.kill()
    flying = sum(launch.asked and launch.record.get("phase") != "finished" for launch in launches)
    await service.start()
    try:
        async with asyncio.timeout(SETTLE_SECONDS):
            await asyncio.gather(*dispatchers)
    except TimeoutError:
        waiting = [launch.task_id for launch in launches if launch.record.get("phase") != "finished"]
        verdict.fault("lost", f"after {point}: no end in {SETTLE_SECONDS:g} s: {waiting}")
        for runner in (home / "state" / "runners").iterdir():
            shown = {path.name: path.read_text()[:200] for path in runner.iterdir() if path.is_file()}
            print(f"    {runner.name}: {shown}")
        for task in dispatchers:
            task.cancel()
        await asyncio.gather(*dispatchers, return_exceptions=True)
    if flying:
        verdict.rounds += 1
        verdict.kills[point] += 1
        verdict.in_flight[flying] += 1
    else:
        verdict.uncounted += 1
    await judge(service, launches, journal, verdict)
    await service.kill()


async def judge(service: Service, launches: list[Launch], journal: Path, verdict: Verdict) -> None:
    """Compare what runners wrote and what the machine shows with what the records say."""
    lines = [line.split() for line in journal.read_text().splitlines()] if journal.exists() else []
    starts = Counter(line[1] for line in lines if line[0] == "start")
    ends = {line[1]: (line[2], int(line[3])) for line in lines if line[0] == "end"}
    async with service.client() as client:
        for launch in launches:
            items = (await client.get("/runners", params={"task_id": launch.task_id})).json()["items"]
            judge_one(launch, starts[launch.task_id], ends.get(launch.task_id), items, verdict)
        live = (await client.get("/runners", params={"state": "running"})).json()["items"]
    for _ in range(100):  # what was removed a moment ago may still be going
        left = leftovers(service.home)
        if not left:
            break
        await asyncio.sleep(0.05)
    for runner_id in left:
        if runner_id not in {item["runner_id"] for item in live}:
            verdict.fault("orphan", f"{runner_id} has processes, a run directory or control groups, and no live record")
    for item in live:
        verdict.fault("lost", f"{item['runner_id']} is on record as running, and everybody has ended")


def judge_one(
    launch: Launch, starts: int, end: tuple[str, int] | None, items: list[dict[str, Any]], verdict: Verdict
) -> None:
    name = launch.task_id
    if starts > 1 or len(items) > 1:
        verdict.fault("doubled", f"{name}: started {starts} times, on record {len(items)} times")
    if not items:
        verdict.fault("lost", f"{name}: on no record")
        return
    record = items[0]
    if record["phase"] != "finished":
        verdict.fault("lost", f"{name}: {record['phase']}")
        return
    told = (record["state"], record["exit_code"], record["reason"])
    if launch.stop and record["reason"] == "cancelled" and (end is None or record["exit_code"] == end[1]):
        return  # it would have slept for long: an end that it wrote came of the stop, which wins
    if starts == 0 and not launch.stop:
        verdict.fault("lost", f"{name}: never started, and on record as {told}")
        return
    right = ("completed", 0, None) if launch.code == 0 else ("failed", launch.code, "exit_nonzero")
    if end is None or told != right:
        verdict.fault("false end", f"{name}: wrote {end}, and is on record as {told}: {record['message']}")


def leftovers(home: Path) -> set[str]:
    """Ids of runners that have processes, run directories or control groups on this machine."""
    found = {path.name for path in (home / "state" / "runners").glob("runner-*")}
    mark = f"JOURNAL={home / 'journal'}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if mark in variables:
            found |= {value[10:].decode() for value in variables if value.startswith(b"RUNNER_ID=")}
    return found


def prepare(home: Path) -> None:
    """Write a pool for each way that a runner may go."""
    lines = ["agent_pools:"]
    for code in (0, 3):
        for seconds in (0, 0.05, 0.2, 20):
            lines += [
                f"  crash-{code}-{seconds:g}:",
                "    type: local-process",
                "    max_concurrency: 100",
                "    config:",
                f"      command: [sh, {home / 'runner.sh'}]",
                f"      environment: {{JOURNAL: '{home / 'journal'}', CODE: '{code}', SECONDS_TO_RUN: '{seconds:g}'}}",
            ]
    (home / "pools.yaml").write_text("\n".join(lines))
    task = "TASK=${TASK_CONTEXT#*'\"task_id\":\"'}; TASK=${TASK%%'\"'*}\n"
    (home / "runner.sh").write_text(task + RUNNER)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--kind", default="local-process", choices=["local-process"])
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--point", choices=POINTS, help="die at this point alone")
    parser.add_argument("--plant", choices=["late-intent"])
    options = parser.parse_args()
    rng = random.Random(options.seed)  # noqa: S311 - a schedule, to be repeated by its seed
    home = Path(tempfile.mkdtemp(prefix="crash-"))
    prepare(home)
    service, verdict = Service(home, options.plant), Verdict()
    number = 0
    try:
        while verdict.rounds < options.rounds and number < 2 * options.rounds + 20:
            point = "planted" if options.plant else options.point or POINTS[number % len(POINTS)]
            await play(service, number, point, rng, verdict)
            number += 1
            if number % 25 == 0:
                print(f"{verdict.rounds} rounds, faults: {dict(verdict.faults)}", flush=True)
            if options.plant and verdict.faults:
                break
    finally:
        await service.kill()
    print(verdict.table(options.seed))
    if verdict.faults or verdict.rounds < (1 if options.plant else options.rounds):
        print(f"kept for a look: {home}")
        return 1
    shutil.rmtree(home)
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
