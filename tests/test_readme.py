"""The commands of README and the getting-started pages do what they say, as they are written, in a copy of the project.

A block marked ``sh`` is run, all of a section's in one shell; one that ends in ``make serve`` is the first terminal. Others
(``shell``) are not: they would change the machine, or take long. Ports and names that machines share are replaced by ones of
the test's own, and a stream that never ends is left after a second.
"""

import asyncio
import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import yaml
from chart import helm
from docker_engine import HOST, IMAGE, Api
from engines import missing
from kubernetes_world import World, api_reached, cluster_session
from service_image import BASE, PROJECT, docker

pytestmark = pytest.mark.timeout(400)  # the first to need it builds the image

SERVE = "make serve"
ENDLESS = re.compile(r'^(curl .*/events\?follow=true".*)$', re.MULTILINE)


@dataclass(slots=True)
class Copy:
    """A copy of the project as a clone would have it, with the environment that is installed here, and what is replaced."""

    directory: Path
    replaced: dict[str, str] = field(default_factory=dict)

    def blocks(self, page: str, heading: str = "") -> list[str]:
        """Give the commands of a page, or of a section of it, as they are to be run."""
        text = (self.directory / page).read_text()
        if heading:
            text = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
        found = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        assert found, f"{page} has no commands under {heading!r}"
        return [ENDLESS.sub(r"timeout 1 \1 || test $? = 124", block) for block in map(self._own, found)]

    def replace(self, words: str, ours: str, *files: str) -> None:
        """Replace what is shared by what is ours, in the commands and in these files."""
        self.replaced[words] = ours
        for file in files:
            (self.directory / file).write_text((self.directory / file).read_text().replace(words, ours))

    def _own(self, block: str) -> str:
        for words, ours in self.replaced.items():
            block = block.replace(words, ours)
        return block

    def environment(self, **variables: str) -> dict[str, str]:
        """Say what a terminal has."""
        kept = {
            name: os.environ[name] for name in ("PATH", "HOME", "LANG", "KUBECONFIG", "DOCKER_HOST") if name in os.environ
        }
        return {**kept, "BUILD_ARGS": "--network host", "BASE_IMAGE": BASE, **variables}

    @contextlib.contextmanager
    def serving(self, command: str, port: int) -> Iterator[None]:
        """Run the first terminal."""
        log = self.directory / "serve.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["bash", "-ec", command],
                cwd=self.directory,
                env=self.environment(RUNNER_LAUNCHER_LISTEN=f"127.0.0.1:{port}"),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            _wait_until_ready(port, process, log)
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)

    def run(self, blocks: list[str], **variables: str) -> str:
        """Run the second terminal to its end, and give what it shows."""
        script = self.directory.with_name("commands.sh")
        script.write_text("\n".join(blocks))
        done = subprocess.run(
            ["bash", "-euo", "pipefail", script],
            cwd=self.directory,
            env=self.environment(**variables),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def _wait_until_ready(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).is_success:
                return
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    """The files that are in the repository, or about to be."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if not shutil.which("git") or not (PROJECT / ".git").exists():
        missing("clone", "what belongs to the project is told by git, which is not here or knows nothing of it")
    for name in filter(
        None, subprocess.run(listed, cwd=PROJECT, capture_output=True, text=True, check=True).stdout.split("\0")
    ):
        if (PROJECT / name).is_file():
            (tmp_path / "project" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, tmp_path / "project" / name)
    ready = PROJECT / ".venv" / "ready"
    if not ready.exists():
        missing("clone", "the commands run what `make .venv/ready` installs")
    for name in ("requirements-dev.txt", "pyproject.toml", "client/pyproject.toml"):  # edited since, maybe
        os.utime(tmp_path / "project" / name, ns=(ready.stat().st_mtime_ns,) * 2)
    (tmp_path / "project" / ".venv").symlink_to(PROJECT / ".venv")
    made = Copy(tmp_path / "project")
    made.replace("seconds_per_step: 1", "seconds_per_step: 0.7", "examples/pools.yaml")
    return made


@pytest.fixture
def port() -> int:
    """A port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
        return number


@pytest.mark.parametrize("page", ["README.md", "docs/getting-started/local.md"])
def test_the_local_pages(copy: Copy, port: int, page: str) -> None:
    copy.replace("127.0.0.1:8080", f"127.0.0.1:{port}")
    before, serve, after = at_serve(copy.blocks(page))
    shown = copy.run(before)
    with copy.serving(serve, port):
        shown += copy.run(after, RUNNER_LAUNCHER_URL=f"http://127.0.0.1:{port}")
    assert "completed" in shown
    if page == "README.md":
        assert "Add a greeting" in shown.partition("Its work")[2].partition("Done.")[0]  # the demo's
        assert '"reason": "cancelled"' in shown


def at_serve(blocks: list[str]) -> tuple[list[str], str, list[str]]:
    """Give what comes before the first terminal, that, and what comes after."""
    [place] = [place for place, block in enumerate(blocks) if block.strip().endswith(SERVE)]
    return blocks[:place], blocks[place], blocks[place + 1 :]


def test_the_docker_page(copy: Copy, port: int, docker_engine: Api, compose: tuple[str, ...], proxy_image: str) -> None:
    if not shutil.which("docker") or not docker_engine.has_image(BASE) or HOST != "unix:///var/run/docker.sock":
        missing("docker", f"the page needs the docker program, an image {BASE}, and the engine at its usual socket")
    assert docker_engine.has_image(IMAGE)
    name = f"runner-launcher-first-{secrets.token_hex(4)}"
    copy.replace("runner-launcher-first", name)
    copy.replace("127.0.0.1:8090", f"127.0.0.1:{port}")
    copy.replace("docker compose", " ".join(compose))
    copy.replace("runner-launcher-agents", name, "deploy/compose/pools.yaml")
    own = {"COMPOSE_PROJECT_NAME": name, "AGENTS_NETWORK": name, "PORT": "0", "SOCKET_PROXY_IMAGE": proxy_image}
    try:
        shown = copy.run(copy.blocks("docs/getting-started/docker.md"), **own)
    finally:
        subprocess.run(["docker", "rm", "--force", "--volumes", name], capture_output=True, check=False)
        down = [*compose, "--file", "deploy/compose.yaml", "down", "--volumes"]
        environment = copy.environment(SLOTS="/", **own)
        subprocess.run(down, cwd=copy.directory, env=environment, capture_output=True, check=False)
    assert shown.count("hello from runner-") == 2
    assert shown.count("completed") >= 3  # with the demo's
    assert name not in docker("ps", "--all", "--format", "{{.Names}}")


@pytest.fixture
def owner(copy: Copy) -> Iterator[World]:
    """Whoever owns the cluster. What the pages call its namespaces becomes names of our own, which are gone at the end."""
    if not shutil.which("kubectl"):
        missing("kubernetes", "kubectl is not installed")
    service, agents = (f"runner-launcher-first-{secrets.token_hex(4)}" for _ in range(2))
    files = ("deploy/kubernetes/rbac.yaml", "examples/pools-first-kubernetes.yaml", "examples/chart-values.yaml")
    copy.replace("necrocode-agents", agents, *files)
    copy.replace("--namespace runner-launcher", f"--namespace {service}")
    copy.replace("delete namespace runner-launcher", f"delete --wait=false namespace {service}")
    with cluster_session() as (world, _):
        yield world
    gone = ["kubectl", "delete", "--wait=false", "--ignore-not-found", "namespace", service, agents]
    subprocess.run(gone, capture_output=True, check=True, timeout=60)


@pytest.mark.usefixtures("owner")
def test_the_kubernetes_page_with_the_service_here(copy: Copy, port: int) -> None:
    copy.replace("127.0.0.1:8091", f"127.0.0.1:{port}")
    before, serve, after = at_serve(copy.blocks("docs/getting-started/kubernetes.md", "The service here, runners there"))
    copy.run(before)
    with copy.serving(serve, port):
        shown = copy.run(after)
    assert "hello from runner-" in shown
    assert "completed" in shown


@pytest.mark.usefixtures("image")
async def test_the_kubernetes_page_with_the_service_in_the_cluster(copy: Copy, owner: World) -> None:
    registry = os.environ.get("TEST_REGISTRY") or missing("registry", "TEST_REGISTRY names no registry to push the image to")
    copy.replace("registry.example.org", registry)
    if not shutil.which("helm"):
        assert helm
        program = copy.directory / "bin" / "helm"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {PROJECT / "tests" / "helm_program.py"} "$@"\n')
        program.chmod(0o755)
    path = f"{copy.directory / 'bin'}:{os.environ['PATH']}"
    async with api_reached(owner) as reached:
        values = copy.directory / "examples" / "chart-values.yaml"
        given = yaml.safe_load(values.read_text())
        given |= {**reached, "env": {**given["env"], **reached["env"]}}
        given["persistence"] = {"enabled": False}  # not every cluster has volumes to give
        values.write_text(yaml.safe_dump(given))
        blocks = copy.blocks("docs/getting-started/kubernetes.md", "The service in the cluster")
        shown = await asyncio.to_thread(copy.run, blocks, PATH=path)
    assert "hello from runner-" in shown
    assert "completed" in shown
