"""What is sent to Kubernetes, as golden files: ``UPDATE_GOLDEN=1`` writes them anew, to be reviewed as a diff.

They are held against the published schemas of the oldest Kubernetes that we write for and of a current one, since the
cluster in CI is older than both and drops what it does not know without a word.
"""

import base64
import json
import os
import re
import subprocess
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from kubernetes_validate import ValidationError, validate
from typing_extensions import override

from app.context import launch_spec
from app.errors import ConfigurationError, LaunchRejected
from app.launcher import LaunchSpec
from app.launchers.job import CLONE, CONTEXT_KEY, MAX_SECRET_BYTES, Manifests, label_value, manifests, owned
from app.models import LaunchRequest
from app.pools import Pool, load_pools

GOLDEN = Path(__file__).parent / "golden/kubernetes"
EXAMPLE = Path(__file__).parents[1] / "examples/pools-kubernetes.yaml"
RBAC = Path(__file__).parents[1] / "deploy/kubernetes/rbac.yaml"
VERSIONS = ("1.30", "1.37")
RUNNER = "runner-0123456789ab"
REQUEST: dict[str, Any] = {
    "task": {
        "id": "T-1 ü/" + "x" * 70,
        "title": "Add a greeting",
        "description": "$(HOME) $$ ${X}\nü",
        "reserved_branch": "feature/greeting",
    },
    "slot": {"slot_id": "s1", "slot_path": "/slots/a/s1", "repo_url": "https://user:secret@git.example.org/a.git"},
}
TEMPLATE = """\
apiVersion: batch/v1
kind: Job
metadata:
  labels: {team: agents}
spec:
  template:
    metadata:
      annotations: {example.org/scrape: "false"}
    spec:
      priorityClassName: agents
      securityContext: {fsGroupChangePolicy: Always, supplementalGroups: [4000]}
      tolerations: [{key: agents, operator: Exists}]
      imagePullSecrets: [{name: registry}]
      initContainers:
        - {name: proxy, image: "proxy:1", restartPolicy: Always}
      containers:
        - name: runner
          env: [{name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}, {name: MODE, value: template}]
          securityContext: {readOnlyRootFilesystem: true}
          volumeMounts: [{name: scratch, mountPath: /tmp}]
          resources: {limits: {example.org/gpu: 1}}
      volumes: [{name: scratch, emptyDir: {medium: Memory}}]
"""
POOLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "full": {
        "namespace": "agents",
        "image": "registry.example.org/agent:1.2",
        "image_pull_policy": "Always",
        "command": ["agent", "--cost=$5", "$(HOME)"],
        "service_account": "agent",
        "image_pull_secrets": ["registry"],
        "node_selector": {"kubernetes.io/arch": "amd64"},
        "tolerations": [{"key": "agents", "operator": "Exists", "effect": "NoSchedule"}],
        "resources": {"requests": {"memory": "256Mi"}, "limits": {"cpu": 2, "memory": 1024, "nvidia.com/gpu": 1}},
        "environment": {"MODE": "fast $$ $(HOME)\nnext"},
        "env_from": [{"configMapRef": {"name": "agents"}}],
        "labels": {"team": "blue & green"},
        "annotations": {"example.org/owner": "Jo <jo@example.org>"},
        "run_as_user": 1000,
        "fs_group": 2000,
        "ttl_seconds": 86400,
        "run_timeout_seconds": 3600,
        "stop_grace_seconds": 30,
    },
    "claim": {"workspace": {"kind": "pvc", "claim": "slots", "root": "/slots"}},
    "host": {"workspace": {"kind": "host_path", "read_only": True}},
    "clone": {"workspace": {"kind": "git", "image": "git:1", "credentials": "git", "depth": 1}},
    "template": {"job_template": TEMPLATE, "environment": {"MODE": "pool"}},
    "root": {"run_as_user": 0},
}


def pool(tmp_path: Path, config: dict[str, Any]) -> Pool:
    if text := config.get("job_template"):
        (tmp_path / "job.yaml").write_text(text)
        config = {**config, "job_template": "job.yaml"}
    path = tmp_path / "pools.yaml"
    path.write_text(yaml.safe_dump({"agent_pools": {"k8s": {"type": "kubernetes", "cpu_quota": 4, "config": config}}}))
    return load_pools(path).by_name["k8s"]


