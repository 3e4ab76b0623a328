"""What Jobs, pods and warnings say of a runner, as tables: also what the cluster in CI cannot bring about."""

from datetime import datetime
from typing import Any

import pytest

from app.launcher import Exit, Exited, Place, Running, Starting
from app.launchers.pod import (
    Conclude,
    Held,
    Judgement,
    Warned,
    Withdraw,
    leaves_unanswered,
    look,
    never_began,
    read_job,
    read_pod,
    read_warning,
    unexplained,
    written,
)
from app.reason import Reason

Json = dict[str, Any]
NOW = 1_800_000_000.0
THEN = "2026-11-23T12:00:00Z"


def job(*, status: Json | None = None, parallelism: int = 1, **notes: str) -> Json:
    annotations = {f"runner-launcher/{key.replace('_', '-')}": value for key, value in notes.items()}
    metadata = {"name": "necrocode-runner-r", "uid": "j", "labels": {"runner-id": "r"}, "creationTimestamp": THEN}
    template = {"spec": {"containers": [{"name": "runner"}]}}
    return {
        "metadata": {**metadata, "annotations": annotations},
        "spec": {"parallelism": parallelism, "template": template},
        "status": status or {},
    }


def pod(name: str = "p", *, state: Json | None = None, conditions: Any = (), inits: Any = (), **status: Any) -> Json:  # noqa: ANN401 - JSON
    containers = [{"name": "runner", "state": state}] if state else []
    metadata = {"name": name, "uid": name, "labels": {"runner-id": "r"}, "creationTimestamp": THEN}
    return {
        "metadata": {**metadata, "ownerReferences": [{"kind": "Job", "uid": "j"}]},
        "spec": {"nodeName": "n"},
        "status": {
            "conditions": list(conditions),
            "containerStatuses": containers,
            "initContainerStatuses": list(inits),
            "startTime": THEN,
            **status,
        },
    }


def ended(code: int, reason: str = "Error", **more: Any) -> Json:  # noqa: ANN401 - JSON
    return {"terminated": {"exitCode": code, "reason": reason, "finishedAt": THEN, **more}}


def waiting(reason: str, message: str = "") -> Json:
    return {"waiting": {"reason": reason, "message": message}}


def seen(a_job: Json | None, *pods: Json, last: Json | None = None, warnings: list[Warned] | None = None) -> Judgement:
    return look(
        read_job(a_job) if a_job else None,
        [read_pod(one) for one in pods],
        read_pod(last) if last else None,
        {about: [one for one in warnings or [] if one.about == about] for about in {one.about for one in warnings or []}},
        NOW,
    )


def end_of(answer: Judgement) -> Exit:
    assert isinstance(answer, Exited | Conclude)
    return answer.exit


RUNNING = {"running": {"startedAt": THEN}}
DISRUPTED = {"type": "DisruptionTarget", "status": "True", "message": "the cluster's words"}
BY_KUBELET = {**DISRUPTED, "reason": "TerminationByKubelet"}


