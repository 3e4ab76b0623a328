"""Pools: the file, what it may say, pools in a request, and the questions about capacity."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.errors import ConfigurationError, InvalidRequest
from app.pools import (
    MAX_VARIABLE_BYTES,
    RESERVED,
    KubernetesEngine,
    Pool,
    Pools,
    PoolType,
    Usage,
    inline_pool,
    load_pools,
    resolve,
)
from app.runner import Policy

Load = Callable[[str], Pools]
LoadOne = Callable[..., Pool]

OLD_SYSTEM = """
dispatcher:
  poll_interval: 5
  scheduling_policy: priority

agent_pools:
  local:
    type: local-process
    max_concurrency: 2
    enabled: true
    config:
      python_path: /usr/bin/python3
      working_dir: /tmp/necrocode/local
      log_level: DEBUG

  docker:
    type: docker
    max_concurrency: 4
    cpu_quota: 4
    memory_quota: 8192  # MB
    enabled: false
    config:
      image: necrocode/runner:gpu
      mount_repo_pool: true
      network: necrocode-network
      runtime: nvidia
      gpus: all
      volumes:
        /var/run/docker.sock: /var/run/docker.sock
      environment:
        NECROCODE_ENV: docker
        WORKERS: 4
        DEBUG: true

  k8s:
    type: kubernetes
    max_concurrency: 10
    cpu_quota: 10
    memory_quota: 20480
    config:
      namespace: necrocode-agents
      job_template: manifests/runner-job.yaml
      service_account: necrocode-runner
      image_pull_secrets: [necrocode-registry]
      node_selector: {workload: necrocode}
      tolerations:
        - {key: necrocode, operator: Equal, value: "true", effect: NoSchedule}
      restart_policy: Never
      backoff_limit: 3

  bare:
    type: local-process
    config:

skill_mapping:
  backend: [docker, k8s]
  backend: [docker]
pool_selection: skill
"""


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load a pool file with this text."""

    def load_text(text: str) -> Pools:
        path = tmp_path / "pools.yaml"
        path.write_text(text)
        return load_pools(path)

    return load_text


@pytest.fixture
def load_one(load: Load) -> LoadOne:
    """Load a pool file with one pool, `x`, of these keys."""

    def load_pool(kind: str = "local-process", *, config: object = None, **keys: object) -> Pool:
        pools = load(yaml.safe_dump({"agent_pools": {"x": {"type": kind, "config": config or {}, **keys}}}))
        return pools.by_name["x"]

    return load_pool


def faults_of(refused: pytest.ExceptionInfo[ConfigurationError], folder: Path) -> list[str]:
    return [line.removeprefix(f"{folder}/") for line in str(refused.value).splitlines()]


def key_of(pool: Pool, key: str) -> object:
    return pool.config.model_dump()[key]


# The file.


def test_a_file_of_the_old_system_loads_unchanged(load: Load, tmp_path: Path) -> None:
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests/runner-job.yaml").write_text("kind: Job\nmetadata: {annotations: {since: 2024-01-01}}\n")
    pools = load(OLD_SYSTEM)
    local, docker, k8s, bare = pools.by_name.values()
    assert (local.type, local.max_concurrency, key_of(local, "working_dir")) == (
        PoolType.LOCAL_PROCESS,
        2,
        "/tmp/necrocode/local",  # noqa: S108
    )
    assert local.plain_settings == {"RUNNER_LOG_LEVEL": "DEBUG"}
    assert (docker.cpu_quota, docker.memory_quota, docker.enabled) == (4, 8192, False)
    assert docker.config.environment == {"NECROCODE_ENV": "docker", "WORKERS": "4", "DEBUG": "True"}
    assert key_of(k8s, "job_template") == {"kind": "Job", "metadata": {"annotations": {"since": "2024-01-01"}}}
    assert k8s.plain_settings == {}
    assert (bare.name, bare.max_concurrency, bare.enabled) == ("bare", 1, True)
    assert [warning.split(": ")[1] for warning in pools.warnings] == [
        "agent_pools.k8s.config.restart_policy",
        "agent_pools.k8s.config.backoff_limit",
    ]


def test_no_file_is_no_pools() -> None:
    assert load_pools(None) == Pools()


