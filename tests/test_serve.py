"""The service as a process: how it starts, what it keeps over restarts and crashes, and how it goes."""

import asyncio
import contextlib
import itertools
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from conftest import (
    TELL,
    Json,
    Serve,
    Served,
    Service,
    alive,
    finished,
    launch_body,
    launched,
    local_pool,
    problem,
    read,
    record_of,
    service_environment,
    told,
    until,
    write_pools,
    written,
)
from engines import missing

from app.server import EventLoop

FOREVER = "exec sleep 600"
WAITS = "while [ ! -e go ]; do sleep 0.01; done\n"


# Starts that must not succeed.


def start(directory: Path, **settings: str) -> list[str]:
    """Start a service that cannot start, and give the lines it says."""
    environment = service_environment(directory, **settings)
    command = [sys.executable, "-m", "app.cli", "serve"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20, check=False)
    assert ended.returncode == 1, ended.stderr
    assert ended.stdout == ""
    return [line for line in ended.stderr.splitlines() if " INFO " not in line]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"LISTEN": "8080"}, "RUNNER_LAUNCHER_LISTEN: must look like 127.0.0.1:8080 or [::1]:8080"),
        ({"LISTEN": "192.0.2.1:8080"}, "RUNNER_LAUNCHER_LISTEN: cannot listen on 192.0.2.1:8080: "),
        ({"AUTH": "off", "LISTEN": "0.0.0.0:0"}, "RUNNER_LAUNCHER_AUTH: off is for loopback only, and "),
        ({"SLOT_ROOTS": "slots"}, "RUNNER_LAUNCHER_SLOT_ROOTS: slots is not an absolute path"),
        ({"ALLOW_INLINE_POOLS": "perhaps"}, "RUNNER_LAUNCHER_ALLOW_INLINE_POOLS: "),
        ({"STATE_DIR": "/proc/here"}, "RUNNER_LAUNCHER_STATE_DIR: /proc/here cannot be used: "),
        ({"STATE_DIR": "/dev/null"}, "RUNNER_LAUNCHER_STATE_DIR: /dev/null cannot be used: File exists; name a directory"),
        ({"DATABASE_URL": "mysql://x/y"}, "RUNNER_LAUNCHER_DATABASE_URL: "),
        ({"DATABASE_URL": "no url"}, "RUNNER_LAUNCHER_DATABASE_URL: "),
        ({"DATABASE_URL": "sqlite:////no/such/place/runners.db"}, "RUNNER_LAUNCHER_DATABASE_URL: "),
        ({"TOKENS_FILE": "/no/such/tokens.yaml"}, "RUNNER_LAUNCHER_TOKENS_FILE: "),
        (
            {"POOLS_FILE": "/no/such/pools.yaml"},
            "RUNNER_LAUNCHER_POOLS_FILE: /no/such/pools.yaml: No such file or directory",
        ),
    ],
)
def test_a_setting_that_cannot_be_used_stops_the_start_with_one_line(
    tmp_path: Path, settings: dict[str, str], words: str
) -> None:
    write_pools(tmp_path / "pools.yaml", {})
    (line,) = start(tmp_path, **settings)
    assert line.startswith(f"runner-launcher: {words}")


BAD_POOLS = {
    "lambda": {"type": "lambda"},
    "negative": {"type": "local-process", "max_concurrency": -1, "cpu_quota": 0, "memory_quota": -512},
    "reserved": local_pool(environment={"RUNNER_ID": "mine", "NUL": "a\0b", "A B": "c"}),
    "template": {"type": "kubernetes", "config": {"job_template": "no-such-file.yaml"}},
}


