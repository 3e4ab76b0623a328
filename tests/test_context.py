"""The launch request, the task context made of it, and what a runner is told."""

import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
from pydantic import ValidationError

from app.context import MAX_CONTEXT_BYTES, environment, inherited, launch_spec, task_context, traceparent
from app.errors import ContextTooLarge
from app.launcher import LaunchSpec
from app.models import MAX_DEPTH, LaunchRequest
from app.pools import MAX_VARIABLE_BYTES, RESERVED, Pool

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
WORD = "secret-word"
TASK = {"id": "1.1", "title": "Build", "description": "the 家"}
SLOT = {"slot_id": "slot-1", "slot_path": "/slots/1", "repo_url": "git@example:repo.git"}


def launch_request(*, pool: object = "local", slot: dict[str, Any] | None = None, **task: object) -> LaunchRequest:
    return LaunchRequest.model_validate({"task": {**TASK, **task}, "slot": {**SLOT, **(slot or {})}, "pool": pool})


def make_pool(kind: str = "local-process", **config: object) -> Pool:
    return Pool.model_validate({"name": "local", "type": kind, "config": config})


def nested(depth: int) -> dict[str, object]:
    """Nest objects and lists by turns so deep, and an object around them."""
    value: object = {}
    for level in range(depth - 1):
        value = {"a": value} if level % 2 else [value]
    return {"a": value}


# The request.