def test_a_file_may_have_no_pools_yet(load: Load) -> None:
    assert load("agent_pools:\n").by_name == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "not YAML"),
        ("a: \0", "not YAML"),
        ("a: !!python/name:os.system", "not YAML"),
        ("? [a]\n: b", "not YAML"),
        ("a: " + "[" * 5000, "nested too deep"),
        ("", "agent_pools: is missing"),
        ("[]", "agent_pools: is missing"),
        ("{}", "agent_pools: is missing"),
        ("agent_pool: {}", "agent_pool: is not a key of a pool file; did you mean agent_pools?"),
        ("agent_pools: [local]", "agent_pools: must be a mapping"),
        ("agent_pools: {}\nagent_pools: {}", "agent_pools: is given twice"),
    ],
    ids=lambda text: ascii(text)[:30],
)
def test_a_file_that_is_no_pool_file_is_refused(load: Load, text: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"pools\.yaml: {said}".replace("?", r"\?")):
        load(text)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^RUNNER_LAUNCHER_POOLS_FILE: .*nowhere\.yaml: No such file"):
        load_pools(tmp_path / "nowhere.yaml")


def test_everything_wrong_is_told_at_once(load: Load, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as refused:
        load(
            """
            agent_pools:
              a:
                type: local-process
                type: local-process
                cpu_quota: -1
                config:
                  command: []
                  id: 7
                  environment: {RUNNER_ID: x, not-a-name: y}
              b: {type: podman}
              c: 3
            """
        )
    assert faults_of(refused, tmp_path) == [
        "pools.yaml: agent_pools.a.type: is given twice",
        "pools.yaml: agent_pools.a.config.id: cannot be told: RUNNER_ID is set by the launcher",
        "pools.yaml: agent_pools.a.config.environment.RUNNER_ID: RUNNER_ID is set by the launcher",
        "pools.yaml: agent_pools.a.config.environment.not-a-name: 'not-a-name' is not a name for an environment variable",
        "pools.yaml: agent_pools.a.cpu_quota: Input should be greater than 0",
        "pools.yaml: agent_pools.a.config.command: must name a program",
        "pools.yaml: agent_pools.b.type: Input should be 'local-process', 'docker' or 'kubernetes'",
        "pools.yaml: agent_pools.c: must be a mapping with a type",
    ]


@pytest.mark.parametrize(
    ("keys", "where"),
    [
        ({"kind": None}, "type"),
        ({"kind": ["docker"]}, "type"),
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"max_concurrency": "2"}, "max_concurrency"),
        ({"max_concurrency": True}, "max_concurrency"),
        ({"cpu_quota": 0}, "cpu_quota"),
        ({"cpu_quota": float("inf")}, "cpu_quota"),
        ({"cpu_quota": float("nan")}, "cpu_quota"),
        ({"memory_quota": 0}, "memory_quota"),
        ({"memory_quota": 1.5}, "memory_quota"),
        ({"memory_quota": 10**400}, "memory_quota"),
        ({"cpu_quota": 10**400}, "cpu_quota"),
        ({"enabled": "yes"}, "enabled"),
        ({"config": ["image"]}, "config"),
    ],
    ids=lambda value: ascii(value)[:60],
)
def test_a_key_of_a_pool_that_cannot_be_used_is_named(
    load_one: LoadOne, tmp_path: Path, keys: dict[str, Any], where: str
) -> None:
    with pytest.raises(ConfigurationError) as refused:
        load_one(**{"kind": "docker", **keys})
    [fault] = faults_of(refused, tmp_path)
    assert fault.startswith(f"pools.yaml: agent_pools.x.{where}: ")


