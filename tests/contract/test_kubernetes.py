"""Kubernetes keeps the contract, on a real cluster and with no more rights than deploy/kubernetes/rbac.yaml gives.

``KUBECONFIG`` names the cluster (any: kind, minikube, a real one); what is true is asked with that file's rights.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest
from kubernetes_world import IMAGE, Door, Json, World, cluster_session, write_kubeconfig
from launcher_contract import Harness, Impossible, LauncherContract, Script, exits

from app.launcher import Handle, LaunchSpec
from app.launchers.kubernetes import KubernetesLauncher

pytestmark = pytest.mark.timeout(300)  # an old kubelet lets go once a minute of what never ran

WITNESS = "echo $$ >/workspace/main\n"
"""What every script does first: tell its process id."""


@pytest.fixture(scope="session")
def cluster() -> Iterator[tuple[World, Json]]:
    with cluster_session() as made:
        yield made


class KubernetesHarness:
    """Asks the cluster as its owner, and the kernel where the cluster's node is this machine."""

    def __init__(self, world: World, door: Door, kubeconfig: Path) -> None:
        self.world = world
        self.door = door
        self.kubeconfig = kubeconfig
        self.installation = uuid4().hex

    def spec(self, script: Script) -> LaunchSpec:
        options = {"namespace": self.world.namespace, "image": IMAGE, "image_pull_policy": "IfNotPresent"}
        command = ("/bin/sh", "-c", WITNESS + script.sh)
        return LaunchSpec(command=command, environment={}, context=b"{}", stop_grace_seconds=3, options=options)

    async def reopen(self) -> KubernetesLauncher:
        return KubernetesLauncher(self.kubeconfig, None, self.world.namespace, self.installation)

    def impossible(self) -> Sequence[Impossible]:
        works = self.spec(exits(0))
        image = {**works.options, "image": "localhost:1/no-such-image:none"}
        big = {f"BIG{number}": "x" * 131_000 for number in range(9)}
        return [
            Impossible("no such image", replace(works, options=image), "problem"),
            Impossible("no such account", replace(works, options={**works.options, "service_account": "nobody"}), "problem"),
            Impossible("no such namespace", replace(works, options={**works.options, "namespace": "no-such"}), "rejected"),
            Impossible("too large", replace(works, environment=big), "rejected"),
        ]

    async def kill_behind_back(self, handle: Handle) -> None:
        (pod,) = await self.world.pods(handle.runner_id)
        await self.world.run(pod["metadata"]["name"], "kill -KILL $(cat /workspace/main)")

    async def delete_behind_back(self, handle: Handle) -> None:
        await self.world.call("DELETE", f"jobs/{handle.job_name}", {"propagationPolicy": "Background"})

    def unavailable(self) -> AbstractAsyncContextManager[None]:
        return self.door.closed()

    @asynccontextmanager
    async def foreign(self) -> AsyncIterator[str]:
        labels = {"app": "necrocode-runner", "runner-id": "notes", "runner-launcher/installation": "another"}
        container = {"name": "runner", "image": IMAGE, "command": ["true"]}
        template = {"metadata": {"labels": labels}, "spec": {"restartPolicy": "Never", "containers": [container]}}
        job = {
            "metadata": {"name": "necrocode-runner-notes", "labels": labels},
            "spec": {"parallelism": 0, "template": template},
        }
        await self.world.call("POST", "jobs", job)
        yield "notes"
        assert await self.world.find("jobs/necrocode-runner-notes")
        await self.world.call("DELETE", "jobs/necrocode-runner-notes", {"propagationPolicy": "Background"})

    async def exists(self, handle: Handle) -> bool:
        name = f"necrocode-runner-{handle.runner_id}"
        for path in (f"jobs/{name}", f"secrets/{name}"):
            if await self.world.find(path):
                return True
        return bool(await self.world.pods(handle.runner_id))

    async def copies(self, handle: Handle) -> int:
        """Count the pods that started something: those that are there, and those that left an event, which come late."""
        events = (await self.world.call("GET", "events", fieldSelector="reason=Started"))["items"]
        about = [(one["involvedObject"], one.get("count") or 1) for one in events]
        started = {pod["uid"]: count for pod, count in about if pod["name"].startswith(f"{handle.job_name}-")}
        for pod in await self.world.pods(handle.runner_id):
            states = pod["status"].get("containerStatuses", [])
            seen = sum(one["restartCount"] + ("waiting" not in one["state"]) for one in states)
            if seen:
                started[pod["metadata"]["uid"]] = max(seen, started.get(pod["metadata"]["uid"], 0))
        return sum(started.values())

    async def processes(self, handle: Handle) -> int | None:
        """Count where the kernel of this machine shows them; None where it shows none, for it may be another's."""
        return await asyncio.to_thread(_processes, handle.runner_id) or None

    async def leaked(self) -> Sequence[str]:
        selector = f"runner-launcher/installation={self.installation}"
        return [
            f"{kind} {item['metadata']['name']}"
            for kind in ("jobs", "pods", "secrets")
            for item in await self.world.items(kind, selector)
        ]


def _processes(runner_id: str) -> int:
    mark, count = f"\0RUNNER_ID={runner_id}\0".encode(), 0
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            state = (environ.parent / "stat").read_text(errors="replace").rpartition(") ")[2][0]
            count += state not in "ZX" and mark in b"\0" + environ.read_bytes()
    return count


class TestKubernetes(LauncherContract):
    patience = 120
    settle = 1.5
    deviations = {  # noqa: RUF012 - declared once, as in the contract
        "test_death_by_sigterm_is_told_apart_from_exit_143": "the kubelet tells 143 for both, and names no signal",
        "test_any_bytes_and_a_last_line_without_an_end_arrive": "engines keep logs as text",
    }

    @pytest.fixture
    async def harness(self, cluster: tuple[World, Json], tmp_path: Path) -> AsyncIterator[Harness]:
        world, user = cluster
        door = Door(world.url)
        await door.open()
        try:
            yield KubernetesHarness(world, door, write_kubeconfig(tmp_path / "kubeconfig", world, door, user))
        finally:
            await door.close()
