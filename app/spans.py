"""Spans for OpenTelemetry: of requests, of each runner from its intent to its end, of each call that launches it.

They are made of what is known once it is over, mostly of committed changes. So a runner's span, whose id the runner is told
in ``TRACEPARENT`` and its record keeps, is sent by whichever service sees the end, with the runner's own spans below it.
"""

import asyncio
import secrets
import threading
from collections.abc import Callable, Mapping

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags, set_span_in_context

from app import __version__
from app.context import Place
from app.events import Change
from app.runner import Phase, Runner, State

FLUSH_SECONDS = 3.0
"""How long the end of the service waits for a collector."""

BEGINS = {"accepted", "admitted", "launching"}
"""Events with which a launch call begins, if the runner is starting."""

Attributes = Mapping[str, str | int | float | bool | None]


class Tracing:
    """Sends spans to the collector that the environment names. ``name`` is this service's, where that names none."""

    def __init__(self, now: Callable[[], float], *, name: str | None) -> None:
        told = {"service.version": __version__} | ({"service.name": name} if name else {})
        self._provider = TracerProvider(resource=Resource.create(told), shutdown_on_exit=False)  # and what is sampled
        self._now = now
        self._since = now()
        self._begun: dict[str, float] = {}
        self._processor = BatchSpanProcessor(OTLPSpanExporter())

    async def aclose(self) -> None:
        """Send what is left, if the collector takes it soon."""
        ending = threading.Thread(target=self._processor.shutdown, daemon=True)
        ending.start()
        await asyncio.to_thread(ending.join, FLUSH_SECONDS)

    def begin(self, name: str, traceparent: str | None) -> Place:
        """Make a place for a request, below the caller's if they name one."""
        parent = Place.read(traceparent or "")
        trace_id = parent.trace_id if parent else secrets.token_hex(16)
        context = set_span_in_context(NonRecordingSpan(_context(parent, remote=True))) if parent else None
        decision = self._provider.sampler.should_sample(context, int(trace_id, 16), name).decision
        return Place(trace_id, secrets.token_hex(8), decision is not Decision.DROP)

    def request(
        self, place: Place, name: str, caller: str | None, begun: float, attributes: Attributes, *, failed: bool
    ) -> None:
        """Send the span of a request that was answered; ``caller`` is the traceparent it came with."""
        parent = Place.read(caller or "")
        problem = "" if failed else None
        self._send(place, parent, name, (begun, self._now()), attributes, problem=problem, kind=SpanKind.SERVER)

    def intent(self, runner: Runner, begun: float) -> None:
        """Send the span of an intent that was written."""
        if place := _own(runner):
            self._send(place.below(), place, "write the intent", (begun, self._now()), _of(runner))

    def changed(self, change: Change, *, ours: bool) -> None:
        """Send the spans that end with a committed change: of a launch call, of a runner; if it is ``ours`` to tell them."""
        runner, event = change.runner, change.event
        place = _own(runner)
        if place is None:
            return
        if event.type in BEGINS and event.to_phase is Phase.STARTING:
            self._begun[runner.runner_id] = event.at
        elif event.type in ("started", "rejected", "attempt_failed"):
            begun = self._begun.pop(runner.runner_id, self._since)  # begun by a service before this one, again by us
            problem = None if event.type == "started" else runner.attempts[-1].error
            told = {**_of(runner), "runner.attempt": len(runner.attempts) + (problem is None)}
            if ours:
                self._send(place.below(), place, f"launch in {runner.engine}", (begun, event.at), told, problem=problem)
        if event.to_phase is Phase.FINISHED and event.from_phase is not Phase.FINISHED:
            self._begun.pop(runner.runner_id, None)
            if ours:
                self._ended(runner, place, event.at)

    def _ended(self, runner: Runner, place: Place, told_at: float) -> None:
        end = runner.finished_at or told_at
        self._send(place.below(), place, "see the end", (end, told_at), _of(runner))
        parent = Place(place.trace_id, runner.parent_span, place.sampled)
        told = {
            **_of(runner),
            "runner.state": runner.state,
            "runner.reason": runner.reason,
            "process.exit.code": runner.exit_code,
            "runner.signal": runner.signal,
        }
        problem = (runner.message or runner.reason or "") if runner.state is State.FAILED else None
        self._send(place, parent, "runner", (runner.created_at, end), told, problem=problem)

    def _send(
        self,
        place: Place,
        parent: Place | None,
        name: str,
        times: tuple[float, float],
        attributes: Attributes,
        *,
        problem: str | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> None:
        span = ReadableSpan(
            name,
            context=_context(place),
            parent=_context(parent) if parent else None,
            resource=self._provider.resource,
            attributes={key: value for key, value in attributes.items() if value is not None},
            kind=kind,
            status=Status(StatusCode.UNSET) if problem is None else Status(StatusCode.ERROR, problem),
            start_time=int(times[0] * 1e9),
            end_time=int(max(times) * 1e9),
            instrumentation_scope=InstrumentationScope("runner-launcher", __version__),
        )
        self._processor.on_end(span)


def _own(runner: Runner) -> Place | None:
    """Give the place of a runner's own span; None if it was launched while nobody traced."""
    return Place.read(runner.traceparent) if runner.parent_span else None


def _of(runner: Runner) -> Attributes:
    return {
        "runner.id": runner.runner_id,
        "runner.task_id": runner.task_id,
        "runner.pool": runner.pool_name,
        "runner.engine": runner.engine,
    }


def _context(place: Place, *, remote: bool = False) -> SpanContext:
    return SpanContext(int(place.trace_id, 16), int(place.span_id, 16), remote, TraceFlags(int(place.sampled)))
