"""A real cluster as tests see it: found by ``KUBECONFIG``, asked with the rights of its owner, never by the launcher's code.

The launcher under test gets a kubeconfig of its own: the service account of deploy/kubernetes/rbac.yaml, in a namespace made
for the session, through a TCP proxy that a test can cut.
"""

import asyncio
import base64
import contextlib
import io
import os
import secrets
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import yaml
from aiohttp import web
from engines import missing
from kubernetes_asyncio import config
from kubernetes_asyncio.client import ApiClient, ApiException, Configuration, CoreV1Api
from kubernetes_asyncio.stream import WsApiClient

Json = dict[str, Any]

IMAGE = os.environ.get("RUNNER_LAUNCHER_TEST_IMAGE", "busybox:latest")
MANAGED = "app.kubernetes.io/managed-by=runner-launcher"
SESSION = "runner-launcher-test"
"""A label of the namespace of a session of tests: its own name."""
RBAC = Path(__file__).parents[2] / "deploy/kubernetes/rbac.yaml"


class World:
    """Asks the cluster as its owner."""

    def __init__(self, configuration: Configuration, namespace: str) -> None:
        self.configuration = configuration
        self.url = str(configuration.host)
        self.namespace = namespace

    async def call(self, method: str, path: str, body: Json | None = None, **query: str | int) -> Json:
        """Make a call below the namespace, or anywhere if the path begins with a slash. Raises ApiException."""
        kinds = {"jobs": "/apis/batch/v1", "roles": "/apis/rbac.authorization.k8s.io/v1"}
        kinds["rolebindings"] = kinds["roles"]
        group = kinds.get(path.partition("/")[0], "/api/v1")
        where = path if path.startswith("/") else f"{group}/namespaces/{self.namespace}/{path}"
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        async with ApiClient(self.configuration) as api:
            answer: Json = await api.call_api(
                where,
                method,
                query_params=list(query.items()),
                header_params={"Content-Type": kind, "Accept": "application/json"},
                body=body,
                auth_settings=["BearerToken"],
                response_types_map={200: "object", 201: "object", 202: "object"},
                _return_http_data_only=True,
                _request_timeout=30,
            )
            return answer

    async def find(self, path: str) -> Json | None:
        """Read an object; None if there is none."""
        with contextlib.suppress(ApiException):
            return await self.call("GET", path)
        return None

    async def items(self, kind: str, selector: str = "") -> list[Json]:
        """List objects of a kind by label."""
        found: list[Json] = (await self.call("GET", kind, labelSelector=selector))["items"]
        return found

    async def pods(self, runner_id: str) -> list[Json]:
        """The pods of a runner."""
        return await self.items("pods", f"runner-id={runner_id}")

    async def run(self, pod: str, script: str) -> None:
        """Run a script in a runner's container, which may be its end: so nobody waits for the script's."""
        command: Any = ["sh", "-c", f"echo begun; {script}"]  # the client's types know one word only
        async with WsApiClient(self.configuration) as api:
            socket: Any = await CoreV1Api(api).connect_get_namespaced_pod_exec(
                pod, self.namespace, container="runner", command=command, stdout=True, stderr=True, _preload_content=False
            )
            async with socket as messages, asyncio.timeout(30):
                async for message in messages:
                    if b"begun" in message.data:
                        return


class Door:
    """A TCP proxy before the server of a URL, at an address of this machine."""

    def __init__(self, url: str, address: str = "127.0.0.1") -> None:
        place = urlsplit(url)
        self.host, self.port = str(place.hostname), place.port or 443
        self.address, self.own_port = address, 0
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._carrying: set[asyncio.Task[None]] = set()
        self.passed = 0

    async def open(self) -> None:
        """Let connections through."""
        self._server = await asyncio.start_server(self._pass, self.address, self.own_port)
        self.own_port = self._server.sockets[0].getsockname()[1]

    async def drop(self) -> None:
        """Break every connection; new ones may come."""
        for writer in self._open:
            writer.transport.abort()
        await asyncio.sleep(0.2)  # until those who hold the other ends have noticed

    async def close(self) -> None:
        """Let nobody through."""
        if self._server:
            self._server.close()
            self._server = None
        await self.drop()

    @asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        """Let nobody through for a while."""
        await self.close()
        try:
            yield
        finally:
            await self.open()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.passed += 1
        try:
            there, back = await asyncio.open_connection(self.host, self.port)
        except OSError:
            writer.close()
            return
        self._open |= {writer, back}
        await asyncio.gather(_carry(reader, back), _carry(there, writer))
        self._open -= {writer, back}


async def address_for_pods(owner: World) -> str:
    """Give an address of this machine that the cluster's node reaches, and so its pods."""
    nodes = (await owner.call("GET", "/api/v1/nodes"))["items"]
    addresses = [address for node in nodes for address in node["status"].get("addresses", [])]
    inside = next(each["address"] for each in addresses if each["type"] == "InternalIP")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((inside, 9))  # sends nothing
        address: str = probe.getsockname()[0]
        return address


@asynccontextmanager
async def door(url: str, address: str) -> AsyncIterator[Door]:
    """A way to a server that only this machine reaches."""
    made = Door(url, address)
    await made.open()
    try:
        yield made
    finally:
        await made.close()


