"""Figures of Jobs beside a bare client of the same API, from a client's clock. ``KUBECONFIG`` names the cluster.

    python tests/bench/kubernetes.py [--launches 32] [--rounds 9] [--ends 50] [--tracked 2000] [--json FILE]

Launches: the service over HTTP, and in turn with it a bare client in a process of its own that makes the same calls with the
same manifests: a Job, then its Secret. Their pods fit on no node, so that the figures are of the API and not of a kubelet.
Ends: from the watch event that tells a pod's end, as this process hears it, to the receipt of the end by long-poll.
Tracked: so many Jobs at once; the memory that each costs the service, its processor time, and how many connections to the
API it holds. Nothing here fails on a slow machine. All is in a namespace made for it, and removed with it.
"""

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from docker import Bare, Json, Round, Service, compare, drive, milliseconds, slot_of
from docker import spec_of as container_spec
from kubernetes_asyncio import config
from kubernetes_asyncio.client import ApiClient, Configuration

from app.launcher import LaunchSpec
from app.launchers import job as jobs

IMAGE = "busybox:latest"
CONCURRENCY = (1, 16)
ENDS_AT_ONCE = (1, 4)
PROMISED_RATIO, PROMISED_END_MS = 0.9, 50.0
NOWHERE: Json = {"runner-launcher-bench/nowhere": "yes"}
OPTIONS: Json = {"image": IMAGE, "image_pull_policy": "IfNotPresent", "launch_timeout_seconds": 7200}


