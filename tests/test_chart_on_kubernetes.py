"""The chart on a real cluster, installed by helm's own code: the service runs there, with the minimal role.

``TEST_REGISTRY`` is where the cluster's nodes find the image. Where that is not set they have it already
(``kind load docker-image runner-launcher:under-test``).
"""

import asyncio
import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import httpx
import pytest
from chart import CHART, helm
from conftest import Json, until
from docker_engine import Api
from engines import missing
from kubernetes_asyncio.client import ApiException, CoreV1Api
from kubernetes_asyncio.stream import WsApiClient
from kubernetes_world import IMAGE, World, address_for_pods, api_reached, cluster_session, door
from psycopg.conninfo import conninfo_to_dict
from service_image import docker

pytestmark = pytest.mark.timeout(400)  # the first to need it builds the image

RELEASE = "runner-launcher"
"""The Service bears our own name, and its variables look like settings."""

SELECTOR = f"app.kubernetes.io/instance={RELEASE}"
TOKEN = secrets.token_hex(16)
LAUNCH = ("launch", "--task-id", "7", "--title", "Add a greeting", "--slot-path", "/slots/1", "--pool", "agents")
UNTIL_TOLD = "until [ -e /tmp/end ]; do sleep 0.1; done; exit 3"
SHORT_OR_UNTIL_TOLD = f"grep -q Stay $TASK_CONTEXT_FILE || exit 3; {UNTIL_TOLD}"


@pytest.fixture
def owner() -> Iterator[World]:
    """Whoever owns the cluster."""
    with cluster_session() as (world, _):
        yield world


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


@asynccontextmanager
async def shared(owner: World, launchers: World, database: str) -> AsyncIterator[Json]:
    """Values of several replicas, with the Secrets that they name: the database, and one token for all."""
    server = conninfo_to_dict(database)
    token = {"name": "test", "sha256": hashlib.sha256(TOKEN.encode()).hexdigest(), "scopes": ["launch", "read", "stop"]}
    async with door(f"tcp://{server['host']}:{server.get('port') or 5432}", await address_for_pods(owner)) as way:
        url = re.sub(r"(?<=@)[^/]*", f"{way.address}:{way.own_port}", database)
        for name, facts in {"database": {"url": url}, "tokens": {"tokens.yaml": json.dumps([token])}}.items():
            await launchers.call("POST", "secrets", {"metadata": {"name": name}, "stringData": facts})
        yield {"database": {"secret": "database"}, "tokens": {"secret": "tokens"}}


# Who asks.


async def said(launchers: World, pod: str, *command: str) -> str:
    """Run a command in a pod of the service, and give what it writes to standard output."""
    words: Any = list(command)  # the client's types know one word only
    output = b""
    async with WsApiClient(launchers.configuration) as api:
        channel: Any = await CoreV1Api(api).connect_get_namespaced_pod_exec(
            pod, launchers.namespace, command=words, stdout=True, stderr=True, _preload_content=False
        )
        async with channel as messages, asyncio.timeout(60):
            async for message in messages:
                output += message.data[1:] if message.data[:1] == b"\1" else b""
    return output.decode()


async def asked(launchers: World, *words: str, pod: str = "") -> Any:  # noqa: ANN401 - JSON
    """Ask the service by the command line in a pod of it."""
    text = await said(launchers, pod or (await serving(launchers))[0], "runner-launcher", *words, "--json")
    try:
        return json.loads(text)
    except ValueError:
        pytest.fail(f"{' '.join(words)}: {text!r}")


