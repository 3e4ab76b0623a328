"""The old usage example does what it did, with only its import changed."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Json, Serve, launch_body, local_pool

EXAMPLES = Path(__file__).parents[1] / "examples"

POOLS: dict[str, Json] = {"local": local_pool()}
"""A pool for each environment in which the old usage example must run."""


@pytest.mark.parametrize("pool", POOLS)
async def test_the_old_usage_example_runs_with_its_import_changed(
    serve: Serve, slot: Path, state_dir: Path, pool: str
) -> None:
    launch_body(slot, "exit 0")
    async with serve({pool: POOLS[pool]}) as service, service.client() as client:
        environment = {
            "PATH": os.environ["PATH"],
            "RUNNER_LAUNCHER_URL": service.url,
            "RUNNER_LAUNCHER_STATE_DIR": str(state_dir),
        }
        command = [sys.executable, str(EXAMPLES / "dispatcher.py"), str(slot), pool]
        ended = await asyncio.to_thread(
            subprocess.run, command, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert ended.returncode == 0, ended.stderr
        (record,) = (await client.get("/runners")).json()["items"]
        assert record["state"] == "completed"
        assert ended.stdout.splitlines() == [
            f"Launched runner {record['runner_id']} with container {record['container_id']}",
            "It completed",
        ]


async def test_the_old_usage_example_tells_a_launch_that_fails(serve: Serve, slot: Path, state_dir: Path) -> None:
    async with serve() as service:
        environment = {"RUNNER_LAUNCHER_URL": service.url, "RUNNER_LAUNCHER_STATE_DIR": str(state_dir)}
        command = [sys.executable, str(EXAMPLES / "dispatcher.py"), str(slot), "nowhere"]
        ended = await asyncio.to_thread(
            subprocess.run, command, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert (ended.returncode, ended.stdout) == (1, "")
        assert ended.stderr.startswith("The launch failed: no pool named nowhere is configured")
