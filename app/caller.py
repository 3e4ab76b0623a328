"""Who asks, and what they may."""

from dataclasses import dataclass
from enum import StrEnum

from app.errors import NotPermitted


class Scope(StrEnum):
    """A kind of thing that a caller may do; none of them includes another."""

    LAUNCH = "launch"
    READ = "read"
    STOP = "stop"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: a name for idempotency keys and for the history, and what they may.

    ``pools`` None: all pools; ``rate`` is how many calls a second they may make, None: as many as they like.
    """

    name: str
    scopes: frozenset[Scope] = frozenset(Scope)
    pools: frozenset[str] | None = None
    rate: float | None = None

    def sees(self, pool_name: str) -> bool:
        """Say whether a pool, and what runs in it, is any of their business."""
        return self.pools is None or pool_name in self.pools

    def require(self, scope: Scope) -> None:
        """Raise NotPermitted unless they have this scope."""
        if scope not in self.scopes:
            raise NotPermitted(f"the token of {self.name} has no scope {scope}", code="scope-missing")
