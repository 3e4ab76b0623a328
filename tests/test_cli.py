"""The command line as scripts and people use it: the real program, in a process, at a real service."""

import asyncio
import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from conftest import Serve, Served, alive, launch_body, local_pool, served, until

WAITS = "while [ ! -e go ]; do sleep 0.01; done\n"
OK, FAILED, USAGE, REFUSED, NOT_FOUND, UNAVAILABLE, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130


@dataclass(frozen=True)
class Ended:
    """How a program ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:  # noqa: ANN401 - JSON
        return json.loads(self.out)


@dataclass(frozen=True)
class CommandLine:
    """The program, and the environment that leads it to a service."""

    environment: dict[str, str]

    def start(self, *arguments: str, **streams: Any) -> subprocess.Popen[str]:  # noqa: ANN401 - as Popen has them
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.PIPE, **streams}
        command = [sys.executable, "-m", "app.cli", *arguments]
        return subprocess.Popen(command, env=self.environment, text=True, **pipes)

    async def run(self, *arguments: str, given: str | None = None) -> Ended:
        with self.start(*arguments) as program:
            out, err = await asyncio.to_thread(program.communicate, given, 30)
        assert "Traceback" not in err, err
        return Ended(program.returncode, out, err)

    async def launched(self, *arguments: str, given: str | None = None) -> str:
        """Launch, and give the runner's id."""
        ended = await self.run("launch", *arguments, given=given)
        assert ended.code == OK, ended.err
        return ended.out.strip()


def at(service: Served, **more: str) -> CommandLine:
    environment = {"PATH": os.environ["PATH"], "RUNNER_LAUNCHER_URL": service.url, "RUNNER_LAUNCHER_TOKEN": service.token}
    return CommandLine({**environment, **more})


def launch_file(slot: Path, script: str = "exit 0", **body: Any) -> str:  # noqa: ANN401 - JSON
    path = slot.parent.parent / f"{slot.name}.json"
    path.write_text(json.dumps(launch_body(slot, script, **body)))
    return str(path)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """One service for all that leave it as it is."""
    pools = {"local": local_pool(max_concurrency=64), "broken": local_pool(command=["/no/such/program"])}
    async with served(tmp_path_factory.mktemp("served"), pools) as server:
        yield server


@pytest.fixture
def place(server: Served, tmp_path: Path) -> Path:
    """A slot of this test's own on the shared service."""
    place = server.output.parent / "slots" / tmp_path.name
    place.mkdir(parents=True)
    return place


# Launches.


async def test_a_launch_prints_the_id_alone_and_tells_the_rest_beside(server: Served, place: Path) -> None:
    ended = await at(server).run("launch", launch_file(place, "exec sleep 600"))
    assert ended.code == OK
    runner_id = ended.out.strip()
    assert runner_id.startswith("runner-")
    assert "accepted" in ended.err
    assert f"{runner_id} is running (pid " in ended.err
    assert alive({"runner_id": runner_id})


async def test_a_launch_comes_from_options_or_standard_input_and_options_win(server: Served, place: Path) -> None:
    run = at(server)
    body = json.dumps({"task": {"id": "7"}, "slot": {"slot_path": "/nowhere"}, "pool": "nowhere"})
    launch_body(place)
    given = ["--slot-path", str(place), "--pool", "local", "--title", "Say hello", "--slot-id", "mine"]
    piped = await run.run("launch", "-", *given, "--wait", "--json", given=body)
    assert (piped.code, piped.json["slot_id"], piped.json["state"]) == (OK, "mine", "completed")
    plain = await run.run("launch", "--task-id", "8", "--slot-path", str(place), "--pool", "local", "--wait", "--json")
    assert (plain.json["task_id"], plain.json["slot_id"]) == ("8", place.name)


async def test_a_slot_without_a_name_is_none_and_not_where_one_is(server: Served, place: Path) -> None:
    for given in ((), ("-",)):
        body = json.dumps(launch_body(place))
        ended = await at(server).run("launch", *given, "--task-id", "8", "--slot-path", "", "--pool", "local", given=body)
        assert (ended.code, "say what to launch" in ended.err) == (USAGE, True)


@pytest.mark.parametrize(("script", "code", "words"), [("exit 0", OK, "completed"), ("exit 3", FAILED, "exit_nonzero")])
async def test_a_launch_that_is_waited_for_ends_as_its_runner_does(
    server: Served, place: Path, script: str, code: int, words: str
) -> None:
    ended = await at(server).run("launch", "--wait", launch_file(place, script))
    assert ended.code == code
    assert ended.out.strip().startswith("runner-")
    assert words in ended.err.splitlines()[-1]


