"""How far webhooks were told, and what they are owed."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "webhook_targets",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("place", NUMBER, nullable=False),
        sa.Column("gone", sa.Boolean, nullable=False),
    )
    op.create_table(
        "webhook_arrears",
        sa.Column("target", sa.String, primary_key=True),
        sa.Column("runner_id", sa.String, primary_key=True),
        sa.Column("revision", NUMBER, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("error", sa.Text, nullable=False),
        sa.Column("since", sa.Float, nullable=False),
        sa.Column("retry_at", sa.Float, nullable=False),
        sa.Column("parked", sa.Boolean, nullable=False),
    )
