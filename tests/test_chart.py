"""The chart in deploy/helm, as golden files: ``UPDATE_GOLDEN=1`` writes them anew, to be reviewed as a diff."""

import base64
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart import CHART, helm

from app.pools import load_pools
from app.settings import PREFIX, Settings

Json = dict[str, Any]

PROJECT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden" / "chart"

POOL: Json = {"pools": {"kubernetes": {"type": "kubernetes", "config": {"image": "registry.example.org/my-agent:1"}}}}
SEVERAL: Json = {"database": {"secret": "postgres"}, "tokens": {"secret": "launcher-tokens"}}
VALUES: dict[str, Json] = {
    "one": POOL,
    "several": {**POOL, **SEVERAL},
    "everything": {
        **SEVERAL,
        "image": {"repository": "registry.example.org/runner-launcher", "tag": "1.2.3", "pullPolicy": "Always"},
        "imagePullSecrets": [{"name": "registry"}],
        "replicas": 3,
        "pools": {
            "small": {"type": "kubernetes", "config": {"namespace": "agents", "job_template": "job.yaml"}},
            "large": {"type": "kubernetes", "max_concurrency": 2, "config": {"namespace": "large-agents"}},
            "elsewhere": {"type": "kubernetes", "config": {"namespace": "far", "kubeconfig": "/secret/kubeconfig"}},
        },
        "files": {"job.yaml": "apiVersion: batch/v1\nkind: Job\nspec: {template: {spec: {priorityClassName: low}}}\n"},
        "env": {
            "RUNNER_LAUNCHER_ALLOW_INLINE_POOLS": True,
            "NO_PROXY": "10.0.0.1",
            "RUNNER_LAUNCHER_RETENTION_RECORDS": 2_000_000,  # which Helm would write as 2e+06
        },
        "publicUrl": "https://launcher.example.org",
        "service": {"type": "LoadBalancer", "port": 80, "annotations": {"example.org/internal": "yes"}},
        "networkPolicy": {"from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "dispatchers"}}}]},
        "serviceAccount": {"name": "launcher", "annotations": {"example.org/role": "agents"}},
        "dashboard": '{"title": "Runners"}',
        "port": 9090,
        "hostNetwork": True,
        "hostAliases": [{"ip": "10.0.0.2", "hostnames": ["database.example.org"]}],
        "podAnnotations": {"example.org/team": "agents"},
        "nodeSelector": {"kubernetes.io/os": "linux"},
        "tolerations": [{"key": "agents", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
    },
    "as-it-comes": {
        "persistence": {"enabled": False},
        "networkPolicy": {"enabled": False},
        "rbac": {"create": False},
        "serviceAccount": {"create": False, "name": "launcher"},
    },
}


def rendered(values: Json) -> list[Json]:
    with helm.Chart.load(str(CHART)) as chart:
        texts = chart.render(values, name="demo", namespace="launchers")
    documents = [yaml.safe_load_all(text) for name, text in sorted(texts.items()) if name.endswith(".yaml")]
    return [document for each in documents for document in each if document]


def one(kind: str, documents: list[Json]) -> Json:
    [found] = [document for document in documents if document["kind"] == kind]
    return found


@pytest.mark.parametrize("name", VALUES)
def test_manifests_are_as_reviewed(name: str) -> None:
    text = yaml.safe_dump_all(rendered(VALUES[name]), sort_keys=True, width=110)
    path = GOLDEN / f"{name}.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text(), "look at the difference, and accept it with UPDATE_GOLDEN=1"


def test_every_golden_file_is_of_some_values() -> None:
    assert {path.stem for path in GOLDEN.glob("*")} == set(VALUES)


def test_helm_has_nothing_to_say_about_it() -> None:
    assert [line for line in helm.lint(str(CHART))["messages"] if line["severity"] > 1] == []


def test_the_chart_has_the_version_of_the_service() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    version = (PROJECT / "app" / "__init__.py").read_text().split('"')[-2]
    assert (chart["version"], chart["appVersion"]) == (version, version)


def test_its_role_is_the_smallest_that_works() -> None:
    documents = yaml.safe_load_all((PROJECT / "deploy" / "kubernetes" / "rbac.yaml").read_text())
    assert one("Role", rendered(POOL))["rules"] == one("Role", list(documents))["rules"]


@pytest.mark.parametrize("name", VALUES)
def test_the_service_takes_its_settings_and_pools(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = rendered(VALUES[name])
    for file, text in one("Secret", documents)["data"].items():
        (tmp_path / file).write_bytes(base64.b64decode(text))
    pools = tmp_path / "pools.yaml"
    pools.write_text(pools.read_text().replace("/secret/kubeconfig", str(tmp_path / "kubeconfig")))
    (tmp_path / "kubeconfig").write_text("{}")
    assert load_pools(pools).warnings == ()
    [container] = one("Deployment", documents)["spec"]["template"]["spec"]["containers"]
    told = {variable["name"]: variable.get("value", "postgresql://") for variable in container["env"]}
    assert {key.removeprefix(PREFIX).lower() for key in told if key.startswith(PREFIX)} <= set(Settings.model_fields)
    for key, value in told.items():
        monkeypatch.setenv(key, value.replace("$(POD_IP)", "10.0.0.7"))
    settings = Settings()
    assert settings.port == container["ports"][0]["containerPort"]
    assert settings.pools_file == Path("/etc/runner-launcher/pools.yaml")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"replicas": 2}, "several replicas need PostgreSQL"),
        ({"database": {"secret": "postgres"}}, "several replicas need a token file"),
        ({"replica": 2}, "replica"),
        ({"pools": {"local": {"type": "local-process"}}}, "/pools/local/type"),
        ({"env": {"1": "x"}}, "invalid propertyName"),
        ({"persistence": {"size": "much"}}, "/persistence/size"),
    ],
)
def test_what_cannot_be_meant_is_refused(values: Json, words: str) -> None:
    with helm.Chart.load(str(CHART)) as chart, pytest.raises(helm.HelmError) as refusal:
        chart.render(values, name="demo", namespace="launchers")
    assert words in str(refusal.value)
