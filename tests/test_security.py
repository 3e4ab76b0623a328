"""What somebody hostile would try: a runner, a Dispatcher with a token for little, a page that a browser shows.

Tries that belong to one part of the service are beside its other tests; docs/threat-model.md says where.
"""

from pathlib import Path

import httpx
from conftest import Json, Service, finished, launch_body, launched, local_pool
from engines import needs_root
from test_isolation import give_to_everybody

root = needs_root("only root can start a process as another user")

FOREVER = "exec sleep 600"


# A slot that is something else once it was checked.


async def queued_behind_another(client: httpx.AsyncClient, slot: Path, pool: str) -> tuple[Json, Json]:
    """Launch a runner that waits, its slot checked, until another has ended."""
    first = await launched(client, launch_body(slot.with_name("slot-0"), FOREVER, pool=pool))
    answer = await client.post("/runners", json=launch_body(slot, pool=pool), headers={"Prefer": "respond-async"})
    assert (answer.status_code, answer.json()["phase"]) == (202, "queued")
    return first, answer.json()


def swapped(slot: Path, for_what: Path) -> None:
    """Put a link in a slot's place, as whoever may write to the directory above can at any time."""
    slot.rename(slot.with_name("away"))
    slot.symlink_to(for_what)


async def test_a_slot_that_became_a_link_while_its_launch_waited_is_not_entered(
    service: Service, slot: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    launch_body(outside, "echo here >was")
    async with service({"local": local_pool(max_concurrency=1, queue_limit=1)}) as client:
        first, waiting = await queued_behind_another(client, slot, "local")
        swapped(slot, outside)
        await client.delete(first["links"]["self"])
        record = await finished(client, waiting)
    assert (record["reason"], record["retryable"]) == ("config_error", False)
    assert "leads elsewhere than when it was checked" in record["message"]
    assert not (outside / "was").exists()


# What a pool with a user sets, and who obeys it.


@root
async def test_no_program_that_is_still_root_is_started_with_a_pools_environment(service: Service, slot: Path) -> None:
    give_to_everybody(slot)
    odd = "a'b\n$(id)`id`\\\x81é👋"
    pools = {"local": local_pool(user="nobody", environment={"LD_PRELOAD": "./not-there.so", "UID": "7", "ODD": odd})}
    async with service(pools) as client:
        runner = await launched(client, launch_body(slot, "exec cat /proc/$$/environ"))
        await finished(client, runner)
        said = (await client.get(f"/runners/{runner['runner_id']}/logs")).text
    assert {f"ODD={odd}", "POOL_NAME=local"} <= {*said.split("\0")}
    assert said.count("cannot be preloaded") == 2  # by the pool's command, and by what it became
