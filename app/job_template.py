"""A Job in YAML that an operator gives to a pool: what the launcher's own Job is merged into, and what it may not say.

Everything a pod can have may come through it, save for what the launcher must decide so that a runner is one pod, is found
again, and ends when it should. Where a pool has a key for something, the key is where it belongs.
"""

from collections.abc import Iterator, Mapping, Sequence

from pydantic import JsonValue

CONTAINER = "runner"
"""The container that is the runner; every other one in a template is its company."""

TOLD = "told"
WORKSPACE = "workspace"
"""The volumes that the launcher makes."""

OWN_LABELS = frozenset({"app", "runner-id", "task-id", "app.kubernetes.io/name", "app.kubernetes.io/managed-by"})
OWN_PREFIX = "runner-launcher/"
"""Labels and annotations under it are the launcher's."""

_Path = tuple[str | int, ...]
_Fault = tuple[_Path, str]

_POD: _Path = ("spec", "template", "spec")
_ONE_POD = "is the launcher's: a runner is one pod that is never started again"
_NAMED = "is the launcher's: it finds its runners by it"
_KEPT = "is not for a runner: nothing may keep what the launcher removes"
_REFUSED: Mapping[_Path, str] = {
    ("metadata", "name"): _NAMED,
    ("metadata", "generateName"): _NAMED,
    ("metadata", "namespace"): "is the pool's key namespace",
    ("metadata", "ownerReferences"): "is not for a runner: nothing but the launcher may remove it",
    ("metadata", "finalizers"): _KEPT,
    ("spec", "backoffLimit"): _ONE_POD,
    ("spec", "backoffLimitPerIndex"): _ONE_POD,
    ("spec", "maxFailedIndexes"): _ONE_POD,
    ("spec", "completions"): _ONE_POD,
    ("spec", "completionMode"): _ONE_POD,
    ("spec", "parallelism"): _ONE_POD,
    ("spec", "podFailurePolicy"): _ONE_POD,
    ("spec", "podReplacementPolicy"): _ONE_POD,
    ("spec", "successPolicy"): _ONE_POD,
    ("spec", "managedBy"): _ONE_POD,
    ("spec", "selector"): _NAMED,
    ("spec", "manualSelector"): _NAMED,
    ("spec", "activeDeadlineSeconds"): "is the pool's key run_timeout_seconds",
    ("spec", "ttlSecondsAfterFinished"): "is the pool's key ttl_seconds",
    ("spec", "template", "metadata", "finalizers"): _KEPT,
    (*_POD, "restartPolicy"): _ONE_POD,
    (*_POD, "activeDeadlineSeconds"): "is the pool's key run_timeout_seconds",
    (*_POD, "terminationGracePeriodSeconds"): "is the pool's key stop_grace_seconds",
    (*_POD, "shareProcessNamespace"): "is the launcher's: by it a stop reaches the whole tree",
    (*_POD, "hostPID"): "would let a stop reach every process of the node",
    (*_POD, "securityContext", "runAsUser"): "is the pool's key run_as_user",
    (*_POD, "securityContext", "runAsGroup"): "is the pool's key fs_group",
    (*_POD, "securityContext", "fsGroup"): "is the pool's key fs_group",
}
_REFUSED_IN_RUNNER: Mapping[str, str] = {
    "image": "is the pool's key image",
    "args": "is the pool's key command",
    "command": "is the pool's key command",
    "workingDir": "is the launcher's: a runner starts in /workspace",
    "stdin": "is not for a runner: nobody types",
    "tty": "is not for a runner: nobody types",
    "restartPolicy": _ONE_POD,
    "restartPolicyRules": _ONE_POD,
}
_LISTS: tuple[_Path, ...] = tuple(
    (*_POD, name) for name in ("containers", "initContainers", "volumes", "tolerations", "imagePullSecrets")
)


def faults(template: Mapping[str, JsonValue], reserved: frozenset[str]) -> Iterator[_Fault]:
    """Say what in a template cannot be, each with its path; ``reserved`` are the variables by which runners are told."""
    if template.get("kind") != "Job":
        yield ("kind",), "must be Job"
    if template.get("apiVersion", "batch/v1") != "batch/v1":
        yield ("apiVersion",), "must be batch/v1"
    for path in (("metadata",), ("spec",), ("spec", "template"), ("spec", "template", "metadata"), _POD):
        if not isinstance(_at(template, path), dict | None):
            yield path, "must be a mapping"
    for path in _LISTS:
        yield from _misshapen(path, _at(template, path), named=path[-1] not in {"tolerations", "imagePullSecrets"})
    for path, why in _REFUSED.items():
        if _at(template, path) is not None:
            yield path, why
    for place in (("metadata",), ("spec", "template", "metadata")):
        for kind in ("labels", "annotations"):
            for key in _mapping(_at(template, (*place, kind))):
                if key in OWN_LABELS or key.startswith(OWN_PREFIX):
                    yield (*place, kind, key), _NAMED
    for index, volume in enumerate(_maps(_at(template, (*_POD, "volumes")))):
        if volume.get("name") in {TOLD, WORKSPACE}:
            yield (*_POD, "volumes", index, "name"), "is the name of a volume of the launcher's"
    for index, container in enumerate(_maps(_at(template, (*_POD, "containers")))):
        if container.get("name") == CONTAINER:
            yield from _runner_faults((*_POD, "containers", index), container, reserved)
    for kind in ("containers", "initContainers"):
        for index, container in enumerate(_maps(_at(template, (*_POD, kind)))):
            for number, rule in enumerate(_maps(container.get("restartPolicyRules"))):
                if rule.get("action") == "RestartAllContainers":  # the runner with them
                    yield (*_POD, kind, index, "restartPolicyRules", number, "action"), _ONE_POD


def _runner_faults(at: _Path, container: Mapping[str, JsonValue], reserved: frozenset[str]) -> Iterator[_Fault]:
    for key, why in _REFUSED_IN_RUNNER.items():
        if key in container:
            yield (*at, key), why
    for name in ("env", "envFrom", "volumeMounts"):
        yield from _misshapen((*at, name), container.get(name), named=name == "env")
    for index, variable in enumerate(_maps(container.get("env"))):
        if variable.get("name") in reserved:
            yield (*at, "env", index, "name"), f"{variable.get('name')} is set by the launcher"
    context = container.get("securityContext")
    if isinstance(context, dict) and context.get("runAsUser") is not None:
        yield (*at, "securityContext", "runAsUser"), "is the pool's key run_as_user"


def _misshapen(path: _Path, value: JsonValue, *, named: bool) -> Iterator[_Fault]:
    if not isinstance(value, list | None):
        yield path, "must be a list"
        return
    for index, item in enumerate(value or []):
        if not isinstance(item, dict):
            yield (*path, index), "must be a mapping"
        elif named and not isinstance(item.get("name"), str):
            yield (*path, index, "name"), "is missing"


def _at(value: JsonValue | Mapping[str, JsonValue], path: _Path) -> JsonValue:
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) and isinstance(key, str) else None
    return value  # type: ignore[return-value] # a path is never empty


def _mapping(value: JsonValue) -> Mapping[str, JsonValue]:
    return value if isinstance(value, dict) else {}


def _maps(value: JsonValue) -> Sequence[Mapping[str, JsonValue]]:
    return [_mapping(item) for item in value] if isinstance(value, list) else []
