"""Who acts on which engine, who kept which log, and what runners are called on engines."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.add_column("runners", sa.Column("log_kept_by", sa.String))
    op.create_table(
        "leases",
        sa.Column("key", sa.String, primary_key=True),
        sa.Column("replica", sa.String, nullable=False),
        sa.Column("generation", NUMBER, nullable=False),
        sa.Column("expires_at", sa.Float, nullable=False),
        sa.Column("node", sa.String, nullable=False),
        sa.Column("url", sa.String, nullable=False),
    )
    op.create_table(
        "installations",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String, nullable=False),
    )
