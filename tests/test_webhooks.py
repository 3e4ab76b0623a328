"""Webhooks, at a receiver that is real HTTP and behaves as badly as receivers do."""

import asyncio
import base64
import contextlib
import gzip
import hashlib
import hmac
import json
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from conftest import Json, Serve, Service, finished, launch_body, launched, local_pool, problem, until
from test_metrics import of, scraped
from typing_extensions import override

from app.errors import ConfigurationError
from app.targets import load_targets

FOREVER = "sleep 1000"
SECRET = b"a secret of thirty-two bytes ...."
ENDS = ["RunnerCompleted", "RunnerFailed"]


@dataclass
class Call:
    """One POST as it arrived."""

    headers: dict[str, str]
    body: bytes

    @property
    def event(self) -> Json:
        event: Json = json.loads(self.body)
        return event

    @property
    def subject(self) -> str:
        return str(self.event["subject"])

    def signed_by(self, secret: bytes) -> bool:
        content = f"{self.headers['webhook-id']}.{self.headers['webhook-timestamp']}.".encode() + self.body
        digest = base64.b64encode(hmac.digest(secret, content, hashlib.sha256)).decode()
        return f"v1,{digest}" in self.headers["webhook-signature"].split(" ")


Reply = tuple[int, dict[str, str]]


@dataclass
class Receiver:
    """An HTTP server that answers as it is told; ``taken`` are the calls that it said yes to."""

    answer: Callable[[Call], Reply] = lambda _: (204, {})
    calls: list[Call] = field(default_factory=list)
    taken: list[Call] = field(default_factory=list)
    words: bytes = b"no,\n thank you"
    port: int = 0
    _server: ThreadingHTTPServer | None = None

    def open(self) -> None:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                call = Call({key.lower(): value for key, value in self.headers.items()}, body)
                receiver.calls.append(call)
                status, headers = receiver.answer(call)
                if status < 300:
                    receiver.taken.append(call)
                try:
                    self.send_response(status)
                    for key, value in headers.items():
                        self.send_header(key, value)
                    self.end_headers()
                    if status >= 300:
                        self.wfile.write(receiver.words)
                except OSError:
                    pass  # it went away

            do_GET = do_POST  # noqa: N815 - as it is called

            @override
            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def kill(self) -> None:
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def types(self, runner: Json | None = None) -> list[str]:
        """What was taken, of one runner or of all."""
        return [call.event["type"] for call in self.taken if runner is None or call.subject == runner["runner_id"]]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    receiver.open()
    yield receiver
    receiver.kill()


@pytest.fixture
def other() -> Iterator[Receiver]:
    receiver = Receiver()
    receiver.open()
    yield receiver
    receiver.kill()


def secret_line(secret: bytes) -> str:
    return f"whsec_{base64.b64encode(secret).decode()}\n"


def targets(directory: Path, *receivers: Receiver, **more: Any) -> Path:  # noqa: ANN401 - YAML
    """Write a webhooks file with these receivers."""
    (directory / "hook.secret").write_text(secret_line(SECRET))
    entries = [
        {"name": f"target-{number}", "url": f"http://127.0.0.1:{receiver.port}/hook", "secret_file": "hook.secret", **more}
        for number, receiver in enumerate(receivers)
    ]
    path = directory / "webhooks.yaml"
    path.write_text(yaml.safe_dump(entries))
    return path


async def shown(client: httpx.AsyncClient, number: int = 0) -> Json:
    answer = await client.get("/webhooks")
    assert answer.status_code == 200, answer.text
    item: Json = answer.json()["items"][number]
    return item


async def completed(receiver: Receiver, runner: Json) -> None:
    """Wait until a runner's completion was taken."""
    await until(lambda: "RunnerCompleted" in receiver.types(runner))


# What is told.


