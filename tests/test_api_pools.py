"""Pools over HTTP: how they are used, and the switch."""

from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import (
    Json,
    Service,
    finished,
    launch_body,
    launched,
    local_pool,
    problem,
    write_pools,
    written,
)

FOREVER = "exec sleep 600"


async def test_a_pool_tells_what_it_may_use_and_what_it_uses(service: Service, slot: Path) -> None:
    resources = {"cpu_limit": 0.5, "memory_limit": 256}
    pool = local_pool(max_concurrency=4, resources=resources, quotas={"cpu_quota": 2, "memory_quota": 1024})
    idle = {
        "pool_name": "local",
        "type": "local-process",
        "enabled": True,
        "max_concurrency": 4,
        "current_running": 0,
        "utilization": 0.0,
        "cpu_usage": 0.0,
        "memory_usage": 0,
        "cpu_quota": 2.0,
        "memory_quota": 1024,
        "queued": 0,
        "launching": 0,
    }
    async with service({"local": pool}) as client:
        assert (await client.get("/pools/local")).json() == idle
        assert (await client.get("/pools")).json() == {"items": [idle]}

        runner = await launched(client, launch_body(slot, FOREVER))
        busy = idle | {"current_running": 1, "utilization": 0.25, "cpu_usage": 0.5, "memory_usage": 256}
        assert (await client.get("/pools/local")).json() == busy

        await client.delete(runner["links"]["self"], params={"grace": 0})
        await finished(client, runner)
        assert (await client.get("/pools/local")).json() == idle


async def test_all_configured_pools_are_listed_whatever_their_type(service: Service) -> None:
    pools = {"local": local_pool(), "far": {"type": "docker"}, "off": local_pool(enabled=False)}
    async with service(pools) as client:
        items = (await client.get("/pools")).json()["items"]
    assert [(item["pool_name"], item["type"], item["enabled"]) for item in items] == [
        ("far", "docker", True),
        ("local", "local-process", True),
        ("off", "local-process", False),
    ]


async def test_a_pool_that_was_switched_off_takes_no_launches_until_it_is_switched_on(
    client: httpx.AsyncClient, slot: Path
) -> None:
    answer = await client.patch("/pools/local", json={"enabled": False})
    assert (answer.status_code, answer.json()["enabled"]) == (200, False)
    answer = await client.post("/runners", json=launch_body(slot))
    problem(answer, 422, "pool-disabled", "/pool", words="pool local is switched off")

    await client.patch("/pools/local", json={"enabled": True})
    await launched(client, launch_body(slot))


async def test_switching_a_pool_off_leaves_its_runners_alone(client: httpx.AsyncClient, slot: Path) -> None:
    runner = await launched(client, launch_body(slot, "while [ ! -e go ]; do sleep 0.01; done"))
    await client.patch("/pools/local", json={"enabled": False})
    (slot / "go").touch()
    assert (await finished(client, runner))["state"] == "completed"


@pytest.mark.parametrize("in_file", [True, False])
async def test_a_switch_is_kept_over_a_restart_and_beats_the_file(service: Service, *, in_file: bool) -> None:
    async with service({"local": local_pool(enabled=in_file)}) as client:
        assert (await client.get("/pools/local")).json()["enabled"] is in_file
        await client.patch("/pools/local", json={"enabled": not in_file})
    async with service() as client:
        assert (await client.get("/pools/local")).json()["enabled"] is not in_file
        await client.patch("/pools/local", json={"enabled": in_file})
    async with service() as client:
        assert (await client.get("/pools/local")).json()["enabled"] is in_file


async def test_a_pool_taken_out_of_the_file_keeps_serving_its_live_runners(
    service: Service, slot: Path, pools_file: Path
) -> None:
    async with service(leave_runners=True) as client:
        runner = await launched(client, launch_body(slot, "trap 'exit 5' TERM; echo >ready; while :; do sleep 0.02; done"))
        await written(slot / "ready")
    write_pools(pools_file, {"other": local_pool()})
    async with service() as client:
        problem(await client.post("/runners", json=launch_body(slot)), 422, "unknown-pool", "/pool")
        problem(await client.get("/pools/local"), 404, "not-found")
        await client.delete(runner["links"]["self"])
        record = await finished(client, runner)
    assert (record["pool_name"], record["reason"], record["exit_code"]) == ("local", "cancelled", 5)


