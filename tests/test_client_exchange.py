"""What the client decides without a service: how an exchange goes on, what is read and written, where the service is."""

import json
from collections.abc import AsyncIterator, Callable
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

import httpx
import pytest
from runner_launcher_client import (
    AgentPool,
    Heartbeat,
    InvalidRequestError,
    PoolFullError,
    PoolType,
    Runner,
    RunnerLaunchError,
    TaskContext,
    UnavailableError,
)
from runner_launcher_client.address import Address, find_address
from runner_launcher_client.exchange import Call, Conversation, Exchange, Patience, Pause
from runner_launcher_client.request import launch_request
from runner_launcher_client.server_sent import events_of

RUNNER: dict[str, Any] = {
    "runner_id": "runner-0123456789ab",
    "task_id": "7",
    "pool_name": "local",
    "slot_id": "slot-1",
    "state": "running",
    "started_at": "2026-01-05T09:30:00.412000Z",
}
PENDING = {**RUNNER, "state": "pending", "started_at": None}
LAUNCH = {"task": {"id": "7"}, "slot": {}, "pool": "local"}


def answer(status: int, body: object = "", **headers: str) -> httpx.Response:
    text = body if isinstance(body, str) else json.dumps(body)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Response(status, headers=named, text=text, request=httpx.Request("POST", "http://localhost/runners"))


def refused(status: int, code: str, *, retryable: bool, **more: object) -> httpx.Response:
    return answer(status, {"title": "", "detail": f"it is {code}", "code": code, "retryable": retryable, **more})


def failed(reason: str, *, retryable: bool) -> httpx.Response:
    runner = {**RUNNER, "state": "failed", "started_at": None, "reason": reason, "retryable": retryable}
    return refused(503, reason, retryable=retryable, runner=runner)


def play(steps: Exchange[Any], *answers: httpx.Response | httpx.RequestError) -> tuple[Any, list[Call], list[float]]:
    """Take an exchange's steps with these answers, in no time; give its result or error, its calls and its pauses."""
    calls: list[Call] = []
    pauses: list[float] = []
    script = iter(answers)
    try:
        step = next(steps)
        while True:
            if isinstance(step, Pause):
                pauses.append(step.seconds)
                step = next(steps)
                continue
            calls.append(step)
            said = next(script)
            step = steps.throw(said) if isinstance(said, Exception) else steps.send(said)
    except StopIteration as end:
        assert next(script, None) is None
        return end.value, calls, pauses
    except Exception as error:  # noqa: BLE001 - it is what the test looks at
        assert next(script, None) is None
        return error, calls, pauses


def conversation(**patience: Any) -> Conversation:  # noqa: ANN401 - as Patience has them
    return Conversation(Address("http://localhost", "secret"), Patience(**patience))


# Launches.


def test_a_launch_is_repeated_under_its_key_until_it_is_answered() -> None:
    troubles: list[httpx.Response | httpx.RequestError] = [httpx.ReadTimeout(""), answer(502, "<html>"), answer(504)]
    troubles.append(refused(503, "draining", retryable=True))
    runner, calls, pauses = play(conversation().launch(LAUNCH), *troubles, answer(201, RUNNER))
    assert runner == Runner.from_dict(RUNNER)
    assert len({call.headers["Idempotency-Key"] for call in calls}) == 1
    assert len(pauses) == 4
    assert all(0 <= pause <= 0.2 * 2**number for number, pause in enumerate(pauses, 1))


def test_two_launches_have_two_keys() -> None:
    keys = [play(conversation().launch(LAUNCH), answer(201, RUNNER))[1][0].headers["Idempotency-Key"] for _ in range(2)]
    assert keys[0] != keys[1]


def test_the_services_wish_is_heeded() -> None:
    busy = refused(429, "pool-full", retryable=True)
    busy.headers["Retry-After"] = "4"
    _, _, pauses = play(conversation().launch(LAUNCH), busy, answer(201, RUNNER))
    assert 4 <= pauses[0] < 5


def test_a_wish_that_goes_beyond_patience_ends_it_at_once() -> None:
    busy = refused(429, "pool-full", retryable=True)
    busy.headers["Retry-After"] = "61"
    error, _, pauses = play(conversation().launch(LAUNCH), busy)
    assert isinstance(error, PoolFullError)
    assert (error.retry_after, pauses) == (61, [])


