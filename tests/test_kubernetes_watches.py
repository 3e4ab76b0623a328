"""What a launcher keeps of a real cluster: its copies and logs, where others have a hand in them and connections end."""

import asyncio
import time
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import until
from kubernetes_house import House
from kubernetes_world import IMAGE, Gate, Json, door
from launcher_contract import HANDLES_TERM, LOOP, RUNS_ON, exits

from app.errors import LauncherUnavailable
from app.launcher import Running
from app.launchers.kubernetes import KubernetesLauncher
from app.launchers.pod_log import CUT_OFF

pytest_plugins = ["kubernetes_house"]
pytestmark = pytest.mark.timeout(300)


async def relisted(house: House) -> None:
    """Have the API forget where the watches were, and wait until they begin anew."""
    reflectors = (house.launcher._jobs, house.launcher._pods)
    for reflector in reflectors:
        reflector._version = "1"
    await house.door.drop()
    await until(lambda: all(int(reflector._version or 1) > 1 for reflector in reflectors), 60)


async def test_labels_that_somebody_took_away_or_gave_to_others_blind_nobody(house: House) -> None:
    handle = await house.ready(HANDLES_TERM)
    pod, bare = (await house.pod(handle))["metadata"]["name"], {"metadata": {"labels": {"runner-id": None}}}
    labels = {"runner-launcher/installation": house.installation}
    template: Json = {"spec": {"restartPolicy": "Never", "containers": [{"name": "x", "image": IMAGE}]}}
    job = {"metadata": {"name": "by-hand", "labels": labels}, "spec": {"parallelism": 0, "template": template}}
    await house.world.call("POST", "jobs", job)
    try:
        for path in (f"pods/{pod}", f"jobs/{handle.job_name}"):
            await house.world.call("PATCH", path, bare)
        await relisted(house)
        assert isinstance(await house.see(handle), Running)
        assert (await house.end(await house.launch(exits(3)))).code == 3
        assert "by-hand" not in {found.handle.runner_id for found in await house.launcher.list()}
        await house.launcher.stop(handle, 5)
        end = await house.end(handle)
        assert (end.code, end.stopped) == (9, True)
        await house.launcher.remove(handle)
        assert await house.world.find("jobs/by-hand")
    finally:
        await house.world.call("DELETE", "jobs/by-hand", {"propagationPolicy": "Background"})


@pytest.mark.parametrize("kind", ["/apis/batch/v1/namespaces/{}/jobs", "/api/v1/namespaces/{}/pods"])
async def test_an_answer_that_is_no_list_is_trouble_and_not_the_end_of_looking(house: House, kind: str) -> None:
    handle = await house.launch(exits(3))
    assert (await house.end(handle)).code == 3
    async with Gate(house.world) as gate, aclosing(house.through(gate)) as launcher:
        gate.answer(f"GET {kind.format(house.world.namespace)}", 200)
        with pytest.raises(LauncherUnavailable, match="not understood"):
            await launcher.observe([handle])
        assert handle.runner_id in await launcher.observe([handle])


async def test_a_watch_that_is_cut_off_again_and_again_is_begun_again_at_once(house: House) -> None:
    """As by a load balancer that lets no connection live for long."""
    async with (
        Gate(house.world) as gate,
        door(f"http://127.0.0.1:{gate.port}", "127.0.0.1") as way,
        aclosing(house.through(gate, f"http://127.0.0.1:{way.own_port}")) as launcher,
    ):
        await launcher.observe([])

        def watches() -> int:
            return len([ask for ask in gate.asked if "/pods?" in ask and "watch=true" in ask])

        await until(watches, 60)
        pauses: list[float] = []

        def begun_anew() -> bool:
            return watches() > len(pauses) + 1

        for _ in range(8):
            await asyncio.sleep(1.5)
            cut_at = time.monotonic()
            await way.drop()
            await until(begun_anew, 60)
            pauses.append(time.monotonic() - cut_at)
        assert min(pauses[-3:]) < 2, pauses  # an outage of so many tries is one of several seconds


async def test_looking_at_many_runners_lets_others_have_their_turn(house: House) -> None:
    handle, turns = await house.ready(), 0

    async def take_turns() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    other = asyncio.create_task(take_turns())
    assert await house.launcher.observe([handle] * 10_000)
    other.cancel()
    assert turns > 20


@pytest.mark.slow  # where a kubelet takes a minute to let a pod go
async def test_a_log_that_is_cut_off_as_its_pod_goes_says_so(house: House) -> None:
    handle = await house.ready(replace(RUNS_ON, sh=f"trap '' TERM; echo ready; {LOOP}"))
    pod = (await house.pod(handle))["metadata"]["name"]
    await house.world.call("DELETE", f"pods/{pod}", {"gracePeriodSeconds": 2})
    kept = await until(lambda: house.launcher._kept.get(handle.runner_id), 60)
    assert kept
    await until(lambda: kept.after(None), 60)

    async def gone() -> bool:
        return await house.world.find(f"pods/{pod}") is None

    async with house.door.closed():
        await until(gone, 120)
    await until(kept.whole.is_set, 60)
    await house.end(handle)
    lines = [line async for line in house.launcher.logs(handle)]
    assert [(line.text, line.gap) for line in lines] == [(b"ready", False), (CUT_OFF, True)]
    for number, line in enumerate(lines):
        assert [one async for one in house.launcher.logs(handle, after=line.cursor)] == lines[number + 1 :]


@pytest.mark.slow
async def test_a_plugin_for_credentials_that_hangs_is_ended_and_holds_nobody_up_for_ever(tmp_path: Path) -> None:
    config, pid = tmp_path / "kubeconfig", tmp_path / "pid"
    config.write_text(
        f"""{{apiVersion: v1, kind: Config, current-context: c, contexts: [{{name: c, context: {{cluster: c, user: u}}}}],
        clusters: [{{name: c, cluster: {{server: "http://127.0.0.1:1"}}}}], users: [{{name: u, user: {{exec: {{
        apiVersion: client.authentication.k8s.io/v1, command: sh, args: ["-c", "echo $$ >>{pid}; exec sleep 600"]}}}}}}]}}"""
    )
    began = time.monotonic()
    async with aclosing(KubernetesLauncher(config, None, "agents", "here")) as launcher:
        for outcome in await asyncio.gather(*(launcher.ping() for _ in range(8)), return_exceptions=True):
            assert isinstance(outcome, LauncherUnavailable)
            assert "not given within 15 s" in str(outcome)
    assert time.monotonic() - began < 2 * 15  # all wait for the one attempt
    (plugin,) = pid.read_text().split()
    await until(lambda: _ended(plugin), 10)


def _ended(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except FileNotFoundError:
        return True


async def test_a_watch_of_a_version_that_is_yet_to_come_is_made_anew_after_silence(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after the API's store was restored: what happens until that version comes is told to no such watch."""
    monkeypatch.setattr("app.launchers.reflector.SILENCE_SECONDS", 2.0)
    handle = await house.ready()
    for reflector in (house.launcher._jobs, house.launcher._pods):
        reflector._bookmarked = True  # it comes once a minute
        reflector._version = str(10**9)
    name = (await house.pod(handle))["metadata"]["name"]
    house.launcher._pods._ahead[name] = 10**9  # as a call had answered then
    await house.door.drop()
    await house.world.run(name, "kill -TERM -1")
    await house.end(handle)
    assert int(house.launcher._pods._version or 0) < 10**9
