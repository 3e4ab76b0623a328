"""What goes wrong with Kubernetes, on a real cluster, and what is told of it. Found and skipped as the contract's is."""

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from aiohttp import web
from conftest import until, write_pools
from engines import missing
from kubernetes_asyncio.client import ApiException
from kubernetes_house import SECONDS, House
from kubernetes_world import IMAGE, Gate, Json, World, write_kubeconfig
from launcher_contract import COUNTS_SLOWLY, HANDLES_TERM, LINES, LOOP, RUNS_ON, exits, new_id

from app.errors import LauncherUnavailable, LaunchRejected
from app.launcher import Exited, Gone, Handle, Observation, Running
from app.launchers import open_launcher
from app.launchers.cluster import PAUSE_SECONDS
from app.launchers.kubernetes import KubernetesLauncher
from app.launchers.pod import FIRST_POD
from app.main import create_app
from app.reason import Reason
from app.settings import Settings

LOST_LOG = b"[the log is lost: its container was taken away before it could be read]"

pytest_plugins = ["kubernetes_house"]
pytestmark = pytest.mark.timeout(300)
NOWHERE = {"node_selector": {"runner-launcher-test/nowhere": "yes"}}


# Launches that cannot be.


async def test_a_foreign_job_of_that_name_is_no_copy_of_ours(house: House) -> None:
    runner_id = new_id()
    async with house.foreign(runner_id):
        with pytest.raises(LaunchRejected, match="not of this service"):
            await house.launcher.launch(runner_id, house.spec("exit 0"))
        handle = Handle(runner_id=runner_id)
        assert await house.see(handle) == Gone()
        await house.launcher.remove(handle)


async def test_a_namespace_without_room_for_jobs_is_told_as_quota(house: House) -> None:
    quota = {"metadata": {"name": "full"}, "spec": {"hard": {"count/jobs.batch": "0"}}}
    await house.world.call("POST", "resourcequotas", quota)
    try:
        await _in_force(house.world)
        with pytest.raises(LauncherUnavailable, match="exceeded quota") as refused:
            await house.launch(exits(0))
        assert (refused.value.acted, refused.value.reason) == (False, Reason.QUOTA_EXCEEDED)
    finally:
        await house.world.call("DELETE", "resourcequotas/full")
    assert (await house.end(await _launched(house, new_id()))).code == 0


async def test_a_namespace_without_room_for_secrets_leaves_nothing(house: House) -> None:
    quota = {"metadata": {"name": "full"}, "spec": {"hard": {"count/secrets": "0"}}}
    await house.world.call("POST", "resourcequotas", quota)
    try:
        await _in_force(house.world)
        runner_id = new_id()
        with pytest.raises(LauncherUnavailable, match="exceeded quota") as refused:
            await house.launcher.launch(runner_id, house.spec("exit 0"))
        assert (refused.value.acted, refused.value.reason) == (False, Reason.QUOTA_EXCEEDED)
        await house.until(Handle(runner_id=runner_id), lambda seen: isinstance(seen, Gone))
    finally:
        await house.world.call("DELETE", "resourcequotas/full")


async def _in_force(world: World) -> None:
    """Wait until the cluster has counted what a quota counts."""
    for _ in range(100):
        status = (await world.call("GET", "resourcequotas/full")).get("status", {})
        if status.get("used"):
            return
        await asyncio.sleep(0.1)
    raise AssertionError("the quota is not in force")


async def test_a_namespace_that_is_missing_is_a_rejected_launch(house: House) -> None:
    async with aclosing(house.reopen(await _owners(house), namespace="no-such-namespace")) as launcher:
        with pytest.raises(LaunchRejected, match="no-such-namespace") as rejected:
            await launcher.launch(
                new_id(), replace(house.spec("exit 0"), options={"namespace": "no-such-namespace", "image": "x"})
            )
    assert rejected.value.reason is Reason.CONFIG_ERROR


async def _owners(house: House) -> Path:
    """A kubeconfig with the rights of the cluster's owner."""
    known = house.world.configuration
    token = known.api_key.get("BearerToken", "").removeprefix("Bearer ")
    user = {"token": token} if token else {"client-certificate": known.cert_file, "client-key": known.key_file}
    return write_kubeconfig(house.kubeconfig.with_name("owner"), house.world, house.door, user)


# Pods that never run.


@pytest.mark.parametrize(
    ("options", "reason", "words"),
    [
        (NOWHERE, Reason.UNSCHEDULABLE, "node"),
        ({"image": "no-such-image:none", "image_pull_policy": "Never"}, Reason.IMAGE_NOT_FOUND, "ErrImageNeverPull"),
        ({"image": "no such/image"}, Reason.CONFIG_ERROR, "InvalidImageName"),
        ({"resources": {"limits": {"runner-launcher.test/none": 1}}}, Reason.UNSCHEDULABLE, "Insufficient"),
    ],
)
async def test_what_can_never_run_ends_with_the_clusters_words(
    house: House, options: Json, reason: Reason, words: str
) -> None:
    handle = await house.launch(exits(0), **options, launch_timeout_seconds=4)
    end = await house.end(handle)
    assert (end.code, end.reason, end.stopped) == (None, reason, False)
    assert words in (end.message or "")
    assert not await house.world.pods(handle.runner_id)
    async with aclosing(house.reopen()) as other:
        assert (await other.observe([handle]))[handle.runner_id] == Exited(end)


