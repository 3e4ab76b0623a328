"""From a LaunchSpec to what is sent to Kubernetes: a Job and the Secret that it owns. Pure; golden files show the result.

The Secret holds all that a runner is told: the context as a file, every variable of its environment under its own name.
Nothing of it is in the Job, and none of it passes through Kubernetes' `$(NAME)` expansion, which spares what comes from a
Secret; in command and arguments `$` is escaped. The pod cannot start before the Secret is there, so the Job is made first.

The program is not process 1 of its pod: the process namespace is shared with the pod's own first process. So a signal's
default action works as on any machine, orphans are reaped, and a stop reaches the whole tree.
"""

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from app.errors import LaunchRejected
from app.job_template import CONTAINER, TOLD, WORKSPACE
from app.launcher import LaunchSpec
from app.reason import Reason

Json = dict[str, Any]

PREFIX = "necrocode-runner-"
INSTALLATION = "runner-launcher/installation"
RUNNER = "runner-id"
IDENTITY = "runner-launcher/labels"
LAUNCH_TIMEOUT = "runner-launcher/launch-timeout-seconds"

WORKSPACE_PATH = "/workspace"
TOLD_PATH = "/run/runner-launcher"
CONTEXT_KEY = "task-context.json"
CONTEXT_FILE = f"{TOLD_PATH}/{CONTEXT_KEY}"
VOLUME_PATH = "/volume"
CLONED = "slot"
CREDENTIALS_PATH = "/run/git-credentials"
URL_KEY = "git.repo-url"
BRANCH_KEY = "git.branch"

MAX_SECRET_BYTES = 1_048_576
"""What a Secret can carry, all its values together."""

DEADLINE_SLACK = 15
"""How much later than the service the kubelet ends a runner that is out of time: it is there for when the service is not."""

CLONE = """\
set -eu
export GIT_TERMINAL_PROMPT=0 GIT_ASKPASS=true HOME="${WORKSPACE%/*}"
mkdir "$WORKSPACE"
if [ -f "$CREDENTIALS/ssh-privatekey" ]; then
  known="-o StrictHostKeyChecking=accept-new -o UserKnownHostsFile=/dev/null"
  [ -f "$CREDENTIALS/known_hosts" ] && known="-o UserKnownHostsFile=$CREDENTIALS/known_hosts"
  export GIT_SSH_COMMAND="ssh -i $CREDENTIALS/ssh-privatekey -o IdentitiesOnly=yes $known"
elif [ -f "$CREDENTIALS/password" ]; then
  git config --global credential.helper \
    '!f() { echo "username=$(cat "$CREDENTIALS/username")"; echo "password=$(cat "$CREDENTIALS/password")"; }; f'
fi
cd "$WORKSPACE"
git init --quiet
git remote add origin "$REPO_URL"
there=0
if [ -n "$BRANCH" ]; then
  git ls-remote --quiet --exit-code origin "refs/heads/$BRANCH" >/dev/null || there=$?
fi
if [ "$there" = 0 ] && [ -n "$BRANCH" ]; then
  git fetch --quiet $DEPTH origin "+refs/heads/$BRANCH:refs/remotes/origin/$BRANCH"
  git checkout --quiet -B "$BRANCH" --track "origin/$BRANCH"
elif [ "$there" = 0 ] || [ "$there" = 2 ]; then
  git fetch --quiet $DEPTH origin HEAD
  git checkout --quiet -B "${BRANCH:-main}" FETCH_HEAD
else
  exit "$there"
fi
"""
"""Makes the workspace, owned by the runner's user as git wants it, and puts the repository there.

A branch that the remote does not have is begun where its default branch stands.
"""