def test_a_dispatcher_posts_its_whole_task_and_unknown_keys_are_ignored() -> None:
    asked = LaunchRequest.model_validate(
        {
            "task": {**TASK, "state": "ready", "priority": 3, "required_skill": None, "metadata": None},
            "slot": {**SLOT, "allocated_at": 12.5},
            "pool": "local",
            "trace": {},
        }
    )
    assert asked.task.required_skill is None
    assert asked.task.metadata == {}
    assert asked.task.dependencies == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"id": 1},
        {"id": None},
        {"id": ""},
        {"id": "x" * 1025},
        {"id": "a\0b"},
        {"id": "a\nb"},
        {"id": "a\x7f"},
        {"id": "\ud800"},
        {"title": 3},
        {"title": "\udfff"},
        {"description": "\ud800"},
        {"dependencies": "1.0"},
        {"dependencies": ["1.0", 2]},
        {"dependencies": [""]},
        {"required_skill": ""},
        {"reserved_branch": "a\tb"},
        {"spec_name": 7},
        {"metadata": []},
        {"metadata": {"a": float("nan")}},
        {"metadata": {"a": [float("inf")]}},
        {"metadata": {"a": "\ud800"}},
        {"metadata": {"\ud800": 1}},
        {"metadata": {"a": {1, 2}}},
        {"metadata": nested(MAX_DEPTH)},
        {"metadata": nested(100_000)},
    ],
    ids=lambda wrong: ascii(wrong)[:40] if "metadata" not in wrong else None,
)
def test_a_task_that_cannot_travel_is_refused_at_its_key(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        launch_request(**wrong)
    assert [line["loc"][:2] for line in refused.value.errors()] == [("task", *wrong)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"slot_id": 1},
        {"slot_path": "relative"},
        {"slot_path": ""},
        {"slot_path": "/a\0"},
        {"slot_path": "/a\n"},
        {"slot_path": "/\ud800"},
        {"slot_path": "/" + "家" * 1365},
        {"repo_url": None},
    ],
    ids=lambda wrong: ascii(wrong)[:40],
)
def test_a_slot_that_cannot_be_entered_is_refused_at_its_key(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        launch_request(slot=wrong)
    assert [line["loc"] for line in refused.value.errors()] == [("slot", *wrong)]


@pytest.mark.parametrize(
    ("pool", "where"),
    [
        ("", ("pool",)),
        ("a\0", ("pool",)),
        (None, ("pool",)),
        (["local"], ("pool",)),
        ({}, ("pool", "name")),
        ({"name": 3}, ("pool", "name")),
        ({"name": "\ud800"}, ("pool",)),
        ({"name": "local", "x": float("nan")}, ("pool",)),
        ({"name": "local", "x": nested(MAX_DEPTH)}, ("pool",)),
    ],
)
def test_a_pool_without_a_name_is_refused(pool: object, where: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError) as refused:
        launch_request(pool=pool)
    assert [line["loc"] for line in refused.value.errors()] == [where]


def test_a_pool_object_stays_as_it_came() -> None:
    pool = {"name": "local", "type": 7, "config": None, "status": {"running": 2}}
    assert launch_request(pool=pool).pool == pool


def test_the_longest_that_is_allowed() -> None:
    asked = launch_request(id="x" * 1024, metadata=nested(MAX_DEPTH - 1), slot={"slot_path": "/" + "x" * 4094})
    assert json.loads(task_context(asked))["metadata"] == nested(MAX_DEPTH - 1)


# The task context.


def test_the_context_has_eleven_fields_in_order() -> None:
    asked = launch_request(
        dependencies=["1.0"], required_skill="backend", reserved_branch="feature/x", spec_name="s", metadata={"a": [1]}
    )
    assert list(json.loads(task_context(asked)).items()) == [
        ("task_id", "1.1"),
        ("spec_name", "s"),
        ("task_title", "Build"),
        ("task_description", "the 家"),
        ("dependencies", ["1.0"]),
        ("required_skill", "backend"),
        ("slot_id", "slot-1"),
        ("slot_path", "/slots/1"),
        ("repo_url", "git@example:repo.git"),
        ("branch_name", "feature/x"),
        ("metadata", {"a": [1]}),
    ]


def test_the_context_is_utf_8_and_not_escaped() -> None:
    assert "the 家".encode() in task_context(launch_request())


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ({"spec_name": "own", "metadata": {"spec_name": "theirs"}}, "own"),
        ({"metadata": {"spec_name": "theirs"}}, "theirs"),
        ({"spec_name": None, "metadata": {"spec_name": "theirs"}}, "theirs"),
        ({"metadata": {"spec_name": ""}}, "unknown"),
        ({"metadata": {"spec_name": 3}}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_the_spec_name_is_the_tasks_or_its_metadatas_or_unknown(task: dict[str, Any], name: str) -> None:
    assert json.loads(task_context(launch_request(**task)))["spec_name"] == name


def test_the_context_has_a_limit_in_bytes() -> None:
    room = MAX_CONTEXT_BYTES - len(task_context(launch_request(description="")))
    assert len(task_context(launch_request(description="x" * room))) == MAX_CONTEXT_BYTES
    with pytest.raises(ContextTooLarge):
        task_context(launch_request(description="é" + "x" * (room - 1)))


# The environment.


def told(pool: Pool, service: Mapping[str, str] = MappingProxyType({}), context: bytes = b"{}") -> dict[str, str]:
    return environment(
        pool, runner_id="runner-1", context=context, token=WORD, url="http://us", traceparent=TRACE, inherited=service
    )


def test_a_runner_is_told_who_it_is() -> None:
    assert told(make_pool()) == {
        "RUNNER_ID": "runner-1",
        "TASK_CONTEXT": "{}",
        "POOL_NAME": "local",
        "RUNNER_LAUNCHER_URL": "http://us",
        "RUNNER_TOKEN": WORD,
        "TRACEPARENT": TRACE,
    }


def test_the_later_wins() -> None:
    pool = make_pool(path="key", log_level="key", environment={"RUNNER_LOG_LEVEL": "environment", "PATH": "environment"})
    variables = told(pool, dict.fromkeys(("PATH", "HOME", "RUNNER_PATH"), "service"))
    assert (variables["HOME"], variables["PATH"]) == ("service", "environment")
    assert (variables["RUNNER_PATH"], variables["RUNNER_LOG_LEVEL"]) == ("key", "environment")


def test_what_the_launcher_says_wins_over_all() -> None:
    service = dict.fromkeys(RESERVED - {"TASK_CONTEXT_FILE"}, "wrong")
    assert "wrong" not in told(make_pool(), service).values()


def test_a_context_too_long_for_a_variable_is_left_to_the_file() -> None:
    most = MAX_VARIABLE_BYTES - len("TASK_CONTEXT=\0")
    assert len(told(make_pool(), context=b"x" * most)["TASK_CONTEXT"]) == most
    assert "TASK_CONTEXT" not in told(make_pool(), context=b"x" * (most + 1))


def test_a_context_is_measured_in_bytes() -> None:
    assert "TASK_CONTEXT" not in told(make_pool(), context=("家" * 50_000).encode())


def test_nothing_else_of_the_services_environment_is_inherited() -> None:
    environ = {"PATH": "/bin", "HOME": "/root", "LANG": "C.UTF-8", "TZ": "UTC", "GITHUB_TOKEN": "secret", "LC_ALL": "C"}
    assert inherited(environ) == {"PATH": "/bin", "HOME": "/root", "LANG": "C.UTF-8", "TZ": "UTC"}
    assert inherited({"TZ": "UTC"}) == {"TZ": "UTC"}


@pytest.mark.parametrize("header", [TRACE, TRACE[:-2] + "00", "01" + TRACE[2:], "cc" + TRACE[2:] + "-what-comes"])
def test_a_trace_is_passed_on(header: str) -> None:
    assert traceparent(header) == header


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "nonsense",
        TRACE.upper(),
        TRACE + "-more",
        TRACE + "\n",
        "ff" + TRACE[2:],
        "01" + TRACE[2:] + "more",
        "00-" + "0" * 32 + TRACE[35:],
        TRACE[:36] + "0" * 16 + "-01",
    ],
)
def test_a_trace_is_begun_where_there_is_none(header: str | None) -> None:
    fresh = traceparent(header)
    assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-01", fresh)
    assert fresh not in (header, traceparent(header))