async def test_a_target_is_told_each_step_in_order_as_signed_cloud_events(
    service: Service, slot: Path, receiver: Receiver, tmp_path: Path
) -> None:
    async with service(webhooks_file=targets(tmp_path, receiver)) as client:
        runner = await launched(client, launch_body(slot, "exit 3"))
        record = await finished(client, runner)
        await until(lambda: "RunnerFailed" in receiver.types())
        assert receiver.types() == ["RunnerAccepted", "RunnerStarted", "RunnerRunning", "RunnerFailed"] or (
            receiver.types() == ["RunnerAccepted", "RunnerStarted", "RunnerFailed"]  # it ended before it was looked at
        )
        for call in receiver.taken:
            assert call.headers["content-type"] == "application/cloudevents+json"
            assert call.signed_by(SECRET)
            assert not call.signed_by(b"another")
            assert abs(time.time() - int(call.headers["webhook-timestamp"])) < 60
            assert call.event["id"] == call.headers["webhook-id"]
            assert call.event["specversion"] == "1.0"
            assert call.event["source"].startswith("urn:runner-launcher:")
            assert call.event["subject"] == runner["runner_id"]
        first, last = receiver.taken[0].event, receiver.taken[-1].event
        assert len({call.event["id"] for call in receiver.taken}) == len(receiver.taken)
        assert [first["data"][name] for name in ("state", "started_at", "pid", "exit_code")] == ["pending", None, None, None]
        same = {name: value for name, value in last["data"].items() if name in record and name != "labels"}
        assert same == {name: record[name] for name in same}
        assert (same["state"], same["reason"], same["exit_code"]) == ("failed", "exit_nonzero", 3)


async def test_a_stop_is_told_as_such_and_an_end_as_what_it_was(
    service: Service, slot: Path, receiver: Receiver, tmp_path: Path
) -> None:
    async with service(webhooks_file=targets(tmp_path, receiver)) as client:
        runner = await launched(client, launch_body(slot, FOREVER))
        await client.delete(runner["links"]["self"])
        await until(lambda: "RunnerFailed" in receiver.types())
        assert "RunnerStopping" in receiver.types()
        assert receiver.taken[-1].event["data"]["reason"] == "cancelled"


async def test_only_what_was_asked_for_is_told(
    service: Service, slot: Path, receiver: Receiver, other: Receiver, tmp_path: Path
) -> None:
    path = targets(tmp_path, receiver, other, events=ENDS)
    entries = yaml.safe_load(path.read_text())
    entries[0]["pools"] = ["other"]
    path.write_text(yaml.safe_dump(entries))
    async with service({"local": local_pool(), "other": local_pool()}, webhooks_file=path) as client:
        await finished(client, await launched(client, launch_body(slot)))
        await finished(client, await launched(client, launch_body(slot, pool="other")))
        await until(lambda: len(other.taken) == 2 and len(receiver.taken) == 1)
        assert other.types() == ["RunnerCompleted", "RunnerCompleted"]
        assert receiver.taken[0].event["data"]["pool_name"] == "other"


async def test_what_happened_before_a_target_was_named_is_not_told(
    service: Service, slot: Path, receiver: Receiver, tmp_path: Path
) -> None:
    async with service() as client:
        before = await launched(client, launch_body(slot))
        await finished(client, before)
    async with service(webhooks_file=targets(tmp_path, receiver, events=ENDS)) as client:
        after = await launched(client, launch_body(slot))
        await finished(client, after)
        await until(lambda: receiver.types(after))
        assert not receiver.types(before)


async def test_what_is_owed_of_a_runner_that_was_forgotten_is_owed_no_more(
    service: Service, slot: Path, receiver: Receiver, tmp_path: Path, state_dir: Path
) -> None:
    path = targets(tmp_path, receiver)
    receiver.kill()
    async with service(webhooks_file=path) as client:
        await finished(client, await launched(client, launch_body(slot)))
        await until(lambda: _failing(client))
    with contextlib.closing(sqlite3.connect(state_dir / "runners.db")) as connection:
        for table in ("runners", "events"):  # as it happens once the file names other targets
            connection.execute(f"DELETE FROM {table}")  # noqa: S608 - one of these
        connection.commit()
    async with service(webhooks_file=path) as client:
        await until(lambda: _settled(client))


# Targets that misbehave.