_LABEL = re.compile(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?")
_Named = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Manifests:
    """What one launch sends. The Secret's owner is known once the Job is made."""

    job: Json
    secret: Json


def job_name(runner_id: str) -> str:
    """The name of a runner's Job and of its Secret."""
    return PREFIX + runner_id


def manifests(runner_id: str, spec: LaunchSpec, installation: str) -> Manifests:
    """Write a launch for Kubernetes. Raises LaunchRejected where it cannot be written."""
    options = spec.options
    labels = {
        **{key: label_value(str(value)) for key, value in _of(options, "labels").items()},
        "app": "necrocode-runner",
        "app.kubernetes.io/name": "necrocode-runner",
        "app.kubernetes.io/managed-by": "runner-launcher",
        RUNNER: label_value(runner_id),
        "task-id": label_value(spec.labels.get("task_id", "")),
        INSTALLATION: label_value(installation),
    }
    name, namespace = job_name(runner_id), str(options["namespace"])
    metadata = {"name": name, "namespace": namespace, "labels": labels}
    told = {
        **_of(options, "annotations"),
        "runner-launcher/task-id": spec.labels.get("task_id", ""),
        IDENTITY: json.dumps(dict(spec.labels), ensure_ascii=False, sort_keys=True),  # a pod may outlive its Job
    }
    job: Json = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            **metadata,
            "annotations": {**told, LAUNCH_TIMEOUT: f"{options.get('launch_timeout_seconds', 300):g}"},
        },
        "spec": {
            "backoffLimit": 0,
            "completions": 1,
            "parallelism": 1,
            "completionMode": "NonIndexed",
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {
                "rules": [{"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]
            },
            "template": {"metadata": {"labels": labels, "annotations": told}, "spec": _pod(name, spec)},
        },
    }
    if options.get("ttl_seconds") is not None:
        job["spec"]["ttlSecondsAfterFinished"] = options["ttl_seconds"]
    template = options.get("job_template")
    return Manifests(_merged(template, job) if isinstance(template, dict) else job, _secret(metadata, spec))


def owned(secret: Json, job: Json) -> Json:
    """Give the Secret to the Job as it was made, so that it goes with it."""
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": job["metadata"]["name"], "uid": job["metadata"]["uid"]}
    return {**secret, "metadata": {**secret["metadata"], "ownerReferences": [owner]}}


def label_value(text: str) -> str:
    """Make a valid label value: as it is, or shortened and told apart by a hash."""
    if _LABEL.fullmatch(text):
        return text
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:10]
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', text)[:52].strip('-_.')}-{digest}".strip("-")


def limits(spec: Json) -> Mapping[str, Any]:
    """What the runner's container is limited to, by its pod's specification."""
    runner: Json = next((container for container in spec["containers"] if container["name"] == CONTAINER), {})
    found: Mapping[str, Any] = runner.get("resources", {}).get("limits") or {}
    return found


def _secret(metadata: Json, spec: LaunchSpec) -> Json:
    values = {name: value.encode() for name, value in spec.environment.items() if name != "TASK_CONTEXT_FILE"}
    values[CONTEXT_KEY] = spec.context
    if values.get("TASK_CONTEXT") == spec.context:
        del values["TASK_CONTEXT"]  # the variable is read from where the file is
    if _of(spec.options, "workspace").get("kind") == "git":
        context = json.loads(spec.context)
        values[URL_KEY] = str(context.get("repo_url") or "").encode()
        values[BRANCH_KEY] = str(context.get("branch_name") or "").encode()
        if not values[URL_KEY]:
            raise LaunchRejected("a git workspace needs the slot's repo_url", Reason.CONFIG_ERROR)
    size = sum(map(len, values.values()))
    if size > MAX_SECRET_BYTES:
        raise LaunchRejected(
            f"context and environment are {size} bytes together, and a Secret holds {MAX_SECRET_BYTES}", Reason.CONFIG_ERROR
        )
    data = {name: base64.b64encode(value).decode() for name, value in sorted(values.items())}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": "Opaque", "immutable": True, "data": data}


