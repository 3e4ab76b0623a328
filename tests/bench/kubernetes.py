"""Figures of Jobs beside a bare client of the same API, from a client's clock. ``KUBECONFIG`` names the cluster.

    python tests/bench/kubernetes.py [--launches 32] [--runs 16] [--rounds 9] [--at-once 1 4 16 64]
                                      [--ends 50] [--tracked 2000]

Launches: the service over HTTP, and in turn with it a bare client in a process of its own that makes the same calls with the
same manifests: a Job, then its Secret. Their pods fit on no node, so that the figures are of the API and not of a kubelet.
Runs: the same with pods that do run, until the last has ended, as this process hears it; either side removes what has ended.
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
import sys
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
from bare import Bare, obey, spec_of
from figures import Json, Report, Round, bench, compared, drive, in_turns, part, table_of_sides
from kubernetes_asyncio import config
from kubernetes_asyncio.client import ApiClient, Configuration
from served import Service

from app.launchers import job as jobs

IMAGE = "busybox:latest"
KUBECONFIG = os.environ.get("KUBECONFIG") or str(Path.home() / ".kube" / "config")
ENDS_AT_ONCE = (1, 4)
BACKGROUND: Json = {"kind": "DeleteOptions", "propagationPolicy": "Background"}
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

    async def ended(self, selector: str) -> AsyncIterator[tuple[str, str]]:
        """Watch pods; gives the runner and the Job of each whose container has terminated, once or more."""
        async with self.response("GET", self.path("pods"), watch="true", labelSelector=selector) as answer:
            rest = b""
            async for chunk in answer.content.iter_any():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    pod = json.loads(line)["object"]
                    if any("terminated" in one["state"] for one in pod["status"].get("containerStatuses", [])):
                        yield pod["metadata"]["labels"][jobs.RUNNER], pod["metadata"]["labels"]["job-name"]

    async def launch(self, installation: str, number: int, home: Path, **where: Json) -> None:
        """Make the calls of a launch, and no more."""
        runner_id = f"runner-{secrets.token_hex(6)}"
        options = {**OPTIONS, "namespace": self.namespace, **where}
        spec = spec_of(runner_id, home / "slots" / f"slot-{number}", ("true",), **options)
        made = jobs.manifests(runner_id, spec, installation)
        job = await self.ask("POST", self.path("jobs"), made.job)
        await self.ask("POST", self.path("secrets"), jobs.owned(made.secret, job))

    async def remove_all(self, installation: str) -> None:
        """Remove what an installation has made, and wait until it is gone."""
        selector = f"{jobs.INSTALLATION}={installation}"
        await self.ask("DELETE", self.path("jobs"), BACKGROUND, labelSelector=selector)
        await self.until_gone(installation)

    async def until_gone(self, installation: str) -> None:
        """Wait until no pod of an installation is left."""
        selector = f"{jobs.INSTALLATION}={installation}"
        while (await self.ask("GET", self.path("pods"), labelSelector=selector, limit="1"))["items"]:
            await asyncio.sleep(0.1)


@asynccontextmanager
async def cluster(namespace: str) -> AsyncIterator[Api]:
    configuration = Configuration()
    await config.load_kube_config(client_configuration=configuration, persist_config=False)
    configuration.connection_pool_maxsize = 0
    async with ApiClient(configuration) as client:
        yield Api(client, namespace)


async def bare(home: Path, namespace: str, installation: str) -> None:
    """Be the bare client's process."""
    async with cluster(namespace) as api:

        async def remove_ended() -> None:
            seen = set()
            async with asyncio.TaskGroup() as removals:
                async for _, job in api.ended(f"{jobs.INSTALLATION}={installation}"):
                    if job not in seen:
                        seen.add(job)
                        removals.create_task(api.ask("DELETE", api.path("jobs", job), BACKGROUND))

        async def do(count: int, at_once: int, what: str) -> Round:
            if what == "run" and not removing:
                removing.append(asyncio.create_task(remove_ended()))
            where = {} if what == "run" else {"node_selector": NOWHERE}
            return await drive(count, at_once, lambda number: api.launch(installation, number, home, **where))

        removing: list[asyncio.Task[None]] = []
        await obey(do)


