"""The task context, and how a runner is told what it is: pure, from the request and its pool to a LaunchSpec.

What a runner finds in its environment is a contract with programs that we do not know; the names and their order of
precedence are those of the system before us.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from typing_extensions import override

from app.errors import ContextTooLarge, Fault
from app.launcher import LaunchSpec
from app.models import LaunchRequest
from app.pools import MAX_VARIABLE_BYTES, LocalProcessConfig, Pool, PoolConfig

MAX_CONTEXT_BYTES = 1_000_000
"""What a Kubernetes Secret can carry with room to spare, and so the limit everywhere."""

INHERITED = ("PATH", "HOME", "LANG", "TZ")

_IDS = r"-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
_TRACEPARENT = re.compile(rf"00{_IDS}|(?!00|ff)[0-9a-f]{{2}}{_IDS}(-[!-~]*)?")


def task_context(request: LaunchRequest) -> bytes:
    """Write the eleven fields by which a runner knows its task, as JSON in UTF-8."""
    task, slot = request.task, request.slot
    fields = {
        "task_id": task.id,
        "spec_name": task.spec,
        "task_title": task.title,
        "task_description": task.description,
        "dependencies": task.dependencies,
        "required_skill": task.required_skill,
        "slot_id": slot.slot_id,
        "slot_path": slot.slot_path,
        "repo_url": slot.repo_url,
        "branch_name": task.reserved_branch,
        "metadata": task.metadata,
    }
    context = json.dumps(fields, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    if len(context) > MAX_CONTEXT_BYTES:
        text = f"the task context is {len(context)} bytes long, and {MAX_CONTEXT_BYTES} is the most"
        raise ContextTooLarge(text, Fault("/task", text))
    return context


def inherited(environ: Mapping[str, str]) -> dict[str, str]:
    """Pick what a runner may see of the service's own environment, which holds secrets."""
    return {name: environ[name] for name in INHERITED if name in environ}


def traceparent(header: str | None) -> str:
    """Pass on the caller's trace if it is one, else begin one: a runner is always part of a trace."""
    if header and _TRACEPARENT.fullmatch(header):
        return header
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a trace, as W3C's traceparent writes it."""

    trace_id: str
    span_id: str
    sampled: bool

    @classmethod
    def read(cls, traceparent: str) -> Self | None:
        """Read a well-formed header; None for an empty one."""
        if not traceparent:
            return None
        _, trace_id, span_id, flags = traceparent.split("-")[:4]
        return cls(trace_id, span_id, bool(int(flags, 16) & 1))

    @override
    def __str__(self) -> str:
        """Write it."""
        return f"00-{self.trace_id}-{self.span_id}-{int(self.sampled):02x}"

    def below(self) -> "Place":
        """Make a place for a span below this one."""
        return Place(self.trace_id, secrets.token_hex(8), self.sampled)


def environment(
    pool: Pool,
    *,
    runner_id: str,
    context: bytes,
    token: str,
    url: str,
    traceparent: str,
    inherited: Mapping[str, str],
) -> dict[str, str]:
    """Put together a runner's environment, the later winning; the launcher adds TASK_CONTEXT_FILE.

    A context too long for one variable travels by the file alone.
    """
    told = {
        "RUNNER_ID": runner_id,
        "POOL_NAME": pool.name,
        "RUNNER_LAUNCHER_URL": url,
        "RUNNER_TOKEN": token,
        "TRACEPARENT": traceparent,
    }
    if len(b"TASK_CONTEXT=" + context + b"\0") <= MAX_VARIABLE_BYTES:
        told["TASK_CONTEXT"] = context.decode()
    return {**inherited, **pool.plain_settings, **pool.config.environment, **told}


def launch_spec(
    pool: Pool,
    request: LaunchRequest,
    *,
    runner_id: str,
    token: str,
    url: str,
    traceparent: str,
    inherited: Mapping[str, str],
    default_command: Sequence[str],
    working_dir: str | None,
) -> LaunchSpec:
    """Resolve a request and its pool into what a launcher needs.

    ``working_dir`` is the slot's place as its machine knows it, checked by the caller; ``url`` is how this service is
    reached where the pool says nothing else. Only a process on this machine inherits: the service's PATH and HOME mean
    nothing inside an image.
    """
    config = pool.config
    context = task_context(request)
    cpu, memory_mib = pool.demand
    return LaunchSpec(
        command=_command(pool, default_command),
        environment=environment(
            pool,
            runner_id=runner_id,
            context=context,
            token=token,
            url=config.public_url or url,
            traceparent=traceparent,
            inherited=_inherited(config, inherited),
        ),
        context=context,
        working_dir=_working_dir(pool, working_dir),
        cpu=cpu,
        memory_mib=memory_mib,
        run_timeout_seconds=config.run_timeout_seconds,
        stop_grace_seconds=config.stop_grace_seconds,
        log_max_mib=config.log_max_mib,
        options=config.model_dump(mode="json", include=type(config).model_fields.keys() - {"environment"}),
    )


def _inherited(config: PoolConfig, inherited: Mapping[str, str]) -> Mapping[str, str]:
    """Leave out what is not true where the runner runs: inside an image, or in another user's home."""
    match config:
        case LocalProcessConfig(user=None):
            return inherited
        case LocalProcessConfig():
            return {name: value for name, value in inherited.items() if name != "HOME"}
        case _:
            return {}


def _command(pool: Pool, default: Sequence[str]) -> tuple[str, ...] | None:
    """Tell what to run; None: what the image says."""
    config = pool.config
    if not isinstance(config, LocalProcessConfig):
        return tuple(config.command) if config.command else None
    command = tuple(config.command or default)
    if config.python_path and command[0] == "python":
        return (config.python_path, *command[1:])
    return command


def _working_dir(pool: Pool, slot: str | None) -> str | None:
    if isinstance(pool.config, LocalProcessConfig) and pool.config.working_dir:
        return pool.config.working_dir
    return slot if pool.works_in_slot else None
