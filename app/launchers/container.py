"""A runner as a container, in the words of Docker's Engine API: pure, from a LaunchSpec to what is sent, and back.

What an installation has made bears its labels; who reads a container back believes the labels and not the name, which
anybody may take. The pool's own labels come first and can replace none of ours.
"""

import io
import json
import re
import signal
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

from app.errors import LaunchRejected
from app.launcher import Enforcement, Exit, Handle, LaunchSpec
from app.reason import Reason

NAME = "necrocode-runner-"
WORKSPACE = "/workspace"
CONTEXT_FILE = "/task-context/context.json"
RUNNER_ID = "runner-launcher.runner-id"
INSTALLATION = "runner-launcher.installation"
_IDENTITY = "runner-launcher.identity."
_TOLD = "runner-launcher.handle"

MAX_STRING_BYTES = 131_072
"""What the kernel takes as one argument or one ``NAME=value`` (MAX_ARG_STRLEN). The engine takes more, and the runner then
ends with code 1 and a line in its log."""

MAX_STRINGS_BYTES = 2_000_000
"""What the kernel takes of arguments and environment together (a quarter of the usual stack), less what the image adds."""

_POINTER_BYTES = 8

LOG_FILES = 5
PIDS_LIMIT = 4096
_LOG_OVERHEAD = 48
_LOG_PARTS = 63 / 64
"""What is left of a cap for a line that engines keep in parts: each has 16 KiB of it, and some hundred bytes of its own."""

_MEBIBYTE = 2**20
_DEFAULT_RUNTIMES = ("", "runc", "crun", "io.containerd.runc.v2")

NO_COMMAND = (126, 127)
"""What the init process ends with when there is no command that it could become."""

MADE_UP = 255
"""What an engine says where nothing tells how a container ended."""

