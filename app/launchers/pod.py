"""What a Job, its pods and the warnings about them say of a runner. Pure: from the API's JSON to an Observation.

A pod tells how its container ended; a Job only counts. So the Job is asked where a pod never came or is there no more. What
we decided ourselves is written on the Job: its end, where a pod could not tell it, and that a stop reached the runner.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

from app.job_template import CONTAINER
from app.launcher import Exit, Exited, Observation, Place, Running, Starting
from app.launchers.job import IDENTITY, LAUNCH_TIMEOUT, PREFIX, RUNNER
from app.reason import Reason

Json = dict[str, Any]

END = "runner-launcher/end"
STOPPING = "runner-launcher/stopping-at"
STOPPED = "runner-launcher/stopped-at"
FIRST_POD = "runner-launcher/first-pod"

PULL_SECONDS = 30.0
"""How long a pull may fail before it counts: registries have their moments."""

SETTLE_SECONDS = 30.0
"""How long something that is missing may stay missing: our own Secret comes after the Job."""

UNANSWERED_SECONDS = 30.0
"""How long a container that answers neither yes nor no is asked to stop, before its pod is deleted."""

NO_POD_SECONDS = 6.0
DYING_SECONDS = 10.0
_PASSING = 0.9
"""What may pass (a full cluster, a quota) has this share of the launch timeout: then it is told by its own name."""

_NOT_STARTED = "ended before it started"
_NEVER_BEGAN = {
    Reason.CONFIG_ERROR,
    Reason.ENGINE_UNAVAILABLE,
    Reason.IMAGE_NOT_FOUND,
    Reason.IMAGE_PULL_FAILED,
    Reason.INIT_FAILED,
    Reason.LAUNCH_REJECTED,
    Reason.QUOTA_EXCEEDED,
    Reason.UNSCHEDULABLE,
}
"""What ends a runner before its program begins."""

_ON_ITS_WAY = {None, "ContainerCreating", "PodInitializing"}
News = tuple[bool, bool, bool, bool, bool, str | None]
NO_NEWS: News = (False, False, False, False, False, None)

_NOT_FOUND = re.compile(
    r"not found|does not exist|manifest unknown|no such image|unknown repository|not present", re.IGNORECASE
)
_QUOTA = re.compile(r"exceeded quota|failed quota", re.IGNORECASE)
_ABSENT = re.compile(r"not found", re.IGNORECASE)
_UNANSWERED = re.compile(r"Error creating: (Internal error occurred|Timeout|etcdserver): ")
"""What the Job controller is told where something that the API asks, such as a webhook, did not answer it."""

_ENGINE = re.compile(r"^[a-z-]+://")
"""What old kubelets put before an image: ``docker-pullable://`` where it has a digest, ``docker://`` before its id."""
_NOW = {"InvalidImageName": Reason.CONFIG_ERROR, "ErrImageNeverPull": Reason.IMAGE_NOT_FOUND}
_PULL = {"ErrImagePull", "ImagePullBackOff", "ImageInspectError", "RegistryUnavailable", "SignatureValidationFailed"}
_BROKEN = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError", "PostStartHookError"}
_KUBELETS = "TerminationByKubelet"
"""What befell a pod by its kubelet, of whatever cause: the pod's own reason says more."""
_DISRUPTIONS = {
    "PreemptionByScheduler": Reason.PREEMPTED,
    "DeletionByTaintManager": Reason.NODE_LOST,
    "DeletionByPodGC": Reason.NODE_LOST,
    "EvictionByEvictionAPI": Reason.EVICTED,
    _KUBELETS: Reason.EVICTED,
}
_POD_REASONS = {
    "Evicted": Reason.EVICTED,
    "Preempting": Reason.PREEMPTED,
    "Preempted": Reason.PREEMPTED,
    "NodeLost": Reason.NODE_LOST,
    "NodeShutdown": Reason.NODE_LOST,
    "Shutdown": Reason.NODE_LOST,
    "Terminated": Reason.NODE_LOST,
    "DeadlineExceeded": Reason.DEADLINE_EXCEEDED,
    "UnexpectedAdmissionError": Reason.UNSCHEDULABLE,
    "NodeAffinity": Reason.UNSCHEDULABLE,
    "NodePorts": Reason.UNSCHEDULABLE,
    "TopologyAffinityError": Reason.UNSCHEDULABLE,
}
_EVENTS = {
    ("Preempted", ""): Reason.PREEMPTED,
    ("TaintManagerEviction", "Marking for deletion"): Reason.NODE_LOST,
}
"""Events about a pod, by their reason and how they begin, that tell why it was deleted where the pod itself does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned:
    """The last event of one kind about a pod or a Job; a warning, or what explains a deletion."""

    about: str
    reason: str
    message: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What we keep of a Job. ``end`` is what was written on it, ``first_pod`` the uid of the pod that is the runner.

    ``stopping_at`` is written before a stop is sent, ``stopped`` when it was.
    """

    name: str
    uid: str
    runner_id: str
    created_at: float
    parallelism: int
    launch_timeout: float
    end: Exit | None
    stopping_at: float | None
    stopped: bool
    first_pod: str | None
    keeps_one_pod: bool
    succeeded: bool
    failed: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """What we keep of a pod; states as the API writes them. ``deadline`` is when the kubelet ends it.

    ``deleted_at`` is when its deletion was asked for: what it has of grace begins there.

    ``silent``: the cluster has not heard of its node for so long that it takes it for not ready. ``sidecars`` are those of
    its init containers that go on beside the main one.
    """

    name: str
    uid: str
    runner_id: str
    job: str | None
    created_at: float
    deleted_at: float | None
    silent: bool
    phase: str
    reason: str | None
    message: str | None
    node: str | None
    image_digest: str | None
    grace: float
    deadline: float | None
    unschedulable: str | None
    disruption: tuple[str, str] | None
    state: Json
    inits: tuple[tuple[str, Json], ...]
    sidecars: frozenset[str]

    @property
    def place(self) -> Place:
        """Where it is, and of what image."""
        return Place(node=self.node, image_digest=self.image_digest)

    @property
    def deleted(self) -> bool:
        """Whether its deletion was asked for."""
        return self.deleted_at is not None

    @property
    def started(self) -> bool:
        """Whether the main process runs, as far as is known."""
        return "running" in self.state and not self.over

    @property
    def started_at(self) -> float | None:
        """When the main container was started, where it was."""
        at = (self.state.get("running") or self.state.get("terminated") or {}).get("startedAt")
        return seconds(at) if at else None

    @property
    def news(self) -> "News":
        """What there is to say of it, so far: that a node is at work on it is none."""
        waiting = (state.get("waiting", {}).get("reason") for state in (self.state, *(state for _, state in self.inits)))
        held = next((reason for reason in waiting if reason not in _ON_ITS_WAY), None)
        failed = any(_failed(state) for _, state in self.inits)
        return self.started, self.over, self.deleted, self.phase == "Failed", failed, self.unschedulable or held

    @property
    def over(self) -> bool:
        """Whether the main process has ended, or never can begin."""
        return "terminated" in self.state or (self.phase in {"Succeeded", "Failed"} and "running" not in self.state)


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Not started, for this reason; hopeless once it has been so for ``patience`` seconds (None: it may be well)."""

    problem: str | None = None
    cause: str = ""
    reason: Reason | None = None
    patience: float | None = None


@dataclass(frozen=True, slots=True)
class Conclude:
    """Nothing will tell the end any more: it is to be written down as this."""

    exit: Exit


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Kubernetes started a second pod while the first lives: the Job is to have none, and the first tells the end."""


