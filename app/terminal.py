"""What the verbs of the command line do: ask the service, and show a person, or a script, what it says.

What was asked for goes to standard output, the story around it to standard error. Cut off from a terminal, tables are as
wide as they need to be and nothing is coloured.
"""

import io
import json
import logging
import re
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text
from runner_launcher_client import (
    Event,
    NotFoundError,
    PoolStatus,
    Runner,
    RunnerLauncherClient,
    RunnerLauncherError,
    RunnerLaunchError,
    RunnerState,
    Webhook,
)
from typing_extensions import override

FAILED = 1
WIDE = 10_000
LONG_AGO = datetime.min.replace(tzinfo=UTC)
STYLES = {"pending": "yellow", "running": "cyan", "completed": "green", "failed": "red", "on": "green", "off": "yellow"}
MINUTE, HOUR, DAY = 60, 3600, 86_400

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Terminal:
    """A person, or a script (``as_json``), and the service it talks to."""

    client: RunnerLauncherClient

    def __init__(self, *, as_json: bool) -> None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a task's title may hold more than this terminal can show
        self._as_json = as_json
        self._out = _console(stderr=False)
        self._err = _console(stderr=True)
        self._status: Status | None = None
        self.going_on: str | None = None
        """The runner that lives on if we are interrupted."""
        log = logging.getLogger("runner_launcher_client")
        log.addHandler(_Story(self))
        log.setLevel(logging.INFO)

    # Verbs. Each gives an exit code, None for 0.

    async def launch(self, request: Mapping[str, Any], *, key: str | None, wait: bool) -> int | None:
        """Launch a runner, tell how it goes until it has started or ended, and print its id."""
        with self._busy("asking for a launch"):
            runner = await self.client.launch(request["task"], request["slot"], request["pool"], wait=0, key=key)
            self.going_on = runner.runner_id
            if wait:
                self._id(runner)
            runner = await self._told(runner, to_the_end=wait)
        if runner.finished and not runner.accepted:
            raise RunnerLaunchError.of(runner)
        if self._as_json:
            self._json(runner.to_dict())
        elif not wait:
            self._id(runner)
        self.say(f"{runner.runner_id} {_in_words(runner)}")
        return FAILED if wait and runner.state is RunnerState.FAILED else None

    async def preview(self, request: Mapping[str, Any]) -> None:
        """Show what a launch would be."""
        preview = await self.client.preview(request["task"], request["slot"], request["pool"])
        if self._as_json:
            self._json(preview.to_dict())
            return
        self._record({"pool": preview.pool_name, "engine": preview.engine, "refusal": preview.refusal})
        for head, told in (("What the engine would be sent", preview.request), ("Task context", preview.task_context)):
            if told:
                self._out.print(Text(f"\n{head}:", style="bold"))
                self._out.print(Text(json.dumps(told, ensure_ascii=False, indent=2)), soft_wrap=True)

    async def ps(self, wanted: Mapping[str, str | None], states: Sequence[str | None], limit: int) -> None:
        """List runners in any of these states, newest first; None: all."""
        runners: list[Runner] = []
        for state in states:
            number = 0
            async for runner in self.client.list(state=state, limit=min(limit, 500), **wanted):
                runners.append(runner)
                number += 1
                if number == limit:
                    break
        if not runners and wanted["pool"] is not None:
            await self.client.pool(wanted["pool"])  # or is there none of that name?
        runners.sort(key=lambda runner: (runner.created_at or LONG_AGO, runner.revision), reverse=True)
        del runners[limit:]
        if self._as_json:
            self._json([runner.to_dict() for runner in runners])
        else:
            now = datetime.now(UTC)
            heads = ("RUNNER", "TASK", "POOL", "SLOT", "STATE", "REASON", "AGE", "RAN")
            self._table(
                heads,
                (
                    (
                        runner.runner_id,
                        runner.task_id,
                        runner.pool_name,
                        runner.slot_id,
                        _state(runner),
                        runner.reason or "",
                        _span(runner.created_at, now),
                        _span(runner.started_at, runner.finished_at or now),
                    )
                    for runner in runners
                ),
                empty="no runners" if len(states) == 1 else "no live runners; --all lists those that have ended too",
            )

    async def show(self, runner_id: str) -> None:
        """Show a record."""
        runner = await self.client.get(runner_id)
        if self._as_json:
            self._json(runner.to_dict())
        else:
            told = {key: value for key, value in runner.to_dict().items() if key != "links" and value is not False}
            self._record({**told, "state": _state(runner)})

    async def logs(self, runner_id: str, *, tail: int | None, since: str | None, follow: bool) -> None:
        """Print output, byte by byte as the runner wrote it, or a JSON object a line."""
        async with aclosing(self.client.logs(runner_id, tail=tail, since=since, follow=follow)) as pieces:
            if self._as_json:
                runner_id = (await self.client.get(runner_id)).runner_id  # which may have been cut short
                async for line in _lines(pieces):
                    self._line({"runner_id": runner_id, "line": line.decode(errors="replace")})
            else:
                async for piece in pieces:
                    sys.stdout.buffer.write(piece)
                    sys.stdout.buffer.flush()

    async def stop(self, runner_ids: Sequence[str], *, grace: float | None, force: bool, wait: bool) -> int | None:
        """Stop each; one that cannot be stopped is told, and does not keep the others from it."""
        runners: list[Runner] = []
        failure: RunnerLauncherError | None = None
        for runner_id in runner_ids:
            try:
                runners.append(await self.client.stop(runner_id, grace=grace, force=force))
            except RunnerLauncherError as error:
                if failure:
                    self.refuse(failure)
                failure = error
        if wait:
            with self._busy("waiting for the end"):
                runners = [await self.client.wait(runner.runner_id) for runner in runners]
        if self._as_json:
            self._json([runner.to_dict() for runner in runners])
        for runner in runners if not self._as_json else ():
            self._print(f"{runner.runner_id} {_in_words(runner)}")
        if failure:
            raise failure
        return None

    async def diagnose(self, runner_id: str) -> None:
        """Show a diagnosis, as paragraphs."""
        diagnosis = await self.client.diagnosis(runner_id)
        if self._as_json:
            self._json(diagnosis.to_dict())
            return
        self._print(diagnosis.summary)
        for head, words in (("Likely cause", diagnosis.likely_cause), ("What to do", diagnosis.next_step)):
            if words:
                self._out.print(Text.assemble((f"\n{head}: ", "bold"), _clean(words)), soft_wrap=True)
        if diagnosis.evidence:
            self._out.print(Text("\nEvidence:", style="bold"))
        for each in diagnosis.evidence:
            self._print(f"  {each.get('source', '')}: {each.get('text', '')}")

    async def events(self, runner_id: str | None, *, follow: bool) -> None:
        """Tell events, of one runner or of all."""
        if not follow:
            past = self.client.past_events()
            events = await self.client.history(runner_id) if runner_id else [event async for event in past]
            if self._as_json:
                self._json([event.to_dict() for event in events])
            for event in events if not self._as_json else ():
                self._event(event, of_all=runner_id is None)
            return
        async with aclosing(self._happening(runner_id) if runner_id else self.client.events()) as happening:
            async for event in happening:
                if self._as_json:
                    self._line(event.to_dict())
                else:
                    self._event(event, of_all=runner_id is None)

    async def pools(self, name: str | None, enable: bool | None) -> None:  # noqa: FBT001 - None: leave it
        """Show pools, or one, switched before if asked to."""
        if name is None:
            found = await self.client.pools()
        elif enable is None:
            found = (await self.client.pool(name),)
        else:
            found = (await self.client.switch_pool(name, enabled=enable),)
        if self._as_json:
            told = [pool.to_dict() for pool in found]
            self._json(told if name is None else told[0])
        else:
            heads = ("POOL", "TYPE", "IS", "RUNNING", "QUEUED", "CORES", "MIB")
            self._table(heads, map(_pool, found), empty="no pools are configured")

    async def engines(self) -> None:
        """Show engines."""
        found = await self.client.engines()
        if self._as_json:
            self._json([engine.to_dict() for engine in found])
        else:
            rows = (
                (
                    engine.name,
                    ", ".join(engine.pools),
                    Text("yes", style="green") if engine.answers else Text("no", style="red"),
                    "" if engine.age_seconds is None else f"{engine.age_seconds:.0f}s ago",
                    engine.problem or _short(engine.details),
                )
                for engine in found
            )
            self._table(("ENGINE", "POOLS", "ANSWERS", "HEARD", "WHAT"), rows, empty="no engine is in use")

    async def webhooks(self, name: str | None, *, retry: bool) -> None:
        """Show who is told of runners, one of them in full."""
        found = (await self.client.retry_webhook(name),) if name and retry else await self.client.webhooks()
        if name:
            found = tuple(each for each in found if each.name == name)
            if not found:
                raise NotFoundError(f"no webhook target named {name} is configured")
        if self._as_json:
            told = [each.to_dict() for each in found]
            self._json(told[0] if name else told)
        elif name:
            self._record(found[0].to_dict())
        else:
            heads = ("TARGET", "URL", "IS", "BEHIND", "RETRYING", "PARKED", "ERROR")
            self._table(heads, map(_webhook, found), empty="nobody is told of runners")

    # What goes on.

    async def _told(self, runner: Runner, *, to_the_end: bool) -> Runner:
        """Tell what happens to a runner until it has started, or ended."""
        last = 0
        async for changed in self.client.changes(runner.runner_id):
            runner = changed
            if not self._as_json and runner.revision > last:
                for event in await self.client.history(runner.runner_id):
                    if event.revision > last:
                        last = event.revision
                        self._story(event)
            if runner.accepted and not to_the_end:
                break
        return runner

    async def _happening(self, runner_id: str) -> AsyncGenerator[Event]:
        """Give what happened to a runner, and what happens, until it has ended."""
        last = 0
        async for _ in self.client.changes(runner_id):
            for event in await self.client.history(runner_id):
                if event.revision > last:
                    last = event.revision
                    yield event

    @contextmanager
    def _busy(self, words: str) -> Iterator[None]:
        """Show that something goes on, to somebody who looks."""
        if self._as_json or not self._err.is_terminal:
            yield
            return
        with self._err.status(Text(words)) as self._status:
            yield
        self._status = None

    def _story(self, event: Event) -> None:
        """Tell an event on the way to a launch's outcome."""
        words = _clean(event.type.replace("_", " ") + (f": {event.message}" if event.message else ""))
        if self._status:
            self._status.update(Text(words))
        self._err.print(Text(f"{_clock(event.at)} {words}", style="dim"))

    # How it is written.

    def say(self, words: str) -> None:
        """Tell a person something beside the answer."""
        if not self._as_json:
            self._err.print(Text(_clean(words)), soft_wrap=True)

    def refuse(self, error: RunnerLauncherError) -> None:
        """Tell why something was not done, in a sentence, or as JSON."""
        if self._as_json:
            sys.stderr.write(json.dumps(error.to_dict(), ensure_ascii=False) + "\n")
            return
        hint = f" (see: runner-launcher show {error.runner.runner_id})" if error.runner else ""
        if error.code == "unreachable":
            hint = "; RUNNER_LAUNCHER_URL says where it is, runner-launcher serve starts one"
        self._err.print(Text(f"runner-launcher: {_clean(str(error))}{hint}", style="red"), soft_wrap=True)

    def _id(self, runner: Runner) -> None:
        """Give a script the id; a person reads it in a sentence."""
        if not self._as_json and not self._out.is_terminal:
            self._print(runner.runner_id)
            self._out.file.flush()

    def _print(self, words: str) -> None:
        self._out.print(Text(_clean(words)), soft_wrap=True)

    def _json(self, value: object) -> None:
        sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")

    def _line(self, value: object) -> None:
        sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
        sys.stdout.flush()

    def _table(self, heads: Sequence[str], rows: Iterable[Sequence[str | Text]], *, empty: str) -> None:
        table = Table(*heads, box=None, pad_edge=False, header_style="bold")
        for column in table.columns:
            column.no_wrap, column.overflow = not self._out.is_terminal, "fold"
        table.columns[0].no_wrap = True
        for row in rows:
            table.add_row(*(cell if isinstance(cell, Text) else Text(_clean(cell)) for cell in row))
        if table.row_count:
            self._out.print(table)
        else:
            self.say(empty)

    def _record(self, record: Mapping[str, Any]) -> None:
        """Show ``key: value`` lines, without what is not known, a list an entry a line."""
        told = {key: value for key, value in record.items() if value not in (None, "", [], {}, ())}
        width = max((len(key) for key in told), default=0) + 2
        for key, value in told.items():
            for number, entry in enumerate(value if isinstance(value, list) else [value]):
                head = Text(f"{'' if number else key + ':':<{width}}", style="bold")
                self._out.print(head + (entry if isinstance(entry, Text) else Text(_short(entry))), soft_wrap=True)

    def _event(self, event: Event, *, of_all: bool) -> None:
        phases = dict.fromkeys(phase for phase in (event.from_phase, event.to_phase) if phase)
        words = (event.runner_id if of_all else None, event.type, " -> ".join(phases), event.reason, event.message)
        self._print("  ".join(filter(None, (f"{event.at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}", *words))))
        self._out.file.flush()


