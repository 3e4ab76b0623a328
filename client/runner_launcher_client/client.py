"""The client for asyncio: everything the service can do, typed."""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx

from runner_launcher_client.address import find_address
from runner_launcher_client.errors import UnavailableError
from runner_launcher_client.exchange import (
    CAP_SECONDS,
    WAIT_SECONDS,
    Call,
    Conversation,
    Exchange,
    Patience,
    Pause,
    Trouble,
    unreachable,
)
from runner_launcher_client.records import (
    Diagnosis,
    Engine,
    Event,
    EventPage,
    PoolStatus,
    Preview,
    Runner,
    RunnerPage,
    RunnerState,
    Webhook,
)
from runner_launcher_client.request import launch_request
from runner_launcher_client.server_sent import events_of

T = TypeVar("T")

MAX_PAGE = 500
SILENCE_SECONDS = 60.0
"""How long an answer or an event stream may be silent; the service sends a sign of life more often."""


class RunnerLauncherClient:
    """Somebody who talks to one service. Use it as an async context manager, or call ``aclose``.

    Address and token come from the environment unless given. Every call raises RunnerLauncherError; one that finds the
    service away or busy is repeated for ``patience_seconds``. Cancelling a call ends it at once, and changes nothing for the
    runner.
    """

    def __init__(
        self, *, url: str | None = None, token: str | None = None, patience_seconds: float = Patience.seconds
    ) -> None:
        self._address = find_address(url, token)
        self._patience = Patience(patience_seconds)
        self._calls = Conversation(self._address, self._patience)
        self._http = httpx.AsyncClient(
            base_url=self._address.url,
            headers=self._calls.headers(),
            trust_env=not self._address.local,  # no proxy stands before this machine
        )

    async def __aenter__(self) -> Self:
        """Give itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections. Runners are not touched."""
        await self._http.aclose()

    # Launch and stop.

    async def launch(
        self, task: object, slot: object, pool: object, *, wait: float | None = None, key: str | None = None
    ) -> Runner:
        """Launch a runner for a task in a slot; each may be an object or a mapping, and the pool a name.

        Returns once its engine has accepted it, or as it is after ``wait`` seconds (0: at once), which may be ``pending``.
        The same ``key`` again, from anywhere, launches nothing and gives the same runner.
        Raises InvalidRequestError, NotPermittedError, SlotBusyError, PoolFullError, RunnerLaunchError, UnavailableError.
        """
        return await self._take(self._calls.launch(launch_request(task, slot, pool), key=key, wait=wait))

    async def preview(self, task: object, slot: object, pool: object) -> Preview:
        """Show what ``launch`` would send to the engine, secrets hidden; nothing is launched. Raises as ``launch`` does."""
        return await self._take(self._calls.preview(Preview, launch_request(task, slot, pool)))

    async def stop(self, runner_id: str, *, grace: float | None = None, force: bool = False) -> Runner:
        """Ask for a runner's end: TERM, and after ``grace`` seconds (None: as its pool says) KILL. Does not wait for it.

        ``force`` ends the record of a runner whose engine is gone for good.
        """
        return await self._take(self._calls.stop(runner_id, grace=grace, force=force))

    # Read.

    async def get(self, runner_id: str) -> Runner:
        """Give a runner as it is now."""
        return await self._take(self._calls.get(runner_id))

    async def wait(self, runner_id: str, *, timeout: float | None = None) -> Runner:  # noqa: ASYNC109 - the service waits
        """Give a runner once it has ended, or as it is after ``timeout`` seconds."""
        return await self._take(self._calls.finished(runner_id, timeout))

    async def changes(self, runner_id: str) -> AsyncGenerator[Runner]:
        """Give a runner as it is now, and again after each change until it has ended. Changes close together may be one."""
        tag: str | None = None
        while True:
            changed = await self._take(self._calls.change(runner_id, tag, WAIT_SECONDS))
            if changed:
                runner, tag = changed
                yield runner
                if runner.finished:
                    return

    async def page(
        self,
        *,
        state: RunnerState | str | None = None,
        phase: str | None = None,
        pool: str | None = None,
        task_id: str | None = None,
        slot_id: str | None = None,
        labels: Mapping[str, str] | None = None,
        since: datetime | timedelta | str | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> RunnerPage:
        """Give runners that match, newest first, 500 at most; ``cursor`` is the ``next_cursor`` of the page before."""
        wanted = {
            "state": None if state is None else str(state),
            "phase": phase,
            "pool": pool,
            "task_id": task_id,
            "slot_id": slot_id,
            "label": tuple(f"{name}={value}" for name, value in (labels or {}).items()),
            "since": None if since is None else _moment(since),
            "limit": limit,
            "cursor": cursor,
        }
        return await self._take(self._calls.read(RunnerPage, "/runners", **wanted))

    async def list(self, **wanted: Any) -> AsyncGenerator[Runner]:  # noqa: ANN401 - as page() has them
        """Give all runners that match, newest first, page by page; takes what ``page`` takes."""
        cursor: str | None = None
        while True:
            page = await self.page(**{"limit": MAX_PAGE, **wanted, "cursor": cursor})
            for runner in page.items:
                yield runner
            cursor = page.next_cursor
            if cursor is None:
                return

    async def logs(
        self,
        runner_id: str,
        *,
        tail: int | None = None,
        since: datetime | timedelta | str | None = None,
        follow: bool = False,
    ) -> AsyncGenerator[bytes]:
        """Give a runner's output as it comes, in pieces of any size; ``follow`` goes on until its end.

        ``since`` is a time, or how long ago (a timedelta, ``"10m"``): what was written before is left out, save
        for a second or so of a local process, whose output bears no times.
        Raises UnavailableError when the stream is cut, or ends before the runner that is followed does.
        """
        params: dict[str, str | int | float] = {"follow": "true"} if follow else {}
        if tail is not None:
            params["tail"] = tail
        if since is not None:
            params["since"] = _moment(since)
        call = Call("GET", f"/runners/{quote(runner_id, safe='')}/logs", params=params)
        silence = None if follow else SILENCE_SECONDS
        response = await self._open(call, Trouble(self._patience, self._address), silence=silence)
        try:
            async for piece in response.aiter_bytes():
                yield piece
        except httpx.RequestError as error:
            raise unreachable(self._address, error) from error
        finally:
            await response.aclose()
        if follow and not (await self.get(runner_id)).finished:
            raise UnavailableError(f"the service ended the log's stream; {runner_id} goes on", retryable=True)

    async def history(self, runner_id: str) -> tuple[Event, ...]:
        """Give what happened to a runner, the first event first."""
        return await self._take(self._calls.items(Event, f"/runners/{quote(runner_id, safe='')}/events"))

    async def past_events(self, *, after: int | None = None) -> AsyncGenerator[Event]:
        """Give what happened to all runners so far, the first event first, behind the revision ``after``."""
        wanted: dict[str, str | int | None] = {"since": after, "limit": MAX_PAGE}
        while True:
            page = await self._take(self._calls.read(EventPage, "/events", **wanted))
            for event in page.items:
                yield event
            if page.next_cursor is None:
                return
            wanted["cursor"] = page.next_cursor

    async def events(self, *, after: int | None = None) -> AsyncGenerator[Event]:
        """Give what happens to all runners, as it happens, without end; ``after`` is the revision of the last one known.

        A stream that is cut is taken up again where it was. Raises NotFoundError where the service has no such stream, or
        its history no longer reaches back to ``after``.
        """
        trouble = Trouble(self._patience, self._address)
        while True:
            headers = {"Accept": "text/event-stream"}
            if after is not None:
                headers["Last-Event-ID"] = str(after)
            response = await self._open(Call("GET", "/events", headers=headers), trouble, silence=SILENCE_SECONDS)
            opened = time.monotonic()
            cut: httpx.RequestError = httpx.RemoteProtocolError("the event stream ended")
            try:
                if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
                    raise UnavailableError(f"{response.request.url} is no event stream", code="not-understood")
                async for place, event in events_of(response.aiter_bytes()):
                    after = after if place is None else place
                    if event:
                        trouble.over()
                        yield event
            except httpx.RequestError as error:
                cut = error
            finally:
                await response.aclose()
            if time.monotonic() - opened > CAP_SECONDS:
                trouble.over()
            await asyncio.sleep(trouble.with_transport(cut))

    async def diagnosis(self, runner_id: str) -> Diagnosis:
        """Say what happened to a runner, and what to do next, in plain words."""
        return await self._take(self._calls.read(Diagnosis, f"/runners/{quote(runner_id, safe='')}/diagnosis"))

    # Pools and engines.

    async def pools(self) -> tuple[PoolStatus, ...]:
        """Give all configured pools and their use."""
        return await self._take(self._calls.items(PoolStatus, "/pools"))

    async def pool(self, name: str) -> PoolStatus:
        """Give one pool and its use."""
        return await self._take(self._calls.read(PoolStatus, f"/pools/{quote(name, safe='')}"))

    async def switch_pool(self, name: str, *, enabled: bool) -> PoolStatus:
        """Switch a pool on or off; it stays so, whatever its file says."""
        return await self._take(self._calls.switch(PoolStatus, name, enabled=enabled))

    async def engines(self) -> tuple[Engine, ...]:
        """Say of every engine what it can do, and whether it answers."""
        return await self._take(self._calls.items(Engine, "/engines"))

    async def webhooks(self) -> tuple[Webhook, ...]:
        """Say of every target of webhooks how far it was told."""
        return await self._take(self._calls.items(Webhook, "/webhooks"))

    async def retry_webhook(self, name: str) -> Webhook:
        """Have a target told again what it did not take."""
        return await self._take(self._calls.retry(Webhook, name))

    # How.

    async def _take(self, steps: Exchange[T]) -> T:
        """Take the steps of an exchange."""
        try:
            step = next(steps)
            while True:
                if isinstance(step, Pause):
                    await asyncio.sleep(step.seconds)
                    step = next(steps)
                    continue
                try:
                    response = await self._http.request(**step.arguments())
                except httpx.RequestError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(response)
        except StopIteration as end:
            result: T = end.value
            return result

    async def _open(self, call: Call, trouble: Trouble, *, silence: float | None) -> httpx.Response:
        """Open a stream, again and again until it opens; ``silence`` is how many seconds may pass without a byte."""
        while True:
            request = self._http.build_request(**call.arguments())
            request.extensions["timeout"]["read"] = silence
            try:
                response = await self._http.send(request, stream=True)
                if response.is_success:
                    return response
                await response.aread()
            except httpx.RequestError as error:
                delay = trouble.with_transport(error)
            else:
                delay = trouble.with_answer(response)
            await asyncio.sleep(delay)


def _moment(since: datetime | timedelta | str) -> str:
    """Write a time, or how long ago it was. Python takes a time without a zone for one of this machine's."""
    match since:
        case datetime():
            return since.astimezone(UTC).isoformat()
        case timedelta():
            return f"{max(0.0, since.total_seconds()):.3f}s"
        case _:
            return since