_INIT_SAYS = re.compile(rb"\[FATAL tini \(\d+\)\] (exec .+ failed: .+)")

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What an engine says of itself: its name, and what it can do on its kernel."""

    name: str = ""
    memory_limit: bool = True
    cpu_limit: bool = True
    pids_limit: bool = True
    init: bool = True
    log_driver: str = "local"

    @classmethod
    def told(cls, info: Mapping[str, Any]) -> "Engine":
        """Read the answer to GET /info."""
        drivers = (info.get("Plugins") or {}).get("Log") or []
        return cls(
            name=info.get("Name") or "",
            memory_limit=bool(info.get("MemoryLimit", True)),
            cpu_limit=bool(info.get("CpuCfsQuota", True)),
            pids_limit=bool(info.get("PidsLimit", True)),
            init=bool(info.get("InitBinary", True)),
            log_driver="local" if "local" in drivers else "json-file",
        )


def container_config(
    runner_id: str, spec: LaunchSpec, *, installation: str, owner: tuple[int, int] | None, engine: Engine
) -> Json:
    """Write the body of POST /containers/create. ``owner`` is who owns the slot, where that can be seen.

    Raises LaunchRejected for what the kernel would refuse only after the engine has accepted it.
    """
    options = spec.options
    environment = {"TINI_KILL_PROCESS_GROUP": "1", **spec.environment, "TASK_CONTEXT_FILE": CONTEXT_FILE}
    strings = [f"{name}={value}" for name, value in environment.items()]
    _check_sizes([*strings, *(spec.command or ())])
    config: Json = {
        "Image": options["image"],
        "Env": strings,
        "Labels": _labels(runner_id, spec, installation, engine),
        "HostConfig": _host_config(spec, engine),
    }
    if spec.command:
        config["Cmd"] = list(spec.command)
    if spec.working_dir:
        config["WorkingDir"] = WORKSPACE
    user = options.get("user") or (f"{owner[0]}:{owner[1]}" if owner else "image")
    if user != "image":
        config["User"] = user
    return config


def _check_sizes(strings: list[str]) -> None:
    sizes = [(len(string.encode()) + 1, string) for string in strings]
    for size, string in sizes:
        if size > MAX_STRING_BYTES:
            text = f"{string[:40]}... is {size} bytes long, and a program takes at most {MAX_STRING_BYTES} in one string"
            raise LaunchRejected(text, Reason.CONFIG_ERROR)
    total = sum(size + _POINTER_BYTES for size, _ in sizes)
    if total > MAX_STRINGS_BYTES:
        text = f"command and environment are {total} bytes long together, and a program takes at most {MAX_STRINGS_BYTES}"
        raise LaunchRejected(text, Reason.CONFIG_ERROR)


def _labels(runner_id: str, spec: LaunchSpec, installation: str, engine: Engine) -> dict[str, str]:
    pool: Mapping[str, str] = spec.options.get("labels") or {}  # type: ignore[assignment] # validated with the pool
    runtime = str(spec.options.get("runtime") or "")
    told = {
        "enforced_by": asdict(
            Enforcement(
                cpu="engine" if spec.cpu and engine.cpu_limit else "none",
                memory_mib="engine" if spec.memory_mib and engine.memory_limit else "none",
            )
        ),
        "isolation": "container" if runtime in _DEFAULT_RUNTIMES else runtime,
        "log_max_mib": spec.log_max_mib,
    }
    return {
        **{name: value for name, value in pool.items() if not name.startswith("runner-launcher.")},
        "app.kubernetes.io/name": "runner-launcher",
        **{_IDENTITY + name: value for name, value in spec.labels.items()},
        _TOLD: json.dumps(told),
        RUNNER_ID: runner_id,
        INSTALLATION: installation,
    }


def _host_config(spec: LaunchSpec, engine: Engine) -> Json:
    options = spec.options
    host: Json = {
        "Init": engine.init,
        "Mounts": list(_mounts(spec)),
        "CapDrop": ["ALL"],
        "CapAdd": options.get("cap_add") or [],
        "SecurityOpt": ["no-new-privileges"],
        "RestartPolicy": {"Name": "no"},
        "LogConfig": _log_config(spec.log_max_mib, engine),
    }
    if engine.pids_limit:
        host["PidsLimit"] = options.get("pids_limit") or PIDS_LIMIT
    if spec.memory_mib:
        host["Memory"] = host["MemorySwap"] = spec.memory_mib * _MEBIBYTE
    if spec.cpu:
        host["NanoCpus"] = round(spec.cpu * 1e9)
    if options.get("network"):
        host["NetworkMode"] = options["network"]
    if options.get("runtime"):
        host["Runtime"] = options["runtime"]
    if options.get("gpus"):
        host["DeviceRequests"] = [_gpus(str(options["gpus"]))]
    return host


def _mounts(spec: LaunchSpec) -> Iterator[Json]:
    """Mount by the strict form, which fails where the source is missing; the old form would make it, as root."""
    slot_path_map: Mapping[str, str] = spec.options.get("slot_path_map") or {}  # type: ignore[assignment] # validated
    volumes: Mapping[str, str] = spec.options.get("volumes") or {}  # type: ignore[assignment] # with the pool
    if spec.working_dir:
        yield {"Type": "bind", "Source": engines_path(spec.working_dir, slot_path_map), "Target": WORKSPACE}
    for source, target in volumes.items():
        yield {"Type": "bind" if source.startswith("/") else "volume", "Source": source, "Target": target}


def engines_path(path: str, slot_path_map: Mapping[str, str]) -> str:
    """Give a path as the engine's machine knows it, by the longest prefix that is mapped."""
    for ours in sorted(slot_path_map, key=len, reverse=True):
        prefix = ours.rstrip("/")
        if path == prefix or path.startswith(prefix + "/"):
            return slot_path_map[ours].rstrip("/") + path[len(prefix) :] or "/"
    return path


def _log_config(log_max_mib: int, engine: Engine) -> Json:
    """Keep about the newest ``log_max_mib``, the engine's own overhead for each line included; it drops a file at a time."""
    size = log_max_mib * _MEBIBYTE // (LOG_FILES - 1)
    config = {"max-size": str(size), "max-file": str(LOG_FILES)}  # in bytes: the k of an engine is 1000
    if engine.log_driver == "local":
        config["compress"] = "false"  # costs the engine more than it saves here
    return {"Type": engine.log_driver, "Config": config}


def _gpus(asked: str) -> Json:
    """Read what `docker run --gpus` takes: a number, `all`, or `device=ID,ID`."""
    request: Json = {"Capabilities": [["gpu"]]}
    if asked.startswith("device="):
        request["DeviceIDs"] = asked.removeprefix("device=").split(",")
    elif asked == "all" or asked.isdecimal():
        request["Count"] = -1 if asked == "all" else int(asked)
    else:
        raise LaunchRejected(f"gpus must be a number, all or device=ID,ID, and is {asked}", Reason.CONFIG_ERROR)
    return request


