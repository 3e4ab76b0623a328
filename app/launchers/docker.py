"""Runners as containers of a Docker Engine, through aiodocker; Podman's Docker API where it allows.

A runner's container bears its name and the installation's labels. The engine keeps what a restarted service needs: state,
exit code and log stay until ``remove``. An exited container is never started: only one that is seen to be created and not
started, by a look that no older order can still overtake.

Two clients: one for short calls, each with a deadline, one for streams (events, logs, pulls), which have none of their own.
"""

import asyncio
import json
import os
import platform
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
from aiodocker import Docker
from aiodocker.exceptions import DockerError
from pydantic import JsonValue

from app.errors import LauncherUnavailable, LaunchRejected, RunnerGone
from app.launcher import Exited, Found, Gone, Handle, LaunchSpec, LogLine, Observation, Running, Starting
from app.launchers import registry
from app.launchers.container import (
    INSTALLATION,
    MADE_UP,
    NAME,
    NO_COMMAND,
    RUNNER_ID,
    Engine,
    container_config,
    context_archive,
    exit_of,
    exit_told,
    handle_of,
    identity_of,
    log_may_be_cut,
    runner_id_of,
    seconds,
)
from app.launchers.container_log import MAYBE_GAP, SLACK_SECONDS, Cursor, Frames, Lines
from app.reason import Reason
from app.slots import look_at

CONNECT_SECONDS = 5.0
IDLE_SECONDS = 60.0
"""After so much silence a stream is opened anew: a dead connection looks like an engine with nothing to say."""

FENCE_SECONDS = 5.0
"""How long a container made by somebody else must stay unstarted before it is started here: by then an order to start it
from a service that has died is either carried out or nowhere any more."""

OOM_SECONDS = 1.0
"""How much later than a killed container's end its engine may tell that memory ran out."""

TIME_SECONDS = 2.0
"""How long a stop waits for an engine on another machine to say what time it is there."""

STARTS = 8
"""How many containers are started at once. More only wait inside the engine, and everybody else's calls with them."""

HISTORY_SECONDS = 3600
PROGRESS_SECONDS = 5.0
BACKOFF_SECONDS = (0.1, 5.0)
PODMANS = ("died", "remove")
"""What Podman calls two events when it is asked for them, and the second also when it tells of it."""

SMALL_LOG_BYTES = 64 * 1024
FEW = 2

_NOT_FOUND, _CONFLICT, _TOO_MANY, _BROKEN, _NO_CONNECTION = 404, 409, 429, 500, 900
_KILLED = 137
_ENDED = ("exited", "dead")
_NO_LOG = (_NOT_FOUND, _CONFLICT)  # gone, or going

Json = Mapping[str, Any]
T = TypeVar("T")
Tell = Callable[[str], None]


@dataclass(slots=True, eq=False)
class _Pull:
    """A pull under way, and who waits for it."""

    task: asyncio.Task[None]
    listeners: list[Tell] = field(default_factory=list)
    waiting: int = 0