class Dispatcher:
    """Somebody outside, who launches at any replica that serves, and again under the same key where it does not answer."""

    def __init__(self, launchers: World) -> None:
        self._launchers = launchers
        self._way = AsyncExitStack()
        self._client: httpx.AsyncClient | None = None
        self.accepted: list[Json] = []
        self.pods: Counter[str] = Counter()

    async def launch_again_and_again(self, number: Callable[[], int]) -> None:
        """Launch a runner, and another, until told to end."""
        while True:
            await self.launch(number(), "Go")
            await asyncio.sleep(0.7)  # starting pods is what takes the machine's time

    async def launch(self, number: int, title: str) -> Json:
        """Launch a runner, whichever replica may do it."""
        body = {
            "task": {"id": str(number), "title": title},
            "slot": {"slot_id": f"slot-{number}", "slot_path": f"/slots/{number}", "repo_url": "https://git.example.org/a"},
            "pool": "agents",
        }
        answer = await self.ask("POST", "/runners", json=body, headers={"Idempotency-Key": f"key-{number}"})
        assert answer.status_code in (200, 201, 202), answer.text
        self.accepted.append(answer.json())
        return self.accepted[-1]

    async def ask(self, method: str, path: str, **request: Any) -> httpx.Response:  # noqa: ANN401 - as httpx has them
        """Ask one replica after another until one answers."""
        while True:
            client = self._client or await self._connect()
            with contextlib.suppress(httpx.TransportError):
                answer = await client.request(method, path, **request)
                if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                    self.pods[self._pod] += 1
                    return answer
            await self.leave()

    async def leave(self) -> None:
        """Close the way to the replica that was asked."""
        self._client = None
        await self._way.aclose()

    async def _connect(self) -> httpx.AsyncClient:
        pods = await until(lambda: serving(self._launchers))
        self._pod = secrets.choice(pods)
        forward = await asyncio.create_subprocess_exec(
            *("kubectl", "--namespace", self._launchers.namespace, "port-forward", f"pod/{self._pod}", ":8080"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        self._way.push_async_callback(_end, forward)
        assert forward.stdout
        port = (await forward.stdout.readline()).decode().partition(" -> ")[0].rpartition(":")[2]
        headers = {"Authorization": f"Bearer {TOKEN}"}
        url = f"http://127.0.0.1:{port or 9}"  # the pod may be gone: nobody listens at 9
        self._client = httpx.AsyncClient(base_url=url, headers=headers, timeout=60, trust_env=False)
        return await self._way.enter_async_context(self._client)


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    await process.wait()


# The release.


async def serving(launchers: World) -> list[str]:
    """Name the pods that serve."""
    pods = [pod for pod in await launchers.items("pods", SELECTOR) if "deletionTimestamp" not in pod["metadata"]]
    return [
        pod["metadata"]["name"]
        for pod in pods
        if any(each["type"] == "Ready" and each["status"] == "True" for each in pod["status"].get("conditions", ()))
    ]


async def rolled_out(launchers: World) -> None:
    """Wait until all replicas are of the newest revision, and serve."""
    path = f"/apis/apps/v1/namespaces/{launchers.namespace}/deployments/{RELEASE}"

    async def done() -> bool:
        try:
            deployment = await launchers.call("GET", path)
        except (ApiException, OSError):
            return False
        status, wanted = deployment["status"], deployment["spec"]["replicas"]
        here = [status.get(key, 0) for key in ("replicas", "updatedReplicas", "availableReplicas")]
        return status.get("observedGeneration") == deployment["metadata"]["generation"] and here == [wanted] * 3

    try:
        await until(done, 180)
    except AssertionError as error:
        pods = [(pod["metadata"]["name"], pod["status"]) for pod in await launchers.items("pods", SELECTOR)]
        events = [event["message"] for event in await launchers.items("events")]
        raise AssertionError(f"not all replicas serve: {pods}; {events}") from error


@dataclass(frozen=True, slots=True)
class Installed:
    """A release, in a namespace of its own, whose runners have another."""

    releases: Any
    values: Json
    launchers: World
    agents: World

    async def upgrade(self, **values: Any) -> None:  # noqa: ANN401 - as the chart has them
        """Install it anew with other values, and wait until all replicas have them."""
        await asyncio.to_thread(self.releases.upgrade, str(CHART), RELEASE, {**self.values, **values})
        await rolled_out(self.launchers)


@asynccontextmanager
async def installed(owner: World, repository: str, script: str, database: str = "") -> AsyncIterator[Installed]:
    """The chart, with a pool whose runners run a script: one replica, or with a database two."""
    async with AsyncExitStack() as stack:
        launchers, agents = [await stack.enter_async_context(namespace(owner)) for _ in range(2)]
        reached = await stack.enter_async_context(api_reached(owner))
        several = await stack.enter_async_context(shared(owner, launchers, database)) if database else {}
        config: Json = {"namespace": agents.namespace, "image": IMAGE, "image_pull_policy": "IfNotPresent"}
        config |= {"command": ["sh", "-c", script]}
        values = {
            "image": {"repository": repository, "tag": "under-test"},
            "persistence": {"enabled": False},
            "pools": {"agents": {"type": "kubernetes", "max_concurrency": 100, "config": config}},
            "enableServiceLinks": True,
            **reached,
            **several,
            "env": {"RUNNER_LAUNCHER_SLOT_ROOTS": "/slots", **reached["env"]},
        }
        with helm.Config(namespace=launchers.namespace, kubeconfig_path=os.environ.get("KUBECONFIG")) as releases:
            await asyncio.to_thread(releases.install, str(CHART), RELEASE, values)
            await rolled_out(launchers)
            yield Installed(releases, values, launchers, agents)
            await asyncio.to_thread(releases.uninstall, RELEASE)


async def test_two_replicas_do_their_job_in_a_cluster_with_the_minimal_role(
    owner: World, repository: str, postgres: str
) -> None:
    async with installed(owner, repository, "cat $TASK_CONTEXT_FILE", postgres) as here:
        one, other = await serving(here.launchers)
        assert (await said(here.launchers, one, "printenv", "RUNNER_LAUNCHER_PORT")).startswith("tcp://")
        ended = await asked(here.launchers, *LAUNCH, "--wait", pod=one)
        assert (ended["state"], ended["exit_code"]) == ("completed", 0), ended
        assert ended["job_name"] == f"necrocode-runner-{ended['runner_id']}"
        assert ended["node"]
        assert "sha256:" in ended["image_digest"]
        elsewhere = await asked(here.launchers, "show", ended["runner_id"], pod=other)
        assert (elsewhere["state"], elsewhere["job_name"]) == ("completed", ended["job_name"])

        async def permitted() -> bool:
            [engine] = await asked(here.launchers, "engines", pod=other)
            assert engine["name"] == f"kubernetes:{here.agents.namespace}"
            return bool(engine["answers"] and engine["details"].get("permissions") == "complete")

        await until(permitted, 60)


@pytest.mark.slow
async def test_a_rolling_update_under_load_loses_no_runner(owner: World, repository: str, postgres: str) -> None:
    if not shutil.which("kubectl"):
        missing("kubernetes", "pods are reached from here by kubectl, which is not installed")
    async with installed(owner, repository, SHORT_OR_UNTIL_TOLD, postgres) as here, AsyncExitStack() as stack:
        before = set(await serving(here.launchers))
        dispatchers = [Dispatcher(here.launchers) for _ in range(2)]
        for each in dispatchers:
            stack.push_async_callback(each.leave)
        long = await dispatchers[0].launch(0, "Stay")
        number = count(1)
        async with asyncio.TaskGroup() as load:
            tasks = [load.create_task(each.launch_again_and_again(number.__next__)) for each in dispatchers]
            await here.upgrade(resources={"requests": {"cpu": "50m"}})
            assert not before & set(await serving(here.launchers))
            await until(lambda: all(each.pods.keys() - before for each in dispatchers), 60)  # the old ones go meanwhile
            for task in tasks:
                task.cancel()
        assert all(each.pods.keys() & before for each in dispatchers)

        asking = dispatchers[0]
        assert (await asking.ask("GET", f"/runners/{long['runner_id']}")).json()["phase"] == "running"
        [pod] = await here.agents.pods(long["runner_id"])
        await here.agents.run(pod["metadata"]["name"], "touch /tmp/end")
        records = await until(lambda: _all_ended(asking), 120)
        accepted = [runner["runner_id"] for each in dispatchers for runner in each.accepted]
        assert len(set(accepted)) == len(accepted)
        known = {record["runner_id"]: record for record in records}
        assert set(accepted) <= set(known)
        assert len(known) <= next(number), "a request that was cut off by the test's end may have been accepted"
        assert {(record["reason"], record["exit_code"]) for record in records} == {("exit_nonzero", 3)}
        for runner_id in known:
            events = (await asking.ask("GET", f"/runners/{runner_id}/events")).json()["items"]
            assert [event["to"] for event in events].count("finished") == 1, events
        await until(lambda: _nothing_left(here.agents), 60)
        assert await _pods_made(here.agents) == Counter(record["job_name"] for record in records)


async def _all_ended(dispatcher: Dispatcher) -> list[Json]:
    """Give all records once there is none of a live runner."""
    records: list[Json] = (await dispatcher.ask("GET", "/runners", params={"limit": 500})).json()["items"]
    return records if all(record["phase"] == "finished" for record in records) else []


async def _nothing_left(agents: World) -> bool:
    secret_names = [secret["metadata"]["name"] for secret in await agents.items("secrets")]
    return not await agents.items("jobs") and not [name for name in secret_names if name.startswith("necrocode-runner")]


async def _pods_made(agents: World) -> Counter[str]:
    """Count the pods that the cluster says it made for each Job."""
    made: Counter[str] = Counter()
    for event in await agents.items("events"):
        if event["reason"] == "SuccessfulCreate":
            made[event["involvedObject"]["name"]] += event.get("count") or 1
    return made


@pytest.mark.slow
async def test_an_upgrade_loses_no_runner_even_with_all_that_was_known(owner: World, repository: str) -> None:
    async with installed(owner, repository, UNTIL_TOLD) as here:
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