def _pod(name: str, spec: LaunchSpec) -> Json:
    options = spec.options
    user, group = options.get("run_as_user", 65532), options.get("fs_group")
    group = user if group is None else group
    volume, mount, inits = _workspace(name, spec)
    told = {"secretName": name, "defaultMode": 0o440, "items": [{"key": CONTEXT_KEY, "path": CONTEXT_KEY}]}
    pod: Json = {
        "restartPolicy": "Never",
        "shareProcessNamespace": True,
        "automountServiceAccountToken": bool(options.get("service_account")),
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": max(1, math.ceil(spec.stop_grace_seconds)),
        "securityContext": {
            "runAsNonRoot": user != 0,
            "runAsUser": user,
            "runAsGroup": group,
            "fsGroup": group,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumes": [volume, {"name": TOLD, "secret": told}, *_credentials(options)],
        "containers": [
            {
                "name": CONTAINER,
                "image": options["image"],
                **_given(imagePullPolicy=options.get("image_pull_policy")),
                **({"command": [word.replace("$", "$$") for word in spec.command]} if spec.command else {}),
                "workingDir": WORKSPACE_PATH,
                "env": [
                    *(_variable(variable, name, spec) for variable in sorted(spec.environment)),
                    {"name": "TASK_CONTEXT_FILE", "value": CONTEXT_FILE},
                ],
                **_given(envFrom=options.get("env_from")),
                "resources": _resources(spec),
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                "volumeMounts": [mount, {"name": TOLD, "mountPath": TOLD_PATH, "readOnly": True}],
            }
        ],
    }
    if inits:
        pod["initContainers"] = inits
    if spec.run_timeout_seconds is not None:
        pod["activeDeadlineSeconds"] = math.ceil(spec.run_timeout_seconds + spec.stop_grace_seconds) + DEADLINE_SLACK
    return pod | _given(
        serviceAccountName=options.get("service_account"),
        imagePullSecrets=[{"name": secret} for secret in _list(options, "image_pull_secrets")],
        nodeSelector=options.get("node_selector"),
        tolerations=options.get("tolerations"),
    )


def _variable(variable: str, secret: str, spec: LaunchSpec) -> Json:
    same = variable == "TASK_CONTEXT" and spec.environment[variable].encode() == spec.context
    return {
        "name": variable,
        "valueFrom": {"secretKeyRef": {"name": secret, "key": CONTEXT_KEY if same else variable}},
    }


def _resources(spec: LaunchSpec) -> Json:
    """Limits as the pool gives them; what it does not request is half of the limit."""
    asked = _of(spec.options, "resources")
    limits, requests = dict(asked.get("limits") or {}), dict(asked.get("requests") or {})
    for kind, limit in (("cpu", spec.cpu), ("memory", spec.memory_mib)):
        request = requests.pop(kind, None)
        limits.pop(kind, None)
        if limit is not None:
            limits[kind] = _quantity(kind, limit)
            request = limit / 2 if request is None else request
        if request is not None:
            requests[kind] = _quantity(kind, request)
    limits, requests = ({key: value for key, value in part.items() if value is not None} for part in (limits, requests))
    return _given(limits=limits, requests=requests)


def _quantity(kind: str, amount: float) -> str:
    return f"{max(1, math.floor(amount * 1000))}m" if kind == "cpu" else f"{max(1, math.floor(amount))}Mi"


def _workspace(secret: str, spec: LaunchSpec) -> tuple[Json, Json, list[Json]]:
    """Give the volume, how it is mounted, and what fills it before the runner starts."""
    wanted = _of(spec.options, "workspace")
    volume: Json = {"name": WORKSPACE}
    mount: Json = {"name": WORKSPACE, "mountPath": WORKSPACE_PATH} | _given(readOnly=wanted.get("read_only") or None)
    match wanted.get("kind", "none"):
        case "pvc":
            part = _below(str(wanted["root"]), spec.working_dir)
            claim = {"claimName": wanted["claim"]} | _given(readOnly=wanted.get("read_only") or None)
            return volume | {"persistentVolumeClaim": claim}, mount | _given(subPath=part), []
        case "host_path":
            if spec.working_dir is None:
                raise LaunchRejected("a host_path workspace needs the slot's path", Reason.CONFIG_ERROR)
            return volume | {"hostPath": {"path": spec.working_dir, "type": "Directory"}}, mount, []
        case "git":
            return volume | {"emptyDir": {}}, mount | {"subPath": CLONED}, [_clone(secret, wanted, spec)]
        case _:
            return volume | {"emptyDir": {}}, mount, []


def _below(root: str, slot: str | None) -> str:
    """Where a slot lies in the claim."""
    try:
        part = PurePosixPath(slot or "").relative_to(root)
    except ValueError as error:
        raise LaunchRejected(f"the slot's path {slot} is not below {root}, the claim's root", Reason.CONFIG_ERROR) from error
    if ".." in part.parts:
        raise LaunchRejected(f"the slot's path {slot} leaves the claim's root", Reason.CONFIG_ERROR)
    return "" if part == PurePosixPath() else str(part)


def _clone(secret: str, wanted: Mapping[str, Any], spec: LaunchSpec) -> Json:
    from_secret = {"REPO_URL": URL_KEY, "BRANCH": BRANCH_KEY}
    plain = {
        "WORKSPACE": f"{VOLUME_PATH}/{CLONED}",
        "CREDENTIALS": CREDENTIALS_PATH,
        "DEPTH": f"--depth={wanted['depth']}" if wanted.get("depth") else "",
    }
    mounts = [{"name": WORKSPACE, "mountPath": VOLUME_PATH}]
    if wanted.get("credentials"):
        mounts.append({"name": "git-credentials", "mountPath": CREDENTIALS_PATH, "readOnly": True})  # type: ignore[dict-item]
    return {
        "name": "git",
        "image": wanted["image"],
        **_given(imagePullPolicy=spec.options.get("image_pull_policy")),
        "command": ["sh", "-c", CLONE.replace("$", "$$")],
        "terminationMessagePolicy": "FallbackToLogsOnError",  # what git complains of; it names none it need not ask for
        "env": [
            *(
                {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}
                for name, key in from_secret.items()
            ),
            *({"name": name, "value": value} for name, value in plain.items()),
        ],
        "resources": _resources(spec),
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": mounts,
    }


def _credentials(options: Mapping[str, Any]) -> list[Json]:
    name = _of(options, "workspace").get("credentials")
    return [{"name": "git-credentials", "secret": {"secretName": name, "defaultMode": 0o440}}] if name else []


# The merge.

_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "imagePullSecrets": "name",
    "volumeMounts": "mountPath",
}
"""By what the items of a list are told apart, as Kubernetes' own strategic merge does; other lists are joined."""

