"""The labels of runners, to be asked for."""

import json

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    labels = op.create_table(
        "runner_labels",
        sa.Column("key", sa.String, primary_key=True),
        sa.Column("value", sa.String, primary_key=True),
        sa.Column("seq", NUMBER, primary_key=True, autoincrement=False),
    )
    for seq, body in op.get_bind().execute(sa.text("SELECT seq, body FROM runners")):
        rows = [{"key": key, "value": value, "seq": seq} for key, value in json.loads(body).get("labels", {}).items()]
        if rows:
            op.bulk_insert(labels, rows)