Judgement = Observation | Held | Conclude | Withdraw


def read_job(job: Json) -> Job:
    """Keep what matters of a Job."""
    metadata, spec, status = job["metadata"], job["spec"], job.get("status", {})
    notes = metadata.get("annotations") or {}
    conditions = {c["type"]: c for c in status.get("conditions") or [] if c.get("status") == "True"}
    failed = conditions.get("Failed") or conditions.get("FailureTarget")
    return Job(
        name=metadata["name"],
        uid=metadata["uid"],
        runner_id=_whose(metadata, metadata["name"]),
        created_at=seconds(metadata["creationTimestamp"]),
        parallelism=spec.get("parallelism", 1),
        launch_timeout=float(notes.get(LAUNCH_TIMEOUT, 300)),
        end=_read_end(notes.get(END)),
        stopping_at=_time(notes.get(STOPPING)),
        stopped=STOPPED in notes,
        first_pod=notes.get(FIRST_POD),
        keeps_one_pod=spec.get("podReplacementPolicy") == "Failed",
        succeeded="Complete" in conditions or "SuccessCriteriaMet" in conditions,
        failed=f"{failed.get('reason')}: {failed.get('message')}" if failed else None,
    )


def _whose(metadata: Json, job_name: str) -> str:
    """Give the runner of an object: by its label, or where somebody has taken that away by its Job's name.

    Raises KeyError for an object of no runner.
    """
    labels: dict[str, str] = metadata.get("labels") or {}
    if RUNNER not in labels and job_name.startswith(PREFIX):
        return job_name.removeprefix(PREFIX)
    return labels[RUNNER]


