"""The old usage example does what it did, with only its import changed."""

import asyncio
import contextlib
import os
import secrets
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import docker_engine
import pytest
from conftest import Json, Serve, launch_body, local_pool, until
from kubernetes_world import IMAGE, Door, World, cluster_session, write_kubeconfig

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(params=["local", "docker", "kubernetes"])
def kind(request: pytest.FixtureRequest) -> str:
    """Each environment in which the old usage example must run."""
    return str(request.param)


@pytest.fixture
def cluster(kind: str) -> Iterator[tuple[World, Json] | None]:
    """A namespace of a cluster and who the service is there, if that is the environment."""
    if kind != "kubernetes":
        yield None
        return
    with cluster_session() as made:
        yield made


@pytest.fixture
async def pool(
    kind: str, cluster: tuple[World, Json] | None, request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[Json]:
    """A pool there, on a real engine if this machine has one."""
    if cluster:
        world, user = cluster
        door = Door(world.url)
        await door.open()
        where = {
            "kubeconfig": str(write_kubeconfig(tmp_path / "kubeconfig", world, door, user)),
            "namespace": world.namespace,
        }
        image = {"image": IMAGE, "image_pull_policy": "IfNotPresent"}
        yield {"type": "kubernetes", "config": {**where, **image, "command": ["sh", "-c", "exit 0"]}}
        await door.close()
    elif kind == "docker":
        request.getfixturevalue("docker_engine")
        config = {"image": docker_engine.IMAGE, "docker_host": docker_engine.HOST, "pull_policy": "never"}
        yield {"type": "docker", "config": {**config, "command": ["sh", "agent.sh"]}}
    else:
        yield local_pool()


@pytest.mark.timeout(300)
async def test_the_old_usage_example_runs_with_its_import_changed(
    serve: Serve, slot: Path, state_dir: Path, kind: str, pool: Json
) -> None:
    launch_body(slot, "exit 0")
    async with serve({kind: pool}, INSTALLATION=f"test-{secrets.token_hex(6)}") as service, service.client() as client:
        environment = {
            "PATH": os.environ["PATH"],
            "RUNNER_LAUNCHER_URL": service.url,
            "RUNNER_LAUNCHER_STATE_DIR": str(state_dir),
        }
        command = [sys.executable, str(EXAMPLES / "dispatcher.py"), str(slot), kind]
        ended = await asyncio.to_thread(
            subprocess.run, command, env=environment, capture_output=True, text=True, timeout=200, check=False
        )
        assert ended.returncode == 0, ended.stderr
        (record,) = (await client.get("/runners")).json()["items"]
        assert record["state"] == "completed"
        assert ended.stdout.splitlines() == [
            f"Launched runner {record['runner_id']} with container {record['container_id']}",
            "It completed",
        ]
        named = {"local": record["pid"], "docker": record["container_id"], "kubernetes": record["job_name"]}
        assert named[kind]
        await until(lambda: cleaned(state_dir, record), 60)


def cleaned(state_dir: Path, record: Json) -> bool:
    """Say whether nothing of a runner is left on its engine, as the store has it."""
    with contextlib.closing(sqlite3.connect(f"file:{state_dir}/runners.db?mode=ro", uri=True)) as connection:
        query = "SELECT cleaned FROM runners WHERE runner_id = ?"
        return bool(connection.execute(query, (record["runner_id"],)).fetchone()[0])


async def test_the_old_usage_example_tells_a_launch_that_fails(serve: Serve, slot: Path, state_dir: Path) -> None:
    async with serve() as service:
        environment = {"RUNNER_LAUNCHER_URL": service.url, "RUNNER_LAUNCHER_STATE_DIR": str(state_dir)}
        command = [sys.executable, str(EXAMPLES / "dispatcher.py"), str(slot), "nowhere"]
        ended = await asyncio.to_thread(
            subprocess.run, command, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert (ended.returncode, ended.stdout) == (1, "")
        assert ended.stderr.startswith("The launch failed: no pool named nowhere is configured")
