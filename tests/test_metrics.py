"""Figures for Prometheus, over HTTP, as a scraper reads them."""

from pathlib import Path

import httpx
import pytest
from conftest import Json, Serve, Service, finished, launch_body, launched, local_pool, problem, record_of, until
from prometheus_client.parser import text_string_to_metric_families

FOREVER = "sleep 1000"
Figures = dict[tuple[str, tuple[tuple[str, str], ...]], float]


async def scraped(client: httpx.AsyncClient) -> Figures:
    answer = await client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("text/plain; version=")
    families = list(text_string_to_metric_families(answer.text))
    assert all(family.documentation for family in families)
    return {
        (sample.name.removeprefix("runner_launcher_"), tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def of(figures: Figures, name: str, **labels: str) -> float | None:
    return figures.get((name, tuple(sorted(labels.items()))))


async def is_running(client: httpx.AsyncClient, runner: Json) -> bool:
    return bool((await record_of(client, runner))["phase"] == "running")


async def test_launches_and_ends_are_counted_and_timed(service: Service, slot: Path) -> None:
    pools = {"local": local_pool(quotas={"memory_quota": 64}), "broken": local_pool(command=["no-such-command"])}
    async with service(pools) as client:
        await finished(client, await launched(client, launch_body(slot)))
        await finished(client, await launched(client, launch_body(slot, "exit 3")))
        problem(await client.post("/runners", json=launch_body(slot, pool="broken")), 422, "launch-rejected")
        live = await launched(client, launch_body(slot, FOREVER))
        await until(lambda: is_running(client, live))
        figures = await scraped(client)
        assert of(figures, "launches_total", pool="local", outcome="started", reason="") == 3
        assert of(figures, "launches_total", pool="broken", outcome="failed", reason="launch_rejected") == 1
        assert of(figures, "ends_total", pool="local", state="completed", reason="") == 1
        assert of(figures, "ends_total", pool="local", state="failed", reason="exit_nonzero") == 1
        assert of(figures, "launch_seconds_count", pool="local") == 3
        assert of(figures, "end_detection_seconds_count", pool="local") == 2
        assert of(figures, "pool_runners", pool="local") == 1
        assert of(figures, "pool_memory_mib", pool="local") == 64
        assert of(figures, "pool_max_concurrency", pool="local") == 8
        assert of(figures, "pool_enabled", pool="local") == 1
        assert of(figures, "pool_queued", pool="local") == 0
        assert of(figures, "engine_answers", engine="local-process") == 1
        age = of(figures, "engine_answer_age_seconds", engine="local-process")
        assert age is not None
        assert 0 <= age < 60
        assert 0 <= (of(figures, "engine_watch_age_seconds", engine="local-process") or 0) < 60
        assert (of(figures, "process_resident_memory_bytes") or 0) > 1
        assert of(figures, "revision") == (await client.get("/events", params={"limit": 500})).json()["revision"]
        assert of(figures, "event_lag_seconds_count") == of(figures, "revision")
        await client.delete(live["links"]["self"])


async def test_pools_that_come_with_a_request_share_a_name(service: Service, slot: Path) -> None:
    async with service(allow_inline_pools=True) as client:
        for name in ("a", "b"):
            pool = {"name": name, "type": "local-process"}
            answer = await client.post("/runners", json=launch_body(slot.with_name(name), pool=pool))
            assert answer.status_code in {201, 422}
        figures = await scraped(client)
        assert not [labels for _, labels in figures if ("pool", "a") in labels]
        assert [labels for _, labels in figures if ("pool", "(inline)") in labels]


async def test_open_streams_are_counted(serve: Serve) -> None:
    async with serve() as running, running.client() as client:

        async def open_streams(count: int) -> bool:
            return of(await scraped(client), "event_streams") == count

        async with client.stream("GET", "/events", headers={"Accept": "text/event-stream"}):
            await until(lambda: open_streams(1))
        await until(lambda: open_streams(0))


@pytest.mark.parametrize("version", ["abc", "1.x", "0.0.4", "1.0.0", ""])
async def test_a_scraper_may_name_any_version(client: httpx.AsyncClient, version: str) -> None:
    answer = await client.get("/metrics", headers={"Accept": f"application/openmetrics-text; version={version}"})
    assert answer.status_code == 200
    assert "runner_launcher_tasks" in answer.text