def identity(job: Json) -> dict[str, str]:
    """Read the labels that the runner was launched with."""
    try:
        labels = json.loads((job["metadata"].get("annotations") or {})[IDENTITY])
        return {str(key): str(value) for key, value in labels.items()}
    except (KeyError, ValueError, AttributeError):
        return {}


def read_pod(pod: Json) -> Pod:
    """Keep what matters of a pod."""
    metadata, spec, status = pod["metadata"], pod["spec"], pod.get("status", {})
    conditions = {condition["type"]: condition for condition in status.get("conditions") or []}
    scheduled, disrupted = conditions.get("PodScheduled", {}), conditions.get("DisruptionTarget", {})
    states = {one["name"]: one for one in status.get("containerStatuses") or []}
    runner = states.get(CONTAINER, {})
    limit, start = spec.get("activeDeadlineSeconds"), status.get("startTime")
    job: Json = next((owner for owner in metadata.get("ownerReferences") or [] if owner["kind"] == "Job"), {})
    return Pod(
        name=metadata["name"],
        uid=metadata["uid"],
        runner_id=_whose(metadata, job.get("name", "")),
        job=job.get("uid"),
        created_at=seconds(metadata["creationTimestamp"]),
        deleted_at=_deletion_asked(metadata),
        silent=_silent(conditions),
        phase=status.get("phase", "Pending"),
        reason=status.get("reason"),
        message=status.get("message"),
        node=spec.get("nodeName"),
        image_digest=_ENGINE.sub("", runner.get("imageID") or "") or None,
        grace=spec.get("terminationGracePeriodSeconds") or 0,
        deadline=seconds(start) + limit if limit and start else None,
        unschedulable=scheduled.get("message") or scheduled.get("reason") if scheduled.get("status") == "False" else None,
        disruption=(disrupted.get("reason", ""), disrupted.get("message", ""))
        if disrupted.get("status") == "True"
        else None,
        state=_state(runner),
        inits=tuple((one["name"], one["state"]) for one in status.get("initContainerStatuses") or [] if one.get("state")),
        sidecars=frozenset(one["name"] for one in spec.get("initContainers") or [] if one.get("restartPolicy") == "Always"),
    )


def _deletion_asked(metadata: Json) -> float | None:
    """Say when a deletion was asked for; what the API writes is when its grace is over."""
    at = metadata.get("deletionTimestamp")
    return seconds(at) - (metadata.get("deletionGracePeriodSeconds") or 0) if at else None


def _silent(conditions: Mapping[str, Json]) -> bool:
    """Whether somebody else than the kubelet calls a pod not ready: it would say so of the containers too."""
    pod, containers = conditions.get("Ready", {}), conditions.get("ContainersReady", {})
    by_gates = pod.get("reason") == "ReadinessGatesNotReady"
    return pod.get("status") == "False" and containers.get("status") == "True" and not by_gates