def test_a_launch_that_failed_is_final_under_its_key() -> None:
    error, calls, _ = play(conversation().launch(LAUNCH), failed("engine_unavailable", retryable=True))
    assert isinstance(error, RunnerLaunchError)
    assert (error.runner and error.runner.runner_id, error.retryable, len(calls)) == (RUNNER["runner_id"], True, 1)


def test_a_launch_that_may_pass_is_made_anew_under_another_key_as_often_as_was_asked_for() -> None:
    away = failed("engine_unavailable", retryable=True)
    error, calls, pauses = play(conversation().launch_again(LAUNCH, attempts=3), away, away, away)
    assert isinstance(error, RunnerLaunchError)
    assert (len({call.headers["Idempotency-Key"] for call in calls}), len(pauses)) == (3, 2)
    runner, _, _ = play(conversation().launch_again(LAUNCH, attempts=3), away, answer(201, RUNNER))
    assert runner.accepted


def test_a_service_that_restarts_is_no_attempt_and_a_full_pool_is_one() -> None:
    draining, full = refused(503, "draining", retryable=True), refused(429, "pool-full", retryable=True)
    patience = conversation(refusals=2)
    runner, _, _ = play(patience.launch(LAUNCH), *[draining] * 5, full, httpx.ReadTimeout(""), answer(201, RUNNER))
    assert runner.accepted
    error, _, _ = play(patience.launch(LAUNCH), full, draining, full)
    assert isinstance(error, PoolFullError)


def test_a_launch_that_cannot_work_is_not_made_anew() -> None:
    error, calls, _ = play(conversation().launch_again(LAUNCH, attempts=3), failed("launch_rejected", retryable=False))
    assert isinstance(error, RunnerLaunchError)
    assert len(calls) == 1


def test_a_launch_that_goes_on_is_followed_by_its_record() -> None:
    steps = conversation().launch(LAUNCH)
    runner, calls, _ = play(
        steps, answer(202, PENDING), answer(200, PENDING, ETag='W/"3"'), answer(304), answer(200, RUNNER, ETag='W/"4"')
    )
    assert runner.accepted
    assert [call.method for call in calls] == ["POST", "GET", "GET", "GET"]
    assert calls[0].headers["Prefer"] == "wait=30"
    assert calls[2].headers == {"If-None-Match": 'W/"3"', "Prefer": "wait=30"}


def test_a_followed_launch_that_fails_is_told_like_one_that_failed_at_once() -> None:
    ended = {**PENDING, "state": "failed", "reason": "queue_timeout", "message": "no place", "retryable": True}
    error, _, _ = play(conversation().launch(LAUNCH), answer(202, PENDING), answer(200, ended))
    assert isinstance(error, RunnerLaunchError)
    assert (str(error), error.code, error.retryable) == ("no place", "queue_timeout", True)


def test_who_does_not_wait_asks_for_no_wait() -> None:
    runner, calls, _ = play(conversation().launch(LAUNCH, wait=0), answer(202, PENDING))
    assert runner.state == "pending"
    assert calls[0].headers["Prefer"] == "respond-async"


def test_a_poll_that_is_answered_too_soon_is_not_repeated_at_once() -> None:
    steps = conversation().finished("runner-0123456789ab")
    ended = {**RUNNER, "state": "completed"}
    _, _, pauses = play(steps, answer(200, RUNNER, ETag='W/"3"'), answer(304), answer(304), answer(200, ended))
    assert len(pauses) == 2
    assert all(0.1 <= pause <= 0.5 for pause in pauses)


def test_a_service_that_does_not_wait_at_all_is_polled_gently() -> None:
    steps = conversation().finished("runner-0123456789ab")
    ended = {**RUNNER, "state": "completed", "revision": 4}
    _, calls, pauses = play(steps, answer(200, RUNNER), answer(200, RUNNER), answer(200, ended))
    assert (len(pauses), calls[1].headers["If-None-Match"]) == (1, 'W/"0"')


def test_a_key_that_no_header_can_carry_is_refused() -> None:
    for key in ("schlüssel", "two\nlines"):
        error, calls, _ = play(conversation().launch(LAUNCH, key=key))
        assert isinstance(error, InvalidRequestError)
        assert calls == []


