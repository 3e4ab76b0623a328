"""Figures of containers beside a bare client of the same engine, from a client's clock.

    python tests/bench/docker.py [--launches 8] [--rounds 9] [--ends 100] [--json FILE]

Launches: the service over HTTP, and in turn with it a bare aiodocker client in a process of its own that makes the same
calls with the same configuration: create, context, start, and remove when the container has ended. A launch takes until the
answer says that it has started; a round takes until its last container is removed, as the engine's own events tell.
Ends: from the engine's die event to a client's receipt of the end, by long-poll; beside it, to the answer of a bare client
that looks at the container as soon as it hears that event. Nothing here fails on a slow machine.
"""

import argparse
import asyncio
import json
import os
import secrets
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiodocker import Docker

from app.launcher import LaunchSpec
from app.launchers.container import INSTALLATION, NAME, RUNNER_ID, Engine, container_config, context_archive

ENGINE = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
IMAGE = "busybox:latest"
CONCURRENCY = (1, 4, 16)
ENDS_AT_ONCE = (1, 4)
PROMISED_RATIO, PROMISED_END_MS = 0.95, 50.0

Json = dict[str, Any]
Launch = Callable[[int], Awaitable[None]]


class Service:
    """The service in a temporary home."""

    def __init__(self, home: Path, installation: str) -> None:
        self._home = home
        self._installation = installation
        self._process: asyncio.subprocess.Process | None = None
        self.url = ""
        common = f"type: docker, max_concurrency: 1000, config: {{image: '{IMAGE}', docker_host: '{ENGINE}', command: "
        (home / "pools.yaml").write_text(
            f"agent_pools:\n  at-once: {{{common}['true']}}}}\n  later: {{{common}[sleep, '0.5']}}}}\n"
        )

    async def start(self) -> None:
        settings = {
            "LISTEN": "127.0.0.1:0",
            "STATE_DIR": str(self._home / "state"),
            "POOLS_FILE": str(self._home / "pools.yaml"),
            "SLOT_ROOTS": str(self._home / "slots"),
            "INSTALLATION": self._installation,
        }
        env = {**os.environ, **{f"RUNNER_LAUNCHER_{name}": value for name, value in settings.items()}}
        log = self._home / "service.log"
        with log.open("wb") as file:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "app.cli", "serve", env=env, stdout=file, stderr=file
            )
        while "listening on" not in log.read_text():
            if self._process.returncode is not None:
                raise SystemExit(f"the service did not start: {log.read_text()}")
            await asyncio.sleep(0.02)
        self.url = log.read_text().split("listening on ")[1].split(";")[0]

    async def stop(self) -> None:
        if self._process and self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
            await self._process.wait()

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    def client(self) -> aiohttp.ClientSession:
        token = (self._home / "state" / "token").read_text().strip()
        return aiohttp.ClientSession(
            self.url,
            headers={"Authorization": f"Bearer {token}"},
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2),  # shorter than the service's own
            timeout=aiohttp.ClientTimeout(total=120),
        )

    async def launch(self, client: aiohttp.ClientSession, pool: str, number: int) -> Json:
        body = {
            "task": {"id": f"bench-{number}"},
            "slot": {"slot_id": f"slot-{number}", "slot_path": str(slot_of(self._home, number)), "repo_url": "none"},
            "pool": pool,
        }
        async with client.post("/runners", json=body) as answer:
            record: Json = await answer.json()
            if answer.status != 201:
                raise SystemExit(f"a launch was answered {answer.status}: {record}")
            return record

    async def end(self, client: aiohttp.ClientSession, record: Json) -> float:
        """Long-poll until the end is told, and give the time of its receipt."""
        tag, told = "", record
        while told["phase"] != "finished":
            headers = {"If-None-Match": tag, "Prefer": "wait=30"} if tag else {}
            async with client.get(record["links"]["self"], headers=headers) as answer:
                tag = answer.headers["ETag"]
                if answer.status == 200:
                    told = await answer.json()
        return time.time()


