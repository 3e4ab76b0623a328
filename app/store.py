"""What is known of runners, durably.

Every change of a runner is conditional on the revision it was decided on, and carries its event.
"""

import contextlib
import functools
import math
import re
import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import sqlalchemy as sa
from pydantic import JsonValue, TypeAdapter
from sqlalchemy import Connection, Row

from app import postgres
from app.database import BATCH, Database, Fence, Write
from app.errors import AmbiguousId, InvalidRequest, NotFound, PoolFull, SlotBusy, Unavailable
from app.events import Change, Event
from app.launcher import LaunchSpec
from app.pools import Rate, Usage
from app.reason import Reason
from app.recent import MOST, Recent
from app.runner import LIVE as LIVE_PHASES
from app.runner import PLACED, Phase, Runner, State, admitted
from app.schema import (
    LIVE,
    events,
    history,
    idempotency_keys,
    installations,
    leases,
    pool_switches,
    runner_labels,
    runners,
    specs,
)

CANDIDATES = 5
"""How many runners are named to somebody whose short id means more than one."""

MANY = 500
"""From how many runners on sorting them takes longer than walking through all in order, to the next that is meant."""

_ID = re.compile(r"runner-[0-9a-f]{12}")
_BEGINNING = re.compile(r"runner-[0-9a-f]{1,11}")

T = TypeVar("T")

_runner = TypeAdapter(Runner)
_spec = TypeAdapter(LaunchSpec)
_event = TypeAdapter(Event)


