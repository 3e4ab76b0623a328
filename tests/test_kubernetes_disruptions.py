"""What others in a cluster do to runners by right: webhooks that refuse them, nodes that are lost, pods that come first.

Nothing that others share is touched: webhooks look at one namespace, preemption reaches what has a lower priority than all
but the test's own runner, and the node that is lost is made for it.
"""

import asyncio
import base64
import ssl
import subprocess
from pathlib import Path
from typing import Literal, Self
from uuid import uuid4

import pytest
from aiohttp import web
from conftest import until
from kubernetes_house import SECONDS, House
from kubernetes_world import SESSION, Json, World, address_for_pods
from launcher_contract import exits, new_id

from app.errors import LauncherUnavailable, LaunchRejected
from app.launcher import Gone, Handle, Starting
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
        made = {
            "jobs": {"spec": {"template": {"spec": {"restartPolicy": "Never", **containers}}}},
            "pods": {"spec": containers},
            "secrets": {},
        }[self._kind]

        async def in_force() -> bool:
            """The API hears of webhooks a moment later; a dry run is shown to them too."""
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