class Events:
    """What the engine says of its containers of some installations, heard independently of everybody."""

    def __init__(self, installations: list[str]) -> None:
        self._labels = installations
        self.died: dict[str, float] = {}
        self.removed: dict[str, dict[str, float]] = {name: {} for name in installations}
        self._news = asyncio.Condition()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator["Events"]:
        docker = client_of_engine()
        filters = {"type": ["container"], "event": ["die", "destroy"], "label": [INSTALLATION]}
        async with docker._query("events", params={"filters": json.dumps(filters)}, timeout=None) as response:
            task = asyncio.create_task(self._listen(response))
            try:
                yield self
            finally:
                task.cancel()
        await close(docker)

    async def _listen(self, response: aiohttp.ClientResponse) -> None:
        async for line in response.content:
            event = json.loads(line)
            attributes = event["Actor"]["Attributes"]
            at = event["timeNano"] / 1e9
            if attributes[INSTALLATION] not in self._labels:
                continue
            if event["Action"] == "die":
                self.died[attributes[RUNNER_ID]] = at
            else:
                self.removed[attributes[INSTALLATION]][attributes[RUNNER_ID]] = at
            async with self._news:
                self._news.notify_all()

    async def until_removed(self, installation: str, number: int) -> float:
        """Wait until so many containers were removed; gives when the last one was."""
        async with self._news, asyncio.timeout(120):
            await self._news.wait_for(lambda: len(self.removed[installation]) >= number)
        return max(self.removed[installation].values())

    async def until_died(self, runner_id: str) -> None:
        async with self._news, asyncio.timeout(120):
            await self._news.wait_for(lambda: runner_id in self.died)


@dataclass
class Round:
    """One side's figures of some launches: seconds for each, and launches per second."""

    launches: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    whole_rate: list[float] = field(default_factory=list)


async def drive(launches: int, at_once: int, launch: Launch) -> tuple[float, list[float], float]:
    """Launch so many with so many at once; gives when it began, what each took, and the seconds for all."""
    numbers = iter(range(launches))
    took = []

    async def work() -> None:
        for number in numbers:
            began = time.perf_counter()
            await launch(number)
            took.append(time.perf_counter() - began)

    began_at, began = time.time(), time.perf_counter()
    await asyncio.gather(*(work() for _ in range(at_once)))
    return began_at, took, time.perf_counter() - began


# The bare client: a process that is told by lines what to do.


async def bare(home: Path, installation: str) -> None:
    """Make the same calls as the service and no more; knows of ends by the engine's events, too."""
    docker = client_of_engine()
    engine = Engine.told(await docker.system.info())
    removals: set[asyncio.Task[None]] = set()

    async def remove_ended(response: aiohttp.ClientResponse) -> None:
        async for line in response.content:
            container = docker.containers.container(json.loads(line)["Actor"]["ID"])
            removal = asyncio.create_task(container.delete(force=True, v=True))
            removals.add(removal)
            removal.add_done_callback(removals.discard)

    async def launch(number: int) -> None:
        await launch_bare(docker, engine, installation, slot_of(home, number), "true")

    filters = {"type": ["container"], "event": ["die"], "label": [f"{INSTALLATION}={installation}"]}
    async with docker._query("events", params={"filters": json.dumps(filters)}, timeout=None) as response:
        task = asyncio.create_task(remove_ended(response))
        while line := await asyncio.to_thread(sys.stdin.readline):
            launches, at_once = map(int, line.split())
            print(json.dumps(await drive(launches, at_once, launch)), flush=True)
        task.cancel()
    await close(docker)


async def launch_bare(docker: Docker, engine: Engine, installation: str, slot: Path, *command: str) -> tuple[str, str]:
    runner_id = f"runner-{secrets.token_hex(6)}"
    spec = spec_of(runner_id, slot, command)
    owner = slot.stat().st_uid, slot.stat().st_gid
    config = container_config(runner_id, spec, installation=installation, owner=owner, engine=engine)
    container = await docker.containers.create(config, name=NAME + runner_id)
    await container.put_archive("/", context_archive(spec.context))  # type: ignore[no-untyped-call]
    await container.start()
    return runner_id, container.id


def spec_of(runner_id: str, slot: Path, command: tuple[str, ...]) -> LaunchSpec:
    """Write what the service makes of the same launch."""
    context = {
        **dict.fromkeys(("spec_name", "task_title", "task_description", "required_skill", "branch_name"), "unknown"),
        "task_id": runner_id,
        "dependencies": [],
        "slot_id": slot.name,
        "slot_path": str(slot),
        "metadata": {},
    }
    text = json.dumps(context)
    environment = {
        "RUNNER_ID": runner_id,
        "POOL_NAME": "at-once",
        "RUNNER_LAUNCHER_URL": "http://127.0.0.1:8080",
        "RUNNER_TOKEN": secrets.token_urlsafe(32),
        "TRACEPARENT": f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01",
        "TASK_CONTEXT": text,
    }
    labels = {"runner_id": runner_id, "task_id": runner_id, "pool_name": "at-once", "slot_id": slot.name, "policy": "{}"}
    return LaunchSpec(
        command=command,
        environment=environment,
        context=text.encode(),
        working_dir=str(slot),
        labels={**labels, "slot_place": f"docker:{ENGINE}:{slot}", "token_sha256": secrets.token_hex(32)},
        options={"image": IMAGE},
    )