def read_warning(event: Json) -> Warned:
    """Keep what matters of an event."""
    about = event.get("involvedObject") or event.get("regarding") or {}
    at = event.get("lastTimestamp") or event.get("eventTime") or event["metadata"]["creationTimestamp"]
    message = event.get("message") or event.get("note") or ""
    return Warned(about=about.get("uid", ""), reason=event.get("reason", ""), message=message, at=seconds(at))


def seconds(timestamp: str) -> float:
    """Read a time as seconds since the epoch."""
    return datetime.fromisoformat(timestamp).timestamp()


def written(end: Exit) -> str:
    """Write an end as it stands on the Job."""
    return json.dumps({key: value for key, value in asdict(end).items() if value is not None}, ensure_ascii=False)


def look(
    job: Job | None, pods: Sequence[Pod], last: Pod | None, told: Mapping[str, Sequence[Warned]], now: float
) -> Judgement:
    """Say what became of a runner. ``last`` is its pod as it was last seen, where it is there no more.

    ``told`` is what events tell of the Job and its pods, by their uid.
    """
    alive = [pod for pod in pods if not is_over(pod, now)]
    if job and job.end:
        if running := next((pod for pod in alive if pod.started), None):
            return Running(running.place)
        return Starting(job.end.message) if alive else Exited(job.end)
    if not pods:
        return _without_pod(job, last, told, now) if job else Held()
    pods = sorted(pods, key=lambda pod: pod.created_at)
    first = next((pod for pod in pods if job and pod.uid == job.first_pod), pods[0])
    if job and (len(pods) > 1 or job.first_pod not in {None, first.uid}):
        return _second(job, pods, last, told, now)
    if not alive:
        end = _noted(job, _end(first, told, stopped=_stopped(job, first)))
        return Conclude(end) if job and first.deleted else Exited(end, first.place)
    if first.started:
        return Running(first.place)
    return _held(job, first, told.get(first.uid, ()))


def never_began(end: Exit, last: Pod | None) -> bool:
    """Whether a runner has ended of which no program ever ran, as far as is known: then it has no log to lose."""
    if end.code is not None:
        return end.reason is Reason.CONFIG_ERROR  # the code of what could not be executed
    if last and last.started_at is not None:
        return False
    if end.reason is None:  # by a stop; what had a node may have begun unseen
        return (end.message or "").startswith(_NOT_STARTED) and not (last and last.node)
    return end.reason in _NEVER_BEGAN


def unexplained(end: Exit) -> bool:
    """Whether a runner's end is neither its own doing nor ours, and nothing yet tells whose it is."""
    known = end.stopped or end.code == 0 or end.oom_killed
    return not known and end.reason in {None, Reason.DELETED, Reason.LOST}


def _second(
    job: Job, pods: Sequence[Pod], last: Pod | None, told: Mapping[str, Sequence[Warned]], now: float
) -> Running | Starting | Conclude | Withdraw:
    """Say how a runner ended of which Kubernetes started a second pod: as its first pod did."""
    first = next((pod for pod in pods if pod.uid == job.first_pod), None) or (
        last if last and last.uid == job.first_pod else None
    )
    if first is None and job.first_pod is None:
        first = pods[0]
    others = ", ".join(pod.name for pod in pods if first is None or pod.uid != first.uid)
    note = f"Kubernetes started a second pod, {others}, which was ended"
    if first and first in pods and not is_over(first, now):
        if job.parallelism:
            return Withdraw()
        return Running(first.place) if first.started else Starting(note)
    if first and is_over(first, now):
        return Conclude(_with(note, _end(first, told, stopped=_stopped(job, first))))
    return Conclude(_with(note, _vanished(first, told, stopped=_asked(job))))


def _noted(job: Job | None, end: Exit) -> Exit:
    """Add to an end that a second pod was noticed before it: only then is a Job withdrawn that nobody stops."""
    if job is None or job.parallelism or _asked(job):
        return end
    return _with("Kubernetes started a second pod, which was ended", end)