@pytest.mark.parametrize(
    ("kind", "config", "where"),
    [
        ("local-process", {"command": "agent --fast"}, "command"),
        ("local-process", {"command": [""]}, "command"),
        ("local-process", {"command": ["agent", 3]}, "command.1"),
        ("local-process", {"command": ["a\0b"]}, "command.0"),
        ("local-process", {"working_dir": "here"}, "working_dir"),
        ("local-process", {"launch_timeout_seconds": 0}, "launch_timeout_seconds"),
        ("local-process", {"run_timeout_seconds": -1}, "run_timeout_seconds"),
        ("local-process", {"heartbeat_timeout_seconds": float("inf")}, "heartbeat_timeout_seconds"),
        ("local-process", {"retry_attempts": 0}, "retry_attempts"),
        ("local-process", {"retry_base_seconds": -1}, "retry_base_seconds"),
        ("local-process", {"stop_grace_seconds": "10"}, "stop_grace_seconds"),
        ("local-process", {"queue_limit": -1}, "queue_limit"),
        ("local-process", {"log_max_mib": 0}, "log_max_mib"),
        ("local-process", {"public_url": "launcher"}, "public_url"),
        ("local-process", {"environment": {"A": None}}, "environment.A"),
        ("local-process", {"environment": {"A": "\0"}}, "environment.A"),
        ("local-process", {"environment": {"A": "\ud800"}}, "environment.A"),
        ("local-process", {"model": "\ud800"}, "model"),
        ("local-process", {"environment": {"A": []}}, "environment.A"),
        ("local-process", {"environment": ["A=b"]}, "environment"),
        ("local-process", {"resources": {"cpu_limit": "much"}}, "resources.cpu_limit"),
        ("local-process", {"resources": {"cpu_limit": 10**400}}, "resources.cpu_limit"),
        ("local-process", {"resources": {"cpu_limit": "9" * 400}}, "resources.cpu_limit"),
        ("local-process", {"resources": {"cpu_limit": True}}, "resources.cpu_limit"),
        ("local-process", {"resources": {"memory_limit": float("nan")}}, "resources.memory_limit"),
        ("local-process", {"resources": {"memory_limit": "9Ei"}}, "resources.memory_limit"),
        ("local-process", {"resources": {"memory": 4}}, "resources.memory"),
        ("docker", {"image": ""}, "image"),
        ("docker", {"pull_policy": "IfNotPresent"}, "pull_policy"),
        ("docker", {"mount_repo_pool": "false"}, "mount_repo_pool"),
        ("docker", {"volumes": {"/a": "b"}}, "volumes./a"),
        ("docker", {"pids_limit": 0}, "pids_limit"),
        ("docker", {"docker_host": "ssh://host"}, "docker_host"),
        ("docker", {"docker_host": "tcp://10.0.0.1:2376"}, "docker_host"),
        ("docker", {"slot_path_map": {"/a": "b"}}, "slot_path_map./a"),
        ("docker", {"resources": {"memory_limit": "100m"}}, "resources.memory_limit"),
        ("kubernetes", {"namespace": "../kube-system"}, "namespace"),
        ("kubernetes", {"image_pull_policy": "always"}, "image_pull_policy"),
        ("kubernetes", {"tolerations": {"key": "a"}}, "tolerations"),
        ("kubernetes", {"node_selector": {"gpu": True}}, "node_selector.gpu"),
        ("kubernetes", {"run_as_user": -1}, "run_as_user"),
        ("kubernetes", {"workspace": {"kind": "nfs"}}, "workspace.kind"),
        ("kubernetes", {"resources": {"limits": {"cpu": "1x"}}}, "resources.limits.cpu"),
        ("kubernetes", {"resources": {"requests": {"memory": -1}}}, "resources.requests.memory"),
        ("kubernetes", {"job_template": "nowhere.yaml"}, "job_template"),
        ("kubernetes", {"job_template": {"kind": "Job"}}, "job_template"),
        ("kubernetes", {"job_template": "/dev/null"}, "job_template"),
    ],
    ids=lambda value: ascii(value)[:60],
)
def test_a_key_of_a_configuration_that_cannot_be_used_is_named(
    load_one: LoadOne, tmp_path: Path, kind: str, config: dict[str, Any], where: str
) -> None:
    with pytest.raises(ConfigurationError) as refused:
        load_one(kind, config=config)
    [fault] = faults_of(refused, tmp_path)
    assert fault.startswith(f"pools.yaml: agent_pools.x.config.{where}: ")


def test_a_name_must_be_text(load: Load) -> None:
    with pytest.raises(ConfigurationError, match=r"agent_pools\.1\.name: "):
        load("agent_pools: {1: {type: docker}}")