class Bare:
    """The bare client's process."""

    script = str(Path(__file__).absolute())

    def __init__(self, home: Path, installation: str) -> None:
        self._arguments = ["--bare", str(home), installation]
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, self.script, *self._arguments, stdin=pipe, stdout=pipe, limit=2**24
        )

    async def run(self, launches: int, at_once: int) -> tuple[float, list[float], float]:
        assert self._process
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{launches} {at_once}\n".encode())
        line = await self._process.stdout.readline()
        if not line:
            raise SystemExit("the bare client ended")
        began, took, seconds = json.loads(line)
        return began, took, seconds

    async def stop(self) -> None:
        if self._process and self._process.returncode is None:
            assert self._process.stdin
            self._process.stdin.close()
            await self._process.wait()


# What is measured.


async def launches(
    service: Service, beside: Bare, events: Events, names: tuple[str, str], options: argparse.Namespace
) -> Json:
    """Let both sides launch in turn, each going first in every other round."""
    result: Json = {}
    async with service.client() as client:

        async def ask(number: int) -> None:
            await service.launch(client, "at-once", number)

        print(f"{'launches':<12}{'launch p50 ms':>24}{'launch p99 ms':>24}{'launched/s':>26}{'launched and removed/s':>30}")
        print(f"{'at once':<12}" + f"{'service':>12}{'bare':>12}" * 2 + f"{'service':>10}{'bare':>8}{'ratio':>8}" * 2)
        for at_once in CONCURRENCY:
            rounds, count = (Round(), Round()), max(options.launches, 2 * at_once)
            for number in range(-1, options.rounds):  # the first is to warm up
                for side in (0, 1) if number % 2 else (1, 0):
                    removed = events.removed[names[side]]
                    removed.clear()
                    run = drive(count, at_once, ask) if side == 0 else beside.run(count, at_once)
                    began, took, seconds = await run
                    whole = await events.until_removed(names[side], count) - began
                    if number >= 0:
                        rounds[side].launches += took
                        rounds[side].rate.append(count / seconds)
                        rounds[side].whole_rate.append(count / whole)
                    await asyncio.sleep(0.2)
            result[str(at_once)] = compare(at_once, *rounds)
    return result


def compare(at_once: int, ours: Round, bare: Round) -> Json:
    """Print one line of the table, and give it as JSON. A ratio is the median of the rounds' own ratios."""
    figures: Json = {}
    for name, side in (("service", ours), ("bare", bare)):
        figures[name] = {
            "launch_p50_ms": milliseconds(side.launches, 0.5),
            "launch_p99_ms": milliseconds(side.launches, 0.99),
            "launched_per_second": statistics.median(side.rate),
            "whole_per_second": statistics.median(side.whole_rate),
        }
    figures["ratio_launched"] = statistics.median(a / b for a, b in zip(ours.rate, bare.rate, strict=True))
    figures["ratio_whole"] = statistics.median(a / b for a, b in zip(ours.whole_rate, bare.whole_rate, strict=True))
    a, b = figures["service"], figures["bare"]
    print(
        f"{at_once:<12}{a['launch_p50_ms']:>12.1f}{b['launch_p50_ms']:>12.1f}"
        f"{a['launch_p99_ms']:>12.1f}{b['launch_p99_ms']:>12.1f}"
        f"{a['launched_per_second']:>10.2f}{b['launched_per_second']:>8.2f}{figures['ratio_launched']:>8.3f}"
        f"{a['whole_per_second']:>10.2f}{b['whole_per_second']:>8.2f}{figures['ratio_whole']:>8.3f}",
        flush=True,
    )
    return figures


