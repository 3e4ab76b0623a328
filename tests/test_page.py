"""The status page, in a real browser, before the real service."""

import re
import shutil
import sqlite3
from collections.abc import AsyncIterator
from importlib import resources
from pathlib import Path
from typing import Literal

import httpx
import pytest
from conftest import Json, Serve, Served, finished, launch_body, launched, local_pool, until
from engines import missing
from fake_service import fake_service
from playwright.async_api import Browser, Page, async_playwright, expect
from test_tokens import entry, write

from app.api.page import FILES, POLICY
from app.launcher import Exit

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = '<img src=x onerror="document.title=1">'
AXE = resources.files("axe_playwright_python").joinpath("axe.min.js").read_text()
MILLISECONDS = 30_000
"""How long a test waits for what should come at once, on a machine that may be busy."""

expect.set_options(timeout=MILLISECONDS)


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    if CHROMIUM is None:
        missing("browser", "there is no Chromium here: no program named chromium, chromium-browser or google-chrome")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=90_000)
        yield browser
        await browser.close()


@pytest.fixture
async def page(browser: Browser) -> AsyncIterator[Page]:
    """A page that must not break its own policy, nor show anyone a token in an address."""
    page = await browser.new_page()
    page.set_default_timeout(MILLISECONDS)
    broken: list[str] = []
    asked: list[str] = []
    page.on("console", lambda said: broken.append(said.text) if "Content Security Policy" in said.text else None)
    page.on("pageerror", lambda error: broken.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    yield page
    token = await page.evaluate("sessionStorage.getItem('runner-launcher-token')")
    assert not broken
    assert not [url for url in [*asked, page.url] if token and token in url]
    assert {httpx.URL(url).host for url in asked} == {"127.0.0.1"}


async def enter(page: Page, url: str, token: str, at: str = "") -> None:
    """Open the page and give it a token."""
    await page.goto(f"{url}/#/{at}")
    await page.get_by_label("Token").fill(token)
    await page.get_by_role("button", name="Show runners").click()


async def entered(page: Page, served: Served, at: str = "") -> None:
    await enter(page, served.url, served.token, at)
    await expect(page.locator("#connection")).to_have_text("Live")


# Its files.


async def test_its_files_are_whole_and_asked_for_anew_only_when_they_changed(client: httpx.AsyncClient) -> None:
    nobody = {"Authorization": ""}
    for path, (_, media_type) in FILES.items():
        answer = await client.get(path, headers=nobody)
        assert (answer.status_code, answer.headers["Content-Type"]) == (200, media_type)
        assert answer.headers["Content-Security-Policy"] == POLICY
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        known = await client.get(path, headers={**nobody, "If-None-Match": answer.headers["ETag"]})
        assert (known.status_code, known.content) == (304, b"")
        assert (await client.post(path, json={})).status_code == 405


@pytest.mark.parametrize("words", ["default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"])
def test_its_policy_lets_nothing_else_run(words: str) -> None:
    assert words in POLICY.split("; ")
    assert "unsafe" not in POLICY


# What it shows.


async def test_a_launch_its_log_and_its_stop_are_seen_as_they_happen(serve: Serve, page: Page, tmp_path: Path) -> None:
    script = f"echo '{EVIL}'; echo ready; trap 'echo going; exit 3' TERM; while :; do sleep 0.1; done"
    async with serve() as served, served.client() as client:
        await entered(page, served)
        await expect(page.get_by_text("No runners yet.")).to_be_visible()
        runner = await launched(client, launch_body(tmp_path / "slots" / "a", script, id=EVIL))
        row = page.get_by_role("link", name=EVIL)
        await expect(row).to_contain_text("Running")
        await expect(page.get_by_role("button", name="local")).to_contain_text("1 / 8")
        await row.press("Enter")
        await expect(page.get_by_role("heading", name=f"Task {EVIL}")).to_be_focused()
        log = page.get_by_role("region", name="Log")
        await expect(log).to_contain_text(f"{EVIL}\nready")
        await expect(page.locator("#timeline")).to_contain_text("Started")
        await page.get_by_role("button", name="Stop…").press("Enter")
        dialog = page.get_by_role("dialog", name="Stop this runner?")
        await page.keyboard.press("Escape")
        await expect(dialog).to_be_hidden()
        assert (await client.get(f"/runners/{runner['runner_id']}")).json()["phase"] == "running"
        await page.get_by_role("button", name="Stop…").press("Enter")
        await dialog.get_by_label("Seconds to end by itself").fill("20")
        await dialog.get_by_role("button", name="Stop it").press("Enter")
        await expect(row).to_contain_text("Failed")
        await expect(log).to_contain_text(re.compile(r"going\n\[runner-\w+ failed: cancelled"))
        await expect(page.locator("#cause")).to_contain_text("Somebody asked for its end")
        await expect(page.get_by_role("button", name="Stop…")).to_be_hidden()
        assert await page.title() == "0 live · Runner Launcher"
        assert await page.locator("img[src=x]").count() == 0
        await page.reload()
        await expect(page.get_by_role("heading", name=f"Task {EVIL}")).to_be_visible()
        await expect(log).to_contain_text("going")


async def test_runners_are_found_by_state_pool_and_words(serve: Serve, page: Page, tmp_path: Path) -> None:
    slots = tmp_path / "slots"
    async with serve({"local": local_pool(), "other": local_pool()}) as served, served.client() as client:
        bodies = [launch_body(slots / "a", "exit 3", id="red"), launch_body(slots / "b", id="green", pool="other")]
        for body in bodies:
            await finished(client, await launched(client, body))
        await launched(client, launch_body(slots / "c", "sleep 1000", id="blue"))
        await entered(page, served)
        rows = page.get_by_role("region", name="Runners").get_by_role("listitem")
        await expect(rows).to_have_count(3)
        await expect(rows.first).to_contain_text("blue")
        await page.get_by_role("radio", name="Failed").check()
        await expect(rows).to_have_text([re.compile("red.*Exit nonzero: exited with code 3")])
        await page.get_by_role("radio", name="All").check()
        await page.get_by_role("button", name="other").click()
        await expect(rows).to_have_text([re.compile("green")])
        await page.get_by_label("Filter by text").fill("nothing like it")
        await expect(page.get_by_text("No runner matches the filter.")).to_be_visible()
        await page.get_by_role("button", name="Clear the filter").click()
        await page.get_by_label("Filter by text").fill("BLUE")
        await page.get_by_role("radio", name="Live").check()
        await expect(rows).to_have_text([re.compile("blue")])
        await page.reload()
        await expect(rows).to_have_text([re.compile("blue")])


async def test_it_says_that_the_service_is_away_and_goes_on_where_it_was(serve: Serve, page: Page, tmp_path: Path) -> None:
    slot = tmp_path / "slots" / "a"
    async with serve(leave_runners=True) as served, served.client() as client:
        await entered(page, served)
        await launched(client, launch_body(slot, "until [ -e go ]; do sleep 0.05; done"))
        await expect(page.get_by_role("link", name="Running")).to_be_visible()
        await served.end()
        await expect(page.locator("#connection")).to_have_text("Not connected")
        await expect(page.get_by_role("alert")).to_contain_text("What you see may be out of date. Trying again in")
    (slot / "go").touch()
    async with serve(LISTEN=served.url.removeprefix("http://")):
        await page.evaluate("dispatchEvent(new Event('online'))")  # rather than wait for its patience to end
        await expect(page.locator("#connection")).to_have_text("Live")
        await expect(page.get_by_role("link", name="Completed")).to_be_visible()
        await expect(page.get_by_role("alert")).to_be_hidden()


async def test_it_reads_all_anew_when_the_history_does_not_reach_back(serve: Serve, page: Page, tmp_path: Path) -> None:
    slots = tmp_path / "slots"
    async with serve() as served, served.client() as client:
        await entered(page, served)
        await finished(client, await launched(client, launch_body(slots / "a", id="old")))
        await expect(page.get_by_role("link", name="old")).to_contain_text("Completed")
        await served.end()
        await expect(page.locator("#connection")).to_have_text("Not connected")
    with sqlite3.connect(tmp_path / "state" / "runners.db") as store:  # as if it had been lost, and made anew
        store.execute("delete from events")
        store.execute("delete from runners")
    async with serve(LISTEN=served.url.removeprefix("http://")) as served, served.client() as client:
        await finished(client, await launched(client, launch_body(slots / "b", id="new")))
        await page.evaluate("dispatchEvent(new Event('online'))")  # rather than wait for its patience to end
        await expect(page.get_by_role("link", name="new")).to_contain_text("Completed")


async def test_what_the_service_has_forgotten_goes_from_an_open_page(serve: Serve, page: Page, tmp_path: Path) -> None:
    slots = tmp_path / "slots"
    async with serve(RETENTION_DAYS=f"{1e-9}") as served, served.client() as client:
        await entered(page, served)
        live = await launched(client, launch_body(slots / "live", "sleep 1000", id="live"))
        for name in ("seen", "looked-at"):
            await finished(client, await launched(client, launch_body(slots / name, id=name)))
            await expect(page.get_by_role("link", name=name)).to_contain_text("Completed")
        await page.get_by_role("link", name="looked-at").click()
        await expect(page.locator("#log-state")).to_have_text("complete")

        async def forgotten() -> bool:
            await client.post("/retention")
            return len((await client.get("/runners")).json()["items"]) == 1

        await until(forgotten)
        await expect(page.locator("#rows li")).to_have_count(3)
        await page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")  # rather than wait for a minute
        await expect(page.locator("#rows li")).to_have_count(1)
        await expect(page.get_by_role("link", name="live")).to_contain_text("Running")
        await client.delete(live["links"]["self"], params={"grace": "0"})
        await expect(page.get_by_role("link", name="live")).to_contain_text("Failed")


# Who may see it.


async def test_a_token_that_will_not_do_is_told_plainly(serve: Serve, page: Page, tmp_path: Path) -> None:
    file = write(
        tmp_path / "tokens.yaml", entry("reader", "read"), entry("launcher", "launch"), entry("late", expires="2020-01-01")
    )
    async with serve(TOKENS_FILE=str(file)) as served, served.client() as client:
        for token, words in (("guessed", "not known"), ("late", "has expired"), ("launcher", "read")):
            await enter(page, served.url, token)
            await expect(page.get_by_role("alert")).to_contain_text(words)
        runner = await launched(client, launch_body(tmp_path / "slots" / "a", "sleep 1000"))
        await enter(page, served.url, "reader", f"runners/{runner['runner_id']}")
        await page.get_by_role("button", name="Stop…").click()
        await page.get_by_role("button", name="Stop it").click()
        await expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text("stop")
        await page.get_by_role("button", name="Keep it running").click()
        write(file, entry("somebody-else"))
        await launched(client, launch_body(tmp_path / "slots" / "b"))
        await until(lambda: page.get_by_role("alert").is_visible())
        await expect(page.get_by_role("alert")).to_contain_text("not known")
        assert await page.evaluate("sessionStorage.length") == 0


async def test_no_token_is_asked_for_where_none_is_needed(serve: Serve, page: Page, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "token").write_text("unused")
    async with serve(AUTH="off") as served:
        await page.goto(served.url)
        await expect(page.get_by_text("No runners yet.")).to_be_visible()
        await expect(page.get_by_role("button", name="Forget token")).to_be_hidden()


# Who can read it.

WAITING: Json = {"type": "local-process", "max_concurrency": 2, "config": {"command": ["fake"]}}
RUNNING: Json = {"type": "docker", "max_concurrency": 2, "config": {"image": "agent", "command": ["fake"]}}


async def judged(page: Page) -> None:
    """Let axe-core look at the page as it is now, and see that nothing of it lies beyond the screen's edge."""
    await page.evaluate(AXE)
    found = (await page.evaluate("axe.run()"))["violations"]
    assert not found, [(each["id"], [node["html"] for node in each["nodes"]][:3]) for each in found]
    assert await page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_it_is_accessible_and_fits_a_phone(browser: Browser, tmp_path: Path, scheme: Literal["light", "dark"]) -> None:
    async with fake_service(tmp_path, {"waiting": WAITING, "running": RUNNING}) as service:
        page = await browser.new_page(color_scheme=scheme, viewport={"width": 390, "height": 844}, reduced_motion="reduce")
        await page.goto(service.url)
        await expect(page.get_by_label("Token")).to_be_focused()
        await judged(page)
        await enter(page, service.url, "guessed")
        await expect(page.get_by_role("alert")).to_be_visible()
        await judged(page)
        service.worlds["local-process"].hang_launches()
        service.worlds["local-process"].progress = ["pulling the image, 61 %"]
        starting = await service.launch("waiting", "x" * 80)
        failed, running = await service.launch("running", "b"), await service.launch("running", "c")
        await service.runs(failed, running)
        service.world(failed).happen(failed, Exit(signal="SIGKILL", oom_killed=True))
        await enter(page, service.url, service.token)
        await expect(page.get_by_role("link", name="Starting")).to_contain_text("Pulling the image, 61 %")
        await expect(page.get_by_role("link", name="Failed")).to_contain_text("Out of memory")
        with service.world(running).unavailable("no route to it"):
            service.ahead[0] += 60
            await page.reload()
            await expect(page.get_by_role("alert")).to_contain_text("does not answer")
            await expect(page.get_by_role("link", name="Running c")).to_contain_text("May be out of date")
            await judged(page)
        for id_ in (failed, starting, running):
            await page.goto(f"{service.url}/#/runners/{id_}")
            await expect(page.locator("#timeline")).to_contain_text("Accepted")
            await judged(page)
        await page.get_by_role("button", name="Stop…").click()
        await expect(page.get_by_role("dialog")).to_be_visible()
        await judged(page)
        await page.close()
