"""A cluster as the crash test needs it: what is asked of its API, and a look at what it holds. ``KUBECONFIG`` names it."""

import asyncio
import re
import ssl
from typing import Any
from urllib.parse import urlsplit

import yaml
from kubernetes_asyncio import config
from kubernetes_asyncio.client import ApiClient, Configuration

LABEL = "runner-launcher/installation"
CALLS = {
    "job": re.compile(rb"POST \S*/jobs\b"),
    "secret": re.compile(rb"POST \S*/secrets\b"),
    "read": re.compile(rb"GET \S*/jobs/"),
    "patch": re.compile(rb"PATCH \S*/jobs/"),
    "exec": re.compile(rb"GET \S*/pods/[^/ ]+/exec\b"),
    "log": re.compile(rb"GET \S*/pods/[^/ ]+/log\b"),
    "delete": re.compile(rb"DELETE \S*/jobs/"),
    "list": re.compile(rb"GET \S*/jobs\?(?!\S*watch)"),
    "watch": re.compile(rb"GET \S*/pods\?\S*watch"),
}
POINTS = [
    *(f"job-{what}" for what in ("sent", "answered", "late", "away")),
    *(f"secret-{what}" for what in ("sent", "answered", "late", "away")),
    *(f"patch-{what}" for what in ("sent", "answered", "late")),
    *(f"exec-{what}" for what in ("sent", "answered", "late")),
    *(f"delete-{what}" for what in ("sent", "answered", "late", "away")),
    "read-answered",
    "log-answered",
    "list-answered",
    "watch-answered",
]
_GROUPS = {"jobs": "/apis/batch/v1"}


class Cluster:
    """Asks the API as its owner, past the proxy."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self._configuration = Configuration()

    async def open(self) -> None:
        """Make the namespace."""
        await config.load_kube_config(client_configuration=self._configuration, persist_config=False)
        await self._ask("POST", "/api/v1/namespaces", {"metadata": {"name": self.namespace}})

    async def close(self) -> None:
        """Remove the namespace with all that is in it."""
        await self._ask("DELETE", f"/api/v1/namespaces/{self.namespace}")

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection to the API."""
        place = urlsplit(str(self._configuration.host))
        trust = ssl.create_default_context(cafile=self._configuration.ssl_ca_cert)
        if self._configuration.cert_file:
            trust.load_cert_chain(self._configuration.cert_file, self._configuration.key_file)
        return await asyncio.open_connection(str(place.hostname), place.port or 443, ssl=trust)

    def kubeconfig(self, port: int) -> str:
        """Write how the service reaches the API: in plain words, through the proxy, which wraps them."""
        token = self._configuration.api_key.get("BearerToken", "").removeprefix("Bearer ")
        return yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "crash",
                "contexts": [{"name": "crash", "context": {"cluster": "crash", "user": "crash"}}],
                "clusters": [{"name": "crash", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
                "users": [{"name": "crash", "user": {"token": token} if token else {}}],
            }
        )

    async def left(self, installation: str) -> dict[str, bool]:
        """List Jobs, pods and Secrets of an installation by their runner's id, and whether a program lives there."""
        found: dict[str, bool] = {}
        for kind in ("jobs", "secrets", "pods"):
            path = f"{_GROUPS.get(kind, '/api/v1')}/namespaces/{self.namespace}/{kind}"
            for item in (await self._ask("GET", path, labelSelector=f"{LABEL}={installation}"))["items"]:
                runner_id = item["metadata"]["labels"]["runner-id"]
                found[runner_id] = found.get(runner_id, False) or item.get("status", {}).get("phase") == "Running"
        return found

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None = None, **query: str) -> dict[str, Any]:
        async with ApiClient(self._configuration) as api:
            answer: dict[str, Any] = await api.call_api(
                path,
                method,
                query_params=list(query.items()),
                header_params={"Content-Type": "application/json", "Accept": "application/json"},
                body=body,
                auth_settings=["BearerToken"],
                response_types_map={200: "object", 201: "object", 202: "object"},
                _return_http_data_only=True,
                _request_timeout=30,
            )
            return answer
