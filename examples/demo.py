"""Show the main job, for real: launch the example agent on a git slot over HTTP and watch it to its end.

Everything is made in a temporary directory and removed again. DEMO names the environment to show: `local`, `docker` or
`kubernetes` (the cluster that KUBECONFIG names, in a namespace made for the demo). For the last two DEMO_IMAGE names
an image to take instead of that of the pool file; it needs Python, and git to commit.
"""

import asyncio
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import aiohttp
import httpx
from kubernetes_asyncio import config
from kubernetes_asyncio.client import (
    ApiClient,
    ApiException,
    BatchV1Api,
    Configuration,
    CoreV1Api,
    V1ConfigMap,
    V1Namespace,
    V1ObjectMeta,
)
from kubernetes_asyncio.config import ConfigException

EXAMPLES = Path(__file__).resolve().parent
POOLS = {"local": "pools.yaml", "docker": "pools-docker.yaml", "kubernetes": "pools-kubernetes.yaml"}
"""The pool file that shows each environment; its pool bears the same name."""

KUBECONFIG = os.environ.get("KUBECONFIG") or str(Path.home() / ".kube" / "config")
DOCKER = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"

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
    if pool == "docker":
        find_engine()
    with namespace() if pool == "kubernetes" else nullcontext("") as made_for_us:
        show_in(directory, pool, made_for_us)
    tell("Done. The service is stopped, and everything the demo made is removed.")


def show_in(directory: Path, pool: str, made_for_us: str) -> None:
    """Tell it in this pool; in a cluster in this namespace."""
    slot = directory / "slots" / "example"
    tell("Making a git slot")
    make_slot(slot)
    write_pools(directory, pool, made_for_us)
    tell("Starting the service on an embedded SQLite")
    with service(directory, slot.parent) as client:
        tell(f"Launching the example agent: POST {client.base_url}/runners")
        runner = launch(client, pool, slot)
        place = f", pid {runner['pid']}" if runner["pid"] else ""
        place = f", container {runner['container_id'][:12]}" if runner["container_id"] else place
        place = f", Job {runner['job_name']} in namespace {made_for_us}" if runner["job_name"] else place
        print(f"    {runner['runner_id']} is {runner['state']}{place}")
        tell(f"Its log as it runs: GET /runners/{runner['runner_id']}/logs?follow=true")
        try:
            follow_log(client, runner["runner_id"])
        except BaseException:
            client.delete(f"/runners/{runner['runner_id']}", params={"grace": 2})
            end_of(client, runner["runner_id"])  # its slot must not go away before it
            raise
        record = end_of(client, runner["runner_id"])
        if made_for_us:
            until_empty(made_for_us)
        tell(f"Its record: GET /runners/{runner['runner_id']}")
        print(json.dumps(record, indent=2, ensure_ascii=False))
        if record["state"] != "completed" or record["exit_code"] != 0:
            raise DemoFailed(f"the runner did not complete: {record['reason']}: {record['message']}")
        if made_for_us:
            return  # its workspace was a volume of its pod, and is gone with it
        tell("Its work: git log --oneline and git status in the slot")
        print(git(slot, "log", "--oneline", "--decorate"))
        print(git(slot, "status", "--short") or "nothing is left uncommitted")


def pool_to_show() -> str:
    """Choose the pool for the environment that DEMO names."""
    name = os.environ.get("DEMO") or "local"
    if name not in POOLS:
        raise DemoFailed(f"DEMO={name} is not known; there is {', '.join(POOLS)}")
    return name


def find_engine() -> None:
    """Say in time what would be missed later."""
    if not DOCKER.startswith("unix://"):
        raise DemoFailed(f"the slot is on this machine, so the engine must be too; DOCKER_HOST is {DOCKER}")
    try:
        with engine() as docker:
            there = docker.get(f"/images/{image('docker')}/json").is_success
    except httpx.TransportError as error:
        raise DemoFailed(f"no Docker Engine answers at {DOCKER}: {error}; is it started, and may you use it?") from None
    if not there:
        tell(
            f"There is no image {image('docker')} yet, so the service pulls it; "
            "DEMO_IMAGE names another (with Python and git)"
        )


def engine() -> httpx.Client:
    """Talk to the engine ourselves."""
    transport = httpx.HTTPTransport(uds=DOCKER.removeprefix("unix://"))
    return httpx.Client(transport=transport, base_url="http://docker", timeout=10, trust_env=False)