def test_a_wrong_pool_file_stops_the_start_with_one_line_for_each_wrong_key(tmp_path: Path) -> None:
    pools_file = tmp_path / "pools.yaml"
    write_pools(pools_file, BAD_POOLS)
    lines = start(tmp_path)
    assert lines[0].startswith("runner-launcher: ")
    lines[0] = lines[0].removeprefix("runner-launcher: ")
    assert all(line.startswith(f"{pools_file}: agent_pools.") for line in lines)
    keys = {line.removeprefix(f"{pools_file}: agent_pools.").split(": ")[0] for line in lines}
    assert keys == {
        "lambda.type",
        "negative.max_concurrency",
        "negative.cpu_quota",
        "negative.memory_quota",
        "reserved.config.environment.RUNNER_ID",
        "reserved.config.environment.NUL",
        "reserved.config.environment.A B",
        "template.config.job_template",
    }


@pytest.mark.parametrize("text", ["agent_pools: [", "agent_pools: 7", "pools: {}", "\0", ""])
def test_a_pool_file_that_is_none_stops_the_start_with_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "pools.yaml").write_text(text)
    line = start(tmp_path)[0]
    assert line.startswith(f"runner-launcher: {tmp_path / 'pools.yaml'}: ")


def test_an_empty_token_file_stops_the_start_with_one_line(tmp_path: Path) -> None:
    write_pools(tmp_path / "pools.yaml", {})
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "token").touch()
    (line,) = start(tmp_path)
    assert line == f"runner-launcher: {tmp_path / 'state' / 'token'} is empty; remove it, and a new token is made"


def test_a_database_that_is_none_stops_the_start_with_one_line(tmp_path: Path) -> None:
    write_pools(tmp_path / "pools.yaml", {})
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "runners.db").write_text("this is no database, and longer than its header would be" * 20)
    (line,) = start(tmp_path)
    assert line.startswith("runner-launcher: RUNNER_LAUNCHER_DATABASE_URL: ")


def test_a_port_that_is_taken_stops_the_start_with_one_line(tmp_path: Path) -> None:
    write_pools(tmp_path / "pools.yaml", {})
    with socket.create_server(("127.0.0.1", 0)) as other:
        listen = f"127.0.0.1:{other.getsockname()[1]}"
        (line,) = start(tmp_path, LISTEN=listen)
    assert line == f"runner-launcher: RUNNER_LAUNCHER_LISTEN: cannot listen on {listen}: Address already in use"


async def test_a_second_service_on_a_state_directory_is_refused_and_the_first_does_not_mind(
    serve: Serve, tmp_path: Path
) -> None:
    async with serve() as running, running.client() as client:
        (line,) = await asyncio.to_thread(start, tmp_path)
        state_dir = tmp_path / "state"
        assert line == f"runner-launcher: RUNNER_LAUNCHER_STATE_DIR: {state_dir} is in use by another service"
        assert (await client.get("/readyz")).status_code == 200
        assert (await client.get("/runners")).status_code == 200


# The command line.