async def test_a_pod_beyond_the_quota_is_told_and_ends(house: House) -> None:
    quota = {"metadata": {"name": "full"}, "spec": {"hard": {"pods": "0"}}}
    await house.world.call("POST", "resourcequotas", quota)
    try:
        await _in_force(house.world)
        handle = await house.launch(exits(0), launch_timeout_seconds=4)
        assert "exceeded quota" in await house.problem(handle)
        assert (await house.end(handle)).reason is Reason.QUOTA_EXCEEDED
        assert await house.log(handle) == []  # nothing of it is lost
    finally:
        await house.world.call("DELETE", "resourcequotas/full")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "reason", "words"),
    [
        ({"image": "localhost:1/no-such-image:none"}, Reason.IMAGE_PULL_FAILED, "Pull"),
        ({"service_account": "nobody"}, Reason.CONFIG_ERROR, 'serviceaccount "nobody" not found'),
        (
            {"env_from": [{"secretRef": {"name": "no-such-secret"}}]},
            Reason.CONFIG_ERROR,
            'secret "no-such-secret" not found',
        ),
    ],
)
async def test_what_stays_missing_ends_after_a_grace(house: House, options: Json, reason: Reason, words: str) -> None:
    handle = await house.launch(exits(0), **options)
    assert await house.problem(handle)
    end = await house.end(handle, seconds=180)
    assert end.reason is reason
    assert words in (end.message or "")
    assert await house.log(handle) == []


@pytest.mark.slow
async def test_a_claim_that_is_missing_is_told(house: House) -> None:
    workspace = {"kind": "pvc", "claim": "no-such-claim", "root": "/slots"}
    spec = replace(house.spec("exit 0", workspace=workspace, launch_timeout_seconds=10), working_dir="/slots/s1")
    handle = await house.launcher.launch(new_id(), spec)
    assert "no-such-claim" in ((await house.end(handle)).message or "")


async def test_a_failed_init_container_is_told(house: House) -> None:
    context = b'{"repo_url": "https://git.example.org/a.git", "branch_name": null}'
    spec = replace(house.spec("exit 0", workspace={"kind": "git", "image": IMAGE}), context=context)
    end = await house.end(await house.launcher.launch(new_id(), spec))
    assert (end.code, end.reason) == (None, Reason.INIT_FAILED)
    assert "init container git exited with code 127" in (end.message or "")


async def test_a_program_that_is_not_there_is_told(house: House) -> None:
    spec = replace(house.spec(""), command=("no-such-program",))
    end = await house.end(await house.launcher.launch(new_id(), spec))
    assert end.reason is Reason.CONFIG_ERROR
    assert end.code in {127, 128}
    assert "no-such-program" in (end.message or "")


async def test_a_runner_that_never_started_can_be_stopped(house: House) -> None:
    handle = await house.launch(exits(0), **NOWHERE)
    await house.problem(handle)
    await house.launcher.stop(handle, 10)
    end = await house.end(handle)
    assert (end.code, end.reason, end.stopped) == (None, None, True)
    assert not await house.world.pods(handle.runner_id)
    assert await house.log(handle) == []


@pytest.mark.slow
async def test_a_stop_at_any_moment_of_a_start_loses_neither_code_nor_log(house: House) -> None:
    async def stopped_after(seconds: float) -> None:
        handle = await house.launch(HANDLES_TERM)
        await asyncio.sleep(seconds)
        await house.launcher.stop(handle, 10)
        end, log = await house.end(handle), await house.log(handle)
        assert end.stopped is True
        assert end.code in {None, 9, 128, 137, 143}
        if end.code == 9:
            assert log in ([b"ready", b"bye"], [LOST_LOG]), (end, log)
        if "before it started" in (end.message or ""):
            assert not set(log) & {b"ready", b"bye"}, f"stopped after {seconds} s it is said to have begun nothing: {end}"

    await asyncio.gather(*(stopped_after(step / 4) for step in range(16)))


async def test_a_program_that_ends_in_the_second_of_its_stop_keeps_its_own_end(house: House) -> None:
    async def stopped_at_its_end() -> None:
        script = "echo ready; until [ -e go ]; do sleep 0.05; done; echo last; exit 7"
        handle = await house.ready(replace(RUNS_ON, sh=script))
        await house.world.run((await house.pod(handle))["metadata"]["name"], "touch go")
        await house.said(handle, b"last")
        await asyncio.sleep(0.2)  # for its very last step
        await house.launcher.stop(handle, 10)
        end = await house.end(handle)
        assert (end.code, end.stopped) == (7, False)

    await asyncio.gather(*(stopped_at_its_end() for _ in range(4)))


# What a runner finds.


async def test_dollars_reach_a_command_as_they_are(house: House) -> None:
    words = ("$HOME", "$$", "$(RUNNER_ID)", "$$(RUNNER_ID)", "a\nb", "$$$$x")
    spec = replace(house.spec(""), command=("/bin/sh", "-c", 'printf "<%s>" "$@"', "sh", *words))
    handle = await house.launcher.launch(new_id(), replace(spec, environment={"RUNNER_ID": "told"}))
    assert (await house.end(handle)).code == 0
    assert b"\n".join(await house.log(handle)).decode() == "".join(f"<{word}>" for word in words)