@dataclass(frozen=True, slots=True, kw_only=True)
class Intent:
    """A launch to be recorded: the runner as it starts if there is room now, how to launch it, and who asked.

    ``refusal`` says why one more runner does not fit a pool that is used so, ``rate`` how fast they may begin there; up to
    ``queue_limit`` of those that cannot begin wait.
    """

    runner: Runner
    spec: LaunchSpec
    refusal: Callable[[Usage], str | None]
    queue_limit: int
    caller: str
    key: str | None
    request_sha256: str
    rate: Rate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which runners a list asks for; None: all. ``since`` is seconds since the epoch; ``before`` a place in the list.

    ``labels`` are pairs of key and value that a runner must have, every one of them; ``pools`` are those to look in.
    """

    state: State | None = None
    phase: Phase | None = None
    pool: str | None = None
    task_id: str | None = None
    slot_id: str | None = None
    labels: tuple[tuple[str, str], ...] = ()
    pools: Collection[str] | None = None
    since: float | None = None
    before: int | None = None
    limit: int = 100


class Store:
    """Runners, their events and specs, idempotency keys and pool switches, in one database."""

    def __init__(self, url: str, publish: Callable[[Sequence[Change]], None], replica: str | None = None) -> None:
        self._replica = replica or secrets.token_hex(6)
        self._claimed: set[str] = set()  # by this process, which may not be the first of this replica
        self._publish = publish
        self._told = 0  # the newest revision that was published; shared databases only
        self.database = Database(url, self._replica, committed=self._committed, news=self._news)
        self.shared = self.database.shared  # with other services
        # What is at hand without a look into the database; nothing where others write to it as well.
        self._recent = Recent(0 if self.shared else MOST)
        self._switches: dict[str, bool] = {}
        self._fresh: dict[str, LaunchSpec] = {}  # of launches that go on at once
        self._waiting: set[str] = set()  # the ids of all that are queued

    async def open(self) -> None:
        """Open the database, brought up to date; waits for a server that is away. Raises ConfigurationError."""
        await self.database.open(self._begin)

    async def aclose(self) -> None:
        """Finish the writes that were asked for, and close."""
        await self.database.aclose()

    def _begin(self, connection: Connection) -> None:
        self._told = _span(connection)[1]
        self._switches = _switches(connection)
        self._waiting = set(connection.execute(_ALL_QUEUED).scalars())

    def _news(self, connection: Connection) -> list[Change]:
        changes = _news(connection, self._told)
        if changes:
            self._told = changes[-1].event.revision
        return changes

    def _committed(self, changes: Sequence[Change]) -> None:
        self._recent.changed(changes)
        for change in changes:
            if change.event.to_phase is Phase.QUEUED:
                self._waiting.add(change.runner.runner_id)
            else:
                self._waiting.discard(change.runner.runner_id)
        self._publish(changes)

    async def _read(self, query: Callable[[Connection], T]) -> T:
        return await self.database.read(query)

    async def _write(self, write: Write[T], fence: Fence | None = None, touch: Callable[[Recent], None] | None = None) -> T:
        """Write under a lease; ``touch`` is what is done to runners beside their changes."""
        return await self.database.write(write, functools.partial(touch, self._recent) if touch else None, fence=fence)

    # Writes.

    async def intend(self, intent: Intent) -> tuple[Runner, bool]:
        """Record a launch with its slot and its place in the pool, or find the one this key stands for (True).

        Raises InvalidRequest (key used for another request), SlotBusy, PoolFull, Unavailable.
        """
        runner_id, begins = intent.runner.runner_id, False
        if not self.shared:
            self._fresh[runner_id] = intent.spec  # before anybody hears of it
        try:
            runner, replayed = await self._write(functools.partial(_intend, intent))
            begins = not replayed and runner.phase is Phase.STARTING
            return runner, replayed
        finally:
            if not begins:
                self._fresh.pop(runner_id, None)

    async def adopt(self, runner: Runner, at: float, fence: Fence | None = None) -> None:
        """Record a live runner that an engine holds and nobody knew of. Raises SlotBusy."""

        def write(connection: Connection, changes: list[Change]) -> None:
            _check_slot(connection, runner)
            _insert(connection, changes, runner, at=at, event_type="adopted")

        await self._write(write, fence)

    async def admit(
        self,
        runner: Runner,
        refusal: Callable[[Usage], str | None],
        now: float,
        fence: Fence | None = None,
        rate: Rate | None = None,
    ) -> float:
        """Give a queued runner a place, if there is one and nobody waits before it.

        Gives the seconds to wait until it is worth trying again: 0 when it was admitted, infinity until something changes.
        """
        return await self._write(functools.partial(_admit, runner=runner, refusal=refusal, rate=rate, now=now), fence)

    async def change(
        self,
        old: Runner,
        new: Runner,
        event: str,
        at: float,
        data: dict[str, JsonValue] | None = None,
        *,
        fence: Fence | None = None,
    ) -> Runner | None:
        """Write a change decided on ``old``; None if the runner has changed since, and then nothing is written."""
        change = functools.partial(_change, old=old, new=new, event_type=event, at=at, data=data)
        return await self._write(change, fence)

    async def beat(self, runner_id: str, at: float) -> None:
        """Note a sign of life."""

        def touched(runner: Runner) -> Runner:
            return runner if runner.phase is Phase.FINISHED else replace(runner, last_heartbeat=at)

        def write(connection: Connection, _: list[Change]) -> None:
            row = sa.update(runners).where(runners.c.runner_id == runner_id, runners.c.phase != Phase.FINISHED)
            connection.execute(row.values(last_heartbeat=at))

        await self._write(write, touch=lambda recent: recent.touch(runner_id, touched))

    async def forget_spec(self, runner_id: str, fence: Fence | None = None, log_kept_by: str | None = None) -> None:
        """Wipe a finished runner's secrets: nothing of it is left on its engine."""

        def write(connection: Connection, _: list[Change]) -> None:
            connection.execute(_WIPE_SPEC, {"id": runner_id})
            self.database.wipe()
            connection.execute(_CHANGE, {"id": runner_id, "cleaned": True, "log_kept_by": log_kept_by})

        def touch(recent: Recent) -> None:
            self._fresh.pop(runner_id, None)
            recent.touch(runner_id, lambda runner: replace(runner, cleaned=True))

        await self._write(write, fence, touch)

    async def forget(self, runner_ids: Collection[str]) -> None:
        """Forget ended runners of which nothing is left elsewhere, with their events and keys; leave any others."""

        def touch(recent: Recent) -> None:
            for runner_id in runner_ids:
                recent.drop(runner_id)

        await self._write(functools.partial(_forget, runner_ids), touch=touch)

    async def switch_pool(self, pool_name: str, *, enabled: bool) -> None:
        """Keep a pool on or off, whatever its file says."""

        def write(connection: Connection, _: list[Change]) -> None:
            connection.execute(sa.delete(pool_switches).where(pool_switches.c.pool_name == pool_name))
            connection.execute(sa.insert(pool_switches).values(pool_name=pool_name, enabled=enabled))

        def touch(_: Recent) -> None:
            self._switches[pool_name] = enabled

        await self._write(write, touch=touch)

    # What replicas that share a database tell each other.

    async def claim(self, keys: Sequence[str], node: str, url: str, seconds: float) -> tuple[dict[str, int], set[str]]:
        """Take or renew these leases as far as nobody else holds them.

        Gives the generation of each that is ours, and all that are held by anybody.
        """

        def write(connection: Connection, _: list[Change]) -> tuple[dict[str, int], set[str]]:
            held, all_held = _claim(connection, keys, seconds, self._claimed, replica=self._replica, node=node, url=url)
            self._claimed = set(held)
            return held, all_held

        return await self._write(write)

    async def release(self, word: str) -> None:
        """Let all leases of this replica run out now, and say so to the others."""

        def write(connection: Connection, _: list[Change]) -> None:
            connection.execute(sa.update(leases).where(leases.c.replica == self._replica).values(expires_at=0))
            postgres.notify(connection, word)

        await self._write(write)

    async def hint(self, text: str) -> None:
        """Tell all replicas something short, which they may miss; nothing where nobody shares this database."""
        if self.shared:
            with contextlib.suppress(Unavailable):
                await self.database.hint(text)

    def heed(self, listener: Callable[[str], None]) -> None:
        """Call this on the event loop with what replicas hint."""
        self.database.heed(listener)

    async def url_of(self, node: str) -> str | None:
        """Say where the replica of a node is, or was last, reached."""
        return await self.owner_url(f"node {node}")

    async def owner_url(self, key: str) -> str | None:
        """Say where the replica that owns a lease is, or was last, reached."""
        query = sa.select(leases.c.url).where(leases.c.key == key)
        return await self._read(lambda connection: connection.execute(query).scalar())

    async def log_kept_by(self, runner_id: str) -> str | None:
        """Name the node that kept a runner's log; None while nobody has."""
        query = sa.select(runners.c.log_kept_by).where(runners.c.runner_id == runner_id)
        return await self._read(lambda connection: connection.execute(query).scalar())

    async def installation(self, name: str) -> str:
        """Give the name that the first replica brought; that is this one's own where nobody shares the database."""

        def write(connection: Connection, _: list[Change]) -> str:
            known: str | None = connection.execute(sa.select(installations.c.name)).scalar()
            if known is None:
                connection.execute(sa.insert(installations).values(id=1, name=name))
            return known or name

        return await self._write(write) if self.shared else name

    # Reads.

    async def get(self, runner_id: str) -> Runner:
        """Give a runner. Raises NotFound."""
        if runner := self._recent.get(runner_id):
            return runner
        return await self._read(lambda connection: _get(connection, runner_id))

    async def named(self, given: str, pools: Collection[str] | None = None) -> Runner:
        """Give the runner of these pools that is meant: by its id, or by a beginning that only one id has.

        Raises NotFound, AmbiguousId.
        """
        runner = self._recent.get(given)
        if runner and (pools is None or runner.pool_name in pools):
            return runner
        return await self._read(lambda connection: _named(connection, given, pools))

    async def check_slot(self, runner: Runner) -> None:
        """Raise SlotBusy if the slot that a runner would work in, by its id or its place, has a live runner."""
        await self._read(lambda connection: _check_slot(connection, runner))

    async def spec(self, runner_id: str) -> LaunchSpec | None:
        """Give how to launch a runner; None once that is wiped."""
        if spec := self._fresh.pop(runner_id, None):
            return spec
        text = await self._read(lambda connection: connection.execute(_SPEC, {"id": runner_id}).scalar())
        return None if text is None else _spec.validate_json(text)

    async def unclean(self) -> list[str]:
        """Give the ids of all runners that still need something done."""
        query = sa.select(runners.c.runner_id).where(sa.not_(runners.c.cleaned)).order_by(runners.c.seq)
        return await self._read(lambda connection: list(connection.execute(query).scalars()))

    async def accepted(self, engine: str | None = None) -> list[Runner]:
        """Give all live runners that an engine, or any, has accepted."""
        query = _whole().where(LIVE, runners.c.phase.in_(PLACED))

        def read(connection: Connection) -> list[Runner]:
            found = map(_load, connection.execute(query))  # in this thread, for they may be many
            return [runner for runner in found if runner.accepted and engine in (None, runner.engine)]

        return await self._read(read)

    async def next_in_line(self, pool_name: str, home: str | None = None) -> str | None:
        """Give the id of the runner that waits longest for a place in a pool, of those bound to this node or to none."""
        if not (self._waiting or self.shared):  # as every end asks
            return None
        return await self._read(lambda connection: _next_in_line(connection, pool_name, home))

    async def known(self, runner_ids: Sequence[str]) -> dict[str, bool]:
        """Say which of these are on record, and whether they are done with: ended, and nothing left of them."""
        rows = []
        for first in range(0, len(runner_ids), BATCH):
            some = runners.c.runner_id.in_(runner_ids[first : first + BATCH])
            query = sa.select(runners.c.runner_id, runners.c.cleaned).where(some)
            rows += await self._read(lambda connection, query=query: connection.execute(query).all())  # type: ignore[misc]
        return {row.runner_id: row.cleaned for row in rows}

    async def replayed(self, caller: str, key: str, request_sha256: str) -> Runner | None:
        """Give the runner that this key of this caller stands for. Raises InvalidRequest if for another request."""
        return await self._read(lambda connection: _replayed(connection, caller, key, request_sha256))

    async def page(self, wanted: Filter) -> tuple[list[Runner], int | None]:
        """Give runners, newest first, and the place where the next page begins if there may be one."""
        return await self._read(lambda connection: _page(connection, wanted))

    async def history(self, runner_id: str) -> list[Event]:
        """Give a runner's events, the first one first."""
        query = sa.select(events.c.revision, events.c.body).where(events.c.runner_id == runner_id)
        rows = await self._read(lambda connection: connection.execute(query.order_by(events.c.revision)).all())
        return [_event_of(row) for row in rows]

    async def span(self) -> tuple[int, int]:
        """Give the revision from which on all events are kept, and the newest there is; (1, 0) if there are none.

        Of what lies before, only the events of runners that are still known are kept.
        """
        return await self._read(_span)

    async def events(self, after: int, limit: int) -> list[tuple[Event, str, str]]:
        """Give the next events of all runners behind a revision, each with its runner's task_id and pool_name."""
        columns = (events.c.revision, events.c.body, runners.c.task_id, runners.c.pool_name)
        query = sa.select(*columns).join(runners, runners.c.runner_id == events.c.runner_id)
        query = query.where(events.c.revision > after).order_by(events.c.revision).limit(limit)
        rows = await self._read(lambda connection: connection.execute(query).all())
        return [(_event_of(row), row.task_id, row.pool_name) for row in rows]

    async def outdated(
        self, ended_before: float | None, keep: int | None, *, fresh: float, told: int | None, after: int, limit: int
    ) -> tuple[list[str], int | None]:
        """Give ended runners of which nothing is left elsewhere: those ended before then, and all but the newest so many.

        Of the latter, none that ended since ``fresh``; of both, none that changed after the revision ``told``. The oldest
        launches come first. ``after`` is a place among them; gives the place to go on from, None at the end.
        """
        return await self._read(
            lambda connection: _outdated(connection, ended_before, keep, fresh=fresh, told=told, after=after, limit=limit)
        )

    async def usage(self) -> dict[str, Usage]:
        """Give what is in use, by pool; a pool that is not named has nothing in use."""
        query = _sums().add_columns(runners.c.pool_name).where(runners.c.phase.in_(PLACED)).group_by(runners.c.pool_name)
        rows = await self._read(lambda connection: connection.execute(query).all())
        return {row.pool_name: _usage_of([row]) for row in rows}

    async def queue_lengths(self) -> dict[str, int]:
        """Give how many launches wait, by pool; a pool that is not named has none."""
        query = sa.select(runners.c.pool_name, sa.func.count().label("waiting")).where(LIVE, runners.c.phase == Phase.QUEUED)
        rows = await self._read(lambda connection: connection.execute(query.group_by(runners.c.pool_name)).all())
        return {row.pool_name: row.waiting for row in rows}

    async def pool_switches(self) -> dict[str, bool]:
        """Give the pools that were switched by hand."""
        return await self._read(_switches) if self.shared else self._switches.copy()