def command(directory: Path, *arguments: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-m", "app.cli", *arguments],
        env=service_environment(directory),
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    return ended.stdout if ended.returncode == 0 else ended.stderr


async def test_the_token_is_made_for_this_user_alone_and_told_by_the_command_line(serve: Serve, tmp_path: Path) -> None:
    async with serve() as running:
        assert len(running.token) >= 32
        assert command(tmp_path, "token").strip() == running.token
        assert mode(tmp_path / "state") == 0o700
        assert mode(tmp_path / "state" / "token") == 0o600
        assert mode(tmp_path / "state" / "runners.db") == 0o600
        assert running.token not in read(running.output)


async def test_the_token_stays_the_same(service: Service) -> None:
    async with service() as client:
        before = client.headers["Authorization"]
    async with service() as client:
        assert client.headers["Authorization"] == before


def test_before_the_first_start_there_is_no_token_to_tell(tmp_path: Path) -> None:
    assert "start the service first" in command(tmp_path, "token")


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_the_command_line_tells_its_version(tmp_path: Path) -> None:
    assert command(tmp_path, "--version").strip()[0].isdigit()


# A whole life, over a real connection.


async def test_a_runner_reaches_the_service_at_the_address_it_was_told(serve: Serve, slot: Path) -> None:
    beat = (
        "import os, urllib.request as r\n"
        "url = os.environ['RUNNER_LAUNCHER_URL'] + '/runners/' + os.environ['RUNNER_ID'] + '/heartbeat'\n"
        "headers = {'Authorization': 'Bearer ' + os.environ['RUNNER_TOKEN']}\n"
        "print(r.urlopen(r.Request(url, method='POST', headers=headers)).status)\n"
    )
    async with serve() as running, running.client() as client:
        (slot / "beat.py").write_text(beat)
        runner = await launched(client, launch_body(slot, f"exec {sys.executable} beat.py"))
        record = await finished(client, runner)
        assert (await client.get(runner["links"]["logs"])).text == "204\n"
        assert record["last_heartbeat"] is not None


async def test_a_body_of_50_mb_is_refused_over_a_real_connection(serve: Serve, slot: Path) -> None:
    async with serve() as running, running.client() as client:
        answer = await client.post("/runners", json=launch_body(slot, description="x" * 50_000_000))
        problem(answer, 413, "too-large")
        assert (await client.get("/runners")).json()["items"] == []


async def test_requests_that_are_not_http_do_not_disturb_the_service(serve: Serve) -> None:
    async with serve() as running, running.client() as client:
        for said in (b"\0" * 100, b"GET / HTTP/9.9\r\n\r\n", b"POST /runners HTTP/1.1\r\nContent-Length: -1\r\n\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(running.url).port)
            writer.write(said)
            assert b" 400 " in await reader.read(1000)
            writer.close()
            await writer.wait_closed()
        assert (await client.get("/livez")).status_code == 200


# SIGHUP.


async def test_sighup_reads_the_pools_again_and_a_pool_taken_out_keeps_serving_its_runners(
    serve: Serve, slot: Path, tmp_path: Path
) -> None:
    async with serve() as running, running.client() as client:
        runner = await launched(client, launch_body(slot, FOREVER))
        write_pools(tmp_path / "pools.yaml", {"other": local_pool(max_concurrency=3)})
        running.process.send_signal(signal.SIGHUP)
        await running.says("the pools were read again")

        names = [pool["pool_name"] for pool in (await client.get("/pools")).json()["items"]]
        assert names == ["other"]
        answer = await client.post("/runners", json=launch_body(slot.with_name("slot-2")))
        problem(answer, 422, "unknown-pool", "/pool")
        await launched(client, launch_body(slot.with_name("slot-2"), pool="other"))

        assert (await record_of(client, runner))["state"] == "running"
        await client.delete(runner["links"]["self"])
        assert (await finished(client, runner))["reason"] == "cancelled"


@pytest.mark.parametrize("text", ["agent_pools: {local: {type: lambda}}", "agent_pools: [", None])
async def test_sighup_with_a_wrong_file_says_so_and_keeps_the_pools(
    serve: Serve, slot: Path, tmp_path: Path, text: str | None
) -> None:
    async with serve() as running, running.client() as client:
        if text is None:
            (tmp_path / "pools.yaml").unlink()
        else:
            (tmp_path / "pools.yaml").write_text(text)
        running.process.send_signal(signal.SIGHUP)
        setting = "RUNNER_LAUNCHER_POOLS_FILE: " if text is None else ""
        await running.says(f"the pools stay as they were: {setting}{tmp_path / 'pools.yaml'}: ")
        await launched(client, launch_body(slot))


async def test_sighup_gives_waiting_launches_the_room_that_the_new_file_has(
    serve: Serve, slot: Path, tmp_path: Path
) -> None:
    async with serve({"local": local_pool(max_concurrency=1, queue_limit=5)}) as running, running.client() as client:
        runners = []
        for number in range(3):
            body = launch_body(slot.with_name(f"slot-{number}"), FOREVER)
            runners.append((await client.post("/runners", json=body, headers={"Prefer": "respond-async"})).json())
        write_pools(tmp_path / "pools.yaml", {"local": local_pool(max_concurrency=3, queue_limit=5)})
        running.process.send_signal(signal.SIGHUP)
        for runner in runners:
            await until(lambda: state_is("running", client, runner))  # noqa: B023 - awaited within the loop


async def state_is(state: str, client: httpx.AsyncClient, runner: Json) -> bool:
    return bool((await record_of(client, runner))["state"] == state)


# Going down, and coming up again.


@pytest.mark.fault("the service ends under live runners, by SIGTERM, SIGINT, SIGKILL")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
async def test_runners_outlive_the_service_and_the_next_start_finds_their_ends(
    serve: Serve, slot: Path, number: signal.Signals
) -> None:
    late, early, killed = (slot.with_name(name) for name in ("late", "early", "killed"))
    async with serve() as running, running.client() as client:
        first = await launched(client, launch_body(late, "echo before\n" + WAITS + "echo after; exit 5"))
        second = await launched(client, launch_body(early, WAITS + "exit 6"))
        third = await launched(client, launch_body(killed, FOREVER))
        assert await running.end(number) == (-number if number is signal.SIGKILL else 0)

    assert all(runner["pid"] in alive(runner) for runner in (first, second, third))
    (early / "go").touch()
    os.kill(third["pid"], signal.SIGKILL)
    await until(lambda: not alive(second) and not alive(third))

    async with serve() as running, running.client() as client:
        record = await finished(client, second)
        assert (record["state"], record["reason"], record["exit_code"]) == ("failed", "exit_nonzero", 6)
        record = await finished(client, third)
        assert (record["reason"], record["exit_code"], record["signal"]) == ("signalled", None, "SIGKILL")

        record = await record_of(client, first)
        assert (record["state"], record["pid"]) == ("running", first["pid"])
        (late / "go").touch()
        record = await finished(client, first)
        assert (record["exit_code"], record["started_at"]) == (5, first["started_at"])
        assert (await client.get(record["links"]["logs"])).text == "before\nafter\n"


async def test_a_launch_that_was_accepted_is_neither_lost_nor_doubled_by_a_kill(serve: Serve, slot: Path) -> None:
    slots = [slot.with_name(f"slot-{number}") for number in range(6)]
    witness = 'echo "$RUNNER_ID" >>witness; exit 3'
    async with serve() as running, running.client() as client:
        calls = [
            client.post("/runners", json=launch_body(place, witness), headers={"Prefer": "respond-async"}) for place in slots
        ]
        answers = await asyncio.gather(*calls)
        await running.end(signal.SIGKILL)
    assert [answer.status_code for answer in answers] == [202] * 6
    async with serve() as running, running.client() as client:
        for place, answer in zip(slots, answers, strict=True):
            record = await finished(client, answer.json())
            assert (record["state"], record["exit_code"]) == ("failed", 3)
            assert read(place / "witness").split() == [record["runner_id"]]


async def test_deadlines_and_stops_that_passed_while_the_service_was_down_are_kept(serve: Serve, slot: Path) -> None:
    timed, stopped = slot.with_name("timed"), slot.with_name("stopped")
    deaf = "trap '' TERM; echo >ready; while :; do sleep 0.05; done"
    async with serve({"local": local_pool(), "short": local_pool(run_timeout_seconds=0.5)}) as running:
        async with running.client() as client:
            first = await launched(client, launch_body(timed, FOREVER, pool="short"))
            second = await launched(client, launch_body(stopped, deaf))
            await written(stopped / "ready")
            await client.delete(second["links"]["self"], params={"grace": 0.5})
        await running.end(signal.SIGKILL)
    async with serve() as running, running.client() as client:
        record = await finished(client, first)
        assert (record["reason"], record["retryable"]) == ("deadline_exceeded", False)
        record = await finished(client, second)
        assert (record["reason"], record["signal"]) == ("cancelled", "SIGKILL")


async def test_silence_while_the_service_was_down_is_not_held_against_a_runner(serve: Serve, slot: Path) -> None:
    async with serve({"local": local_pool(heartbeat_timeout_seconds=5)}) as running, running.client() as client:
        runner = await launched(client, launch_body(slot, TELL + FOREVER))
        headers = {"Authorization": f"Bearer {(await told(slot))['RUNNER_TOKEN']}"}
        await client.post(f"{runner['links']['self']}/heartbeat", headers=headers)
        await running.end(signal.SIGKILL)
    await asyncio.sleep(5.2)
    async with serve() as running, running.client() as client:
        assert (await record_of(client, runner))["phase"] == "running"
        answer = await client.post(f"{runner['links']['self']}/heartbeat", headers=headers)
        assert answer.status_code == 204  # its token is still its token
        assert (await finished(client, runner))["reason"] == "heartbeat_lost"


async def test_a_client_that_waits_is_answered_when_the_service_goes_down(serve: Serve, slot: Path) -> None:
    pools = {"local": local_pool(max_concurrency=1, queue_limit=1)}
    async with serve(pools) as running, running.client() as client:
        await launched(client, launch_body(slot, WAITS))
        second = launch_body(slot.with_name("slot-2"), 'echo "$RUNNER_ID" >witness')
        waiting = asyncio.create_task(client.post("/runners", json=second))
        await until(lambda: anything(client, phase="queued"))
        async with asyncio.timeout(8):
            assert await running.end() == 0
            answer = await waiting
        assert (answer.status_code, answer.json()["phase"]) == (202, "queued")
    (slot / "go").touch()
    async with serve() as running, running.client() as client:
        assert (await finished(client, answer.json()))["state"] == "completed"


async def anything(client: httpx.AsyncClient, **query: str) -> list[Json]:
    items: list[Json] = (await client.get("/runners", params=query)).json()["items"]
    return items


# The disk full.


def namespaces() -> list[str]:
    """How to run a command that sees mounts of its own; skips where nobody may."""
    if shutil.which("unshare"):
        for how in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
            if subprocess.run([*how, "true"], capture_output=True, check=False).returncode == 0:
                return how
    return missing("namespaces", "unshare is not permitted here, so no disk can be made small")


@asynccontextmanager
async def on_a_small_disk(serve: Serve, state_dir: Path, pools: Json | None = None) -> AsyncIterator[tuple[Served, Path]]:
    """Serve with a state directory on a disk of 8 MiB and 200 files; gives with it where the test finds that disk."""
    state_dir.mkdir()
    mount = f'mount -t tmpfs -o size=8m,nr_inodes=200,mode=0700 tmpfs {state_dir} && exec "$0" "$@"'
    async with serve(pools, inside=[*namespaces(), "sh", "-c", mount], mishaps=True) as running:
        yield running, Path(f"/proc/{running.process.pid}/root{state_dir}")


def fill(disk: Path) -> None:
    with (disk / "filling").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


async def test_a_service_may_open_all_files_from_its_start_and_its_runners_as_many_as_before(
    serve: Serve, slot: Path
) -> None:
    few = ["sh", "-c", 'ulimit -S -n 300 && exec "$0" "$@"']
    async with serve(inside=few) as running, running.client() as client:
        soft, hard = resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE)
        assert soft == hard > 300
        runner = await finished(client, await launched(client, launch_body(slot, "ulimit -S -n")))
        assert (await client.get(f"/runners/{runner['runner_id']}/logs")).text == "300\n"


@pytest.mark.fault("the disk is full, for state and logs")
async def test_with_the_disk_full_a_launch_is_refused_and_nothing_starts(serve: Serve, slot: Path, state_dir: Path) -> None:
    async with on_a_small_disk(serve, state_dir) as (running, disk), running.client() as client:
        before = await finished(client, await launched(client, launch_body(slot)))
        await until(lambda: not list((disk / "runners").iterdir()))
        await asyncio.to_thread(fill, disk)
        # Large enough that it cannot fit into what is left of a file that was there already.
        body = launch_body(slot, 'echo "$RUNNER_ID" >>witness; ' + FOREVER, description="x" * 500_000)
        answer = await client.post("/runners", json=body, headers={"Idempotency-Key": "k"})
        said = problem(answer, 503, "store-unavailable", words="the store refused the write")
        assert said["retryable"] is True
        assert int(answer.headers["Retry-After"]) >= 1
        assert "runner" not in said

        await asyncio.sleep(0.2)
        assert (await client.get("/runners")).json()["items"] == [before]
        assert list((disk / "runners").iterdir()) == []
        assert not read(slot / "witness")
        assert (await client.get("/livez")).status_code == 200

        (disk / "filling").unlink()
        runner = await launched(client, body, **{"Idempotency-Key": "k"})
        assert (await written(slot / "witness")).split() == [runner["runner_id"]]


@pytest.mark.fault("the disk is full, for state and logs")
async def test_an_end_that_the_store_could_not_write_is_told_once_there_is_room(
    serve: Serve, slot: Path, state_dir: Path
) -> None:
    async with on_a_small_disk(serve, state_dir) as (running, disk), running.client() as client:
        runner = await launched(client, launch_body(slot, WAITS + "exit 7"))
        await asyncio.to_thread(fill, disk)
        (slot / "go").touch()
        await until(lambda: not alive(runner))
        await asyncio.sleep(0.3)
        (disk / "filling").unlink()
        record = await finished(client, runner)
        assert (record["state"], record["exit_code"], record["reason"]) == ("failed", 7, "exit_nonzero")


@pytest.mark.parametrize("grace", [0, 30])
async def test_a_runner_is_stopped_on_a_disk_that_takes_no_more_files(
    serve: Serve, state_dir: Path, slot: Path, grace: int
) -> None:
    async with on_a_small_disk(serve, state_dir) as (running, disk), running.client() as client:
        runner = await launched(client, launch_body(slot, "touch ready; " + FOREVER))
        await until((slot / "ready").exists)
        (disk / "many").mkdir()
        with contextlib.suppress(OSError):
            for number in itertools.count():
                (disk / "many" / str(number)).touch()
        await client.delete(runner["links"]["self"], params={"grace": grace})
        record = await finished(client, runner)
        assert (record["reason"], record["signal"]) == ("cancelled", "SIGTERM" if grace else "SIGKILL")
        shutil.rmtree(disk / "many")


@pytest.mark.fault("the disk is full, for state and logs")
async def test_heartbeats_that_the_store_could_not_write_end_no_runner(serve: Serve, slot: Path, state_dir: Path) -> None:
    limit = 8
    pools = {"local": local_pool(heartbeat_timeout_seconds=limit)}
    async with on_a_small_disk(serve, state_dir, pools) as (running, disk), running.client() as client:
        runner = await launched(client, launch_body(slot, TELL + FOREVER))
        headers = {"Authorization": f"Bearer {(await told(slot))['RUNNER_TOKEN']}"}

        async def beat() -> int:
            return (await client.post(f"{runner['links']['self']}/heartbeat", headers=headers)).status_code

        async def refused() -> bool:
            return await beat() == 503

        assert await beat() == 204
        await asyncio.to_thread(fill, disk)
        await until(refused)  # what is left of a file that was there may hold some
        silent_since = time.monotonic()
        while time.monotonic() - silent_since < limit + 3:  # so its loss is decided, and cannot be written, either
            assert await beat() == 503
            await asyncio.sleep(0.2)
        (disk / "filling").unlink()
        await asyncio.sleep(limit / 2)
        assert await beat() == 204
        assert (await client.get(runner["links"]["self"])).json()["phase"] == "running"


def test_names_that_nobody_answers_for_take_no_thread_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: silent.wait(20) and [])

    async def look() -> None:
        loop = asyncio.get_running_loop()
        named = [asyncio.create_task(loop.getaddrinfo("launcher.example", 443)) for _ in range(32)]
        await asyncio.sleep(0.1)
        async with asyncio.timeout(5):
            assert await asyncio.to_thread(len, "") == 0
        assert not any(one.done() for one in named)
        silent.set()
        await asyncio.gather(*named)

    with asyncio.Runner(loop_factory=EventLoop) as runner:
        runner.run(look())
