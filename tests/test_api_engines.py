"""What engines are and whether they answer, told without asking them."""

import asyncio
from pathlib import Path

import httpx
from conftest import Json, Service, finished, launch_body, launched, local_pool, until

from app.api.auth import NOBODY
from app.engines import Engines
from app.errors import LaunchRejected
from app.launcher import LaunchSpec
from app.launchers.fake import FakeLauncher, FakeWorld
from app.main import create_app
from app.pools import Pool
from app.runner import Phase, Policy, Runner, identity
from app.settings import Settings


async def engines(client: httpx.AsyncClient) -> dict[str, Json]:
    answer = await client.get("/engines")
    assert answer.status_code == 200
    return {item["name"]: item for item in answer.json()["items"]}


async def test_a_local_engine_says_what_this_machine_can_do(client: httpx.AsyncClient, slot: Path) -> None:
    async def told() -> Json:
        details: Json = (await engines(client))["local-process"]["details"]
        return details

    details = await until(told)
    assert details["version"].startswith("Linux ")
    assert details["cpu_limits_by"] in {"cgroup2", "cgroup1", "none"}
    assert details["cores"] >= 1
    await finished(client, await launched(client, launch_body(slot)))
    local = (await engines(client))["local-process"]
    assert (local["pools"], local["answers"], local["problem"]) == (["local"], True, None)
    assert 0 <= local["age_seconds"] < 60
    assert local["answered_at"]
    text = (await client.get("/engines", headers={"Accept": "text/plain"})).text
    assert "details.cpu_limits_by:" in text
    assert "answers:" in text


async def test_an_engine_that_cannot_be_used_is_told_with_the_reason(service: Service) -> None:
    pools = {"local": local_pool(), "far": {"type": "docker", "config": {"docker_host": "unix:///no/such/socket"}}}
    async with service(pools) as client:

        async def problem() -> str:
            return (await engines(client))["docker:unix:///no/such/socket"]["problem"] or ""

        assert await until(problem)
        far = (await engines(client))["docker:unix:///no/such/socket"]
        assert (far["pools"], far["answers"]) == (["far"], False)


async def test_what_an_engine_said_stays_when_it_no_longer_answers(tmp_path: Path) -> None:
    """Behind the front door, because only the fake engine can be cut off."""
    world = FakeWorld()
    settings = Settings(state_dir=tmp_path / "state", pools_file=None, auth="off")
    app = create_app(settings, launchers=lambda _: FakeLauncher(world))
    async with app.router.lifespan_context(app):
        service = app.state.service
        pool = Pool.model_validate({"name": "p", "type": "docker", "config": {}})
        known = Engines(service._reconciler, lambda: {"p": pool})
        await known._ask(pool.engine)
        assert [(state.answers, dict(state.details)) for state in known.states()] == [
            (True, {"version": "fake", "runners": 0})
        ]
        with world.unavailable():
            await known._ask(pool.engine)
            (state,) = known.states()
        assert (state.answers, state.problem) == (False, "the fake engine does not answer")
        assert dict(state.details) == {"version": "fake", "runners": 0}
        await known._ask(pool.engine)
        assert known.states()[0].answers


async def test_a_read_asks_no_engine(tmp_path: Path) -> None:
    world = FakeWorld()
    (tmp_path / "pools.yaml").write_text("agent_pools: {p: {type: docker}}\n")
    settings = Settings(state_dir=tmp_path / "state", pools_file=tmp_path / "pools.yaml", auth="off")
    app = create_app(settings, launchers=lambda _: FakeLauncher(world))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client,
    ):
        await until(lambda: ("about", None) in world.calls)
        await asyncio.sleep(0.05)
        calls = len(world.calls)
        for path in ("/engines", "/pools", "/runners", "/readyz"):
            assert (await client.get(path)).status_code == 200
        assert len(world.calls) == calls


async def test_a_launcher_that_is_not_there_is_told(tmp_path: Path) -> None:
    def none(_: str) -> FakeLauncher:
        raise LaunchRejected("no launcher for this")

    (tmp_path / "pools.yaml").write_text("agent_pools: {p: {type: docker}}\n")
    settings = Settings(state_dir=tmp_path / "state", pools_file=tmp_path / "pools.yaml", auth="off")
    app = create_app(settings, launchers=none)
    async with app.router.lifespan_context(app):
        (state,) = await until(lambda: [each for each in app.state.service.engine_states(NOBODY) if each.problem])
        assert state.problem == "no launcher for this"


async def test_what_an_engine_holds_without_a_record_is_told_and_then_adopted(tmp_path: Path) -> None:
    """Behind the front door, because a database is not lost by it."""
    world = FakeWorld()
    pools = tmp_path / "pools.yaml"
    pools.write_text("agent_pools: {local: {type: local-process}}")
    settings = Settings(state_dir=tmp_path / "state", pools_file=pools, auth="off")
    app = create_app(settings, launchers=lambda _: FakeLauncher(world))
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080") as client:
            runner = stray("runner-00000000abcd")
            world.start(
                "fake", runner.runner_id, LaunchSpec(command=None, environment={}, context=b"", labels=identity(runner))
            )
            world.start("another", "runner-theirs", LaunchSpec(command=None, environment={}, context=b""))
            for wanted, known in (({"dry_run": "true"}, 404), ({}, 200)):
                swept = (await client.post("/engines/sweep", params=wanted)).json()
                (item,) = swept["items"]
                assert (item["runner_id"], item["fate"], item["engine"]) == (runner.runner_id, "adopt", "local-process")
                assert swept["problems"] == {}
                assert (await client.get(f"/runners/{runner.runner_id}")).status_code == known
            assert (await client.post("/engines/sweep")).json()["items"] == []


def stray(runner_id: str) -> Runner:
    return Runner(
        runner_id=runner_id,
        task_id="1",
        pool_name="local",
        slot_id="slot-1",
        engine="local-process",
        phase=Phase.RUNNING,
        created_at=0,
        launch_deadline=0,
        policy=Policy(),
    )