def test_a_key_must_be_text(load: Load, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as refused:
        load("agent_pools: {x: {type: docker, config: {on: always}}}")
    assert faults_of(refused, tmp_path) == ["pools.yaml: agent_pools.x.config.True: is not text; put it in quotes"]


def test_a_merged_key_may_be_overridden_but_none_given_twice(load: Load, tmp_path: Path) -> None:
    text = """
    agent_pools:
      a: {type: docker, config: &base {<<: &more {image: one, model: a}, image: two}}
      b: {type: docker, config: {<<: *base, image: three}}
    """
    pools = load(text)
    assert [key_of(pool, "image") for pool in pools.by_name.values()] == ["two", "three"]
    with pytest.raises(ConfigurationError) as refused:
        load(text.replace("image: two", "image: two, image: two"))
    assert faults_of(refused, tmp_path) == ["pools.yaml: agent_pools.a.config.image: is given twice"]


def test_a_null_stands_for_a_key_left_out(load: Load) -> None:
    pools = load("agent_pools: {x: {type: docker, max_concurrency: null, cpu_quota:, config: {environment:, image: null}}}")
    assert pools.by_name["x"].config.environment == {}
    assert key_of(pools.by_name["x"], "image") == "necrocode/runner:latest"


def test_a_job_template_may_stand_beside_the_file_or_where_the_service_was_started(
    load_one: LoadOne, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cwd").mkdir()
    (tmp_path / "cwd/job.yaml").write_text("{kind: Job, from: cwd}")
    monkeypatch.chdir(tmp_path / "cwd")
    assert key_of(load_one("kubernetes", config={"job_template": "job.yaml"}), "job_template") == {
        "kind": "Job",
        "from": "cwd",
    }
    (tmp_path / "job.yaml").write_text("{kind: Job, from: beside}")
    assert key_of(load_one("kubernetes", config={"job_template": "job.yaml"}), "job_template") == {
        "kind": "Job",
        "from": "beside",
    }


@pytest.mark.parametrize("text", ["a: [", "[a]", "a: 1\na: 2", "a: !!set {b}"])
def test_a_job_template_must_be_a_mapping_of_json(load_one: LoadOne, tmp_path: Path, text: str) -> None:
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match=r"agent_pools\.x\.config\.job_template"):
        load_one("kubernetes", config={"job_template": "job.yaml"})


# Variables.


def test_scalars_that_are_not_the_launchers_are_told_as_python_writes_them(load: Load) -> None:
    pools = load(
        """
        agent_pools:
          x:
            type: local-process
            config: {log_level: DEBUG, turns: 3, temperature: 0.50, fast: yes, since: 2024-01-01, none: ~, IMAGE: a}
        """
    )
    assert pools.by_name["x"].plain_settings == {
        "RUNNER_LOG_LEVEL": "DEBUG",
        "RUNNER_TURNS": "3",
        "RUNNER_TEMPERATURE": "0.5",
        "RUNNER_FAST": "True",
        "RUNNER_SINCE": "2024-01-01",
        "RUNNER_NONE": "None",
        "RUNNER_IMAGE": "a",
    }


def test_a_user_and_group_are_no_number_to_the_base_of_sixty(load: Load) -> None:
    pools = load("agent_pools: {a: {type: docker, config: {user: 1000:50}}, b: {type: docker, config: {user: 1000}}}")
    assert [key_of(pool, "user") for pool in pools.by_name.values()] == ["1000:50", "1000"]


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_the_launchers_own_names_are_refused(load_one: LoadOne, name: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"config\.environment\.{name}: {name} is set by the launcher"):
        load_one(config={"environment": {name: "x"}})


@pytest.mark.parametrize("key", ["id", "Token", "launcher_url"])
def test_a_key_that_would_be_told_under_the_launchers_own_name_is_refused(load_one: LoadOne, key: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"config\.{key}: cannot be told: RUNNER_\w+ is set by the launcher"):
        load_one(config={key: "x"})


@pytest.mark.parametrize(
    "config",
    [
        {"log-level": "x"},
        {"log level": "x"},
        {"é": "x"},
        {"model": "a", "Model": "b"},
        {"model": "a\0b"},
        {"model": "x" * MAX_VARIABLE_BYTES},
        {"environment": {"": "x"}},
        {"environment": {"1A": "x"}},
        {"environment": {"A\n": "x"}},
        {"environment": {"A": "\0"}},
        {"environment": {"A": "x" * MAX_VARIABLE_BYTES}},
    ],
    ids=lambda config: str(config)[:40],
)
def test_a_variable_that_cannot_be_set_is_refused(load_one: LoadOne, config: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        load_one(config=config)


def test_the_longest_variable_is_measured_in_bytes(load_one: LoadOne) -> None:
    most = (MAX_VARIABLE_BYTES - len("A=\0")) // 2
    assert load_one(config={"environment": {"A": "é" * most}}).config.environment["A"] == "é" * most
    with pytest.raises(ConfigurationError, match=f"is longer than {MAX_VARIABLE_BYTES} bytes"):
        load_one(config={"environment": {"A": "é" * (most + 1)}})


# Warnings.


@pytest.mark.parametrize(
    ("pool", "warning"),
    [
        ("config: {comand: x}", "config.comand: is not the launcher's, and told to runners as RUNNER_COMAND; did you mean"),
        ("config: {Image: x}", "config.Image: is not the launcher's, and told to runners as RUNNER_IMAGE; did you mean"),
        ("config: {run_timeout: 3}", "config.run_timeout: is not the launcher's, and told to runners as"),
        ("config: {volume: {/a: /b}}", "config.volume: is not a key of a docker pool, and ignored; did you mean volumes?"),
        ("config: {extras: [1]}", "config.extras: is not a key of a docker pool, and ignored"),
        ("max_concurency: 3", "max_concurency: is not a key of a pool, and ignored; did you mean max_concurrency?"),
        ("name: other", "name: is not a key of a pool, and ignored"),
        ("command: [a]", "command: is not a key of a pool, and ignored; it belongs under config"),
    ],
)
def test_what_is_probably_not_meant_is_warned_about(
    load: Load, caplog: pytest.LogCaptureFixture, pool: str, warning: str
) -> None:
    with caplog.at_level(logging.WARNING, "app.pools"):
        pools = load(f"agent_pools: {{x: {{type: docker, {pool}}}}}")
    [said] = pools.warnings
    assert f"pools.yaml: agent_pools.x.{warning}" in said
    assert caplog.messages == [said]


def test_a_scalar_like_no_other_key_is_no_surprise(load: Load) -> None:
    assert not load("agent_pools: {x: {type: docker, config: {log_level: DEBUG, model: large}}}").warnings


# Capacity.


@pytest.mark.parametrize(
    ("kind", "resources", "demand"),
    [
        ("local-process", None, (4, 8192)),
        ("local-process", {"cpu_limit": 0.1, "memory_limit": 512}, (0.1, 512)),
        ("docker", {"cpu_limit": 1}, (1, 8192)),
        ("docker", {"memory_limit": "2Gi"}, (4, 2048)),
        ("kubernetes", {"limits": {"cpu": "500m", "memory": "1Gi"}}, (0.5, 1024)),
        ("kubernetes", {"limits": {"cpu": "2", "memory": "1024"}}, (2, 1024)),
        ("kubernetes", {"limits": {"cpu": ".5", "memory": "1G"}}, (0.5, 953)),
        ("kubernetes", {"limits": {"cpu": "1e0", "memory": "1048576k"}}, (1, 1000)),
        ("kubernetes", {"requests": {"cpu": "100m", "memory": 64}}, (4, 8192)),
        ("kubernetes", {"limits": {"cpu": "0.3", "nvidia.com/gpu": 1}}, (0.3, 8192)),
    ],
)
def test_what_one_runner_gets(
    load_one: LoadOne, kind: str, resources: dict[str, Any] | None, demand: tuple[float, int]
) -> None:
    config = {"resources": resources} if resources else {}
    assert load_one(kind, config=config, cpu_quota=4, memory_quota=8192).demand == demand


def test_without_quotas_there_is_no_limit(load_one: LoadOne) -> None:
    pool = load_one("docker", max_concurrency=2)
    assert pool.demand == (None, None)
    assert pool.refusal(Usage(runners=1, cpu=99, memory_mib=99)) is None


@pytest.mark.parametrize(
    ("usage", "said"),
    [
        (Usage(), None),
        (Usage(runners=2, cpu=0.2, memory_mib=1000), None),
        (Usage(runners=9, cpu=0.2, memory_mib=1536), None),
        (Usage(runners=10), "pool x holds 10 runners, and its max_concurrency is 10"),
        (Usage(runners=3, cpu=0.25), "a runner of pool x gets 0.1 cores, and 0.25 of 0.3 are taken"),
        (Usage(runners=3, memory_mib=1537), "a runner of pool x gets 512 MiB, and 1537 of 2048 are taken"),
    ],
)
def test_with_resources_the_quotas_bound_the_sum(load_one: LoadOne, usage: Usage, said: str | None) -> None:
    resources = {"cpu_limit": 0.1, "memory_limit": 512}
    pool = load_one("docker", config={"resources": resources}, max_concurrency=10, cpu_quota=0.3, memory_quota=2048)
    assert pool.refusal(usage) == said


def test_without_resources_the_quotas_bound_each_runner_and_no_sum(load_one: LoadOne) -> None:
    pool = load_one("docker", max_concurrency=3, cpu_quota=2, memory_quota=512)
    assert pool.refusal(Usage(runners=2, cpu=4, memory_mib=1024)) is None


@pytest.mark.parametrize(
    ("kind", "resources"),
    [
        ("docker", {"cpu_limit": 3}),
        ("docker", {"memory_limit": 513}),
        ("kubernetes", {"limits": {"memory": "1Gi"}}),
        ("kubernetes", {"requests": {"cpu": 3}}),
        ("kubernetes", {"requests": {"cpu": "1"}, "limits": {"cpu": "500m"}}),
    ],
)
def test_a_pool_that_could_never_run_anything_is_refused(
    load_one: LoadOne, kind: str, resources: dict[str, Any] | None
) -> None:
    with pytest.raises(ConfigurationError, match=r"agent_pools\.x: "):
        load_one(kind, config={"resources": resources}, cpu_quota=2, memory_quota=512)


# What others ask of a pool.


def test_the_policy_is_the_pools_and_else_the_default(load_one: LoadOne) -> None:
    assert load_one().policy == Policy()
    config: dict[str, Any] = {
        "launch_timeout_seconds": 1,
        "run_timeout_seconds": 2.5,
        "heartbeat_timeout_seconds": 3,
        "retry_attempts": 4,
        "retry_base_seconds": 0,
        "stop_grace_seconds": 0,
    }
    assert load_one(config=config).policy == Policy(**config)


@pytest.mark.parametrize(
    ("kind", "config", "engine"),
    [
        ("local-process", {}, "local-process"),
        ("docker", {}, "docker:unix:///var/run/docker.sock"),
        ("docker", {"docker_host": "tcp://10.0.0.1:2376", "user": "image"}, "docker:tcp://10.0.0.1:2376"),
        ("kubernetes", {}, "kubernetes:necrocode-agents"),
        (
            "kubernetes",
            {"kubeconfig": "/etc/kube", "context": "blue"},
            "kubernetes:necrocode-agents?kubeconfig=/etc/kube&context=blue",
        ),
    ],
)
def test_the_engine_of_a_pool(load_one: LoadOne, kind: str, config: dict[str, Any], engine: str) -> None:
    assert load_one(kind, config=config).engine == engine


@pytest.mark.parametrize("context", [None, "blue", "arn:aws:eks:eu:1:cluster/a b&c=d?%"])
@pytest.mark.parametrize("kubeconfig", [None, Path("/etc/kube"), Path("/a b/ü&context=x?#%.yaml")])
def test_a_kubernetes_engine_is_read_as_it_was_written(kubeconfig: Path | None, context: str | None) -> None:
    engine = KubernetesEngine("agents", kubeconfig, context)
    assert KubernetesEngine.parse(str(engine)) == engine


@pytest.mark.parametrize(
    ("kind", "config", "works", "enters"),
    [
        ("local-process", {}, True, True),
        ("local-process", {"working_dir": "/elsewhere"}, False, False),
        ("docker", {}, True, True),
        ("docker", {"mount_repo_pool": False}, False, False),
        ("docker", {"docker_host": "tcp://10.0.0.1:2376", "user": "1000:1000"}, True, False),
        ("kubernetes", {}, False, False),
        ("kubernetes", {"workspace": {"kind": "host_path"}}, True, False),
        ("kubernetes", {"workspace": {"kind": "pvc", "claim": "slots"}}, True, False),
    ],
)
def test_whether_runners_work_in_the_slot_and_on_this_machine(
    load_one: LoadOne, kind: str, config: dict[str, Any], *, works: bool, enters: bool
) -> None:
    pool = load_one(kind, config=config)
    assert (pool.works_in_slot, pool.enters_slot) == (works, enters)


def test_a_pool_never_shows_its_environment(load_one: LoadOne) -> None:
    assert "secret" not in repr(load_one(config={"environment": {"KEY": "secret"}}))


# Pools in a request.


def test_a_name_means_the_configured_pool(load: Load) -> None:
    pools = load("agent_pools: {x: {type: docker}}")
    assert resolve(pools, "x", allow_inline=False) is pools.by_name["x"]


@pytest.mark.parametrize("allow_inline", [True, False])
def test_an_object_with_a_configured_name_means_that_pool_and_nothing_else_of_it_counts(
    load: Load, *, allow_inline: bool
) -> None:
    pools = load("agent_pools: {x: {type: docker}}")
    asked = {"name": "x", "type": "podman", "enabled": "no", "config": {"volumes": {"/": "/host"}}}
    assert resolve(pools, asked, allow_inline=allow_inline) is pools.by_name["x"]


@pytest.mark.parametrize(
    ("asked", "allow_inline", "code"),
    [
        ("y", True, "unknown-pool"),
        ("y", False, "unknown-pool"),
        ({"name": "y", "type": "docker"}, False, "inline-pools-off"),
        ({"name": "y", "type": "podman"}, True, "invalid"),
    ],
)
def test_a_pool_that_is_not_configured_is_refused(asked: dict[str, Any] | str, *, allow_inline: bool, code: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        resolve(Pools(), asked, allow_inline=allow_inline)
    assert refused.value.code == code
    assert refused.value.faults[0].pointer.startswith("/pool")


def test_an_inline_pool_may_name_what_harms_nobody() -> None:
    asked = {
        "name": "mine",
        "type": "docker",
        "max_concurrency": 2,
        "cpu_quota": 1.5,
        "memory_quota": 512,
        "enabled": True,
        "config": {
            "image": "agent:1",
            "command": ["agent"],
            "environment": {"A": "b"},
            "labels": {"team": "red"},
            "resources": {"cpu_limit": 1, "memory_limit": "256Mi"},
            "model": "large",
            "working_dir": "told, since a container has no such key",
        },
    }
    pool = resolve(Pools(), asked, allow_inline=True)
    assert pool == inline_pool(asked)
    assert (key_of(pool, "image"), pool.demand) == ("agent:1", (1, 256))
    assert pool.plain_settings["RUNNER_MODEL"] == "large"


@pytest.mark.parametrize(
    ("kind", "keys", "pointers"),
    [
        ("docker", {"volumes": {"/": "/host"}, "network": "host"}, ["volumes", "network"]),
        ("docker", {"docker_host": "tcp://10.0.0.1:2375"}, ["docker_host"]),
        ("docker", {"launch_timeout_seconds": 1}, ["launch_timeout_seconds"]),
        ("docker", {"something": {}}, ["something"]),
        ("docker", {"a~b/c": []}, ["a~0b~1c"]),
        ("local-process", {"command": ["sh"], "environment": {"A": "b"}}, ["command", "environment"]),
        ("local-process", {"working_dir": "/"}, ["working_dir"]),
        ("local-process", {"user": "root"}, ["user"]),
        ("kubernetes", {"service_account": "admin"}, ["service_account"]),
        ("kubernetes", {"restart_policy": "Never"}, ["restart_policy"]),
        ("docker", {"image": 7, "token": "x"}, ["token", "image"]),
        ("docker", {"environment": {"RUNNER_ID": "x"}}, ["environment/RUNNER_ID"]),
    ],
)
def test_an_inline_pool_may_name_nothing_else(kind: str, keys: dict[str, Any], pointers: list[str]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        inline_pool({"name": "mine", "type": kind, "config": keys})
    assert [fault.pointer for fault in refused.value.faults] == [f"/pool/config/{pointer}" for pointer in pointers]


def test_an_inline_pool_reads_no_files(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret: [")
    with pytest.raises(InvalidRequest) as refused:
        inline_pool({"name": "mine", "type": "kubernetes", "config": {"job_template": str(secret)}})
    assert [fault.detail for fault in refused.value.faults] == ["is not for inline pools"]


@pytest.mark.parametrize(
    ("asked", "pointer"),
    [
        ({"name": "mine"}, "/pool/type"),
        ({"name": "mine", "type": ["docker"]}, "/pool/type"),
        ({"name": "mine", "type": "docker", "config": []}, "/pool/config"),
        ({"name": "mine", "type": "docker", "queue_limit": 3}, "/pool/queue_limit"),
        ({"name": "mine", "type": "docker", "cpu_quota": "1"}, "/pool/cpu_quota"),
        ({"name": "mine", "type": "docker", "cpu_quota": 1, "config": {"resources": {"cpu_limit": 2}}}, "/pool"),
    ],
)
def test_an_inline_pool_is_judged_like_any_other(asked: dict[str, Any], pointer: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        inline_pool(asked)
    assert [fault.pointer for fault in refused.value.faults] == [pointer]
