"""What no launch can be made of, and programs that misbehave: each is told in words, and none does harm."""

import asyncio
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import (
    TELL,
    Json,
    Service,
    alive,
    finished,
    launch_body,
    launched,
    local_pool,
    problem,
    read,
    record_of,
    told,
    until,
    written,
)

MEBIBYTE = 1024 * 1024
LEFT_OUT = object()
AS_JSON = {"Content-Type": "application/json"}


def changed(body: Json, pointer: str, value: object) -> Json:
    """Give a body with something else, or nothing, in one place."""
    body = copy.deepcopy(body)
    *path, last = pointer.removeprefix("/").split("/")
    place: Any = body
    for name in path:
        place = place[name]
    if value is LEFT_OUT:
        del place[last]
    else:
        place[last] = value
    return body


def repr_of(body: bytes) -> str:
    return repr(body[:20])


async def refused(
    client: httpx.AsyncClient, body: Json | bytes, status: int, code: str, *pointers: str, words: str = ""
) -> None:
    """Check that a launch is refused so, and leaves nothing."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = await client.post("/runners", content=content, headers=AS_JSON)
    problem(answer, status, code, *pointers, words=words)
    assert (await client.get("/runners")).json()["items"] == []


# What is not JSON, or not a launch.


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"{'task': 1}",
        b'{"task": {"id": "7"},}',
        b'{"task": {"id": "7"}} {}',
        b'{"task": {"id": "7\x00"}}',
        b"\xff\xfe",
        b'{"task": "\xff"}',
        b"[" * 100_000,
        b'{"n": ' + b"9" * 100_000 + b"}",
    ],
    ids=repr_of,
)
async def test_what_is_not_json_cannot_be_read(client: httpx.AsyncClient, body: bytes) -> None:
    await refused(client, body, 400, "unparsable")


async def test_a_launch_without_a_body_is_none(client: httpx.AsyncClient) -> None:
    await refused(client, b"", 422, "invalid", "", words="a JSON body is needed")


@pytest.mark.parametrize("body", [b"[]", b"7", b'"local"', b"null", b"true"])
async def test_json_that_is_no_object_is_no_launch(client: httpx.AsyncClient, body: bytes) -> None:
    await refused(client, body, 422, "invalid", "", words="the body")


@pytest.mark.parametrize(
    ("pointer", "value", "words"),
    [
        ("/task", LEFT_OUT, "required"),
        ("/task", None, ""),
        ("/task", "7", ""),
        ("/task", [], ""),
        ("/task/id", LEFT_OUT, "required"),
        ("/task/id", None, "required"),
        ("/task/id", 7, "string"),
        ("/task/id", "", "at least 1"),
        ("/task/id", {"$ne": ""}, "string"),
        ("/task/title", 7, "string"),
        ("/task/title", ["a"], "string"),
        ("/task/description", False, "string"),
        ("/task/dependencies", "5", "list"),
        ("/task/dependencies", {"5": "6"}, "list"),
        ("/task/metadata", [], "dictionary"),
        ("/task/metadata", "{}", "dictionary"),
        ("/task/reserved_branch", 1, "string"),
        ("/task/required_skill", "", "at least 1"),
        ("/slot", LEFT_OUT, "required"),
        ("/slot", [], ""),
        ("/slot/slot_id", LEFT_OUT, "required"),
        ("/slot/slot_id", 1, "string"),
        ("/slot/slot_id", "", "at least 1"),
        ("/slot/slot_path", None, "string"),
        ("/slot/slot_path", 1, "string"),
        ("/slot/repo_url", LEFT_OUT, "required"),
        ("/slot/repo_url", None, "string"),
        ("/pool", LEFT_OUT, "required"),
        ("/pool", None, "must be a pool's name, or an object with one"),
        ("/pool", 7, "must be a pool's name, or an object with one"),
        ("/pool", ["local"], "must be a pool's name, or an object with one"),
        ("/pool", "", "at least 1"),
    ],
)
async def test_a_value_of_the_wrong_kind_is_pointed_at(
    client: httpx.AsyncClient, slot: Path, pointer: str, value: object, words: str
) -> None:
    await refused(client, changed(launch_body(slot), pointer, value), 422, "invalid", pointer, words=words)


@pytest.mark.parametrize(
    ("pool", "pointer"), [({}, "/pool/name"), ({"name": 7}, "/pool/name"), ({"name": ""}, "/pool/name")]
)
async def test_a_pool_object_needs_a_name(client: httpx.AsyncClient, slot: Path, pool: Json, pointer: str) -> None:
    await refused(client, launch_body(slot, pool=pool), 422, "invalid", pointer)


async def test_everything_wrong_is_told_at_once(client: httpx.AsyncClient, slot: Path) -> None:
    body = launch_body(slot, id=7, dependencies=[1, "ok", 2])
    body["slot"]["slot_path"] = "relative"
    wrong = ("/task/id", "/task/dependencies/0", "/slot/slot_path")
    await refused(client, body, 422, "invalid", *wrong)


@pytest.mark.parametrize(
    "pointer", ["/task/id", "/task/spec_name", "/task/required_skill", "/task/reserved_branch", "/slot/slot_id", "/pool"]
)
@pytest.mark.parametrize("text", ["a\0b", "a\nb", "\x1b[31m", "\x7f"])
async def test_a_name_with_control_characters_is_refused(
    client: httpx.AsyncClient, slot: Path, pointer: str, text: str
) -> None:
    words = "must not hold control characters"
    await refused(client, changed(launch_body(slot), pointer, text), 422, "invalid", pointer, words=words)


async def test_a_dependency_with_control_characters_is_refused(client: httpx.AsyncClient, slot: Path) -> None:
    await refused(client, launch_body(slot, dependencies=["a", "b\0"]), 422, "invalid", "/task/dependencies/1")


@pytest.mark.parametrize(
    "pointer", ["/task/id", "/task/title", "/task/description", "/task/metadata", "/slot/repo_url", "/slot/slot_path"]
)
async def test_half_a_surrogate_pair_is_refused(client: httpx.AsyncClient, slot: Path, pointer: str) -> None:
    value: object = {"key": ["\ud800"]} if pointer == "/task/metadata" else "/\ud800"
    body = json.dumps(changed(launch_body(slot), pointer, value)).encode()
    await refused(client, body, 422, "invalid", pointer, words="half of a surrogate pair")


async def test_prose_may_hold_any_character(client: httpx.AsyncClient, slot: Path) -> None:
    prose = "zero \0, bell \a, line\r\n, \x7f, 👋, \u2028, \ufffe"
    await launched(client, launch_body(slot, TELL, title=prose, description=prose, metadata={prose: prose}))
    context = json.loads((await told(slot))["TASK_CONTEXT"])
    assert (context["task_title"], context["metadata"]) == (prose, {prose: prose})


@pytest.mark.parametrize("pointer", ["/task/id", "/task/spec_name", "/task/reserved_branch", "/slot/slot_id", "/pool"])
async def test_a_name_of_10_000_characters_is_refused(client: httpx.AsyncClient, slot: Path, pointer: str) -> None:
    await refused(client, changed(launch_body(slot), pointer, "x" * 10_000), 422, "invalid", pointer, words="at most 1024")


async def test_a_runners_id_of_10_000_characters_is_not_found(client: httpx.AsyncClient) -> None:
    problem(await client.get(f"/runners/{'x' * 10_000}"), 404, "not-found")


@pytest.mark.parametrize("runner_id", ["..%2f..%2ftoken", "%00", "%ff", "runner-'; drop table runners", "*"])
@pytest.mark.parametrize("call", ["", "/logs", "/events"])
async def test_a_runners_id_that_is_none_is_not_found(client: httpx.AsyncClient, runner_id: str, call: str) -> None:
    answer = await client.get(f"/runners/{runner_id}{call}")
    assert (answer.status_code, answer.json()["code"]) == (404, "not-found")


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


@pytest.mark.parametrize("depth", [101, 5_000, 50_000])
@pytest.mark.parametrize("pointer", ["/task/metadata", "/pool"])
async def test_nesting_deeper_than_100_is_refused(client: httpx.AsyncClient, slot: Path, depth: int, pointer: str) -> None:
    deep = b'{"name": "x", "a": ' + nested(depth - 1) + b"}"
    body = json.dumps(changed(launch_body(slot), pointer, "HERE")).encode().replace(b'"HERE"', deep)
    answer = await client.post("/runners", content=body, headers=AS_JSON)
    if answer.status_code == 400:  # deeper than any reader of JSON goes
        problem(answer, 400, "unparsable")
    else:
        problem(answer, 422, "invalid", pointer, words="must not nest deeper than 100")
    assert (await client.get("/runners")).json()["items"] == []


async def test_nesting_of_100_is_told_to_the_runner(client: httpx.AsyncClient, slot: Path) -> None:
    metadata = json.loads(nested(100))
    await launched(client, launch_body(slot, TELL, metadata=metadata))
    assert json.loads((await told(slot))["TASK_CONTEXT"])["metadata"] == metadata


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
async def test_a_number_that_json_does_not_have_is_refused(client: httpx.AsyncClient, slot: Path, number: str) -> None:
    body = json.dumps(launch_body(slot, metadata={"n": "HERE"})).encode().replace(b'"HERE"', number.encode())
    answer = await client.post("/runners", content=body, headers=AS_JSON)
    if answer.status_code == 400:
        problem(answer, 400, "unparsable", words="not JSON")
    else:
        problem(answer, 422, "invalid", "/task/metadata", words="must not hold NaN or Infinity")


# The context's size.


async def test_a_context_of_900_000_bytes_works(client: httpx.AsyncClient, slot: Path) -> None:
    body = launch_body(slot, 'wc -c <"$TASK_CONTEXT_FILE" >size', description="x" * 900_000)
    await launched(client, body)
    assert 900_000 < int(await written(slot / "size")) < 901_000


async def test_a_context_is_measured_as_the_runner_gets_it(client: httpx.AsyncClient, slot: Path) -> None:
    body = launch_body(slot, 'wc -c <"$TASK_CONTEXT_FILE" >size', description="é" * 450_000)
    assert len(json.dumps(body)) > 2_000_000  # as escapes, on the way here
    await launched(client, body)
    assert 900_000 < int(await written(slot / "size")) < 901_000


@pytest.mark.parametrize("description", ["x" * 1_100_000, "é" * 550_000])
async def test_a_context_of_1_100_000_bytes_is_too_large(client: httpx.AsyncClient, slot: Path, description: str) -> None:
    body = launch_body(slot, description=description)
    await refused(client, body, 413, "context-too-large", "/task", words="and 1000000 is the most")


async def test_a_context_of_50_mb_is_too_large(client: httpx.AsyncClient, slot: Path) -> None:
    body = launch_body(slot, description="x" * 50_000_000)
    await refused(client, body, 413, "too-large", words="is the most")


# The pool.


async def test_a_pool_that_is_not_configured_is_unknown(client: httpx.AsyncClient, slot: Path) -> None:
    words = "no pool named nowhere is configured; there are: local"
    await refused(client, launch_body(slot, pool="nowhere"), 422, "unknown-pool", "/pool", words=words)


async def test_a_pool_that_is_off_in_its_file_takes_nothing(service: Service, slot: Path) -> None:
    async with service({"local": local_pool(enabled=False)}) as client:
        words = "pool local is switched off"
        await refused(client, launch_body(slot), 422, "pool-disabled", "/pool", words=words)


async def test_a_full_pool_takes_nothing_more(service: Service, slot: Path) -> None:
    async with service({"local": local_pool(max_concurrency=1)}) as client:
        await launched(client, launch_body(slot, "exec sleep 600"))
        answer = await client.post("/runners", json=launch_body(slot.with_name("slot-2")))
        problem(answer, 429, "pool-full", words="pool local holds 1 runner, and its max_concurrency is 1")


MINE: Json = {"name": "mine", "type": "local-process"}
DOCKER: Json = {"name": "mine", "type": "docker"}


@pytest.mark.parametrize(
    ("pool", "pointer", "words"),
    [
        ({"name": "mine"}, "/pool/type", "required"),
        (MINE | {"type": "lambda"}, "/pool/type", "'local-process', 'docker' or 'kubernetes'"),
        (MINE | {"type": 7}, "/pool/type", ""),
        (MINE | {"max_concurrency": 0}, "/pool/max_concurrency", "greater than or equal to 1"),
        (MINE | {"max_concurrency": -1}, "/pool/max_concurrency", "greater than or equal to 1"),
        (MINE | {"max_concurrency": "2"}, "/pool/max_concurrency", "integer"),
        (MINE | {"cpu_quota": 0}, "/pool/cpu_quota", "greater than 0"),
        (MINE | {"cpu_quota": -1}, "/pool/cpu_quota", "greater than 0"),
        (MINE | {"memory_quota": 0}, "/pool/memory_quota", "greater than or equal to 1"),
        (MINE | {"memory_quota": -512}, "/pool/memory_quota", "greater than or equal to 1"),
        (MINE | {"memory_quota": True}, "/pool/memory_quota", "integer"),
        (MINE | {"config": {"resources": {"cpu_limit": -1}}}, "/pool/config/resources/cpu_limit", "positive number"),
        (MINE | {"config": {"resources": {"memory_limit": 0}}}, "/pool/config/resources/memory_limit", ""),
        (MINE | {"config": {"labels": {"a": 1}}}, "/pool/config/labels/a", "string"),
        (MINE | {"config": {"labels": {"a": "\0"}}}, "/pool/config/labels/a", "zero byte"),
        (MINE | {"config": {"level": "a\0b"}}, "/pool/config/level", "zero byte"),
        (MINE | {"config": {"level": "\ud800"}}, "/pool", "surrogate"),
        (MINE | {"config": {"no-name": "x"}}, "/pool/config/no-name", "is not a name for an environment variable"),
        (MINE | {"config": {"launcher_url": "x"}}, "/pool/config/launcher_url", "set by the launcher"),
        (DOCKER | {"config": {"environment": {"A": "a\0b"}}}, "/pool/config/environment/A", "zero byte"),
        (DOCKER | {"config": {"environment": {"A\0B": "x"}}}, "/pool/config/environment/A\0B", "not a name"),
        (DOCKER | {"config": {"environment": {"A=B": "x"}}}, "/pool/config/environment/A=B", "not a name"),
        (DOCKER | {"config": {"environment": {"A/B~": "x"}}}, "/pool/config/environment/A~1B~0", "not a name"),
        (DOCKER | {"config": {"environment": {"TASK_CONTEXT": "x"}}}, "/pool/config/environment/TASK_CONTEXT", "set by"),
        (DOCKER | {"config": {"command": []}}, "/pool/config/command", "must name a program"),
        (DOCKER | {"config": {"command": ["a\0"]}}, "/pool/config/command/0", "zero byte"),
    ],
)
async def test_a_pool_of_the_requests_own_that_cannot_be_is_pointed_at(
    service: Service, slot: Path, pool: Json, pointer: str, words: str
) -> None:
    async with service(allow_inline_pools=True) as client:
        answer = await client.post("/runners", content=json.dumps(launch_body(slot, pool=pool)), headers=AS_JSON)
        said = problem(answer, 422, "invalid", pointer)
        assert words in said["errors"][0]["detail"]
        assert (await client.get("/runners")).json()["items"] == []


# The slot's path.


def missing(slot: Path) -> Path:
    return slot / "missing"


def a_file(slot: Path) -> Path:
    (slot / "file").touch()
    return slot / "file"


def below_a_file(slot: Path) -> Path:
    return a_file(slot) / "below"


def outside(slot: Path) -> Path:
    place = slot.parent.parent / "outside"
    place.mkdir(exist_ok=True)
    return place


def a_link_out(slot: Path) -> Path:
    (slot / "link").symlink_to(outside(slot))
    return slot / "link"


def below_a_link_out(slot: Path) -> Path:
    (outside(slot) / "below").mkdir()
    return a_link_out(slot) / "below"


def back_out(slot: Path) -> Path:
    outside(slot)
    return Path(f"{slot}/../../outside")


def beside_the_root(slot: Path) -> Path:
    place = slot.parent.with_name("slots-too")
    place.mkdir()
    return place


def a_link_in_a_circle(slot: Path) -> Path:
    (slot / "circle").symlink_to(slot / "circle")
    return slot / "circle"


def a_link_to_nothing(slot: Path) -> Path:
    (slot / "dangling").symlink_to(slot / "nothing")
    return slot / "dangling"


def a_name_too_long(slot: Path) -> Path:
    return slot / ("x" * 300)


@pytest.mark.parametrize(
    ("made", "code", "words"),
    [
        (missing, "no-such-slot-path", "does not exist"),
        (a_file, "no-such-slot-path", "is not a directory"),
        (below_a_file, "no-such-slot-path", "slots/slot-1/file/below"),
        (a_link_to_nothing, "no-such-slot-path", "does not exist"),
        (a_link_in_a_circle, "no-such-slot-path", "cannot be followed"),
        (a_name_too_long, "no-such-slot-path", "cannot be followed"),
        (outside, "slot-outside-roots", "is not under any of the slot roots"),
        (a_link_out, "slot-outside-roots", "outside, is not under any of the slot roots"),
        (below_a_link_out, "slot-outside-roots", "outside/below, is not under any of the slot roots"),
        (back_out, "slot-outside-roots", "is not under any of the slot roots"),
        (beside_the_root, "slot-outside-roots", "is not under any of the slot roots"),
    ],
)
async def test_a_slot_path_that_cannot_be_entered_is_refused(
    client: httpx.AsyncClient, slot: Path, made: Callable[[Path], Path], code: str, words: str
) -> None:
    body = changed(launch_body(slot), "/slot/slot_path", str(made(slot)))
    await refused(client, body, 422, code, "/slot/slot_path", words=words)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("slots/slot-1", "must be an absolute path"),
        ("", "must be an absolute path"),
        ("~/slot", "must be an absolute path"),
        ("file:///slot", "must be an absolute path"),
        ("/slot\0", "must not hold control characters"),
        ("/" + "x" * 10_000, "must not be longer than 4095 bytes"),
    ],
)
async def test_a_slot_path_that_is_none_is_refused(client: httpx.AsyncClient, slot: Path, path: str, words: str) -> None:
    body = changed(launch_body(slot), "/slot/slot_path", path)
    await refused(client, body, 422, "invalid", "/slot/slot_path", words=words)


async def test_what_lies_outside_the_roots_is_told_to_nobody(client: httpx.AsyncClient, slot: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("/etc/passwd")
    for name in ("file", "link", "not-there", "file/below"):
        body = changed(launch_body(slot), "/slot/slot_path", f"{tmp_path}/{name}")
        words = f"{tmp_path}/{name} is not under any of the slot roots"
        await refused(client, body, 422, "slot-outside-roots", "/slot/slot_path", words=words)


async def test_without_slot_roots_no_slot_can_be_entered(service: Service, slot: Path) -> None:
    async with service(slot_roots=()) as client:
        words = "RUNNER_LAUNCHER_SLOT_ROOTS is empty"
        await refused(client, launch_body(slot), 422, "slot-outside-roots", "/slot/slot_path", words=words)


async def test_a_link_that_leads_to_a_place_inside_the_roots_is_followed(client: httpx.AsyncClient, slot: Path) -> None:
    slot.with_name("link").symlink_to(slot)
    body = changed(launch_body(slot, "pwd -P >place"), "/slot/slot_path", str(slot.with_name("link")))
    await launched(client, body)
    assert (await written(slot / "place")).strip() == str(slot)


# Programs that cannot be started.


def not_executable(slot: Path) -> str:
    (slot / "plain").write_text("exit 0")
    return str(slot / "plain")


@pytest.mark.parametrize(
    ("named", "words"),
    [
        (lambda _: "no-such-command", "no such command in PATH: no-such-command"),
        (lambda _: "/no/such/command", "no such command: /no/such/command"),
        (lambda _: "./no-such-command", "no such command: ./no-such-command"),
        (str, "the command is not executable"),
        (not_executable, "the command is not executable"),
    ],
)
async def test_a_command_that_cannot_be_run_fails_the_launch_for_good_and_frees_the_slot(
    service: Service, slot: Path, named: Callable[[Path], str], words: str
) -> None:
    pools = {"local": local_pool(), "bad": local_pool(command=[named(slot)])}
    async with service(pools) as client:
        answer = await client.post("/runners", json=launch_body(slot, pool="bad"))
        said = problem(answer, 422, "launch-rejected", words=f"local-process: {words}")
        record = said["runner"]
        assert answer.headers["Location"] == record["links"]["self"]
        assert (said["retryable"], record["retryable"]) == (False, False)
        assert (record["state"], record["reason"], record["message"]) == ("failed", "launch_rejected", said["detail"])
        assert (record["pid"], record["started_at"], record["exit_code"]) == (None, None, None)
        (attempt,) = record["attempts"]
        assert (attempt["number"], attempt["retryable"], attempt["delay_seconds"]) == (1, False, None)
        assert words in attempt["error"]
        assert await record_of(client, record) == record
        await launched(client, launch_body(slot))


async def test_a_script_without_its_interpreter_ends_like_in_any_shell(service: Service, slot: Path) -> None:
    script = slot / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    async with service({"local": local_pool(command=["./script"])}) as client:
        record = await finished(client, await launched(client, launch_body(slot)))
    assert (record["state"], record["reason"]) == ("failed", "exit_nonzero")
    assert record["exit_code"] in (126, 127)


# Programs that misbehave.


async def test_a_program_that_exits_at_once_is_told_truly_every_time(client: httpx.AsyncClient, slot: Path) -> None:
    bodies = [launch_body(slot.with_name(f"slot-{number}"), f"exit {number}") for number in range(8)]
    runners = await asyncio.gather(*(launched(client, body) for body in bodies))
    records = [await finished(client, runner) for runner in runners]
    assert [record["exit_code"] for record in records] == list(range(8))


async def test_what_a_program_leaves_behind_is_dead_before_its_slot_is_free(client: httpx.AsyncClient, slot: Path) -> None:
    left = "sleep 600 & setsid sleep 600 & setsid sh -c 'trap \"\" TERM HUP; echo $$ >child; exec sleep 600' &"
    runner = await launched(client, launch_body(slot, f"{left}\nwhile [ ! -s child ]; do sleep 0.01; done; exit 0"))
    record = await finished(client, runner)
    assert (record["state"], record["exit_code"]) == ("completed", 0)
    assert not alive(runner)
    assert state_of(int(read(slot / "child"))) in ("", "Z")


async def test_a_program_that_forks_and_leaves_has_ended(client: httpx.AsyncClient, slot: Path) -> None:
    runner = await launched(client, launch_body(slot, "setsid sh -c 'sleep 600; echo late >>late' & exit 7"))
    record = await finished(client, runner, 3)
    assert (record["reason"], record["exit_code"]) == ("exit_nonzero", 7)
    assert not alive(runner)


async def test_a_program_that_prints_1_gb_fills_no_disk_and_is_told_truly(
    service: Service, slot: Path, state_dir: Path
) -> None:
    line = "x" * 99
    async with service({"local": local_pool(log_max_mib=1)}) as client:
        runner = await launched(client, launch_body(slot, f"yes {line} | head -c 1000000000; echo; echo done; exit 3"))
        record = await finished(client, runner, 60)
        assert (record["reason"], record["exit_code"], record["log_truncated"]) == ("exit_nonzero", 3, True)
        text = (await client.get(runner["links"]["logs"])).text
        note, *lines, blank, last = text.splitlines()
        assert (blank, last, set(lines)) == ("", "done", {line})
        assert int(note.removeprefix("[").split()[0]) + len(text) - len(note) - 1 == 1_000_000_006
        await until(lambda: not list((state_dir / "runners").iterdir()))
        assert used(state_dir / "logs") <= 2 * MEBIBYTE


def used(directory: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in directory.iterdir())


async def test_a_program_that_prints_one_endless_line_is_capped_too(service: Service, slot: Path, state_dir: Path) -> None:
    async with service({"local": local_pool(log_max_mib=1)}) as client:
        runner = await launched(client, launch_body(slot, "head -c 5000000 /dev/zero"))
        record = await finished(client, runner)
        assert (record["state"], record["log_truncated"]) == ("completed", True)
        await until(lambda: not list((state_dir / "runners").iterdir()))
        assert used(state_dir / "logs") <= 2 * MEBIBYTE
        assert len((await client.get(runner["links"]["logs"])).content) <= 2 * MEBIBYTE


async def test_output_that_is_not_utf_8_comes_byte_for_byte(client: httpx.AsyncClient, slot: Path) -> None:
    said = bytes(range(256)) + b"\xff\xfe\n\xc3\x28\n" + "é".encode()[:1]
    (slot / "said").write_bytes(said)
    runner = await launched(client, launch_body(slot, "cat said"))
    await finished(client, runner)
    assert (await client.get(runner["links"]["logs"])).content == said
    assert (await client.get(runner["links"]["logs"], params={"tail": 1})).content == "é".encode()[:1]


async def test_a_program_that_ignores_term_is_killed(client: httpx.AsyncClient, slot: Path) -> None:
    script = "trap '' TERM INT HUP QUIT; echo >ready; while :; do sleep 0.05; done"
    runner = await launched(client, launch_body(slot, script))
    await written(slot / "ready")
    await client.delete(runner["links"]["self"], params={"grace": 0.2})
    record = await finished(client, runner, 3)
    assert (record["reason"], record["signal"]) == ("cancelled", "SIGKILL")
    assert not alive(runner)


async def test_a_program_that_stops_itself_can_be_ended(client: httpx.AsyncClient, slot: Path) -> None:
    runner = await launched(client, launch_body(slot, "kill -STOP $$"))
    await until(lambda: state_of(runner["pid"]) == "T")
    await client.delete(runner["links"]["self"], params={"grace": 0.2})
    assert (await finished(client, runner, 3))["reason"] == "cancelled"


def state_of(pid: int) -> str:
    return read(Path(f"/proc/{pid}/stat")).rpartition(") ")[2][:1]


async def test_a_program_that_closes_all_its_files_is_still_seen_to_end(client: httpx.AsyncClient, slot: Path) -> None:
    script = "exec 0<&- 1>&- 2>&- 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&-; sleep 0.2; exit 6"
    record = await finished(client, await launched(client, launch_body(slot, script)))
    assert record["exit_code"] == 6


async def test_a_program_that_removes_its_slot_and_its_context_is_told_truly(client: httpx.AsyncClient, slot: Path) -> None:
    runner = await launched(client, launch_body(slot, 'rm -rf "$TASK_CONTEXT_FILE" "$PWD"; exit 4'))
    record = await finished(client, runner)
    assert (record["exit_code"], list(slot.parent.glob("*"))) == (4, [])


# What a query cannot hold.


@pytest.mark.parametrize(
    ("call", "name", "words"),
    [
        ("POST /runners?dryrun=true", "dryrun", "; did you mean dry_run?"),
        ("POST /runners?dry_run=true&Dry_Run=false", "Dry_Run", "; did you mean dry_run?"),
        ("GET /runners?poool=local", "poool", "; did you mean pool?"),
        ("GET /runners?x=1", "x", ""),
        ("GET /runners/runner-000000000000?follow=true", "follow", ""),
        ("GET /runners/runner-000000000000/logs?tial=5", "tial", "; did you mean tail?"),
        ("DELETE /runners/runner-000000000000?forse=true", "forse", "; did you mean force?"),
        ("GET /events?folow=true", "folow", "; did you mean follow?"),
        ("POST /engines/sweep?dryrun=true", "dryrun", "; did you mean dry_run?"),
        ("POST /retention?dry-run=true", "dry-run", "; did you mean dry_run?"),
        ("GET /readyz?engin=local-process", "engin", "; did you mean engine?"),
        ("GET /pools?a/b=", "a~1b", ""),
    ],
)
async def test_a_parameter_that_a_call_does_not_have_is_refused(
    client: httpx.AsyncClient, slot: Path, call: str, name: str, words: str
) -> None:
    method, url = call.split()
    answer = await client.request(method, url, json=launch_body(slot) if "POST /run" in call else None)
    body = problem(answer, 422, "invalid", f"/query/{name}", words=f"/query/{name}: is not a parameter of this call")
    assert body["errors"][0]["detail"] == f"is not a parameter of this call{words}"
    assert (await client.get("/runners")).json()["items"] == []


async def test_a_thousand_parameters_that_a_call_does_not_have_are_refused_in_a_few_words(client: httpx.AsyncClient) -> None:
    answer = await client.get("/runners?" + "&".join(f"wrong{number}=" for number in range(1000)))
    assert answer.status_code == 422
    assert len(answer.json()["errors"]) == 20


async def test_the_sign_of_life_is_never_refused(client: httpx.AsyncClient) -> None:
    assert (await client.get("/livez?verbose")).status_code == 200


async def test_what_no_call_is_says_what_there_is(client: httpx.AsyncClient) -> None:
    for method, path, status, code, words in (
        ("GET", "/nothing", 404, "not-found", "nothing is at /nothing; /openapi.json has every call"),
        ("PUT", "/runners/x", 405, "method-not-allowed", "PUT is not for /runners/x; DELETE and GET are"),
        ("PATCH", "/engines", 405, "method-not-allowed", "PATCH is not for /engines; GET is"),
        ("GET", "/runners?label=gpu", 422, "invalid", "/query/label/0: must look like key=value"),
        ("POST", "/runners?dry_run=perhaps", 422, "invalid", "/query/dry_run: must be true or false"),
    ):
        answer = await client.request(method, path, json={} if method == "POST" else None)
        assert (answer.status_code, answer.json()["code"]) == (status, code)
        assert words in answer.json()["detail"]


async def test_what_is_not_json_is_told_with_its_place(client: httpx.AsyncClient) -> None:
    answer = await client.post("/runners", content=b'{\n "task": x}', headers=AS_JSON)
    assert answer.json()["detail"] == "not JSON: Expecting value (line 2, column 10)"
