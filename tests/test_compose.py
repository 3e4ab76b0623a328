"""deploy/compose.yaml as its users start it: the service sees the engine through a proxy that lets nothing else through."""

import contextlib
import os
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from conftest import finished, launch_body, launched, until
from docker_engine import HOST, IMAGE
from engines import missing
from service_image import PROJECT, USER, docker

pytestmark = pytest.mark.timeout(400)  # the first to need it builds the image

COMPOSE = PROJECT / "deploy" / "compose.yaml"
ASK = """
import http.client, socket, sys
class Engine(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect("/run/engine/docker.sock")
for line in sys.argv[1:]:
    engine = Engine("docker")
    engine.request(*line.split())
    print(engine.getresponse().status, line)
"""
REFUSED = (
    "POST /v1.41/containers/{id}/exec",
    "POST /exec/abc/start",
    "POST /v1.41/build",
    "GET /v1.41/networks",
    "GET /v1.41/containers/some-other/json",
    "GET /v1.41/containers/{id}/archive?path=/etc/passwd",
    "GET /v1.41/containers/json/../../secrets",
    "POST /v1.41/containers/{id}/update",
    "POST /v1.41/swarm/init",
    "DELETE /v1.41/images/busybox:latest",
    "DELETE /v1.41/containers/some-other",
)


@pytest.fixture
def stack(compose: tuple[str, ...], image: str, proxy_image: str, tmp_path: Path) -> Iterator[tuple[str, ...]]:
    """Everything up, with pools like those that are shipped; gives the start of a compose command."""
    if os.geteuid():
        missing("root", "a slot is given to the image's user by root alone")
    name = f"runner-launcher-test-{secrets.token_hex(4)}"
    pools = yaml.safe_load((COMPOSE.parent / "compose" / "pools.yaml").read_text())
    pools["agent_pools"]["docker"]["config"] |= {"image": IMAGE, "command": ["sh", "agent.sh"], "network": name}
    (tmp_path / "pools.yaml").write_text(yaml.safe_dump(pools))
    (tmp_path / "settings").write_text(
        f"SLOTS={tmp_path}/slots\nPOOLS={tmp_path}/pools.yaml\nPORT=0\nAGENTS_NETWORK={name}\nDOCKER_SOCKET={HOST[7:]}\n"
        f"RUNNER_LAUNCHER_IMAGE={image}\nSOCKET_PROXY_IMAGE={proxy_image}\n"
    )
    command = (*compose, "--project-name", name, "--file", str(COMPOSE), "--env-file", str(tmp_path / "settings"))
    try:
        said(*command, "up", "--detach", "--no-build")
        yield command
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run([*command, "down", "--volumes", "--timeout", "10"], capture_output=True, check=False, timeout=100)


def said(*command: str) -> str:
    done = subprocess.run(
        command, env={**os.environ, "DOCKER_HOST": HOST}, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


async def test_runners_are_launched_through_a_proxy_that_lets_nothing_else_through(
    stack: tuple[str, ...], tmp_path: Path
) -> None:
    slot = tmp_path / "slots" / "slot-1"
    slot.mkdir(parents=True)
    os.chown(slot, USER, USER)
    launcher = said(*stack, "ps", "-q", "launcher")
    await until(lambda: "listening on" in said(*stack, "logs", "launcher"), 60)
    token = docker("exec", launcher, "cat", "/var/lib/runner-launcher/token")
    url = f"http://{said(*stack, 'port', 'launcher', '8080')}"
    async with httpx.AsyncClient(
        base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=30, trust_env=False
    ) as client:
        job = launch_body(slot, 'wget -q -O - "$RUNNER_LAUNCHER_URL/livez" >said; echo heard', pool="docker")
        record = await finished(client, await launched(client, job), 60)
        assert (record["state"], record["exit_code"]) == ("completed", 0), record
        assert (slot / "said").read_text() == '{"status":"alive"}'
        assert "heard" in (await client.get(f"/runners/{record['runner_id']}/logs")).text

        long = await launched(client, launch_body(slot, "sleep 600", pool="docker"))
        refused = [line.format(id=long["container_id"]) for line in REFUSED]
        assert docker("exec", launcher, "python", "-c", ASK, *refused).splitlines() == [f"403 {line}" for line in refused]
        assert (await client.delete(f"/runners/{long['runner_id']}?grace=0")).is_success
        assert (await finished(client, long, 60))["reason"] == "cancelled"
