"""A database with one writer: SQLite of our own, or PostgreSQL that other services write to as well.

All writes go through one thread with one connection, which takes whatever waits and commits it together: one disk flush for
many writes. A write is a function of that connection, inside its own savepoint where it is not alone; its caller gets its
result, or its exception, after the commit. Changes are told after the commit too, in the order of their revisions. Because a
caller that goes away cannot recall a write, nothing here depends on it staying.
"""

import asyncio
import contextlib
import functools
import logging
import queue
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError
from sqlalchemy.pool import QueuePool

from app import postgres
from app.errors import ConfigurationError, InvalidRequest, NotOwner, Unavailable
from app.events import Change
from app.schema import HEAD, leases, replicas

log = logging.getLogger(__name__)

BATCH = 500
READERS = 2
IDLE_SECONDS = 0.5
PATIENCE_SECONDS = 10.0
"""How long a write waits for a database that is restarted."""

START_SECONDS = 2.0
"""How often a database that is away at the start is tried."""

T = TypeVar("T")
Write = Callable[[Connection, list[Change]], T]

_GENERATION = sa.select(leases.c.generation).where(leases.c.key == sa.bindparam("lease"))


@dataclass(frozen=True, slots=True)
class Fence:
    """The lease that a write is made under; it is refused once somebody else has taken the lease."""

    key: str
    generation: int