@pytest.mark.parametrize(
    ("status", "state", "reason", "words"),
    [
        ({"phase": "Failed", "reason": "Evicted", "message": "low on memory"}, None, Reason.EVICTED, "low on memory"),
        ({"phase": "Failed", "reason": "Preempting", "message": "m"}, None, Reason.PREEMPTED, "m"),
        ({"phase": "Failed", "reason": "Terminated", "message": "shutdown"}, ended(143), Reason.NODE_LOST, "shutdown"),
        ({"phase": "Failed", "reason": "OutOfcpu", "message": "no cpu"}, None, Reason.UNSCHEDULABLE, "no cpu"),
        ({"phase": "Failed", "reason": "UnexpectedAdmissionError"}, None, Reason.UNSCHEDULABLE, "Unexpected"),
        ({"phase": "Failed", "reason": "DeadlineExceeded", "message": "m"}, ended(137), Reason.DEADLINE_EXCEEDED, "m"),
        ({"phase": "Failed"}, ended(137, "OOMKilled"), None, ""),
        ({"phase": "Failed"}, ended(127, "ContainerCannotRun", message="no sh"), Reason.CONFIG_ERROR, "no sh"),
        ({"phase": "Failed"}, ended(128, "StartError", message="no sh"), Reason.CONFIG_ERROR, "no sh"),
        ({"phase": "Failed"}, None, Reason.LOST, "nothing tells"),
        ({"phase": "Failed", "reason": "TopologyAffinityError", "message": "m"}, None, Reason.UNSCHEDULABLE, "Affinity"),
        ({"phase": "Failed", "reason": "New", "message": "no room"}, None, Reason.LOST, "how its program did: New: no room"),
        (
            {"phase": "Failed", "reason": "Terminated", "message": "shutdown", "conditions": [BY_KUBELET]},
            ended(143),
            Reason.NODE_LOST,
            "Terminated: shutdown",
        ),
        (
            {"phase": "Failed", "reason": "Preempting", "message": "critical", "conditions": [BY_KUBELET]},
            ended(143),
            Reason.PREEMPTED,
            "Preempting: critical",
        ),
        (
            {"phase": "Failed", "reason": "Evicted", "message": "low on disk", "conditions": [BY_KUBELET]},
            ended(137),
            Reason.EVICTED,
            "low on disk",
        ),
        ({"phase": "Failed", "conditions": [BY_KUBELET]}, ended(137), Reason.EVICTED, "the cluster's words"),
        (
            {"phase": "Failed", "conditions": [{**DISRUPTED, "reason": "PreemptionByScheduler"}]},
            ended(143),
            Reason.PREEMPTED,
            "the cluster's words",
        ),
        (
            {"phase": "Failed", "conditions": [{**DISRUPTED, "reason": "DeletionByTaintManager"}]},
            ended(137, "ContainerStatusUnknown"),
            Reason.NODE_LOST,
            "the cluster's words",
        ),
        (
            {"phase": "Failed", "conditions": [{**DISRUPTED, "reason": "EvictionByEvictionAPI"}]},
            ended(143),
            Reason.EVICTED,
            "the cluster's words",
        ),
    ],
)
def test_ends_from_outside_are_told_in_the_clusters_words(
    status: Json, state: Json | None, reason: Reason | None, words: str
) -> None:
    end = end_of(seen(job(), pod(state=state, **status)))
    assert end.reason == reason
    assert words in (end.message or "")
    assert end.code != 0


def test_a_program_that_completed_did_so_whatever_befell_its_pod() -> None:
    end = end_of(seen(job(), pod(state=ended(0, "Completed"), phase="Succeeded", reason="Evicted")))
    assert (end.code, end.reason) == (0, None)


@pytest.mark.parametrize("code", [0, 3, 143])
@pytest.mark.parametrize(("limit", "late"), [(59, True), (60, True), (61, False)])
def test_a_deadline_is_the_end_of_what_it_ended_whatever_its_code(code: int, limit: int, late: bool) -> None:  # noqa: FBT001 - a table
    over = pod(state=ended(code, finishedAt="2026-11-23T12:01:00Z"), phase="Failed", reason="DeadlineExceeded")
    over["spec"]["activeDeadlineSeconds"] = limit
    end = end_of(seen(job(), over))
    assert (end.code, end.reason) == (code, Reason.DEADLINE_EXCEEDED if late else None)


def test_out_of_memory_needs_a_non_zero_end() -> None:
    assert end_of(seen(job(), pod(state=ended(137, "OOMKilled"), phase="Failed"))).oom_killed
    assert not end_of(seen(job(), pod(state=ended(0, "OOMKilled"), phase="Succeeded"))).oom_killed


def test_a_pod_that_shows_no_container_is_not_over_while_it_runs() -> None:
    assert seen(job(), pod(state=RUNNING, phase="Running")) == Running()
    assert seen(job(), pod(state=RUNNING, phase="Unknown", reason="NodeLost")) == Running()