def _with(note: str, end: Exit) -> Exit:
    return replace(end, message=f"{end.message}; {note}" if end.message else note)


def _without_pod(job: Job, last: Pod | None, told: Mapping[str, Sequence[Warned]], now: float) -> Held | Conclude:
    never = job.parallelism == 0 and not job.first_pod and _asked(job)
    if last and last.job == job.uid and "terminated" in last.state:
        return Conclude(_noted(job, _end(last, told, stopped=_stopped(job, last))))
    if last and last.job == job.uid and not (never and "running" not in last.state):
        return Conclude(_noted(job, _vanished(last, told, stopped=_asked(job))))
    if never and last and last.job == job.uid and not last.node:
        return Conclude(Exit(stopped=True, message=_NOT_STARTED))
    if job.succeeded:
        return Conclude(Exit(code=0, message="its pod was gone before it could be read; the Job says that it succeeded"))
    if job.failed:
        reason, words = _event(told) or (Reason.LOST, f"the Job says {job.failed}")
        text = f"its pod was gone before it could be read: {words}"
        return Conclude(Exit(reason=reason, message=text, stopped=_asked(job) or None))
    if never:
        return Conclude(Exit(stopped=True, message=_NOT_STARTED))
    if job.first_pod or job.parallelism == 0:
        return Conclude(_noted(job, _vanished(None, told, stopped=_asked(job))))
    refusals = [warned for warned in told.get(job.uid, ()) if warned.reason == "FailedCreate"]
    if refusals:
        return _refused(job, max(refusals, key=lambda warned: warned.at).message)
    late = now - job.created_at > NO_POD_SECONDS
    return Held(problem="no pod was made for its Job yet; is the Job controller running?" if late else None)


def _asked(job: Job) -> bool:
    return job.stopped or job.stopping_at is not None


def _stopped(job: Job | None, pod: Pod) -> bool | None:
    """Say whether our stop came before a program's end; where a service died in the middle of it, only the times tell.

    A kubelet tells whole seconds: of an end within the second of our stop it is said that it came of that. Without its Job,
    on which a stop is written, nothing here tells.
    """
    if job is None:
        return None
    if not _asked(job):
        return False
    finished = pod.state.get("terminated", {}).get("finishedAt")
    if job.stopped or job.stopping_at is None or not finished:
        return True
    return seconds(finished) >= math.floor(job.stopping_at)


def leaves_unanswered(job: Job | None, now: float) -> bool:
    """Whether a runner has left a stop unanswered for so long that its pod is to be deleted.

    Where no Job tells since when, or a clock was set since, one try has to do.
    """
    return job is None or job.stopping_at is None or abs(now - job.stopping_at) > UNANSWERED_SECONDS


def _refused(job: Job, message: str) -> Held:
    problem = f"its pod is refused: {message}"
    if _QUOTA.search(message):
        return Held(problem=problem, cause="quota", reason=Reason.QUOTA_EXCEEDED, patience=job.launch_timeout * _PASSING)
    if _UNANSWERED.search(message):
        problem = f"its pod cannot be made: {message}"
        patience = job.launch_timeout * _PASSING
        return Held(problem=problem, cause="unanswered", reason=Reason.ENGINE_UNAVAILABLE, patience=patience)
    reason = Reason.CONFIG_ERROR if _ABSENT.search(message) else Reason.LAUNCH_REJECTED
    return Held(problem=problem, cause="refused", reason=reason, patience=SETTLE_SECONDS)


