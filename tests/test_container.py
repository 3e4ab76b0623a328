"""A runner in the words of Docker's Engine API, and back. ``UPDATE_GOLDEN=1`` writes tests/golden/docker anew."""

import io
import json
import os
import signal
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue

from app.errors import LaunchRejected
from app.launcher import Enforcement, Exit, LaunchSpec
from app.launchers.container import (
    CONTEXT_FILE,
    INSTALLATION,
    MAX_STRING_BYTES,
    MAX_STRINGS_BYTES,
    RUNNER_ID,
    Engine,
    container_config,
    context_archive,
    engines_path,
    exit_of,
    exit_told,
    handle_of,
    identity_of,
    log_may_be_cut,
    runner_id_of,
    seconds,
)
from app.reason import Reason

GOLDEN = Path(__file__).parent / "golden" / "docker"
RUNNER = "runner-0123456789ab"
ENGINE = Engine(name="engine-1")
SHORT = LaunchSpec(command=None, environment={}, context=b"{}", options={"image": "busybox"})


def spec(**options: Any) -> LaunchSpec:  # noqa: ANN401 - as pools have them
    return LaunchSpec(
        command=("agent", "--task", "$TASK_CONTEXT_FILE"),
        environment={"PATH": "/bin", "RUNNER_ID": RUNNER},
        context=b"{}",
        working_dir="/slots/slot-1",
        cpu=1.5,
        memory_mib=512,
        labels={"task-id": "7", "pool": "docker"},
        options={"image": "necrocode/runner:latest", **options},
    )


EVERYTHING = spec(
    pull_policy="always",
    registry_auth="/etc/registry.json",
    network="agents",
    volumes={"/srv/cache": "/cache", "models": "/models"},
    slot_path_map={"/slots": "/mnt/engine/slots", "/": "/elsewhere"},
    labels={
        "team": "a",
        "app.kubernetes.io/name": "theirs",
        "runner-launcher.runner-id": "runner-ffffffffffff",
        "runner-launcher.installation": "theirs",
        "runner-launcher.identity.task-id": "8",
        "runner-launcher.handle": "{}",
        "runner-launcher.of-a-later-version": "x",
    },
    runtime="runsc",
    gpus="device=0,GPU-2",
    user="1000:100",
    cap_add=["NET_ADMIN", "SYS_PTRACE"],
    pids_limit=64,
    docker_host="tcp://10.0.0.1:2376",
)

CASES: dict[str, tuple[LaunchSpec, tuple[int, int] | None, Engine]] = {
    "minimal": (SHORT, None, ENGINE),
    "usual": (spec(), (1000, 1001), ENGINE),
    "everything": (EVERYTHING, (1000, 1001), ENGINE),
    "image-user": (spec(user="image"), (1000, 1001), ENGINE),
    "all-gpus": (spec(gpus="all"), (0, 0), ENGINE),
    "json-file": (spec(), (1000, 1001), Engine(log_driver="json-file")),
    "no-limits": (spec(), (1000, 1001), Engine(memory_limit=False, cpu_limit=False, pids_limit=False, init=False)),
}


def config(spec: LaunchSpec, owner: tuple[int, int] | None = None, engine: Engine = ENGINE) -> dict[str, Any]:
    return container_config(RUNNER, spec, installation="installation-1", owner=owner, engine=engine)


# What is sent.


@pytest.mark.parametrize("name", CASES)
def test_what_is_sent_is_what_was_reviewed(name: str) -> None:
    path, sent = GOLDEN / f"{name}.json", json.dumps(config(*CASES[name]), indent=2) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(sent)
    assert sent == path.read_text()


def test_every_golden_file_is_of_a_case() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(CASES)


