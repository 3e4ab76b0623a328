"""The crash test: a real service is killed again and again with launches in flight, and nothing may be lost or doubled.

    python tests/crash/crash.py --rounds 500 [--kind docker | kubernetes] [--seed N] [--plant late-intent]

A round starts a fresh set of launches, as Dispatchers do: each with a key, repeated until it is answered. In the middle the
service dies by SIGKILL, at a random instant, at a named point of its code (service.py) or of its talk with the engine
(proxy.py), and is started again. When all launches have ended the judge compares, from outside: what the runners
themselves wrote into a journal, which processes and run directories there are or what the engine lists, and only then the
records. A round in which nothing was in flight at the kill does not count.
"""

import argparse
import asyncio
import multiprocessing
import os
import random
import runpy
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Protocol

import containers
import httpx
import jobs
import yaml
from containers import NO_TLS
from proxy import Proxy

POINTS = [
    "random",
    "accepted-committed",
    "launch-called",
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

END = ("state", "reason", "exit_code", "signal", "finished_at")
"""What is told of an end, once and for all."""

OWNER = 1000
"""Who owns the slots, and so whom a runner in a container is, where this test may say so."""

START_SECONDS = 60.0
FORKS = multiprocessing.get_context("forkserver")
"""Forks services from a process that has done nothing but import what they and this program need: most of a start."""

FORKS.set_forkserver_preload(
    [
        "httpx",
        "kubernetes_asyncio.config",
        "psycopg",
        "app.main",
        "app.server",
        "app.launchers.docker",
        "app.launchers.kubernetes",
    ]
)

RUNNER = """
TASK=${TASK_CONTEXT#*'"task_id":"'}; TASK=${TASK%%'"'*}
read -r LIFE </proc/sys/kernel/random/uuid
echo "start $TASK $RUNNER_ID $LIFE" >>"$JOURNAL"
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
    stop_early: bool = True
    asked: bool = False
    runner_id: str | None = None
    record: dict[str, Any] = field(default_factory=dict)


class World(Protocol):
    """Where runners run: how the service is set up for it, where else it can die, and what is left there."""

    points: list[str]
    settings: dict[str, str]
    settle_seconds: float
    spread_seconds: float
    early_stops: float
    """How often a stop follows its launch at once, and not when the runner is known to run."""

    async def open(self) -> None: ...
    async def close(self) -> None: ...
    def pool(self, environment: dict[str, str]) -> list[str]: ...
    def arm(self, point: str, count: int, service: "Service") -> None: ...
    async def calm(self) -> None:
        """End what trouble there is beside the crash."""
        ...

    async def leftovers(self) -> dict[str, bool]:
        """Give the ids of runners that are there still, and whether they live."""
        ...


class LocalProcesses:
    """Runners are processes of this machine."""

    settle_seconds = 15.0
    spread_seconds = 0.02
    early_stops = 1.0

    def __init__(self, home: Path) -> None:
        self._home = home
        self.points = ["shim-starting", "shim-started"]
        self.settings: dict[str, str] = {}

    async def open(self) -> None: ...
    async def close(self) -> None: ...
    def arm(self, point: str, count: int, service: "Service") -> None: ...
    async def calm(self) -> None: ...

    def pool(self, environment: dict[str, str]) -> list[str]:
        environment |= {"JOURNAL": str(self._home / "witness" / "journal")}
        return [
            "    type: local-process",
            "    config:",
            f"      command: [sh, {self._home / 'witness' / 'runner.sh'}]",
            f"      environment: {environment}",
        ]

    async def leftovers(self) -> dict[str, bool]:
        """Find processes and run directories."""
        found = {path.name: False for path in self._home.glob("*/runners/runner-*")}
        mark = f"JOURNAL={self._home / 'witness' / 'journal'}".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                variables = path.read_bytes().split(b"\0")
            except OSError:
                continue
            if mark in variables:
                found |= {value[10:].decode(): True for value in variables if value.startswith(b"RUNNER_ID=")}
        return found


class Containers:
    """Runners are containers of a Docker Engine, with a proxy in front of it."""

    settle_seconds = 60.0
    spread_seconds = 0.1
    early_stops = 1.0

    def __init__(self, home: Path) -> None:
        self._home = home
        self._name = f"crash-{secrets.token_hex(6)}"
        self._socket = home / "engine.sock"
        self._proxy = Proxy(
            containers.CALLS,
            lambda connected: asyncio.start_unix_server(connected, self._socket),
            lambda: asyncio.open_unix_connection(containers.ENGINE),
        )
        self.points = containers.POINTS
        self.settings = {"INSTALLATION": self._name}

    async def open(self) -> None:
        await self._proxy.open()

    async def close(self) -> None:
        await self._proxy.close()
        await containers.remove_all(self._name)

    def pool(self, environment: dict[str, str]) -> list[str]:
        environment |= {"JOURNAL": "/witness/journal"}
        return [
            "    type: docker",
            "    config:",
            "      image: busybox:latest",
            "      pull_policy: never",
            f"      docker_host: unix://{self._socket}",
            f"      volumes: {{{self._home / 'witness'}: /witness}}",
            "      command: [sh, /witness/runner.sh]",
            f"      environment: {environment}",
        ]

    def arm(self, point: str, count: int, service: "Service") -> None:
        self._proxy.arm(point, count, service.strike)

    async def calm(self) -> None:
        await self._proxy.come_back()

    async def leftovers(self) -> dict[str, bool]:
        """List the containers."""
        found = await containers.listed(self._name)
        return {entry["Labels"][containers.RUNNER_ID]: entry["State"] == "running" for entry in found}


class Jobs:
    """Runners are Jobs of a Kubernetes cluster, with a proxy in front of its API. Its node is this machine."""

    settle_seconds = 200.0
    spread_seconds = 0.3
    early_stops = 0.1  # old kubelets take a minute to let go of a pod that never started

    def __init__(self, home: Path) -> None:
        self._home = home
        self._name = f"crash-{secrets.token_hex(6)}"
        self._cluster = jobs.Cluster(self._name)
        self._port = free_port()
        self._proxy = Proxy(
            jobs.CALLS,
            lambda connected: asyncio.start_server(connected, "127.0.0.1", self._port),
            self._cluster.connect,
        )
        self.points = jobs.POINTS
        self.settings = {"INSTALLATION": self._name}

    async def open(self) -> None:
        await self._cluster.open()
        await self._proxy.open()
        (self._home / "kubeconfig").write_text(self._cluster.kubeconfig(self._port))
        volume = {"name": "witness", "hostPath": {"path": str(self._home / "witness")}}
        runner = {"name": "runner", "volumeMounts": [{"name": "witness", "mountPath": "/witness"}]}
        template = {"spec": {"template": {"spec": {"volumes": [volume], "containers": [runner]}}}}
        (self._home / "job.yaml").write_text(yaml.safe_dump({"apiVersion": "batch/v1", "kind": "Job", **template}))

    async def close(self) -> None:
        await self._proxy.close()
        await self._cluster.close()

    def pool(self, environment: dict[str, str]) -> list[str]:
        environment |= {"JOURNAL": "/witness/journal"}
        return [
            "    type: kubernetes",
            "    config:",
            f"      kubeconfig: {self._home / 'kubeconfig'}",
            f"      namespace: {self._name}",
            f"      job_template: {self._home / 'job.yaml'}",
            "      image: busybox:latest",
            "      image_pull_policy: IfNotPresent",
            "      command: [sh, /witness/runner.sh]",
            f"      environment: {environment}",
        ]

    def arm(self, point: str, count: int, service: "Service") -> None:
        self._proxy.arm(point, count, service.strike)

    async def calm(self) -> None:
        await self._proxy.come_back()

    async def leftovers(self) -> dict[str, bool]:
        """List Jobs, pods and Secrets."""
        return await self._cluster.left(self._name)


WORLDS: dict[str, Callable[[Path], World]] = {"local-process": LocalProcesses, "docker": Containers, "kubernetes": Jobs}


@dataclass
class Verdict:
    """What the judge has found so far."""

    kind: str
    points: list[str]
    rounds: int = 0
    uncounted: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    in_flight: Counter[int] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)

    def fault(self, kind: str, text: str) -> None:
        self.faults[kind] += 1
        print(f"  {kind.upper()}: {text}", flush=True)

    def table(self, seed: int) -> str:
        points = "  ".join(f"{point} {self.kills[point]}" for point in dict.fromkeys(self.points) if self.kills[point])
        flight = "  ".join(f"{number}:{times}" for number, times in sorted(self.in_flight.items()))
        kinds = ("lost", "doubled", "false end", "orphan")
        faults = "   ".join(f"{kind} {self.faults[kind]}" for kind in kinds)
        return (
            f"kind {self.kind}   seed {seed}\nrounds {self.rounds}   (nothing in flight, not counted: {self.uncounted})\n"
            f"kills by point: {points}\nrounds by launches in flight at the kill: {flight}\n{faults}"
        )


class Service:
    """The service as a process of its own, started again after each death on the same port and state."""

    def __init__(self, home: Path, world: World, plant: str | None) -> None:
        self.home = home
        self.world = world
        self.port = free_port()
        self.plant = plant
        self.settings: dict[str, str] = {}
        self.process: ForkServerProcess | None = None

    async def start(self, point: str = "", count: int = 0) -> None:
        settings = {
            "LISTEN": f"127.0.0.1:{self.port}",
            "STATE_DIR": str(self.home / "state"),
            "POOLS_FILE": str(self.home / "pools.yaml"),
            "SLOT_ROOTS": str(self.home),
            **self.world.settings,
            **self.settings,
        }
        variables = {f"RUNNER_LAUNCHER_{name}": value for name, value in settings.items()}
        variables |= {"CRASH_POINT": point, "CRASH_COUNT": str(count), "PLANT": self.plant or ""}
        self.process = FORKS.Process(target=be_service, args=(variables, self.home / "service.log"))
        self.process.start()
        self.world.arm(point, count, self)
        async with asyncio.timeout(START_SECONDS):
            while not await self._ready():
                await asyncio.sleep(0.02)

    async def _ready(self) -> bool:
        if not self.alive:
            return True  # dead already: the point lay in its start
        try:
            async with httpx.AsyncClient(verify=NO_TLS) as client:
                return (await client.get(f"http://127.0.0.1:{self.port}/readyz")).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.is_alive()

    def strike(self) -> None:
        if self.process:
            self.process.kill()

    async def kill(self) -> None:
        self.strike()
        await self.death()

    async def death(self) -> None:
        """Wait until it is dead."""
        while self.alive:
            await asyncio.sleep(0.01)

    def client(self) -> httpx.AsyncClient:
        token = (self.home / "state" / "token").read_text().strip()
        headers = {"Authorization": f"Bearer {token}"}
        return httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", headers=headers, timeout=10, verify=NO_TLS)


def be_service(variables: Mapping[str, str], log: Path) -> None:
    """Go on as the service, with these variables."""
    os.environ.update(variables)
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    runpy.run_path(str(Path(__file__).with_name("service.py")), run_name="__main__")


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
                    told = answer.json()
                    launch.runner_id = told.get("runner", told).get("runner_id")  # a launch that failed is a record, too
                    if launch.runner_id is None:
                        await asyncio.sleep(0.1)  # its engine is away
                    continue
                ready = launch.stop_early or launch.record.get("phase") == "running"
                if launch.stop and not stopped and ready:
                    stopped = (await client.delete(f"/runners/{launch.runner_id}", params={"grace": 0.2})).is_success
                launch.record = (await client.get(f"/runners/{launch.runner_id}")).json()
                if launch.record.get("phase") == "finished":
                    return
            except (httpx.TransportError, KeyError):
                pass
            await asyncio.sleep(0.02)


async def play(service: Service, number: int, point: str, rng: random.Random, verdict: Verdict) -> None:
    """Play one round, and judge it."""
    home, world = service.home, service.world
    launches = [
        Launch(
            f"task-{number}-{index}",
            rng.choice([0, 0, 0.05, 0.2]),
            rng.choice([0, 0, 3]),
            stop=index < STOPPED,
            stop_early=rng.random() < world.early_stops,
        )
        for index in range(LAUNCHES)
    ]
    await service.start(
        point,
        rng.randrange(STOPPED if point.startswith(("stop", "kill", "running", "exec", "list", "watch")) else LAUNCHES - 1),
    )
    dispatchers = []
    for index, launch in enumerate(launches):
        if launch.stop:
            launch.seconds = 20
        slot = home / "slots" / f"slot-{index}"
        if not slot.exists():
            slot.mkdir(parents=True)
            os.chown(slot, OWNER, OWNER) if os.geteuid() == 0 else None
        dispatchers.append(asyncio.create_task(dispatch(service, launch, slot)))
        await asyncio.sleep(rng.uniform(0, world.spread_seconds))
    if point == "random":
        await asyncio.sleep(rng.uniform(0, 0.35 + 10 * world.spread_seconds))
        await service.kill()
    else:
        try:
            async with asyncio.timeout(world.settle_seconds / 3):
                await service.death()
        except TimeoutError:
            point = "random"  # it never came by
            await service.kill()
    flying = sum(launch.asked and launch.record.get("phase") != "finished" for launch in launches)
    await service.start()
    await world.calm()
    try:
        async with asyncio.timeout(world.settle_seconds):
            await asyncio.gather(*dispatchers)
    except TimeoutError:
        waiting = [launch.record or launch.task_id for launch in launches if launch.record.get("phase") != "finished"]
        verdict.fault("lost", f"after {point}: no end in {world.settle_seconds:g} s: {waiting}")
        print(f"    still there: {await world.leftovers()}")
        for task in dispatchers:
            task.cancel()
        await asyncio.gather(*dispatchers, return_exceptions=True)
    if flying:
        verdict.rounds += 1
        verdict.kills[point] += 1
        verdict.in_flight[flying] += 1
    else:
        verdict.uncounted += 1
    await judge(service, launches, verdict, point)
    await service.kill()


async def judge(service: Service, launches: list[Launch], verdict: Verdict, point: str) -> None:
    """Compare what runners wrote and what their world shows with what the records say."""
    left = await what_is_left(service, late=point.endswith("-late"))
    journal = service.home / "witness" / "journal"
    lines = [line.split() for line in journal.read_text().splitlines()] if journal.exists() else []
    starts = Counter(line[1] for line in lines if line[0] == "start")
    ends = {line[1]: (line[2], int(line[3])) for line in lines if line[0] == "end"}
    async with service.client() as client:
        for launch in launches:
            items = (await client.get("/runners", params={"task_id": launch.task_id})).json()["items"]
            judge_told(launch, items, verdict)
            judge_one(launch, starts[launch.task_id], ends.get(launch.task_id), items, verdict, away=point.endswith("-away"))
            for item in items:
                told = (await client.get(f"/runners/{item['runner_id']}/events")).json()["items"]
                times = sum(event["to"] == "finished" != event["from"] for event in told)
                if times != (item["phase"] == "finished"):
                    verdict.fault("false end", f"{launch.task_id}: ended {times} times: {told}")
        records = (await client.get("/runners", params={"limit": 500})).json()["items"]
    live = [record for record in records if record["phase"] != "finished"]
    for runner_id, lives in left.items():
        if runner_id not in {item["runner_id"] for item in live}:
            verdict.fault("orphan", f"{runner_id} {'lives' if lives else 'was left behind'}, and is on record as ended")
    for item in live:
        verdict.fault("lost", f"{item['runner_id']} is on record as {item['phase']}, and everybody has ended")


async def what_is_left(service: Service, *, late: bool) -> dict[str, bool]:
    """Look once all is settled: what was removed a moment ago may still be going (an old cluster collects once a minute).

    What the engine has made, not started, of an order that came late is for the sweep of the next start.
    """
    left = await settled(service.world)
    if late and left and not any(left.values()):
        await service.kill()
        await service.start()
        left = await settled(service.world)
    return left


async def settled(world: World) -> dict[str, bool]:
    deadline = time.monotonic() + max(5.0, world.settle_seconds / 2)
    while (left := await world.leftovers()) and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    return left


def judge_told(launch: Launch, items: list[dict[str, Any]], verdict: Verdict) -> None:
    """An end that its Dispatcher was told stands, whatever crashes then."""
    told = launch.record
    for item in items:
        if told.get("phase") == "finished" and any(told[name] != item[name] for name in END):
            verdict.fault("false end", f"{launch.task_id}: told as {told}, and on record as {item}")


def judge_one(
    launch: Launch, starts: int, end: tuple[str, int] | None, items: list[dict[str, Any]], verdict: Verdict, *, away: bool
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
    by_stop = record["exit_code"] == end[1] if end else record["exit_code"] != 0  # a 0 comes of itself, and is written down
    if launch.stop and record["reason"] == "cancelled" and by_stop:
        return  # it would have slept for long: an end that it wrote came of the stop, which wins
    if away and starts == 0 and record["reason"] == "engine_unavailable":
        return
    if starts == 0 and not launch.stop:
        verdict.fault("lost", f"{name}: never started, and on record as {told}")
        return
    code = end[1] if end else launch.code
    right = ("completed", 0, None) if code == 0 else ("failed", code, "exit_nonzero")
    if end is None or told != right:
        verdict.fault("false end", f"{name}: wrote {end}, and is on record as {told}: {record['message']}")


def judge_starts(home: Path, verdict: Verdict) -> None:
    """See at last that nobody was started again in a round behind their own."""
    lines = [line.split() for line in (home / "witness" / "journal").read_text().splitlines()]
    for task, times in Counter(line[1] for line in lines if line[0] == "start").items():
        if times > 1:
            verdict.fault("doubled", f"{task}: started {times} times in all")


def prepare(home: Path, world: World) -> None:
    """Write a pool for each way that a runner may go."""
    witness = home / "witness"
    witness.mkdir()
    home.chmod(0o711)  # runners may be of other users
    witness.chmod(0o777)
    (witness / "runner.sh").write_text(RUNNER)
    lines = ["agent_pools:"]
    for code in (0, 3):
        for seconds in (0, 0.05, 0.2, 20):
            lines += [f"  crash-{code}-{seconds:g}:", "    max_concurrency: 100"]
            lines += world.pool({"CODE": f"{code}", "SECONDS_TO_RUN": f"{seconds:g}"})
    (home / "pools.yaml").write_text("\n".join(lines))


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--kind", default="local-process", choices=[*WORLDS])
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--point", action="append", help="die at this point alone, or at these in turn")
    parser.add_argument("--plant", choices=["late-intent"])
    options = parser.parse_args()
    rng = random.Random(options.seed)  # noqa: S311 - a schedule, to be repeated by its seed
    home = Path(tempfile.mkdtemp(prefix="crash-"))
    world = WORLDS[options.kind](home)
    points = options.point or POINTS + world.points
    service, verdict = Service(home, world, options.plant), Verdict(options.kind, ["random", *points])
    number = 0
    try:
        await world.open()
        prepare(home, world)
        while verdict.rounds < options.rounds and number < 2 * options.rounds + 20:
            point = "planted" if options.plant else points[number % len(points)]
            await play(service, number, point, rng, verdict)
            number += 1
            if number % 25 == 0:
                print(f"{verdict.rounds} rounds, faults: {dict(verdict.faults)}", flush=True)
            if options.plant and verdict.faults:
                break
        judge_starts(home, verdict)
    finally:
        await service.kill()
        await world.close()
    print(verdict.table(options.seed))
    if verdict.faults or verdict.rounds < (1 if options.plant else options.rounds):
        print(f"kept for a look: {home}")
        return 1
    shutil.rmtree(home)
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