@asynccontextmanager
async def api_reached(owner: World) -> AsyncIterator[Json]:
    """Values by which pods reach the API; a cluster with nothing behind its Service ``kubernetes`` needs some."""
    if (await owner.find("/api/v1/namespaces/default/endpoints/kubernetes") or {}).get("subsets"):
        yield {"env": {}}
        return
    address, name = await address_for_pods(owner), "kubernetes.default.svc"  # which its certificate is for
    async with door(owner.url, address) as way:
        yield {
            "hostAliases": [{"ip": address, "hostnames": [name]}],
            "env": {"KUBERNETES_SERVICE_HOST": name, "KUBERNETES_SERVICE_PORT": str(way.own_port)},
        }


class Gate:
    """A plain HTTP proxy before the API, with its owner's rights: counts what is asked, and may answer in its place.

    What has a word of ``deaf`` in it is not answered at all.
    """

    def __init__(self, world: World) -> None:
        self._api = ApiClient(world.configuration)
        self.asked: list[str] = []
        self.answers: list[tuple[str, web.Response]] = []
        self.deaf: set[str] = set()
        self.port = 0

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._forward)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()
        await self._api.close()

    def answer(self, ask: str, status: int, **headers: str) -> None:
        """Answer the next request that begins so (``POST /apis/batch``) with this status."""
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        self.answers.append((ask, web.json_response({"message": f"injected {status}"}, status=status, headers=named)))

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        ask = f"{request.method} {request.path_qs}"
        self.asked.append(ask)
        for prepared in self.answers:
            if ask.startswith(prepared[0]):
                self.answers.remove(prepared)
                return prepared[1]
        if any(word in ask for word in self.deaf):
            await asyncio.Event().wait()
        headers = {key: value for key, value in request.headers.items() if key in {"Content-Type", "Accept"}}
        await self._api.update_params_for_auth(headers, [], ["BearerToken"])
        place = f"{self._api.configuration.host}{request.path_qs}"
        session = self._api.rest_client.pool_manager
        data = io.BytesIO(await request.read())
        async with session.request(request.method, place, data=data, headers=headers) as answer:
            response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
            await response.prepare(request)
            with contextlib.suppress(OSError):
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
            return response


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def _configuration() -> Configuration:
    configuration = Configuration()
    await config.load_kube_config(client_configuration=configuration, persist_config=False)
    return configuration


async def _up(name: str) -> tuple[World, Json]:
    """Make a namespace with the launcher's own role in it, and give its service account's credentials."""
    world = World(await _configuration(), name)
    await world.call("POST", "/api/v1/namespaces", {"metadata": {"name": name, "labels": {SESSION: name}}})
    for document in yaml.safe_load_all(RBAC.read_text().replace("necrocode-agents", name)):
        kind = document["kind"].lower() + "s"
        await world.call("POST", kind, document)
    for _ in range(100):
        if await world.find("serviceaccounts/default"):
            break
        await asyncio.sleep(0.1)
    return world, await _token(world)


async def _token(world: World) -> Json:
    try:
        answer = await world.call("POST", "serviceaccounts/runner-launcher/token", {"spec": {"expirationSeconds": 7200}})
        return {"token": answer["status"]["token"]}
    except ApiException:  # before 1.22 not everywhere; then there is a Secret with one
        for _ in range(100):
            account = await world.call("GET", "serviceaccounts/runner-launcher")
            for secret in account.get("secrets", []):
                held = await world.call("GET", f"secrets/{secret['name']}")
                if "token" in held.get("data", {}):
                    return {"token": base64.b64decode(held["data"]["token"]).decode()}
            await asyncio.sleep(0.1)
    raise AssertionError("the service account got no token")


def write_kubeconfig(path: Path, world: World, door: Door, user: Json) -> Path:
    """Write how the launcher reaches the cluster: through the door, as this user."""
    known = world.configuration
    cluster: Json = {"server": f"https://127.0.0.1:{door.own_port}", "tls-server-name": door.host}
    cluster |= {"certificate-authority": str(known.ssl_ca_cert)} if known.ssl_ca_cert else {"insecure-skip-tls-verify": True}
    path.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "test",
                "contexts": [{"name": "test", "context": {"cluster": "test", "user": "launcher"}}],
                "clusters": [{"name": "test", "cluster": cluster}],
                "users": [{"name": "launcher", "user": user}],
            }
        )
    )
    return path


@contextlib.contextmanager
def cluster_session() -> Iterator[tuple[World, Json]]:
    """A namespace for a session, and who the launcher is in it. Skips, or fails, where there is no cluster."""
    if not os.environ.get("KUBECONFIG"):
        missing("kubernetes", "KUBECONFIG is not set: there is no cluster to test on")
    name = f"runner-launcher-test-{secrets.token_hex(4)}"
    try:
        world, user = asyncio.run(_up(name))
    except Exception as error:  # noqa: BLE001 - whatever it is, there is no cluster
        missing("kubernetes", f"no cluster that KUBECONFIG names can be used: {error!r}")
    try:
        yield world, user
        left = asyncio.run(_left(world))
        print(f"left of ours in namespace {name}: {left}")  # noqa: T201 - a count to be seen with -rP or -s
        assert not any(left.values()), f"left in namespace {name}: {left}"
    finally:
        asyncio.run(world.call("DELETE", f"/api/v1/namespaces/{name}"))


async def _left(world: World) -> dict[str, int]:
    """Count what launchers of any installation have left in a namespace, once it had time to go."""
    for _ in range(600):
        left = {kind: len(await world.items(kind, MANAGED)) for kind in ("jobs", "pods", "secrets")}
        if not any(left.values()):
            break
        await asyncio.sleep(0.1)
    return left
