"""A launcher on a real cluster, for tests of what goes wrong there. Found and skipped as the contract's is."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from kubernetes_world import IMAGE, Door, Gate, Json, World, cluster_session, write_kubeconfig
from launcher_contract import RUNS_ON, Script, new_id

from app.errors import LauncherUnavailable
from app.launcher import Exit, Exited, Handle, LaunchSpec, Observation, Running, Starting
from app.launchers.kubernetes import KubernetesLauncher

SECONDS = 120.0
"""Kubelets before 1.22 take up to a minute to let go of a pod that never started."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[World, Json]]:
    with cluster_session() as made:
        yield made


@dataclass
class House:
    """A launcher, the cluster behind it, and the door between."""

    launcher: KubernetesLauncher
    world: World
    door: Door
    kubeconfig: Path
    installation: str

    def spec(self, script: str, **options: Any) -> LaunchSpec:  # noqa: ANN401 - JSON
        known = {"namespace": self.world.namespace, "image": IMAGE, "image_pull_policy": "IfNotPresent"}
        command = ("/bin/sh", "-c", script)
        return LaunchSpec(command=command, environment={}, context=b"{}", stop_grace_seconds=2, options={**known, **options})

    async def launch(self, script: str | Script, **options: Any) -> Handle:  # noqa: ANN401 - JSON
        text = script.sh if isinstance(script, Script) else script
        return await self.launcher.launch(new_id(), self.spec(text, **options))

    async def see(self, handle: Handle) -> Observation | None:
        return (await self.launcher.observe([handle])).get(handle.runner_id)

    async def until(self, handle: Handle, check: Callable[[Observation | None], bool], seconds: float = SECONDS) -> Any:  # noqa: ANN401 - narrowed by the check
        """Look until it is so. That the API does not answer in time is no answer: a machine may be very busy."""
        deadline, seen = time.monotonic() + seconds, None
        while True:
            with contextlib.suppress(LauncherUnavailable):
                if check(seen := await self.see(handle)):
                    return seen
            assert time.monotonic() < deadline, f"not within {seconds} s; seen is {seen}"
            await asyncio.sleep(0.05)

    async def running(self, handle: Handle) -> None:
        await self.until(handle, lambda seen: isinstance(seen, Running))

    async def end(self, handle: Handle, seconds: float = SECONDS) -> Exit:
        exited: Exited = await self.until(handle, lambda seen: isinstance(seen, Exited), seconds)
        return exited.exit

    async def problem(self, handle: Handle) -> str:
        starting: Starting = await self.until(handle, lambda seen: isinstance(seen, Starting) and bool(seen.problem))
        return starting.problem or ""

    async def ready(self, script: Script = RUNS_ON) -> Handle:
        handle = await self.launch(script)
        await self.running(handle)
        await self.said(handle, b"ready")
        return handle

    async def said(self, handle: Handle, text: bytes) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SECONDS):
                async for line in self.launcher.logs(handle, follow=True):
                    if line.text == text:
                        return
        pods = [pod["status"] for pod in await self.world.pods(handle.runner_id)]
        raise AssertionError(f"it never said {text!r}; seen is {await self.see(handle)}; of its pods: {pods}")

    async def pod(self, handle: Handle) -> Json:
        (pod,) = await self.world.pods(handle.runner_id)
        return pod

    @asynccontextmanager
    async def foreign(self, runner_id: str, **labels: str) -> AsyncIterator[None]:
        """Somebody else's Job, named as ours would be. It must be there at the end."""
        name = f"necrocode-runner-{runner_id}"
        template = {"spec": {"restartPolicy": "Never", "containers": [{"name": "x", "image": IMAGE}]}}
        job = {"metadata": {"name": name, "labels": labels}, "spec": {"parallelism": 0, "template": template}}
        await self.world.call("POST", "jobs", job)
        yield
        assert await self.world.find(f"jobs/{name}")
        await self.world.call("DELETE", f"jobs/{name}", {"propagationPolicy": "Background"})

    async def gone(self, runner_id: str) -> bool:
        """Whether the cluster holds nothing of a runner."""
        kinds = ("jobs", "pods", "secrets")
        return not any([await self.world.items(kind, f"runner-id={runner_id}") for kind in kinds])

    async def log(self, handle: Handle) -> list[bytes]:
        return [line.text async for line in self.launcher.logs(handle)]

    def reopen(self, kubeconfig: Path | None = None, namespace: str | None = None) -> KubernetesLauncher:
        where = namespace or self.world.namespace
        return KubernetesLauncher(kubeconfig or self.kubeconfig, None, where, self.installation)

    def through(self, gate: Gate, server: str = "") -> KubernetesLauncher:
        """A launcher that reaches the API through a gate."""
        path = self.kubeconfig.with_name(f"gate-{gate.port}")
        server = server or f"http://127.0.0.1:{gate.port}"
        path.write_text(
            f"""{{apiVersion: v1, kind: Config, current-context: c,
            contexts: [{{name: c, context: {{cluster: c, user: u}}}}],
            clusters: [{{name: c, cluster: {{server: "{server}"}}}}], users: [{{name: u, user: {{}}}}]}}"""
        )
        return self.reopen(path)


@pytest.fixture
async def house(cluster: tuple[World, Json], tmp_path: Path) -> AsyncIterator[House]:
    world, user = cluster
    door, installation = Door(world.url), uuid4().hex
    await door.open()
    kubeconfig = write_kubeconfig(tmp_path / "kubeconfig", world, door, user)
    async with aclosing(KubernetesLauncher(kubeconfig, None, world.namespace, installation)) as launcher:
        yield House(launcher, world, door, kubeconfig, installation)
    async with aclosing(KubernetesLauncher(kubeconfig, None, world.namespace, installation)) as sweeper:
        for found in await sweeper.list():
            await sweeper.remove(found.handle)
    await door.close()
    for kind in ("jobs", "pods", "secrets"):
        for _ in range(600):
            left = await world.items(kind, f"runner-launcher/installation={installation}")
            if not left:
                break
            await asyncio.sleep(0.1)
        assert not left
