"""Traces, as a collector gets them over OTLP/HTTP, from the caller through the launch into the runner; and the log's ids."""

import asyncio
import json
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import TELL, Serve, finished, launch_body, launched, local_pool, read, service_environment, told, until
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from test_replicas import replica
from typing_extensions import override

from app import log_lines
from app.errors import ConfigurationError
from app.tracing import open_tracing

TRACE_ID, CALLERS_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CALLER = f"00-{TRACE_ID}-{CALLERS_SPAN}-01"
WAITS = "while [ ! -e go ]; do sleep 0.01; done\n"


@dataclass
class Collector:
    """Takes spans as an OpenTelemetry collector does."""

    spans: list[Span] = field(default_factory=list)
    resources: list[dict[str, str]] = field(default_factory=list)
    port: int = 0

    def open(self) -> ThreadingHTTPServer:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = ExportTraceServiceRequest()
                request.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
                for resource in request.resource_spans:
                    named = {each.key: each.value.string_value for each in resource.resource.attributes}
                    collector.resources.append(named)
                    for scope in resource.scope_spans:
                        collector.spans += scope.spans
                self.send_response(200)
                self.end_headers()

            @override
            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        self.port = server.server_port
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server

    def asking(self) -> list[str]:
        """Give the command that has a service send its spans here, and soon."""
        return ["env", f"OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:{self.port}", "OTEL_BSP_SCHEDULE_DELAY=50"]

    def find(self, name: str, trace_id: str = TRACE_ID) -> Span | None:
        """Give the span of this name in a trace."""
        found = [span for span in self.spans if span.name == name and span.trace_id.hex() == trace_id]
        assert len(found) <= 1, found
        return found[0] if found else None

    async def get(self, name: str, trace_id: str = TRACE_ID) -> Span:
        """Wait for the span of this name."""
        await until(lambda: self.find(name, trace_id) is not None)
        found = self.find(name, trace_id)
        assert found
        return found


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    server = collector.open()
    yield collector
    server.shutdown()
    server.server_close()


def said(span: Span) -> dict[str, str | int]:
    return {
        each.key: each.value.string_value if each.value.HasField("string_value") else each.value.int_value
        for each in span.attributes
    }


async def test_a_trace_leads_from_the_caller_into_the_runner(serve: Serve, slot: Path, collector: Collector) -> None:
    async with serve(inside=collector.asking()) as running, running.client() as client:
        runner = await launched(client, launch_body(slot, TELL + "sleep 0.5; exit 3"), traceparent=CALLER)
        environment = await told(slot)
        await finished(client, runner)
        request, whole = await collector.get("POST /runners"), await collector.get("runner")
        intent, launch = await collector.get("write the intent"), await collector.get("launch in local-process")
        end = await collector.get("see the end")
    assert environment["TRACEPARENT"] == f"00-{TRACE_ID}-{whole.span_id.hex()}-01"
    assert (request.parent_span_id.hex(), request.kind) == (CALLERS_SPAN, Span.SPAN_KIND_SERVER)
    assert said(request)["http.response.status_code"] == 201
    assert whole.parent_span_id == request.span_id
    assert {span.parent_span_id for span in (intent, launch, end)} == {whole.span_id}
    assert whole.start_time_unix_nano <= launch.start_time_unix_nano <= launch.end_time_unix_nano <= whole.end_time_unix_nano
    assert (whole.status.code, whole.status.message) == (Status.STATUS_CODE_ERROR, "exited with code 3")
    assert launch.status.code == Status.STATUS_CODE_UNSET
    known = said(whole)
    assert (known["runner.id"], known["process.exit.code"]) == (runner["runner_id"], 3)
    assert (known["runner.reason"], known["runner.pool"], known["runner.task_id"]) == ("exit_nonzero", "local", "7")
    assert {each["service.name"] for each in collector.resources} == {"runner-launcher"}


async def test_a_launch_that_fails_shows_each_call(serve: Serve, slot: Path, collector: Collector) -> None:
    config = {"docker_host": "tcp://127.0.0.1:9", "user": "image", "retry_attempts": 2, "retry_base_seconds": 0.01}
    async with serve({"away": {"type": "docker", "config": config}}, inside=collector.asking()) as running:
        async with running.client() as client:
            answer = await client.post("/runners", json=launch_body(slot, pool="away"), headers={"traceparent": CALLER})
            assert answer.status_code == 503
        whole, request = await collector.get("runner"), await collector.get("POST /runners")
        calls = [span for span in collector.spans if span.name.startswith("launch in docker")]
    assert request.status.code == Status.STATUS_CODE_ERROR
    assert [said(span)["runner.attempt"] for span in calls] == [1, 2]
    assert all(span.parent_span_id == whole.span_id and span.status.message for span in calls)
    assert said(whole)["runner.reason"] == "engine_unavailable"


async def test_a_runners_span_is_sent_by_whoever_sees_its_end(serve: Serve, slot: Path, collector: Collector) -> None:
    async with serve(inside=collector.asking(), leave_runners=True) as running, running.client() as client:
        runner = await launched(client, launch_body(slot, TELL + WAITS), traceparent=CALLER)
        place = (await told(slot))["TRACEPARENT"]
        await collector.get("POST /runners")
        running.process.kill()
        await asyncio.to_thread(running.process.wait)
    assert collector.find("runner") is None
    async with serve(inside=collector.asking()) as running, running.client() as client:
        (slot / "go").touch()
        await finished(client, runner)
        assert (await collector.get("runner")).span_id.hex() == place.split("-")[2]


