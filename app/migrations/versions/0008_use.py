"""What a pool's use is summed up of, in the index by which its live runners are found."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

LIVE = sa.text("phase != 'finished'")


def upgrade() -> None:
    op.drop_index("runners_live_pool", "runners")
    columns = ["pool_name", "phase", "seq", "state", "cpu", "memory_mib"]
    op.create_index("runners_live_pool", "runners", columns, sqlite_where=LIVE, postgresql_where=LIVE)
