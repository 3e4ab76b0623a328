"""A Docker Engine as the crash test needs it: what the service asks of it, and a look at what it holds."""

import json
import os
import re
import ssl
from pathlib import Path
from typing import Any

import httpx

ENGINE = Path(os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock").removeprefix("unix://"))
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For clients that speak plain HTTP: each would read all of the machine's certificates, for 20 ms of processor."""

LABEL = "runner-launcher.installation"
RUNNER_ID = "runner-launcher.runner-id"
CALLS = {
    "create": re.compile(rb"POST \S*/containers/create\b"),
    "archive": re.compile(rb"PUT \S*/containers/[^/ ]+/archive\b"),
    "start": re.compile(rb"POST \S*/containers/[^/ ]+/start\b"),
    "inspect": re.compile(rb"GET \S*/containers/[^/ ]+/json\b"),
    "logs": re.compile(rb"GET \S*/containers/[^/ ]+/logs\b"),
    "kill": re.compile(rb"POST \S*/containers/[^/ ]+/kill\b"),
    "delete": re.compile(rb"DELETE \S*/containers/[^/ ]+"),
}
POINTS = [
    "create-sent",
    "create-answered",
    "create-late",
    "create-away",
    "archive-sent",
    "archive-answered",
    "archive-late",
    "start-sent",
    "start-answered",
    "start-late",
    "start-away",
    "inspect-answered",
    "logs-answered",
    "kill-sent",
    "kill-answered",
    "kill-late",
    "delete-sent",
    "delete-answered",
    "delete-late",
]


async def engine_answers() -> bool:
    try:
        async with _client() as client:
            return (await client.get("/_ping")).is_success
    except httpx.TransportError:
        return False


async def listed(installation: str) -> list[dict[str, Any]]:
    """List what the engine holds of an installation, dead or alive, as it tells anybody."""
    filters = json.dumps({"label": [f"{LABEL}={installation}"]})
    async with _client() as client:
        answer = await client.get("/containers/json", params={"all": "1", "filters": filters})
        answer.raise_for_status()
        found: list[dict[str, Any]] = answer.json()
        return found


async def remove_all(installation: str) -> None:
    """Leave nothing behind, whatever the test has found."""
    async with _client() as client:
        for container in await listed(installation):
            await client.delete(f"/containers/{container['Id']}", params={"force": "1", "v": "1"})


def _client() -> httpx.AsyncClient:
    transport = httpx.AsyncHTTPTransport(uds=str(ENGINE), verify=NO_TLS)
    return httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=60, trust_env=False)