async def test_a_launch_that_fails_says_why_and_where_its_record_is(server: Served, place: Path) -> None:
    ended = await at(server).run("launch", launch_file(place, pool="broken"))
    assert ended.code == FAILED
    assert "/no/such/program" in ended.err.splitlines()[-1]
    assert "runner-launcher show runner-" in ended.err
    as_json = await at(server).run("launch", launch_file(place, pool="broken"), "--json")
    assert (as_json.code, as_json.out) == (FAILED, "")
    assert json.loads(as_json.err)["runner"]["reason"] == "launch_rejected"


async def test_the_same_key_launches_nothing_again(server: Served, place: Path) -> None:
    run = at(server)
    file = launch_file(place, "exec sleep 600")
    assert await run.launched(file, "--key", "k") == await run.launched(file, "--key", "k")


async def test_who_interrupts_a_wait_is_told_that_the_runner_goes_on(server: Served, place: Path) -> None:
    with at(server).start("launch", "--wait", launch_file(place, "touch up; exec sleep 600"), bufsize=1) as program:
        assert program.stdout
        assert program.stderr
        runner_id = (await asyncio.to_thread(program.stdout.readline)).strip()
        await until((place / "up").exists)
        program.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(program.wait, 20) == INTERRUPTED
        assert f"interrupted; {runner_id} goes on" in program.stderr.read()
    assert alive({"runner_id": runner_id})


async def test_somebody_who_looks_sees_what_a_launch_waits_for(serve: Serve, slot: Path) -> None:
    async with serve({"local": local_pool(max_concurrency=1, queue_limit=1)}) as service:
        run = at(service, TERM="xterm", COLUMNS="100")
        await run.launched(launch_file(slot, WAITS))
        with terminal(run, "launch", launch_file(slot.parent / "slot-2")) as screen:
            await until(lambda: "queued" in screen.text() or "accepted" in screen.text())
            assert "is running" not in screen.text()
            (slot / "go").touch()
            await until(lambda: "is running" in screen.text())


@dataclass
class Screen:
    """What a program shows on a terminal."""

    file: Path
    end: int

    def text(self) -> str:
        with contextlib.suppress(OSError):
            os.set_blocking(self.end, False)
            with self.file.open("ab") as file:
                while data := os.read(self.end, 65536):
                    file.write(data)
        return self.file.read_bytes().decode(errors="replace")


@contextlib.contextmanager
def terminal(run: CommandLine, *arguments: str) -> Iterator[Screen]:
    ours, theirs = pty.openpty()
    screen = Screen(Path(arguments[-1]).with_suffix(".screen"), ours)
    try:
        with run.start(*arguments, stdin=theirs, stdout=theirs, stderr=theirs):
            os.close(theirs)
            yield screen
    finally:
        os.close(ours)


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "given", "words"),
    [
        (["launch"], None, "say what to launch"),
        (["launch", "/no/such/file"], None, "/no/such/file cannot be read: No such file or directory"),
        (["launch", "-"], "{", "standard input is not JSON"),
        (["launch", "-"], "[]", "standard input must hold"),
        (["launch", "-"], '{"task": 7}', "task and slot must be objects"),
        (["launch", "-"], "[" * 100_000, "standard input is not JSON"),
        (["pools", "--disable"], None, "say which pool to switch"),
    ],
)
async def test_what_cannot_be_meant_is_told_in_a_line(arguments: list[str], given: str | None, words: str) -> None:
    ended = await CommandLine({"PATH": os.environ["PATH"], "HOME": "/nowhere"}).run(*arguments, given=given)
    assert (ended.code, ended.out, len(ended.err.splitlines())) == (USAGE, "", 1)
    assert ended.err.startswith("runner-launcher: ")
    assert words in ended.err