async def test_an_image_without_a_user_runs_as_nobody_special_and_can_write_its_workspace(house: House) -> None:
    script = "id -u; id -g; touch /workspace/here && pwd; grep NoNewPrivs /proc/self/status; grep CapEff /proc/self/status"
    handle = await house.launch(f"{script}; ls /var/run/secrets/kubernetes.io 2>/dev/null; exit 0")
    assert (await house.end(handle)).code == 0
    lines = [line.split() for line in await house.log(handle)]
    assert lines == [[b"65532"], [b"65532"], [b"/workspace"], [b"NoNewPrivs:", b"1"], [b"CapEff:", b"0000000000000000"]]


async def test_a_runner_reaches_nothing_of_the_cluster_or_its_node(house: House) -> None:
    tries = (
        "ls /var/run/secrets/kubernetes.io",
        "ls /run/secrets/kubernetes.io",
        "ls /var/run/docker.sock",
        "ls /etc/kubernetes",
        "touch /told",
        "touch /runner-launcher/told/x",
        "mount -t tmpfs none /mnt",
        "mknod /tmp/disk b 8 0",
        "chown 1:1 /workspace",
        "su -c true",
        "[ $(id -u) = 0 ]",
        "grep -q 'CapBnd:.*[1-9a-f]' /proc/self/status",
        "grep -q 'NoNewPrivs:.*0' /proc/self/status",
    )
    tried = "".join(f"({line}) >/dev/null 2>&1 && echo 'reached: {line}'\n" for line in tries)
    handle = await house.launch(f"{tried}echo done; exit 0")
    assert (await house.end(handle)).code == 0
    assert await house.log(handle) == [b"done"]


async def test_where_a_runner_is_and_of_what_image_is_told_while_it_runs_and_after_its_end(house: House) -> None:
    handle = await house.ready(HANDLES_TERM)
    pod = await house.pod(handle)
    seen = await house.see(handle)
    assert isinstance(seen, Running)
    assert seen.place.node == pod["spec"]["nodeName"]
    assert (seen.place.image_digest or "").rpartition("sha256:")[2] == (
        pod["status"]["containerStatuses"][0]["imageID"].rpartition("sha256:")[2]
    )
    await house.launcher.stop(handle, 10)
    await house.end(handle)
    async with aclosing(house.reopen()) as other:
        ended = (await other.observe([handle]))[handle.runner_id]
        assert isinstance(ended, Exited)
        assert ended.place == seen.place
        [found] = await other.list()
        assert (found.handle.node, found.handle.image_digest) == (seen.place.node, seen.place.image_digest)


async def test_a_slot_on_the_node_is_the_workspace(house: House) -> None:
    spec = replace(
        house.spec("exec ls /workspace/passwd", workspace={"kind": "host_path", "read_only": True}), working_dir="/etc"
    )
    handle = await house.launcher.launch(new_id(), spec)
    assert (await house.end(handle)).code == 0
    assert await house.log(handle) == [b"/workspace/passwd"]


async def test_a_slot_in_a_claim_is_a_workspace_that_the_runners_user_can_write(house: House) -> None:
    name, world = f"runner-launcher-test-{secrets.token_hex(4)}", house.world

    async def as_root(script: str) -> str | None:
        """Do something in the node's /var/tmp, and give the node."""
        options = {"workspace": {"kind": "host_path"}, "run_as_user": 0}
        spec = replace(house.spec(f"cd /workspace && {script}", **options), working_dir="/var/tmp")  # noqa: S108
        handle = await house.launcher.launch(new_id(), spec)
        ended = await house.until(handle, lambda seen: isinstance(seen, Exited))
        assert ended.exit.code == 0
        node: str | None = ended.place.node
        return node

    node = await as_root(f"mkdir {name}")
    one_node = {"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}
    volume = {
        "metadata": {"name": name},
        "spec": {
            "capacity": {"storage": "1Mi"},
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": name,
            "local": {"path": f"/var/tmp/{name}"},  # noqa: S108 - of the node; a kind of volume that knows fsGroup
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [one_node]}]}},
        },
    }
    wanted = {"accessModes": ["ReadWriteOnce"], "storageClassName": name, "resources": {"requests": {"storage": "1Mi"}}}
    await world.call("POST", "/api/v1/persistentvolumes", volume)
    await world.call("POST", "persistentvolumeclaims", {"metadata": {"name": "slots"}, "spec": wanted})
    try:
        for script, output in (("echo once >file; id -u; pwd", [b"65532", b"/workspace"]), ("cat file", [b"once"])):
            workspace = {"kind": "pvc", "claim": "slots", "root": "/slots"}
            spec = replace(house.spec(script, workspace=workspace), working_dir="/slots/team/s1")
            handle = await house.launcher.launch(new_id(), spec)
            assert (await house.end(handle)).code == 0
            assert await house.log(handle) == output
            await house.launcher.remove(handle)
        await as_root(f"cat {name}/team/s1/file && rm -r {name}")
    finally:
        await world.call("DELETE", "persistentvolumeclaims/slots")
        await world.call("DELETE", f"/api/v1/persistentvolumes/{name}")


# What others do behind our back.


async def test_a_pod_deleted_behind_our_back_is_told_and_never_replaced(house: House) -> None:
    handle = await house.ready()
    name = (await house.pod(handle))["metadata"]["name"]
    await house.world.call("DELETE", f"pods/{name}", {"gracePeriodSeconds": 1})
    end = await house.end(handle)
    assert end.stopped is False
    assert end.code != 0
    assert end.reason is Reason.DELETED
    assert "deleted" in (end.message or "")
    assert await house.log(handle) == [b"ready"]
    async with aclosing(house.reopen()) as other:
        assert (await other.observe([handle]))[handle.runner_id] == Exited(end)
    living = [
        pod for pod in await house.world.pods(handle.runner_id) if pod["status"].get("phase") not in {"Failed", "Succeeded"}
    ]
    assert not [pod for pod in living if "deletionTimestamp" not in pod["metadata"]]