def test_a_problem_that_is_none_is_told_all_the_same() -> None:
    odds: list[object] = [
        {"runner": {"state": "odd"}},
        {"runner": 7},
        {"errors": [7]},
        {"errors": {}},
        {"detail": None},
        [7],
    ]
    for odd in odds:
        error, _, _ = play(conversation().launch(LAUNCH), answer(422, odd))
        assert isinstance(error, InvalidRequestError)
        assert str(error)


def test_refusals_that_are_for_good_are_not_repeated() -> None:
    for status in (400, 401, 403, 404, 409, 410, 413, 421, 422, 500):
        error, calls, _ = play(conversation().launch(LAUNCH), refused(status, "no", retryable=False))
        assert (str(error), len(calls)) == ("it is no", 1)


def test_an_address_that_no_protocol_serves_is_told_at_once() -> None:
    error, _, pauses = play(conversation().get("x"), httpx.UnsupportedProtocol("no such protocol"))
    assert isinstance(error, UnavailableError)
    assert pauses == []


# What is written.


class Kind(Enum):
    HARD = "hard"


def test_a_launch_is_written_from_objects_of_any_kind() -> None:
    task = {"id": "7", "metadata": {"kind": Kind.HARD, "path": PurePosixPath("/a"), "numbers": (1, 2.5, True, None)}}
    pool = AgentPool("local", PoolType.LOCAL_PROCESS, 2, memory_quota=512)
    slot = {"slot_id": "s", "slot_path": Path("/slots/s"), "repo_url": "", "more": object()}
    assert launch_request(task, slot, pool) == {
        "task": {"id": "7", "metadata": {"kind": "hard", "path": "/a", "numbers": [1, 2.5, True, None]}},
        "slot": {"slot_id": "s", "slot_path": "/slots/s", "repo_url": ""},
        "pool": {
            "name": "local",
            "type": "local-process",
            "max_concurrency": 2,
            "memory_quota": 512,
            "enabled": True,
            "config": {},
        },
    }


