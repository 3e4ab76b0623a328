"""How far each webhook target was told, and what it is owed: kept in the database, beside the events that it is told."""

from dataclasses import asdict, dataclass

import sqlalchemy as sa
from sqlalchemy import Connection

from app.database import Database, Fence, Write
from app.events import Change
from app.schema import webhook_arrears, webhook_targets


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrears:
    """What a webhook target is owed of one runner: its events from ``revision`` on, which were told to fail so often.

    ``parked``: they wait for somebody who says that they are to be tried again. Times are seconds since the epoch.
    """

    runner_id: str
    revision: int
    attempts: int
    error: str
    since: float
    retry_at: float
    parked: bool


class Ledger:
    """The places and arrears of all targets. Writes raise NotOwner once the lease they are made under is somebody else's."""

    def __init__(self, database: Database, fence: Fence | None = None) -> None:
        self._database = database
        self._fence = fence

    async def place(self, target: str) -> tuple[int | None, bool]:
        """Give the revision up to which a target was told all but its arrears, None if never, and whether it is gone."""
        query = sa.select(webhook_targets.c.place, webhook_targets.c.gone).where(webhook_targets.c.name == target)
        row = await self._database.read(lambda connection: connection.execute(query).first())
        return (row.place, row.gone) if row else (None, False)

    async def set_place(self, target: str, place: int, *, gone: bool = False) -> None:
        """Note how far a target was told; ``gone``: it said that it wants to hear no more."""

        def write(connection: Connection, _: list[Change]) -> None:
            values = {"place": place, "gone": gone}
            row = sa.update(webhook_targets).where(webhook_targets.c.name == target)
            if connection.execute(row.values(values)).rowcount == 0:
                connection.execute(sa.insert(webhook_targets).values(name=target, **values))

        await self._write(write)

    async def arrears(self, target: str) -> list[Arrears]:
        """Give what a target is owed, the oldest first."""
        columns = [column for column in webhook_arrears.c if column.name != "target"]
        query = sa.select(*columns).where(webhook_arrears.c.target == target).order_by(webhook_arrears.c.revision)
        rows = await self._database.read(lambda connection: connection.execute(query).all())
        return [Arrears(**row._mapping) for row in rows]  # noqa: SLF001 - a row's own way

    async def owe(self, target: str, arrears: Arrears) -> None:
        """Note what a target is owed of one runner, in place of what was noted before."""

        def write(connection: Connection, _: list[Change]) -> None:
            connection.execute(_arrears_of(target, arrears.runner_id))
            connection.execute(sa.insert(webhook_arrears).values(target=target, **asdict(arrears)))

        await self._write(write)

    async def settle(self, target: str, runner_id: str) -> None:
        """Note that a target is owed nothing of a runner any more."""
        await self._write(lambda connection, _: connection.execute(_arrears_of(target, runner_id)))

    async def _write(self, write: Write[object]) -> None:
        await self._database.write(write, fence=self._fence)


def _arrears_of(target: str, runner_id: str) -> sa.Delete:
    return sa.delete(webhook_arrears).where(webhook_arrears.c.target == target, webhook_arrears.c.runner_id == runner_id)
