"""Whether an engine is taken to be away: a circuit breaker, pure, with no I/O and no clock of its own.

Whoever gets no answer from an engine doubts it, whatever was asked. A doubt settles nothing, for a launch may fail of
itself. It lets the engine be asked for a sign of life at once, and not only in its turn; what comes of that alone moves the
breaker. Two signs in a row that do not come, and the engine is away: new launches are refused at once, while it is asked
on, ever more slowly. One sign of life, and launches are taken again.

Times are seconds since the epoch.
"""

from dataclasses import dataclass

MISSED = 2
"""How many signs of life in a row must be missed before an engine is away."""

PAUSES = (0.2, 5.0)
"""The first and the longest pause before an engine that gave no sign is asked again."""

PATIENCE_SECONDS = 5.0
"""How long an engine may take for a sign of life."""


@dataclass(frozen=True, slots=True)
class Breaker:
    """What is held of one engine: the signs missed in a row, why, and since when it is away; None: launches are taken."""

    missed: int = 0
    problem: str = ""
    away_since: float | None = None

    @property
    def open(self) -> bool:
        """Whether launches are refused."""
        return self.away_since is not None

    @property
    def pause(self) -> float:
        """How many seconds it is left alone before it is asked again."""
        first, longest = PAUSES
        return min(longest, first * 2 ** min(self.missed - 1, 30)) if self.missed else 0.0


CLOSED = Breaker()
"""An engine that has given a sign of life, or of which nothing is known."""


def silent(before: Breaker, problem: str, now: float) -> Breaker:
    """The breaker after one more sign of life that did not come, for this reason."""
    missed = before.missed + 1
    return Breaker(missed, problem, before.away_since or (now if missed >= MISSED else None))
