"""Each promise of the work queue."""

import asyncio
from collections import Counter

from app.work_queue import WorkQueue

LATER, NEVER = 0.01, 600.0


async def taken(queue: WorkQueue) -> str | None:
    """Take a name if there is one now."""
    taking = asyncio.ensure_future(queue.get())
    for _ in range(5):
        await asyncio.sleep(0)
    if not taking.done():
        taking.cancel()
        await asyncio.wait([taking])
        return None
    return taking.result()


async def handled(queue: WorkQueue) -> str | None:
    """Take a name if there is one now, and say at once that it is done."""
    name = await taken(queue)
    if name is not None:
        queue.done(name)
    return name


async def test_names_are_handed_out_in_the_order_they_were_added() -> None:
    queue = WorkQueue()
    for name in "cab":
        queue.add(name)
    assert [await handled(queue) for _ in range(4)] == ["c", "a", "b", None]


async def test_a_name_added_twice_is_handed_out_once() -> None:
    queue = WorkQueue()
    for name in "abaa":
        queue.add(name)
    assert [await handled(queue) for _ in range(3)] == ["a", "b", None]


async def test_a_name_added_while_it_is_handled_is_handed_out_again_afterwards_and_once() -> None:
    queue = WorkQueue()
    queue.add("a")
    assert await taken(queue) == "a"
    queue.add("a")
    queue.add("a")
    assert await taken(queue) is None
    queue.done("a")
    assert [await handled(queue) for _ in range(2)] == ["a", None]


async def test_a_name_that_was_handled_may_come_again() -> None:
    queue = WorkQueue()
    for _ in range(3):
        queue.add("a")
        assert await handled(queue) == "a"


async def test_a_name_is_never_handled_by_two_at_once() -> None:
    queue = WorkQueue()
    busy: set[str] = set()
    seen = Counter[str]()

    async def work() -> None:
        while True:
            name = await queue.get()
            assert name not in busy
            busy.add(name)
            await asyncio.sleep(0)
            busy.discard(name)
            seen[name] += 1
            queue.done(name)

    workers = [asyncio.create_task(work()) for _ in range(8)]
    for number in range(200):
        queue.add("abc"[number % 3])
        if number % 4 == 0:
            await asyncio.sleep(0)
    await asyncio.sleep(LATER)
    for worker in workers:
        worker.cancel()
    ends = await asyncio.gather(*workers, return_exceptions=True)
    assert {type(end) for end in ends} == {asyncio.CancelledError}
    assert set(seen) == set("abc")
    assert min(seen.values()) > 5


async def test_who_waits_is_woken_by_the_next_name_and_each_name_wakes_one() -> None:
    queue = WorkQueue()
    waiting = [asyncio.create_task(queue.get()) for _ in range(3)]
    await asyncio.sleep(0)
    queue.add("a")
    queue.add("b")
    done, pending = await asyncio.wait(waiting, timeout=LATER)
    assert sorted(task.result() for task in done) == ["a", "b"]
    for task in pending:
        task.cancel()
    await asyncio.wait(pending)


async def test_a_name_is_not_lost_when_who_waited_for_it_goes_away() -> None:
    queue = WorkQueue()
    waiting = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    queue.add("a")
    waiting.cancel()
    await asyncio.wait([waiting])
    assert await handled(queue) == "a"


async def test_a_name_wished_for_later_comes_later() -> None:
    queue = WorkQueue()
    queue.add_after("a", LATER)
    queue.add_after("b", NEVER)
    await asyncio.sleep(2 * LATER)
    assert [await handled(queue) for _ in range(2)] == ["a", None]
    queue.close()


async def test_a_time_that_is_past_is_now() -> None:
    queue = WorkQueue()
    queue.add_after("a", -5)
    await asyncio.sleep(0)
    assert await handled(queue) == "a"


async def test_a_later_wish_takes_the_place_of_an_earlier_one_whether_sooner_or_later() -> None:
    queue = WorkQueue()
    queue.add_after("sooner", NEVER)
    queue.add_after("sooner", LATER)
    queue.add_after("later", LATER)
    queue.add_after("later", NEVER)
    await asyncio.sleep(2 * LATER)
    assert [await handled(queue) for _ in range(2)] == ["sooner", None]
    queue.close()


async def test_a_wish_for_some_time_at_the_latest_puts_nothing_off() -> None:
    queue = WorkQueue()
    queue.add_after("sooner", LATER)
    queue.add_by("sooner", NEVER)
    queue.add_after("later", NEVER)
    queue.add_by("later", 1.5 * LATER)
    queue.add_by("only", 1.8 * LATER)
    await asyncio.sleep(3 * LATER)
    assert [await handled(queue) for _ in range(4)] == ["sooner", "later", "only", None]


async def test_a_name_wished_for_now_needs_no_later() -> None:
    queue = WorkQueue()
    queue.add_after("a", LATER)
    queue.add("a")
    assert await handled(queue) == "a"
    await asyncio.sleep(2 * LATER)
    assert await taken(queue) is None


async def test_a_wish_for_later_does_not_put_off_one_for_now() -> None:
    queue = WorkQueue()
    queue.add("a")
    queue.add_after("a", NEVER)
    assert await taken(queue) == "a"
    queue.add("a")
    queue.add_after("a", NEVER)
    queue.done("a")
    assert await handled(queue) == "a"


async def test_a_wish_for_later_made_while_handling_counts_from_then() -> None:
    queue = WorkQueue()
    queue.add("a")
    assert await taken(queue) == "a"
    queue.add_after("a", NEVER)
    queue.done("a")
    assert await taken(queue) is None
    queue.add_after("a", LATER)
    await asyncio.sleep(2 * LATER)
    assert await handled(queue) == "a"


async def test_a_time_that_comes_while_the_name_is_handled_waits_for_the_handling() -> None:
    queue = WorkQueue()
    queue.add("a")
    assert await taken(queue) == "a"
    queue.add_after("a", LATER / 2)
    await asyncio.sleep(LATER)
    assert await taken(queue) is None
    queue.done("a")
    assert [await handled(queue) for _ in range(2)] == ["a", None]


async def test_closing_forgets_what_was_to_come_later() -> None:
    queue = WorkQueue()
    queue.add_after("a", LATER)
    queue.close()
    queue.close()
    await asyncio.sleep(2 * LATER)
    assert await taken(queue) is None


async def test_nothing_is_kept_of_names_that_were_handled() -> None:
    queue = WorkQueue()
    for number in range(100):
        queue.add(str(number))
        queue.add_after(f"later {number}", 0)
    await asyncio.sleep(LATER)
    while await handled(queue):
        pass
    assert not any((queue._ready, queue._handling, queue._again, queue._later))
