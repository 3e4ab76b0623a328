"""The chart on a real cluster, installed by helm's own code: the service runs there, with the minimal role.

``TEST_CHART_VALUES`` holds values that the cluster needs, as JSON; ``TEST_REGISTRY`` is where its nodes find the image.
Where that is not set they have it already (``kind load docker-image runner-launcher:under-test``).
"""

import asyncio
import json
import os
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from chart import CHART, helm
from conftest import Json, until
from docker_engine import Api
from kubernetes_asyncio.client import ApiException, CoreV1Api
from kubernetes_asyncio.stream import WsApiClient
from kubernetes_world import IMAGE, World, cluster_session
from service_image import docker

pytestmark = pytest.mark.timeout(400)  # the first to need it builds the image

RELEASE = "runner-launcher"
SELECTOR = f"app.kubernetes.io/instance={RELEASE}"
LAUNCH = ("launch", "--task-id", "7", "--title", "Add a greeting", "--slot-path", "/slots/1", "--pool", "agents")
UNTIL_TOLD = "until [ -e /tmp/end ]; do sleep 0.1; done; exit 3"
VALUES: Json = json.loads(os.environ.get("TEST_CHART_VALUES") or "{}")


@pytest.fixture
def owner() -> Iterator[World]:
    """Whoever owns the cluster."""
    with cluster_session() as (world, _):
        yield world


@pytest.fixture
def port() -> int:
    """A port that is free here, where the cluster's node may be."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
        return number


@pytest.fixture
def repository(image: str, docker_engine: Api) -> str:
    """Where the cluster's nodes find the image."""
    del docker_engine
    registry = os.environ.get("TEST_REGISTRY")
    name = f"{registry}/runner-launcher" if registry else "runner-launcher"
    docker("tag", image, f"{name}:under-test")
    if registry:
        docker("push", "--quiet", f"{name}:under-test")
    return name


@asynccontextmanager
async def namespace(owner: World) -> AsyncIterator[World]:
    """A namespace for a while."""
    name = f"runner-launcher-chart-{secrets.token_hex(4)}"
    await owner.call("POST", "/api/v1/namespaces", {"metadata": {"name": name, "labels": {"runner-launcher-test": "yes"}}})
    try:
        yield World(owner.configuration, name)
    finally:
        await owner.call("DELETE", f"/api/v1/namespaces/{name}")


async def asked(launchers: World, *words: str) -> Any:  # noqa: ANN401 - JSON
    """Ask the service by the command line in its pod."""
    [pod] = await serving(launchers)
    command: Any = ["runner-launcher", *words, "--json"]  # the client's types know one word only
    output = b""
    async with WsApiClient(launchers.configuration) as api:
        channel: Any = await CoreV1Api(api).connect_get_namespaced_pod_exec(
            pod, launchers.namespace, command=command, stdout=True, stderr=True, _preload_content=False
        )
        async with channel as messages, asyncio.timeout(60):
            async for message in messages:
                output += message.data[1:] if message.data[:1] == b"\1" else b""  # of standard output alone
    try:
        return json.loads(output)
    except ValueError:
        pytest.fail(f"{' '.join(words)}: {output!r}")


async def serving(launchers: World) -> list[str]:
    """Name the pods that serve."""
    pods = [pod for pod in await launchers.items("pods", SELECTOR) if "deletionTimestamp" not in pod["metadata"]]
    return [
        pod["metadata"]["name"]
        for pod in pods
        if any(each["type"] == "Ready" and each["status"] == "True" for each in pod["status"].get("conditions", ()))
    ]


async def come_up(launchers: World, *, besides: str = "") -> str:
    """Wait for a pod that serves, another than this one."""
    try:
        return await until(lambda: _another(launchers, besides), 120)
    except AssertionError as error:
        pods = [(pod["metadata"]["name"], pod["status"]) for pod in await launchers.items("pods", SELECTOR)]
        events = [event["message"] for event in await launchers.items("events")]
        raise AssertionError(f"no pod serves: {pods}; {events}") from error


async def _another(launchers: World, besides: str) -> str:
    try:
        return next((pod for pod in await serving(launchers) if pod != besides), "")
    except (ApiException, OSError):
        return ""


@dataclass(frozen=True, slots=True)
class Installed:
    """A release, in a namespace of its own, whose runners have another."""

    releases: Any
    values: Json
    launchers: World
    agents: World
    pod: str

    async def upgrade(self, **values: Any) -> None:  # noqa: ANN401 - as the chart has them
        """Install it anew with other values, and wait until a pod serves that did not before."""
        await asyncio.to_thread(self.releases.upgrade, str(CHART), RELEASE, {**self.values, **values})
        await come_up(self.launchers, besides=self.pod)


@asynccontextmanager
async def installed(owner: World, repository: str, port: int, script: str) -> AsyncIterator[Installed]:
    """The chart, with a pool whose runners run a script."""
    async with namespace(owner) as launchers, namespace(owner) as agents:
        config = {"namespace": agents.namespace, "image": IMAGE, "image_pull_policy": "IfNotPresent"}
        values = {
            "image": {"repository": repository, "tag": "under-test"},
            "persistence": {"enabled": False},
            "pools": {"agents": {"type": "kubernetes", "config": {**config, "command": ["sh", "-c", script]}}},
            "enableServiceLinks": True,  # the Service bears our own name, and its variables look like settings
            "port": port,
            **VALUES,
            "env": {"RUNNER_LAUNCHER_SLOT_ROOTS": "/slots", **VALUES.get("env", {})},
        }
        with helm.Config(namespace=launchers.namespace, kubeconfig_path=os.environ.get("KUBECONFIG")) as releases:
            await asyncio.to_thread(releases.install, str(CHART), RELEASE, values)
            yield Installed(releases, values, launchers, agents, await come_up(launchers))
            await asyncio.to_thread(releases.uninstall, RELEASE)


async def test_the_service_does_its_job_in_a_cluster_with_the_minimal_role(owner: World, repository: str, port: int) -> None:
    async with installed(owner, repository, port, "cat $TASK_CONTEXT_FILE") as here:
        ended = await asked(here.launchers, *LAUNCH, "--wait")
        assert (ended["state"], ended["exit_code"]) == ("completed", 0), ended
        assert ended["job_name"] == f"necrocode-runner-{ended['runner_id']}"
        assert ended["node"]
        assert "sha256:" in ended["image_digest"]

        async def permitted() -> bool:
            [engine] = await asked(here.launchers, "engines")
            assert engine["name"] == f"kubernetes:{here.agents.namespace}"
            return bool(engine["answers"] and engine["details"].get("permissions") == "complete")

        await until(permitted, 60)


@pytest.mark.slow
async def test_an_upgrade_loses_no_runner_even_with_all_that_was_known(owner: World, repository: str, port: int) -> None:
    async with installed(owner, repository, port, UNTIL_TOLD) as here:
        living = await asked(here.launchers, *LAUNCH)
        await here.upgrade(resources={"requests": {"cpu": "50m"}})

        async def known() -> Json:
            records = await asked(here.launchers, "ps", "--all")
            return next((record for record in records if record["runner_id"] == living["runner_id"]), {})

        again = await until(known, 60)
        assert (again["state"], again["task_id"]) == ("running", "7"), again
        [pod] = await here.agents.pods(living["runner_id"])
        await here.agents.run(pod["metadata"]["name"], "touch /tmp/end")
        await until(lambda: _ended(known), 60)
        assert ((await known())["state"], (await known())["exit_code"]) == ("failed", 3)


async def _ended(known: Callable[[], Awaitable[Json]]) -> bool:
    return bool((await known())["phase"] == "finished")