_FROM_TEMPLATE = ("securityContext", "automountServiceAccountToken", "enableServiceLinks", "imagePullPolicy")
"""What is a default of ours and no more: where a template says something else, the template is right."""


def _merged(template: Json, ours: Json) -> Json:
    """Lay ours over the template: ours wins, save for defaults."""
    result: Json = _over(template, ours)
    given, pod = _of(_of(_of(template, "spec"), "template"), "spec"), result["spec"]["template"]["spec"]
    _keep_choices(given, pod)
    for container in _list(given, "containers"):
        if container.get("name") == CONTAINER:
            _keep_choices(container, next(c for c in pod["containers"] if c["name"] == CONTAINER))
    return result


def _keep_choices(given: Mapping[str, Any], merged: Json) -> None:
    for key in _FROM_TEMPLATE:
        if given.get(key) is not None:
            merged[key] = _over(merged[key], given[key])


def _over(base: Any, top: Any, key: str = "") -> Any:  # noqa: ANN401 - any JSON
    if top is None:  # written and left empty is no choice
        return base
    if isinstance(base, dict) and isinstance(top, dict):
        return {**base, **{name: _over(base[name], value, name) if name in base else value for name, value in top.items()}}
    if isinstance(base, list) and isinstance(top, list) and key in _KEYS:
        by = _KEYS[key]
        tops = {item[by]: item for item in top}
        deep = key in {"containers", "initContainers"}  # two sources of one variable, or of one volume, are none
        merged = [_over(item if deep else {}, tops.pop(item[by])) if item.get(by) in tops else item for item in base]
        return [*merged, *tops.values()]
    if isinstance(base, list) and isinstance(top, list) and key in {"tolerations", "envFrom"}:
        return [*base, *top]
    return top


def _of(options: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = options.get(key)
    return value if isinstance(value, dict) else {}


def _list(options: Mapping[str, Any], key: str) -> list[Any]:
    value = options.get(key)
    return value if isinstance(value, list) else []


def _given(**keys: Any) -> Json:  # noqa: ANN401 - any JSON
    """Only those keys that say something."""
    return {key: value for key, value in keys.items() if value not in (None, "", [], {})}
