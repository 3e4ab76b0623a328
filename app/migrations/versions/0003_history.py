"""How far back the history reaches, now that ended runners are forgotten."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    history = op.create_table(
        "history",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("forgotten", NUMBER, nullable=False),
    )
    op.bulk_insert(history, [{"id": 1, "forgotten": 0}])
    op.create_index("idempotency_keys_runner", "idempotency_keys", ["runner_id"])
