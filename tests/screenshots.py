"""Take the pictures of docs/screenshots anew: the status page on a desktop and a phone, light and dark, idle and busy.

python tests/screenshots.py [DIRECTORY]
"""

import asyncio
import itertools
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

from fake_service import FakeService, fake_service
from playwright.async_api import Browser, Page, ViewportSize, async_playwright

from app.launcher import Exit

CHROMIUM = "/usr/bin/chromium"
DESKTOP: ViewportSize = {"width": 1440, "height": 900}
PHONE: ViewportSize = {"width": 390, "height": 844}
Scheme = Literal["light", "dark"]

POOLS = {
    "local": {
        "type": "local-process",
        "max_concurrency": 60,
        "cpu_quota": 1,
        "memory_quota": 512,
        "config": {"command": ["fake"]},
    },
    "docker": {
        "type": "docker",
        "max_concurrency": 80,
        "cpu_quota": 2,
        "memory_quota": 2048,
        "config": {"image": "registry.example.org/agent:3", "command": ["fake"]},
    },
    "cluster": {
        "type": "kubernetes",
        "max_concurrency": 60,
        "config": {"image": "registry.example.org/agent:3", "command": ["fake"], "queue_limit": 40},
    },
    "nightly": {
        "type": "docker",
        "max_concurrency": 8,
        "enabled": False,
        "config": {"docker_host": "tcp://builder:2376", "user": "1000"},
    },
}
WORK = (
    "add-greeting",
    "fix-login-redirect",
    "upgrade-orm",
    "split-invoice-service",
    "retry-webhooks",
    "tidy-settings",
    "index-search",
)
LOG = """\
Reading the task: Split the invoice service
Branch agent/split-invoice-service from main at 4be1d09
Read 214 files, 31 of them about invoices
Plan: 1. move the model  2. move its routes  3. leave an adapter behind  4. test both
[1/4] app/invoices/model.py: 182 lines moved, imports mended in 9 files
[2/4] app/invoices/routes.py: 6 routes moved
      pytest tests/invoices -q ................................ 32 passed in 4.1s
[3/4] app/billing/adapter.py written
      pytest -q .............................................................. 418 passed in 61.9s
[4/4] writing tests/test_billing_adapter.py
"""


async def take(directory: Path) -> None:
    """Take all pictures."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as home:
        async with fake_service(Path(home), POOLS) as service, async_playwright() as playwright:
            browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            async with opened(browser, service, "light", DESKTOP, token=False) as page:
                await shoot(page, directory / "token.png")
            async with opened(browser, service, "light", DESKTOP) as page:
                await shoot(page, directory / "idle-desktop-light.png")
            async with opened(browser, service, "dark", PHONE) as page:
                await shoot(page, directory / "idle-phone-dark.png")
            failed, running = await busy(service)
            for scheme in ("light", "dark"):
                async with opened(browser, service, scheme, DESKTOP, at=f"runners/{running}") as page:
                    await page.get_by_text("writing tests/test_billing_adapter.py").wait_for()
                    await shoot(page, directory / f"busy-desktop-{scheme}.png")
            async with opened(browser, service, "light", DESKTOP) as page:
                await shoot(page, directory / "list-desktop-light.png")
            async with opened(browser, service, "light", PHONE) as page:
                await shoot(page, directory / "busy-phone-light.png")
            async with opened(browser, service, "dark", PHONE, at=f"runners/{failed}") as page:
                await page.get_by_text("What happened").wait_for()
                await shoot(page, directory / "failed-phone-dark.png")
            await browser.close()


@asynccontextmanager
async def opened(
    browser: Browser,
    service: FakeService,
    scheme: Scheme,
    size: ViewportSize,
    *,
    at: str = "",
    token: bool = True,
) -> AsyncIterator[Page]:
    """Open the page as somebody who has given a token."""
    phone = size is PHONE
    context = await browser.new_context(color_scheme=scheme, viewport=size, is_mobile=phone, has_touch=phone, locale="en-GB")
    page = await context.new_page()
    await page.goto(f"{service.url}/#/{at}")
    if token:
        await page.get_by_label("Token").fill(service.token)
        await page.get_by_role("button", name="Show runners").click()
        await page.get_by_text("Live", exact=True).first.wait_for()
    yield page
    await context.close()


async def shoot(page: Page, file: Path) -> None:
    """Take a picture once everything has come to rest."""
    await page.mouse.move(0, 0)
    await page.wait_for_timeout(800)
    await page.screenshot(path=file, animations="disabled")
    sys.stdout.write(f"{file}: {file.stat().st_size // 1024} KiB\n")


async def busy(service: FakeService) -> tuple[str, str]:
    """Let 200 runners live, and some have ended; give one that failed and one that writes a log."""
    names = (f"{work}-{number}" for number in itertools.count(101) for work in (WORK[number % len(WORK)],))
    ends = [
        Exit(code=0),
        Exit(code=0),
        Exit(code=1),
        Exit(signal="SIGKILL", oom_killed=True),
        Exit(code=0),
        Exit(signal="SIGSEGV"),
    ]
    for end in ends * 4:
        ended = await service.launch("local", next(names))
        await service.runs(ended)
        service.world(ended).happen(ended, b"Reading the task\nTraceback (most recent call last):\nValueError: no plan\n")
        service.world(ended).happen(ended, end)
    for pool in ["local"] * 52 + ["docker"] * 72 + ["cluster"] * 60:
        await service.launch(pool, next(names), metadata={"spec_name": "billing"})
    for _ in range(9):
        await service.launch("cluster", next(names))
    docker = next(
        world for engine, world in service.worlds.items() if engine.startswith("docker") and "builder" not in engine
    )
    docker.hang_launches(6)
    docker.progress = ["pulling registry.example.org/agent:3, 61 %"]
    for _ in range(6):
        await service.launch("docker", next(names))
    await asyncio.sleep(1)
    docker.progress = []
    failed = await service.launch("local", next(names))
    running = await service.launch("docker", "split-invoice-service")
    await service.runs(failed, running)
    service.world(running).happen(running, LOG.encode())
    service.world(failed).happen(failed, b"Reading the task\nBuilding the index of 48,211 files\n")
    service.world(failed).happen(failed, Exit(signal="SIGKILL", oom_killed=True))
    await asyncio.sleep(2)
    return failed, running


if __name__ == "__main__":
    asyncio.run(take(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/screenshots")))