async def test_each_kind_of_refusal_has_its_exit_code_and_one_line(serve: Serve, slot: Path, tmp_path: Path) -> None:
    async with serve() as service:
        run = at(service)
        holder = await run.launched(launch_file(slot, "exec sleep 600"))
        cases: list[tuple[CommandLine, list[str], int, str]] = [
            (run, ["launch", launch_file(slot)], REFUSED, f"is held by {holder}"),
            (run, ["launch", launch_file(slot.parent / "slot-2", pool="nope")], REFUSED, "no pool named nope"),
            (run, ["ps", "--state", "odd"], REFUSED, "state"),
            (at(service, RUNNER_LAUNCHER_TOKEN="wrong"), ["ps"], REFUSED, "token is not known"),  # noqa: S106
            (run, ["show", "runner-000000000000"], NOT_FOUND, "no runner runner-000000000000"),
            (run, ["logs", "runner-000000000000"], NOT_FOUND, "no runner"),
            (run, ["stop", "runner-000000000000"], NOT_FOUND, "no runner"),
            (run, ["events", "runner-000000000000"], NOT_FOUND, "no runner"),
            (run, ["pools", "nope"], NOT_FOUND, "no pool named nope"),
            (run, ["ps", "--pool", "nope"], NOT_FOUND, "no pool named nope is configured; there are: local"),
            (at(service, RUNNER_LAUNCHER_URL="nowhere"), ["ps"], REFUSED, "must look like http://host:port"),
        ]

        async def check(line: CommandLine, arguments: list[str], code: int, words: str) -> None:
            ended, as_json = await asyncio.gather(line.run(*arguments), line.run(*arguments, "--json"))
            assert (ended.code, ended.out, as_json.code) == (code, "", code), arguments
            assert words in ended.err, arguments
            assert [text.startswith("runner-launcher: ") for text in ended.err.splitlines()] == [True], ended.err
            assert words in json.loads(as_json.err)["detail"]

        for case in cases:
            await check(*case)
    without = {"PATH": os.environ["PATH"], "RUNNER_LAUNCHER_STATE_DIR": str(tmp_path), "RUNNER_LAUNCHER_URL": service.url}
    away = await CommandLine(without).run("ps")
    assert away.code == UNAVAILABLE
    assert away.err.splitlines()[-1].startswith(f"runner-launcher: no answer from {service.url}: Connection refused; ")


# What is shown.


async def test_runners_are_listed_in_a_table_and_as_json(serve: Serve, slot: Path) -> None:
    async with serve() as service:
        run = at(service)
        lives = await run.launched(launch_file(slot, "exec sleep 600"))
        ended = (await run.run("launch", "--wait", launch_file(slot.parent / "slot-2", "exit 3"))).out.strip()
        head, row = (await run.run("ps")).out.splitlines()
        assert head.split() == ["RUNNER", "TASK", "POOL", "SLOT", "STATE", "REASON", "AGE", "RAN"]
        assert row.split()[:5] == [lives, "7", "local", "slot-1", "running"]
        assert [line.split()[0] for line in (await run.run("ps", "-a")).out.splitlines()[1:]] == [ended, lives]
        assert [runner["runner_id"] for runner in (await run.run("ps", "-a", "-n", "1", "--json")).json] == [ended]
        (failed,) = (await run.run("ps", "--state", "failed", "--json")).json
        assert (failed["runner_id"], failed["exit_code"]) == (ended, 3)
        assert (await run.run("ps", "--task-id", "8")).out == ""


async def test_a_record_a_history_and_a_log_are_shown(server: Served, place: Path) -> None:
    run = at(server)
    script = "printf 'one\\ntwo [bold]\\n\\033[31mthree\\377'; exit 3"
    runner_id = (await run.run("launch", "--wait", launch_file(place, script))).out.strip()
    shown = dict(line.split(":", 1) for line in (await run.run("show", runner_id)).out.splitlines())
    assert (shown["state"].strip(), shown["exit_code"].strip()) == ("failed", "3")
    assert (await run.run("show", runner_id, "--json")).json["reason"] == "exit_nonzero"
    history = (await run.run("events", runner_id)).out.splitlines()
    assert "finished" in history[-1]
    assert "exit_nonzero" in history[-1]
    assert [event["type"] for event in (await run.run("events", runner_id, "--json")).json][-1] == "finished"
    output = place / "output"
    with output.open("w") as file, run.start("logs", runner_id, stdout=file):
        pass
    assert output.read_bytes() == b"one\ntwo [bold]\n\x1b[31mthree\xff"
    lines = (await run.run("logs", runner_id, "-n", "2", "--json")).out.splitlines()
    assert [json.loads(line)["line"] for line in lines] == ["two [bold]", "\x1b[31mthree\N{REPLACEMENT CHARACTER}"]
    assert (await run.run("logs", runner_id[:-2], "-n", "2", "--json")).out.splitlines() == lines
    since = [(await run.run("logs", runner_id, "--json", "--since", since)).out for since in ("10m", "9000-01-01T00:00:00Z")]
    assert [len(lines.splitlines()) for lines in since] == [3, 0]
    refused = await run.run("logs", runner_id, "--since", "yesterday")
    assert (refused.code, "such as 10m" in refused.err) == (REFUSED, True)