class Database:
    """Reads and writes in threads, for an event loop that must not wait.

    ``committed`` is called on the loop with the changes of every commit. Where others write as well (``shared``), these are
    what ``news`` finds: it gives up to ``BATCH`` changes that it has not given before.
    """

    def __init__(
        self,
        url: str,
        replica: str,
        *,
        committed: Callable[[Sequence[Change]], None],
        news: Callable[[Connection], Sequence[Change]],
    ) -> None:
        self._replica = replica
        self._tell_committed = committed
        self._news = news
        self._closed = False
        self._ended = threading.Event()
        self._heeding: list[Callable[[str], None]] = []
        self._telling = threading.Lock()
        try:
            self._url = sa.make_url(url)
        except ArgumentError:  # whose text may hold a password
            raise ConfigurationError("RUNNER_LAUNCHER_DATABASE_URL: not a database URL, such as sqlite:////PATH") from None
        self._shown = repr(self._url.difference_update_query(("password", "sslpassword")))
        self.shared = self._url.get_backend_name() == "postgresql"  # with other services
        self._writes: queue.SimpleQueue[_Pending | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_all, name="store writer", daemon=True)
        self._scrub_due = True  # also by an earlier service, which may have been killed
        self._readers = ThreadPoolExecutor(READERS, "store reader")
        self._follower = threading.Thread(target=self._follow, name="store follower", daemon=True)

    async def open(self, begin: Callable[[Connection], None]) -> None:
        """Open the database, brought up to date; waits for a server that is away. Raises ConfigurationError.

        ``begin`` is called, in a thread, before anything is written or told.
        """
        self._loop = asyncio.get_running_loop()
        while True:
            try:
                await asyncio.to_thread(self._open, begin)
            except (OSError, DBAPIError) as error:
                reason = error.orig if isinstance(error, DBAPIError) else error
                if not self.shared or not postgres.passes(error):
                    text = f"RUNNER_LAUNCHER_DATABASE_URL: {self._shown} cannot be used: {reason}"
                    raise ConfigurationError(text) from error
                log.warning("waiting for the database %s: %s", self._shown, reason)
                await asyncio.sleep(START_SECONDS)
            else:
                break
        self._writer.start()
        if self.shared:
            self._follower.start()

    def _open(self, begin: Callable[[Connection], None]) -> None:
        if self.shared:
            self._open_shared()
        else:
            self._open_own()
        _migrate(self._write_engine)
        with self._read_engine.connect() as connection:
            begin(connection)

    def _open_own(self) -> None:
        path = self._url.database
        if self._url.get_backend_name() != "sqlite" or not path or path == ":memory:":
            text = f"only sqlite:///PATH and postgresql://HOST/NAME are understood, not {self._shown}"
            raise ConfigurationError(f"RUNNER_LAUNCHER_DATABASE_URL: {text}")
        Path(path).touch(mode=0o600)
        self._write_engine = _sqlite(self._url, readers=0)
        self._read_engine = _sqlite(self._url, readers=READERS)

    def _open_shared(self) -> None:
        if not hasattr(self, "_write_engine"):
            self._write_engine = postgres.open_engine(self._url, 1, writes=True)
            self._read_engine = postgres.open_engine(self._url, READERS + 2, writes=False)  # two for the follower
        self._scrub_due = False  # the server sees to what it deleted

    async def aclose(self) -> None:
        """Finish the writes that were asked for, and close."""
        self._closed = True
        if self._writer.is_alive():
            self._writes.put(None)
            await asyncio.to_thread(self._writer.join)
        if self._follower.is_alive():
            self._ended.set()
            await asyncio.to_thread(self._end_follower)
        await asyncio.to_thread(self._readers.shutdown)
        for name in ("_write_engine", "_read_engine"):
            if engine := getattr(self, name, None):
                await asyncio.to_thread(engine.dispose)  # the last to close writes the log back

    async def read(self, query: Callable[[Connection], T]) -> T:
        """Ask something. Raises Unavailable, InvalidRequest for what no column can hold, and what the query raises."""

        def read() -> T:
            with self._read_engine.connect() as connection:
                return query(connection)

        def read_again() -> T:
            try:
                return read()
            except DBAPIError as error:
                if not error.connection_invalidated:
                    raise
            return read()  # the server was restarted since this connection was last used

        try:
            async with asyncio.timeout(PATIENCE_SECONDS if self.shared else None):
                return await self._loop.run_in_executor(self._readers, read_again if self.shared else read)
        except TimeoutError:
            text = f"the store does not answer within {PATIENCE_SECONDS:g} s"
            raise Unavailable(text, code="store-unavailable") from None
        except DBAPIError as error:
            if _unfit(error):
                raise InvalidRequest(f"this cannot be looked for: {error.orig}") from error
            raise Unavailable(f"the store cannot be read: {error.orig}", code="store-unavailable") from error

    async def write(self, write: Write[T], touch: Callable[[], None] | None = None, *, fence: Fence | None = None) -> T:
        """Write something under a lease; once it is committed ``touch`` is called.

        Raises Unavailable, NotOwner where the lease is somebody else's, InvalidRequest for what no column can hold, and what
        the write raises.
        """
        if self._closed:
            raise Unavailable("the store is closed", code="store-unavailable")
        if fence:
            write = functools.partial(_fenced, fence, write)
        future: asyncio.Future[T] = self._loop.create_future()
        self._writes.put(_Pending(write, future, touch))
        return await future  # if nobody waits for it any more, it is written all the same

    def wipe(self) -> None:
        """Have what a write deletes wiped from the log of past writes too; a server sees to that by itself."""
        self._scrub_due = not self.shared

    async def hint(self, text: str) -> None:
        """Tell all who share this database something short, which they may miss."""
        await self.write(lambda connection, _: postgres.notify(connection, text))

    def heed(self, listener: Callable[[str], None]) -> None:
        """Call this on the event loop with what others, and we, hint."""
        self._heeding.append(listener)

    # The threads.

    def _write_all(self) -> None:
        while first := self._next():
            batch, last = [first], False
            while len(batch) < BATCH and not last:
                with contextlib.suppress(queue.Empty):
                    more = self._writes.get_nowait()
                    if more is not None:
                        batch.append(more)
                        continue
                    self._writes.put(None)  # closing: this batch, then the end
                last = True
            self._commit(batch)

    def _next(self) -> "_Pending | None":
        """Wait for a write; once there is none for a while, wipe what is left in the log of past ones."""
        while self._scrub_due:
            with contextlib.suppress(queue.Empty):
                return self._writes.get(timeout=IDLE_SECONDS)
            self._scrub_due = False  # first, for there may be more to wipe meanwhile
            if not self._scrub():
                self._scrub_due = True
        return self._writes.get()

    def _scrub(self) -> bool:
        """Empty the write-ahead log, which holds what was deleted from the tables; says whether no reader was in the way."""
        with contextlib.suppress(DBAPIError, sqlite3.Error), contextlib.closing(self._write_engine.raw_connection()) as raw:
            return raw.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0  # type: ignore[no-any-return]
        return False

    def _commit(self, batch: list["_Pending"]) -> None:
        changes: list[Change] = []
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                changes = self._transact(batch, deadline)
            except DBAPIError as error:
                if self.shared and postgres.passes(error) and time.monotonic() < deadline:
                    time.sleep(postgres.RECONNECT_SECONDS)
                    continue  # nothing of it was committed
                log.exception("the store refused a write")
                for pending in batch:
                    pending.error = Unavailable(f"the store refused the write: {error.orig}", code="store-unavailable")
            break
        if self.shared:
            changes = []  # told with those of others, in their order
            self._tell()
        self._loop.call_soon_threadsafe(self._resolve, batch, changes)

    def _transact(self, batch: list["_Pending"], deadline: float) -> list[Change]:
        """Commit a batch; an error says that nothing of it is committed, or after the deadline that nobody knows."""
        changes: list[Change] = []
        with self._write_engine.connect() as connection:
            transaction = connection.begin()
            if len(batch) == 1:
                batch[0].run(connection, changes)
                if batch[0].error:
                    return changes  # and nothing else is to be committed
            else:
                for pending in batch:
                    pending.run_apart(connection, changes)
            if not self.shared:
                transaction.commit()
                return changes
            name = secrets.token_hex(8)
            _name_batch(connection, self._replica, name)
            postgres.notify(connection)
            try:
                transaction.commit()
            except DBAPIError:
                connection.invalidate()
                if not self._committed(name, deadline):
                    raise
        return changes

    def _committed(self, name: str, deadline: float) -> bool:
        """Find out what became of a batch whose commit was not answered. Raises DBAPIError if nobody can say in time.

        Reading waits for the lock of writers, so the transaction is over by then: it held the lock.
        """
        query = sa.select(replicas.c.last_batch).where(replicas.c.replica == self._replica)
        while True:
            try:
                with self._write_engine.connect() as connection:
                    return connection.execute(query).scalar() == name
            except DBAPIError as error:
                if not postgres.passes(error) or time.monotonic() > deadline:
                    raise
                time.sleep(postgres.RECONNECT_SECONDS)

    # News of a database that others write to as well.

    def _end_follower(self) -> None:
        with contextlib.suppress(DBAPIError), self._write_engine.begin() as connection:
            postgres.notify(connection)  # it need not wait for its next look
        self._follower.join()

    def _follow(self) -> None:
        postgres.follow(self._read_engine, self._hear, self._ended)

    def _hear(self, text: str) -> None:
        self._tell()
        for listener in self._heeding if text else ():
            self._loop.call_soon_threadsafe(listener, text)

    def _tell(self) -> None:
        """Tell what was committed, by whomever, since this was last done; a database that is away is asked later."""
        with self._telling, contextlib.suppress(DBAPIError):
            while True:
                with self._read_engine.connect() as connection:
                    try:
                        changes = self._news(connection)
                    except ValueError:  # of a newer version; whoever writes must not end for it
                        log.exception("the database tells what this version cannot read")
                        return
                if changes:
                    self._loop.call_soon_threadsafe(self._tell_committed, changes)
                if len(changes) < BATCH:
                    return

    def _resolve(self, batch: list["_Pending"], changes: list[Change]) -> None:
        try:
            self._tell_committed(changes)
        finally:  # whatever a listener does, those who wait are answered
            for pending in batch:
                pending.resolve()