class Api:
    """Asks the API as its owner."""

    def __init__(self, client: ApiClient, namespace: str) -> None:
        self._client = client
        self.host = str(client.configuration.host)
        self.namespace = namespace

    def path(self, kind: str, name: str = "") -> str:
        group = "/apis/batch/v1" if kind == "jobs" else "/api/v1"
        return f"{group}/namespaces/{self.namespace}/{kind}{name and '/'}{name}"

    async def ask(self, method: str, path: str, body: Json | None = None, **query: str) -> Json:
        async with self.response(method, path, body, **query) as answer:
            told: Json = await answer.json()
            if answer.status >= 300:
                raise SystemExit(f"{method} {path}: {told}")
            return told

    @asynccontextmanager
    async def response(
        self, method: str, path: str, body: Json | None = None, **query: str
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        headers = {"Accept": "application/json"}
        await self._client.update_params_for_auth(headers, [], ["BearerToken"])
        session: aiohttp.ClientSession = self._client.rest_client.pool_manager
        url = f"{self.host}{path}"
        data = {} if body is None else {"json": body}
        async with session.request(method, url, params=query, headers=headers, **data) as answer:  # type: ignore[arg-type]
            yield answer

    async def launch(self, installation: str, number: int, home: Path) -> None:
        """Make the calls of a launch, and no more."""
        made = jobs.manifests(*spec_of(home, number, self.namespace), installation)
        job = await self.ask("POST", self.path("jobs"), made.job)
        await self.ask("POST", self.path("secrets"), jobs.owned(made.secret, job))

    async def remove_all(self, installation: str) -> None:
        """Remove what an installation has made, and wait until it is gone."""
        selector = f"{jobs.INSTALLATION}={installation}"
        await self.ask(
            "DELETE", self.path("jobs"), {"kind": "DeleteOptions", "propagationPolicy": "Background"}, labelSelector=selector
        )
        while (await self.ask("GET", self.path("pods"), labelSelector=selector, limit="1"))["items"]:
            await asyncio.sleep(0.1)


@asynccontextmanager
async def cluster(namespace: str) -> AsyncIterator[Api]:
    configuration = Configuration()
    await config.load_kube_config(client_configuration=configuration, persist_config=False)
    configuration.connection_pool_maxsize = 0
    async with ApiClient(configuration) as client:
        yield Api(client, namespace)


def spec_of(home: Path, number: int, namespace: str) -> tuple[str, LaunchSpec]:
    """Write what the service makes of the same launch."""
    runner_id = f"runner-{secrets.token_hex(6)}"
    spec = container_spec(runner_id, slot_of(home, number), ("true",))
    return runner_id, replace(spec, options={**OPTIONS, "namespace": namespace, "node_selector": {**NOWHERE}})


class ClusterService(Service):
    """The service with pools in the cluster: one whose pods fit nowhere, and one of runners that end soon."""

    def __init__(self, home: Path, installation: str, namespace: str) -> None:
        super().__init__(home, installation)
        kubeconfig = os.environ.get("KUBECONFIG") or str(Path.home() / ".kube" / "config")
        common = {**OPTIONS, "namespace": namespace, "kubeconfig": kubeconfig}
        pools = {
            "at-once": common | {"command": ["true"], "node_selector": NOWHERE},
            "later": common | {"command": ["sleep", "0.5"]},
        }
        kinds = {name: {"type": "kubernetes", "max_concurrency": 10_000, "config": pool} for name, pool in pools.items()}
        (home / "pools.yaml").write_text(json.dumps({"agent_pools": kinds}))

    async def stop_all(self, client: aiohttp.ClientSession) -> None:
        """Stop every runner, and wait for the ends."""
        while True:
            async with client.get("/runners", params={"limit": "500"}) as answer:
                live = [one for one in (await answer.json())["items"] if one["phase"] != "finished"]
            if not live:
                return
            pending = iter([one for one in live if one["phase"] != "stopping"])

            async def work(pending: Any = pending) -> None:  # noqa: ANN401 - an iterator that workers share
                for one in pending:
                    async with client.delete(one["links"]["self"], params={"grace": "1"}) as told:
                        await told.read()

            await asyncio.gather(*(work() for _ in range(16)))
            await asyncio.sleep(0.2)


async def bare(home: Path, installation: str) -> None:
    """Be told by lines how many to launch, as the bare client's process."""
    async with cluster((home / "namespace").read_text()) as api:
        while line := await asyncio.to_thread(sys.stdin.readline):
            count, at_once = map(int, line.split())
            result = await drive(count, at_once, lambda number: api.launch(installation, number, home))
            print(json.dumps(result), flush=True)


class BareClient(Bare):
    script = str(Path(__file__).absolute())


async def launches(service: ClusterService, beside: Bare, api: Api, name: str, options: argparse.Namespace) -> Json:
    """Let both sides launch in turn, each going first in every other round."""
    result: Json = {}
    async with service.client() as client:

        async def ask(number: int) -> None:
            await service.launch(client, "at-once", number)

        print(f"{'launches':<12}{'launch p50 ms':>24}{'launch p99 ms':>24}{'launched/s':>26}{'the same':>30}")
        print(f"{'at once':<12}" + f"{'service':>12}{'bare':>12}" * 2 + f"{'service':>10}{'bare':>8}{'ratio':>8}" * 2)
        for at_once in CONCURRENCY:
            rounds, count = (Round(), Round()), max(options.launches, 2 * at_once)
            for number in range(-1, options.rounds):  # the first is to warm up
                for side in (0, 1) if number % 2 else (1, 0):
                    run = drive(count, at_once, ask) if side == 0 else beside.run(count, at_once)
                    _, took, seconds = await run
                    if number >= 0:
                        rounds[side].launches += took
                        rounds[side].rate.append(count / seconds)
                        rounds[side].whole_rate.append(count / seconds)
                    await (service.stop_all(client) if side == 0 else api.remove_all(name))
            result[str(at_once)] = compare(at_once, *rounds)
    return result


async def ends(service: ClusterService, api: Api, options: argparse.Namespace) -> Json:
    """Measure from the watch event of a pod's end to the receipt of the runner's."""
    heard: dict[str, float] = {}
    listening = asyncio.create_task(hear(api, heard))
    result: Json = {}
    async with service.client() as client:
        for at_once in ENDS_AT_ONCE:
            received: dict[str, float] = {}

            async def one(number: int, received: dict[str, float] = received) -> None:
                record = await service.launch(client, "later", number)
                received[record["runner_id"]] = await service.end(client, record)

            await drive(at_once, at_once, one)  # to warm up
            received.clear()
            await drive(options.ends, at_once, one)
            await asyncio.sleep(1)
            took = [at - heard[runner_id] for runner_id, at in received.items() if runner_id in heard]
            p50, p99 = milliseconds(took, 0.5), milliseconds(took, 0.99)
            print(f"watch event to receipt, {at_once} at once: median {p50:.1f} ms, p99 {p99:.1f} ms, over {len(took)}")
            result[f"{at_once} at once"] = {"p50_ms": p50, "p99_ms": p99, "ends": len(took)}
    listening.cancel()
    return result


async def hear(api: Api, heard: dict[str, float]) -> None:
    """Note when a watch of our own tells that a runner's container has terminated."""
    async with api.response("GET", api.path("pods"), watch="true", labelSelector="app=necrocode-runner") as answer:
        rest = b""
        async for chunk in answer.content.iter_any():
            *lines, rest = (rest + chunk).split(b"\n")
            now = time.time()
            for line in lines:
                pod = json.loads(line)["object"]
                if any("terminated" in one["state"] for one in pod["status"].get("containerStatuses", [])):
                    heard.setdefault(pod["metadata"]["labels"][jobs.RUNNER], now)


async def tracked(service: ClusterService, api: Api, options: argparse.Namespace) -> Json:
    """Hold many Jobs at once, and see what they cost."""
    async with service.client() as client:
        empty = resident_kib(service.pid)

        async def launch(number: int) -> None:
            await service.launch(client, "at-once", number)

        _, _, seconds = await drive(options.tracked, 16, launch)
        await asyncio.sleep(5)
        before, began = cpu_seconds(service.pid), time.perf_counter()
        await asyncio.sleep(20)
        cpu = (cpu_seconds(service.pid) - before) / (time.perf_counter() - began)
        each = (resident_kib(service.pid) - empty) / options.tracked
        connections = established(service.pid, api)
        print(
            f"{options.tracked} Jobs tracked (launched in {seconds:.0f} s): {each:.1f} KiB of memory each, "
            f"{100 * cpu:.1f} % of a core at rest, {connections} connections to the API, three of them watches"
        )
        await service.stop_all(client)
    return {"jobs": options.tracked, "kib_each": each, "cpu": cpu, "connections": connections}


def resident_kib(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0])


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def established(pid: int, api: Api) -> int:
    """Count a process's connections to the API's port."""
    sockets = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            sockets.add(str(entry.readlink()).removeprefix("socket:[").removesuffix("]"))
    port = f"{urlsplit(api.host).port or 443:04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(line[9] in sockets and line[2].endswith(f":{port}") and line[3] == "01" for line in lines)


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--launches", type=int, default=32, help="in a round, and at least two for each at once")
    parser.add_argument("--rounds", type=int, default=9, help="of each side at each concurrency, after one to warm up")
    parser.add_argument("--ends", type=int, default=50)
    parser.add_argument("--tracked", type=int, default=2000)
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
    for number in range(max(options.launches, options.ends, options.tracked, 2 * max(CONCURRENCY))):
        slot_of(home, number).mkdir(parents=True)
    name = f"bench-{secrets.token_hex(4)}"
    (home / "namespace").write_text(name)
    service, beside = ClusterService(home, name, name), BareClient(home, f"{name}-bare")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.2f} before")
    result: Json = {"launches": {}, "ends": {}}
    async with cluster(name) as api:
        await api.ask("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
        try:
            await service.start()
            await beside.start()
            if options.launches:
                result["launches"] = await launches(service, beside, api, f"{name}-bare", options)
            if options.ends:
                result["ends"] = await ends(service, api, options)
            if options.tracked:
                result["tracked"] = await tracked(service, api, options)
        finally:
            await service.stop()
            await beside.stop()
            await api.ask("DELETE", f"/api/v1/namespaces/{name}")
            shutil.rmtree(home, ignore_errors=True)
    ratios = [figures["ratio_launched"] for figures in result["launches"].values()]
    slowest = max((figures["p99_ms"] for figures in result["ends"].values()), default=0)
    print(f"promised: ratio at least {PROMISED_RATIO}, here {min(ratios, default=0):.3f} at least")
    print(f"promised: ends within {PROMISED_END_MS:g} ms (p99) of the watch event, here {slowest:.1f} ms at most")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    asyncio.run(main())
