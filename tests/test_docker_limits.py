"""What a container is held to, measured from inside it and told by the record, on a real engine through the front door."""

import asyncio
import json
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Json, Service, finished, launch_body, launched, until
from docker_engine import HOST, IMAGE, Api
from engines import needs_root

from app.launchers.container import INSTALLATION

SECONDS = 60.0
OWNER = 1000
IMAGES_USER = 12345
NET_ADMIN = 1 << 12
root = needs_root("only root can give a slot to another user")
BUSY = """
read -r began _ </proc/uptime
until=$((${began%.*} + 5))
while read -r now _ </proc/uptime && [ "${now%.*}" -lt "$until" ]; do :; done
echo "$began $now"
times
"""


@dataclass
class Docker:
    """Runs scripts in containers of one installation, one after another."""

    service: Service
    slot: Path
    api: Api
    installation: str

    async def run(self, script: str, *, quotas: Json | None = None, **config: object) -> tuple[Json, str]:
        """Run a script as the slot's ``agent.sh``; gives its record and output, once the container is removed."""
        pool = {"type": "docker", **(quotas or {})}
        pool["config"] = {
            "image": IMAGE,
            "docker_host": HOST,
            "command": ["sh", "agent.sh"],
            "pull_policy": "never",
            **config,
        }
        async with self.service({"docker": pool}, installation=self.installation) as client:
            runner = await launched(client, launch_body(self.slot, script, pool="docker"))
            record = await finished(client, runner, SECONDS)
            output = (await client.get(f"/runners/{runner['runner_id']}/logs")).text
            await until(lambda: asyncio.to_thread(self._nothing_is_left))
        return record, output

    def _nothing_is_left(self) -> bool:
        return not self.api.containers(f"{INSTALLATION}={self.installation}")


@pytest.fixture
def docker(service: Service, slot: Path, docker_engine: Api) -> Docker:
    return Docker(service, slot, docker_engine, f"test-{secrets.token_hex(6)}")


@pytest.fixture
def image_with_a_user(docker_engine: Api) -> Iterator[str]:
    """An image that says USER, made of the one that there is."""
    name = f"runner-launcher-test-{secrets.token_hex(4)}"
    made = docker_engine.ask("/containers/create", method="POST", json={"Image": IMAGE, "Cmd": ["true"]})
    changes = {"container": made["Id"], "repo": name, "changes": f"USER {IMAGES_USER}"}
    docker_engine.ask("/commit", method="POST", params=changes)
    docker_engine.remove(made["Id"])
    yield f"{name}:latest"
    docker_engine.ask(f"/images/{name}:latest", method="DELETE")


def of_status(output: str, name: str) -> int:
    """Read a number of /proc/self/status."""
    found = re.search(rf"^{name}:\s+(\w+)$", output, re.MULTILINE)
    assert found, output
    return int(found[1], 16)


async def test_a_runner_over_its_memory_is_killed_and_that_is_told(docker: Docker) -> None:
    record, _ = await docker.run("exec tail /dev/zero", quotas={"memory_quota": 32})
    assert (record["state"], record["reason"], record["oom_killed"]) == ("failed", "oom_killed", True)
    assert record["exit_code"] == 137
    assert record["limits"]["memory_mib"] == 32
    assert record["limits"]["enforced_by"] == {"cpu": "none", "memory_mib": "engine"}


async def test_a_child_over_the_memory_is_told_only_if_the_runner_failed(docker: Docker) -> None:
    record, _ = await docker.run("tail /dev/zero; exit 0", quotas={"memory_quota": 32})
    assert (record["state"], record["reason"], record["oom_killed"]) == ("completed", None, False)
    record, _ = await docker.run("tail /dev/zero || exit 3", quotas={"memory_quota": 32})
    assert (record["exit_code"], record["reason"], record["oom_killed"]) == (3, "oom_killed", True)


async def test_137_without_a_lack_of_memory_is_no_lack_of_memory(docker: Docker) -> None:
    record, _ = await docker.run("exit 137", quotas={"memory_quota": 32})
    assert (record["exit_code"], record["reason"], record["oom_killed"]) == (137, "exit_nonzero", False)


async def test_half_a_core_is_near_half_a_core(docker: Docker) -> None:
    record, output = await docker.run(BUSY, quotas={"cpu_quota": 0.5})
    began, now = map(float, output.splitlines()[0].split())
    used = sum(60 * int(minutes) + float(seconds) for minutes, seconds in re.findall(r"(\d+)m([\d.]+)s", output)[:2])
    assert record["exit_code"] == 0
    assert record["limits"]["enforced_by"] == {"cpu": "engine", "memory_mib": "none"}
    assert 0.25 < used / (now - began) < 0.6, output  # less where the machine is busy with other things