async def test_what_is_refused_is_sent_again_and_the_order_kept(
    service: Service, slot: Path, receiver: Receiver, tmp_path: Path
) -> None:
    seen: dict[str, int] = {}

    def twice_no(call: Call) -> Reply:
        seen[call.headers["webhook-id"]] = seen.get(call.headers["webhook-id"], 0) + 1
        return (500, {}) if seen[call.headers["webhook-id"]] < 3 else (200, {})

    receiver.answer = twice_no
    async with service(webhooks_file=targets(tmp_path, receiver)) as client:
        runners = [await launched(client, launch_body(slot.with_name(name))) for name in ("a", "b", "c")]
        for runner in runners:
            await finished(client, runner)
            await completed(receiver, runner)
            events = [call.event for call in receiver.taken if call.subject == runner["runner_id"]]
            revisions = [event["data"]["revision"] for event in events]
            assert revisions == sorted(set(revisions))
        assert set(seen.values()) == {3}
        figures = await scraped(client)
        assert of(figures, "webhook_answers_total", target="target-0", outcome="refused") == 2 * len(seen)
        await until(lambda: _settled(client))


async def _settled(client: httpx.AsyncClient) -> bool:
    state = await shown(client)
    return bool((state["state"], state["behind"], state["retrying"], state["parked"]) == ("ok", 0, 0, 0))


async def test_a_runner_that_is_not_taken_holds_up_no_other(
    service: Service, slot: Path, receiver: Receiver, tmp_path: Path
) -> None:
    receiver.answer = lambda call: (500, {}) if call.event["data"]["task_id"] == "poison" else (200, {})
    async with service(webhooks_file=targets(tmp_path, receiver, events=ENDS, attempts=3)) as client:
        poison = await launched(client, launch_body(slot.with_name("poison"), id="poison"))
        await finished(client, poison)
        runner = await launched(client, launch_body(slot))
        await finished(client, runner)
        await until(lambda: receiver.types(runner))
        await until(lambda: _parked(client))
        state = await shown(client)
        assert state["arrears"][0]["runner_id"] == poison["runner_id"]
        assert (state["arrears"][0]["attempts"], state["arrears"][0]["retry_at"]) == (3, None)
        assert state["arrears"][0]["error"] == "HTTP 500: no, thank you"
        assert of(await scraped(client), "webhook_parked_runners", target="target-0") == 1
    receiver.answer = lambda _: (200, {})
    async with service(webhooks_file=targets(tmp_path, receiver, events=ENDS, attempts=3)) as client:  # parked for good
        assert (await shown(client))["parked"] == 1
        assert not receiver.types(poison)
        answer = await client.post("/webhooks/target-0/retry")
        assert (answer.status_code, answer.json()["parked"]) == (200, 0), answer.text
        await until(lambda: receiver.types(poison))
        await until(lambda: _settled(client))


async def _parked(client: httpx.AsyncClient) -> bool:
    return bool((await shown(client))["parked"])


async def test_a_target_that_hangs_holds_up_no_other(
    service: Service, slot: Path, receiver: Receiver, other: Receiver, tmp_path: Path
) -> None:
    hung = threading.Event()

    def hang(_: Call) -> Reply:
        hung.wait(30)
        return 200, {}

    receiver.answer = hang
    try:
        async with service(webhooks_file=targets(tmp_path, receiver, other, timeout_seconds=3)) as client:
            runner = await launched(client, launch_body(slot))
            await finished(client, runner)
            await until(lambda: "RunnerCompleted" in other.types())

            async def late() -> bool:
                return bool((await shown(client))["error"] == "no answer within 3 s")

            await until(late)
            assert (await shown(client, 1))["error"] is None
    finally:
        hung.set()


async def test_a_target_that_was_down_is_told_all_it_missed_also_by_another_service(
    service: Service, slot: Path, receiver: Receiver, tmp_path: Path
) -> None:
    path = targets(tmp_path, receiver)
    receiver.kill()
    async with service(webhooks_file=path) as client:
        runners = [await launched(client, launch_body(slot.with_name(name))) for name in ("a", "b")]
        for runner in runners:
            await finished(client, runner)
        await until(lambda: _failing(client))
    receiver.open()
    async with service(webhooks_file=path) as client:
        for runner in runners:
            await completed(receiver, runner)
            assert receiver.types(runner)[:2] == ["RunnerAccepted", "RunnerStarted"]
        await until(lambda: _settled(client))


async def _failing(client: httpx.AsyncClient) -> bool:
    return bool((await shown(client))["state"] == "failing")