async def test_who_names_no_trace_begins_one_and_who_does_not_sample_is_heeded(
    serve: Serve, slot: Path, collector: Collector
) -> None:
    async with serve(inside=collector.asking()) as running, running.client() as client:
        unsampled = CALLER.removesuffix("01") + "00"
        await finished(client, await launched(client, launch_body(slot, TELL), traceparent=unsampled))
        assert (await told(slot))["TRACEPARENT"].endswith("-00")
        (slot / "environ").unlink()
        await finished(client, await launched(client, launch_body(slot, TELL)))
        trace_id = (await told(slot))["TRACEPARENT"].split("-")[1]
        assert not (await collector.get("POST /runners", trace_id)).parent_span_id
        await collector.get("runner", trace_id)
        assert not [span for span in collector.spans if span.trace_id.hex() == TRACE_ID]


async def test_a_collector_that_is_away_holds_up_nothing(serve: Serve, slot: Path) -> None:
    async with serve(inside=Collector(port=9).asking(), mishaps=True) as running, running.client() as client:
        await finished(client, await launched(client, launch_body(slot)))
        async with asyncio.timeout(15):
            assert await running.end() == 0


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER: only otlp and none are understood, not 'zipkin'"),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            "OTEL_EXPORTER_OTLP_PROTOCOL: only http/protobuf is spoken, not 'grpc'",
        ),
    ],
)
def test_what_cannot_be_done_is_told(environ: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigurationError) as told:
        open_tracing(environ)
    assert words == str(told.value)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_SERVICE_NAME": "ours"},
    ],
)
def test_nobody_traces_who_was_not_asked_to(environ: dict[str, str]) -> None:
    assert open_tracing(environ) is None


async def test_without_the_extra_only_who_asks_for_traces_is_refused(serve: Serve, tmp_path: Path) -> None:
    block = tmp_path / "without" / "opentelemetry" / "sdk"
    block.mkdir(parents=True)
    (block / "__init__.py").write_text("raise ImportError('not installed')")
    (tmp_path / "without" / "sitecustomize.py").write_text(
        f"import opentelemetry\nopentelemetry.__path__.insert(0, {str(block.parent)!r})"
    )
    without = {"PYTHONPATH": str(tmp_path / "without")}
    async with serve(inside=["env", f"PYTHONPATH={without['PYTHONPATH']}"]) as running, running.client() as client:
        assert (await client.get("/readyz")).status_code == 200
    environment = {**service_environment(tmp_path), **without, "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "app.cli", "serve"]
    ended = await asyncio.to_thread(subprocess.run, command, env=environment, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 1
    assert "OTEL_EXPORTER_OTLP_ENDPOINT: traces need a library that is not there" in ended.stderr
    assert "pip install ./client '.[telemetry]'" in ended.stderr
    assert "Traceback" not in ended.stderr


async def test_of_two_replicas_the_one_that_acts_tells_each_span(
    postgres: str, tmp_path: Path, slot: Path, collector: Collector
) -> None:
    asking = collector.asking()
    async with replica(tmp_path, postgres, "a", inside=asking) as a, replica(tmp_path, postgres, "b", inside=asking) as b:
        async with a.client() as at_a, b.client() as at_b:
            runner = await launched(at_a, launch_body(slot), traceparent=CALLER)
            await finished(at_b, runner)
            await collector.get("runner")
        for each in (a, b):
            await each.end(signal.SIGTERM)  # and what was to be sent is sent
    ours = [
        span.name for span in collector.spans if span.trace_id.hex() == TRACE_ID and span.kind == Span.SPAN_KIND_INTERNAL
    ]
    assert sorted(ours) == ["launch in local-process", "runner", "see the end", "write the intent"]


# The log.


async def test_the_log_can_be_lines_of_json_with_the_ids_of_what_they_are_about(
    serve: Serve, slot: Path, collector: Collector
) -> None:
    async with serve({"local": local_pool()}, inside=collector.asking(), LOG_FORMAT="json") as running:
        async with running.client() as client:
            headers = {"X-Request-ID": "mine-1", "traceparent": CALLER}
            await finished(client, await launched(client, launch_body(slot), **headers))
        await running.end(signal.SIGTERM)
        lines = [json.loads(line) for line in read(running.output).splitlines()]
        (audit,) = [line for line in lines if line["logger"] == "audit"]
        assert (audit["request_id"], audit["trace_id"], audit["level"]) == ("mine-1", TRACE_ID, "INFO")
        assert "POST /runners: 201" in audit["message"]
        assert audit["time"].endswith("Z")


def test_a_line_tells_the_runner_and_what_went_wrong() -> None:
    record = logging.LogRecord("app", logging.ERROR, "", 0, '%s "failed"\n', ("it",), None)
    try:
        int("such")
    except ValueError:
        record.exc_info = sys.exc_info()
    token = log_lines.runner_id.set("runner-1")
    try:
        line = log_lines.JsonLines().format(record)
    finally:
        log_lines.runner_id.reset(token)
    assert "\n" not in line
    assert json.loads(line)["runner_id"] == "runner-1"
    assert json.loads(line)["message"] == 'it "failed"\n'
    assert "ValueError: invalid literal" in json.loads(line)["exception"]