async def test_a_pod_deleted_while_the_service_was_down_is_told_and_a_second_one_ended(house: House) -> None:
    handle = await house.ready()

    async def claimed() -> bool:
        """Whether it is written down which pod is the runner."""
        job = await house.world.call("GET", f"jobs/{handle.job_name}")
        known = FIRST_POD in job["metadata"].get("annotations", {})
        return known or job["spec"].get("podReplacementPolicy") == "Failed"

    await until(claimed, SECONDS)
    first = await house.pod(handle)
    await house.launcher.aclose()
    await house.world.call("DELETE", f"pods/{first['metadata']['name']}", {"gracePeriodSeconds": 0})

    async def noticed() -> str:
        """What the Job controller made of it: a second pod, or where it starts none, a Job that failed."""
        job = await house.world.call("GET", f"jobs/{handle.job_name}")
        pods = [pod["metadata"]["uid"] for pod in await house.world.pods(handle.runner_id)]
        if any(uid != first["metadata"]["uid"] for uid in pods):
            return "second pod"
        starts_none = job["spec"].get("podReplacementPolicy") and job["status"].get("failed")
        return "the Job says" if starts_none else ""

    told = await until(noticed, SECONDS)
    async with aclosing(house.reopen()) as house.launcher:
        end = await house.end(handle)
        assert (end.code, end.reason) == (None, Reason.DELETED if told == "second pod" else Reason.LOST)
        assert told in (end.message or "")
        assert await house.log(handle) == [b"[the log is lost: its pod was deleted]"]
        assert [line.text async for line in house.launcher.logs(handle, follow=True, after="lost")] == []


async def test_a_job_deleted_with_its_pod_left_running_is_not_gone_while_that_lives(house: House) -> None:
    handle = await house.ready()
    await _orphan(house, handle.runner_id)
    for _ in range(20):
        assert not isinstance(await house.see(handle), Gone)
        await asyncio.sleep(0.05)
    await house.launcher.stop(handle, 0)
    await house.until(handle, lambda seen: isinstance(seen, Exited | Gone))
    await house.launcher.remove(handle)
    await house.until(handle, lambda seen: isinstance(seen, Gone))
    assert await house.gone(handle.runner_id)  # the Secret too, of which nobody is the owner any more


async def test_without_a_way_into_the_pod_it_is_deleted(house: House) -> None:
    role = await house.world.call("GET", "roles/runner-launcher")
    rules = [rule for rule in role["rules"] if rule["resources"] != ["pods/exec"]]
    await house.world.call("PATCH", "roles/runner-launcher", {"rules": rules})
    try:
        handle = await house.ready(HANDLES_TERM)
        await asyncio.sleep(1)
        await house.launcher.stop(handle, 5)
        end = await house.end(handle)
        assert end.stopped is True
        assert end.code in {None, 9}
        assert await house.log(handle) == [b"ready", b"bye"]
        await house.launcher.ping()
    finally:
        await house.world.call("PATCH", "roles/runner-launcher", {"rules": role["rules"]})


@pytest.mark.slow
async def test_a_pod_that_leaves_a_stop_unanswered_is_deleted_in_the_end(house: House) -> None:
    handle = await house.ready(HANDLES_TERM)
    async with Gate(house.world) as gate, aclosing(house.through(gate)) as launcher:
        gate.deaf.add("/exec?")

        async def taken() -> bool:
            with contextlib.suppress(LauncherUnavailable):
                await launcher.stop(handle, 5)
                return True
            return False

        assert not await taken()
        since = await _stopping_since(house, handle)
        await until(taken, SECONDS)
        assert await _stopping_since(house, handle) == since
        end = await house.end(handle)
        assert end.stopped is True
        assert end.code in {None, 9}
        assert await house.log(handle) == [b"ready", b"bye"]


async def _stopping_since(house: House, handle: Handle) -> str:
    job = await house.world.call("GET", f"jobs/{handle.job_name}")
    return str(job["metadata"]["annotations"]["runner-launcher/stopping-at"])


# What no record explains.


@asynccontextmanager
async def serving(
    house: House, tmp_path: Path, script: str, *, now: Callable[[], float] = time.time
) -> AsyncIterator[httpx.AsyncClient]:
    """Open the service in this process at a time of the test's choice, with a pool of runners that do this."""
    config = {
        "namespace": house.world.namespace,
        "image": IMAGE,
        "image_pull_policy": "IfNotPresent",
        "command": ["sh", "-c", script],
        "kubeconfig": str(house.kubeconfig),
    }
    write_pools(tmp_path / "pools.yaml", {"agents": {"type": "kubernetes", "max_concurrency": 8, "config": config}})
    settings = Settings(
        state_dir=tmp_path / "state",
        pools_file=tmp_path / "pools.yaml",
        installation=house.installation,
        slot_roots=(Path("/slots"),),
    )
    app = create_app(settings, now=now)
    async with app.router.lifespan_context(app):
        headers = {"Authorization": f"Bearer {(tmp_path / 'state' / 'token').read_text().strip()}"}
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
            yield client


