"""The node that a runner is bound to, by which those that wait for a place in a pool stand in lines of their own."""

import json

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.add_column("runners", sa.Column("home", sa.String))
    runners = sa.table("runners", *[sa.column(name) for name in ("seq", "phase", "body", "home")])
    waiting = sa.select(runners.c.seq, runners.c.body).where(runners.c.phase == "queued")
    for row in op.get_bind().execute(waiting).all():
        home = json.loads(row.body).get("home")
        op.execute(sa.update(runners).where(runners.c.seq == row.seq).values(home=home))
