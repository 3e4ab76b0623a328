"""Which replica acts on an engine: one at a time, by a lease that runs out unless it is renewed.

A lease is a row in the shared database, judged by the database's clock. Its owner stops by its own monotonic clock before
the lease can run out: what it is doing is cancelled. Its writes bear the lease's generation, which rises with each owner, so
one that comes too late is refused. A store that nobody shares has a trivial owner: no lease is ever taken.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field

from app.database import Fence
from app.errors import NotOwner, Unavailable
from app.pools import bound_to_node
from app.runner import Runner
from app.store import Store

log = logging.getLogger(__name__)

LEASE_SECONDS = 6.0
MARGIN_SECONDS = 1.5
RENEW_SECONDS = 1.5
RELEASED = "released"


@dataclass(slots=True)
class _Lease:
    """What is held: until when by the loop's clock, since when by the wall clock, and who must stop then."""

    fence: Fence
    until: float
    since: float
    limits: set[asyncio.Timeout] = field(default_factory=set)


class Ownership:
    """The leases of one replica. A key is a shared engine's name, or that of a node for all that is bound to it."""

    def __init__(self, store: Store, *, node: str, url: str, now: Callable[[], float] = time.time) -> None:
        self._store = store
        self.shared = store.shared
        self.node = node
        self._url = url
        self._now = now
        self._wanted = {_node_key(node)}
        self._leases: dict[str, _Lease] = {}
        self._held: set[str] = set()
        self._gained: list[Callable[[str], None]] = []
        self._lost: list[Callable[[str], None]] = []
        self._again = asyncio.Event()
        self._claiming: asyncio.Task[None] | None = None
        store.heed(self._heard)

    async def open(self, engines: Iterable[str]) -> None:
        """Claim what concerns these engines, and go on claiming and renewing."""
        if self._store.shared:
            self._wanted |= {self.key_of(engine) for engine in engines}
            await self._claim()
            self._claiming = asyncio.create_task(self._keep_claiming(), name="leases")

    async def aclose(self) -> None:
        """Give everything up, so that another replica need not wait."""
        if self._claiming:
            self._claiming.cancel()
            await asyncio.gather(self._claiming, return_exceptions=True)
            self._leases.clear()
            try:
                async with asyncio.timeout(LEASE_SECONDS):
                    await self._store.release(RELEASED)
            except (Unavailable, TimeoutError) as error:
                log.warning("the leases run out by themselves: %s", error)

    def on_gain(self, listener: Callable[[str], None]) -> None:
        """Call this with every key that comes to be held."""
        self._gained.append(listener)

    def on_loss(self, listener: Callable[[str], None]) -> None:
        """Call this with every key that is found to be held no longer, save at a clean end."""
        self._lost.append(listener)

    def home(self, engine: str) -> str | None:
        """Name the node to which runners of an engine are bound; None: any replica may serve them."""
        return self.node if self._store.shared and bound_to_node(engine) else None

    def elsewhere(self, runner: Runner) -> bool:
        """Whether a runner is bound to another node."""
        return self._store.shared and runner.home not in (None, self.node)

    def served(self, runner: Runner) -> bool:
        """Whether some replica acts on a runner, as far as this one heard at its last claim."""
        return not self._store.shared or _key(runner) in self._held

    def lives(self, node: str) -> bool:
        """Whether a node's replica is alive, as far as this one heard at its last claim."""
        return _node_key(node) in self._held

    def key_of(self, engine: str) -> str:
        """Give the key under which an engine of this replica is owned."""
        return _node_key(self.node) if bound_to_node(engine) else engine

    def holds(self, key: str) -> bool:
        """Whether this replica may act."""
        lease = self._leases.get(key)
        return not self._store.shared or (lease is not None and asyncio.get_running_loop().time() < lease.until)

    def acts_on(self, runner: Runner) -> bool:
        """Whether this replica is the one that acts on a runner."""
        return self.holds(_key(runner))

    def since(self, runner: Runner) -> float:
        """Say since when this replica acts on a runner; -inf where it always did. Raises NotOwner."""
        return self._lease(_key(runner)).since if self._store.shared else float("-inf")

    def fence(self, runner: Runner) -> Fence | None:
        """Give what a write about a runner is conditional on. Raises NotOwner."""
        return self.fence_of(_key(runner))

    def fence_of(self, key: str) -> Fence | None:
        """Give what a write under this key is conditional on. Raises NotOwner."""
        return self._lease(key).fence if self._store.shared else None

    def owning(self, runner: Runner) -> AbstractAsyncContextManager[None]:
        """Act on a runner, as ``holding`` does."""
        return self.holding(_key(runner))

    @asynccontextmanager
    async def holding(self, key: str) -> AsyncIterator[None]:
        """Act while the lease lasts; what goes on when it runs out is cancelled. Raises NotOwner."""
        if not self._store.shared:
            yield
            return
        lease = self._lease(key)
        limit = asyncio.timeout_at(lease.until)
        try:
            async with limit:
                lease.limits.add(limit)
                try:
                    yield
                finally:
                    lease.limits.discard(limit)
        except TimeoutError:
            if limit.expired():
                raise NotOwner(f"the lease of {key} ran out") from None
            raise

    def _lease(self, key: str) -> _Lease:
        if not self.holds(key):
            if not key.startswith("node ") or key == _node_key(self.node):
                self._wanted.add(key)
            raise NotOwner(f"another replica owns {key}")
        return self._leases[key]

    async def _keep_claiming(self) -> None:
        while True:
            self._again.clear()
            try:
                async with asyncio.timeout(RENEW_SECONDS):
                    await self._again.wait()
            except TimeoutError:
                pass
            try:
                await self._claim()
            except Unavailable as error:
                log.warning("leases cannot be renewed: %s", error)
            except Exception:
                log.exception("renewing leases failed")

    async def _claim(self) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + LEASE_SECONDS - MARGIN_SECONDS
        held, self._held = await self._store.claim(sorted(self._wanted), self.node, self._url, LEASE_SECONDS)
        for key in self._leases.keys() - held.keys():
            self._lose(key)
        for key, generation in held.items():
            fence, lease = Fence(key, generation), self._leases.get(key)
            if lease and lease.fence == fence and self.holds(key):
                lease.until = until
                for limit in lease.limits:
                    limit.reschedule(until)
            else:
                if lease:
                    self._lose(key)
                self._leases[key] = _Lease(fence, until, self._now())
                log.info("this replica owns %s", key)
                for listener in self._gained:
                    listener(key)

    def _lose(self, key: str) -> None:
        log.warning("this replica owns %s no longer", key)
        for limit in self._leases.pop(key).limits:
            if not limit.expired():
                limit.reschedule(0)
        for listener in self._lost:
            listener(key)

    def _heard(self, text: str) -> None:
        if text == RELEASED:
            self._again.set()


def _key(runner: Runner) -> str:
    return _node_key(runner.home) if runner.home else runner.engine


def _node_key(node: str) -> str:
    return f"node {node}"
