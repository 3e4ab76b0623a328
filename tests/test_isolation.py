"""Runners as another user; only a service that runs as root can do this, so elsewhere it is refused."""

import contextlib
import os
import pwd
import tempfile
from pathlib import Path

import pytest
from conftest import TELL, Service, finished, launch_body, launched, local_pool, problem, read, told, until, written
from engines import needs_root

root = needs_root("only root can start a process as another user")


def give_to_everybody(slot: Path) -> None:
    slot.chmod(0o777)
    for path in [path for path in slot.parents if path.is_relative_to(tempfile.gettempdir())]:
        if path.stat().st_uid == os.geteuid() and path != Path(tempfile.gettempdir()):
            path.chmod(path.stat().st_mode | 0o011)


@root
async def test_a_pool_with_a_user_runs_as_that_user_and_says_so(service: Service, slot: Path) -> None:
    give_to_everybody(slot)
    script = 'id -u; id -g; echo "$HOME"; cat "$TASK_CONTEXT_FILE" >context; ls -l /proc/self/fd | wc -l'
    async with service({"local": local_pool(user="nobody")}) as client:
        runner = await launched(client, launch_body(slot, script))
        record = await finished(client, runner)
        output = (await client.get(f"/runners/{runner['runner_id']}/logs")).text.splitlines()
        await until(lambda: not list(Path(tempfile.gettempdir()).glob(f"{runner['runner_id']}-*")))
    nobody = pwd.getpwnam("nobody")
    assert (record["exit_code"], record["isolation"]) == (0, "user")
    assert output[:3] == [str(nobody.pw_uid), str(nobody.pw_gid), nobody.pw_dir]
    assert '"task_id":"7"' in read(slot / "context")
    assert (slot / "context").stat().st_uid == nobody.pw_uid


@root
async def test_a_user_may_be_numbers(service: Service, slot: Path) -> None:
    give_to_everybody(slot)
    async with service({"local": local_pool(user="12345:23456")}) as client:
        runner = await launched(client, launch_body(slot, "id -u; id -g; id -G"))
        await finished(client, runner)
        output = (await client.get(f"/runners/{runner['runner_id']}/logs")).text.split()
    assert output == ["12345", "23456", "23456"]


async def test_a_user_that_does_not_exist_is_a_rejected_launch(service: Service, slot: Path) -> None:
    async with service({"local": local_pool(user="no-such-user")}) as client:
        answer = await client.post("/runners", json=launch_body(slot))
        said = problem(answer, 422, "launch-rejected", words="no such user: no-such-user")
        assert said["runner"]["state"] == "failed"


async def test_without_a_user_nothing_is_claimed(service: Service, slot: Path) -> None:
    async with service() as client:
        record = await finished(client, await launched(client, launch_body(slot)))
        assert record["isolation"] == "none"


@root
async def test_a_user_who_may_not_read_the_state_directory_cannot(service: Service, slot: Path, state_dir: Path) -> None:
    give_to_everybody(slot)
    async with service({"local": local_pool(user="nobody")}) as client:
        runner = await launched(client, launch_body(slot, f"cat {state_dir}/token; ls {state_dir}; exit 0"))
        await finished(client, runner)
        output = (await client.get(f"/runners/{runner['runner_id']}/logs")).text
    assert output.count("Permission denied") == 2


@root
async def test_a_runner_reaches_nothing_of_the_service_or_of_another_user(
    service: Service, slot: Path, state_dir: Path
) -> None:
    give_to_everybody(slot)
    other = slot.with_name("slot-2")
    other.mkdir()
    give_to_everybody(other)
    async with service({"victim": local_pool(user="12345"), "local": local_pool(user="nobody")}) as client:
        victim = await launched(client, launch_body(other, "echo $TASK_CONTEXT_FILE >where; exec sleep 600", pool="victim"))
        context = Path((await written(other / "where")).strip())
        run, service_pid = state_dir / "runners" / victim["runner_id"], os.getpid()
        tries = [
            f"ls {state_dir}",
            f"ls {run}",
            f"echo >{run}/alive",
            f"cat {run}/log",
            f"cat {state_dir}/runners.db",
            f"ls {context.parent}",
            f"cat {context}",
            f"cat {context.with_name('environment.sh')}",
            f"mv {context.parent} {context.parent}-away",
            *(f"cat /proc/{pid}/environ" for pid in (victim["pid"], service_pid)),
            *(f"ls /proc/{pid}/fd/" for pid in (victim["pid"], service_pid)),
            *(f"ls /proc/{pid}/cwd/" for pid in (victim["pid"], service_pid)),
            *(f"kill -0 {pid}" for pid in (victim["pid"], service_pid)),
            f"echo 0 >/sys/fs/cgroup/memory/runner-launcher/{victim['runner_id']}/tasks",
            "[ -w /var/run/docker.sock ]",
        ]
        tried = "".join(f"({line}) >/dev/null 2>&1 && echo 'reached: {line}'\n" for line in tries)
        runner = await launched(client, launch_body(slot, f"{tried}echo done; exit 0"))
        await finished(client, runner)
        assert (await client.get(f"/runners/{runner['runner_id']}/logs")).text == "done\n"


@pytest.mark.parametrize("user", [None, pytest.param("nobody", marks=root)])
async def test_no_list_of_processes_shows_a_secret(service: Service, slot: Path, user: str | None) -> None:
    give_to_everybody(slot)
    async with service({"local": local_pool(user=user, environment={"API_KEY": "canary-of-the-pool"})}) as client:
        await launched(client, launch_body(slot, TELL + "exec sleep 613", description="canary-in-the-task"))
        secrets = ["canary-of-the-pool", "canary-in-the-task", (await told(slot))["RUNNER_TOKEN"]]

        def listed() -> list[str]:
            shown = []
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):  # it has just ended
                    shown.append(path.read_text(errors="replace"))
            return shown if any("sleep\x00613" in each for each in shown) else []

        lists = await until(listed)
    assert not [shown for shown in lists if any(secret in shown for secret in secrets)]