async def test_a_log_and_a_history_are_followed_to_the_runners_end(server: Served, place: Path) -> None:
    run = at(server)
    runner_id = await run.launched(launch_file(place, f"echo one\n{WAITS}echo two"))
    with run.start("logs", "-f", runner_id) as log, run.start("events", "-f", "--json", runner_id) as events:
        assert log.stdout
        assert events.stdout
        assert await asyncio.to_thread(log.stdout.readline) == "one\n"
        assert json.loads(await asyncio.to_thread(events.stdout.readline))["to"] == "starting"
        (place / "go").touch()
        assert (await asyncio.to_thread(log.stdout.read)).startswith("two\n")
        assert json.loads((await asyncio.to_thread(events.stdout.read)).splitlines()[-1])["to"] == "finished"
    assert (log.returncode, events.returncode) == (OK, OK)


async def test_what_happens_to_all_is_told_and_followed(server: Served, place: Path) -> None:
    run = at(server)
    with run.start("events", "-f", "--json", bufsize=1) as follower:
        assert follower.stdout
        line = asyncio.create_task(asyncio.to_thread(follower.stdout.readline))
        runner_ids = set()
        while not line.done():  # it follows from when it has come to be, and does not say when that is
            runner_ids.add((await run.run("launch", "--wait", launch_file(place))).out.strip())
        assert json.loads(await line)["runner_id"] in runner_ids
        follower.send_signal(signal.SIGINT)
    assert follower.returncode == INTERRUPTED
    told = (await run.run("events")).out
    assert all(runner_id in told for runner_id in runner_ids)


async def test_a_diagnosis_is_told_in_paragraphs(server: Served, place: Path) -> None:
    run = at(server)
    runner_id = (await run.run("launch", "--wait", launch_file(place, "echo oh no; exit 3"))).out.strip()
    told = await run.run("diagnose", runner_id)
    assert told.code == OK
    assert "What to do: " in told.out
    assert "oh no" in told.out
    assert (await run.run("diagnose", runner_id, "--json")).json["reason"] == "exit_nonzero"


async def test_engines_are_shown(server: Served) -> None:
    run = at(server)
    told = await run.run("engines")
    head, row = told.out.splitlines()
    assert head.split() == ["ENGINE", "POOLS", "ANSWERS", "HEARD", "WHAT"]
    assert "broken, local" in row or "local, broken" in row
    assert " yes " in row
    assert (await run.run("engines", "--json")).json[0]["answers"] is True


async def test_a_launch_can_be_looked_at_before_it_is_made(server: Served, place: Path) -> None:
    run = at(server)
    told = await run.run("launch", "--dry-run", launch_file(place))
    assert (told.code, told.err) == (OK, "")
    assert "agent.sh" in told.out
    assert "task_context" not in told.out
    shown = (await run.run("launch", "--dry-run", "--json", launch_file(place))).json
    assert shown["request"]["command"] == ["sh", "agent.sh"]
    assert shown["request"]["environment"]["RUNNER_TOKEN"] == "(hidden)"  # noqa: S105 - which is what is shown of it
    assert (await run.run("ps", "--all", "--slot-id", place.name, "--json")).json == []