@pytest.mark.parametrize(
    ("image", "told"),
    [
        ("docker.io/library/busybox@sha256:1", "docker.io/library/busybox@sha256:1"),
        ("docker-pullable://busybox@sha256:1", "busybox@sha256:1"),
        ("docker://sha256:2", "sha256:2"),
        ("sha256:2", "sha256:2"),
        ("", None),
    ],
)
def test_node_and_image_are_told_of_what_runs_and_of_what_ran(image: str, told: str | None) -> None:
    for state, phase in ((RUNNING, "Running"), (ended(3), "Failed")):
        one = pod(state=state, phase=phase)
        one["status"]["containerStatuses"][0]["imageID"] = image
        answer = seen(job(), one)
        assert isinstance(answer, Running | Exited)
        assert answer.place == Place(node="n", image_digest=told)


def test_a_failed_init_container_is_told() -> None:
    inits = [{"name": "git", "state": ended(128, message="no such branch")}]
    end = end_of(seen(job(), pod(state=waiting("PodInitializing"), inits=inits, phase="Failed")))
    assert (end.reason, end.message) == (Reason.INIT_FAILED, "init container git exited with code 128: no such branch")


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ({"conditions": [{**DISRUPTED, "reason": "PreemptionByScheduler"}]}, Reason.PREEMPTED),
        ({"conditions": [{**DISRUPTED, "reason": "EvictionByEvictionAPI"}]}, Reason.EVICTED),
        ({"conditions": [{**DISRUPTED, "reason": "DeletionByTaintManager"}]}, Reason.NODE_LOST),
        ({"reason": "OutOfcpu"}, Reason.UNSCHEDULABLE),
        ({"reason": "Evicted"}, Reason.EVICTED),
    ],
)
def test_an_init_container_that_was_ended_from_outside_did_not_fail(status: Json, reason: Reason) -> None:
    inits = [{"name": "git", "state": ended(143)}]
    end = end_of(seen(job(), pod(state=waiting("PodInitializing"), inits=inits, phase="Failed", **status)))
    assert end.reason is reason


def with_sidecar(state: Json, sidecar: Json, **status: Any) -> Json:  # noqa: ANN401 - JSON
    one = pod(state=state, inits=[{"name": "proxy", "state": sidecar}], **status)
    one["spec"]["initContainers"] = [{"name": "proxy", "restartPolicy": "Always"}]
    return one


def test_what_holds_up_the_main_container_is_told_beside_a_sidecar_that_runs() -> None:
    answer = seen(job(), with_sidecar(waiting("ImagePullBackOff", "manifest unknown"), RUNNING))
    assert isinstance(answer, Held)
    assert (answer.reason, answer.patience) == (Reason.IMAGE_NOT_FOUND, 30)
    answer = seen(job(), with_sidecar(waiting("CreateContainerConfigError", 'secret "x" not found'), RUNNING))
    assert isinstance(answer, Held)
    assert (answer.reason, answer.patience) == (Reason.CONFIG_ERROR, 30)


def test_a_sidecar_that_cannot_start_is_told_and_one_that_ended_is_no_failed_start() -> None:
    answer = seen(job(), with_sidecar(waiting("PodInitializing"), waiting("ErrImagePull", "manifest unknown")))
    assert isinstance(answer, Held)
    assert answer.reason is Reason.IMAGE_NOT_FOUND
    end = end_of(seen(job(), with_sidecar(waiting("PodInitializing"), ended(137), phase="Failed")))
    assert end.reason is Reason.LOST


PULL = "Failed to pull image: rpc error: manifest for a:b not found"


