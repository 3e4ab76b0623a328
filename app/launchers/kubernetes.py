"""Runners as Kubernetes Jobs. The engine is the API of one cluster, and in it one namespace.

A runner is a Job of one pod, named after it, and a Secret that the Job owns (see job.py). What became of it is read from
copies of the Jobs, pods and warnings of this installation (reflector.py), by rules in pod.py. Nothing is kept here that a
fresh launcher could not find: what no object would tell is written on the Job.

A stop is a signal to every process of the pod, sent by a shell inside it: so any grace can be asked for, exit code and log
stay, and no second pod is made. Where that cannot be (no shell in the image, no permission) the pod is deleted; its last
words then tell its end. The log of a pod that is being deleted, by whomever, is read as it ends, and kept here until
``remove``: it is lost only where no service watched.
"""

import asyncio
import contextlib
import logging
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import JsonValue

from app.errors import LauncherUnavailable, LaunchRejected, RunnerGone
from app.job_template import CONTAINER
from app.launcher import (
    Enforcement,
    Exit,
    Exited,
    Found,
    Gone,
    Handle,
    LaunchSpec,
    LogLine,
    Observation,
    Running,
    Starting,
)
from app.launchers import job as jobs
from app.launchers import pod as pods
from app.launchers.cluster import TOLD, Cluster, Json, Refused
from app.launchers.pod import Conclude, Held, Job, Pod, Warned, Withdraw
from app.launchers.pod_log import CUT_OFF, LOST, KeptLog, LogReader, Room, from_its_start, parse
from app.launchers.reflector import PAGE, Reflector
from app.reason import Reason

log = logging.getLogger(__name__)

T = TypeVar("T")

LOG_SECONDS = 0.3
"""How often a follower looks for a log that is not there yet, or was cut off."""

LOG_SILENCE_SECONDS = 60.0
"""After so much silence a log is asked for again, behind its last line: a half-open connection is silent for ever."""

KEEP_SECONDS = 10.0
"""How long a log that is read as its pod ends is waited for: before the deletion to begin, and after the end to be whole."""

LOOKS = 256
"""How many runners are looked at before others have their turn."""

KILL_SECONDS = 5.0
TOLD_SECONDS = 30.0
"""How long a pod may take to say that it ended, whose container takes no signal any more. Deleted before, it never tells."""

GONE_SECONDS = 100.0
"""How long a pod may take to be gone. A kubelet of 1.20 lets go of one that never ran when it next collects its garbage,
once a minute, and tells the API so within ten seconds more."""

FORGET_SECONDS = 3600.0
"""How long what is known of a runner of which nothing is left is kept for whoever is to tell its end and keep its log."""

NEEDED = (
    ("create", "jobs"), ("get", "jobs"), ("list", "jobs"), ("watch", "jobs"), ("patch", "jobs"), ("delete", "jobs"),
    ("list", "pods"), ("watch", "pods"), ("delete", "pods"), ("get", "pods/log"),
    ("create", "secrets"), ("get", "secrets"), ("delete", "secrets"),
    ("list", "events"), ("watch", "events"),
)  # fmt: skip
"""What we must be permitted, as deploy/kubernetes/rbac.yaml grants it; ways into a container are beyond that."""

_NOT_FOUND, _CONFLICT, _FORBIDDEN = 404, 409, 403
_NO_SHELL = re.compile(r"executable file .*not found|exec: \W*sh\b.*no such file", re.IGNORECASE)