def spec_of(tmp_path: Path, config: dict[str, Any], **request: Any) -> LaunchSpec:  # noqa: ANN401 - JSON
    configured = pool(tmp_path, config)
    spec = launch_spec(
        configured,
        LaunchRequest.model_validate({**REQUEST, **request, "pool": "k8s"}),
        runner_id=RUNNER,
        token="secret-token",  # noqa: S106 - no secret
        url="http://launcher:8080",
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        inherited={},
        default_command=(),
        working_dir="/slots/a/s1",
    )
    return replace(spec, labels={"task_id": REQUEST["task"]["id"], "policy": '{"a": 1}'})


def made(tmp_path: Path, config: dict[str, Any]) -> Manifests:
    return manifests(RUNNER, spec_of(tmp_path, config), "here")


@pytest.mark.parametrize("name", POOLS)
def test_manifests_are_as_reviewed(tmp_path: Path, name: str) -> None:
    both = made(tmp_path, POOLS[name])
    plain = json.loads(json.dumps([both.job, both.secret]))
    text = yaml.safe_dump_all(plain, sort_keys=True, width=110, allow_unicode=True)
    path = GOLDEN / f"{name}.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text(), "look at the difference, and accept it with UPDATE_GOLDEN=1"


def test_every_golden_file_is_of_a_pool() -> None:
    assert {path.stem for path in GOLDEN.glob("*")} == set(POOLS)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", POOLS)