# The specification.


def spec_of(pool: Pool, asked: LaunchRequest | None = None, working_dir: str | None = "/real/slot") -> LaunchSpec:
    return launch_spec(
        pool,
        asked or launch_request(),
        runner_id="runner-1",
        token=WORD,
        url="http://us",
        traceparent=TRACE,
        inherited={"PATH": "/bin"},
        default_command=("python", "-m", "agent"),
        working_dir=working_dir,
    )


@pytest.mark.parametrize(
    ("kind", "config", "command"),
    [
        ("local-process", {}, ("python", "-m", "agent")),
        ("local-process", {"python_path": "/opt/python"}, ("/opt/python", "-m", "agent")),
        ("local-process", {"command": ["python", "x.py"], "python_path": "py3"}, ("py3", "x.py")),
        ("local-process", {"command": ["/usr/bin/python"], "python_path": "py3"}, ("/usr/bin/python",)),
        ("local-process", {"command": ["agent", ""]}, ("agent", "")),
        ("docker", {}, None),
        ("docker", {"command": ["agent"]}, ("agent",)),
        ("kubernetes", {}, None),
    ],
)
def test_the_command(kind: str, config: dict[str, Any], command: tuple[str, ...] | None) -> None:
    assert spec_of(make_pool(kind, **config)).command == command


@pytest.mark.parametrize(
    ("kind", "config", "place"),
    [
        ("local-process", {}, "/real/slot"),
        ("local-process", {"working_dir": "/elsewhere"}, "/elsewhere"),
        ("docker", {}, "/real/slot"),
        ("docker", {"mount_repo_pool": False}, None),
        ("kubernetes", {}, None),
        ("kubernetes", {"workspace": {"kind": "git"}}, None),
        ("kubernetes", {"workspace": {"kind": "host_path"}}, "/real/slot"),
    ],
)
def test_the_working_directory(kind: str, config: dict[str, Any], place: str | None) -> None:
    assert spec_of(make_pool(kind, **config)).working_dir == place


def test_a_specification_is_resolved() -> None:
    pool = Pool.model_validate(
        {
            "name": "docker",
            "type": "docker",
            "cpu_quota": 2,
            "memory_quota": 512,
            "config": {
                "network": "agents",
                "model": "large",
                "environment": {"KEY": "secret-key"},
                "public_url": "http://host.docker.internal:8080/",
                "run_timeout_seconds": 60,
                "stop_grace_seconds": 5,
                "log_max_mib": 7,
            },
        }
    )
    spec = spec_of(pool)
    assert (spec.cpu, spec.memory_mib) == (2, 512)
    assert (spec.run_timeout_seconds, spec.stop_grace_seconds, spec.log_max_mib) == (60, 5, 7)
    assert spec.context == task_context(launch_request())
    assert spec.environment["RUNNER_LAUNCHER_URL"] == "http://host.docker.internal:8080"
    assert spec.environment["RUNNER_MODEL"] == "large"
    assert spec.environment["KEY"] == "secret-key"
    assert spec.options["network"] == "agents"
    assert spec.options["pull_policy"] == "if-not-present"
    assert spec.options.keys().isdisjoint({"model", "environment"})
    assert json.loads(json.dumps(dict(spec.options))) == spec.options
    assert "secret" not in repr(spec)


def test_only_a_process_on_this_machine_inherits() -> None:
    assert spec_of(make_pool()).environment["PATH"] == "/bin"
    assert "PATH" not in spec_of(make_pool("docker")).environment
    assert "PATH" not in spec_of(make_pool("kubernetes")).environment


def test_quantities_reach_a_launcher_as_cores_and_mebibytes() -> None:
    resources = {"limits": {"cpu": "1500m", "memory": "2Gi", "nvidia.com/gpu": 1}, "requests": {"memory": 512}}
    spec = spec_of(make_pool("kubernetes", resources=resources))
    assert (spec.cpu, spec.memory_mib) == (1.5, 2048)
    assert spec.options["resources"] == {
        "limits": {"cpu": 1.5, "memory": 2048, "nvidia.com/gpu": "1"},
        "requests": {"cpu": None, "memory": 512},
    }
    assert "restart_policy" not in spec.options