async def test_targets_of_webhooks_are_shown_and_tried_again(serve: Serve, slot: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("whsec_" + "QUFB" * 10)
    (tmp_path / "hooks.yaml").write_text('[{"name": "registry", "url": "http://127.0.0.1:9/", "secret_file": "secret"}]')
    async with serve(WEBHOOKS_FILE=str(tmp_path / "hooks.yaml")) as service:
        run = at(service)
        await run.launched("--wait", launch_file(slot))

        async def failing() -> bool:
            return bool((await run.run("webhooks", "--json")).json[0]["state"] == "failing")

        await until(failing)
        head, row = (await run.run("webhooks")).out.splitlines()
        assert head.split() == ["TARGET", "URL", "IS", "BEHIND", "RETRYING", "PARKED", "ERROR"]
        assert row.startswith("registry ")
        assert "state: " in (await run.run("webhooks", "registry", "--retry")).out
        assert (await run.run("webhooks", "nobody", "--retry")).code == NOT_FOUND
        assert (await run.run("webhooks", "nobody")).code == NOT_FOUND
        assert (await run.run("webhooks", "--retry")).code == USAGE


async def test_what_a_terminal_cannot_show_is_shown_as_well_as_it_can(server: Served, place: Path) -> None:
    run = at(server, PYTHONIOENCODING="ascii")
    ended = await run.run("launch", "--wait", launch_file(place, slot_id="плотник"))
    assert ended.code == OK
    assert "???????" in (await run.run("ps", "-a", "--slot-id", "плотник")).out


async def test_runners_are_stopped_one_that_is_none_notwithstanding(server: Served, place: Path) -> None:
    run = at(server)
    first = await run.launched(launch_file(place, "touch up; exec sleep 600"))
    second = await run.launched(launch_file(place.parent / f"{place.name}-2", "exec sleep 600"))
    await until((place / "up").exists)
    ended = await run.run("stop", first, "runner-000000000000", second, "--wait", "--grace", "5")
    assert ended.code == NOT_FOUND
    assert [line.split()[0] for line in ended.out.splitlines()] == [first, second]
    assert "failed: cancelled: stopped by" in ended.out
    assert not alive({"runner_id": second})


async def test_pools_are_shown_and_switched(serve: Serve, slot: Path) -> None:
    async with serve({"local": local_pool(max_concurrency=3), "other": local_pool()}) as service:
        run = at(service)
        await run.launched(launch_file(slot, "exec sleep 600"))
        rows = [line.split() for line in (await run.run("pools")).out.splitlines()]
        assert rows[1][:5] == ["local", "local-process", "on", "1/3", "0"]
        assert (await run.run("pools", "other", "--disable")).out.splitlines()[1].split()[2] == "off"
        assert [pool["enabled"] for pool in (await run.run("pools", "--json")).json] == [True, False]
        assert (await run.run("launch", launch_file(slot.parent / "s", pool="other"))).code == REFUSED
        assert (await run.run("pools", "other", "--enable", "--json")).json["enabled"]


async def test_whoever_stops_reading_is_not_bothered(server: Served, place: Path) -> None:
    run = at(server)
    runner_id = (await run.run("launch", "--wait", launch_file(place, "yes | head -n 100000"))).out.strip()
    with run.start("logs", runner_id) as program:
        assert program.stdout
        assert program.stderr
        program.stdout.readline()
        program.stdout.close()
        assert await asyncio.to_thread(program.stderr.read) == ""
    assert program.returncode == 141


async def test_words_are_completed_from_what_the_service_has(serve: Serve, slot: Path) -> None:
    async with serve() as service:
        run = at(service)
        runner_id = await run.launched(launch_file(slot, "exec sleep 600"))
        for words, found in ((f"show {runner_id[:9]}", runner_id), ("pools lo", "local"), ("dia", "diagnose")):
            assert found in (await completions(run, words)).split()
    assert (await completions(run, "pools lo")).strip() == ""


async def completions(run: CommandLine, words: str) -> str:
    """Ask for completions of the last word, as a shell does, by the program's own name."""
    program = Path(sys.executable).parent / "runner-launcher"
    asked = {
        "_RUNNER_LAUNCHER_COMPLETE": "complete_bash",
        "COMP_WORDS": f"runner-launcher {words}",
        "COMP_CWORD": str(len(words.split())),
    }
    ended = await asyncio.to_thread(
        subprocess.run, [str(program)], env=run.environment | asked, capture_output=True, text=True, timeout=20, check=False
    )
    assert "Traceback" not in ended.stderr
    return ended.stdout


def test_who_serves_loads_no_terminal_and_who_asks_no_server() -> None:
    def loaded(code: str) -> set[str]:
        show = f"import sys\n{code}\nprint(*(name.partition('.')[0] for name in sys.modules))"
        ended = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
        return set(ended.stdout.split())

    assert not {"rich", "httpx", "runner_launcher_client"} & loaded("import app.cli, app.server")
    assert not {"fastapi", "uvicorn", "sqlalchemy", "pydantic"} & loaded("import app.cli, app.terminal")


async def test_a_token_that_cannot_be_told_is_told_in_a_line(tmp_path: Path) -> None:
    for setting, words in (("LISTEN", "RUNNER_LAUNCHER_LISTEN: must look like"), ("STATE_DIR", "start the service first")):
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), f"RUNNER_LAUNCHER_{setting}": "nowhere"}
        ended = await CommandLine(environment).run("token")
        assert (ended.code, ended.out, len(ended.err.splitlines())) == (1, "", 1)
        assert words in ended.err