async def test_a_wish_to_wait_is_heeded(service: Service, slot: Path, receiver: Receiver, tmp_path: Path) -> None:
    at: list[float] = []

    def later(_: Call) -> Reply:
        at.append(time.monotonic())
        return (429, {"Retry-After": "1"}) if len(at) == 1 else (200, {})

    receiver.answer = later
    async with service(webhooks_file=targets(tmp_path, receiver)) as client:
        await finished(client, await launched(client, launch_body(slot)))
        await until(lambda: "RunnerCompleted" in receiver.types())
        assert at[1] - at[0] >= 0.95


async def test_a_target_that_is_gone_is_left_alone_until_it_is_retried(
    service: Service, slot: Path, receiver: Receiver, tmp_path: Path
) -> None:
    receiver.answer = lambda _: (410, {})
    path = targets(tmp_path, receiver)
    async with service(webhooks_file=path) as client:
        runner = await launched(client, launch_body(slot))
        await finished(client, runner)
        await until(lambda: _gone(client))
    calls = len(receiver.calls)
    receiver.answer = lambda _: (200, {})
    async with service(webhooks_file=path) as client:  # which knows it still
        assert await _gone(client)
        assert of(await scraped(client), "webhook_gone", target="target-0") == 1
        assert len(receiver.calls) == calls
        await client.post("/webhooks/target-0/retry")
        await until(lambda: "RunnerCompleted" in receiver.types(runner))
        assert receiver.types(runner)[0] == "RunnerAccepted"
        assert not await _gone(client)


async def _gone(client: httpx.AsyncClient) -> bool:
    return bool((await shown(client))["state"] == "gone")


async def test_a_redirect_is_not_followed(
    service: Service, slot: Path, receiver: Receiver, other: Receiver, tmp_path: Path
) -> None:
    receiver.answer = lambda _: (307, {"Location": f"http://127.0.0.1:{other.port}/"})
    async with service(webhooks_file=targets(tmp_path, receiver)) as client:
        await finished(client, await launched(client, launch_body(slot)))
        await until(lambda: _failing(client))
        assert (await shown(client))["error"].startswith("HTTP 307")
        assert not other.calls


# The service that dies, and is told anew.


async def test_a_killed_service_tells_all_again_that_it_had_not_noted_and_in_order(
    serve: Serve, slot: Path, receiver: Receiver, tmp_path: Path
) -> None:
    path = str(targets(tmp_path, receiver))
    runners = []
    for round_ in range(3):
        killed = threading.Event()

        def answer(call: Call, killed: threading.Event = killed, round_: int = round_) -> Reply:
            """Take the end of a runner, and let the service be killed before it hears of that."""
            if call.event["type"] == "RunnerCompleted" and call.event["data"]["task_id"] == f"{round_}":
                killed.wait(20)
            return 200, {}

        receiver.answer = answer
        async with serve(WEBHOOKS_FILE=path) as running, running.client() as client:
            runner = await launched(client, launch_body(slot, id=f"{round_}"))
            runners.append(runner)
            await finished(client, runner)
            await until(lambda: runners[-1]["runner_id"] in _ended(receiver.calls))
            os.kill(running.process.pid, signal.SIGKILL)
            await asyncio.to_thread(running.process.wait)
            killed.set()
    receiver.answer = lambda _: (200, {})
    async with serve(WEBHOOKS_FILE=path) as running, running.client() as client:
        await until(lambda: _settled(client))
    for runner in runners:
        assert _ended(receiver.taken).count(runner["runner_id"]) >= 2, "taken, not noted, and so told again"
        ids = [call.event["id"] for call in receiver.taken if call.subject == runner["runner_id"]]
        firsts = list(dict.fromkeys(ids))
        assert firsts == sorted(firsts, key=lambda each: int(each.rpartition("-")[2]))


def _ended(calls: list[Call]) -> list[str]:
    return [call.subject for call in calls if call.event["type"] == "RunnerCompleted"]


