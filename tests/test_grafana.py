"""The Grafana dashboard asks for figures that the service really has, by labels that they really bear."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Service, finished, launch_body, launched, local_pool, until
from prometheus_client.parser import text_string_to_metric_families

FILE = Path(__file__).parents[1] / "deploy" / "grafana" / "runner-launcher.json"
DASHBOARD: dict[str, Any] = json.loads(FILE.read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
ASKED = [variable["query"] for variable in DASHBOARD["templating"]["list"] if variable["type"] == "query"]
BY_SCRAPER = {"job", "instance", "le"}

_NAME = re.compile(r"\b(?:runner_launcher|process)_\w+")
_LABELS = re.compile(r"\b(?:by \(([\w, ]+)\)|(\w+)=~?\"|\w+, (\w+)\)$)")


@pytest.fixture
async def figures(service: Service, slot: Path, tmp_path: Path) -> dict[str, set[str]]:
    """Every figure of a service that has done all sorts of things, with its labels."""
    (tmp_path / "secret").write_text("whsec_" + "QUFB" * 10)
    hooks = tmp_path / "hooks.yaml"
    hooks.write_text(yaml.safe_dump([{"name": "nobody", "url": "http://127.0.0.1:9/", "secret_file": "secret"}]))
    pools = {"local": local_pool(quotas={"memory_quota": 64}), "broken": local_pool(command=["no-such-command"])}
    async with service(pools, webhooks_file=hooks) as client:
        await finished(client, await launched(client, launch_body(slot, "sleep 0.3; exit 3")))
        await client.post("/runners", json=launch_body(slot, pool="broken"))

        async def failed() -> str:
            text = (await client.get("/metrics")).text
            late = ('webhook_answers_total{outcome="unanswered"', "engine_watch_age_seconds{")
            return text if all(name in text for name in late) else ""

        text = await until(failed)
    families = text_string_to_metric_families(text)
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


async def test_every_query_is_about_figures_that_exist(figures: dict[str, set[str]]) -> None:
    counters = {"runner_launcher_failed_attempts_total"}  # no series before the first
    for query in (*QUERIES, *ASKED):
        names = set(_NAME.findall(query))
        assert names, query
        assert names <= figures.keys() | counters, query
        labels = {word.strip() for found in _LABELS.findall(query) for each in found for word in each.split(",") if each}
        borne = BY_SCRAPER.union(*(figures.get(name, {"pool"}) for name in names))
        assert labels <= borne, query


async def test_every_figure_is_on_the_dashboard(figures: dict[str, set[str]]) -> None:
    shown = {name for query in (*QUERIES, *ASKED) for name in _NAME.findall(query)}
    ours = {
        name for name in figures if name.startswith("runner_launcher_") and not name.endswith(("_created", "_sum", "_count"))
    }
    assert ours <= shown


async def test_no_figure_is_kept_for_each_runner_or_task(figures: dict[str, set[str]]) -> None:
    bounded = {"pool", "outcome", "reason", "state", "engine", "target", "le"}
    assert set().union(*figures.values()) <= bounded


def test_panels_do_not_lie_on_each_other() -> None:
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
