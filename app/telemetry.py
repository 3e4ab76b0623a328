"""Figures for Prometheus: counted from committed changes as they are told, and read off when somebody scrapes.

Each application has a registry of its own. Pools that only came with a request share one name, or a caller could make up as
many series as there are names.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder

from app.engines import EngineState
from app.events import Change, Feed
from app.pools import Pool
from app.runner import Phase, Runner
from app.service import PoolState
from app.webhooks import TargetState

INLINE = "(inline)"

_LAUNCH = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)
_DETECTION = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_LAG = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5)


class Telemetry:
    """What is counted of one service."""

    def __init__(self, feed: Feed, pools: Callable[[], Mapping[str, Pool]], now: Callable[[], float] = time.time) -> None:
        self._pools = pools
        self._now = now
        self._registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"runner_launcher_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, labels: Sequence[str], buckets: Sequence[float]) -> Histogram:
            return Histogram(f"runner_launcher_{name}", text, labels, buckets=buckets, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"runner_launcher_{name}", text, labels, registry=registry)

        self._launches = counter(
            "launches", "Launches by what came of them: started, or failed for a reason", "pool", "outcome", "reason"
        )
        self._ends = counter("ends", "Runners that ended, by how", "pool", "state", "reason")
        self._attempts = counter("failed_attempts", "Launch calls that an engine did not answer with a yes", "pool")
        self._latency = histogram(
            "launch_seconds", "From the intent to the engine's yes, waiting in the queue included", ["pool"], _LAUNCH
        )
        self._detection = histogram(
            "end_detection_seconds", "From a runner's end by its engine's clock to its record", ["pool"], _DETECTION
        )
        self._lag = histogram("event_lag_seconds", "From the time of an event to its being told, commit included", [], _LAG)
        self._running = gauge("pool_runners", "Live runners placed in a pool", "pool")
        self._slots = gauge("pool_max_concurrency", "How many runners a pool may hold", "pool")
        self._queued = gauge("pool_queued", "Launches that wait for a place in a pool", "pool")
        self._launching = gauge("pool_launching", "Launches of a pool that its engine has not accepted yet", "pool")
        self._cpu = gauge("pool_cpu_cores", "Sum of the limits of a pool's live runners", "pool")
        self._memory = gauge("pool_memory_mib", "Sum of the limits of a pool's live runners", "pool")
        self._enabled = gauge("pool_enabled", "Whether a pool is switched on", "pool")
        self._answers = gauge("engine_answers", "Whether an engine answers", "engine")
        self._open = gauge("engine_breaker_open", "Whether an engine is away and launches for it are refused", "engine")
        self._age = gauge("engine_answer_age_seconds", "Since an engine's last answer", "engine")
        self._hint_age = gauge("engine_watch_age_seconds", "Since an engine's watch last told of a change", "engine")
        self._streams = gauge("event_streams", "Who follows all events: open streams, and targets of webhooks")
        self._told = counter("webhook_answers", "Events sent, by what the target said", "target", "outcome")
        self._behind = gauge("webhook_behind", "Events of all runners that a target was not told yet", "target")
        self._retrying = gauge("webhook_retrying_runners", "Runners of which a target did not take an event yet", "target")
        self._parked = gauge("webhook_parked_runners", "Runners whose events wait for somebody to try again", "target")
        self._gone = gauge("webhook_gone", "Whether a target said that it wants to hear no more", "target")
        self._revision = gauge("revision", "The newest revision that was told")
        self._tasks = gauge(
            "tasks", "Things that the service is at; they grow with open requests and streams, and shrink again"
        )
        self._scraping = asyncio.Lock()
        ProcessCollector(registry=registry)
        feed.listen(self._changed)

    async def exposition(
        self,
        accept: str,
        pools: Sequence[PoolState],
        engines: Sequence[EngineState],
        streams: int,
        targets: Sequence[TargetState],
    ) -> tuple[bytes, str]:
        """Write all figures in the format that a scraper accepts; gives them and their media type."""
        async with self._scraping:  # what one scrape has set, the next must not clear while it is written
            self._read_off(pools, engines, streams, targets)
            encode, media_type = _encoder(accept)
            return await asyncio.to_thread(encode, self._registry), media_type

    def _read_off(
        self,
        pools: Sequence[PoolState],
        engines: Sequence[EngineState],
        streams: int,
        targets: Sequence[TargetState],
    ) -> None:
        self._streams.set(streams)
        self._tasks.set(len(asyncio.all_tasks()))
        for each in (
            self._running,
            self._slots,
            self._queued,
            self._launching,
            self._cpu,
            self._memory,
            self._enabled,
            self._answers,
            self._open,
            self._age,
            self._hint_age,
            self._behind,
            self._retrying,
            self._parked,
            self._gone,
        ):
            each.clear()  # a pool may have been taken out of its file
        for state in pools:
            name = state.pool.name
            self._running.labels(name).set(state.usage.runners)
            self._slots.labels(name).set(state.pool.max_concurrency)
            self._queued.labels(name).set(state.queued)
            self._launching.labels(name).set(state.usage.launching)
            self._cpu.labels(name).set(state.usage.cpu)
            self._memory.labels(name).set(state.usage.memory_mib)
            self._enabled.labels(name).set(state.enabled)
        for engine in engines:
            self._answers.labels(engine.name).set(engine.answers)
            self._open.labels(engine.name).set(engine.away_since is not None)
            if engine.answered_at is not None:
                self._age.labels(engine.name).set(max(0.0, self._now() - engine.answered_at))
            if engine.hinted_at is not None:
                self._hint_age.labels(engine.name).set(max(0.0, self._now() - engine.hinted_at))
        for target in targets:
            name, parked = target.target.name, sum(each.parked for each in target.arrears)
            self._behind.labels(name).set(target.behind)
            self._retrying.labels(name).set(len(target.arrears) - parked)
            self._parked.labels(name).set(parked)
            self._gone.labels(name).set(target.gone)

    def webhook_answered(self, target: str, outcome: str) -> None:
        """Count what a target said to an event."""
        self._told.labels(target, outcome).inc()

    def _changed(self, change: Change) -> None:
        runner, event = change.runner, change.event
        pool = runner.pool_name if runner.pool_name in self._pools() else INLINE
        self._revision.set(event.revision)
        self._lag.observe(max(0.0, self._now() - event.at))
        if event.type == "started" and runner.started_at is not None:
            self._launches.labels(pool, "started", "").inc()
            self._latency.labels(pool).observe(max(0.0, runner.started_at - runner.created_at))
        elif event.type == "attempt_failed":
            self._attempts.labels(pool).inc()
        elif event.to_phase is Phase.FINISHED and event.from_phase is not Phase.FINISHED:
            self._ended(runner, pool, event.at)

    def _ended(self, runner: Runner, pool: str, told_at: float) -> None:
        reason = runner.reason or ""
        self._ends.labels(pool, runner.state, reason).inc()
        if not runner.accepted:
            self._launches.labels(pool, "failed", reason).inc()
        elif runner.finished_at is not None:
            self._detection.labels(pool).observe(max(0.0, told_at - runner.finished_at))


def _encoder(accept: str) -> tuple[Callable[[CollectorRegistry], bytes], str]:
    """Choose the format that a scraper accepts; one whose version is no number accepts any."""
    try:
        return choose_encoder(accept)
    except TypeError:  # of the library's comparison of versions
        return choose_encoder("")