def _held(job: Job | None, pod: Pod, warnings: Sequence[Warned]) -> Held:
    """Say what a pod waits for."""
    passing = job.launch_timeout * _PASSING if job else None
    if pod.unschedulable:
        return Held(problem=pod.unschedulable, cause="unschedulable", reason=Reason.UNSCHEDULABLE, patience=passing)
    for name, state in (*pod.inits, (CONTAINER, pod.state)):
        waiting = state.get("waiting", {})
        reason, message = waiting.get("reason", ""), waiting.get("message", "")
        about = f"{reason}: {message}" if message else reason
        about = about if name == CONTAINER else f"init container {name}: {about}"
        if reason in _NOW:
            return Held(problem=about, cause=reason, reason=_NOW[reason], patience=0)
        if reason in _PULL:
            pulls = " ".join([message, *(one.message for one in warnings if one.reason == "Failed")])
            told = next((one.message for one in warnings if one.reason == "Failed" and "pull" in one.message), message)
            why = Reason.IMAGE_NOT_FOUND if _NOT_FOUND.search(pulls) else Reason.IMAGE_PULL_FAILED
            return Held(problem=f"{reason}: {told}", cause="pull", reason=why, patience=PULL_SECONDS)
        if reason in _BROKEN:
            return Held(problem=about, cause="broken", reason=Reason.CONFIG_ERROR, patience=SETTLE_SECONDS)
        if "running" in state and name not in {CONTAINER, *pod.sidecars}:
            return Held(problem=None)
    troubles = [warned for warned in warnings if warned.reason not in {"BackOff", "FailedScheduling"}]
    if troubles and pod.node:
        worst = max(troubles, key=lambda warned: warned.at)
        problem = f"{worst.reason}: {worst.message}"
        return Held(problem=problem, cause=worst.reason, reason=Reason.CONFIG_ERROR, patience=passing)
    return Held()


def is_over(pod: Pod, now: float) -> bool:
    """Whether nothing of a pod's program lives.

    Kubelets before 1.22 never tell how a container ended that they killed at the pod's own deadline: then it is dead when
    its grace is over.
    """
    if pod.phase == "Failed" and pod.reason == "DeadlineExceeded" and "running" in pod.state:
        return pod.deadline is not None and now > pod.deadline + pod.grace + DYING_SECONDS
    if pod.deleted and not pod.node:  # no node takes it any more, though a finalizer may hold it for long
        return True
    return pod.over or (pod.phase == "Failed" and "running" in pod.state and pod.reason in {"Evicted", "NodeLost"})


def _end(pod: Pod, told: Mapping[str, Sequence[Warned]], *, stopped: bool | None) -> Exit:
    """Say how a pod's main process ended."""
    ended = pod.state.get("terminated")
    disruption = _disruption(pod, told)
    lost = Reason.DELETED if pod.deleted and stopped is False else Reason.LOST
    if not ended:
        ends = ((name, state) for name, state in pod.inits if name not in pod.sidecars)
        failed = next(((name, state["terminated"]) for name, state in ends if _failed(state)), None)
        if failed and not disruption:
            name, how = failed
            text = f"init container {name} exited with code {how.get('exitCode')}"
            words = how.get("message") or how.get("reason") or ""
            return Exit(reason=Reason.INIT_FAILED, message=f"{text}: {words}".strip(": "), stopped=stopped)
        if stopped and not pod.node:
            return Exit(stopped=True, message=_NOT_STARTED)
        what = "was deleted, not by us" if lost is Reason.DELETED else "ended"
        text = ": ".join(filter(None, (f"its pod {what}, and nothing tells how its program did", _kubelets_words(pod))))
        reason, text = disruption or (lost, text)
        return Exit(reason=reason, message=text, stopped=stopped)
    code, why, words = ended.get("exitCode"), ended.get("reason", ""), ended.get("message") or ""
    end = Exit(
        code=code,
        oom_killed=why == "OOMKilled" and code != 0,
        stopped=stopped,
        finished_at=seconds(ended["finishedAt"]) if ended.get("finishedAt") else None,
    )
    if why == "ContainerStatusUnknown":
        reason, text = disruption or (lost, f"{why}: {words}")
        return replace(end, code=None, reason=reason, message=text)
    if why in {"ContainerCannotRun", "StartError"} and stopped:  # torn down as it was being made
        return replace(end, code=None, stopped=True, message=f"{_NOT_STARTED}: {words}")
    if why in {"ContainerCannotRun", "StartError"}:
        return replace(end, reason=Reason.CONFIG_ERROR, message=f"{why}: {words}")
    if disruption and _ended_it(disruption[0], pod, end):
        reason, text = disruption
        return replace(end, reason=reason, message=text)
    if _by_deletion(pod, end):
        text = f"its pod was deleted, not by us, and its program then exited with code {code}"
        return replace(end, reason=Reason.DELETED, message=text)
    return replace(end, message=f"{why}: {words}" if end.oom_killed and words else None)