async def accepted(client: httpx.AsyncClient, slot: str) -> str:
    body = {
        "task": {"id": "7", "title": "Wait"},
        "slot": {"slot_id": slot, "slot_path": f"/slots/{slot}", "repo_url": "https://git.example.org/a.git"},
        "pool": "agents",
    }
    answer = await client.post("/runners", json=body)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["runner_id"])


async def in_phase(client: httpx.AsyncClient, runner_id: str, wanted: str) -> Json:
    async def record() -> Json:
        known: Json = (await client.get(f"/runners/{runner_id}")).json()
        return known if known.get("phase") == wanted else {}

    return await until(record, SECONDS)


async def tell(house: House, runner_id: str) -> None:
    """Let a runner end that waits to be told so."""
    await house.world.run((await house.pod(Handle(runner_id=runner_id)))["metadata"]["name"], "touch /workspace/go")


async def would_sweep(client: httpx.AsyncClient) -> dict[str, str]:
    answer = (await client.post("/engines/sweep", params={"dry_run": "true"})).json()
    assert answer["problems"] == {}
    return {item["runner_id"]: item["fate"] for item in answer["items"]}


async def test_jobs_on_no_record_are_adopted_alive_removed_when_ended_for_long_and_not_touched_when_foreign(
    house: House, tmp_path: Path
) -> None:
    script = "until [ -e /workspace/go ]; do sleep 0.1; done; exit 4"
    other = {"app": "necrocode-runner", "runner-id": "notes", "runner-launcher/installation": "another"}
    async with house.foreign("notes", **other):
        async with serving(house, tmp_path, script) as client:
            live, dead = await accepted(client, "1"), await accepted(client, "2")
            running = await in_phase(client, live, "running")
            await in_phase(client, dead, "running")
            assert running["node"]
            assert "sha256:" in running["image_digest"]
        for path in (tmp_path / "state").glob("runners.db*"):
            path.unlink()
        await tell(house, dead)
        await house.end(Handle(runner_id=dead))
        async with serving(house, tmp_path, script) as client:
            adopted = await in_phase(client, live, "running")
            assert _told(adopted) == _told(running)
            assert await would_sweep(client) == {dead: "wait"}
            assert (await client.get(f"/runners/{dead}")).status_code == 404
            assert not await house.gone(dead)
        async with serving(house, tmp_path, script, now=lambda: time.time() + 3600) as client:
            await until(lambda: house.gone(dead), SECONDS)
            await tell(house, live)
            ended = await in_phase(client, live, "finished")
            assert (ended["reason"], ended["exit_code"]) == ("exit_nonzero", 4)
            await until(lambda: house.gone(live), SECONDS)
            assert await would_sweep(client) == {}


async def test_pods_without_job_or_record_are_adopted_alive_and_removed_when_ended_for_long(
    house: House, tmp_path: Path
) -> None:
    script = "until [ -e /workspace/go ]; do sleep 0.1; done; exit 4"
    async with serving(house, tmp_path, script) as client:
        live, dead, kept = [await accepted(client, slot) for slot in ("1", "2", "3")]
        running = await in_phase(client, live, "running")
        for runner_id in (dead, kept):
            await in_phase(client, runner_id, "running")
        await _orphan(house, kept)
        await tell(house, kept)
        ended = await in_phase(client, kept, "finished")
        assert (ended["reason"], ended["exit_code"]) == ("exit_nonzero", 4)
        await until(lambda: house.gone(kept), SECONDS)
    for path in (tmp_path / "state").glob("runners.db*"):
        path.unlink()
    for runner_id in (live, dead):
        await _orphan(house, runner_id)
    await tell(house, dead)
    await house.end(Handle(runner_id=dead))
    async with serving(house, tmp_path, script) as client:
        adopted = await in_phase(client, live, "running")
        assert _told(adopted) == _told(running)
        assert await would_sweep(client) == {dead: "wait"}
        assert not await house.gone(dead)
    async with serving(house, tmp_path, script, now=lambda: time.time() + 3600) as client:
        await until(lambda: house.gone(dead), SECONDS)
        stopping = await client.delete(f"/runners/{live}", params={"grace": "1"})
        assert stopping.status_code == 202
        assert (await in_phase(client, live, "finished"))["reason"] == "cancelled"
        await until(lambda: house.gone(live), SECONDS)
        assert await would_sweep(client) == {}


def _told(record: Json) -> Json:
    """What of a record must not change when its database is lost."""
    names = ("task_id", "slot_id", "pool_name", "job_name", "node", "image_digest", "isolation", "limits")
    return {name: record[name] for name in names}


async def _orphan(house: House, runner_id: str) -> None:
    """Delete a runner's Job and leave its pod and Secret."""
    job = f"jobs/necrocode-runner-{runner_id}"
    await house.world.call("DELETE", job, {"propagationPolicy": "Orphan"})

    async def deleted() -> bool:
        return await house.world.find(job) is None

    await until(deleted, SECONDS)


# A connection that breaks, an API that forgets, credentials that run out.


async def test_what_happened_while_every_connection_broke_is_seen(house: House) -> None:
    handle = await house.launch(f"trap 'exit 7' TERM; echo ready; {LOOP}")
    await house.running(handle)
    async with house.door.closed():
        await asyncio.sleep(0.2)
        await house.world.run((await house.pod(handle))["metadata"]["name"], "kill -TERM -1")
        with pytest.raises(LauncherUnavailable):
            await house.see(handle)
    assert (await house.end(handle)).code == 7