@pytest.mark.parametrize(
    ("status", "warned", "reason", "patience"),
    [
        ({"state": waiting("InvalidImageName", "a b")}, None, Reason.CONFIG_ERROR, 0),
        ({"state": waiting("ErrImageNeverPull")}, None, Reason.IMAGE_NOT_FOUND, 0),
        ({"state": waiting("ErrImagePull", "connection refused")}, None, Reason.IMAGE_PULL_FAILED, 30),
        ({"state": waiting("ImagePullBackOff", "Back-off")}, ("Failed", PULL), Reason.IMAGE_NOT_FOUND, 30),
        ({"inits": [{"name": "git", "state": waiting("ImagePullBackOff", "x")}]}, None, Reason.IMAGE_PULL_FAILED, 30),
        ({"state": waiting("CreateContainerConfigError", 'secret "x" not found')}, None, Reason.CONFIG_ERROR, 30),
        (
            {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes"}]},
            None,
            Reason.UNSCHEDULABLE,
            270,
        ),
        ({"state": waiting("ContainerCreating")}, ("FailedMount", 'configmap "x" not found'), Reason.CONFIG_ERROR, 270),
        ({"state": waiting("ContainerCreating")}, None, None, None),
        ({"inits": [{"name": "git", "state": RUNNING}], "state": waiting("PodInitializing")}, None, None, None),
    ],
)
def test_what_holds_a_pod_up_is_told(
    status: Json, warned: tuple[str, str] | None, reason: Reason | None, patience: float | None
) -> None:
    warnings = [Warned(about="p", reason=warned[0], message=warned[1], at=1)] if warned else []
    held = seen(job(), pod(phase="Pending", **status), warnings=warnings)
    assert isinstance(held, Held)
    assert (held.reason, held.patience) == (reason, patience)
    assert bool(held.problem) == (reason is not None)
    if warned:
        assert warned[1] in (held.problem or "")


@pytest.mark.parametrize(
    ("message", "reason", "patience"),
    [
        ("pods is forbidden: exceeded quota: q, requested: pods=1", Reason.QUOTA_EXCEEDED, 270),
        ('error looking up service account ns/x: serviceaccount "x" not found', Reason.CONFIG_ERROR, 30),
        ('Error creating: admission webhook "w" denied the request: no Timeout: x', Reason.LAUNCH_REJECTED, 30),
        ('pods "x" is forbidden: violates PodSecurity "restricted:latest"', Reason.LAUNCH_REJECTED, 30),
    ],
)
def test_a_pod_that_is_refused_is_told_of(message: str, reason: Reason, patience: float) -> None:
    held = seen(job(), warnings=[Warned(about="j", reason="FailedCreate", message=message, at=1)])
    assert held == Held(problem=f"its pod is refused: {message}", cause=held.cause, reason=reason, patience=patience)  # type: ignore[union-attr]


def test_what_a_webhook_did_not_answer_is_tried_again() -> None:
    message = 'Error creating: Internal error occurred: failed calling webhook "w": Post "https://w/": context deadline'
    held = seen(job(), warnings=[Warned(about="j", reason="FailedCreate", message=message, at=1)])
    assert isinstance(held, Held)
    assert (held.reason, held.patience) == (Reason.ENGINE_UNAVAILABLE, 270)
    assert message in (held.problem or "")


def test_a_second_pod_is_the_first_ones_end() -> None:
    end = end_of(seen(job(first_pod="p"), pod("q", state=RUNNING, phase="Running")))
    assert (end.code, end.reason, end.stopped) == (None, Reason.DELETED, False)
    assert "second pod, q" in (end.message or "")
    first = pod(state=ended(9), phase="Failed")
    assert end_of(seen(job(first_pod="p"), first, pod("q", phase="Pending"))).code == 9


def test_while_the_first_pod_lives_a_second_one_only_has_its_job_withdrawn() -> None:
    first, second = pod(state=RUNNING, phase="Running"), pod("q", phase="Pending")
    for notes in ({}, {"first_pod": "p"}):
        assert seen(job(**notes), first, second) == Withdraw()  # type: ignore[arg-type]
        withdrawn = job(parallelism=0, **notes)  # type: ignore[arg-type]
        assert seen(withdrawn, first, second) == Running()
        assert seen(withdrawn, first) == Running()
        for end in (
            end_of(seen(withdrawn, pod(state=ended(9), phase="Failed"))),
            end_of(seen(withdrawn, last=pod(state=ended(9), phase="Failed"))),
        ):
            assert (end.code, end.stopped) == (9, False)
            assert "second pod" in (end.message or "")
        vanished = end_of(seen(withdrawn))  # by a service that came up later
        assert (vanished.reason, vanished.stopped) == (Reason.DELETED, False)
        assert "second pod" in (vanished.message or "")


SILENT = [{"type": "ContainersReady", "status": "True"}, {"type": "Ready", "status": "False"}]
BY_GATES = [SILENT[0], {**SILENT[1], "reason": "ReadinessGatesNotReady"}]
TAINTED = Warned(about="p", reason="TaintManagerEviction", message="Marking for deletion Pod ns/p", at=1)
UNTAINTED = Warned(about="p", reason="TaintManagerEviction", message="Cancelling deletion of Pod ns/p", at=1)
PREEMPTED = Warned(about="p", reason="Preempted", message="Preempted by ns/q on node n", at=1)


@pytest.mark.parametrize(
    ("conditions", "event", "reason"),
    [
        ([], None, Reason.DELETED),
        (SILENT, None, Reason.NODE_LOST),
        (BY_GATES, None, Reason.DELETED),
        ([], TAINTED, Reason.NODE_LOST),
        ([], UNTAINTED, Reason.DELETED),
        ([], PREEMPTED, Reason.PREEMPTED),
        (SILENT, PREEMPTED, Reason.PREEMPTED),
    ],
)
def test_why_a_pod_was_deleted_that_does_not_tell_itself(conditions: Any, event: Warned | None, reason: Reason) -> None:  # noqa: ANN401 - JSON
    told = [event] if event else []
    last = pod(state=RUNNING, phase="Running", conditions=conditions)
    end = end_of(seen(job(first_pod="p"), last=last, warnings=told))
    assert (end.code, end.reason, end.stopped) == (None, reason, False)
    assert unexplained(end) == (reason is Reason.DELETED)
    if event and reason is not Reason.DELETED:
        assert event.message in (end.message or "")
        assert end_of(seen(job(first_pod="p"), warnings=told)).reason is reason  # by a service that came up later
        killed = end_of(seen(job(), pod(state=ended(143), phase="Failed"), warnings=told))
        assert (killed.code, killed.reason) == (143, reason)
        assert end_of(seen(job(), pod(state=ended(0), phase="Succeeded"), warnings=told)).reason is None


def test_a_deleted_pod_whose_node_tells_no_code_is_told_as_deleted() -> None:
    silent = pod(phase="Failed")
    silent["metadata"]["deletionTimestamp"] = THEN
    answer = seen(job(), silent)
    assert isinstance(answer, Conclude)  # written down, for nothing will tell it when the pod is gone
    assert end_of(answer).reason is Reason.DELETED
    assert end_of(seen(job(stopped_at="1"), silent)).stopped is True


DELETED_AT = datetime.fromisoformat(THEN).timestamp()


@pytest.mark.parametrize(
    ("state", "status", "notes", "reason"),
    [
        (ended(143), {}, {}, Reason.DELETED),
        (ended(137, finishedAt="2026-11-23T12:00:30Z"), {}, {}, Reason.DELETED),
        (ended(3, finishedAt="2026-11-23T11:59:59Z"), {}, {}, None),  # by itself, before
        (ended(0, "Completed"), {}, {}, None),
        (ended(137, "OOMKilled"), {}, {}, None),
        (ended(143), {}, {"stopped_at": "1"}, None),
        (ended(143), {}, {"stopping_at": f"{DELETED_AT}"}, None),  # ours, by deletion
        (ended(143), {"reason": "Evicted"}, {}, Reason.EVICTED),
        (ended(143), {"conditions": [{**DISRUPTED, "reason": "PreemptionByScheduler"}]}, {}, Reason.PREEMPTED),
    ],
)
def test_a_deleted_pod_whose_node_tells_the_code_is_told_as_deleted_with_it(
    state: Json, status: Json, notes: dict[str, str], reason: Reason | None
) -> None:
    deleted = pod(state=state, phase="Failed", **status)
    deleted["metadata"] |= {"deletionTimestamp": "2026-11-23T12:00:30Z", "deletionGracePeriodSeconds": 30}
    end = end_of(seen(job(**notes), deleted))  # type: ignore[arg-type] # notes are texts
    assert (end.code, end.reason) == (state["terminated"]["exitCode"], reason)
    assert end.stopped is bool(notes)
    if reason is Reason.DELETED:
        assert f"code {end.code}" in (end.message or "")
        assert end_of(seen(job(), last=deleted)).reason is reason  # also once the pod is gone
        assert unexplained(end)  # events may still say why


WITHOUT_NODE = pod(phase="Pending")
WITHOUT_NODE["spec"] = {}


@pytest.mark.parametrize(
    ("end", "last", "never"),
    [
        (Exit(reason=Reason.QUOTA_EXCEEDED, stopped=False), None, True),
        (Exit(reason=Reason.UNSCHEDULABLE, stopped=False), WITHOUT_NODE, True),
        (Exit(reason=Reason.IMAGE_NOT_FOUND, stopped=False), pod(state=waiting("ErrImagePull")), True),
        (Exit(reason=Reason.LAUNCH_REJECTED, stopped=False), None, True),
        (Exit(reason=Reason.CONFIG_ERROR, code=128), pod(state=ended(128, "StartError", startedAt=THEN)), True),
        (Exit(reason=Reason.UNSCHEDULABLE, code=137), pod(state=ended(137, startedAt=THEN)), False),  # by a new kubelet
        (Exit(reason=Reason.IMAGE_NOT_FOUND), pod(state=RUNNING, phase="Running"), False),  # in the last moment
        (Exit(reason=Reason.DELETED), WITHOUT_NODE, False),
        (Exit(reason=Reason.LOST), None, False),
        (Exit(code=0), None, False),
    ],
)
def test_a_runner_that_never_began_has_no_log_to_lose(end: Exit, last: Json | None, never: bool) -> None:  # noqa: FBT001 - a table
    assert never_began(end, read_pod(last) if last else None) is never


def test_what_was_stopped_before_it_had_a_node_never_began() -> None:
    stopped = job(parallelism=0, stopping_at="1")
    for last, never in ((None, True), (WITHOUT_NODE, True), (pod(phase="Pending"), False), (pod(state=RUNNING), False)):
        end = end_of(seen(stopped, last=last))
        assert end.stopped
        assert never_began(end, read_pod(last) if last else None) is never


def test_of_an_end_without_a_job_nothing_tells_whether_a_stop_came_first() -> None:
    assert end_of(seen(None, pod(state=ended(143), phase="Failed"))).stopped is None


def test_a_pod_that_is_gone_is_judged_by_what_was_last_seen_of_it() -> None:
    assert end_of(seen(job(), last=pod(state=ended(9), phase="Failed"))).code == 9
    lost = end_of(seen(job(), last=pod(state=RUNNING, phase="Running")))
    assert (lost.code, lost.reason) == (None, Reason.DELETED)
    stopped = end_of(seen(job(stopped_at="1"), last=pod(state=RUNNING, phase="Running")))
    assert (stopped.code, stopped.stopped) == (None, True)


@pytest.mark.parametrize(
    ("since", "unanswered"), [(0, False), (29, False), (31, True), (-5, False), (-40, True), (None, True)]
)
def test_a_stop_is_not_left_unanswered_for_ever(since: float | None, unanswered: bool) -> None:  # noqa: FBT001 - a table
    asked = read_job(job(stopping_at=f"{NOW - since}") if since is not None else job())
    assert leaves_unanswered(asked, NOW) is unanswered
    assert leaves_unanswered(None, NOW)  # nothing tells since when


def test_of_a_stop_that_a_service_died_over_only_the_times_tell() -> None:
    at = datetime.fromisoformat(THEN).timestamp()
    after = pod(state=ended(143), phase="Failed")
    assert end_of(seen(job(stopping_at=f"{at + 0.7}"), after)).stopped is True  # a kubelet tells whole seconds
    assert end_of(seen(job(stopping_at=f"{at + 1.2}"), after)).stopped is False
    assert end_of(seen(job(stopping_at=f"{at + 1.2}", stopped_at=f"{at + 1.3}"), after)).stopped is True
    assert end_of(seen(job(parallelism=0, stopping_at=f"{at}"), last=pod(phase="Pending"))).stopped is True
    torn = pod(state=ended(128, "ContainerCannotRun", message="cannot start a container that has stopped"), phase="Failed")
    end = end_of(seen(job(parallelism=0, stopping_at=f"{at}"), torn))
    assert (end.code, end.reason, end.stopped) == (None, None, True)


def test_without_a_pod_the_job_is_asked() -> None:
    complete = {"conditions": [{"type": "Complete", "status": "True"}]}
    failed = {"conditions": [{"type": "FailureTarget", "status": "True", "reason": "PodFailurePolicy", "message": "m"}]}
    assert end_of(seen(job(status=complete))).code == 0
    end = end_of(seen(job(status=failed)))
    assert (end.code, end.reason) == (None, Reason.LOST)
    assert "PodFailurePolicy: m" in (end.message or "")
    assert end_of(seen(job(first_pod="p"))).reason is Reason.DELETED
    assert isinstance(seen(job()), Held)


def test_an_end_that_was_written_down_is_the_end_once_nothing_lives() -> None:
    end = Exit(code=None, reason=Reason.UNSCHEDULABLE, message="0/1 nodes ü", stopped=False)
    noted = job(end=written(end))
    assert seen(noted) == Exited(end)
    assert seen(noted, pod(state=RUNNING, phase="Running")) == Running()
    assert seen(noted, pod(state=waiting("ErrImagePull"), phase="Pending")) == Starting("0/1 nodes ü")
    assert isinstance(end_of(seen(job(end="{nonsense"))).message, str)


def test_an_old_kubelet_never_tells_the_end_at_a_deadline() -> None:
    """1.20 leaves the container `running` in the status of a pod that it failed."""
    late = pod(state=RUNNING, phase="Failed", reason="DeadlineExceeded", message="m")
    late["spec"]["activeDeadlineSeconds"] = 60
    assert end_of(seen(job(), late)).reason is Reason.DEADLINE_EXCEEDED
    late["spec"]["activeDeadlineSeconds"] = NOW
    assert seen(job(), late) == Running()


def test_both_forms_of_events_are_read() -> None:
    old = {"metadata": {}, "involvedObject": {"uid": "p"}, "reason": "R", "message": "m", "lastTimestamp": THEN}
    new = {"metadata": {}, "regarding": {"uid": "p"}, "reason": "R", "note": "m", "eventTime": "2026-11-23T12:00:00.000000Z"}
    assert read_warning(old) == read_warning(new)


def test_a_deleted_pod_that_no_node_had_taken_is_over_though_something_holds_it() -> None:
    stopped = job(parallelism=0, stopping_at="1")
    for phase in ("Pending", "Failed"):
        held = pod(phase=phase)
        held["spec"] = {}
        held["metadata"]["deletionTimestamp"] = THEN
        end = end_of(seen(stopped, held))
        assert (end.stopped, end.reason, never_began(end, read_pod(held))) == (True, None, True)
        gone = end_of(seen({**stopped, "status": {"failed": 1, "conditions": [FAILED]}}, last=held))
        assert (gone.stopped, gone.reason, never_began(gone, read_pod(held))) == (True, None, True)


FAILED = {"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded"}
