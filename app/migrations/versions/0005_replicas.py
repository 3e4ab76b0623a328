"""Who shares this database, and what each wrote last."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "replicas",
        sa.Column("replica", sa.String, primary_key=True),
        sa.Column("last_batch", sa.String, nullable=False),
    )