# What happens inside a transaction.


def _intend(intent: Intent, connection: Connection, changes: list[Change]) -> tuple[Runner, bool]:
    if intent.key and (known := _replayed(connection, intent.caller, intent.key, intent.request_sha256)):
        return known, True
    runner = intent.runner
    _check_slot(connection, runner)
    usage, waiting = _pool_use(connection, runner.pool_name)
    why_not = intent.refusal(usage)
    turn = _turn(connection, runner.pool_name, intent.rate, runner.created_at)
    if turn and not why_not:
        why_not = f"pool {runner.pool_name} begins no launch in the next {turn:.1f} s, as its launch_rate has it"
    if why_not or waiting:
        if waiting >= intent.queue_limit:
            raise PoolFull(why_not or f"{waiting} launches wait for pool {runner.pool_name} already", retry_after=turn)
        runner = replace(runner, phase=Phase.QUEUED, calls=0, placed_at=None)
    message = why_not if runner.phase is Phase.QUEUED else None
    runner = _insert(connection, changes, runner, at=runner.created_at, event_type="accepted", message=message)
    spec = _spec.dump_json(intent.spec).decode()
    connection.execute(_INSERT_SPEC, {"runner_id": runner.runner_id, "spec": spec})
    if intent.key:
        row = {"caller": intent.caller, "key": intent.key, "request_sha256": intent.request_sha256}
        connection.execute(_INSERT_KEY, {**row, "runner_id": runner.runner_id})
    return runner, False