@given(
    st.dictionaries(
        st.one_of(st.text(), st.sampled_from([RUNNER_ID, INSTALLATION, "app.kubernetes.io/name", "runner-launcher.handle"])),
        st.text(),
    ),
    st.dictionaries(st.text(), st.text()),
)
def test_labels_of_a_pool_replace_none_of_ours(pool: dict[str, str], identity: dict[str, str]) -> None:
    bare = LaunchSpec(command=None, environment={}, context=b"", labels=identity, options={"image": "i"})
    options: dict[str, JsonValue] = {"image": "i", "labels": {**pool}}
    mixed = LaunchSpec(command=None, environment={}, context=b"", labels=identity, options=options)
    ours, both = config(bare)["Labels"], config(mixed)["Labels"]
    assert both.items() >= ours.items()
    assert identity_of(both) == identity
    assert runner_id_of(both, "installation-1") == RUNNER
    assert {name: value for name, value in both.items() if name not in ours}.items() <= pool.items()
    assert handle_of("c", both, ENGINE, None) == handle_of("c", ours, ENGINE, None)


def test_only_the_installations_own_containers_are_known() -> None:
    labels = config(spec())["Labels"]
    assert runner_id_of(labels, "installation-2") is None
    assert runner_id_of({RUNNER_ID: RUNNER}, "installation-1") is None
    assert runner_id_of({INSTALLATION: "installation-1"}, "installation-1") is None
    assert runner_id_of(None, "installation-1") is None


def test_a_handle_is_read_back_from_labels() -> None:
    labels = config(EVERYTHING)["Labels"]
    handle = handle_of("c0ffee", labels, ENGINE, "sha256:1")
    assert (handle.runner_id, handle.container_id, handle.node) == (RUNNER, "c0ffee", "engine-1")
    assert (handle.image_digest, handle.isolation) == ("sha256:1", "runsc")
    assert handle.enforced_by == Enforcement(cpu="engine", memory_mib="engine")
    weak = Engine(memory_limit=False)
    assert handle_of("c", config(spec(), engine=weak)["Labels"], weak, None).enforced_by == Enforcement(cpu="engine")
    assert handle_of("c", {RUNNER_ID: RUNNER}, Engine(), None).enforced_by == Enforcement()  # of an older version


def test_nobody_is_privileged_and_swap_is_no_way_around_memory() -> None:
    for case in CASES.values():
        host = config(*case)["HostConfig"]
        assert "Privileged" not in host
        assert "Binds" not in host  # which the engine would make, where they are missing
        assert host["CapDrop"] == ["ALL"]
        assert host["SecurityOpt"] == ["no-new-privileges"]
        assert host.get("MemorySwap") == host.get("Memory")
        assert host["RestartPolicy"] == {"Name": "no"}


def test_the_context_is_in_the_file_alone_and_nobody_says_it_is_elsewhere() -> None:
    told = LaunchSpec(
        command=None, environment={"TASK_CONTEXT_FILE": "/else"}, context=b"secret", options={"image": "i", "gpus": "2"}
    )
    sent = config(told)
    assert f"TASK_CONTEXT_FILE={CONTEXT_FILE}" in sent["Env"]
    assert "secret" not in json.dumps(sent)
    assert sent["HostConfig"]["DeviceRequests"][0]["Count"] == 2


@pytest.mark.parametrize("gpus", ["", "-1", "0.5", "some", "count=1"])
def test_gpus_in_no_known_words_are_refused(gpus: str) -> None:
    if not gpus:
        assert "DeviceRequests" not in config(spec(gpus=gpus))["HostConfig"]
        return
    with pytest.raises(LaunchRejected, match="gpus must be") as refused:
        config(spec(gpus=gpus))
    assert refused.value.reason == Reason.CONFIG_ERROR


# Sizes. tests/contract/test_docker.py shows that the kernel takes what passes here, and no byte more.