async def test_a_follower_goes_on_behind_the_last_line_when_its_connection_breaks(house: House) -> None:
    handle = await house.launch(COUNTS_SLOWLY.sh.replace("0.03", "0.15"))
    await house.running(handle)
    lines: list[bytes] = []
    async with asyncio.timeout(SECONDS):
        async for line in house.launcher.logs(handle, follow=True):
            lines.append(line.text)
            if len(lines) in {5, 20}:
                await house.door.drop()
    assert lines == LINES[:40]


@pytest.mark.slow
async def test_a_follower_whose_connection_says_nothing_for_ever_goes_on_by_another(house: House) -> None:
    handle = await house.launch(COUNTS_SLOWLY)
    await house.running(handle)
    async with Gate(house.world) as gate, aclosing(house.through(gate)) as launcher:
        gate.deaf.add("follow=true")
        following = asyncio.create_task(_followed(launcher, handle))
        await until(lambda: _any_in(gate.asked, "follow=true"), SECONDS)
        gate.deaf.clear()
        async with asyncio.timeout(SECONDS):
            assert await following == LINES[:40]


async def _followed(launcher: KubernetesLauncher, handle: Handle) -> list[bytes]:
    return [line.text async for line in launcher.logs(handle, follow=True)]


async def _any_in(asked: Sequence[str], word: str) -> bool:
    return any(word in ask for ask in asked)


async def test_a_forgotten_version_is_listed_anew(house: House) -> None:
    handle = await house.ready(HANDLES_TERM)
    for reflector in (house.launcher._jobs, house.launcher._pods):
        reflector._version = "1"
    await house.door.drop()
    await house.running(handle)
    await house.launcher.stop(handle, 5)
    assert (await house.end(handle)).code == 9


async def test_a_token_that_ran_out_is_read_again(house: House, cluster: tuple[World, Json], tmp_path: Path) -> None:
    kubeconfig = write_kubeconfig(tmp_path / "expired", house.world, house.door, {"token": "expired"})
    async with aclosing(house.reopen(kubeconfig)) as launcher:
        with pytest.raises(LauncherUnavailable, match="credentials"):
            await launcher.ping()
        write_kubeconfig(tmp_path / "expired", house.world, house.door, cluster[1])
        await asyncio.sleep(1.1)
        await launcher.ping()
        assert await launcher.list() == []


async def test_outside_a_cluster_there_is_none_to_run_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    async with aclosing(open_launcher("kubernetes:agents", Path("/nowhere"), "here")) as launcher:
        with pytest.raises(LauncherUnavailable, match="Service host/port is not set"):
            await launcher.ping()


async def test_what_is_not_permitted_is_named(house: House) -> None:
    role = await house.world.call("GET", "roles/runner-launcher")
    rules = [rule for rule in role["rules"] if rule["resources"] != ["secrets"]]
    await house.world.call("PATCH", "roles/runner-launcher", {"rules": rules})
    try:
        await until(lambda: _refused(house, "create secrets, get secrets"), SECONDS)
        with pytest.raises(LaunchRejected, match="secrets"):
            await house.launch(exits(0))
        assert await house.launcher.list() == []
    finally:
        await house.world.call("PATCH", "roles/runner-launcher", {"rules": role["rules"]})
    await until(lambda: _refused(house, None), SECONDS)


async def _refused(house: House, words: str | None) -> bool:
    """Whether one who comes anew is refused in these words, or not at all. The API hears of roles a moment later."""
    async with aclosing(house.reopen()) as other:
        try:
            await other.ping()
        except LauncherUnavailable as error:
            return words is not None and words in str(error)
    return words is None


async def test_an_api_that_is_busy_is_left_alone_for_as_long_as_it_wants(house: House) -> None:
    async with Gate(house.world) as gate, aclosing(house.through(gate)) as launcher:
        runner_id = new_id()
        for status, acted in ((429, False), (500, True), (503, True)):
            gate.answer("POST /apis/batch", status, Retry_After="1")
            with pytest.raises(LauncherUnavailable, match=f"injected {status}") as busy:
                await launcher.launch(runner_id, house.spec("exit 0"))
            assert (busy.value.acted, busy.value.retry_after) == (acted, 1)
            asked = len(gate.asked)
            if status == 429:
                with pytest.raises(LauncherUnavailable, match="pause"):
                    await launcher.launch(runner_id, house.spec("exit 0"))
                assert len(gate.asked) == asked
                await asyncio.sleep(1.1)
        handle = await launcher.launch(runner_id, house.spec("exit 0"))
        assert (await house.end(handle)).code == 0


@pytest.mark.slow
async def test_an_api_that_wishes_for_an_hours_pause_holds_up_no_stop_for_so_long(house: House) -> None:
    async with Gate(house.world) as gate, aclosing(house.through(gate)) as launcher:
        handle = await launcher.launch(new_id(), house.spec("sleep 600"))
        gate.answer("POST /apis/batch", 429, Retry_After="3600")
        with pytest.raises(LauncherUnavailable) as busy:
            await launcher.launch(new_id(), house.spec("exit 0"))
        assert busy.value.retry_after == 3600
        with pytest.raises(LauncherUnavailable, match="pause"):
            await launcher.stop(handle, 0)
        await asyncio.sleep(PAUSE_SECONDS + 0.1)
        await launcher.stop(handle, 0)
        assert (await house.end(handle)).stopped


