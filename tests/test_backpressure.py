"""What is refused, or waits, so that neither a pool nor an engine that is away is asked for more than it can do."""

import time
from pathlib import Path

import pytest
from conftest import Json, finished, launch_body, launched, problem, until
from fake_service import FakeService, fake_service
from house import House, pool, simulated

from app.breaker import CLOSED, PAUSES, Breaker, silent
from app.errors import LauncherUnavailable, PoolFull
from app.reconciler import RESYNC_SECONDS
from app.runner import Phase

ENGINE = "local-process"

# The breaker alone.


def test_a_breaker_opens_when_two_signs_of_life_in_a_row_were_missed() -> None:
    once = silent(CLOSED, "refused", 10)
    twice = silent(once, "refused again", 11)
    assert not CLOSED.open
    assert not once.open
    assert (twice.open, twice.away_since, twice.problem) == (True, 11, "refused again")
    assert silent(twice, "still", 99).away_since == 11


def test_an_engine_that_is_away_is_asked_ever_more_slowly_and_never_given_up() -> None:
    breaker, pauses = CLOSED, []
    for second in range(50):
        breaker = silent(breaker, "refused", second)
        pauses.append(breaker.pause)
    assert pauses[0] == PAUSES[0]
    assert pauses == sorted(pauses)
    assert pauses[-1] == PAUSES[1]
    assert CLOSED.pause == 0


# The breaker of an engine.


def breaker_of(house: House) -> Breaker:
    return house.reconciler.breaker(ENGINE)


@simulated
async def test_a_launch_that_fails_opens_nothing_while_the_engine_gives_signs_of_life(house: House) -> None:
    house.world.fail_launches(LauncherUnavailable("the disk is full"), times=9)
    for _ in range(3):
        await house.launch()
    await house.advance(60)
    assert not breaker_of(house).missed


@simulated
async def test_a_doubt_opens_the_breaker_within_a_second_and_a_sign_of_life_closes_it(house: House) -> None:
    await house.launch()  # the engine is in use
    with house.world.unavailable():
        name = await house.launch(retry_attempts=99)
        await house.advance(1)
        assert breaker_of(house).open
        assert breaker_of(house).problem == "the fake engine does not answer"
        asked = len(house.world.calls)
        await house.advance(200)
        assert breaker_of(house).open
        assert len(house.world.calls) - asked < 300
    await house.advance(PAUSES[1] + 10)
    assert breaker_of(house) == CLOSED
    assert (await house.get(name)).phase is Phase.RUNNING


@simulated
async def test_an_engine_that_goes_away_unnoticed_is_found_by_the_next_look(house: House) -> None:
    await house.launch("after=900", "exit=0")
    with house.world.unavailable():
        await house.advance(RESYNC_SECONDS + 1)
        assert breaker_of(house).open


@simulated
async def test_who_waits_in_the_queue_is_not_sent_to_an_engine_that_is_away(house: House) -> None:
    house.pools = {"local": pool(places=1)}
    first = await house.launch()
    second = await house.launch()
    with house.world.unavailable():
        await house.advance(RESYNC_SECONDS + 1)
        await house.give_up(first)
        await house.advance(60)
        assert (await house.get(second)).phase is Phase.QUEUED
    await house.advance(PAUSES[1])
    runner = await house.get(second)
    assert (runner.phase, runner.attempts) == (Phase.RUNNING, ())


# Pools.


@simulated
async def test_launches_under_way_are_limited_and_the_next_begins_when_one_is_taken(house: House) -> None:
    house.pools = {"local": pool(launching_limit=2)}
    gate = house.world.hang_launches(2)
    for _ in range(2):
        await house.launch()
    waiting = await house.launch()
    with pytest.raises(PoolFull, match="has 2 launches under way, and its launching_limit is 2"):
        await house.launch(queue_limit=0, slot="another")
    assert (await house.store.usage())["local"].launching == 2
    assert (await house.get(waiting)).phase is Phase.QUEUED
    gate.set()
    await house.settle()
    assert (await house.get(waiting)).phase is Phase.RUNNING
    assert (await house.store.usage())["local"].launching == 0


