"""The first tables."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

LIVE = sa.text("phase != 'finished'")
NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "runners",
        sa.Column("seq", NUMBER, primary_key=True, autoincrement=True),
        sa.Column("runner_id", sa.String, nullable=False, unique=True),
        sa.Column("revision", NUMBER, nullable=False),
        sa.Column("phase", sa.String, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("pool_name", sa.String, nullable=False),
        sa.Column("task_id", sa.String, nullable=False),
        sa.Column("slot_id", sa.String, nullable=False),
        sa.Column("slot_place", sa.String),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("cpu", sa.Float),
        sa.Column("memory_mib", NUMBER),
        sa.Column("last_heartbeat", sa.Float),
        sa.Column("cleaned", sa.Boolean, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    for name, columns in {"runners_live_slot": ["slot_id"], "runners_live_place": ["slot_place"]}.items():
        op.create_index(name, "runners", columns, unique=True, sqlite_where=LIVE, postgresql_where=LIVE)
    op.create_index("runners_live_pool", "runners", ["pool_name", "phase"], sqlite_where=LIVE, postgresql_where=LIVE)
    op.create_index(
        "runners_unclean", "runners", ["seq"], sqlite_where=sa.text("cleaned = 0"), postgresql_where=sa.text("NOT cleaned")
    )
    op.create_index("runners_created", "runners", ["created_at"])
    for column in ("task", "slot", "pool", "state"):
        name = {"task": "task_id", "slot": "slot_id", "pool": "pool_name", "state": "state"}[column]
        op.create_index(f"runners_{column}", "runners", [name, "seq"])
    op.create_table(
        "specs",
        sa.Column("runner_id", sa.String, primary_key=True),
        sa.Column("spec", sa.Text, nullable=False),
    )
    op.create_table(
        "events",
        sa.Column("revision", NUMBER, primary_key=True, autoincrement=True),
        sa.Column("runner_id", sa.String, nullable=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("events_runner", "events", ["runner_id", "revision"])
    op.create_table(
        "idempotency_keys",
        sa.Column("caller", sa.String, primary_key=True),
        sa.Column("key", sa.String, primary_key=True),
        sa.Column("request_sha256", sa.String, nullable=False),
        sa.Column("runner_id", sa.String, nullable=False),
    )
    op.create_table(
        "pool_switches",
        sa.Column("pool_name", sa.String, primary_key=True),
        sa.Column("enabled", sa.Boolean, nullable=False),
    )
