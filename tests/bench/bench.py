"""All benchmarks that this machine has the engines for, one after another; one table, and one JSON file.

python tests/bench/bench.py [--short] [--json bench.json]
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LIBRARIES = ("fastapi", "uvicorn", "aiohttp", "aiodocker", "sqlalchemy", "pydantic")
BENCHES: dict[str, tuple[list[str], list[str]]] = {  # what each is given: at length, and in short
    "reads": ([], ["--seconds", "0.5", "--rounds", "3", "--records", "1000", "100000"]),
    "docker": ([], ["--launches", "4", "--rounds", "3", "--ends", "20"]),
    "kubernetes": ([], ["--launches", "4", "--rounds", "3", "--ends", "10", "--tracked", "100"]),
}
SAYS_ALONE: dict[str, tuple[list[str], list[str]]] = {  # these print their figures, and write no file
    "local_process": ([], ["--runners", "40", "--live", "50"]),
    "event_streams": ([], ["--streams", "50", "--runners", "10"]),
}

Json = dict[str, Any]


def lacking(name: str) -> str | None:
    """Say what this machine lacks for a benchmark."""
    if name == "docker":
        host = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
        if host.startswith("unix://") and not Path(host.removeprefix("unix://")).exists():
            return f"no engine at {host}"
    if name == "kubernetes" and not Path(os.environ.get("KUBECONFIG") or Path.home() / ".kube" / "config").exists():
        return "no cluster: set KUBECONFIG"
    return None


def run(name: str, arguments: list[str], *, writes: bool) -> Json:
    """Run one benchmark, its output shown as it comes; gives what it wrote and how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        command = [sys.executable, str(HERE / f"{name}.py"), *arguments, *(["--json", str(file)] if writes else [])]
        load = os.getloadavg()[0]
        code = subprocess.run(command, check=False).returncode
        figures = json.loads(file.read_text()) if file.exists() else None
    return {"exit_code": code, "load_before": load, "figures": figures}


def rows(name: str, figures: Any) -> list[tuple[str, float]]:  # noqa: ANN401 - JSON
    """Write nested figures as rows, each with its path."""
    if isinstance(figures, dict):
        return [row for key, value in figures.items() for row in rows(f"{name} {key}", value)]
    return [(name, figures)] if isinstance(figures, int | float) else []


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true", help="fewer and smaller rounds, for a first look")
    parser.add_argument("--json", type=Path, default=Path("bench.json"))
    options = parser.parse_args()
    machine: Json = {
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
    }
    results: Json = {}
    for name, (whole, short) in (BENCHES | SAYS_ALONE).items():
        if lack := lacking(name):
            results[name] = {"left_out": lack}
            continue
        print(f"== {name}", flush=True)
        results[name] = run(name, short if options.short else whole, writes=name in BENCHES)
    options.json.write_text(json.dumps({"machine": machine, "benchmarks": results}, indent=2) + "\n")
    print("\n" + ", ".join(f"{name} {value}" for name, value in machine.items()))
    for name, result in results.items():
        if "left_out" in result:
            print(f"{name}: left out, {result['left_out']}")
        for row, value in rows(name, result.get("figures")):
            print(f"{row:<70}{value:>12.3f}")
    sys.exit(any(result.get("exit_code") for result in results.values()))


if __name__ == "__main__":
    main()