def context_archive(context: bytes) -> bytes:
    """Pack the task context as a tar to be unpacked at the container's root: readable by whomever the runner is."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        directory, name = CONTEXT_FILE.strip("/").split("/")
        folder = tarfile.TarInfo(directory)
        folder.type, folder.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(folder)
        file = tarfile.TarInfo(f"{directory}/{name}")
        file.size, file.mode = len(context), 0o444
        tar.addfile(file, io.BytesIO(context))
    return buffer.getvalue()


# And back.


def runner_id_of(labels: Mapping[str, str] | None, installation: str) -> str | None:
    """Tell whose container this is; None if it is not one of this installation."""
    return labels.get(RUNNER_ID) if labels and labels.get(INSTALLATION) == installation else None


def identity_of(labels: Mapping[str, str]) -> dict[str, str]:
    """Give back the labels that a runner was launched with."""
    return {name.removeprefix(_IDENTITY): value for name, value in labels.items() if name.startswith(_IDENTITY)}


def handle_of(container_id: str, labels: Mapping[str, str], engine: Engine, image_digest: str | None) -> Handle:
    """Make a runner's handle from its container."""
    told = json.loads(labels.get(_TOLD, "{}"))
    return Handle(
        runner_id=labels[RUNNER_ID],
        container_id=container_id,
        node=engine.name or None,
        image_digest=image_digest,
        enforced_by=Enforcement(**told.get("enforced_by", {})),
        isolation=told.get("isolation", "container"),
    )


def log_may_be_cut(size: int, lines: int, labels: Mapping[str, str]) -> bool:
    """Say whether an engine that keeps so much of a log may have dropped its oldest part: it does not tell."""
    log_max_mib = json.loads(labels.get(_TOLD, "{}")).get("log_max_mib", 0)
    return size + lines * _LOG_OVERHEAD > int(log_max_mib) * _MEBIBYTE * _LOG_PARTS


def exit_of(state: Mapping[str, Any], *, last_line: bytes, oom_event: bool, booted_at: float | None = None) -> Exit:
    """Read the State of an exited container. The engine tells a code alone: of a signal it says 128 and its number.

    That there is no such command is known to the init process alone, which says so in the last line of the log. Of one
    that ran when its machine went down the engine says 255. ``booted_at`` is when that machine came up; None: not known.
    """
    code = int(state["ExitCode"])
    started_at, finished_at = seconds(state.get("StartedAt")), seconds(state.get("FinishedAt"))
    if code == MADE_UP and booted_at and started_at and finished_at and started_at < booted_at <= finished_at:
        return Exit(message="its machine went down while it ran, and nothing tells how it ended", finished_at=booted_at)
    message = state.get("Error") or None
    if code in NO_COMMAND and (said := _INIT_SAYS.fullmatch(last_line)):
        return Exit(
            code=code,
            reason=Reason.CONFIG_ERROR,
            message=f"the command cannot be run: {said[1].decode(errors='replace')}",
            finished_at=finished_at,
        )
    if message is None and code > 128:  # noqa: PLR2004 - the shell's convention
        try:
            name = signal.Signals(code - 128).name
        except ValueError:
            pass
        else:
            message = f"exited with code {code}, as a program does that {name} ends"
    if message is None and code == MADE_UP:
        message = f"exited with code {code}, which the engine says of an end that it does not know as well"
    oom_killed = code != 0 and (bool(state.get("OOMKilled")) or oom_event)
    return Exit(
        code=code,
        oom_killed=oom_killed,
        message=None if oom_killed else message,
        finished_at=finished_at,
    )


def exit_told(attributes: Mapping[str, str], at: float, *, oom_event: bool) -> Exit | None:
    """Read the die event, at ``at``, of a container that nobody signalled; None if it does not tell all of the end.

    Where the engine holds the memory, a failure may come of a lack of it, which is announced before the death or just after;
    Podman announces none, and names the code twice.
    """
    code = attributes.get("exitCode", "")
    if not code.isdecimal() or int(code) in NO_COMMAND or "containerExitCode" in attributes:
        return None
    limited = json.loads(attributes.get(_TOLD, "{}")).get("enforced_by", {}).get("memory_mib", "none") != "none"
    if int(code) and (limited or oom_event):
        return None
    return replace(exit_of({"ExitCode": code}, last_line=b"", oom_event=False), stopped=False, finished_at=at)


def seconds(timestamp: str | None) -> float | None:
    """Read the engine's time (RFC 3339 with nanoseconds) as seconds since the epoch; None for its zero."""
    if not timestamp or timestamp.startswith("0001-"):
        return None
    return datetime.fromisoformat(timestamp).timestamp()
