"""Figures of the status page with many runners: how long a real Chromium is busy with it.

    python tests/bench/page.py [--runners 5000] [--burst 2000]

A task of the page's thread beyond 50 ms can be felt. What is told of each step: how many such tasks there were, the longest
of them, and for how long a page that asks for a frame every 16 ms got none, all by the clock; and the longest task by the
processor's time alone, which says what it takes on a machine with nothing else to do. The service shares this machine's
processors, and its runners are only in memory.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from fake_service import FakeService, fake_service
from playwright.async_api import Browser, Page, async_playwright, expect

expect.set_options(timeout=120_000)
AT_ONCE = 32
CHROMIUM = "/usr/bin/chromium"
POOL = {"type": "local-process", "max_concurrency": 100_000, "config": {"command": ["fake"]}}
WATCH = """
    window.tasks = []; window.gap = 0; let last = performance.now();
    const note = (list) => tasks.push(...list.getEntries().map((each) => each.duration));
    new PerformanceObserver(note).observe({type: "longtask"});
    (function frame(now) { if (now) { gap = Math.max(gap, now - last); last = now; } requestAnimationFrame(frame); })();
"""


@asynccontextmanager
async def step(browser: Browser, page: Page, what: str) -> AsyncIterator[None]:
    """Print what the page's thread did meanwhile."""
    await page.evaluate("tasks = []; gap = 0")
    await browser.start_tracing(page=page, categories=["toplevel"])
    begun = time.monotonic()
    yield
    took = time.monotonic() - begun
    by_processor = longest(json.loads(await browser.stop_tracing()))
    tasks, gap = await page.evaluate("[tasks, gap]")
    print(
        f"{what:<28} {took:6.2f} s   beyond 50 ms: {len(tasks):3}   longest {max(tasks, default=0):4.0f} ms   "
        f"without a frame {gap:4.0f} ms   longest by processor {by_processor:4.0f} ms   load {os.getloadavg()[0]:.1f}",
        flush=True,
    )


def longest(trace: dict[str, list[dict[str, Any]]]) -> float:
    """Find the longest task of any page's thread, in milliseconds of processor."""
    events = trace["traceEvents"]
    main = {(each["pid"], each["tid"]) for each in events if each.get("args", {}).get("name") == "CrRendererMain"}
    return max((each.get("tdur", 0) for each in events if (each["pid"], each["tid"]) in main), default=0) / 1000


async def measure(service: FakeService, runners: int, burst: int) -> None:
    """Let runners live, show them, let some end at once, find one, turn a page."""
    ids: list[str] = []
    places = asyncio.Semaphore(AT_ONCE)

    async def launch(number: int) -> None:
        async with places:
            ids.append(await service.launch("local", f"task-{number}"))

    await asyncio.gather(*(launch(number) for number in range(runners)))
    await service.runs(*ids)
    print(f"{runners} runners launched", flush=True)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = await browser.new_page(viewport={"width": 1440, "height": 900})
        page.set_default_timeout(120_000)
        await page.add_init_script(WATCH)
        await page.goto(service.url)
        await page.get_by_label("Token").fill(service.token)
        async with step(browser, page, f"{runners} live runners read"):
            await page.get_by_role("button", name="Show runners").click()
            await expect(page).to_have_title(f"{runners} live · Runner Launcher")
        async with step(browser, page, f"{burst} of them ended at once"):
            for runner in ids[:burst]:
                service.world(runner).finish(runner)
            await expect(page).to_have_title(f"{runners - burst} live · Runner Launcher")
        async with step(browser, page, "one found by typing its task"):
            await page.get_by_label("Filter by text").press_sequentially(f"task-{runners - 1}")
            await expect(page.locator("#rows li")).to_have_count(1)
        await page.get_by_label("Filter by text").fill("")
        await expect(page.locator("#rows li")).to_have_count(100)
        async with step(browser, page, "five pages turned"):
            for _ in range(5):
                await page.get_by_role("button", name="Next").click()
            await expect(page.locator("#range")).to_contain_text("501")
        await browser.close()


async def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runners", type=int, default=5000, help="at least 1,000")
    parser.add_argument("--burst", type=int, default=2000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        async with fake_service(Path(home), {"local": POOL}) as service:
            await measure(service, options.runners, options.burst)


if __name__ == "__main__":
    asyncio.run(main())