def test_the_published_schema_of_a_current_kubernetes_allows_it(tmp_path: Path, name: str, version: str) -> None:
    both = made(tmp_path, POOLS[name])
    for manifest in (both.job, owned(both.secret, {"metadata": {**both.job["metadata"], "uid": "u-1"}})):
        assert validate(manifest, version, strict=True) == version


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("document", list(yaml.safe_load_all(RBAC.read_text())), ids=lambda one: str(one["kind"]))
def test_the_published_schema_allows_the_role_too(document: dict[str, Any], version: str) -> None:
    assert validate(document, version, strict=True) == version


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"podReplacementPolcy": "Failed"}, "podReplacementPolcy"),
        ({"podReplacementPolicy": 1}, "is not of type"),
        ({"podFailurePolicy": {"rules": [{"onPodConditions": []}]}}, "'action' is a required property"),
    ],
)
def test_that_schema_refuses_what_an_old_cluster_drops_without_a_word(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    job = made(tmp_path, {}).job
    with pytest.raises(ValidationError, match=words):
        validate({**job, "spec": {**job["spec"], **change}}, VERSIONS[0], strict=True)


@pytest.mark.parametrize("name", sorted(set(POOLS) - {"root", "host"}))
def test_pod_security_restricted_holds(tmp_path: Path, name: str) -> None:
    pod = made(tmp_path, POOLS[name]).job["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"] + pod.get("initContainers", []):
        if container["name"] != "proxy":  # the operator's own, from the template
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    kinds = {key for volume in pod["volumes"] for key in volume} - {"name"}
    assert kinds <= {"emptyDir", "secret", "persistentVolumeClaim"}
    assert pod["enableServiceLinks"] is False
    assert pod["automountServiceAccountToken"] is (name == "full")


def test_nothing_that_a_runner_is_told_is_in_the_job(tmp_path: Path) -> None:
    text = json.dumps(made(tmp_path, POOLS["full"] | {"workspace": POOLS["clone"]["workspace"]}).job)
    assert not [word for word in ("secret-token", "fast", "Add a greeting", "user:secret", "launcher:8080") if word in text]


def test_values_are_kept_to_the_byte_and_the_context_is_there_once(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, {"environment": {"STRANGE": "$$ $(X) \n ü\ttail\n"}})
    data = {key: base64.b64decode(value) for key, value in manifests(RUNNER, spec, "here").secret["data"].items()}
    assert data["STRANGE"] == "$$ $(X) \n ü\ttail\n".encode()
    assert data[CONTEXT_KEY] == spec.context
    assert "TASK_CONTEXT" not in data


def test_what_a_secret_cannot_hold_is_rejected(tmp_path: Path) -> None:
    big = {f"BIG{number}": "x" * 131_000 for number in range(MAX_SECRET_BYTES // 131_000 + 1)}
    with pytest.raises(LaunchRejected, match="a Secret holds"):
        made(tmp_path, {"environment": big})


@pytest.mark.parametrize("root", ["/elsewhere", "/slots/a/s1/deeper"])
def test_a_slot_outside_the_claim_is_rejected(tmp_path: Path, root: str) -> None:
    with pytest.raises(LaunchRejected, match="is not below"):
        made(tmp_path, {"workspace": {"kind": "pvc", "claim": "slots", "root": root}})


def test_the_whole_claim_is_a_slot_too(tmp_path: Path) -> None:
    pod = made(tmp_path, {"workspace": {"kind": "pvc", "claim": "c", "root": "/slots/a/s1"}}).job["spec"]["template"]["spec"]
    assert {"name": "workspace", "mountPath": "/workspace"} in pod["containers"][0]["volumeMounts"]


@given(st.text())
def test_label_values_are_valid_and_told_apart(text: str) -> None:
    value = label_value(text)
    assert re.fullmatch(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?", value)
    assert value == text or len(value) >= 10
    assert label_value(text + "!") != value


def test_the_secret_belongs_to_the_job_that_was_made(tmp_path: Path) -> None:
    both = made(tmp_path, {})
    job = {"metadata": {**both.job["metadata"], "uid": "u-1"}}
    assert owned(both.secret, job)["metadata"]["ownerReferences"] == [
        {"apiVersion": "batch/v1", "kind": "Job", "name": f"necrocode-runner-{RUNNER}", "uid": "u-1"}
    ]


# Templates and keys that cannot be.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{kind: Pod}", "kind must be Job"),
        ("{kind: Job, apiVersion: batch/v2}", "apiVersion must be batch/v1"),
        ("{kind: Job, metadata: {name: mine}}", "metadata.name is the launcher's"),
        ("{kind: Job, metadata: {namespace: mine}}", "metadata.namespace is the pool's key namespace"),
        ("{kind: Job, metadata: {labels: {runner-id: x}}}", "metadata.labels.runner-id is the launcher's"),
        ("{kind: Job, spec: {backoffLimit: 3}}", "spec.backoffLimit is the launcher's"),
        ("{kind: Job, spec: []}", "spec must be a mapping"),
        ("{kind: Job, spec: {template: {spec: {restartPolicy: OnFailure}}}}", "spec.template.spec.restartPolicy is"),
        ("{kind: Job, spec: {template: {spec: {containers: {}}}}}", "spec.template.spec.containers must be a list"),
        ("{kind: Job, spec: {template: {spec: {containers: [x]}}}}", "spec.template.spec.containers.0 must be a mapping"),
        ("{kind: Job, metadata: {finalizers: [a/b]}}", "metadata.finalizers is not for a runner"),
        (
            "{kind: Job, spec: {template: {metadata: {finalizers: [a/b]}}}}",
            "spec.template.metadata.finalizers is not for a runner",
        ),
        (
            "{kind: Job, spec: {template: {spec: {volumes: [{name: told}]}}}}",
            "spec.template.spec.volumes.0.name is the name",
        ),
        (
            "{kind: Job, spec: {template: {spec: {containers: [{name: runner, image: x}]}}}}",
            "spec.template.spec.containers.0.image is the pool's key image",
        ),
        (
            "{kind: Job, spec: {template: {spec: {containers: [{name: runner, restartPolicy: OnFailure}]}}}}",
            "spec.template.spec.containers.0.restartPolicy is the launcher's",
        ),
        (
            "{kind: Job, spec: {template: {spec: {containers: [{name: runner, restartPolicyRules: [{action: Restart}]}]}}}}",
            "spec.template.spec.containers.0.restartPolicyRules is the launcher's",
        ),
        (
            (
                "{kind: Job, spec: {template: {spec: {initContainers: "
                "[{restartPolicyRules: [{action: RestartAllContainers}]}]}}}}"
            ),
            "spec.template.spec.initContainers.0.restartPolicyRules.0.action is the launcher's",
        ),
        (
            "{kind: Job, spec: {template: {spec: {containers: [{name: runner, env: [{name: RUNNER_ID, value: x}]}]}}}}",
            "spec.template.spec.containers.0.env.0.name RUNNER_ID is set by the launcher",
        ),
    ],
)
def test_what_a_template_may_not_say_is_refused_with_its_path(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(words)):
        pool(tmp_path, {"job_template": text})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"workspace": {"kind": "pvc"}}, "config.workspace.claim"),
        ({"workspace": {"kind": "git", "clam": "x"}}, "config.workspace.clam"),
        ({"workspace": {"kind": "pvc", "claim": "c", "root": "slots"}}, "must be an absolute path"),
        ({"labels": {"runner-id": "x"}}, "runner-id is the launcher's"),
        ({"annotations": {"a b": "x"}}, "is not a key that Kubernetes takes"),
    ],
)
def test_a_key_that_cannot_be_is_told(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(words)):
        pool(tmp_path, config)


