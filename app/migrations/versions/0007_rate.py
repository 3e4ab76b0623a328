"""When each runner got its place in its pool, by which rates are counted."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("runners", sa.Column("placed_at", sa.Float))
    op.create_index("runners_placed", "runners", ["pool_name", "placed_at"])
