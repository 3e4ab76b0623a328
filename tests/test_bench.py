"""Every benchmark in its short form: it must work. What it measured here says nothing, and a slow machine fails nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kubernetes_world import cluster_session

pytestmark = pytest.mark.timeout(600)  # it is seconds for each, where nothing else runs
SCRIPT = Path(__file__).parent / "bench" / "bench.py"


def bench(name: str, directory: Path, **settings: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Run a benchmark; gives how that went, and what it wrote."""
    file = directory / "bench.json"
    words = [name, "--short", "--json", str(file), "--markdown", str(directory / "bench.md")]
    command, environment = [sys.executable, str(SCRIPT), *words], {**os.environ, **settings}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    return done, json.loads(file.read_text())["benchmarks"][name]


def works(name: str, directory: Path) -> dict[str, Any]:
    """Run a benchmark that tells figures in a table; gives the figures."""
    done, result = bench(name, directory)
    assert done.returncode == 0, done.stdout + done.stderr
    assert result["tables"], result
    assert all(table in (directory / "bench.md").read_text() for table in result["tables"])
    figures: dict[str, Any] = result["figures"]
    return figures


@pytest.mark.parametrize("name", ["start", "reads", "event_streams", "logs", "scale"])
def test_a_benchmark_works(name: str, tmp_path: Path) -> None:
    assert works(name, tmp_path)


def test_local_launches_are_measured_beside_shim_and_command(tmp_path: Path) -> None:
    figures = works("local_process", tmp_path)
    assert {"1", "4"} == figures["launches"].keys()
    for sides in figures["launches"].values():
        assert {"service", "bare shim", "bare command"} == sides.keys()
        assert sides["bare shim"]["ratio_gone"] > 0


@pytest.mark.usefixtures("postgres")
def test_intents_are_measured_in_both_databases_beside_their_drivers(tmp_path: Path) -> None:
    figures = works("intents", tmp_path)
    assert {"store", "bare driver"} == figures["SQLite"]["4"].keys()
    assert {"store", "bare driver", "2 stores"} == figures["PostgreSQL"]["4"].keys()


@pytest.mark.usefixtures("docker_engine")
def test_containers_are_measured_beside_a_bare_client(tmp_path: Path) -> None:
    assert {"service", "bare client"} == works("docker", tmp_path)["launches"]["1"].keys()


def test_jobs_are_measured_beside_a_bare_client_on_kubernetes(tmp_path: Path) -> None:
    with cluster_session():
        assert {"service", "bare client"} == works("kubernetes", tmp_path)["launches"]["1"].keys()


def test_a_benchmark_of_a_service_that_does_not_start_fails(tmp_path: Path) -> None:
    done, result = bench("reads", tmp_path, RUNNER_LAUNCHER_MAX_CONNECTIONS="none")
    assert done.returncode != 0
    assert result["exit_code"] != 0
    assert "the service did not start: " in done.stderr
    assert "Failed." in (tmp_path / "bench.md").read_text()