async def test_a_launch_that_is_refused_finds_what_an_earlier_one_made(house: House) -> None:
    async with Gate(house.world) as gate, aclosing(house.through(gate)) as launcher:
        handle = await launcher.launch(new_id(), house.spec("exit 0"))
        for status in (403, 422):
            gate.answer("POST /apis/batch", status)
            assert await launcher.launch(handle.runner_id, house.spec("exit 0")) == handle
        gate.answer("POST /apis/batch", 403)
        with pytest.raises(LaunchRejected, match="injected 403"):
            await launcher.launch(new_id(), house.spec("exit 0"))
        gate.answer("POST /apis/batch", 409)  # two writers met at a quota, say: no Job of that name is there
        with pytest.raises(LauncherUnavailable, match="injected 409") as conflict:
            await launcher.launch(new_id(), house.spec("exit 0"))
        assert not conflict.value.acted
        gate.answer("POST /apis/batch", 403)
        gate.answer("GET /apis/batch/v1/namespaces/" + house.world.namespace + "/jobs/", 403)
        with pytest.raises(LauncherUnavailable, match="cannot be read") as unknown:
            await launcher.launch(handle.runner_id, house.spec("exit 0"))
        assert unknown.value.acted


async def test_looking_at_runners_asks_the_api_nothing(house: House) -> None:
    async with Gate(house.world) as gate, aclosing(house.through(gate)) as launcher:
        handles = [await launcher.launch(new_id(), house.spec(f"exit {number}")) for number in range(4)]
        assert len([ask for ask in gate.asked if ask.startswith("POST")]) == 8
        for handle in handles:
            await house.end(handle)
        while len([ask for ask in gate.asked if "watch=true" in ask]) < 3:
            await launcher.observe([])
            await asyncio.sleep(0.05)
        asked = len(gate.asked)
        for _ in range(200):
            seen = await launcher.observe(handles)
        assert [seen[handle.runner_id].exit.code for handle in handles] == [0, 1, 2, 3]  # type: ignore[union-attr]
        assert [ask for ask in gate.asked[asked:] if "limit=1" not in ask] == []


async def test_a_copy_that_is_refused_or_cut_is_made_again(house: House) -> None:
    async with Gate(house.world) as gate, aclosing(house.through(gate)) as launcher:
        where = f"GET /apis/batch/v1/namespaces/{house.world.namespace}/jobs"
        gate.answer(where, 500)
        with pytest.raises(LauncherUnavailable, match="injected 500"):
            await launcher.list()
        gate.answer(f"{where}?", 410)
        handle = await launcher.launch(new_id(), house.spec("exit 3"))
        assert (await house.end(handle)).code == 3
        assert [found.handle.runner_id for found in await launcher.list()] == [handle.runner_id]


async def test_a_proxy_that_the_environment_names_is_used_unless_it_says_not_for_this_api(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Gate(house.world) as gate:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{gate.port}")
        for but_not, through in (("", True), ("api.invalid", False)):
            monkeypatch.setenv("no_proxy", but_not)
            async with aclosing(house.through(gate, "http://api.invalid")) as launcher:
                with contextlib.nullcontext() if through else pytest.raises(LauncherUnavailable, match="cannot be reached"):
                    await launcher.ping()
            assert bool(gate.asked) == through
            gate.asked.clear()


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_a_runner_whose_service_is_down_is_ended_at_its_deadline(house: House) -> None:
    spec = replace(house.spec(RUNS_ON.sh), run_timeout_seconds=1)
    handle = await house.launcher.launch(new_id(), spec)
    end = await house.end(handle, seconds=100)
    assert end.reason is Reason.DEADLINE_EXCEEDED
    assert "deadline" in (end.message or "")


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_two_hundred_at_once(house: House) -> None:
    async def one(number: int) -> tuple[int | None, Sequence[bytes]]:
        handle = await house.launch(f"echo {number}; exit {number % 3}")
        end = await house.end(handle, seconds=800)
        log = await house.log(handle)
        with contextlib.suppress(LauncherUnavailable):
            await house.launcher.remove(handle)
        return end.code, log

    assert await asyncio.gather(*map(one, range(200))) == [(n % 3, [b"%d" % n]) for n in range(200)]


# Parts of the cluster that go away. KUBERNETES_CONTROL names a program: with `stop PART` it ends one, alone it brings all
# back.


class Control:
    """Stops parts of the cluster, and brings them back."""

    def __init__(self, program: str) -> None:
        self._program = program

    async def stop(self, part: str) -> None:
        await self._run("stop", part)

    async def back(self) -> None:
        await self._run()

    async def _run(self, *words: str) -> None:
        quiet = asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(self._program, *words, stdin=quiet, stdout=quiet, stderr=quiet)
        assert await process.wait() == 0


@pytest.fixture
async def control(house: House) -> AsyncIterator[Control]:  # noqa: ARG001 - what it leaves is removed when all is back
    program = os.environ.get("KUBERNETES_CONTROL")
    if not program:
        missing("kubernetes-control", "KUBERNETES_CONTROL names no program that stops and starts parts of the cluster")
    made = Control(program)
    yield made
    await made.back()


async def _launched(house: House, runner_id: str) -> Handle:
    """Launch as the reconciler does: until it is known."""
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            return await house.launcher.launch(runner_id, house.spec("echo once; exit 0"))
        except LauncherUnavailable:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.5)