def _insert(
    connection: Connection,
    changes: list[Change],
    runner: Runner,
    *,
    at: float,
    event_type: str,
    message: str | None = None,
) -> Runner:
    event = Event(
        runner_id=runner.runner_id, at=at, type=event_type, from_phase=None, to_phase=runner.phase, message=message
    )
    event = _append(connection, event)
    runner = replace(runner, revision=event.revision)
    key = connection.execute(_INSERT_RUNNER, _columns(runner)).inserted_primary_key
    if runner.labels and key:
        rows = [{"key": name, "value": value, "seq": key[0]} for name, value in runner.labels.items()]
        connection.execute(_INSERT_LABEL, rows)
    changes.append(Change(runner, event))
    return runner


def _check_slot(connection: Connection, runner: Runner) -> None:
    """Raise SlotBusy if the slot, by its id or its place, has a live runner."""
    row = connection.execute(_HOLDER, {"slot": runner.slot_id, "place": runner.slot_place}).first()
    if row:
        holder = _load(row)
        raise SlotBusy(f"slot {runner.slot_id} is held by {holder.runner_id}, which is {holder.phase}", holder)


def _turn(connection: Connection, pool_name: str, rate: Rate | None, now: float) -> float:
    """Say in how many seconds one more launch of a pool may begin.

    What began further in the future than the rate reaches, by a clock that was set back since, counts for nothing.
    """
    if rate is None:
        return 0
    newest = sa.select(runners.c.placed_at).where(
        runners.c.pool_name == pool_name, runners.c.placed_at > now - rate.seconds, runners.c.placed_at < now + rate.seconds
    )
    earliest = connection.execute(newest.order_by(runners.c.placed_at.desc()).offset(rate.launches - 1).limit(1)).scalar()
    return 0 if earliest is None else max(0.0, earliest + rate.seconds - now)


