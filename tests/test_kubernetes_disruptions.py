"""What others in a cluster do to runners by right: webhooks that refuse them, nodes that are lost, pods that come first.

Nothing that others share is touched: webhooks look at one namespace, preemption reaches what has a lower priority than all
but the test's own runner, and the node that is lost is made for it.
"""

import asyncio
import base64
import contextlib
import ssl
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self
from uuid import uuid4

import pytest
from aiohttp import web
from conftest import until
from kubernetes_asyncio.client import ApiException
from kubernetes_house import SECONDS, House
from kubernetes_world import IMAGE, SESSION, Json, World, address_for_pods
from launcher_contract import exits, new_id

from app.errors import LauncherUnavailable, LaunchRejected
from app.launcher import Exited, Gone, Handle, Running, Starting
from app.reason import Reason

pytest_plugins = ["kubernetes_house"]
pytestmark = pytest.mark.timeout(300)


# Webhooks.


class Webhook:
    """A validating webhook for what the launcher makes in a namespace: allows, refuses in these words, or is silent."""

    def __init__(self, world: World, directory: Path, kind: str) -> None:
        self._world = world
        self._directory = directory
        self._kind = kind
        self._name = f"runner-launcher-test-{uuid4().hex[:8]}"
        self._path = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations"
        self.does: Literal["allow", "refuse", "nothing"] = "allow"
        self.words = "no runners on Fridays"
        self.asked = 0

    async def __aenter__(self) -> Self:
        address = await address_for_pods(self._world)
        key, certificate = await asyncio.to_thread(_certificate, self._directory, address)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate, key)
        app = web.Application()
        app.router.add_post("/", self._review)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, address, 0, ssl_context=context).start()
        port = self._runner.addresses[0][1]
        await self._configure(f"https://{address}:{port}/", certificate)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._world.call("DELETE", f"{self._path}/{self._name}")
        await self._runner.cleanup()

    async def _configure(self, url: str, certificate: Path) -> None:
        group = "batch" if self._kind == "jobs" else ""
        rule = {"apiGroups": [group], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": [self._kind]}
        webhook = {
            "name": "guard.runner-launcher.test",
            "clientConfig": {"url": url, "caBundle": base64.b64encode(certificate.read_bytes()).decode()},
            "rules": [rule],
            "namespaceSelector": {"matchLabels": {SESSION: self._world.namespace}},
            "failurePolicy": "Fail",
            "sideEffects": "None",
            "timeoutSeconds": 1,
            "admissionReviewVersions": ["v1"],
        }
        await self._world.call("POST", self._path, {"metadata": {"name": self._name}, "webhooks": [webhook]})
        containers = {"containers": [{"name": "x", "image": "x"}]}
        kinds: dict[str, Json] = {
            "jobs": {"spec": {"template": {"spec": {"restartPolicy": "Never", **containers}}}},
            "pods": {"spec": containers},
            "secrets": {},
        }
        made = kinds[self._kind]

        async def in_force() -> bool:
            """The API hears of webhooks a moment later; a dry run is shown to them too."""
            with contextlib.suppress(ApiException):
                await self._world.call("POST", self._kind, {"metadata": {"generateName": "try-"}, **made}, dryRun="All")
            return self.asked > 0

        await until(in_force, SECONDS)

    async def _review(self, request: web.Request) -> web.Response:
        review: Json = await request.json()
        self.asked += 1
        if self.does == "nothing":
            await asyncio.sleep(10)  # longer than it may take
        answer: Json = {"uid": review["request"]["uid"], "allowed": self.does != "refuse"}
        if self.does == "refuse":
            answer["status"] = {"code": 403, "message": self.words}
        return web.json_response({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": answer})


def _certificate(directory: Path, address: str) -> tuple[Path, Path]:
    """Make a key and a certificate for an address that is its own authority."""
    key, certificate = directory / "webhook-key.pem", directory / "webhook.pem"
    command = [
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-days", "2"),
        *("-subj", "/CN=webhook", "-addext", f"subjectAltName=IP:{address}"),
        *("-keyout", str(key), "-out", str(certificate)),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return key, certificate


@pytest.mark.parametrize("kind", ["jobs", "secrets"])
async def test_a_webhook_that_refuses_is_told_in_its_own_words_and_nothing_is_left(
    house: House, tmp_path: Path, kind: str
) -> None:
    async with Webhook(house.world, tmp_path, kind) as webhook:
        webhook.does, runner_id = "refuse", new_id()
        with pytest.raises(LaunchRejected, match="no runners on Fridays") as rejected:
            await house.launcher.launch(runner_id, house.spec("exit 0"))
        assert rejected.value.reason is Reason.LAUNCH_REJECTED
        assert "guard.runner-launcher.test" in str(rejected.value)
        await until(lambda: house.gone(runner_id), SECONDS)
        await house.until(Handle(runner_id=runner_id), lambda seen: isinstance(seen, Gone))
        webhook.does = "allow"
        assert (await house.end(await house.launch(exits(0)))).code == 0


@pytest.mark.parametrize("kind", ["jobs", "secrets"])
async def test_a_webhook_that_does_not_answer_is_asked_again_and_there_is_one_job(
    house: House, tmp_path: Path, kind: str
) -> None:
    async with Webhook(house.world, tmp_path, kind) as webhook:
        webhook.does, runner_id, spec = "nothing", new_id(), house.spec("echo once; exit 3")
        for _ in range(2):
            with pytest.raises(LauncherUnavailable, match=r"guard\.runner-launcher\.test"):
                await house.launcher.launch(runner_id, spec)
        webhook.does = "allow"
        handle = await house.launcher.launch(runner_id, spec)
        assert (await house.end(handle)).code == 3
        assert await house.log(handle) == [b"once"]
        assert len(await house.world.items("jobs", f"runner-id={runner_id}")) == 1
        await house.pod(handle)


@pytest.mark.slow
async def test_a_pod_that_a_webhook_refuses_is_told_in_its_words_and_one_that_it_did_not_look_at_is_made_later(
    house: House, tmp_path: Path
) -> None:
    async with Webhook(house.world, tmp_path, "pods") as webhook:
        webhook.does = "nothing"
        waits = await house.launch("exit 4")
        assert "failed calling webhook" in await house.problem(waits)
        await asyncio.sleep(35)  # longer than a pod may be refused
        assert isinstance(await house.see(waits), Starting)
        webhook.does = "allow"
        assert (await house.end(waits)).code == 4
        webhook.does = "refuse"
        refused = await house.launch(exits(0))
        assert "no runners on Fridays" in await house.problem(refused)
        end = await house.end(refused)
        assert (end.reason, end.code) == (Reason.LAUNCH_REJECTED, None)
        assert "no runners on Fridays" in (end.message or "")


# Pods that come first.


async def test_a_runner_that_makes_room_for_a_pod_of_higher_priority_is_told_as_preempted(house: House) -> None:
    async with _only_seat(house.world) as seat, _priority(house.world, -1000) as low, _priority(house.world, -1) as high:
        template = {"spec": {"template": {"spec": {"priorityClassName": low}}}}
        script = "trap 'echo bye; exit 9' TERM; echo ready; while :; do sleep 0.05; done"
        handle = await house.launch(script, job_template=template, resources={"limits": {seat: 1}})
        await house.said(handle, b"ready")
        container = {"name": "x", "image": IMAGE, "command": ["true"], "resources": {"limits": {seat: "1"}}}
        pod = {"priorityClassName": high, "restartPolicy": "Never", "containers": [container]}
        await house.world.call("POST", "pods", {"metadata": {"name": "comes-first"}, "spec": pod})
        try:
            end = await house.end(handle)
            assert (end.reason, end.stopped) == (Reason.PREEMPTED, False)
            assert end.code in {9, None}
            assert "preempt" in (end.message or "").lower()
            assert (await house.log(handle))[:1] == [b"ready"]
            assert not [
                pod for pod in await house.world.pods(handle.runner_id) if "deletionTimestamp" not in pod["metadata"]
            ]
        finally:
            await house.world.call("DELETE", "pods/comes-first", {"gracePeriodSeconds": 0})


@asynccontextmanager
async def _only_seat(world: World) -> AsyncIterator[str]:
    """Something that a node has one of and no other pod asks for: whatever else runs there makes no difference."""
    nodes = (await world.call("GET", "/api/v1/nodes"))["items"]
    node = next(each["metadata"]["name"] for each in nodes if not each["spec"].get("taints"))
    seat, path = f"runner-launcher.test/{uuid4().hex[:8]}", f"/api/v1/nodes/{node}/status"

    async def set_to(amount: str | None) -> None:
        await world.call("PATCH", path, {"status": {"capacity": {seat: amount}, "allocatable": {seat: amount}}})

    await set_to("1")
    try:
        yield seat
    finally:
        await set_to(None)


@asynccontextmanager
async def _priority(world: World, value: int) -> AsyncIterator[str]:
    """A priority below that of every pod that has none: nothing of anybody else's can be displaced by it."""
    name, path = f"runner-launcher-test-{uuid4().hex[:8]}", "/apis/scheduling.k8s.io/v1/priorityclasses"
    await world.call("POST", path, {"metadata": {"name": name}, "value": value})
    try:
        yield name
    finally:
        await world.call("DELETE", f"{path}/{name}")


# Nodes that are lost.


class EmptyNode:
    """A node that no kubelet serves: the test says what one would. For pods that tolerate it and select it by its name."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.name = f"runner-launcher-test-{uuid4().hex[:8]}"
        self._path = f"/api/v1/nodes/{self.name}"
        seconds = {"operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 1}
        self.options: Json = {
            "node_selector": {"runner-launcher-test/node": self.name},
            "tolerations": [
                {"key": "runner-launcher-test/node", "operator": "Exists"},
                {"key": "node.kubernetes.io/unreachable", **seconds},
                {"key": "node.kubernetes.io/not-ready", **seconds},
            ],
        }

    async def __aenter__(self) -> Self:
        labels = {"runner-launcher-test/node": self.name}
        taint = {"key": "runner-launcher-test/node", "effect": "NoSchedule"}  # nobody else's pods come here
        await self._world.call(
            "POST", "/api/v1/nodes", {"metadata": {"name": self.name, "labels": labels}, "spec": {"taints": [taint]}}
        )
        await self.beat()
        return self

    async def __aexit__(self, *_: object) -> None:
        with contextlib.suppress(ApiException):
            await self.delete()

    async def beat(self) -> None:
        """Say that the node is well, once."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        ready = {
            "type": "Ready",
            "status": "True",
            "reason": "KubeletReady",
            "lastHeartbeatTime": now,
            "lastTransitionTime": now,
        }
        room = {"cpu": "4", "memory": "4Gi", "pods": "10"}
        await self._world.call(
            "PATCH", f"{self._path}/status", {"status": {"conditions": [ready], "capacity": room, "allocatable": room}}
        )

    async def close(self) -> None:
        """Take no more pods; nobody would let go of them."""
        await self._world.call("PATCH", self._path, {"spec": {"unschedulable": True}})

    async def delete(self) -> None:
        await self._world.call("DELETE", self._path)

    async def run(self, runner_id: str) -> str:
        """Wait for a runner's pod to be bound here, and say that it runs; gives its name."""

        async def bound() -> list[Json]:
            return [pod for pod in await self._world.pods(runner_id) if pod["spec"].get("nodeName") == self.name]

        [pod] = await until(bound, SECONDS)
        name: str = pod["metadata"]["name"]
        await self._tell(name, "Running", {"running": {"startedAt": _now()}})
        return name

    async def end(self, pod: str, code: int) -> None:
        """Say how a pod's program ended."""
        ended = {"exitCode": code, "reason": "Completed" if code == 0 else "Error", "finishedAt": _now()}
        await self._tell(pod, "Failed" if code else "Succeeded", {"terminated": ended})

    async def let_go(self, pod: str) -> None:
        """Say that nothing is left of a pod that was to go."""
        await self._world.call("DELETE", f"pods/{pod}", {"gracePeriodSeconds": 0})

    async def _tell(self, pod: str, phase: str, state: Json) -> None:
        well = "True" if "running" in state else "False"
        conditions = [{"type": kind, "status": well} for kind in ("Ready", "ContainersReady")]
        container = {
            "name": "runner",
            "image": IMAGE,
            "imageID": "",
            "ready": well == "True",
            "restartCount": 0,
            "state": state,
        }
        status = {"phase": phase, "startTime": _now(), "conditions": conditions, "containerStatuses": [container]}
        await self._world.call("PATCH", f"pods/{pod}/status", {"status": status})


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@pytest.mark.slow
@pytest.mark.parametrize("then", ["the node is removed", "the node comes back"])
async def test_a_runner_on_a_node_that_is_lost_ends_as_that_once_nothing_of_it_can_live(house: House, then: str) -> None:
    async with EmptyNode(house.world) as node:
        handle = await house.launch(exits(0), **node.options)
        name = await node.run(handle.runner_id)
        await house.running(handle)
        beaten = time.monotonic()

        async def given_up() -> bool:
            """Whether the cluster has ordered the pod's end. Its kubelet would have to carry that out."""
            if time.monotonic() < beaten + 2:
                await node.beat()
            pod = await house.world.find(f"pods/{name}")
            return pod is not None and "deletionTimestamp" in pod["metadata"]

        await until(given_up, SECONDS)
        for _ in range(20):  # it may be at work, for all that anybody knows
            assert isinstance(await house.see(handle), Running)
            await asyncio.sleep(0.1)
        assert not [
            pod
            for pod in await house.world.pods(handle.runner_id)
            if pod["metadata"]["name"] != name and pod["spec"].get("nodeName")
        ]
        if then == "the node is removed":
            await node.delete()
        else:
            await node.beat()
            await node.end(name, 137)
            await node.let_go(name)
        end = await house.end(handle)
        assert (end.reason, end.stopped) == (Reason.NODE_LOST, False)
        assert end.code in {137, None}
        assert (end.code is None) == (then == "the node is removed")
        await until(lambda: _no_pods(house.world, handle), SECONDS)
        assert (await house.world.call("GET", f"jobs/{handle.job_name}"))["spec"]["parallelism"] == 0


async def _no_pods(world: World, handle: Handle) -> bool:
    return not await world.pods(handle.runner_id)


async def test_a_pod_that_somebody_deletes_is_told_as_deleted_with_the_code_that_its_node_tells(house: House) -> None:
    async with EmptyNode(house.world) as node:
        handle = await house.launch(exits(0), **node.options)
        name = await node.run(handle.runner_id)
        await house.running(handle)
        await node.close()
        await node.beat()
        await house.world.call("DELETE", f"pods/{name}", {"gracePeriodSeconds": 30})
        await node.end(name, 143)
        end = await house.end(handle)
        assert (end.code, end.reason, end.stopped) == (143, Reason.DELETED, False)
        await node.let_go(name)
        async with aclosing(house.reopen()) as other:  # it was written down
            assert (await other.observe([handle]))[handle.runner_id] == Exited(end)


async def test_a_stop_waits_for_the_last_words_of_a_pod_that_takes_no_signal_any_more(house: House) -> None:
    async with EmptyNode(house.world) as node:
        handle = await house.launch(exits(0), **node.options)
        name = await node.run(handle.runner_id)
        await house.running(handle)
        stop = asyncio.create_task(house.launcher.stop(handle, 10))
        await asyncio.sleep(6)  # a busy kubelet tells so late
        assert not stop.done()
        await node.end(name, 7)
        await stop
        end = await house.end(handle)
        assert (end.code, end.stopped) == (7, False)
        assert "deletionTimestamp" not in (await house.pod(handle))["metadata"]