@root
async def test_a_slot_of_somebody_else_is_written_as_that_user(docker: Docker) -> None:
    os.chown(docker.slot, OWNER, OWNER)
    record, output = await docker.run('id -u; id -g; echo hello >made; cat "$TASK_CONTEXT_FILE" >context; pwd')
    assert (record["exit_code"], output.split()) == (0, [str(OWNER), str(OWNER), "/workspace"])
    made = (docker.slot / "made").stat()
    assert (made.st_uid, made.st_gid) == (OWNER, OWNER)
    assert '"task_id":"7"' in (docker.slot / "context").read_text()


@root
async def test_an_image_with_a_user_runs_as_the_slots_owner_or_as_its_own(docker: Docker, image_with_a_user: str) -> None:
    os.chown(docker.slot, OWNER, OWNER)
    script = 'id -u; cat "$TASK_CONTEXT_FILE" >/dev/null && touch made'
    record, output = await docker.run(script, image=image_with_a_user)
    assert (record["exit_code"], output.split()) == (0, [str(OWNER)])
    record, output = await docker.run(script, image=image_with_a_user, user="image")
    assert str(IMAGES_USER) in output.split()  # what it complained of may come first: these are two streams
    assert record["exit_code"] == 1  # it may read its task, and not write the slot
    record, output = await docker.run("id -u; id -g", image=image_with_a_user, user="23456:34567")
    assert (record["exit_code"], output.split()) == (0, ["23456", "34567"])


async def test_a_runner_has_no_capability_and_can_gain_none(docker: Docker) -> None:
    record, output = await docker.run("cat /proc/self/status")
    assert record["exit_code"] == 0
    assert [of_status(output, f"Cap{kind}") for kind in ("Eff", "Prm", "Bnd", "Inh", "Amb")] == [0] * 5
    assert of_status(output, "NoNewPrivs") == 1


async def test_a_runner_reaches_nothing_of_the_machine_or_the_service(docker: Docker, state_dir: Path) -> None:
    other = docker.slot.with_name("slot-2")
    other.mkdir()
    tries = f"""
        ls {HOST.removeprefix("unix://")}
        ls {state_dir}
        ls {other}
        ls {docker.slot}/..
        mount -t tmpfs none /mnt
        mount -o remount,rw /sys
        mount -o remount,rw /proc/sys
        mknod /tmp/disk b 8 0
        mknod /tmp/memory c 1 1
        chown 1:1 /workspace/agent.sh
        chroot / true
        chmod 777 /proc/sysrq-trigger
        kill -0 {os.getpid()}
    """
    tried = "".join(f"({line}) >/dev/null 2>&1 && echo 'reached: {line.strip()}'\n" for line in tries.strip().splitlines())
    record, output = await docker.run(f"{tried}echo done; exit 0")
    assert (record["exit_code"], output) == (0, "done\n")


async def test_what_the_engine_shows_of_a_runner_holds_secrets_in_its_environment_alone(docker: Docker) -> None:
    config = {"image": IMAGE, "docker_host": HOST, "command": ["sh", "agent.sh"], "pull_policy": "never"}
    pool = {"type": "docker", "config": {**config, "environment": {"API_KEY": "canary-of-the-pool"}}}
    body = launch_body(
        docker.slot, "exec sleep 600", pool="docker", description="canary-in-the-task", metadata={"a": "canary"}
    )
    async with docker.service({"docker": pool}, installation=docker.installation) as client:
        runner = await launched(client, body)
        shown = await asyncio.to_thread(docker.api.ask, f"/containers/{runner['container_id']}/json")
        token = next(line for line in shown["Config"].pop("Env") if line.startswith("RUNNER_TOKEN=")).partition("=")[2]
        listed = await asyncio.to_thread(docker.api.containers, f"{INSTALLATION}={docker.installation}")
        await client.delete(f"/runners/{runner['runner_id']}?grace=0")
        await finished(client, runner, SECONDS)
        await until(lambda: asyncio.to_thread(docker._nothing_is_left))
    assert not [word for word in ("canary", token) if word in json.dumps([shown, listed])]


async def test_a_runner_gets_the_capability_that_the_pool_gives(docker: Docker) -> None:
    _, output = await docker.run("cat /proc/self/status", cap_add=["NET_ADMIN"])
    assert of_status(output, "CapBnd") == NET_ADMIN


async def test_no_more_processes_than_the_pool_says(docker: Docker) -> None:
    script = "(for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do sleep 30 & done; wait)\nset -- /proc/[0-9]*; echo $#"
    record, output = await docker.run(script, pids_limit=10)
    assert record["exit_code"] == 0
    assert "can't fork" in output
    (count,) = [int(line) for line in output.splitlines() if line.isdigit()]  # of two streams, so not always the last
    assert count <= 10
    _, output = await docker.run(script.replace("wait", ":"))
    assert "can't fork" not in output