class DockerLauncher:
    """Starts runners as containers. ``host`` is unix://PATH, tcp://HOST:PORT, http:// or https://.

    With https, or with DOCKER_TLS_VERIFY set, the certificates are those of DOCKER_CERT_PATH, as for Docker's own client. No
    call but a stream takes longer than ``call_seconds``.
    """

    def __init__(self, host: str, installation: str, call_seconds: float = 60) -> None:
        self._host = host
        self._call_seconds = call_seconds
        # Kill and delete must be given it: aiodocker lets these two wait for ever.
        self._in_time = aiohttp.ClientTimeout(total=call_seconds, sock_connect=CONNECT_SECONDS)
        self._installation = installation
        self._socket = Path(host.removeprefix("unix://")) if host.startswith("unix://") else None
        self._tls = _tls(host)
        self._clients: tuple[Docker, Docker] | None = None
        self._about: Engine | None = None
        self._ends: dict[str, Exited] = {}
        self._undisturbed: set[str] = set()
        self._oomed: set[str] = set()
        self._asked: set[str] = set()
        self._ordered_at: dict[str, float] = {}
        self._orders: dict[str, set[asyncio.Task[Any]]] = {}
        self._pulls: dict[tuple[str, str | None], _Pull] = {}
        self._digests: dict[str, str] = {}
        self._starts = asyncio.Semaphore(STARTS)
        self._streams: set[aiohttp.ClientResponse] = set()
        self._closed = asyncio.Event()

    # Launch.

    async def launch(self, runner_id: str, spec: LaunchSpec, *, progress: Tell | None = None) -> Handle:
        await self._orders_done(runner_id, "create", "start")
        engine = await self._engine()
        try:
            owner = await self._slot_owner(spec)
            config = container_config(runner_id, spec, installation=self._installation, owner=owner, engine=engine)
            await self._check_volumes(spec)
        except LaunchRejected:
            if found := await self._find(runner_id):  # launched while all that was still there
                return await self._settle(runner_id, found, spec)
            raise
        policy = spec.options.get("pull_policy")
        if policy == "always":
            if found := await self._find(runner_id):
                return await self._settle(runner_id, found, spec)
            await self._pull(spec, progress)
        try:
            container_id = await self._create(runner_id, config)
        except LaunchRejected:
            if found := await self._find(runner_id):  # by an engine that is stricter than it was
                return await self._settle(runner_id, found, spec)
            raise
        except DockerError as refusal:
            if found := await self._find(runner_id):
                return await self._settle(runner_id, found, spec)
            if refusal.status == _CONFLICT:
                raise LauncherUnavailable(f"{NAME}{runner_id} was there, and is gone again", acted=False) from refusal
            if not _no_such_image(refusal):
                raise LaunchRejected(refusal.message, Reason.CONFIG_ERROR) from refusal
            if policy == "never":
                raise LaunchRejected(f"{refusal.message}; pull_policy is never", Reason.IMAGE_NOT_FOUND) from refusal
            await self._pull(spec, progress)
            try:
                container_id = await self._create(runner_id, config)
            except DockerError as again:
                raise LauncherUnavailable(f"after the pull: {again.message}") from again
        return await self._begin(runner_id, container_id, spec)

    async def _slot_owner(self, spec: LaunchSpec) -> tuple[int, int] | None:
        """Tell who owns the slot, if the engine is on this machine. Raises LaunchRejected, LauncherUnavailable."""
        try:
            return await look_at(spec.working_dir or "/", lambda: self._look_at_slot(spec))
        except TimeoutError as error:
            raise LauncherUnavailable(str(error), acted=False) from error

    def _look_at_slot(self, spec: LaunchSpec) -> tuple[int, int] | None:
        """Do that; blocks."""
        if not self._socket or not spec.working_dir:
            return None
        if self._socket.resolve().is_relative_to(Path(spec.working_dir).resolve()):
            raise LaunchRejected(f"{spec.working_dir} holds the engine's own socket", Reason.CONFIG_ERROR)
        if str(Path(spec.working_dir).resolve()) != spec.working_dir:
            raise LaunchRejected(f"{spec.working_dir} leads elsewhere than when it was checked", Reason.CONFIG_ERROR)
        try:
            slot = os.stat(spec.working_dir)  # noqa: PTH116 - one call, for two facts
        except OSError as error:
            raise LaunchRejected(f"{spec.working_dir}: {error.strerror}") from error
        return slot.st_uid, slot.st_gid

    async def _check_volumes(self, spec: LaunchSpec) -> None:
        """Refuse a volume that is not there: the engine would make it, empty."""
        volumes: Mapping[str, str] = spec.options.get("volumes") or {}  # type: ignore[assignment] # validated with the pool
        for name in volumes:
            if not name.startswith("/"):
                with self._asking(f"looking for volume {name}", acted=False, refused=Reason.CONFIG_ERROR):
                    await (await self._docker.volumes.get(name)).show()  # type: ignore[no-untyped-call]

    async def _create(self, runner_id: str, config: Json) -> str:
        """Create the container; lets DockerError 404 and 409 through."""
        create = self._docker.containers.create(dict(config), name=NAME + runner_id)
        with self._asking(f"creating {NAME}{runner_id}", passes=(_NOT_FOUND, _CONFLICT), refused=Reason.CONFIG_ERROR):
            return str((await self._to_its_end(runner_id, create, "create")).id)

    async def _to_its_end(self, runner_id: str, call: Coroutine[Any, Any, T], name: str) -> T:
        """Make a call whole, also when nobody waits for it any more: the engine has it, and nothing calls it back.

        Who launches this runner next waits for it first; who removes it, for a create: there is no container to start later.
        """
        order = asyncio.create_task(call, name=name)
        self._orders.setdefault(runner_id, set()).add(order)
        order.add_done_callback(lambda _: self._ordered(runner_id, order))
        return await asyncio.shield(order)

    def _ordered(self, runner_id: str, order: asyncio.Task[Any]) -> None:
        if not order.cancelled():
            order.exception()  # told to whoever waits, if anybody does
        orders = self._orders[runner_id]
        orders.discard(order)
        if not orders:
            del self._orders[runner_id]

    async def _orders_done(self, runner_id: str, *names: str) -> None:
        while orders := [order for order in self._orders.get(runner_id, ()) if order.get_name() in names]:
            await asyncio.wait(orders)

    async def _begin(self, runner_id: str, container_id: str, spec: LaunchSpec, *, found: bool = False) -> Handle:
        """Give a created container the context, and start it; remove it if it can never start."""
        container = self._docker.containers.container(container_id)
        try:
            async with self._starts:
                with self._asking("looking at the container"):
                    about = await container.show()  # now: while it starts, the engine answers nothing of it
                handle = await self._handle(about)
                with self._asking("giving the context", refused=Reason.CONFIG_ERROR):
                    await container.put_archive("/", context_archive(spec.context))  # type: ignore[no-untyped-call]
                if found:  # somebody else may have been quicker, and it may have ended since
                    with self._asking("looking at the container"):
                        about = await container.show()
                    if _status(about) != "created":
                        return handle
                    await self._check_never_begun(container_id)
                await self._slot_owner(spec)  # once more: a pull may have taken minutes
                with self._asking("starting the container", refused=Reason.LAUNCH_REJECTED):
                    await self._to_its_end(runner_id, container.start(), "start")
        except LaunchRejected:
            await self._delete(container_id)
            raise
        except LauncherUnavailable as error:
            error.acted = True  # whatever came of the last call: the container is there
            raise
        return handle

    async def _check_never_begun(self, container_id: str) -> None:
        """Refuse a container that is said to be created and was begun: an engine that is killed at that moment forgets it.

        The init process is put into a container's files as it starts, and never before; where ``/sbin`` is a link to
        ``/usr/sbin``, it is there. Raises LauncherUnavailable.
        """
        with self._asking("looking at the container's files"):
            changes = await self._docker._query_json(f"containers/{container_id}/changes")  # noqa: SLF001 - has no other way
        if any(change["Path"].endswith("/docker-init") for change in changes or ()):
            text = (
                "the engine died as it started the container, and does not know what became of it: it is not started again"
            )
            raise LauncherUnavailable(text)

    async def _settle(self, runner_id: str, found: Json, spec: LaunchSpec) -> Handle:
        """Give the container that is there; start it if whoever made it never did."""
        deadline = time.monotonic() + FENCE_SECONDS
        while found["State"]["Status"] == "created":
            if time.monotonic() > deadline:
                return await self._begin(runner_id, found["Id"], spec, found=True)
            await asyncio.sleep(FENCE_SECONDS / 20)
            with self._asking("looking at the container"):
                found = await self._docker.containers.container(found["Id"]).show()
        if found["State"]["Status"] == "removing":
            raise LauncherUnavailable(f"{found['Name']} is being removed")
        return await self._handle(found)

    # Images.

    async def _pull(self, spec: LaunchSpec, progress: Tell | None) -> None:
        """Pull the image, together with everybody who waits for the same. Raises LaunchRejected, LauncherUnavailable."""
        image = registry.with_tag(str(spec.options["image"]))
        auth = await registry.auth_header(image, spec.options.get("registry_auth"))  # type: ignore[arg-type] # a file's name
        pull = self._pulls.get((image, auth))
        if pull is None:
            pull = self._pulls[image, auth] = _Pull(asyncio.create_task(self._pull_image(image, auth), name=f"pull {image}"))
        tell = progress or (lambda _: None)
        pull.listeners.append(tell)
        pull.waiting += 1
        tell(f"pulling {image}")
        try:
            await asyncio.shield(pull.task)
        finally:
            pull.listeners.remove(tell)
            pull.waiting -= 1
            if pull.task.done() or not pull.waiting:
                pull.task.cancel()
                if self._pulls.get((image, auth)) is pull:
                    del self._pulls[image, auth]
        tell(f"pulled {image}")

    async def _pull_image(self, image: str, auth: str | None) -> None:
        headers = {"X-Registry-Auth": auth} if auth else {}
        so_far, told = registry.Progress(image), time.monotonic()
        failed: str | None = None
        try:
            async with self._stream(
                "images/create", {"fromImage": image}, method="POST", headers=headers, passes=range(400, 600)
            ) as response:
                async for line in response.content:
                    message = json.loads(line)
                    failed = message.get("error") or failed
                    so_far.feed(message)
                    if time.monotonic() - told > PROGRESS_SECONDS and (pull := self._pulls.get((image, auth))):
                        told = time.monotonic()
                        for tell in pull.listeners:
                            tell(str(so_far))
        except DockerError as error:
            failed = error.message
        if failed:
            raise registry.pull_error(image, failed)

    async def _digest(self, image_id: str) -> str:
        """Give an image's digest in its registry, or its id if it never was in one."""
        if image_id not in self._digests:
            with suppress(DockerError), self._asking("looking at the image", passes=(_NOT_FOUND,)):
                about = await self._docker.images.inspect(image_id)
                self._digests[image_id] = next(iter(about.get("RepoDigests") or ()), image_id)
        return self._digests.get(image_id, image_id)

    # Observe.

    async def observe(self, handles: Sequence[Handle]) -> Mapping[str, Observation]:
        known = {handle.runner_id: end for handle in handles if (end := self._ends.get(handle.container_id or ""))}
        asked = [handle for handle in handles if handle.runner_id not in known]
        try:
            return known | await self._look(asked)
        except LauncherUnavailable:
            if not known:
                raise
            return known

    async def _look(self, handles: Sequence[Handle]) -> dict[str, Observation]:
        """Ask the engine: what it does not have is gone. One just being removed is left out."""
        listed = {} if len(handles) <= FEW else {entry["Labels"][RUNNER_ID]: entry for entry in await self._list()}
        found = {handle.runner_id: listed.get(handle.runner_id) or await self._find_handle(handle) for handle in handles}
        seen: dict[str, Observation] = {}
        for handle in handles:
            about = found[handle.runner_id]
            match _status(about) if about else None:
                case None:
                    seen[handle.runner_id] = Gone()
                case "created":
                    seen[handle.runner_id] = Starting()
                case "removing":
                    pass
                case ended if ended in _ENDED and about:
                    try:
                        end = await self._end(about)
                    except LauncherUnavailable:
                        if len(handles) == 1:
                            raise
                        continue  # nothing can be said of this one now
                    if end:
                        seen[handle.runner_id] = end
                case _:
                    seen[handle.runner_id] = Running()
        return seen

    async def _end(self, about: Json) -> Exited | None:
        """Tell how a container ended; None if it is gone meanwhile."""
        container_id = about["Id"]
        if known := self._ends.get(container_id):
            return known
        if isinstance(about["State"], str):  # listed, which tells little
            looked = await self._show(container_id)
            if looked is None or _status(looked) not in _ENDED:
                return None
            about = looked
        last_line = b""
        if about["State"]["ExitCode"] in NO_COMMAND:
            try:
                async with aclosing(self._read(container_id, Lines(local=_in_local_log(about)), tail=1)) as reading:
                    async for line in reading:
                        last_line = line.text
            except RunnerGone:
                if _status(about) != "dead":  # of one whose removal failed the engine gives no log
                    return None
        oom_event = await self._oom_told(about)
        booted_at = None
        if self._socket and about["State"]["ExitCode"] == MADE_UP and (await self._engine()).name == platform.node():
            booted_at = await asyncio.to_thread(_booted_at)
        end = exit_of(about["State"], last_line=last_line, oom_event=oom_event, booted_at=booted_at)
        if (ordered_at := self._ordered_at.get(container_id)) and end.finished_at:
            end = replace(end, stopped=end.finished_at >= ordered_at)
        return self._ends.setdefault(container_id, Exited(end))

    async def _oom_told(self, about: Json) -> bool:
        """Say whether the engine told that memory ran out. The event of it may come a moment after the death."""
        container_id, state = about["Id"], about["State"]
        killed = state["ExitCode"] == _KILLED and container_id not in self._asked and not state.get("OOMKilled")
        just_now = abs(time.time() - (seconds(state.get("FinishedAt")) or 0)) < OOM_SECONDS
        deadline = time.monotonic() + OOM_SECONDS
        while killed and just_now and about["HostConfig"]["Memory"] and container_id not in self._oomed:
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(0.02)
        return container_id in self._oomed

    async def watch(self) -> AsyncIterator[str]:
        """Yield whoever ends, by the engine's events; after every pause also those who ended or vanished in it.

        Whoever began and ended before these eyes, and nobody signalled it, has mostly told its end with that: then there is
        nothing to ask, and the engine answers nothing of it before it has taken the network down. Of who was signalled only
        the engine's record tells the time, as against our stop.
        """
        last = int((time.time() - HISTORY_SECONDS) * 1e9)
        live: set[str] = set()
        failures = 0
        events = {
            "type": ["container"],
            "event": ["start", "kill", "oom", "die", "destroy", *PODMANS],
            "label": [f"{INSTALLATION}={self._installation}"],
        }
        while not self._closed.is_set():
            params = {"filters": json.dumps(events), "since": f"{last // 10**9}.{last % 10**9:09d}"}
            opened = time.monotonic()
            with suppress(LauncherUnavailable, DockerError):
                async with self._stream("events", params, idle=IDLE_SECONDS) as response:
                    self._about = None  # it may be another engine by now
                    self._undisturbed.clear()
                    listed = {entry["Labels"][RUNNER_ID]: entry["State"] not in _ENDED for entry in await self._list()}
                    for runner_id in [*(live - listed.keys()), *(name for name, lives in listed.items() if not lives)]:
                        yield runner_id
                    live = {name for name, lives in listed.items() if lives}
                    async for line in response.content:
                        event = json.loads(line)
                        last = max(last, event["timeNano"])  # they come a little out of order
                        if self._heard(event["Action"], event["Actor"], event["timeNano"] / 1e9):
                            live.discard(event["Actor"]["Attributes"][RUNNER_ID])
                            yield event["Actor"]["Attributes"][RUNNER_ID]
            failures = 0 if time.monotonic() - opened > BACKOFF_SECONDS[1] else failures + 1
            if failures:
                await self._pause(min(BACKOFF_SECONDS[1], BACKOFF_SECONDS[0] * 2**failures))

    def _heard(self, action: str, actor: Json, at: float) -> bool:
        """Note what the engine tells of a container; says whether that is worth a look."""
        container_id = actor["ID"]
        match action:
            case "start":
                self._undisturbed.add(container_id)
                return False
            case "kill":
                self._undisturbed.discard(container_id)
                return False
            case "oom":
                self._oomed.add(container_id)
                return False
            case "destroy" | "remove":
                self._forget(container_id)
            case "die" if container_id in self._undisturbed:
                self._undisturbed.discard(container_id)
                if end := exit_told(actor["Attributes"], at, oom_event=container_id in self._oomed):
                    self._ends.setdefault(container_id, Exited(end))
        return True

    # Stop and remove.

    async def stop(self, handle: Handle, grace: float) -> None:
        """Signal the main process and its group, once (the init process passes it on); KILL ends the whole container."""
        container_id = await self._container_id(handle)
        if container_id is None or (grace > 0 and container_id in self._asked):
            return
        undisturbed = container_id in self._undisturbed
        self._undisturbed.discard(container_id)
        if self._socket is None and container_id not in self._asked:
            await self._note_the_time(container_id)
        try:
            with self._asking(f"stopping {handle.runner_id}", passes=(_NOT_FOUND, _CONFLICT)):
                await self._docker.containers.container(container_id).kill(
                    signal="SIGKILL" if grace <= 0 else "SIGTERM", timeout=self._in_time
                )
            self._asked.add(container_id)
        except LauncherUnavailable as error:
            if undisturbed and not error.acted:
                self._undisturbed.add(container_id)
            raise
        except DockerError as error:
            if error.status == _NOT_FOUND or grace > 0:
                return
            found = await self._find_ours(handle.runner_id)
            if found and _status(found) == "created":  # it will never end, having never begun
                await self._delete(found["Id"])

    async def _note_the_time(self, container_id: str) -> None:
        """Ask an engine on another machine what time it is there: our clock does not say whether an end came of a stop."""
        with suppress(LauncherUnavailable), self._asking("asking for the time"):
            async with asyncio.timeout(TIME_SECONDS):  # without it both clocks are believed
                told = seconds((await self._docker.system.info()).get("SystemTime"))
            if told:
                self._ordered_at.setdefault(container_id, told)

    async def remove(self, handle: Handle) -> None:
        await self._orders_done(handle.runner_id, "create")
        if container_id := await self._container_id(handle):
            await self._delete(container_id)
            self._forget(container_id)

    async def _container_id(self, handle: Handle) -> str | None:
        """Name a runner's container; by its name alone only after a look, for the name may be somebody else's."""
        if handle.container_id:
            return handle.container_id
        found = await self._find_ours(handle.runner_id)
        return str(found["Id"]) if found else None

    def _forget(self, container_id: str) -> None:
        self._ends.pop(container_id, None)
        self._undisturbed.discard(container_id)
        self._oomed.discard(container_id)
        self._asked.discard(container_id)
        self._ordered_at.pop(container_id, None)

    async def _delete(self, container_id: str) -> None:
        """Remove a container, killing it if need be, and wait until it is gone."""
        container = self._docker.containers.container(container_id)
        deadline = time.monotonic() + self._call_seconds
        while True:
            try:
                with self._asking("removing the container", passes=(_NOT_FOUND, _CONFLICT)):
                    await container.delete(force=True, v=True, timeout=self._in_time)
            except DockerError as error:
                if error.status == _NOT_FOUND:
                    return
                if time.monotonic() > deadline:
                    raise LauncherUnavailable(f"removing the container: {error.message}") from error
                await asyncio.sleep(BACKOFF_SECONDS[0])  # somebody else is at it
            else:
                return

    # Logs.

    async def logs(
        self, handle: Handle, *, after: str | None = None, since: float | None = None, follow: bool = False
    ) -> AsyncIterator[LogLine]:
        async with aclosing(self._logged(handle, after, since, follow=follow)) as lines:
            async for line in lines:
                if not line.is_before(since):
                    yield line

    async def _logged(
        self, handle: Handle, after: str | None, since: float | None, *, follow: bool
    ) -> AsyncGenerator[LogLine]:
        """Give lines since a time, and some before."""
        found = await self._find_handle(handle)
        if found is None:
            raise RunnerGone(f"{self._host} has no container for {handle.runner_id}")
        container_id, ended = found["Id"], _status(found) in _ENDED
        if after is None and not await self._reaches_back(container_id, since):
            if ended and (small := await self._small_log(found)) is not None:
                for line in small:
                    yield line
                return
            if await self._may_be_cut(found):
                yield LogLine("", MAYBE_GAP, gap=True)
        cursor, local = Cursor.read(after) if after else None, _in_local_log(found)
        failures = 0
        while True:
            lines = Lines(cursor, local=local)
            try:
                async with aclosing(self._read(container_id, lines, since, follow=follow and not ended)) as reading:
                    async for line in reading:
                        failures = 0
                        yield line
            except LauncherUnavailable:
                if not follow:
                    raise
            else:
                if ended or not follow:
                    if ended:
                        for line in lines.end():
                            yield line
                    return
            if self._closed.is_set():
                return
            cursor = lines.at or cursor
            with suppress(LauncherUnavailable):
                found = await self._find_handle(handle)
                if found is None:
                    for line in lines.end():
                        yield line
                    raise RunnerGone(f"{self._host} has no container for {handle.runner_id} any more")
                ended = _status(found) in _ENDED
            if not ended:
                failures += 1
                await self._pause(min(BACKOFF_SECONDS[1], BACKOFF_SECONDS[0] * 2**failures))

    async def _reaches_back(self, container_id: str, since: float | None) -> bool:
        """Say whether the log begins before a time: then nothing of what was written since was dropped."""
        if since is None:
            return False
        async with aclosing(self._read(container_id, Lines())) as lines:
            first = await anext(lines, None)
        return first is not None and first.is_before(since)

    async def _read(
        self,
        container_id: str,
        lines: Lines,
        since: float | None = None,
        *,
        follow: bool = False,
        tail: int | None = None,
    ) -> AsyncGenerator[LogLine]:
        """Read a log from a cursor on, or else from a time on, once; of its end only the last ``tail`` lines."""
        params = {"stdout": "1", "stderr": "1", "timestamps": "1", "follow": str(int(follow))}
        if tail is not None:
            params["tail"] = str(tail)
        if lines.after:
            params["since"] = lines.after.since
        elif since is not None:
            params["since"] = str(max(0, int(since) - SLACK_SECONDS))
        frames = Frames()
        try:
            async with self._stream(
                f"containers/{container_id}/logs", params, idle=IDLE_SECONDS, passes=_NO_LOG
            ) as response:
                async for data in response.content.iter_any():
                    for number, frame in frames.feed(data):
                        for line in lines.feed(number, frame):
                            yield line
        except DockerError as error:
            raise RunnerGone(f"{self._host}: {error.message}") from error

    async def _small_log(self, about: Json) -> Sequence[LogLine] | None:
        """Read the log of an ended container, if it is too small for its oldest part to be gone."""
        lines, kept, size = Lines(local=_in_local_log(about)), list[LogLine](), 0
        async with aclosing(self._read(about["Id"], lines)) as reading:
            async for line in reading:
                kept.append(line)
                size += len(line.text)
                if size > SMALL_LOG_BYTES:
                    return None
        return [*kept, *lines.end()]

    async def _may_be_cut(self, about: Json) -> bool:
        """Say whether the log has come to its cap, by its size."""
        params = {"stdout": "1", "stderr": "1", "follow": "0"}
        size = lines = 0
        try:
            async with self._stream(f"containers/{about['Id']}/logs", params, idle=IDLE_SECONDS, passes=_NO_LOG) as response:
                async for data in response.content.iter_any():
                    size += len(data)
                    lines += data.count(b"\n")
                    if log_may_be_cut(size, lines, about["Config"]["Labels"]):
                        return True
        except DockerError as error:
            raise RunnerGone(f"{self._host}: {error.message}") from error
        return False

    def log_file(self, handle: Handle) -> Path | None:  # noqa: ARG002 - the engine keeps it
        return None

    # The engine.

    async def list(self) -> Sequence[Found]:
        engine = await self._engine()
        found = []
        for entry in await self._list():
            handle = handle_of(entry["Id"], entry["Labels"], engine, await self._digest(entry["ImageID"]))
            found.append(Found(handle, identity_of(entry["Labels"]), float(entry["Created"])))
        return found

    async def ping(self) -> None:
        with self._asking("asking for a sign of life"):
            await self._docker.version()

    def render(self, runner_id: str, spec: LaunchSpec) -> Mapping[str, JsonValue]:
        owner = self._look_at_slot(spec)
        config = container_config(
            runner_id, spec, installation=self._installation, owner=owner, engine=self._about or Engine()
        )
        return {"name": NAME + runner_id, **config}

    async def about(self) -> Mapping[str, JsonValue]:
        with self._asking("asking what the engine is", acted=False):
            info = await self._docker.system.info()
        engine = Engine.told(info)
        return {
            "version": info.get("ServerVersion"),
            "api_version": self._docker.api_version.removeprefix("v"),
            "node": engine.name,
            "cores": info.get("NCPU"),
            "memory_mib": (info.get("MemTotal") or 0) >> 20,
            "cgroup_version": info.get("CgroupVersion"),
            "cpu_limits_by": "engine" if engine.cpu_limit else "none",
            "memory_limits_by": "engine" if engine.memory_limit else "none",
            "log_driver": engine.log_driver,
            "runtimes": sorted(info.get("Runtimes") or ()),
        }

    async def aclose(self) -> None:
        self._closed.set()
        for response in tuple(self._streams):
            response.close()  # wakes who reads; a connector that closes does not
        if self._clients:
            for client in self._clients:
                await client.close()
                await client.connector.close()

    async def _list(self) -> Sequence[Json]:
        """List all containers of this installation, as the engine lists them."""
        filters = json.dumps({"label": [f"{INSTALLATION}={self._installation}"]})
        with self._asking("listing the containers"):
            containers = await self._docker.containers.list(all=True, filters=filters)
        found = [container._container for container in containers]  # noqa: SLF001
        # An image made of one of our containers bears our labels, and so does all that is made of it.
        return [each for each in found if f"/{NAME}{each['Labels'].get(RUNNER_ID)}" in (each["Names"] or ())]

    async def _find(self, runner_id: str) -> Json | None:
        """Look at a runner's container. Raises LaunchRejected if its name is taken by one that is not ours."""
        about = await self._show(NAME + runner_id)
        if about and runner_id_of(about["Config"]["Labels"], self._installation) != runner_id:
            raise LaunchRejected(f"the name {NAME}{runner_id} is taken by a container that is not ours", Reason.CONFIG_ERROR)
        return about

    async def _find_handle(self, handle: Handle) -> Json | None:
        """Look at a runner's container; one that is on record by its id is ours, whatever it is called by now."""
        return await (self._show(handle.container_id) if handle.container_id else self._find_ours(handle.runner_id))

    async def _find_ours(self, runner_id: str) -> Json | None:
        try:
            return await self._find(runner_id)
        except LaunchRejected:
            return None

    async def _show(self, name: str) -> Json | None:
        try:
            with self._asking("looking at the container", passes=(_NOT_FOUND,)):
                return dict(await self._docker.containers.container(name).show())
        except DockerError as error:
            if "no such container" not in error.message.lower():  # whoever said so stands before the engine
                raise LauncherUnavailable(f"{self._host}, looking at the container: {error.message}") from error
            return None

    async def _handle(self, about: Json) -> Handle:
        return handle_of(about["Id"], about["Config"]["Labels"], await self._engine(), await self._digest(about["Image"]))

    async def _engine(self) -> Engine:
        """Ask the engine what it is and can; once for each connection to it."""
        if self._about is None:
            with self._asking("asking what the engine can do", acted=False):
                self._about = Engine.told(await self._docker.system.info())
        return self._about

    @property
    def _docker(self) -> Docker:
        """The client for short calls."""
        return self._connected()[0]

    def _connected(self) -> tuple[Docker, Docker]:
        if self._closed.is_set():
            raise LauncherUnavailable("this launcher is closed", acted=False)
        if self._clients is None:
            self._clients = self._client(self._in_time), self._client(aiohttp.ClientTimeout(sock_connect=CONNECT_SECONDS))
        return self._clients

    def _client(self, timeout: aiohttp.ClientTimeout) -> Docker:
        """Open a client; its connector has no limit, or one follower too many would hold up every call for ever."""
        if self._socket:
            return Docker("http://docker", aiohttp.UnixConnector(str(self._socket), limit=0), timeout=timeout)
        address = self._host.replace("tcp://", "https://" if self._tls else "http://", 1)
        return Docker(address, aiohttp.TCPConnector(limit=0, ssl=self._tls or True), timeout=timeout)

    @asynccontextmanager
    async def _stream(
        self,
        path: str,
        params: Mapping[str, str],
        *,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        idle: float | None = None,
        passes: Sequence[int] = (_NOT_FOUND,),
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Open a stream, closed for sure when left (aiodocker's own is not)."""
        calls, streams = self._connected()
        await self._engine()  # with it the version of the API is settled
        url = f"{streams.docker_host}/{calls.api_version}/{path}"
        timeout = aiohttp.ClientTimeout(sock_connect=CONNECT_SECONDS, sock_read=idle)
        with self._asking(f"reading {path}", acted=False, passes=passes):
            async with streams.session.request(method, url, params=params, headers=headers, timeout=timeout) as response:
                if response.status >= 400:  # noqa: PLR2004 - HTTP's errors
                    text = await response.text()
                    with suppress(ValueError, KeyError, TypeError):
                        text = json.loads(text)["message"]
                    raise DockerError(response.status, text)
                self._streams.add(response)
                try:
                    yield response
                finally:
                    self._streams.discard(response)

    @contextmanager
    def _asking(
        self, what: str, *, acted: bool = True, passes: Sequence[int] = (), refused: Reason | None = None
    ) -> Iterator[None]:
        """Say in the port's errors what an engine's answer means; ``passes`` are the statuses that the caller reads.

        ``refused`` is why a launch ends that the engine says no to; None: only a launch can be refused.
        """
        try:
            yield
        except DockerError as told:
            error = _in_dockers_words(told)
            if error.status in passes:
                raise error from told
            if error.status == _NO_CONNECTION:
                raise self._no_connection(told.__context__, what, acted=acted) from error
            text = f"{self._host}, {what}: {error.message}"
            if "client version" in error.message and self._clients:  # the engine was exchanged for another
                self._clients[0].api_version = "auto"
                raise LauncherUnavailable(text, acted=False) from error
            if error.status == _NOT_FOUND and "no such container" in error.message.lower():  # pruned by somebody
                raise LauncherUnavailable(text, acted=acted) from error
            if refused and error.status < _BROKEN and error.status != _TOO_MANY:
                raise LaunchRejected(error.message, refused) from error
            if refused and _never_works(error.message):
                raise LaunchRejected(error.message, Reason.CONFIG_ERROR) from error
            raise LauncherUnavailable(text, acted=acted) from error
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, RuntimeError, AssertionError) as error:
            if isinstance(error, RuntimeError | AssertionError) and not self._closed.is_set():
                raise  # a session closed under a call fails by either
            raise self._no_connection(error, what, acted=acted) from error

    def _no_connection(self, error: BaseException | None, what: str, *, acted: bool) -> LauncherUnavailable:
        """Say why nobody answered; an engine that could not even be connected to surely did nothing."""
        match error:
            case aiohttp.ClientConnectorCertificateError():
                return LauncherUnavailable(f"{self._host}: cannot connect: {error.certificate_error}", acted=False)
            case aiohttp.ClientConnectorError():
                said = error.os_error.strerror or error.os_error
                return LauncherUnavailable(f"{self._host}: cannot connect: {said}", acted=False)
            case TimeoutError():
                return LauncherUnavailable(f"{self._host}, {what}: no answer in time", acted=acted)
            case _:
                said = str(error) or type(error).__name__
                return LauncherUnavailable(f"{self._host}, {what}: the connection broke: {said}", acted=acted)

    async def _pause(self, seconds: float) -> None:
        """Wait, but not beyond the close."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._closed.wait()


def _status(about: Json) -> str:
    """Read the state of a container, listed or looked at."""
    state = about["State"]
    return str(state if isinstance(state, str) else state["Status"])


def _in_local_log(about: Json) -> bool:
    return bool(about["HostConfig"]["LogConfig"]["Type"] == "local")


def _in_dockers_words(error: DockerError) -> DockerError:
    """Podman tells some conflicts as faults of its own."""
    conflict = "already in use" in error.message or "container state improper" in error.message
    return DockerError(_CONFLICT, error.message) if conflict and error.status == _BROKEN else error


def _booted_at() -> float:
    """Say when this machine came up."""
    return next(float(line.split()[1]) for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))


def _no_such_image(error: DockerError) -> bool:
    said = error.message.lower()
    return "no such image" in said or "image not known" in said


def _never_works(said: str) -> bool:
    """Some faults of the order are told as faults of the engine."""
    said = said.lower()
    return any(
        word in said
        for word in (
            "could not select device driver",
            "unknown runtime",
            "unable to find user",
            "no matching entries",
            "a command that was not found",
            "oci permission denied",
        )
    )


def _tls(host: str) -> ssl.SSLContext | None:
    """Load the certificates for an engine that asks for them. Raises LaunchRejected. Blocks."""
    if not host.startswith("https://") and not (host.startswith("tcp://") and os.environ.get("DOCKER_TLS_VERIFY")):
        return None
    folder = Path(os.environ.get("DOCKER_CERT_PATH") or Path.home() / ".docker")
    try:
        context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
        context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    except OSError as error:
        text = f"{host}: the certificates ca.pem, cert.pem and key.pem in {folder} cannot be used: {error}"
        raise LaunchRejected(text, Reason.CONFIG_ERROR) from error
    return context