def _next_in_line(connection: Connection, pool_name: str, home: str | None) -> str | None:
    """Name who is next. Each node has a line of its own: whoever waits for one that is away holds up no other."""
    first: str | None = connection.execute(_NEXT_IN_LINE, {"pool": pool_name, "home": home}).scalar()
    return first


def _admit(
    connection: Connection,
    changes: list[Change],
    *,
    runner: Runner,
    refusal: Callable[[Usage], str | None],
    rate: Rate | None,
    now: float,
) -> float:
    if _next_in_line(connection, runner.pool_name, runner.home) != runner.runner_id:
        return math.inf
    if refusal(_pool_use(connection, runner.pool_name)[0]):
        return math.inf
    if turn := _turn(connection, runner.pool_name, rate, now):
        return turn
    changed = _change(connection, changes, old=runner, new=admitted(runner, now), event_type="admitted", at=now)
    return 0 if changed else math.inf


def _change(
    connection: Connection,
    changes: list[Change],
    *,
    old: Runner,
    new: Runner,
    event_type: str,
    at: float,
    data: dict[str, JsonValue] | None = None,
) -> Runner | None:
    current = connection.execute(_CURRENT, {"id": old.runner_id}).first()
    if current is None or current.revision != old.revision:
        return None
    silent = new.stop is not old.stop and new.stop is not None and new.stop.reason is Reason.HEARTBEAT_LOST
    if silent and current.last_heartbeat != old.last_heartbeat:
        return None  # it was heard of while its silence was judged
    stop = None if new.phase is Phase.FINISHED else new.stop  # it may have ended by itself before
    event = Event(
        runner_id=old.runner_id,
        at=at,
        type=event_type,
        from_phase=old.phase,
        to_phase=new.phase,
        reason=new.reason or (stop.reason if stop else None),
        message=new.message or (stop.message if stop else None),
        data=data or {},
    )
    event = _append(connection, event)
    new = replace(new, revision=event.revision, last_heartbeat=current.last_heartbeat, cleaned=current.cleaned)
    columns = _columns(new)
    del columns["last_heartbeat"], columns["cleaned"]  # written by themselves, and not to be undone
    if connection.execute(_CHANGE_FROM, {"id": old.runner_id, "was": old.revision, **columns}).rowcount != 1:
        raise RuntimeError(f"{old.runner_id} changed inside a transaction that had read it")
    changes.append(Change(new, event))
    return new


