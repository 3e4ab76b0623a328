"""Show the main job, for real: launch the example agent on a git slot over HTTP and watch it to its end.

Everything is made in a temporary directory and removed again. DEMO names the environment to show; today `local` is the
one there is.
"""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

EXAMPLES = Path(__file__).resolve().parent
POOLS = {"local": "local"}
"""The pool of pools.yaml that shows each environment."""

# A service of the user's own, or a git hook that runs this, must not reach into the demo.
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith(("RUNNER_LAUNCHER_", "GIT_"))}


class DemoFailed(Exception):
    """Something went otherwise than shown; the text says what, in plain words."""


def main() -> int:
    """Run the demo; 0 when the record tells a runner that completed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    directory = Path(tempfile.mkdtemp(prefix="runner-launcher-demo-"))
    try:
        show(directory)
    except (DemoFailed, httpx.HTTPError, OSError) as error:
        print(f"\nThe demo failed: {error}", file=sys.stderr)
        print_tail(directory / "service.log")
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return 0


def show(directory: Path) -> None:
    """Tell the whole story once."""
    pool = pool_to_show()
    slot = directory / "slots" / "example"
    tell("Making a git slot")
    make_slot(slot)
    tell("Starting the service on an embedded SQLite")
    with service(directory, slot.parent) as client:
        tell(f"Launching the example agent: POST {client.base_url}/runners")
        runner = launch(client, pool, slot)
        print(f"    {runner['runner_id']} is {runner['state']}, pid {runner['pid']}")
        tell(f"Its log as it runs: GET /runners/{runner['runner_id']}/logs?follow=true")
        try:
            follow_log(client, runner["runner_id"])
        except BaseException:
            client.delete(f"/runners/{runner['runner_id']}", params={"grace": 2})
            end_of(client, runner["runner_id"])  # its slot must not go away before it
            raise
        record = end_of(client, runner["runner_id"])
        tell(f"Its record: GET /runners/{runner['runner_id']}")
        print(json.dumps(record, indent=2, ensure_ascii=False))
        if record["state"] != "completed" or record["exit_code"] != 0:
            raise DemoFailed(f"the runner did not complete: {record['reason']}: {record['message']}")
        tell("Its work: git log --oneline in the slot")
        print(git(slot, "log", "--oneline", "--decorate"))
    tell("Done. The service is stopped, and everything the demo made is removed.")


def pool_to_show() -> str:
    """Choose the pool for the environment that DEMO names."""
    name = os.environ.get("DEMO") or "local"
    if name not in POOLS:
        raise DemoFailed(f"DEMO={name} is not known; there is {', '.join(POOLS)}")
    return POOLS[name]


def make_slot(slot: Path) -> None:
    """Make a repository with one commit, as a Dispatcher would have checked out."""
    slot.mkdir(parents=True)
    (slot / "README.md").write_text("# Example\n", encoding="utf-8")
    git(slot, "-c", "init.defaultBranch=main", "init", "--quiet")
    git(slot, "add", "README.md")
    author = ("-c", "user.name=Example", "-c", "user.email=example@example.org", "-c", "commit.gpgsign=false")
    git(slot, *author, "commit", "--quiet", "--message", "Begin")


@contextmanager
def service(directory: Path, slots: Path) -> Iterator[httpx.Client]:
    """Start the service, and stop it at the end. In a session of its own, so that Ctrl-C ends the demo first."""
    url = f"127.0.0.1:{free_port()}"
    state = directory / "state"
    settings = {
        "RUNNER_LAUNCHER_LISTEN": url,
        "RUNNER_LAUNCHER_STATE_DIR": str(state),
        "RUNNER_LAUNCHER_POOLS_FILE": str(EXAMPLES / "pools.yaml"),
        "RUNNER_LAUNCHER_SLOT_ROOTS": str(slots),
        "RUNNER_LAUNCHER_RUNNER_COMMAND": shlex.join([sys.executable, str(EXAMPLES / "agent.py")]),
    }
    with (directory / "service.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "app.cli", "serve"],
            cwd=EXAMPLES.parent,
            env=ENVIRONMENT | settings,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        # No proxy of the environment stands between the demo and its own service.
        with httpx.Client(base_url=f"http://{url}", timeout=60, trust_env=False) as client:
            wait_until_ready(client, process)
            client.headers["Authorization"] = f"Bearer {(state / 'token').read_text(encoding='utf-8').strip()}"
            yield client
    finally:
        stop(process)


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_ready(client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    """Wait until the service says that it is ready."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DemoFailed(f"the service ended at its start with code {process.returncode}")
        try:
            if client.get("/readyz").is_success:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.1)
    raise DemoFailed("the service was not ready within 60 s")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the service as an operator would."""
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise DemoFailed("the service did not stop within 20 s of TERM; it was killed") from None


def launch(client: httpx.Client, pool: str, slot: Path) -> dict[str, Any]:
    """Post launch.json, with our slot and pool. The key makes it safe to send the same request again."""
    body = json.loads((EXAMPLES / "launch.json").read_text(encoding="utf-8"))
    body["slot"]["slot_path"] = str(slot)
    body["pool"] = pool
    return answer(client.post("/runners", json=body, headers={"Idempotency-Key": str(uuid.uuid4())}))


def follow_log(client: httpx.Client, runner_id: str) -> None:
    """Print each line when it comes, to the last."""
    with client.stream("GET", f"/runners/{runner_id}/logs", params={"follow": "true"}) as response:
        if not response.is_success:
            response.read()
            answer(response)
        for line in response.iter_lines():
            print(f"    {line}", flush=True)


def end_of(client: httpx.Client, runner_id: str) -> dict[str, Any]:
    """Get the final record of a runner that ends now."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        record = answer(client.get(f"/runners/{runner_id}"))
        if record["phase"] == "finished":
            return record
        time.sleep(0.05)
    raise DemoFailed(f"{runner_id} should have ended by now, but it is {record['phase']}")


def answer(response: httpx.Response) -> dict[str, Any]:
    """Read a JSON answer; a problem becomes a failure of the demo, in the service's words."""
    if response.is_success:
        body: dict[str, Any] = response.json()
        return body
    raise DemoFailed(f"{response.request.method} {response.url.path} answered {response.status_code}: {response.text}")


def git(slot: Path, *arguments: str) -> str:
    """Run git in the slot."""
    done = subprocess.run(["git", *arguments], check=False, cwd=slot, env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        raise DemoFailed(f"git {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout.strip()


def tell(text: str) -> None:
    """Say what comes next."""
    print(f"\n==> {text}", flush=True)


def print_tail(log: Path) -> None:
    """Show the end of the service's log."""
    if not log.exists():
        return
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
    print("The end of the service's log:", *lines, sep="\n    ", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