@pytest.mark.parametrize("letter", ["x", "ü", "🚀"])
def test_a_string_may_have_as_many_bytes_as_the_kernel_takes(letter: str) -> None:
    room = MAX_STRING_BYTES - 1 - len("BIG=")  # the kernel counts the zero at the end, too
    fits = letter * (room // len(letter.encode())) + "y" * (room % len(letter.encode()))
    for environment, command in (({"BIG": fits}, None), ({}, (f"BIG={fits}",))):
        sent = config(LaunchSpec(command=command, environment=environment, context=b"", options={"image": "i"}))
        assert f"BIG={fits}" in [*sent["Env"], *sent.get("Cmd", [])]
    for environment, command in (({"BIG": fits + "y"}, None), ({}, (f"BIG={fits}y",))):
        with pytest.raises(LaunchRejected, match="BIG=") as refused:
            config(LaunchSpec(command=command, environment=environment, context=b"", options={"image": "i"}))
        assert refused.value.reason == Reason.CONFIG_ERROR
        assert len(str(refused.value)) < 300, "it is not repeated in whole"


def test_many_strings_have_a_limit_together() -> None:
    many = {f"NAME_{number}": "x" * 100_000 for number in range(19)}
    config(LaunchSpec(command=None, environment=many, context=b"", options={"image": "i"}))
    with pytest.raises(LaunchRejected, match=str(MAX_STRINGS_BYTES)) as refused:
        config(LaunchSpec(command=("x" * 100_000,), environment=many, context=b"", options={"image": "i"}))
    assert refused.value.reason == Reason.CONFIG_ERROR


def test_short_strings_need_more_room_than_their_letters() -> None:
    """For each the kernel keeps where it is. With 29,000 of 69 bytes a program was not started, with 25,900 it was."""
    for count, fits in ((25_900, True), (28_971, False)):
        many = {f"_{100_000 + number}": "x" * 60 for number in range(count)}
        spec = LaunchSpec(command=None, environment=many, context=b"", options={"image": "i"})
        if fits:
            config(spec)
        else:
            with pytest.raises(LaunchRejected, match=str(MAX_STRINGS_BYTES)):
                config(spec)


# Paths.


@pytest.mark.parametrize(
    ("path", "theirs"),
    [
        ("/slots", "/engine/slots"),
        ("/slots/a", "/engine/slots/a"),
        ("/slots/deep/a", "/deep/a"),
        ("/slots/deep", "/deep"),
        ("/slots/deeper", "/engine/slots/deeper"),
        ("/slotsandmore", "/slotsandmore"),
        ("/whole/a", "/a"),
        ("/whole", "/"),
        ("/elsewhere/a", "/elsewhere/a"),
    ],
)
def test_a_path_is_mapped_by_the_longest_prefix_of_whole_names(path: str, theirs: str) -> None:
    known = {"/slots": "/engine/slots", "/slots/deep/": "/deep", "/whole": "/"}
    assert engines_path(path, known) == theirs
    assert engines_path(path, dict(reversed(known.items()))) == theirs


def test_a_root_is_the_prefix_of_everything() -> None:
    assert engines_path("/slots/a", {"/": "/host"}) == "/host/slots/a"
    assert engines_path("/slots/a", {"/": "/host", "/slots": "/s"}) == "/s/a"


# The context.


@given(st.binary(max_size=5000))
def test_the_context_is_packed_for_the_containers_root(context: bytes) -> None:
    with tarfile.open(fileobj=io.BytesIO(context_archive(context))) as tar:
        folder, file = tar.getmembers()
        content = tar.extractfile(file)
        assert content
        assert content.read() == context
    assert f"/{file.name}" == CONTEXT_FILE
    assert (folder.isdir(), f"/{folder.name}", folder.mode) == (True, str(Path(CONTEXT_FILE).parent), 0o755)
    assert (file.isreg(), file.mode, file.uid, file.gid) == (True, 0o444, 0, 0)


# And back: State objects as engines give them.


def state(code: int, **more: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    return {
        "Status": "exited",
        "Running": False,
        "OOMKilled": False,
        "Dead": False,
        "Pid": 0,
        "ExitCode": code,
        "Error": "",
        "StartedAt": "2026-11-23T11:30:00.512345678Z",
        "FinishedAt": "2026-11-23T11:30:01.250000001Z",
        **more,
    }


def test_an_exit_is_its_code_and_its_time() -> None:
    end = exit_of(state(7), last_line=b"bye", oom_event=False)
    assert (end.code, end.signal, end.oom_killed, end.reason, end.message) == (7, None, False, None, None)
    assert end.finished_at == pytest.approx(1795433401.25)
    assert end.stopped is None


@pytest.mark.parametrize("code", [137, 1])
@pytest.mark.parametrize(("flag", "event"), [(True, False), (False, True), (True, True)])
def test_out_of_memory_is_the_engines_word_and_an_end_that_is_no_success(code: int, *, flag: bool, event: bool) -> None:
    end = exit_of(state(code, OOMKilled=flag), last_line=b"", oom_event=event)
    assert (end.code, end.oom_killed, end.message) == (code, True, None)


def test_a_child_out_of_memory_spoils_no_success() -> None:
    end = exit_of(state(0, OOMKilled=True), last_line=b"", oom_event=True)
    assert (end.code, end.oom_killed) == (0, False)


def test_137_alone_is_not_out_of_memory() -> None:
    end = exit_of(state(137), last_line=b"", oom_event=False)
    assert (end.code, end.oom_killed, end.signal) == (137, False, None)
    assert end.message
    assert signal.SIGKILL.name in end.message


def test_of_an_end_that_nothing_tells_255_is_made_up() -> None:
    """The times of the state above; a machine that came up between them, before them, and after them."""
    assert "does not know" in (exit_of(state(255), last_line=b"", oom_event=False).message or "")
    booted_at = seconds("2026-11-23T11:30:01.0Z")
    end = exit_of(state(255), last_line=b"", oom_event=False, booted_at=booted_at)
    assert (end.code, end.signal, end.reason, end.finished_at) == (None, None, None, booted_at)
    for other in ("2026-11-23T11:30:00.0Z", "2026-11-23T11:30:02.0Z"):
        assert exit_of(state(255), last_line=b"", oom_event=False, booted_at=seconds(other)).code == 255
    assert exit_of(state(1), last_line=b"", oom_event=False, booted_at=booted_at).code == 1


@pytest.mark.parametrize("code", [128, 129 + signal.NSIG])
def test_a_code_that_is_no_signals_says_nothing_more(code: int) -> None:
    assert exit_of(state(code), last_line=b"", oom_event=False).message is None


@pytest.mark.parametrize("code", [126, 127])
def test_a_command_that_cannot_be_run_is_told_from_a_program_that_says_so(code: int) -> None:
    said = b"[FATAL tini (7)] exec no-such-command failed: No such file or directory"
    end = exit_of(state(code), last_line=said, oom_event=False)
    assert (end.code, end.reason) == (code, Reason.CONFIG_ERROR)
    assert end.message
    assert "exec no-such-command failed: No such file or directory" in end.message
    for line in (b"sh: no-such-command: not found", b"", said + b"!\n", b"x" + said):
        assert exit_of(state(code), last_line=line, oom_event=False).reason is None
    assert exit_of(state(1), last_line=said, oom_event=False).reason is None


def test_the_engines_own_error_is_the_message() -> None:
    said = "error while creating mount source path"
    assert exit_of(state(128, Error=said), last_line=b"", oom_event=False).message == said


def test_a_container_that_ended_before_it_began_has_the_engines_time_all_the_same() -> None:
    """A very short one does, by some milliseconds."""
    early = state(0, FinishedAt="2026-11-23T11:30:00.504345678Z")
    end = exit_of(early, last_line=b"", oom_event=False)
    assert end.finished_at == pytest.approx(1795433400.504345)


HANDLE = "runner-launcher.handle"
LIMITED, FREE = ({HANDLE: json.dumps({"enforced_by": {"memory_mib": held}})} for held in ("engine", "none"))


@pytest.mark.parametrize(
    ("code", "message"), [(0, None), (3, None), (143, "exited with code 143, as a program does that SIGTERM ends")]
)
def test_the_die_event_tells_the_end_of_whom_nobody_signalled(code: int, message: str | None) -> None:
    for labels in ({}, FREE):
        end = exit_told({"exitCode": str(code), **labels}, 5.5, oom_event=False)
        assert end == Exit(code=code, stopped=False, finished_at=5.5, message=message)


def test_a_success_is_one_whatever_ran_out_meanwhile() -> None:
    assert exit_told({"exitCode": "0", **LIMITED}, 5.5, oom_event=True) == Exit(code=0, stopped=False, finished_at=5.5)


@pytest.mark.parametrize("code", ["126", "127", "", "-1"])
def test_the_die_event_is_not_believed_where_more_may_be_known(code: str) -> None:
    assert exit_told({"exitCode": code}, 5.5, oom_event=False) is None


def test_a_failure_that_may_come_of_a_lack_of_memory_is_looked_up() -> None:
    assert exit_told({"exitCode": "3", **LIMITED}, 5.5, oom_event=False) is None
    assert exit_told({"exitCode": "3", **FREE}, 5.5, oom_event=True) is None


def test_podmans_die_event_is_not_believed() -> None:
    assert exit_told({"containerExitCode": "3", "exitCode": "3"}, 5.5, oom_event=False) is None
    assert exit_told({"containerExitCode": "3"}, 5.5, oom_event=False) is None


@pytest.mark.parametrize("zero", ["0001-01-01T00:00:00Z", "", None])
def test_a_time_that_never_was_is_none(zero: str | None) -> None:
    end = exit_of(state(255, FinishedAt=zero), last_line=b"", oom_event=False)
    assert end.finished_at is None


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("2026-11-23T11:30:00Z", 1795433400.0),
        ("2026-11-23T11:30:00.5Z", 1795433400.5),
        ("2026-11-23T12:30:00.500000000+01:00", 1795433400.5),  # Podman, in its own time zone
        ("1969-12-31T23:59:59.25Z", -0.75),
    ],
)
def test_times_are_read_in_every_length_that_engines_write(written: str, read: float) -> None:
    assert seconds(written) == pytest.approx(read)