def _claim(
    connection: Connection, keys: Sequence[str], seconds: float, claimed: Collection[str], **owner: str
) -> tuple[dict[str, int], set[str]]:
    """Take leases that ran out or are ours; the generation rises unless it is this process that renews."""
    now = float(connection.exec_driver_sql("SELECT extract(epoch FROM clock_timestamp())").scalar_one())
    known = {row.key: row for row in connection.execute(sa.select(leases))}
    # One that lasts longer than any was written by a clock that has been set back since: nobody may be there to renew it.
    lasting = {key for key, row in known.items() if now < row.expires_at <= now + 2 * seconds}
    held = {}
    for key in keys:
        row = known.get(key)
        ours = row is not None and row.replica == owner["replica"]
        if not ours and key in lasting:
            continue
        held[key] = row.generation + (not (ours and key in claimed)) if row else 1
        facts = {"generation": held[key], "expires_at": now + seconds, **owner}
        if row:
            connection.execute(sa.update(leases).where(leases.c.key == key).values(facts))
        else:
            connection.execute(sa.insert(leases).values(key=key, **facts))
    return held, lasting | set(held)


def _span(connection: Connection) -> tuple[int, int]:
    forgotten = connection.execute(sa.select(history.c.forgotten).where(history.c.id == 1)).scalar_one()
    newest = connection.execute(sa.select(sa.func.max(events.c.revision))).scalar()
    return forgotten + 1, max(forgotten, newest or 0)


def _news(connection: Connection, after: int) -> list[Change]:
    """Read the next changes behind a revision, each with its runner as it now is."""
    columns = (runners.c.body, runners.c.revision, runners.c.last_heartbeat, runners.c.cleaned)
    query = sa.select(*columns, events.c.revision.label("event_revision"), events.c.body.label("event"))
    query = query.join(events, runners.c.runner_id == events.c.runner_id)
    rows = connection.execute(query.where(events.c.revision > after).order_by(events.c.revision).limit(BATCH)).all()
    return [Change(_load(row), replace(_event.validate_json(row.event), revision=row.event_revision)) for row in rows]


def _outdated(
    connection: Connection,
    ended_before: float | None,
    keep: int | None,
    *,
    fresh: float,
    told: int | None,
    after: int,
    limit: int,
) -> tuple[list[str], int | None]:
    newest_first = sa.select(runners.c.seq, runners.c.created_at).order_by(runners.c.created_at.desc()).limit(1)
    by_number = None if keep is None else connection.execute(newest_first.offset(keep)).first()
    by_age = None
    if ended_before is not None:  # it was launched before it ended
        by_age = connection.execute(newest_first.where(runners.c.created_at < ended_before)).first()
    # Up to which place a bound can reach; who was adopted came later than those launched after it.
    reach = max((bound.seq for bound in (by_number, by_age) if bound), default=0)
    told_at = events.c.at.label("told_at")  # an end may be told long after it came
    query = _whole().add_columns(runners.c.seq, told_at).join(events, events.c.revision == runners.c.revision)
    query = query.where(runners.c.phase == Phase.FINISHED, runners.c.cleaned)
    query = query.where(runners.c.seq > after, runners.c.seq <= reach)
    if told is not None:
        query = query.where(runners.c.revision <= told)
    rows = connection.execute(query.order_by(runners.c.seq).limit(limit)).all()
    found = []
    for row in rows:
        runner = _load(row)
        too_many = by_number is not None and runner.created_at <= by_number.created_at and row.told_at < fresh
        too_old = ended_before is not None and row.told_at < ended_before
        if too_many or too_old:
            found.append(runner.runner_id)
    return found, rows[-1].seq if len(rows) == limit else None


def _forget(runner_ids: Collection[str], connection: Connection, _: list[Change]) -> None:
    done = sa.and_(runners.c.runner_id.in_(runner_ids), runners.c.phase == Phase.FINISHED, runners.c.cleaned)
    rows = connection.execute(sa.select(runners.c.seq, runners.c.runner_id).where(done)).all()
    if not rows:
        return
    names = [row.runner_id for row in rows]
    newest = connection.execute(sa.select(sa.func.max(events.c.revision)).where(events.c.runner_id.in_(names))).scalar()
    connection.execute(sa.update(history).where(history.c.id == 1, history.c.forgotten < newest).values(forgotten=newest))
    connection.execute(sa.delete(runner_labels).where(runner_labels.c.seq.in_([row.seq for row in rows])))
    for table in (events, idempotency_keys, specs, runners):
        connection.execute(sa.delete(table).where(table.c.runner_id.in_(names)))