async def launches(service: Service, beside: Bare, api: Api, options: argparse.Namespace, report: Report) -> None:
    """Let both sides launch in turn, and remove all that they have made before the next turn."""
    figures: dict[int, Json] = {}
    async with service.client() as client:

        async def ask(number: int) -> None:
            await service.launch(client, "at-once", number)

        async def ours(count: int, at_once: int) -> Round:
            spent = service.cpu_seconds()
            done = await drive(count, at_once, ask)
            done.cpu = service.cpu_seconds() - spent
            await service.stop_all(client, "at-once", grace=1)
            return done

        async def bare_side(count: int, at_once: int) -> Round:
            done = await beside.run(count, at_once, "launch")
            await api.remove_all(f"{api.namespace}-bare")
            return done

        for at_once in options.at_once:
            count = max(options.launches, 2 * at_once)
            sides = {"service": partial(ours, count, at_once), "bare client": partial(bare_side, count, at_once)}
            figures[at_once] = compared(await in_turns(options.rounds, sides))
    report.figures["launches"] = figures
    table_of_sides(report, "Jobs", figures)
    ratio = min(each["bare client"]["ratio_launched"] for each in figures.values())
    report.promise("Kubernetes throughput beside a bare client, launched", ratio, at_least=0.9)


async def runs(service: Service, beside: Bare, api: Api, options: argparse.Namespace, report: Report) -> None:
    """Let both sides in turn launch pods that run; a round is gone when the last of them has ended."""
    heard: dict[str, float] = {}
    listening = asyncio.create_task(hear(api, heard))
    figures: dict[int, Json] = {}
    async with service.client() as client:

        async def ask(number: int) -> None:
            await service.launch(client, "runs", number)

        async def until_ended(count: int, run: Awaitable[Round]) -> Round:
            heard.clear()
            began = time.time()
            done = await run
            while len(heard) < count:
                await asyncio.sleep(0.01)
            done.gone = max(heard.values()) - began
            return done

        async def ours(count: int, at_once: int) -> Round:
            spent = service.cpu_seconds()
            done = await until_ended(count, drive(count, at_once, ask))
            await service.stop_all(client, "runs")  # all have ended: until it knows
            done.cpu = service.cpu_seconds() - spent
            await api.until_gone(api.namespace)
            return done

        async def bare_side(count: int, at_once: int) -> Round:
            done = await until_ended(count, beside.run(count, at_once, "run"))
            await api.until_gone(f"{api.namespace}-bare")
            return done

        for at_once in options.at_once:
            count = max(options.runs, at_once)
            sides = {"service": partial(ours, count, at_once), "bare client": partial(bare_side, count, at_once)}
            figures[at_once] = compared(await in_turns(options.rounds, sides))
    listening.cancel()
    report.figures["runs"] = figures
    table_of_sides(report, "Jobs that run", figures)
    ratio = min(each["bare client"]["ratio_gone"] for each in figures.values())
    report.promise("Kubernetes throughput beside a bare client, launched and ended", ratio, at_least=0.9)


async def ends(service: Service, api: Api, options: argparse.Namespace, report: Report) -> None:
    """Measure from the watch event of a pod's end to the receipt of the runner's."""
    heard: dict[str, float] = {}
    listening = asyncio.create_task(hear(api, heard))
    figures: Json = {}
    async with service.client() as client:
        for at_once in ENDS_AT_ONCE:
            received: dict[str, float] = {}

            async def one(number: int, received: dict[str, float] = received) -> None:
                record, at = await service.until_end(client, await service.launch(client, "later", number))
                received[record["runner_id"]] = at

            await drive(at_once, at_once, one)  # to warm up
            received.clear()
            await drive(options.ends, at_once, one)
            await asyncio.sleep(1)
            took = [at - heard[runner_id] for runner_id, at in received.items()]
            figures[f"{at_once} at once"] = {"p50_ms": part(took, 0.5), "p99_ms": part(took, 0.99)}
    listening.cancel()
    report.figures["ends"] = figures
    report.table(
        ["watch event to receipt", "p50, ms", "p99, ms"], [[side, *each.values()] for side, each in figures.items()]
    )
    slowest = max(each["p99_ms"] for each in figures.values())
    report.promise("a pod's end is seen, p99, ms", slowest, at_most=50.0)


