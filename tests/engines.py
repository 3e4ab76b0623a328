"""What tests need and not every machine has: missing, it skips them, or fails them where REQUIRE_ENGINES names it."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

KNOWN = {
    "browser": "a Chromium",
    "cgroup1": "control groups of version 1, with limits",
    "cgroup2": "control groups of version 2, with limits",
    "clone": "a clone with git, in which `make .venv/ready` was called",
    "docker": "a Docker Engine, its program and compose, and the images that tests use",
    "helm": "helm's code, which `make .venv/shipping` installs",
    "kubernetes": "the cluster that KUBECONFIG names, and kubectl",
    "kubernetes-control": "the program that KUBERNETES_CONTROL names, which stops and starts parts of the cluster",
    "namespaces": "leave to unshare mounts",
    "postgres": "the PostgreSQL server that TEST_POSTGRES names",
    "registry": "the image registries that TEST_REGISTRY and TEST_REGISTRY_AUTH name",
    "root": "to be root",
    "shells": "dash, bash and busybox",
    "systemd": "systemd-analyze",
}
REQUIRED = frozenset(os.environ.get("REQUIRE_ENGINES", "").split(",")) - {""}


def missing(engine: str, reason: str) -> NoReturn:
    """Leave a test that this machine cannot run."""
    assert engine in KNOWN
    if engine in REQUIRED:
        pytest.fail(f"{reason}; REQUIRE_ENGINES asks for {KNOWN[engine]}")
    pytest.skip(reason)


def needs_root(reason: str) -> pytest.MarkDecorator:
    """Mark a test of which others than root cannot run; where root is required it fails by itself."""
    return pytest.mark.skipif(os.geteuid() != 0 and "root" not in REQUIRED, reason=reason)


@contextmanager
def group_of_version_1(controller: str, why: str) -> Iterator[Path]:
    """Make a control group of version 1, and remove it once it is empty; skips, saying ``why`` not, where that cannot be."""
    group = Path("/sys/fs/cgroup") / controller / f"test-{os.urandom(6).hex()}"
    try:
        group.mkdir()
    except OSError:
        missing("cgroup1", why)
    yield group
    while (group / "cgroup.procs").read_text():
        time.sleep(0.01)
    group.rmdir()


def pytest_configure() -> None:
    """Refuse names that would require nothing."""
    if unknown := REQUIRED - KNOWN.keys():
        raise pytest.UsageError(f"REQUIRE_ENGINES: {', '.join(sorted(unknown))} is none of {', '.join(KNOWN)}")
