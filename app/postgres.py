"""PostgreSQL as the database of a store that several replicas share.

Replicas write one after another: every write transaction begins by taking one advisory lock and holds it until it is
committed. So what is checked in a transaction (slots, places, queues) stays true in it, as with SQLite's single writer; and
revisions, which a sequence gives out, become visible in their order. Without the lock a transaction could take revision 7,
be overtaken by one that commits 8, and a reader that has seen 8 would never be given 7.

A replica that stalls while it holds the lock is cut off by the server.
"""

import contextlib
import importlib.util
import logging
import re
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import sqlalchemy as sa
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import QueuePool

from app.errors import ConfigurationError

if TYPE_CHECKING:
    import psycopg

log = logging.getLogger(__name__)

LOCK = 7_216_041_830
"""The advisory lock of those who write; a number that nobody else in this database should use."""

CHANNEL = "runner_launcher"
POLL_SECONDS = 1.0
"""How long news may take if no notification comes."""

RECONNECT_SECONDS = 0.25
STALL = "10s"

_PASSING = {"55P03", "25P03", "57P01", "57P02", "57P03", "57P05"}
"""A lock not to be had, a session or server that was ended or is just starting."""

_FINAL = re.compile(r"authentication failed|no password supplied|does not exist|no pg_hba\.conf entry")
"""What a server says that will not let us in; the driver has no code for it."""


def open_engine(url: sa.URL, connections: int, *, writes: bool) -> Engine:
    """Open a database for its writer or for readers. Raises ConfigurationError where the driver is missing."""
    if not importlib.util.find_spec("psycopg"):
        raise ConfigurationError(
            "RUNNER_LAUNCHER_DATABASE_URL: PostgreSQL needs psycopg: in a clone, pip install ./client '.[postgres]'"
        )
    engine = sa.create_engine(
        url.set(drivername="postgresql+psycopg"),
        poolclass=QueuePool,
        pool_size=connections,
        max_overflow=0,
        hide_parameters=True,
        isolation_level="READ COMMITTED" if writes else "AUTOCOMMIT",
        connect_args={
            "connect_timeout": 5,
            "target_session_attrs": "read-write" if writes else "primary",  # after a failover: not one that was demoted
            "keepalives_idle": 5,  # a database that went silent is given up after some ten seconds
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": 10_000,
            "application_name": "runner-launcher",
        },
    )

    @sa.event.listens_for(engine, "connect")
    def connect(connection: Any, _: object) -> None:  # noqa: ANN401 - a driver's connection
        with connection.cursor() as cursor:
            cursor.execute(f"SET idle_in_transaction_session_timeout='{STALL}'; SET lock_timeout='{STALL}'")
            if not writes:
                cursor.execute("SET default_transaction_read_only=on")
        connection.commit()

    if writes:

        @sa.event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK})")

    return engine


def passes(error: Exception) -> bool:
    """Whether an error is one of the moment: the database is away, or was just now, or somebody holds a lock."""
    if not isinstance(error, DBAPIError):
        return False
    state = getattr(error.orig, "sqlstate", None)
    if state is None:
        kind = type(error.orig).__name__
        return error.connection_invalidated or (
            kind.endswith(("OperationalError", "Timeout")) and not _FINAL.search(str(error))
        )
    return error.connection_invalidated or state[:2] in ("08", "40") or state in _PASSING


def notify(connection: Connection, text: str = "") -> None:
    """Wake all replicas once the transaction is committed, with something short to tell them; they may miss it."""
    connection.execute(sa.text("SELECT pg_notify(:channel, :text)"), {"channel": CHANNEL, "text": text})


def follow(readers: Engine, heard: Callable[[str], None], closed: threading.Event) -> None:
    """Call ``heard`` with every notification, and with nothing after each pause or new connection, until ``closed``."""
    while not closed.is_set():
        try:
            with contextlib.closing(readers.raw_connection()) as pooled:
                connection = cast("psycopg.Connection[Any]", pooled.driver_connection)
                connection.autocommit = True
                connection.execute(f"LISTEN {CHANNEL}")
                try:
                    heard("")
                    while not closed.is_set():
                        told = {notice.payload for notice in connection.notifies(timeout=POLL_SECONDS, stop_after=1)}
                        for text in told or {""}:
                            heard(text)
                finally:
                    pooled.invalidate()  # nobody else may be given a connection that listens
        except Exception as error:  # noqa: BLE001 - the database's, in whatever wrapping; this thread must not end
            log.debug("news of the database are interrupted: %s", error)
            closed.wait(RECONNECT_SECONDS)