# What an engine can do, and how much of a log it keeps.


def test_what_an_engine_does_not_say_it_can() -> None:
    assert Engine.told({"Plugins": {"Log": ["local"]}}) == Engine()
    assert Engine.told({}).log_driver == "json-file"
    assert Engine.told({"Name": None, "Plugins": {"Log": None}, "InitBinary": ""}).init is False
    docker = {
        "Name": "engine-1",
        "MemoryLimit": True,
        "CpuCfsQuota": False,
        "PidsLimit": False,
        "InitBinary": "docker-init",
        "Plugins": {"Log": ["json-file", "local", "syslog"]},
    }
    assert Engine.told(docker) == Engine(name="engine-1", cpu_limit=False, pids_limit=False)


@pytest.mark.parametrize("log_max_mib", [1, 2, 3, 50, 1024])
def test_an_engine_keeps_at_least_what_the_cap_is(log_max_mib: int) -> None:
    kept = LaunchSpec(command=None, environment={}, context=b"", log_max_mib=log_max_mib, options={"image": "i"})
    sent = config(kept)
    log = sent["HostConfig"]["LogConfig"]["Config"]
    assert int(log["max-size"]) * (int(log["max-file"]) - 1) == log_max_mib * 2**20  # bytes: the k of an engine is 1000
    assert not log_may_be_cut(0, 0, sent["Labels"])
    assert log_may_be_cut(log_max_mib * 2**20 + 1, 0, sent["Labels"])
    assert not log_may_be_cut(log_max_mib * 2**19, 0, sent["Labels"])