class _Story(logging.Handler):
    """Tells a person why the client keeps trying."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__()
        self._terminal = terminal

    @override
    def emit(self, record: logging.LogRecord) -> None:
        self._terminal.say(record.getMessage())


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = WIDE
    return console


def _clean(text: str) -> str:
    """Take out what would steer the terminal; engines and agents write messages too."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text).replace("\n", " ")


def _short(value: object) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case dict():
            return " ".join(f"{_clean(key)}={_short(each)}" for key, each in _flat(value) if each is not None)
        case list():
            return ", ".join(map(_short, value))
        case _:
            return _clean(str(value))


def _flat(value: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, each in value.items():
        if isinstance(each, dict):
            yield from _flat(each, f"{before}{key}.")
        else:
            yield f"{before}{key}", each


def _state(runner: Runner) -> Text:
    words = str(runner.state) + (f" ({runner.phase})" if runner.phase in ("queued", "stopping") else "")
    return Text(words + (" stale" if runner.stale else ""), style=STYLES.get(str(runner.state), ""))


def _pool(pool: PoolStatus) -> Sequence[str | Text]:
    switch = "on" if pool.enabled else "off"
    return (
        pool.pool_name,
        pool.type,
        Text(switch, style=STYLES[switch]),
        f"{pool.current_running}/{pool.max_concurrency}",
        str(pool.queued),
        _use(pool.cpu_usage, pool.cpu_quota),
        _use(pool.memory_usage, pool.memory_quota),
    )


def _webhook(target: Webhook) -> Sequence[str | Text]:
    state = Text(target.state, style=STYLES["on" if target.state == "ok" else "failed"])
    counts = (str(count) for count in (target.behind, target.retrying, target.parked))
    return (target.name, target.url, state, *counts, target.error or "")


def _use(used: float | None, quota: float | None) -> str:
    return f"{used or 0:g}" + (f" (quota {quota:g})" if quota is not None else "")


def _in_words(runner: Runner) -> str:
    """Say how a runner is, in words that follow its id."""
    handles = (("pid", runner.pid), ("container", (runner.container_id or "")[:12]), ("job", runner.job_name))
    where = next((f" ({noun} {value})" for noun, value in handles if value), "")
    match runner.state:
        case RunnerState.COMPLETED:
            return f"completed after {_span(runner.started_at, runner.finished_at)}"
        case RunnerState.FAILED:
            return f"failed: {runner.reason}: {runner.message}" if runner.message else f"failed: {runner.reason}"
        case _:
            return f"is {runner.phase if runner.phase == 'stopping' else runner.state}{where}"


def _clock(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%H:%M:%SZ}"


def _span(start: datetime | None, end: datetime | None) -> str:
    """Write how long it is from one time to another, in the two largest units."""
    if start is None or end is None:
        return ""
    seconds = max(0, int((end - start).total_seconds()))
    if seconds < MINUTE:
        return f"{seconds}s"
    if seconds < HOUR:
        return f"{seconds // MINUTE}m{seconds % MINUTE}s"
    if seconds < DAY:
        return f"{seconds // HOUR}h{seconds % HOUR // MINUTE}m"
    return f"{seconds // DAY}d{seconds % DAY // HOUR}h"


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    rest = b""
    async for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield line
    if rest:
        yield rest
