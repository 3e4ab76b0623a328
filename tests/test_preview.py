"""A launch that is only thought of: what it would be, without its secrets, and without a trace."""

from pathlib import Path

import httpx
import pytest
from conftest import Json, Service, finished, launch_body, launched, local_pool, problem

from app.launcher import LaunchSpec
from app.redaction import HIDDEN, redacted, without_secrets

FOREVER = "sleep 1000"


async def previewed(client: httpx.AsyncClient, body: Json) -> Json:
    answer = await client.post("/runners?dry_run=true", json=body)
    assert answer.status_code == 200, answer.text
    said: Json = answer.json()
    return said


async def test_a_preview_shows_the_very_command_and_launches_nothing(service: Service, slot: Path, state_dir: Path) -> None:
    pool = local_pool(run_timeout_seconds=60, model="small", quotas={"memory_quota": 64})
    async with service({"local": pool}) as client:
        said = await previewed(client, launch_body(slot, title="Add it"))
        assert (said["pool_name"], said["engine"], said["refusal"]) == ("local", "local-process", None)
        request = said["request"]
        assert request["command"] == ["sh", "agent.sh"]
        assert request["working_dir"] == str(slot)
        assert request["limits"] == {"cpu": None, "memory_mib": 64}
        assert request["run_timeout_seconds"] == 60
        environment = request["environment"]
        assert (environment["RUNNER_MODEL"], environment["POOL_NAME"]) == ("small", "local")
        assert environment["RUNNER_ID"] == "runner-000000000000"
        assert environment["RUNNER_TOKEN"] == HIDDEN
        assert environment["TASK_CONTEXT"].startswith("(the task context, ")
        assert said["task_context"]["task_title"] == "Add it"
        assert (await client.get("/runners")).json()["items"] == []
        assert (await client.get("/events")).json()["revision"] == 0
        assert not (state_dir / "runners").exists() or not list((state_dir / "runners").iterdir())


async def test_a_preview_tells_no_secret(service: Service, slot: Path) -> None:
    secrets = {"PLAIN": "hush-1", "API_KEY": "hush-2"}
    named: Json = {"github_token": "hush-3", "deploy_key": "hush-4"}
    async with service({"local": local_pool(environment=secrets, **named)}) as client:
        for accept in ("application/json", "text/plain"):
            answer = await client.post("/runners?dry_run=true", json=launch_body(slot), headers={"Accept": accept})
            assert answer.status_code == 200
            assert "PLAIN" in answer.text
            assert "RUNNER_GITHUB_TOKEN" in answer.text
            assert "hush" not in answer.text


async def test_what_a_launch_refuses_a_preview_refuses_too(service: Service, slot: Path) -> None:
    pools = {
        "local": local_pool(),
        "off": local_pool(enabled=False),
        "broken": local_pool(command=["no-such-command"]),
        "image": {"type": "docker", "enabled": True},
    }
    async with service(pools) as client:

        async def refused(body: Json, status: int, code: str, *pointers: str, words: str = "") -> None:
            problem(await client.post("/runners?dry_run=true", json=body), status, code, *pointers, words=words)

        await refused(launch_body(slot, pool="off"), 422, "pool-disabled", "/pool")
        await refused(launch_body(slot, pool="nowhere"), 422, "unknown-pool", "/pool")
        await refused(launch_body(slot, pool="broken"), 422, "launch-rejected", words="no such command")
        body = launch_body(slot)
        body["slot"]["slot_path"] = f"{slot}-that-is-not-there"
        await refused(body, 422, "no-such-slot-path", "/slot/slot_path")
        await refused({}, 422, "invalid", "/task", "/slot", "/pool")


async def test_a_preview_says_why_it_could_not_start_now(service: Service, slot: Path) -> None:
    async with service({"local": local_pool(max_concurrency=1)}) as client:
        runner = await launched(client, launch_body(slot, FOREVER))
        said = await previewed(client, launch_body(slot, FOREVER))
        assert f"held by {runner['runner_id']}" in said["refusal"]
        said = await previewed(client, launch_body(slot.with_name("slot-2"), FOREVER))
        assert "max_concurrency is 1" in said["refusal"]
        await client.delete(runner["links"]["self"])
        await finished(client, runner)
        assert (await previewed(client, launch_body(slot)))["refusal"] is None


async def test_a_preview_does_not_use_a_key_up(client: httpx.AsyncClient, slot: Path) -> None:
    key = {"Idempotency-Key": "k"}
    assert (await client.post("/runners?dry_run=true", json=launch_body(slot), headers=key)).status_code == 200
    answer = await client.post("/runners", json=launch_body(slot, id="other"), headers=key)
    assert (answer.status_code, "Idempotency-Replayed" in answer.headers) == (201, False)


@pytest.mark.parametrize(
    "name", ["RUNNER_TOKEN", "GITHUB_TOKEN", "DB_PASSWORD", "APIKEY", "AWS_SECRET_ACCESS_KEY", "SSH_KEY"]
)
def test_names_of_secrets_are_known(name: str) -> None:
    spec = LaunchSpec(command=None, environment={name: "hush", "PATH": "/bin"}, context=b"{}")
    assert redacted(spec, ()).environment == {name: HIDDEN, "PATH": "/bin"}
    assert redacted(spec, {"PATH"}).environment["PATH"] == HIDDEN
    template = {"spec": {"env": [{"name": name, "value": "hush"}, {"name": "A", "value": "b"}], name: "hush"}}
    hidden = {"spec": {"env": [{"name": name, "value": HIDDEN}, {"name": "A", "value": "b"}], name: HIDDEN}}
    assert without_secrets(template) == hidden  # type: ignore[arg-type] # JSON