@pytest.mark.parametrize("method", ["GET", "PATCH"])
async def test_a_pool_that_is_not_configured_is_not_found(client: httpx.AsyncClient, method: str) -> None:
    json = {"enabled": True} if method == "PATCH" else None
    answer = await client.request(method, "/pools/nowhere", json=json)
    problem(answer, 404, "not-found", words="no pool named nowhere is configured; there are: local")


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/enabled"),
        ({"enabled": "yes"}, "/enabled"),
        ({"enabled": 1}, "/enabled"),
        ({"enabled": None}, "/enabled"),
        ({"enabled": False, "max_concurrency": 9}, "/max_concurrency"),
        ([], ""),
    ],
)
async def test_a_switch_is_on_or_off_and_nothing_else(client: httpx.AsyncClient, body: object, pointer: str) -> None:
    problem(await client.patch("/pools/local", json=body), 422, "invalid", pointer)
    assert (await client.get("/pools/local")).json()["enabled"] is True


# Pools in a request.


async def test_an_object_that_bears_a_configured_pools_name_means_that_pool(service: Service, slot: Path) -> None:
    async with service({"local": local_pool(labels={"from": "the file"})}) as client:
        pool = {"name": "local", "type": "docker", "config": {"labels": {"from": "the request"}, "image": 7}}
        record = await launched(client, launch_body(slot, pool=pool))
    assert (record["pool_name"], record["labels"]) == ("local", {"from": "the file"})


async def test_a_pool_of_the_requests_own_is_off_by_default(client: httpx.AsyncClient, slot: Path) -> None:
    answer = await client.post("/runners", json=launch_body(slot, pool={"name": "mine", "type": "local-process"}))
    problem(answer, 422, "inline-pools-off", "/pool", words="inline pools are off")


async def test_a_pool_of_the_requests_own_is_served_where_that_is_allowed(service: Service, slot: Path) -> None:
    pool = {"name": "mine", "type": "local-process", "config": {"labels": {"a": "b"}}}
    async with service(allow_inline_pools=True, runner_command=("sh", "agent.sh")) as client:
        record = await launched(client, launch_body(slot, FOREVER, pool=pool))
        assert (record["pool_name"], record["labels"]) == ("mine", {"a": "b"})
        answer = await client.post("/runners", json=launch_body(slot.with_name("slot-2"), pool=pool))
        problem(answer, 429, "pool-full", words="pool mine holds 1 runner,")


@pytest.mark.parametrize(
    ("pool", "pointer"),
    [
        ({"config": {"command": ["sh"]}}, "/pool/config/command"),
        ({"config": {"environment": {"A": "b"}}}, "/pool/config/environment"),
        ({"config": {"working_dir": "/"}}, "/pool/config/working_dir"),
        ({"type": "docker", "config": {"volumes": {"/": "/host"}}}, "/pool/config/volumes"),
        ({"type": "docker", "config": {"registry_auth": "/etc/shadow"}}, "/pool/config/registry_auth"),
        ({"type": "kubernetes", "config": {"job_template": "/etc/shadow"}}, "/pool/config/job_template"),
        ({"config": {"run_timeout_seconds": 5}}, "/pool/config/run_timeout_seconds"),
        ({"owner": "me"}, "/pool/owner"),
    ],
)
async def test_a_pool_of_the_requests_own_may_not_name_what_is_the_operators(
    service: Service, slot: Path, pool: dict[str, Any], pointer: str
) -> None:
    async with service(allow_inline_pools=True) as client:
        body = launch_body(slot, pool={"name": "mine", "type": "local-process", **pool})
        problem(await client.post("/runners", json=body), 422, "invalid", pointer)


def _docker() -> Json:
    config = {"docker_host": "tcp://127.0.0.1:1", "user": "1000:1000", "retry_attempts": 2, "retry_base_seconds": 0.01}
    return {"far": {"type": "docker", "config": config}}


async def test_an_engine_that_nobody_can_reach_is_told_with_each_attempt(
    service: Service, slot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.breaker.MISSED", 1_000)  # what the service asks at its start must not have it taken for away
    async with service(_docker()) as client:
        answer = await client.post("/runners", json=launch_body(slot, pool="far"))
        said = problem(answer, 503, "engine-unavailable", words="attempt 2: tcp://127.0.0.1:1: cannot connect")
    assert (said["runner"]["reason"], said["retryable"]) == ("engine_unavailable", True)


async def test_a_pool_whose_name_has_a_slash_is_found(service: Service) -> None:
    async with service({"gpu/large": local_pool()}) as client:
        assert (await client.get("/pools/gpu%2Flarge")).json()["pool_name"] == "gpu/large"
        assert (await client.patch("/pools/gpu%2Flarge", json={"enabled": False})).json()["enabled"] is False
