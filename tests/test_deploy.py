"""What deploy/ holds for machines without a cluster is what its readers' programs take, and what we take."""

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import Serve, finished, launched
from engines import missing

from app.pools import load_pools

PROJECT = Path(__file__).parent.parent
DEPLOY = PROJECT / "deploy"
NEWER = "Unknown key 'DelegateSubgroup' in section [Service], ignoring."


def test_systemd_has_nothing_to_say_about_the_unit(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        missing("systemd", "systemd-analyze is not installed")
    unit = (DEPLOY / "systemd" / "runner-launcher.service").read_text()
    assert "\nDelegate=yes\n" in unit
    assert "\nKillMode=process\n" in unit
    copy = tmp_path / "runner-launcher.service"
    copy.write_text(unit.replace("/opt/runner-launcher/bin/runner-launcher", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True, check=False)
    said = [line for line in (done.stdout + done.stderr).splitlines() if str(copy) in line and not line.endswith(NEWER)]
    assert (done.returncode, said) == (0, [])


def test_the_pools_of_compose_load_without_a_warning() -> None:
    pools = load_pools(DEPLOY / "compose" / "pools.yaml")
    assert list(pools.by_name) == ["docker"]
    assert not pools.warnings


async def test_the_first_runner_of_the_systemd_recipe_works(serve: Serve, tmp_path: Path) -> None:
    recipe = (PROJECT / "docs" / "operations.md").read_text().partition("```shell\n")[2].partition("```")[0]
    script = recipe[recipe.index("install -D") : recipe.index("\nEND\n") + 5]
    for theirs, ours in {
        " --owner runner-launcher --group runner-launcher": "",
        "/opt/runner-launcher/bin/python": sys.executable,
        "/opt/runner-launcher/share": f"{tmp_path}/share",
        "/etc/": f"{tmp_path}/etc/",
        "/srv/": f"{tmp_path}/srv/",
    }.items():
        script = script.replace(theirs, ours)
    await asyncio.to_thread(subprocess.run, ["bash", "-euc", script], cwd=PROJECT, check=True, capture_output=True)
    directory = tmp_path / "etc" / "runner-launcher"
    roots, command = (directory / "environment").read_text().splitlines()
    asked = serve(
        POOLS_FILE=str(directory / "pools.yaml"),
        SLOT_ROOTS=roots.removeprefix("RUNNER_LAUNCHER_SLOT_ROOTS="),
        RUNNER_COMMAND=command.removeprefix("RUNNER_LAUNCHER_RUNNER_COMMAND="),
    )
    slot = tmp_path / "srv" / "slots" / "first"
    slot.mkdir()
    async with asked as service, service.client() as client:
        body = {
            "task": {"id": "7", "title": "Say hello"},
            "slot": {"slot_id": "first", "slot_path": str(slot), "repo_url": ""},
        }
        record = await finished(client, await launched(client, {**body, "pool": "local"}))
    assert record["state"] == "completed"
    assert (slot / "task-7.md").exists()