def _append(connection: Connection, event: Event) -> Event:
    row = {"runner_id": event.runner_id, "at": event.at, "body": _event.dump_json(event).decode()}
    key = connection.execute(_INSERT_EVENT, row).inserted_primary_key
    return replace(event, revision=key[0]) if key else event


def _replayed(connection: Connection, caller: str, key: str, request_sha256: str) -> Runner | None:
    row = connection.execute(_BY_KEY, {"of": caller, "named": key}).first()
    if row is None:
        return None
    if row.request_sha256 != request_sha256:
        raise InvalidRequest("this Idempotency-Key was used for another request", code="idempotency-key-reused")
    return _get(connection, row.runner_id)


def _get(connection: Connection, runner_id: str) -> Runner:
    row = connection.execute(_BY_ID, {"id": runner_id}).first()
    if row is None:
        raise NotFound(f"no runner {runner_id}")
    return _load(row)


def _named(connection: Connection, given: str, pools: Collection[str] | None) -> Runner:
    runner = _meant(connection, given, pools)
    if pools is not None and runner.pool_name not in pools:
        raise NotFound(f"no runner {given}")
    return runner


def _meant(connection: Connection, given: str, pools: Collection[str] | None) -> Runner:
    beginning = f"runner-{given.removeprefix('runner-')}"
    if "\0" in given:  # which no id has, and PostgreSQL does not look for
        raise NotFound(f"no runner {given!r}")
    if not _BEGINNING.fullmatch(beginning):
        return _get(connection, beginning if _ID.fullmatch(beginning) else given)
    begins_so = (runners.c.runner_id >= beginning) & (runners.c.runner_id < beginning + "g")  # by the index, unlike LIKE
    query = sa.select(runners.c.runner_id).where(begins_so).order_by(runners.c.runner_id).limit(CANDIDATES + 1)
    if pools is not None:
        query = query.where(runners.c.pool_name.in_(pools))
    found = list(connection.execute(query).scalars())
    if len(found) > 1:
        some = ", ".join(found[:CANDIDATES]) + (", ..." if len(found) > CANDIDATES else "")
        raise AmbiguousId(f"{given} is the beginning of more than one id: {some}")
    return _get(connection, found[0] if found else given)


def _page(connection: Connection, wanted: Filter) -> tuple[list[Runner], int | None]:
    labels = [(runner_labels.alias(), *pair) for pair in wanted.labels]
    seq = labels[0][0].c.seq if labels else runners.c.seq  # SQLite walks through the index whose column is named here
    query = _whole().add_columns(runners.c.seq).order_by(seq.desc()).limit(wanted.limit + 1)
    for label, key, text in labels:
        query = query.join(label, label.c.seq == runners.c.seq).where(label.c.key == key, label.c.value == text)
    for column, value in {
        runners.c.state: wanted.state,
        runners.c.phase: wanted.phase,
        runners.c.pool_name: wanted.pool,
        runners.c.task_id: wanted.task_id,
        runners.c.slot_id: wanted.slot_id,
    }.items():
        if value is not None:
            query = query.where(column == value)
    if wanted.phase in LIVE_PHASES:
        query = query.where(LIVE)
    few = wanted.phase in LIVE_PHASES
    if wanted.since is not None:
        late = runners.c.created_at >= wanted.since
        query, few = query.where(late), few or not _many(connection, late)
    if few:  # by an index, and sorted: else SQLite walks through all runners in order
        query = query.order_by(None).order_by((runners.c.seq + 0).desc())
    if wanted.before is not None:
        query = query.where(seq < wanted.before)
    # A page of each pool, for there is an index that has one pool's in order.
    queries = [query] if wanted.pools is None else [query.where(runners.c.pool_name == name) for name in wanted.pools]
    rows = [row for query in queries for row in connection.execute(query)]
    rows.sort(key=lambda row: row.seq, reverse=True)
    page = rows[: wanted.limit]
    return [_load(row) for row in page], page[-1].seq if len(rows) > wanted.limit else None


def _many(connection: Connection, condition: sa.ColumnElement[bool]) -> bool:
    return connection.execute(sa.select(runners.c.seq).where(condition).offset(MANY).limit(1)).first() is not None


def _sums() -> sa.Select[Any]:
    """Sum up live runners, all of it by an index that holds what is summed up."""
    return sa.select(
        sa.func.count().label("runners"),
        sa.func.coalesce(sa.func.sum(runners.c.cpu), 0.0).label("cpu"),
        sa.func.coalesce(sa.func.sum(runners.c.memory_mib), 0).label("memory_mib"),
        sa.func.count().filter(runners.c.state == State.PENDING).label("launching"),
    ).where(LIVE)