def _ended_it(befell: Reason, pod: Pod, end: Exit) -> bool:
    """Whether what befell a pod is what ended its program, whatever code that chose, and not the program itself before.

    A kubelet says of its deadline also where a program ended by itself just before it looked.
    """
    if befell is Reason.DEADLINE_EXCEEDED and pod.deadline is not None and end.finished_at is not None:
        return end.finished_at >= pod.deadline
    return end.code != 0


def _by_deletion(pod: Pod, end: Exit) -> bool:
    """Whether a program ended because somebody else deleted its pod: kubelets from 1.27 on tell the code of such a one."""
    by_others = end.code != 0 and not end.stopped and not end.oom_killed
    return by_others and pod.deleted_at is not None and end.finished_at is not None and end.finished_at >= pod.deleted_at


def _failed(state: Json) -> bool:
    return bool(state.get("terminated", {}).get("exitCode"))


def _vanished(pod: Pod | None, told: Mapping[str, Sequence[Warned]], *, stopped: bool) -> Exit:
    """Say how a runner ended whose pod is there no more, and never told."""
    reason, text = (_disruption(pod, told) if pod else _event(told)) or (Reason.DELETED, "deleted, not by us")
    name = pod.name if pod else "its pod"
    if stopped:
        return Exit(stopped=True, message=f"pod {name} was deleted to end it, and gone before its end was read")
    return Exit(reason=reason, message=f"pod {name} was gone before its end was read: {text}", stopped=False)


def _disruption(pod: Pod, told: Mapping[str, Sequence[Warned]]) -> tuple[Reason, str] | None:
    """Give what befell a pod from outside, in the cluster's words."""
    by_kubelet = _by_kubelet(pod)
    if pod.disruption and pod.disruption[0] in _DISRUPTIONS and not (by_kubelet and pod.disruption[0] == _KUBELETS):
        return _DISRUPTIONS[pod.disruption[0]], ": ".join(filter(None, pod.disruption))
    if by_kubelet:
        return by_kubelet, _kubelets_words(pod)
    if event := _event({pod.uid: told.get(pod.uid, ())}):
        return event
    return (Reason.NODE_LOST, f"nothing was heard of its node {pod.node} any more") if pod.silent else None


def _by_kubelet(pod: Pod) -> Reason | None:
    """Give why a kubelet ended a pod, or did not take it, if that is known here."""
    if pod.phase != "Failed" or not pod.reason:
        return None
    return _POD_REASONS.get(pod.reason, Reason.UNSCHEDULABLE if pod.reason.startswith("OutOf") else None)


def _kubelets_words(pod: Pod) -> str:
    return ": ".join(filter(None, (pod.reason, pod.message)))


def _event(told: Mapping[str, Sequence[Warned]]) -> tuple[Reason, str] | None:
    """Give what befell a pod by the events about it."""
    for one in (one for about in told.values() for one in about):
        for (reason, beginning), why in _EVENTS.items():
            if one.reason == reason and one.message.startswith(beginning):
                return why, f"{one.reason}: {one.message}"
    return None


def _state(status: Json) -> Json:
    """Give a container's state; one that the kubelet lost sight of may still be told as the one before."""
    state: Json = status.get("state") or {}
    before = (status.get("lastState") or {}).get("terminated")
    return {"terminated": before} if before and "running" not in state else state


def _time(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _read_end(text: str | None) -> Exit | None:
    if text is None:
        return None
    try:
        fields = json.loads(text)
        reason = fields.pop("reason", None)
        return Exit(**fields, reason=Reason(reason) if reason else None)
    except (ValueError, TypeError):
        return Exit(message=f"its end was written down and cannot be read: {text}")
