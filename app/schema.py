"""The tables. A runner is one row: the columns that are searched or guarded, and the whole of it as JSON in ``body``.

The unique indexes over live rows are the slot guard: they hold even against a defect in the code above them.
"""

from sqlalchemy import BigInteger, Boolean, Column, Float, Index, Integer, MetaData, String, Table, Text, text

HEAD = "0009"
"""The migration that this code expects; a test compares it with the scripts."""

metadata = MetaData()

Number = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up integers alone, and they are as wide
"""A number that rises for ever."""

LIVE = text("phase != 'finished'")

runners = Table(
    "runners",
    metadata,
    Column("seq", Number, primary_key=True, autoincrement=True),
    Column("runner_id", String, nullable=False, unique=True),
    Column("revision", Number, nullable=False),
    Column("phase", String, nullable=False),
    Column("state", String, nullable=False),
    Column("pool_name", String, nullable=False),
    Column("task_id", String, nullable=False),
    Column("slot_id", String, nullable=False),
    Column("slot_place", String),
    Column("created_at", Float, nullable=False),
    Column("cpu", Float),
    Column("memory_mib", Number),
    Column("last_heartbeat", Float),
    Column("cleaned", Boolean, nullable=False),
    Column("body", Text, nullable=False),
    Column("log_kept_by", String),  # the node that kept the log
    Column("placed_at", Float),
    Column("home", String),  # the node in whose line it waits; of older rows only those that wait have it
    sqlite_autoincrement=True,
)
Index("runners_live_slot", runners.c.slot_id, unique=True, sqlite_where=LIVE, postgresql_where=LIVE)
Index("runners_live_place", runners.c.slot_place, unique=True, sqlite_where=LIVE, postgresql_where=LIVE)
Index(  # who is next in a pool's queue, and all that a pool's use is summed up of
    "runners_live_pool",
    runners.c.pool_name,
    runners.c.phase,
    runners.c.seq,
    runners.c.state,
    runners.c.cpu,
    runners.c.memory_mib,
    sqlite_where=LIVE,
    postgresql_where=LIVE,
)
Index("runners_unclean", runners.c.seq, sqlite_where=text("cleaned = 0"), postgresql_where=text("NOT cleaned"))
Index("runners_created", runners.c.created_at)
Index("runners_task", runners.c.task_id, runners.c.seq)
Index("runners_slot", runners.c.slot_id, runners.c.seq)
Index("runners_pool", runners.c.pool_name, runners.c.seq)
Index("runners_placed", runners.c.pool_name, runners.c.placed_at)
Index("runners_state", runners.c.state, runners.c.seq)

runner_labels = Table(  # the labels of runners, as lists are asked for them; `seq` is the runner's
    "runner_labels",
    metadata,
    Column("key", String, primary_key=True),
    Column("value", String, primary_key=True),
    Column("seq", Number, primary_key=True, autoincrement=False),
)

specs = Table(  # how to launch, secrets included; wiped at the end
    "specs",
    metadata,
    Column("runner_id", String, primary_key=True),
    Column("spec", Text, nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("revision", Number, primary_key=True, autoincrement=True),
    Column("runner_id", String, nullable=False),
    Column("at", Float, nullable=False),
    Column("body", Text, nullable=False),
    sqlite_autoincrement=True,
)
Index("events_runner", events.c.runner_id, events.c.revision)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("caller", String, primary_key=True),
    Column("key", String, primary_key=True),
    Column("request_sha256", String, nullable=False),
    Column("runner_id", String, nullable=False),
)

Index("idempotency_keys_runner", idempotency_keys.c.runner_id)

history = Table(  # one row: the newest event that is no longer kept
    "history",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("forgotten", Number, nullable=False),
)

pool_switches = Table(  # a pool switched on or off by hand, which beats the file
    "pool_switches",
    metadata,
    Column("pool_name", String, primary_key=True),
    Column("enabled", Boolean, nullable=False),
)

webhook_targets = Table(  # up to which revision each was told all that it is not owed still
    "webhook_targets",
    metadata,
    Column("name", String, primary_key=True),
    Column("place", Number, nullable=False),
    Column("gone", Boolean, nullable=False),
)

webhook_arrears = Table(  # whose events, from which revision on, a target did not take
    "webhook_arrears",
    metadata,
    Column("target", String, primary_key=True),
    Column("runner_id", String, primary_key=True),
    Column("revision", Number, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("error", Text, nullable=False),
    Column("since", Float, nullable=False),
    Column("retry_at", Float, nullable=False),
    Column("parked", Boolean, nullable=False),
)

replicas = Table(  # services that share this database; the last batch of writes that each has committed
    "replicas",
    metadata,
    Column("replica", String, primary_key=True),
    Column("last_batch", String, nullable=False),
)

leases = Table(  # which replica acts on what; `expires_at` by the database's clock, in seconds since the epoch
    "leases",
    metadata,
    Column("key", String, primary_key=True),
    Column("replica", String, nullable=False),
    Column("generation", Number, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("node", String, nullable=False),
    Column("url", String, nullable=False),
)

installations = Table(  # one row: the name that runners bear on engines, for replicas that share them
    "installations",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String, nullable=False),
)
