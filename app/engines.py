"""What engines said of themselves: asked in the background, so that nobody who reads waits for an engine.

Whether an engine answers is the reconciler's knowledge; this adds what the engine is and can do, and what it said when it
could not be asked.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pydantic import JsonValue

from app.errors import LauncherUnavailable, LaunchRejected
from app.launcher import Tells
from app.pools import Pool
from app.reconciler import Reconciler

log = logging.getLogger(__name__)

ASK_SECONDS = 30.0
PATIENCE_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineState:
    """An engine as it was last heard of.

    ``answered_at`` and ``hinted_at``, when its watch last told of something, are seconds since the epoch; None: never.
    ``away_since`` is when its breaker opened; None: launches are taken.
    """

    name: str
    pools: tuple[str, ...]
    answers: bool
    answered_at: float | None
    hinted_at: float | None
    away_since: float | None
    problem: str | None
    details: Mapping[str, JsonValue]


@dataclass(frozen=True, slots=True)
class _Said:
    """What an engine said, and what came of asking it last."""

    at: float | None = None
    details: Mapping[str, JsonValue] = field(default_factory=dict)
    problem: str | None = None


class Engines:
    """The engines that pools name or runners use."""

    def __init__(
        self, reconciler: Reconciler, pools: Callable[[], Mapping[str, Pool]], now: Callable[[], float] = time.time
    ) -> None:
        self._reconciler = reconciler
        self._pools = pools
        self._now = now
        self._said: dict[str, _Said] = {}

    async def keep_asking(self) -> None:
        """Ask all of them, again and again, until cancelled."""
        while True:
            await asyncio.gather(*(self._ask(name) for name in self._names()))
            await asyncio.sleep(ASK_SECONDS)

    def states(self) -> list[EngineState]:
        """Give every engine as it was last heard of, by name."""
        answering = self._reconciler.answering()
        states = []
        for name in self._names():
            said = self._said.get(name, _Said())
            breaker = self._reconciler.breaker(name)
            times = [at for at in (said.at, self._reconciler.answered_at(name)) if at is not None]
            states.append(
                EngineState(
                    name=name,
                    pools=tuple(pool.name for pool in self._pools().values() if pool.engine == name),
                    answers=said.problem is None and answering.get(name, False),
                    answered_at=max(times, default=None),
                    hinted_at=self._reconciler.hinted_at(name),
                    away_since=breaker.away_since,
                    problem=breaker.problem if breaker.open else said.problem,
                    details=said.details,
                )
            )
        return states

    def _names(self) -> list[str]:
        return sorted({pool.engine for pool in self._pools().values()} | self._reconciler.engines().keys())

    async def _ask(self, name: str) -> None:
        before = self._said.get(name, _Said())
        try:
            launcher = await self._reconciler.launcher(name)
            if isinstance(launcher, Tells):
                async with asyncio.timeout(PATIENCE_SECONDS):
                    self._said[name] = _Said(details=await launcher.about(), at=self._now())
        except (LauncherUnavailable, LaunchRejected) as error:
            self._said[name] = _Said(before.at, before.details, str(error))
        except TimeoutError:
            self._said[name] = _Said(before.at, before.details, f"no answer for {PATIENCE_SECONDS:g} s")
        except Exception:
            log.exception("%s: asking what it is failed", name)
            self._said[name] = _Said(before.at, before.details, "asking it failed; the service's log has the details")