async def _seen_again(house: House, handle: Handle) -> Observation | None:
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            return await house.see(handle)
        except LauncherUnavailable:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.5)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["kube-apiserver", "etcd"])
async def test_an_api_that_goes_away_amid_launches_and_runs_changes_nothing(
    house: House, control: Control, part: str
) -> None:
    running = await house.ready(HANDLES_TERM)
    ids = [new_id() for _ in range(8)]
    launches = [asyncio.create_task(house.launcher.launch(one, house.spec("echo once; exit 0"))) for one in ids]
    await control.stop(part)
    for outcome in await asyncio.gather(*launches, return_exceptions=True):
        assert isinstance(outcome, Handle | LauncherUnavailable), outcome
    with pytest.raises(LauncherUnavailable):
        await house.launcher.launch(new_id(), house.spec("exit 0"))
    await asyncio.sleep(6)
    with pytest.raises(LauncherUnavailable):
        await house.see(running)
    await control.back()
    assert isinstance(await _seen_again(house, running), Running)
    for handle in [await _launched(house, one) for one in ids]:
        assert (await house.end(handle)).code == 0
        assert await house.log(handle) == [b"once"]
        await house.pod(handle)
    await house.launcher.stop(running, 10)
    end = await house.end(running)
    assert (end.code, end.stopped) == (9, True)


@pytest.mark.slow
async def test_without_a_job_controller_a_launch_waits_and_says_so(house: House, control: Control) -> None:
    await control.stop("kube-controller-manager")
    waits, stopped = await house.launch("exit 5"), await house.launch("exit 0")
    assert "Job controller" in await house.problem(waits)
    await house.launcher.stop(stopped, 1)
    end = await house.end(stopped)
    assert (end.code, end.stopped) == (None, True)
    await control.back()
    assert (await house.end(waits)).code == 5
    assert not await house.world.pods(stopped.runner_id)


@pytest.mark.slow
async def test_an_end_while_the_kubelet_is_away_is_told_when_it_is_back(house: House, control: Control) -> None:
    handle = await house.ready(replace(RUNS_ON, sh="echo ready; sleep 8; echo last; exit 7"))
    await control.stop("kubelet")
    for _ in range(12):
        assert isinstance(await house.see(handle), Running)
        await asyncio.sleep(1)
    await control.back()
    assert (await house.end(handle)).code == 7
    assert await house.log(handle) == [b"ready", b"last"]


@pytest.mark.slow
async def test_a_runner_of_a_node_that_is_drained_keeps_its_log(house: House) -> None:
    handle = await house.ready(HANDLES_TERM)
    pod = (await house.pod(handle))["metadata"]
    try:
        await _evict(house.world, pod["name"], "policy/v1")
    except ApiException:  # before 1.22
        await _evict(house.world, pod["name"], "policy/v1beta1")
    end = await house.end(handle)
    assert end.stopped is False
    assert end.code in {9, None}
    assert (await house.log(handle))[:2] == [b"ready", b"bye"]


async def _evict(world: World, name: str, version: str) -> None:
    body = {"apiVersion": version, "kind": "Eviction", "metadata": {"name": name, "namespace": world.namespace}}
    await world.call("POST", f"pods/{name}/eviction", body)


async def test_a_log_that_its_node_no_longer_has_is_told_as_lost(house: House) -> None:
    async with Gate(house.world) as gate, aclosing(house.through(gate)) as launcher:
        handle = await launcher.launch(new_id(), house.spec("echo hello"))
        assert (await house.end(handle)).code == 0
        name = (await house.pod(handle))["metadata"]["name"]
        for status in (400, 404):
            gate.answer(f"GET /api/v1/namespaces/{house.world.namespace}/pods/{name}/log", status)
            lines = [line async for line in launcher.logs(handle)]
            assert [line.gap for line in lines] == [True]
            assert b"the log is lost" in lines[0].text
        assert [line.text async for line in launcher.logs(handle)] == [b"hello"]


async def test_which_pod_is_the_runner_is_written_down_again_where_it_failed(house: House) -> None:
    async with Gate(house.world) as gate, aclosing(house.through(gate)) as launcher:
        gate.answer("PATCH /apis/batch", 500)
        handle = await launcher.launch(new_id(), house.spec("sleep 600"))
        job = await house.world.call("GET", f"jobs/{handle.job_name}")
        if job["spec"].get("podReplacementPolicy") == "Failed":
            pytest.skip("this cluster starts no second pod, so it is not written down")

        async def claimed() -> bool:
            await launcher.observe([handle])  # as every few seconds
            job = await house.world.call("GET", f"jobs/{handle.job_name}")
            return FIRST_POD in job["metadata"].get("annotations", {})

        await until(claimed, SECONDS)
        assert not gate.answers
        await launcher.stop(handle, 0)
        await house.end(handle)


async def test_an_api_server_that_has_just_begun_is_asked_again(house: House) -> None:
    async with Gate(house.world) as gate, aclosing(house.through(gate)) as launcher:
        message = 'jobs.batch "a" is forbidden: not yet ready to handle request'
        gate.answers.append(("POST /apis/batch", web.json_response({"reason": "Forbidden", "message": message}, status=403)))
        with pytest.raises(LauncherUnavailable, match="not yet ready") as failure:
            await launcher.launch(new_id(), house.spec("exit 0"))
        assert not failure.value.acted