def _unfit(error: DBAPIError) -> bool:
    """Whether a statement was refused for what it holds: a zero byte, or a text too long for an index of PostgreSQL's."""
    at_index = getattr(getattr(error.orig, "diag", None), "source_function", None) or ""
    return isinstance(error, DataError) or at_index.startswith(("_bt_", "index_"))


@dataclass(slots=True, eq=False)
class _Pending:
    """A write that waits for its commit; ``touch`` is called after it."""

    write: Write[Any]
    future: asyncio.Future[Any]
    touch: Callable[[], None] | None = None
    result: Any = None
    error: Exception | None = None

    def run(self, connection: Connection, changes: list[Change]) -> None:
        """Write, in a transaction that is not to be committed if there is an error then."""
        made: list[Change] = []
        self.error = None
        try:
            self.result = self.write(connection, made)
        except IntegrityError as error:
            self.error = error
        except DBAPIError as error:
            if not _unfit(error):  # this write's own fault; any other error fails the whole batch
                raise
            self.error = InvalidRequest(f"the store cannot hold this: {error.orig}")
            self.error.__cause__ = error
        except Exception as error:  # noqa: BLE001 - handed to the caller as it is
            self.error = error
        else:
            changes += made

    def run_apart(self, connection: Connection, changes: list[Change]) -> None:
        """Write, in a transaction that others write in as well."""
        connection.exec_driver_sql("SAVEPOINT apart")  # SQLAlchemy's own take five times as long
        self.run(connection, changes)
        if self.error:
            connection.exec_driver_sql("ROLLBACK TO apart")
        connection.exec_driver_sql("RELEASE apart")

    def resolve(self) -> None:
        if self.touch and not self.error:
            self.touch()
        if self.future.done():
            return
        if self.error:
            self.future.set_exception(self.error)
            self.future.exception()  # the caller may be gone
        else:
            self.future.set_result(self.result)


