"""The copies of a cluster's objects that a launcher keeps, on a real cluster: what others do to them, and watches that end."""

from contextlib import aclosing

import pytest
from conftest import until
from kubernetes_house import House
from kubernetes_world import IMAGE, Gate, Json
from launcher_contract import HANDLES_TERM, exits

from app.errors import LauncherUnavailable
from app.launcher import Running

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
    async with Gate(house.world) as gate, aclosing(house.through(gate)) as launcher:
        gate.answer(f"GET {kind.format(house.world.namespace)}", 200)
        with pytest.raises(LauncherUnavailable, match="not understood"):
            await launcher.observe([handle])
        assert handle.runner_id in await launcher.observe([handle])