async def ends(service: Service, events: Events, home: Path, name: str, options: argparse.Namespace) -> Json:
    """Measure from the engine's die event to the receipt of the end, by long-poll and by a bare look."""
    docker = client_of_engine()
    engine = Engine.told(await docker.system.info())
    result: Json = {}
    async with service.client() as client:

        async def ours(number: int) -> tuple[str, float]:
            record = await service.launch(client, "later", number)
            return record["runner_id"], await service.end(client, record)

        async def bare(number: int) -> tuple[str, float]:
            slot = slot_of(home, number)
            runner_id, container_id = await launch_bare(docker, engine, name, slot, "sleep", "0.5")
            await events.until_died(runner_id)
            container = docker.containers.container(container_id)
            await container.show()
            looked = time.time()
            await container.delete(force=True, v=True)
            return runner_id, looked

        for at_once in ENDS_AT_ONCE:
            for side, end in (("service", ours), ("bare look", bare)):
                result[f"{side}, {at_once} at once"] = await delays(side, end, at_once, events, options)
    await close(docker)
    return result


async def delays(
    side: str,
    end: Callable[[int], Awaitable[tuple[str, float]]],
    at_once: int,
    events: Events,
    options: argparse.Namespace,
) -> Json:
    received: dict[str, float] = {}

    async def one(number: int) -> None:
        runner_id, at = await end(number)
        received[runner_id] = at

    await drive(at_once, at_once, one)  # to warm up
    received.clear()
    await drive(options.ends, at_once, one)
    took = [at - events.died[runner_id] for runner_id, at in received.items()]
    p50, p99 = milliseconds(took, 0.5), milliseconds(took, 0.99)
    print(
        f"die event to receipt, {side}, {at_once} at once: median {p50:.1f} ms, p99 {p99:.1f} ms, over {len(took)}",
        flush=True,
    )
    return {"p50_ms": p50, "p99_ms": p99, "ends": len(took)}


def milliseconds(seconds: list[float], part: float) -> float:
    ordered = sorted(seconds)
    return 1000 * ordered[min(len(ordered) - 1, round(part * (len(ordered) - 1)))]


def slot_of(home: Path, number: int) -> Path:
    return home / "slots" / f"slot-{number}"


def client_of_engine() -> Docker:
    if ENGINE.startswith("unix://"):
        return Docker("http://docker", aiohttp.UnixConnector(ENGINE.removeprefix("unix://"), limit=0), api_version="auto")
    return Docker(ENGINE, aiohttp.TCPConnector(limit=0), api_version="auto")


async def close(docker: Docker) -> None:
    await docker.close()
    await docker.connector.close()


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--launches", type=int, default=8, help="in a round, and at least two for each at once")
    parser.add_argument("--rounds", type=int, default=9, help="of each side at each concurrency, after one to warm up")
    parser.add_argument("--ends", type=int, default=100)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--bare", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    task = asyncio.current_task()
    assert task
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    if options.bare:
        await bare(Path(options.bare[0]), options.bare[1])
        return
    home = Path(tempfile.mkdtemp(prefix="bench-"))
    for number in range(max(options.launches, options.ends, 2 * max(CONCURRENCY))):
        slot_of(home, number).mkdir(parents=True)
    name = f"bench-{secrets.token_hex(4)}"
    names = name, f"{name}-bare"
    service, beside = Service(home, names[0]), Bare(home, names[1])
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.2f} before")
    try:
        async with Events([*names]).listening() as events:
            await service.start()
            result: Json = {}
            result["ends"] = await ends(service, events, home, names[1], options) if options.ends else {}
            await beside.start()  # only now: it removes whatever of its name has ended
            result["launches"] = await launches(service, beside, events, names, options) if options.launches else {}
    finally:
        await service.stop()
        await beside.stop()
        await tidy(names)
        shutil.rmtree(home, ignore_errors=True)
    ratios = [figures["ratio_whole"] for figures in result["launches"].values()]
    slowest = max((figures["p99_ms"] for side, figures in result["ends"].items() if "service" in side), default=0)
    print(f"promised: ratio at least {PROMISED_RATIO}, here {min(ratios, default=0):.3f} at least")
    print(f"promised: ends within {PROMISED_END_MS:g} ms (p99), here {slowest:.1f} ms at most")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


async def tidy(names: tuple[str, str]) -> None:
    """Remove what an interrupted run has left."""
    docker = client_of_engine()
    for name in names:
        filters = json.dumps({"label": [f"{INSTALLATION}={name}"]})
        for container in await docker.containers.list(all=True, filters=filters):
            await container.delete(force=True, v=True)
    await close(docker)


if __name__ == "__main__":
    asyncio.run(main())