def _sqlite(url: sa.URL, readers: int) -> Engine:
    """Open one database for its one writer, or for a number of readers.

    Exactly one connection writes and checkpoints: SQLite before 3.51.3 can corrupt a database that two write to.
    """
    engine = sa.create_engine(
        url.set(drivername="sqlite+pysqlite"),
        poolclass=QueuePool,
        pool_size=readers or 1,
        max_overflow=0,
        hide_parameters=True,  # a refused write must not put secrets into our log
        connect_args={"check_same_thread": False, "timeout": 5},
    )
    mode = (
        "PRAGMA query_only=1; PRAGMA wal_autocheckpoint=0"
        if readers
        else "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA secure_delete=1"
    )

    @sa.event.listens_for(engine, "connect")
    def connect(connection: Any, _: object) -> None:  # noqa: ANN401 - a driver's connection
        connection.isolation_level = None  # we begin transactions, not the driver
        connection.executescript(f"PRAGMA busy_timeout=5000; {mode};")

    if not readers:

        @sa.event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _migrate(engine: Engine) -> None:
    """Bring the tables up to date."""
    with engine.begin() as connection:
        version = None
        if sa.inspect(connection).has_table("alembic_version"):
            version = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
        if version == HEAD:
            return
        if version is not None and version > HEAD:
            raise ConfigurationError(f"the database was written by a newer version ({version}; this one knows {HEAD})")
        from alembic import command  # noqa: PLC0415 - 0.2 s to import, needed once
        from alembic.config import Config  # noqa: PLC0415

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _fenced(fence: Fence, write: Write[T], connection: Connection, changes: list[Change]) -> T:
    if connection.execute(_GENERATION, {"lease": fence.key}).scalar() != fence.generation:
        raise NotOwner(f"another replica owns {fence.key}")
    return write(connection, changes)


def _name_batch(connection: Connection, replica: str, name: str) -> None:
    mine = sa.update(replicas).where(replicas.c.replica == replica).values(last_batch=name)
    if not connection.execute(mine).rowcount:
        connection.execute(sa.insert(replicas).values(replica=replica, last_batch=name))
