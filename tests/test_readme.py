"""The commands of README and the getting-started pages do what they say, as they are written, in a copy of the project.

A block marked ``sh`` is run, all of a page's in one shell; one that ends in ``make serve`` is the first terminal. Others
(``shell``) are not: they name what only their reader has. Ports and names that machines share are replaced by ones of the
test's own, and a stream that never ends is left after a second.
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from docker_engine import HOST, IMAGE, Api
from engines import missing
from kubernetes_world import cluster_session
from service_image import BASE, PROJECT, docker

pytestmark = pytest.mark.timeout(400)  # the first to need it builds the image

SERVE = "make serve"
ENDLESS = re.compile(r'^(curl .*/events\?follow=true".*)$', re.MULTILINE)


@dataclass(slots=True)
class Copy:
    """A copy of the project as a clone would have it, with the environment that is installed here, and what is replaced."""

    directory: Path
    replaced: dict[str, str] = field(default_factory=dict)

    def blocks(self, page: str) -> list[str]:
        """Give a page's commands as they are to be run."""
        text = (self.directory / page).read_text()
        found = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        assert found, f"{page} has no commands"
        return [
            ENDLESS.sub(r"timeout 1 \1 || test $? = 124", block)
            for block in map(self._own, found)
            if "make demo" not in block
        ]

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
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)

    def run(self, blocks: list[str], **variables: str) -> str:
        """Run the second terminal to its end, and give what it shows."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail"],
            input="\n".join(blocks),
            cwd=self.directory,
            env=self.environment(**variables),
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
    if not (PROJECT / ".venv" / "ready").exists():
        missing("clone", "the commands run what `make .venv/ready` installs")
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
    first, *second = copy.blocks(page)
    assert first.strip() == SERVE
    with copy.serving(first, port):
        shown = copy.run(second, RUNNER_LAUNCHER_URL=f"http://127.0.0.1:{port}")
    assert "completed" in shown
    if page == "README.md":
        assert '"reason": "cancelled"' in shown


def test_the_docker_page(copy: Copy, port: int, docker_engine: Api) -> None:
    if not shutil.which("docker") or not docker_engine.has_image(BASE) or HOST != "unix:///var/run/docker.sock":
        missing("docker", f"the page needs the docker program, an image {BASE}, and the engine at its usual socket")
    assert docker_engine.has_image(IMAGE)
    name = f"runner-launcher-first-{secrets.token_hex(4)}"
    copy.replace("runner-launcher-first", name)
    copy.replace("127.0.0.1:8090", f"127.0.0.1:{port}")
    try:
        shown = copy.run(copy.blocks("docs/getting-started/docker.md"))
    finally:
        subprocess.run(["docker", "rm", "--force", "--volumes", name], capture_output=True, check=False)
    assert "hello from runner-" in shown
    assert "completed" in shown
    assert name not in docker("ps", "--all", "--format", "{{.Names}}")


def test_the_kubernetes_page(copy: Copy, port: int) -> None:
    if not shutil.which("kubectl"):
        missing("kubernetes", "kubectl is not installed")
    with cluster_session():
        pass
    namespace = f"runner-launcher-first-{secrets.token_hex(4)}"
    copy.replace("necrocode-agents", namespace, "deploy/kubernetes/rbac.yaml", "examples/pools-first-kubernetes.yaml")
    copy.replace("127.0.0.1:8091", f"127.0.0.1:{port}")
    prepare, serve, second = copy.blocks("docs/getting-started/kubernetes.md")
    assert serve.strip().endswith(SERVE)
    try:
        copy.run([prepare])
        with copy.serving(serve, port):
            shown = copy.run([second])
    finally:
        subprocess.run(["kubectl", "delete", "namespace", namespace, "--wait=false"], capture_output=True, check=False)
    assert "hello from runner-" in shown
    assert "completed" in shown
