"""The image does the main job as it is shipped: as nobody in particular, on a root file system that nobody can write."""

import json
import os
from pathlib import Path

import httpx
import pytest
from conftest import Json, finished, launch_body, launched, local_pool, until, write_pools
from docker_engine import HOST, IMAGE
from engines import missing
from service_image import USER, contained, docker

pytestmark = pytest.mark.timeout(400)  # the first to need it builds the image

SCRIPT = """
echo "$RUNNER_ID was here, as $(id -u)" >said
cat "$TASK_CONTEXT_FILE" >context
"""

LEFT_BEHIND = """
command -v gcc cc g++ make
find / -xdev \\( -path '*/.cache/pip*' -o -path '/var/lib/apt/lists/*' \\) -type f
find /venv -name pip
"""


@pytest.fixture
def slot(tmp_path: Path) -> Path:
    """A slot that belongs to whoever the image runs as."""
    if os.geteuid():
        missing("root", "a slot is given to the image's user by root alone")
    slot = tmp_path / "slots" / "slot-1"
    slot.mkdir(parents=True)
    os.chown(slot, USER, USER)
    return slot


async def done(client: httpx.AsyncClient, slot: Path, pool: str) -> Json:
    """Do the main job, and give the record of its end."""
    return await finished(client, await launched(client, launch_body(slot, SCRIPT, pool=pool)), 60)


def test_the_image_holds_what_it_needs_and_no_more(image: str) -> None:
    about = json.loads(docker("inspect", image))[0]["Config"]
    assert about["User"] == f"{USER}:{USER}"
    assert about["Entrypoint"][0] == "tini"
    assert about["Labels"]["org.opencontainers.image.version"] == "0.0.0-test"
    found = docker("run", "--rm", "--network", "none", "--entrypoint", "sh", image, "-c", LEFT_BEHIND)
    assert found == ""
    assert docker("run", "--rm", "--network", "none", image, "--version")


async def test_it_runs_local_processes_and_says_that_it_is_well(image: str, slot: Path, tmp_path: Path) -> None:
    write_pools(tmp_path / "pools.yaml", {"local": local_pool()})
    async with contained(image, tmp_path / "pools.yaml", slot.parent, "--health-interval", "1s") as (client, name):
        record = await done(client, slot, "local")
        assert (record["state"], record["exit_code"]) == ("completed", 0), record
        assert (slot / "said").read_text() == f"{record['runner_id']} was here, as {USER}\n"
        assert json.loads((slot / "context").read_text())["task_id"] == "7"
        await until(lambda: docker("inspect", "--format", "{{.State.Health.Status}}", name) == "healthy", 60)
        docker("stop", "--time", "30", name)
        assert docker("inspect", "--format", "{{.State.ExitCode}}", name) == "0"
        docker("start", name)
        await until(lambda: docker("inspect", "--format", "{{.State.Health.Status}}", name) == "healthy", 60)
        client.base_url = httpx.URL(f"http://{docker('port', name, '8080/tcp').splitlines()[0]}")
        assert (await client.get(f"/runners/{record['runner_id']}")).json() == record, (
            "what is known outlives the container's stop"
        )


async def test_it_runs_containers_by_the_engines_socket(image: str, slot: Path, tmp_path: Path) -> None:
    socket = HOST.removeprefix("unix://")
    pool = {"type": "docker", "config": {"image": IMAGE, "command": ["sh", "agent.sh"], "environment": {"HOME": "/tmp"}}}  # noqa: S108
    write_pools(tmp_path / "pools.yaml", {"docker": pool})
    options = ("--volume", f"{socket}:/var/run/docker.sock", "--group-add", str(Path(socket).stat().st_gid))
    async with contained(image, tmp_path / "pools.yaml", slot.parent, *options) as (client, _):
        record = await done(client, slot, "docker")
        assert (record["state"], record["exit_code"]) == ("completed", 0), record
        assert record["container_id"]
        assert (slot / "said").read_text() == f"{record['runner_id']} was here, as {USER}\n"
