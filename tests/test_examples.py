"""The demo as its reader starts it, and the files to copy."""

import asyncio
import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
from docker_engine import HOST, Api
from engines import missing
from kubernetes_world import cluster_session

from app.launchers.container import INSTALLATION
from app.models import LaunchRequest
from app.pools import load_pools

EXAMPLES = Path(__file__).parent.parent / "examples"
IMAGE = "python:3.11-slim-bookworm"


def demo(environment: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "DEMO": environment, **variables}
    script = str(EXAMPLES / "demo.py")
    return subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, check=False, timeout=100)


def test_the_demo_of_docker_leaves_nothing_on_the_engine(docker_engine: Api) -> None:
    image = os.environ.get("DEMO_IMAGE") or IMAGE
    if not docker_engine.has_image(image):
        missing("docker", f"the Docker engine at {HOST} has no image {image}; DEMO_IMAGE names another")
    done = demo("docker", DEMO_IMAGE=image)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"state": "completed"' in done.stdout
    assert "writing task-7.md" in done.stdout
    assert "no heartbeat" not in done.stdout
    container = done.stdout.split(", container ")[1].split()[0]
    assert not [entry for entry in docker_engine.containers(INSTALLATION) if entry["Id"].startswith(container)]


@pytest.mark.usefixtures("docker_engine")
def test_the_demo_of_docker_says_what_it_lacks(tmp_path: Path) -> None:
    done = demo("docker", DOCKER_HOST=f"unix://{tmp_path}/none.sock")
    assert done.returncode == 1
    assert f"no Docker Engine answers at unix://{tmp_path}/none.sock" in done.stderr
    done = demo("docker", DEMO_IMAGE=f"127.0.0.1:1/{secrets.token_hex(4)}:1")
    assert done.returncode == 1
    assert "DEMO_IMAGE names another" in done.stdout
    assert "the pull failed" in done.stderr


def test_the_demo_of_kubernetes_leaves_nothing_in_its_namespace() -> None:
    with cluster_session() as (world, _):
        done = demo("kubernetes", DEMO_IMAGE=os.environ.get("DEMO_IMAGE") or IMAGE)
        assert done.returncode == 0, done.stdout + done.stderr
        assert '"state": "completed"' in done.stdout
        assert "writing task-7.md" in done.stdout
        name = done.stdout.split(" in namespace ")[1].split()[0]
        there = asyncio.run(world.find(f"/api/v1/namespaces/{name}"))
        assert there is None or there["status"]["phase"] == "Terminating"


def test_the_demo_of_kubernetes_says_what_it_lacks(tmp_path: Path) -> None:
    done = demo("kubernetes", KUBECONFIG=f"{tmp_path}/none")
    assert done.returncode == 1
    assert f"{tmp_path}/none names cannot be used" in done.stderr


@pytest.mark.parametrize(
    "name",
    ["pools.yaml", "pools-docker.yaml", "pools-kubernetes.yaml", "pools-in-a-container.yaml", "pools-first-kubernetes.yaml"],
)
def test_the_pool_files_load_without_a_warning(name: str) -> None:
    pools = load_pools(EXAMPLES / name)
    assert pools.by_name
    assert not pools.warnings


@pytest.mark.parametrize(
    ("name", "pools"),
    [
        ("launch.json", "pools.yaml"),
        ("launch-docker.json", "pools-docker.yaml"),
        ("launch-kubernetes.json", "pools-kubernetes.yaml"),
    ],
)
def test_the_launches_name_a_pool_of_their_file(name: str, pools: str) -> None:
    request = LaunchRequest.model_validate(json.loads((EXAMPLES / name).read_text()))
    assert request.pool in load_pools(EXAMPLES / pools).by_name


def test_the_agent_leaves_a_repository_around_its_slot_alone(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    git("init", "--quiet", "--initial-branch", "around")
    git("-c", "user.name=me", "-c", "user.email=me@example.org", "commit", "--quiet", "--allow-empty", "--message", "Begin")
    slot = tmp_path / "slot"
    slot.mkdir()
    context = json.dumps({"task_id": "7", "branch_name": "task-7"})
    env = {**os.environ, "TASK_CONTEXT": context, "RUNNER_SECONDS_PER_STEP": "0.01"}
    agent = [sys.executable, str(EXAMPLES / "agent.py")]
    done = subprocess.run(agent, cwd=slot, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "this slot is not a git repository of its own; the file stays uncommitted" in done.stdout
    assert (slot / "task-7.md").exists()
    assert git("log", "--format=%s", "--all").split() == ["Begin"]
    assert git("branch", "--show-current").strip() == "around"