class KubernetesLauncher:
    """Starts runners as Jobs in one namespace. ``installation`` tells ours from those of other services there."""

    def __init__(self, kubeconfig: Path | None, context: str | None, namespace: str, installation: str) -> None:
        self._cluster = cluster = Cluster(kubeconfig, context, namespace)
        self._installation = installation
        ours = {"labelSelector": f"{jobs.INSTALLATION}={jobs.label_value(installation)}"}
        self._jobs = Reflector[Job](cluster, "jobs", ours, pods.read_job, self._job_changed)
        self._pods = Reflector[Pod](cluster, "pods", ours, pods.read_pod, self._pod_changed)
        self._warnings = Reflector[Warned](
            cluster, "events", {"fieldSelector": "type=Warning"}, pods.read_warning, self._warning_changed
        )
        self._ours = ours
        self._pods_of: dict[str, dict[str, Pod]] = {}
        self._about: dict[str, dict[str, Warned]] = {}
        self._last: dict[str, Pod] = {}
        self._fates: dict[str, Mapping[str, Sequence[Warned]]] = {}
        self._kept: dict[str, KeptLog] = {}
        self._room = Room()
        self._held: dict[str, tuple[str, float]] = {}
        self._signalled: set[str] = set()
        self._beside: set[asyncio.Task[None]] = set()
        self._watchers: set[asyncio.Queue[str | None]] = set()
        self._asking: asyncio.Task[None] | None = None
        self._permitted = False
        self._closed = False

    async def launch(
        self,
        runner_id: str,
        spec: LaunchSpec,
        *,
        progress: Callable[[str], None] | None = None,  # noqa: ARG002 - what a pod waits for is observed
    ) -> Handle:
        return await self._launch(runner_id, jobs.manifests(runner_id, spec, self._installation))

    async def observe(self, handles: Sequence[Handle]) -> Mapping[str, Observation]:
        await self._in_touch()
        if len(handles) == 1:
            return await self._observe(handles[0].runner_id)
        seen: dict[str, Observation] = {}
        for number, handle in enumerate(handles):
            if number % LOOKS == 0:
                await asyncio.sleep(0)  # a look at what is in the copies waits for nothing
            with contextlib.suppress(LauncherUnavailable):
                seen.update(await self._observe(handle.runner_id))
        return seen

    async def watch(self) -> AsyncIterator[str]:
        changed: asyncio.Queue[str | None] = asyncio.Queue()
        self._watchers.add(changed)
        try:
            with contextlib.suppress(LauncherUnavailable):
                await self._in_touch()  # begins the watches, which go on by themselves
            while not self._closed and (runner_id := await changed.get()) is not None:
                yield runner_id
        finally:
            self._watchers.discard(changed)

    async def stop(self, handle: Handle, grace: float) -> None:
        await self._in_touch()
        runner_id = handle.runner_id
        job = await self._job(runner_id)
        known = self._known(runner_id)
        if job is None and not known:
            return
        # Copies are late: what is not known to have started may be at work all the same.
        begun = [pod for pod in known if pod.node and not pod.over]
        reached = [await self._end_pod(await self._job(runner_id), pod, grace) for pod in begun]
        job = await self._job(runner_id)  # as it is by now
        if job and not job.end and job.parallelism and not any(reached) and not any(pod.over for pod in known):
            await self._withdraw(job)

    async def logs(
        self, handle: Handle, *, after: str | None = None, since: float | None = None, follow: bool = False
    ) -> AsyncIterator[LogLine]:
        while not self._closed:
            try:
                pod, end = await self._log_source(handle.runner_id)
                ended, kept = end is not None, self._kept.get(handle.runner_id)
                nothing_lost = end is not None and pods.never_began(end, pod or self._last.get(handle.runner_id))
                no_loss = after == LOST or nothing_lost
                if ended and kept:
                    await _briefly(kept.whole)
                    for line in kept.after(after):
                        if not line.is_before(since) and not (line.cursor == LOST and no_loss):
                            yield line
                        after = line.cursor
                    if not kept.whole.is_set() and after != LOST and not no_loss:
                        yield LogLine(LOST, CUT_OFF, gap=True)
                elif pod:
                    to_its_end = not follow or ended
                    reader = LogReader(parse(after), since)
                    lines = self._read_log(pod, reader, follow=not to_its_end)
                    if to_its_end and after is None and since is None and pod.started_at is not None:
                        lines = from_its_start(lines, pod.started_at)
                    async for line in lines:
                        if line.cursor == LOST and (not ended or no_loss):
                            continue
                        if not line.is_before(since):
                            yield line
                            after = line.cursor  # it may be the first, before which not all was read
                    if ended and pod.state.keys() & {"running", "terminated"} and not reader.ended and not no_loss:
                        yield LogLine(LOST, b"[the log is lost: its node does not have it any more]", gap=True)
                elif ended and not no_loss:
                    yield LogLine(LOST, b"[the log is lost: its pod was deleted]", gap=True)
            except LauncherUnavailable:
                if not self._closed:
                    raise
            if ended or not follow:
                return
            await asyncio.sleep(LOG_SECONDS)

    def log_file(self, handle: Handle) -> Path | None:  # noqa: ARG002 - the nodes keep them
        return None

    async def list(self) -> Sequence[Found]:
        await self._in_touch()
        orphans = {pod.runner_id for pod in self._pods.objects.values() if pod.job is None}
        named = {"labelSelector": f"{self._ours['labelSelector']},{jobs.RUNNER}"}  # others may use our labels
        found = [self._found(job, job["spec"]["template"]["spec"]) async for job in self._pages("jobs", named)]
        for runner_id in orphans - {each.handle.runner_id for each in found}:
            found += [self._found(pod, pod["spec"]) async for pod in self._pages("pods", self._ours_of(runner_id))][:1]
        return found

    async def _pages(self, kind: str, selector: Mapping[str, str]) -> AsyncIterator[Json]:
        page: dict[str, str | int] = {**selector, "limit": PAGE}
        while True:
            answer = await self._ask("GET", self._cluster.path(kind), query=page)
            for item in answer["items"]:
                yield item
            if not (token := answer["metadata"].get("continue")):
                return
            page["continue"] = token

    def _found(self, item: Json, spec: Json) -> Found:
        """Read a runner of its Job, or of its pod if somebody has deleted the Job and left the pod."""
        handle = self._handle(item, spec)
        pod = next(iter(self._pods_of.get(handle.runner_id, {}).values()), None)
        if pod:
            handle = replace(handle, node=pod.node, image_digest=pod.image_digest)
        return Found(handle, pods.identity(item), pods.seconds(item["metadata"]["creationTimestamp"]))

    async def remove(self, handle: Handle) -> None:
        await self._in_touch()
        runner_id = handle.runner_id
        job = await self._job(runner_id)
        for pod in self._known(runner_id):
            if pod.started and await self._signal(pod, "KILL") == "told":  # what has ended goes at once, the rest takes time
                with contextlib.suppress(LauncherUnavailable):
                    await self._until_nothing_lives(runner_id, KILL_SECONDS)
        if job:
            await self._delete("jobs", job.name, {"propagationPolicy": "Background", "preconditions": {"uid": job.uid}})
            self._jobs.drop(job.name)
            await self._look_for_pods(runner_id)
        for pod in self._known(runner_id):
            if not (job and pods.is_over(pod, time.time())):  # else it goes with its Job
                await self._delete("pods", pod.name, {"gracePeriodSeconds": 1, "preconditions": {"uid": pod.uid}})
        await self._until_nothing_lives(runner_id, GONE_SECONDS)
        if job is None:
            await self._remove_orphaned_secret(runner_id)
        self._forget(runner_id)

    def _forget(self, runner_id: str) -> None:
        """Let go of what is known of a runner beside the copies."""
        if kept := self._kept.pop(runner_id, None):
            kept.stop()
        for known in (self._last, self._held, self._fates):
            known.pop(runner_id, None)
        self._signalled.discard(runner_id)

    def _forget_later(self, runner_id: str) -> None:
        """Do that for a runner of which something is gone, once all is: another replica may be the one that removes it."""
        asyncio.get_running_loop().call_later(FORGET_SECONDS, self._forget_if_gone, runner_id)

    def _forget_if_gone(self, runner_id: str) -> None:
        if not self._pods_of.get(runner_id) and jobs.job_name(runner_id) not in self._jobs.objects:
            self._forget(runner_id)

    async def _remove_orphaned_secret(self, runner_id: str) -> None:
        """Remove a Secret that has lost its owner: with its Job it goes by itself."""
        secret = await self._find("secrets", jobs.job_name(runner_id))
        if secret and not secret["metadata"].get("ownerReferences"):
            await self._delete("secrets", secret["metadata"]["name"], {"preconditions": {"uid": secret["metadata"]["uid"]}})

    async def ping(self) -> None:
        await self._ask("GET", self._cluster.path("jobs"), query={**self._ours, "limit": 1})
        if not self._permitted:
            try:
                allowed = await asyncio.gather(*[self._cluster.permitted(verb, kind) for verb, kind in NEEDED])
            except Refused as refused:
                raise LauncherUnavailable(f"what we may do cannot be asked: {refused}") from refused
            missing = [f"{verb} {kind}" for (verb, kind), yes in zip(NEEDED, allowed, strict=True) if not yes]
            if missing:
                raise LauncherUnavailable(f"not permitted in namespace {self._cluster.namespace}: {', '.join(missing)}")
            self._permitted = True

    def render(self, runner_id: str, spec: LaunchSpec) -> Mapping[str, JsonValue]:
        made = jobs.manifests(runner_id, spec, self._installation)
        return {"job": made.job, "secret": {"metadata": made.secret["metadata"], "keys": sorted(made.secret["data"])}}

    async def about(self) -> Mapping[str, JsonValue]:
        version = await self._ask("GET", "/version", query={})
        return {
            "version": version.get("gitVersion"),
            "namespace": self._cluster.namespace,
            "cpu_limits_by": "engine",
            "memory_limits_by": "engine",
            "permissions": "complete" if self._permitted else "not known to be complete",
        }

    async def aclose(self) -> None:
        self._closed = True
        for watcher in self._watchers:
            watcher.put_nowait(None)
        beside = [*self._beside, *([self._asking] if self._asking else [])]
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        for reflector in (self._jobs, self._pods, self._warnings):
            await reflector.aclose()
        await self._cluster.aclose()

    # Launching.

    async def _launch(self, runner_id: str, made: jobs.Manifests) -> Handle:
        try:
            job = await _to_its_end(self._cluster.call("POST", self._cluster.path("jobs"), made.job))
            fresh = True
        except Refused as refused:
            job, fresh = await self._existing(runner_id, made.job, refused), False
        self._jobs.put(job)
        try:
            await _to_its_end(self._cluster.call("POST", self._cluster.path("secrets"), jobs.owned(made.secret, job)))
        except Refused as refused:
            if (refused.status, refused.reason) != (_CONFLICT, "AlreadyExists"):
                if fresh:  # without its Secret it cannot have started
                    await _to_its_end(self._delete("jobs", job["metadata"]["name"], {"propagationPolicy": "Background"}))
                    self._jobs.drop(job["metadata"]["name"])
                raise self._no(refused) from refused
            await self._check_secret(job)
        except LauncherUnavailable as error:
            error.acted = True  # whatever came of this call: the Job is there
            raise
        return self._handle(job, job["spec"]["template"]["spec"])

    async def _existing(self, runner_id: str, wanted: Json, refused: Refused) -> Json:
        """Read the Job that has our name: it is ours, or the launch is impossible.

        Whatever the API refuses a Job for, a launch before may have made it; the room in a quota may be what it takes.
        """
        name = wanted["metadata"]["name"]
        try:
            job = await self._cluster.call("GET", self._cluster.path("jobs", name))
        except Refused as unread:
            if unread.status != _NOT_FOUND:
                raise LauncherUnavailable(f"{refused}; whether it is there cannot be read: {unread}") from unread
            if (refused.status, refused.reason) == (_CONFLICT, "AlreadyExists"):
                raise LauncherUnavailable(f"Job {name} was there, and is not", acted=False) from refused
            raise self._no(refused) from refused
        labels = job["metadata"].get("labels", {})
        if any(labels.get(key) != wanted["metadata"]["labels"][key] for key in (jobs.INSTALLATION, jobs.RUNNER)):
            raise LaunchRejected(f"there is a Job {name} that is not of this service and runner {runner_id}")
        if "deletionTimestamp" in job["metadata"]:
            raise LauncherUnavailable(f"Job {name} is being deleted", acted=False)
        return job

    async def _check_secret(self, job: Json) -> None:
        """Make sure that the Secret there is this Job's, and not what is left of one that had its name."""
        name = job["metadata"]["name"]
        try:
            secret = await self._cluster.call("GET", self._cluster.path("secrets", name))
        except Refused as refused:
            raise LauncherUnavailable(f"Secret {name} was there, and now: {refused}") from refused
        owners = [owner["uid"] for owner in secret["metadata"].get("ownerReferences") or []]
        if job["metadata"]["uid"] not in owners:
            raise LauncherUnavailable(f"Secret {name} is of another Job; it goes when that one's garbage is collected")

    def _no(self, refused: Refused) -> LaunchRejected | LauncherUnavailable:
        """Say what a refusal means for a launch: nothing was made."""
        text = str(refused)
        if refused.status == _CONFLICT:
            return LauncherUnavailable(text, acted=False)  # two writers met, at a quota for one
        if refused.status == _FORBIDDEN and "exceeded quota" in text:
            return LauncherUnavailable(text, acted=False, reason=Reason.QUOTA_EXCEEDED)
        if refused.status == _FORBIDDEN and "not yet ready to handle request" in text:
            return LauncherUnavailable(text, acted=False)  # an API server that has just begun
        if refused.status == _NOT_FOUND:
            return LaunchRejected(f"namespace {self._cluster.namespace} is missing: {text}", Reason.CONFIG_ERROR)
        return LaunchRejected(text)

    def _handle(self, item: Json, spec: Json) -> Handle:
        """Read a handle of a Job, or of a pod that lost it, and of the pod's specification."""
        labels, held = item["metadata"]["labels"], jobs.limits(spec)
        return Handle(
            runner_id=labels[jobs.RUNNER],
            job_name=jobs.job_name(labels[jobs.RUNNER]),
            enforced_by=Enforcement(
                cpu="engine" if "cpu" in held else "none", memory_mib="engine" if "memory" in held else "none"
            ),
            isolation="container",
        )

    # Observing.

    async def _in_touch(self) -> None:
        """Return when the copies can be believed; raises LauncherUnavailable if they cannot now."""
        reflectors = (self._jobs, self._pods, self._warnings)
        await asyncio.gather(*[reflector.sync() for reflector in reflectors])
        if all(reflector.quiet for reflector in reflectors):
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._is_there(), name="ask for the API")
            await asyncio.shield(self._asking)

    async def _is_there(self) -> None:
        await self._ask("GET", self._cluster.path("jobs"), query={**self._ours, "limit": 1})
        self._jobs.heard()

    async def _observe(self, runner_id: str) -> dict[str, Observation]:
        """Look at a runner; if its end is ours to decide, decide it and look again."""
        for _ in range(3):
            job = await self._job(runner_id)
            known = self._known(runner_id)
            if job is None and not known:
                return {runner_id: Gone()}
            if len(known) == 1 and known[0].started:
                self._claim_if_needed(known[0])  # again, where it failed when the pod began, or its Job was not known yet
            told = {**self._told_of(job, known), **self._fates.get(runner_id, {})}
            seen = pods.look(job, known, self._last.get(runner_id), told, time.time())
            match seen:
                case Held() if job and self._hopeless(runner_id, seen):
                    end = Exit(reason=seen.reason, message=seen.problem, stopped=False)
                    await self._conclude(job, end)
                case Withdraw():
                    if job:
                        await self._mark(job, {}, {"spec": {"parallelism": 0}})
                case Conclude(exit=end) | Exited(exit=end) if job and await self._learned_more(job, known, end):
                    pass
                case Conclude(exit=end):
                    if job and (known or not await self._look_for_pods(runner_id)):
                        await self._conclude(job, end)
                case Held(problem=problem):
                    return {runner_id: Starting(problem)}
                case Exited(exit=end) if job is None and runner_id in self._signalled:
                    return {runner_id: replace(seen, exit=replace(end, stopped=True))}
                case Starting() | Running() | Exited() | Gone():
                    return {runner_id: seen}
        return {}

    async def _learned_more(self, job: Job, known: Sequence[Pod], end: Exit) -> bool:
        """Ask the events, once, why a pod was deleted that does not tell itself; says whether there is more to go by."""
        if job.end or not pods.unexplained(end) or job.runner_id in self._fates:
            return False
        last, there = self._last.get(job.runner_id), {pod.uid for pod in known}
        about = {job.first_pod: f"uid={job.first_pod}"} if job.first_pod and job.first_pod not in there else {}
        gone = [last] if last and last.uid not in there else []
        for pod in [*gone, *(pod for pod in known if pod.deleted)]:
            about[pod.uid] = f"name={pod.name}"  # not all who write events know uids
        fates: dict[str, list[Warned]] = {}
        for uid, which in about.items():
            query = {"fieldSelector": f"involvedObject.{which}"}
            items = (await self._ask("GET", self._cluster.path("events"), query))["items"]
            fates[uid] = [pods.read_warning(item) for item in items]
        if fates:
            self._fates[job.runner_id] = fates
        return bool(fates)

    def _hopeless(self, runner_id: str, held: Held) -> bool:
        """Whether a runner was held up by the same cause for longer than there is hope."""
        now = time.monotonic()
        cause, since = self._held.get(runner_id, ("", now))
        if cause != held.cause:
            since = now
        self._held[runner_id] = held.cause, since
        return held.patience is not None and now - since >= held.patience

    async def _job(self, runner_id: str) -> Job | None:
        """Give a runner's Job. That there is none is asked of the API: a copy may be late."""
        name = jobs.job_name(runner_id)
        if name in self._jobs.objects:
            return self._jobs.objects[name]
        job = await self._find("jobs", name)
        if job is None:
            return None
        self._jobs.put(job)
        return pods.read_job(job)

    async def _find(self, kind: str, name: str) -> Json | None:
        """Read an object that is ours; None if there is none, or it is somebody else's."""
        try:
            found = await self._cluster.call("GET", self._cluster.path(kind, name))
        except Refused as refused:
            if refused.status == _NOT_FOUND:
                return None
            raise LauncherUnavailable(str(refused)) from refused
        ours = found["metadata"].get("labels", {}).get(jobs.INSTALLATION) == jobs.label_value(self._installation)
        return found if ours else None

    def _ours_of(self, runner_id: str) -> dict[str, str]:
        return {"labelSelector": f"{jobs.RUNNER}={jobs.label_value(runner_id)},{self._ours['labelSelector']}"}

    async def _look_for_pods(self, runner_id: str) -> bool:
        """Ask the API where no pod is known: the copy may be late, and the pod just made. Says whether there is one."""
        if not self._known(runner_id):
            async for item in self._pages("pods", self._ours_of(runner_id)):
                self._pods.put(item)
        return bool(self._known(runner_id))

    async def _conclude(self, job: Job, end: Exit) -> None:
        """Write an end on the Job, for good, and see to it that it has no pod any more."""
        body = {"metadata": {"annotations": {pods.END: pods.written(end)}}, "spec": {"parallelism": 0}}
        await self._patch(job, body)

    async def _patch(self, job: Job, body: Json) -> Job:
        body["metadata"]["uid"] = job.uid  # another Job of that name is not meant
        try:
            answer = await self._cluster.call("PATCH", self._cluster.path("jobs", job.name), body)
        except Refused as refused:
            if refused.status in {_NOT_FOUND, _CONFLICT}:
                self._jobs.drop(job.name)
            raise LauncherUnavailable(f"Job {job.name} cannot be changed: {refused}") from refused
        self._jobs.put(answer)
        return pods.read_job(answer)

    async def _claim(self, job: Job, pod: Pod) -> None:
        """Write down which pod is the runner, where the cluster may start a second one after it."""
        with contextlib.suppress(LauncherUnavailable):
            await self._patch(job, {"metadata": {"annotations": {pods.FIRST_POD: pod.uid}}})

    # Ending.

    async def _end_pod(self, job: Job | None, pod: Pod, grace: float) -> bool:
        """Order a pod's end; says no where nothing of it has begun, as far as its node can tell."""
        first = job is not None and job.stopping_at is None
        if job and first:
            job = await self._mark(job, {pods.STOPPING: _now()})
        politely = grace > 0 and not pods.leaves_unanswered(job, time.time())
        match await self._signal(pod, "TERM" if grace > 0 else "KILL", insist=politely):
            case "told" if job is None:
                self._signalled.add(pod.runner_id)  # there is no Job to write it on
            case "told" if job and not job.stopped:
                await self._mark(job, {pods.STOPPED: _now()})
            case "ended" if job and first:
                await self._mark(job, {pods.STOPPING: None})
            case "no way" if not pod.started:
                return False
            case "no way" if not pod.deleted or grace <= 0:
                await self._end_by_deletion(job, pod, grace)
        return True

    async def _signal(self, pod: Pod, name: str, *, insist: bool = False) -> Literal["told", "ended", "no way"]:
        """Send a signal to every process of a pod, if there is one to hear it: a container may outlast its program a bit.

        To ``insist`` is to raise where no answer comes of a container that has started: it is to be tried again.
        """
        try:
            await self._cluster.tell(pod.name, CONTAINER, f"kill -0 -1 && echo {TOLD} && kill -{name} -1")
        except Refused as refused:
            if pod.started and refused.status != _FORBIDDEN and not _NO_SHELL.search(str(refused)):
                # Engines say in many ways that a container has just ended; then its pod soon says so too.
                with contextlib.suppress(LauncherUnavailable):
                    await self._until_nothing_lives(pod.runner_id, TOLD_SECONDS)
                    return "ended"
            log.info("%s: no way into its container: %s", pod.runner_id, refused)
            return "no way"
        except LauncherUnavailable as error:
            if insist and pod.started:
                raise
            log.info("%s: no way into its container: %s", pod.runner_id, error)
            return "no way"  # if it is the whole API that is away, the next call will show it
        return "told"

    async def _withdraw(self, job: Job) -> None:
        """Let a Job have no pod. What its pod came to until then is read from its last words."""
        await self._mark(job, {pods.STOPPING: _now()} if job.stopping_at is None else {}, {"spec": {"parallelism": 0}})

    async def _mark(self, job: Job, notes: Mapping[str, str | None], besides: Json | None = None) -> Job:
        return await self._patch(job, {"metadata": {"annotations": notes}, **(besides or {})})

    async def _end_by_deletion(self, job: Job | None, pod: Pod, grace: float) -> None:
        """Delete a pod, and then let its Job have none: the other way round its grace would be the Job controller's."""
        kept = self._keep_log(pod)
        await _briefly(kept.begun)
        options = {"gracePeriodSeconds": max(1, math.ceil(grace)), "preconditions": {"uid": pod.uid}}
        await self._delete("pods", pod.name, options)
        if job:
            await self._withdraw(job)

    async def _delete(self, kind: str, name: str, options: Json) -> None:
        try:
            await self._cluster.call("DELETE", self._cluster.path(kind, name), options)
        except Refused as refused:
            if refused.status not in {_NOT_FOUND, _CONFLICT}:  # gone, or another one of that name
                raise LauncherUnavailable(f"{kind} {name} cannot be deleted: {refused}") from refused

    async def _until_nothing_lives(self, runner_id: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while any(not pods.is_over(pod, time.time()) for pod in self._known(runner_id)):
            if time.monotonic() > deadline:
                raise LauncherUnavailable(f"{runner_id} still lives {seconds:g} s after its end was ordered")
            await asyncio.sleep(0.05)

    # Logs.

    async def _log_source(self, runner_id: str) -> tuple[Pod | None, Exit | None]:
        """Give the pod that has a runner's log, if there is one, and its end, if it has one. Raises RunnerGone."""
        seen = (await self.observe([Handle(runner_id=runner_id)])).get(runner_id)
        if isinstance(seen, Gone):
            raise RunnerGone(f"namespace {self._cluster.namespace} has no runner {runner_id}")
        job = await self._job(runner_id)
        known = [pod for pod in self._known(runner_id) if not (job and job.first_pod) or pod.uid == job.first_pod]
        end = seen.exit if isinstance(seen, Exited) else None
        return min(known, key=lambda pod: pod.created_at, default=None), end

    async def _read_log(
        self, pod: Pod, reader: LogReader, *, follow: bool, begun: asyncio.Event | None = None
    ) -> AsyncIterator[LogLine]:
        query: dict[str, str | int] = {"container": CONTAINER, "timestamps": "true"}
        if reader.begins:
            query["sinceTime"] = reader.begins
        if follow:
            query["follow"] = "true"
        try:
            path = self._cluster.path("pods", pod.name, "log")
            async with self._cluster.stream(path, query, silence=LOG_SILENCE_SECONDS) as chunks:
                if begun:
                    begun.set()
                async for chunk in chunks:
                    for line in reader.feed(chunk):
                        yield line
                reader.ended = True
        except Refused as refused:
            if refused.status not in {400, _NOT_FOUND}:  # not started yet, or just gone
                raise LauncherUnavailable(f"the log of {pod.name} cannot be read: {refused}") from refused
            return
        except LauncherUnavailable:
            if not follow or self._closed:
                raise
            return  # the connection broke, or was silent for long: go on behind the last whole line
        if not follow:
            for line in reader.finish():
                yield line

    def _keep_log(self, pod: Pod) -> KeptLog:
        """Read the log of a pod that is going, from now on to its end; once for each runner."""
        kept = self._kept.get(pod.runner_id)
        if kept is None:
            kept = self._kept[pod.runner_id] = KeptLog(self._room)
            self._do_beside(self._keep(pod, kept), f"keep the log of {pod.name}")
        return kept

    async def _keep(self, pod: Pod, kept: KeptLog) -> None:
        reader = LogReader(None)
        try:
            while not kept.stopped:
                there = self._pods_of.get(pod.runner_id, {}).get(pod.uid)
                async for line in self._read_log(pod, reader, follow=True, begun=kept.begun):
                    kept.add(line)
                if reader.ended:
                    for line in reader.finish():
                        kept.add(line)
                if reader.ended or there is None or there.over:
                    return
                reader = LogReader(reader.cursor)  # not begun yet, or the connection broke
                await asyncio.sleep(LOG_SECONDS)
        except LauncherUnavailable as error:
            log.warning("%s: its log could not be kept before its pod went: %s", pod.runner_id, error)
        finally:
            if not reader.ended:
                kept.add(LogLine(LOST, CUT_OFF, gap=True))
            if not kept.begun.is_set() and self._kept.get(pod.runner_id) is kept:
                del self._kept[pod.runner_id]
            kept.begun.set()
            kept.whole.set()

    # What the copies tell.

    def _job_changed(self, before: Job | None, now: Job | None) -> None:
        one = now or before
        if one and (before or one.end or one.failed or one.succeeded):  # of a new one there is nothing to say
            self._hint(one.runner_id)
        if before and not now:
            self._forget_later(before.runner_id)

    def _pod_changed(self, before: Pod | None, now: Pod | None) -> None:
        if now:
            self._pods_of.setdefault(now.runner_id, {})[now.uid] = now
            if "running" not in (before.state if before else {}) and now.started:
                self._claim_if_needed(now)
            if now.deleted and now.node:
                self._keep_log_if_ours(now)
            if now.news != (before.news if before else pods.NO_NEWS):
                self._hint(now.runner_id)
        elif before:
            known = self._pods_of.get(before.runner_id, {})
            known.pop(before.uid, None)
            if not known:
                self._pods_of.pop(before.runner_id, None)
            self._about.pop(before.uid, None)
            job = self._jobs.objects.get(jobs.job_name(before.runner_id))
            if job and job.first_pod in {None, before.uid}:
                self._last.setdefault(before.runner_id, before)
            if before.started:
                self._claim_if_needed(before)
            self._hint(before.runner_id)
            self._forget_later(before.runner_id)

    def _claim_if_needed(self, pod: Pod) -> None:
        job = self._jobs.objects.get(jobs.job_name(pod.runner_id))
        last = self._last.get(pod.runner_id, pod)
        first = last.uid == pod.uid or not last.started
        if job and first and not job.keeps_one_pod and job.first_pod is None and job.uid == pod.job:
            name = f"claim {pod.name}"
            if all(task.get_name() != name for task in self._beside):  # else it is on its way
                self._do_beside(self._claim(job, pod), name)

    def _keep_log_if_ours(self, pod: Pod) -> None:
        """Keep the log of a pod that somebody deletes, unless its Job goes too, or it is not the runner."""
        job = self._jobs.objects.get(jobs.job_name(pod.runner_id))
        if job and job.uid == pod.job and job.first_pod in {None, pod.uid}:
            self._keep_log(pod)

    def _do_beside(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)

    def _warning_changed(self, before: Warned | None, now: Warned | None) -> None:
        if before and not now:
            known = self._about.get(before.about, {})
            if known.get(before.reason) is before:
                del known[before.reason]
            if not known:
                self._about.pop(before.about, None)
        elif now:
            self._about.setdefault(now.about, {})[now.reason] = now

    def _known(self, runner_id: str) -> Sequence[Pod]:
        return list(self._pods_of.get(runner_id, {}).values())

    def _told_of(self, job: Job | None, known: Sequence[Pod]) -> Mapping[str, Sequence[Warned]]:
        about = [*(pod.uid for pod in known), *([job.uid] if job else [])]
        return {uid: list(self._about[uid].values()) for uid in about if uid in self._about}

    def _hint(self, runner_id: str) -> None:
        for watcher in self._watchers:
            watcher.put_nowait(runner_id)

    async def _ask(self, method: str, path: str, query: Mapping[str, str | int]) -> Json:
        try:
            return await self._cluster.call(method, path, query=query)
        except Refused as refused:
            raise LauncherUnavailable(str(refused)) from refused


def _now() -> str:
    return f"{time.time():.3f}"


async def _briefly(news: asyncio.Event) -> None:
    """Wait for a log that is read, though not for ever: a node may have gone with it."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(KEEP_SECONDS):
            await news.wait()


async def _to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Make a request, and wait for its answer also when cancelled: one on its way cannot be called back.

    What would follow it is not done then: who cancels may have lost the engine to another replica.
    """
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()
        raise