@simulated
async def test_launches_begin_no_faster_than_the_rate_also_over_a_restart(house: House) -> None:
    house.pools = {"local": pool(places=99, launch_rate=2)}
    began = house.loop.now
    names = [await house.launch(queue_limit=99) for _ in range(9)]
    await house.advance(1.5)
    await house.restart()
    await house.advance(10)
    at = [(await house.get(name)).placed_at for name in names]
    assert [round(each - began) for each in at if each is not None] == [0, 0, 1, 1, 2, 2, 3, 3, 4]


@simulated
async def test_a_slow_rate_is_one_launch_in_so_many_seconds(house: House) -> None:
    house.pools = {"local": pool(launch_rate=0.1)}
    await house.launch()
    with pytest.raises(PoolFull, match=r"begins no launch in the next 10\.0 s, as its launch_rate has it") as refused:
        await house.launch(queue_limit=0)
    assert refused.value.retry_after == 10
    await house.advance(10)
    await house.launch(queue_limit=0)


# By the front door.


def fake_pool(**config: object) -> Json:
    return {"type": "local-process", "max_concurrency": 9, "config": {"command": ["fake"], **config}}


def body(service: FakeService, number: int) -> Json:
    return launch_body(service.slots / f"slot-{number}")


async def test_a_rate_is_told_with_when_to_come_again(tmp_path: Path) -> None:
    async with fake_service(tmp_path, {"local": fake_pool(launch_rate=0.05)}) as service:
        await launched(service.client, body(service, 1))
        answer = await service.client.post("/runners", json=body(service, 2))
        said = problem(answer, 429, "pool-full", words="as its launch_rate has it")
        assert said["retryable"] is True
        assert 10 < int(answer.headers["Retry-After"]) <= 25


async def test_an_engine_that_is_away_is_told_at_once_until_it_answers_again(tmp_path: Path) -> None:
    async with fake_service(tmp_path, {"local": fake_pool()}) as service:
        client = service.client
        live = await launched(client, body(service, 1), **{"Idempotency-Key": "first"})

        async def engine() -> Json:
            (found,) = (await client.get("/engines")).json()["items"]
            return dict(found)

        async def breaker_is(state: str) -> bool:
            return bool((await engine())["breaker"] == state)

        assert await breaker_is("closed")
        with service.worlds[ENGINE].unavailable():
            await client.post("/runners", json=body(service, 2))  # who finds out
            await until(lambda: breaker_is("open"))
            began = time.monotonic()
            answer = await client.post("/runners", json=body(service, 3))
            assert time.monotonic() - began < 1
            said = problem(answer, 503, "engine-unavailable", words="the fake engine does not answer")
            assert said["retryable"] is True
            assert said.get("runner") is None
            assert 1 <= int(answer.headers["Retry-After"]) <= 10
            again = await client.post("/runners", json=body(service, 1), headers={"Idempotency-Key": "first"})
            assert (again.status_code, again.json()["runner_id"]) == (200, live["runner_id"])
            dry = await client.post("/runners?dry_run=true", json=body(service, 3))
            assert "is away" in dry.json()["refusal"]
            told = await engine()
            assert (told["answers"], told["problem"]) == (False, "the fake engine does not answer")
            assert told["away_since"]
            assert (await client.get("/readyz", params={"engine": ENGINE})).status_code == 503
            assert (await client.get("/readyz")).status_code == 200
            why = (await client.get(f"/runners/{live['runner_id']}/diagnosis")).json()
            assert "does not answer" in why["likely_cause"]
            assert f'runner_launcher_engine_breaker_open{{engine="{ENGINE}"}} 1.0' in (await client.get("/metrics")).text
        await until(lambda: breaker_is("closed"))
        await launched(client, body(service, 3))
        assert f'runner_launcher_engine_breaker_open{{engine="{ENGINE}"}} 0.0' in (await client.get("/metrics")).text
        service.worlds[ENGINE].finish(live["runner_id"])
        assert (await finished(client, live))["state"] == "completed"