def endless() -> list[Any]:
    inner: list[Any] = []
    inner.append(inner)
    return inner


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({1, 2}, "/task/metadata/x: a set cannot travel as JSON"),
        (object, "/task/metadata/x: a type cannot travel as JSON"),
        (b"bytes", "/task/metadata/x: a bytes cannot"),
        (float("nan"), "/task/metadata/x: a float cannot"),
        ({"deep": [{}, {"y": 1j}]}, "/task/metadata/x/deep/1/y: a complex cannot"),
        ({1: "one"}, "/task/metadata/x: JSON knows text alone as keys"),
        ("\ud800", "/task/metadata/x: holds half of a surrogate pair"),
        (endless(), "nests deeper than 100"),
    ],
)
def test_what_json_cannot_carry_is_refused_with_its_place(value: object, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        launch_request({"id": "7", "metadata": {"x": value}}, {}, "local")


def test_what_is_missing_is_refused_with_its_place() -> None:
    with pytest.raises(InvalidRequestError, match="/task/id: is missing in this dict"):
        launch_request({}, {}, "local")
    with pytest.raises(InvalidRequestError, match="/slot/slot_path: is missing in this dict"):
        launch_request({"id": "7"}, {"slot_id": "s", "slot_path": None}, object())


# What is read.


def test_what_a_newer_service_says_is_kept() -> None:
    newer = {**RUNNER, "mood": "good", "phase": "dreaming", "attempts": [{**ATTEMPT, "again": 1}]}
    runner = Runner.from_dict(newer)
    assert (runner.extra, runner.phase, runner.attempts[0].extra) == ({"mood": "good"}, "dreaming", {"again": 1})
    assert {key: value for key, value in runner.to_dict().items() if key in newer} == newer
    assert Runner.from_dict(runner.to_dict()) == runner


ATTEMPT = {"number": 1, "at": "2026-01-05T09:30:00Z", "error": "connection refused", "retryable": True, "delay_seconds": 0.1}


def test_a_record_of_the_old_system_is_read() -> None:
    old = {**RUNNER, "started_at": "2026-01-05T09:30:00", "pid": 7, "container_id": None, "job_name": None}
    assert Runner.from_dict(old).pid == 7


def test_a_pool_and_a_context_are_read_as_they_were_written() -> None:
    pool = AgentPool("docker", PoolType.DOCKER, 4, cpu_quota=2, memory_quota=4096, config={"image": "a:b"})
    assert AgentPool.from_dict({**pool.to_dict(), "new": 1}) == pool
    assert pool.to_dict()["type"] == "docker"
    context = TaskContext("7", task_title="Grüße", metadata={"a": 1})
    assert TaskContext.from_dict({**context.to_dict(), "new": 1}) == context
    assert len(context.to_dict()) == 11
    assert "Grüße" in context.to_json()
    with pytest.raises(KeyError):
        TaskContext.from_environment({})


# Event streams.


async def pieces(*parts: str) -> AsyncIterator[bytes]:
    for part in parts:
        yield part.encode()


STREAM = (
    ": comment\n\nid: 6\nevent: hello\nretry: 2000\ndata: {}\n\n"
    'id: 7\nevent: finished\ndata: {"revision": 7, "at": "2026-01-05T09:30:00Z",\ndata: "type": "finished",'
    ' "to": "finished"}\n\n'
    'event: bye\ndata: {"detail": "going down"}\n\n'
    'id: 8\nevent: started\ndata: {"at": "2026-01-05T09:30:01Z", "runner_id": "runner-1"}\n\n'
    'id: 9\ndata: {"at": "cut'
)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("cut", [lambda text: [text], list], ids=["whole", "byte by byte"])
async def test_an_event_stream_is_read_however_it_is_cut(end: str, cut: Callable[[str], list[str]]) -> None:
    told = [each async for each in events_of(pieces(*cut(STREAM.replace("\n", end))))]
    assert [place for place, _ in told] == [6, 7, 7, 8]
    events = [event for _, event in told if event]
    assert [(event.revision, event.type, event.to_phase, event.runner_id) for event in events] == [
        (7, "finished", "finished", None),
        (8, "started", None, "runner-1"),
    ]


# Where the service is.


@pytest.mark.parametrize(
    ("environment", "url"),
    [
        ({}, "http://127.0.0.1:8080"),
        ({"RUNNER_LAUNCHER_LISTEN": "0.0.0.0:9000"}, "http://127.0.0.1:9000"),
        ({"RUNNER_LAUNCHER_LISTEN": "[::]:9000"}, "http://[::1]:9000"),
        ({"RUNNER_LAUNCHER_URL": "https://launcher.example/", "RUNNER_LAUNCHER_LISTEN": "x"}, "https://launcher.example"),
    ],
)
def test_the_service_is_where_the_environment_says(environment: dict[str, str], url: str) -> None:
    assert find_address(environment=environment).url == url


@pytest.mark.parametrize("url", ["localhost:8080", "ftp://a", "http://", "http://a b", "http://a:x", "http://a:0", "\n"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequestError, match="RUNNER_LAUNCHER_URL"):
        find_address(url)


def found(environment: dict[str, str]) -> str | None:
    return find_address(environment=environment).token


def test_the_token_is_looked_for_where_the_service_keeps_it(tmp_path: Path) -> None:
    default = tmp_path / ".local" / "state" / "runner-launcher"
    default.mkdir(parents=True)
    (default / "token").write_text("at-home\n")
    home = {"HOME": str(tmp_path)}
    assert found(home) == "at-home"
    assert found({**home, "RUNNER_LAUNCHER_TOKEN": "said"}) == "said"
    assert found({"RUNNER_LAUNCHER_STATE_DIR": str(default)}) == "at-home"
    missing = find_address(environment={**home, "XDG_STATE_HOME": str(tmp_path)}).missing
    assert missing.endswith("runner-launcher/token cannot be read (No such file or directory)")


def test_the_token_of_the_service_at_home_is_sent_nowhere_else_unless_asked_for(tmp_path: Path) -> None:
    default = tmp_path / ".local" / "state" / "runner-launcher"
    default.mkdir(parents=True)
    (default / "token").write_text("at-home\n")
    away = {"HOME": str(tmp_path), "RUNNER_LAUNCHER_URL": "http://launcher.example"}
    assert found(away) is None
    assert found({**away, "RUNNER_LAUNCHER_STATE_DIR": str(default)}) == "at-home"


def test_a_token_that_cannot_be_sent_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="one word of ASCII"):
        find_address(token="two\nlines")  # noqa: S106


def test_by_hand_there_is_nobody_to_beat_for() -> None:
    with Heartbeat(environment={}) as heart:
        assert not heart.needed
        assert not heart.beat()