@contextmanager
def namespace() -> Iterator[str]:
    """Make a namespace in the cluster with the example agent in it, and remove it with all that is there."""
    name = f"runner-launcher-demo-{uuid.uuid4().hex[:8]}"
    agent = (EXAMPLES / "agent.py").read_text(encoding="utf-8")

    async def make() -> None:
        async with cluster() as api:
            core = CoreV1Api(api)
            await core.create_namespace(V1Namespace(metadata=V1ObjectMeta(name=name)), _request_timeout=20)
            config_map = V1ConfigMap(metadata=V1ObjectMeta(name="example-agent"), data={"agent.py": agent})
            await core.create_namespaced_config_map(name, config_map)

    async def remove() -> None:
        async with cluster() as api:
            await CoreV1Api(api).delete_namespace(name)

    try:
        asyncio.run(make())
    except (OSError, ValueError, aiohttp.ClientError, ApiException, ConfigException) as error:
        raise DemoFailed(f"the cluster that {KUBECONFIG} names cannot be used: {error}") from None
    try:
        yield name
    finally:
        asyncio.run(remove())


@asynccontextmanager
async def cluster() -> AsyncIterator[ApiClient]:
    """Talk to the cluster ourselves."""
    configuration = Configuration()
    await config.load_kube_config(KUBECONFIG, client_configuration=configuration, persist_config=False)
    async with ApiClient(configuration) as api:
        yield api


def until_empty(name: str) -> None:
    """Wait until the runner's Job is gone: it is removed when its log is safe."""

    async def count() -> int:
        async with cluster() as api:
            return len((await BatchV1Api(api).list_namespaced_job(name)).items)

    deadline = time.monotonic() + 60
    while asyncio.run(count()):
        if time.monotonic() > deadline:
            raise DemoFailed("its Job should be gone by now")
        time.sleep(0.1)


def image(pool: str) -> str:
    """Give the image to use."""
    said = re.search(r"^ *image: (.+)$", (EXAMPLES / POOLS[pool]).read_text(encoding="utf-8"), re.MULTILINE)
    return os.environ.get("DEMO_IMAGE") or (said[1] if said else "")


def write_pools(directory: Path, pool: str, made_for_us: str) -> None:
    """Copy the pool file with what is particular to this machine or cluster."""
    text = (EXAMPLES / POOLS[pool]).read_text(encoding="utf-8")
    if pool == "docker":
        text = re.sub(r"(?m)^( *image:).*$", lambda line: f"{line[1]} {image(pool)}", text)
        text = text.replace("unix:///var/run/docker.sock", DOCKER).replace("/opt/example-agent", str(EXAMPLES))
    if pool == "kubernetes":
        text = re.sub(r"(?m)^( *image: )python.*$", lambda line: f"{line[1]}{image(pool)}", text)
        text = text.replace("necrocode-agents", f"{made_for_us}\n      kubeconfig: {KUBECONFIG}")
        text = text.replace("job-example-agent.yaml", str(EXAMPLES / "job-example-agent.yaml"))
    (directory / "pools.yaml").write_text(text, encoding="utf-8")


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
        "RUNNER_LAUNCHER_POOLS_FILE": str(directory / "pools.yaml"),
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
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        record = answer(client.get(f"/runners/{runner_id}"))
        if record["phase"] == "finished" and not container_left(record):
            return record
        time.sleep(0.05)
    raise DemoFailed(f"{runner_id} and its container should be gone by now, but it is {record['phase']}")


def answer(response: httpx.Response) -> dict[str, Any]:
    """Read a JSON answer; a problem becomes a failure of the demo, in the service's words."""
    if response.is_success:
        body: dict[str, Any] = response.json()
        return body
    problem = response.headers["content-type"] == "application/problem+json"
    text = response.json()["detail"] if problem else response.text
    raise DemoFailed(f"{response.request.method} {response.url.path} answered {response.status_code}: {text}")


def container_left(record: dict[str, Any]) -> bool:
    """Ask the engine whether the container is there: it is removed when its log is safe."""
    if not record["container_id"]:
        return False
    with engine() as docker:
        return docker.get(f"/containers/{record['container_id']}/json").is_success


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