async def hear(api: Api, heard: dict[str, float]) -> None:
    """Note when a watch of our own tells that a runner's container has terminated."""
    async for runner_id, _ in api.ended("app=necrocode-runner"):
        heard.setdefault(runner_id, time.time())


async def tracked(service: Service, api: Api, number: int, report: Report) -> None:
    """Hold many Jobs at once, and see what they cost."""
    async with service.client() as client:
        empty = service.resident_kib()

        async def launch(number: int) -> None:
            await service.launch(client, "at-once", number)

        done = await drive(number, 16, launch)
        await asyncio.sleep(5)
        before, began = service.cpu_seconds(), time.perf_counter()
        await asyncio.sleep(20)
        figures = {
            "jobs": number,
            "launched_per_second": number / done.launched,
            "kib_each": (service.resident_kib() - empty) / number,
            "percent_of_a_core": 100 * (service.cpu_seconds() - before) / (time.perf_counter() - began),
            "connections": established(service.pid, api),
        }
        await service.stop_all(client, "at-once", grace=1)
    report.figures["tracked"] = figures
    columns = ["Jobs tracked", "launched a second", "memory each, KiB", "of a core at rest, %", "connections to the API"]
    report.table(columns, [list(figures.values())])


def established(pid: int, api: Api) -> int:
    """Count a process's connections to the API's port."""
    sockets = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            sockets.add(str(entry.readlink()).removeprefix("socket:[").removesuffix("]"))
    port = f"{urlsplit(api.host).port or 443:04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(line[9] in sockets and line[2].endswith(f":{port}") and line[3] == "01" for line in lines)


async def measure(home: Path, options: argparse.Namespace, report: Report) -> None:
    name = f"bench-{secrets.token_hex(4)}"
    common = {**OPTIONS, "namespace": name, "kubeconfig": KUBECONFIG}
    pools = {
        "at-once": common | {"command": ["true"], "node_selector": NOWHERE},
        "runs": common | {"command": ["true"]},
        "later": common | {"command": ["sleep", "0.5"]},
    }
    kinds = {pool: {"type": "kubernetes", "max_concurrency": 10_000, "config": keys} for pool, keys in pools.items()}
    service, beside = Service(home, kinds, installation=name), Bare(__file__, str(home), name, f"{name}-bare")
    most = max(options.launches, options.runs, options.ends, options.tracked, *ENDS_AT_ONCE, 2 * max(options.at_once))
    for number in range(most):
        service.slot(number).mkdir()
    async with cluster(name) as api:
        await api.ask("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
        try:
            async with service.running():
                await beside.start()
                if options.launches:
                    await launches(service, beside, api, options, report)
                if options.runs:
                    await runs(service, beside, api, options, report)
                if options.ends:
                    await ends(service, api, options, report)
                if options.tracked:
                    await tracked(service, api, options.tracked, report)
        finally:
            await beside.stop()
            await api.ask("DELETE", f"/api/v1/namespaces/{name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launches", type=int, default=32, help="in a round, and at least two for each at once; 0: none")
    parser.add_argument("--rounds", type=int, default=9, help="of each side at each concurrency, after one to warm up")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--runs", type=int, default=16, help="of pods that run, and at least one for each at once")
    parser.add_argument("--ends", type=int, default=50)
    parser.add_argument("--tracked", type=int, default=2000)
    bench(parser, measure)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--bare"]:
        asyncio.run(bare(Path(sys.argv[2]), *sys.argv[3:]))
    else:
        main()
