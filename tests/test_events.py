"""Who hears of changes: listeners all of them, watchers the latest of one runner."""

import asyncio
from dataclasses import replace

from app.events import Change, Event, Feed
from app.runner import Phase, Policy, Runner

RUNNER = Runner(
    runner_id="runner-1",
    task_id="1",
    pool_name="local",
    slot_id="slot-1",
    engine="fake",
    phase=Phase.STARTING,
    created_at=0,
    launch_deadline=300,
    policy=Policy(),
)


def change(revision: int, runner_id: str = "runner-1") -> Change:
    event = Event(runner_id=runner_id, at=0, type="changed", from_phase=None, to_phase=Phase.STARTING, revision=revision)
    return Change(replace(RUNNER, runner_id=runner_id, revision=revision), event)


def test_a_listener_hears_every_change_in_order() -> None:
    feed = Feed()
    first: list[Change] = []
    second: list[Change] = []
    feed.listen(first.append)
    feed.publish([change(1), change(2)])
    feed.listen(second.append)
    feed.publish([change(3)])
    assert first == [change(1), change(2), change(3)]
    assert second == [change(3)]


async def test_a_watcher_waits_for_news_of_its_runner_alone() -> None:
    feed = Feed()
    with feed.watching("runner-1") as watch:
        waiting = asyncio.create_task(watch.change())
        feed.publish([change(1, "runner-2")])
        await asyncio.sleep(0)
        assert not waiting.done()
        feed.publish([change(2)])
        assert await waiting == change(2)


async def test_a_watcher_that_is_slow_is_given_the_latest_and_no_news_twice() -> None:
    feed = Feed()
    with feed.watching("runner-1") as watch:
        assert watch.latest is None
        feed.publish([change(1), change(2)])
        feed.publish([change(3)])
        assert await watch.change() == change(3)
        waiting = asyncio.create_task(watch.change())
        await asyncio.sleep(0)
        assert not waiting.done()
        feed.publish([change(4)])
        assert await waiting == change(4)
        assert watch.latest == change(4)


async def test_everyone_who_watches_a_runner_is_told() -> None:
    feed = Feed()
    with feed.watching("runner-1") as one, feed.watching("runner-1") as other:
        feed.publish([change(1)])
        assert await one.change() == await other.change() == change(1)


async def test_who_no_longer_watches_is_not_told_and_nothing_is_kept_of_it() -> None:
    feed = Feed()
    with feed.watching("runner-1") as one:
        with feed.watching("runner-1") as other:
            pass
        feed.publish([change(1)])
        assert other.latest is None
        assert one.latest == change(1)
    feed.publish([change(2)])
    assert one.latest == change(1)
    assert not feed._watches


async def test_news_between_watching_and_waiting_is_not_missed() -> None:
    feed = Feed()
    with feed.watching("runner-1") as watch:
        feed.publish([change(1)])
        await asyncio.sleep(0)
        async with asyncio.timeout(8):
            assert await watch.change() == change(1)
