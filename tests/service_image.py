"""The image as it is shipped, built from this directory, and a service that runs in it as its users start it.

Building needs the docker program; where an image of these files was built before, the engine's cache has every layer.
"""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from conftest import until
from docker_engine import HOST, Api
from engines import missing

PROJECT = Path(__file__).parent.parent
BASE = os.environ.get("BASE_IMAGE") or "python:3.11-slim-bookworm"
USER = 10001
"""Whom the image runs as."""

PROXY = "haproxy:lts-alpine"
LOCAL_PROXY = "FROM debian:bookworm-slim\nRUN apt-get update -qq && apt-get install -y -qq --no-install-recommends haproxy\n"
"""For an engine that can pull nothing."""


def docker(*arguments: str) -> str:
    """Run the docker program, and give what it says."""
    done = subprocess.run(["docker", "--host", HOST, *arguments], capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, f"docker {' '.join(arguments)}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


@pytest.fixture(scope="session")
def image(docker_engine: Api) -> str:
    """The image's id."""
    if not shutil.which("docker"):
        missing("docker", "building the image needs the docker program")
    if not docker_engine.has_image(BASE):
        missing("docker", f"the Docker engine at {HOST} has no image {BASE}; BASE_IMAGE names another with Python 3.11")
    build = ("build", "--quiet", "--network", "host", "--build-arg", f"BASE_IMAGE={BASE}")
    return docker(
        *build,
        "--build-arg",
        "VERSION=0.0.0-test",
        "--target",
        "runtime",
        "--tag",
        "runner-launcher:under-test",
        str(PROJECT),
    )


@pytest.fixture(scope="session")
def compose() -> tuple[str, ...]:
    """How compose is called here."""
    if shutil.which("docker-compose"):
        return ("docker-compose",)
    known = (
        subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
        if shutil.which("docker")
        else None
    )
    if known is None or known.returncode:
        missing("docker", "docker compose, or docker-compose 1.28 or later, is not installed")
    return ("docker", "compose")


@pytest.fixture(scope="session")
def proxy_image(docker_engine: Api) -> str:
    """The proxy's image, or one that is made here of Debian's package."""
    if docker_engine.has_image(PROXY):
        return PROXY
    if not docker_engine.has_image("debian:bookworm-slim"):
        missing("docker", f"the Docker engine at {HOST} has neither {PROXY} nor debian:bookworm-slim to make it of")
    command = ["docker", "--host", HOST, "build", "--quiet", "--network", "host", "-"]
    return subprocess.run(command, input=LOCAL_PROXY, capture_output=True, text=True, check=True, timeout=300).stdout.strip()


@contextlib.asynccontextmanager
async def contained(image: str, pools: Path, slots: Path, *options: str) -> AsyncIterator[tuple[httpx.AsyncClient, str]]:
    """Run the image with as little as it needs; gives somebody who may do everything, and the container's name."""
    name = f"runner-launcher-test-{secrets.token_hex(4)}"
    docker(
        *("run", "--detach", "--name", name, "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL"),  # noqa: S108
        *("--security-opt", "no-new-privileges", "--publish", "127.0.0.1::8080", "--volume", f"{slots}:{slots}"),
        *("--volume", f"{pools}:/etc/runner-launcher/pools.yaml:ro", "--env", f"RUNNER_LAUNCHER_SLOT_ROOTS={slots}"),
        *("--env", "RUNNER_LAUNCHER_POOLS_FILE=/etc/runner-launcher/pools.yaml", *options, image),
    )
    try:
        await until(lambda: "listening on" in _logs(name), 60)
        token = docker("exec", name, "cat", "/var/lib/runner-launcher/token")
        address = docker("port", name, "8080/tcp").splitlines()[0]
        headers = {"Authorization": f"Bearer {token}"}
        async with httpx.AsyncClient(base_url=f"http://{address}", headers=headers, timeout=30, trust_env=False) as client:
            yield client, name
        assert "Traceback" not in _logs(name), _logs(name)
    finally:
        docker("rm", "--force", "--volumes", name)


def _logs(name: str) -> str:
    done = subprocess.run(["docker", "--host", HOST, "logs", name], capture_output=True, text=True, check=True)
    state = json.loads(docker("inspect", "--format", "{{json .State}}", name))
    assert state["Running"], done.stdout + done.stderr
    return done.stdout + done.stderr
