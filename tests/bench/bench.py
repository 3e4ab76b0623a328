"""All benchmarks that this machine has the engines for, one after another: one file, and one text for docs/benchmarks.md.

    python tests/bench/bench.py [NAME ...] [--short] [--json bench.json] [--markdown bench.md]

``--short`` takes seconds for each, and says whether they work rather than how fast anything is.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from figures import Json, table

HERE = Path(__file__).parent
LIBRARIES = ("fastapi", "uvicorn", "aiohttp", "aiodocker", "kubernetes_asyncio", "sqlalchemy", "psycopg", "pydantic")
BENCHES = {  # how each is run in short
    "start": "--times 1 --no-warm-up",
    "reads": "--seconds 0.1 --rounds 1 --records 100",
    "local_process": "--launches 8 --rounds 1 --at-once 1 4 --ends 4 --live 8",
    "event_streams": "--streams 20 --runners 4",
    "logs": "--mib 1 --rounds 1",
    "intents": "--intents 16 --rounds 1 --at-once 4",
    "docker": "--launches 2 --rounds 1 --at-once 1 --ends 1",
    "kubernetes": "--launches 2 --rounds 1 --at-once 1 --runs 1 --ends 1 --tracked 0",
    "scale": "--live 50 100 --launches 16 --rest 0.5 --rates 10 20 --seconds 1",
}


def lacking(name: str) -> str | None:
    """Say what this machine lacks for a benchmark."""
    if name == "docker":
        host = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
        if host.startswith("unix://"):
            with socket.socket(socket.AF_UNIX) as engine:
                try:
                    engine.connect(host.removeprefix("unix://"))
                except OSError as error:  # it is not there, or not for this user
                    return f"no engine at {host}: {error.strerror}"
    if name == "kubernetes" and not Path(os.environ.get("KUBECONFIG") or Path.home() / ".kube" / "config").exists():
        return "no cluster: set KUBECONFIG"
    return None


def run(name: str, arguments: list[str]) -> Json:
    """Run one benchmark, its output shown as it comes; gives what it wrote and how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        load, began = os.getloadavg()[0], time.monotonic()
        code = subprocess.run(
            [sys.executable, str(HERE / f"{name}.py"), *arguments, "--json", str(file)], check=False
        ).returncode
        found = json.loads(file.read_text()) if file.exists() else {}
    return {"exit_code": code, "load_before": load, "seconds": time.monotonic() - began, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHES)}; all if none is named")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--json", type=Path, default=Path("bench.json"))
    parser.add_argument("--markdown", type=Path, default=Path("bench.md"))
    options = parser.parse_args()
    if unknown := set(options.names) - set(BENCHES):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    machine = {
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
    }
    results: Json = {}
    for name in options.names or BENCHES:
        if lack := lacking(name):
            results[name] = {"left_out": lack}
            continue
        print(f"== {name}", flush=True)
        results[name] = run(name, BENCHES[name].split() if options.short else [])
    options.json.write_text(json.dumps({"machine": machine, "benchmarks": results}, indent=2) + "\n")
    text = markdown(machine, results)
    options.markdown.write_text(text)
    print(f"\n{text}")
    sys.exit(any(result.get("exit_code") for result in results.values()))


def markdown(machine: Json, results: Json) -> str:
    """Write all that was found as one text, the promises first."""
    kept = {True: "yes", False: "**no**"}
    rows = [
        [each["what"], each["promised"], each["here"], kept[each["kept"]]]
        for result in results.values()
        for each in result.get("promises", [])
    ]
    parts = [", ".join(f"{name} {value}" for name, value in machine.items())]
    parts.append(table(["promise", "promised", "here", "kept"], rows))
    for name, result in results.items():
        if "left_out" in result:
            parts.append(f"### {name}\n\nLeft out: {result['left_out']}.")
        elif result["exit_code"]:
            parts.append(f"### {name}\n\nFailed.")
        else:
            parts.append(f"### {name}\n\nLoad {result['load_before']:.1f} before.")
            parts += result["tables"]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