async def test_a_secret_is_changed_without_a_gap_and_a_wrong_file_changes_nothing(
    serve: Serve, slot: Path, receiver: Receiver, tmp_path: Path
) -> None:
    path, new = targets(tmp_path, receiver), b"the secret that comes after it...."
    async with serve(WEBHOOKS_FILE=str(path)) as running, running.client() as client:
        (tmp_path / "hook.secret").write_text(secret_line(SECRET) + secret_line(new))
        running.process.send_signal(signal.SIGHUP)
        await running.says("the webhooks were read again")
        await finished(client, await launched(client, launch_body(slot)))
        await until(lambda: "RunnerCompleted" in receiver.types())
        assert all(call.signed_by(SECRET) and call.signed_by(new) for call in receiver.taken)
        (tmp_path / "hook.secret").write_text("whsec_short\n")
        running.process.send_signal(signal.SIGHUP)
        await running.says("the webhooks stay as they were: ")
        await running.says("0.secret_file")
        receiver.taken.clear()
        await finished(client, await launched(client, launch_body(slot)))
        await until(lambda: "RunnerCompleted" in receiver.types())


# The file.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"url": "ftp://example.org/"}, "0.url: must look like https://host/path"),
        ({"url": "https://user:pass@example.org/"}, "0.url: must hold no user, password"),
        ({"url": "https://example.org:99999/"}, "0.url: "),
        ({"name": "Task Registry"}, "0.name: "),
        ({"events": ["RunnerExploded"]}, "0.events.0: "),
        ({"attempts": 0}, "0.attempts: "),
        ({"timeout_seconds": 600}, "0.timeout_seconds: "),
        ({"secrt_file": "x"}, "0.secrt_file: "),
        ({"secret_file": "no-such-file"}, "0.secret_file: "),
        ({"secret_file": "short.secret"}, "line 1: must be whsec_"),
        ({"secret_file": "empty.secret"}, "no secret in it"),
    ],
)
def test_a_wrong_file_is_told_by_file_key_and_reason(tmp_path: Path, receiver: Receiver, change: Json, words: str) -> None:
    (tmp_path / "short.secret").write_text("whsec_aGVsbG8=\n")
    (tmp_path / "empty.secret").write_text("\n")
    path = targets(tmp_path, receiver, **change)
    with pytest.raises(ConfigurationError) as told:
        load_targets(path)
    assert words in str(told.value)
    assert str(path) in str(told.value)
    assert "aGVsbG8" not in str(told.value)


def test_a_name_is_one_target(tmp_path: Path, receiver: Receiver) -> None:
    path = targets(tmp_path, receiver)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) * 2))
    with pytest.raises(ConfigurationError, match="named twice"):
        load_targets(path)


@pytest.mark.parametrize("text", ["{", "name: x", "- 3", "\tx"])
def test_what_is_no_list_of_targets_is_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "webhooks.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=r"webhooks\.yaml"):
        load_targets(path)


async def test_an_unknown_target_cannot_be_retried(service: Service) -> None:
    async with service() as client:
        assert (await client.get("/webhooks")).json() == {"items": []}
        problem(await client.post("/webhooks/nobody/retry"), 404, "not-found", words="nobody")


async def test_an_answer_in_no_text_is_told_in_text_alone(
    service: Service, slot: Path, receiver: Receiver, tmp_path: Path
) -> None:
    receiver.answer, receiver.words = (lambda _: (500, {"Content-Encoding": "gzip"})), gzip.compress(b"no") + b"\0 no"
    async with service(webhooks_file=targets(tmp_path, receiver, events=ENDS, attempts=1)) as client:
        await finished(client, await launched(client, launch_body(slot)))
        await until(lambda: _parked(client))
        error = (await shown(client))["arrears"][0]["error"]
        assert error.startswith("HTTP 500: ")
        assert error.isprintable()
        assert {call.headers["accept-encoding"] for call in receiver.calls} == {"identity"}


async def test_a_clock_that_is_set_back_holds_up_nothing_that_was_wished_for(
    service: Service, slot: Path, receiver: Receiver, tmp_path: Path
) -> None:
    clock = Clock()
    receiver.answer = lambda _: (429, {"Retry-After": "2"}) if len(receiver.calls) == 1 else (204, {})
    async with service(webhooks_file=targets(tmp_path, receiver, events=ENDS), now=clock) as client:
        runner = await launched(client, launch_body(slot))
        await finished(client, runner)
        await until(lambda: receiver.calls)
        clock.set_by = -86_400.0
        second = await launched(client, launch_body(slot.with_name("second")))
        await finished(client, second)
        await completed(receiver, second)


class Clock:
    """A clock that can be set."""

    set_by = 0.0

    def __call__(self) -> float:
        return time.time() + self.set_by