def test_the_example_loads() -> None:
    loaded = load_pools(EXAMPLE)
    assert loaded.by_name
    assert not loaded.warnings


# The clone, by the real git of this machine.


@pytest.mark.parametrize(("branch", "content", "on"), [("there", "b", "there"), ("new", "a", "new"), ("", "a", "main")])
def test_a_workspace_is_cloned_at_its_branch(tmp_path: Path, branch: str, content: str, on: str) -> None:
    remote, workspace = tmp_path / "remote", tmp_path / "volume/slot"
    workspace.parent.mkdir()
    environment = {
        "PATH": os.environ["PATH"],
        "GIT_CONFIG_GLOBAL": "/dev/null",
        **{f"GIT_{who}_{what}": "x@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    }

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], env=environment, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-q", "-b", "main", str(remote))
    for name, text in (("main", "a"), ("there", "b")):
        git("-C", str(remote), "checkout", "-q", "-B", name)
        (remote / "file").write_text(text)
        git("-C", str(remote), "add", "file")
        git("-C", str(remote), "commit", "-q", "-m", name)
    git("-C", str(remote), "checkout", "-q", "main")
    told = {"REPO_URL": f"file://{remote}", "BRANCH": branch, "DEPTH": "--depth=1"}
    places = {"WORKSPACE": str(workspace), "CREDENTIALS": str(tmp_path / "none")}
    subprocess.run(["sh", "-c", CLONE], env={"PATH": os.environ["PATH"], **told, **places}, check=True, capture_output=True)
    assert (workspace / "file").read_text() == content
    assert git("-C", str(workspace), "rev-parse", "--abbrev-ref", "HEAD") == on
    assert git("-C", str(workspace), "status", "--porcelain") == ""


def test_what_a_template_leaves_empty_is_no_choice(tmp_path: Path) -> None:
    empty = "{securityContext: , automountServiceAccountToken: , containers: [{name: runner, securityContext: }]}"
    half = "{securityContext: {seccompProfile: }, containers: [{name: runner, securityContext: {capabilities: }}]}"
    deep = half.replace("seccompProfile: ", "seccompProfile: {type: }").replace("capabilities: ", "capabilities: {drop: }")
    for spec in (empty, half, deep):
        template = f"{{kind: Job, spec: {{template: {{spec: {spec}}}}}}}"
        assert made(tmp_path, {"job_template": template}).job == made(tmp_path, {}).job


def test_a_clone_that_is_refused_tells_no_token(tmp_path: Path) -> None:
    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="git"')
            self.end_headers()

        @override
        def log_message(self, *_: object) -> None:
            pass

    (tmp_path / "volume").mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://token-123@127.0.0.1:{server.server_port}/a.git"
        places = {"WORKSPACE": str(tmp_path / "volume/slot"), "CREDENTIALS": str(tmp_path / "none")}
        told = {"REPO_URL": url, "BRANCH": "main", "DEPTH": ""}
        environment = {"PATH": os.environ["PATH"], **told, **places}
        done = subprocess.run(["sh", "-c", CLONE], env=environment, check=False, capture_output=True, text=True)
        server.shutdown()
    assert done.returncode
    assert "Authentication failed" in done.stderr
    assert "token-123" not in done.stderr