def _usage_of(rows: Sequence[Row[Any]]) -> Usage:
    return Usage(
        runners=sum(row.runners for row in rows),
        cpu=sum(row.cpu for row in rows),
        memory_mib=sum(int(row.memory_mib) for row in rows),  # PostgreSQL sums to a decimal
        launching=sum(row.launching for row in rows),
    )


def _pool_use(connection: Connection, pool_name: str) -> tuple[Usage, int]:
    """Say what is in use in a pool, and how many wait for a place there."""
    rows = connection.execute(_POOL_SUMS, {"pool": pool_name}).all()
    waiting = sum(row.runners for row in rows if row.phase == Phase.QUEUED)
    return _usage_of([row for row in rows if row.phase != Phase.QUEUED]), waiting


def _switches(connection: Connection) -> dict[str, bool]:
    return {row.pool_name: row.enabled for row in connection.execute(_SWITCHES)}


def _whole() -> sa.Select[Any]:
    return sa.select(runners.c.body, runners.c.revision, runners.c.last_heartbeat, runners.c.cleaned)


# What every launch asks and writes is built once: building a statement takes longer than running it.

_OF_ID = runners.c.runner_id == sa.bindparam("id")
_OF_POOL = runners.c.pool_name == sa.bindparam("pool")
_BY_ID = _whole().where(_OF_ID)
_CURRENT = sa.select(runners.c.revision, runners.c.last_heartbeat, runners.c.cleaned).where(_OF_ID)
_HOLDER = sa.union_all(  # with OR SQLite would look through all live runners
    _whole().where(runners.c.slot_id == sa.bindparam("slot"), LIVE),
    _whole().where(runners.c.slot_place == sa.bindparam("place"), LIVE),
).limit(1)
_POOL_SUMS = _sums().add_columns(runners.c.phase).where(_OF_POOL).group_by(runners.c.phase)
_ALL_QUEUED = sa.select(runners.c.runner_id).where(LIVE, runners.c.phase == Phase.QUEUED)
_NEXT_IN_LINE = (
    sa.select(runners.c.runner_id)
    .where(LIVE, _OF_POOL, runners.c.phase == Phase.QUEUED)
    .where(runners.c.home.is_(None) | (runners.c.home == sa.bindparam("home")))
    .order_by(runners.c.seq)
    .limit(1)
)
_SWITCHES = sa.select(pool_switches.c.pool_name, pool_switches.c.enabled)
_SPEC = sa.select(specs.c.spec).where(specs.c.runner_id == sa.bindparam("id"))
_BY_KEY = sa.select(idempotency_keys.c.request_sha256, idempotency_keys.c.runner_id).where(
    idempotency_keys.c.caller == sa.bindparam("of"), idempotency_keys.c.key == sa.bindparam("named")
)
_INSERT_RUNNER, _INSERT_SPEC, _INSERT_EVENT = sa.insert(runners), sa.insert(specs), sa.insert(events)
_INSERT_KEY, _INSERT_LABEL = sa.insert(idempotency_keys), sa.insert(runner_labels)
_CHANGE = sa.update(runners).where(_OF_ID)
_CHANGE_FROM = _CHANGE.where(runners.c.revision == sa.bindparam("was"))
_WIPE_SPEC = sa.delete(specs).where(specs.c.runner_id == sa.bindparam("id"))


def _load(row: Any) -> Runner:  # noqa: ANN401 - a row with these four and more
    runner = _runner.validate_json(row.body)
    return replace(runner, revision=row.revision, last_heartbeat=row.last_heartbeat, cleaned=row.cleaned)


def _event_of(row: Any) -> Event:  # noqa: ANN401 - a row with these two and more
    return replace(_event.validate_json(row.body), revision=row.revision)


def _columns(runner: Runner) -> dict[str, Any]:
    return {
        "runner_id": runner.runner_id,
        "revision": runner.revision,
        "phase": runner.phase,
        "state": runner.state,
        "pool_name": runner.pool_name,
        "task_id": runner.task_id,
        "slot_id": runner.slot_id,
        "slot_place": runner.slot_place,
        "created_at": runner.created_at,
        "cpu": runner.cpu,
        "memory_mib": runner.memory_mib,
        "placed_at": runner.placed_at,
        "home": runner.home,
        "last_heartbeat": runner.last_heartbeat,
        "cleaned": runner.cleaned,
        "body": _runner.dump_json(runner).decode(),
    }
