"""A bare client: a process of its own that does without the service what the service does, told by lines how much of it."""

import asyncio
import json
import secrets
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path

from figures import Round
from pydantic import JsonValue

from app.launcher import LaunchSpec


class Bare:
    """The bare client's process: a script, run with ``--bare`` and some words."""

    def __init__(self, script: str, *words: str) -> None:
        self._command = (sys.executable, script, "--bare", *words)
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(*self._command, stdin=pipe, stdout=pipe, limit=2**24)

    async def run(self, launches: int, at_once: int, *words: str) -> Round:
        """Let it launch so many."""
        assert self._process
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{' '.join((str(launches), str(at_once), *words))}\n".encode())
        line = await self._process.stdout.readline()
        if not line:
            raise SystemExit("the bare client ended")
        return Round(**json.loads(line))

    async def stop(self) -> None:
        if self._process and self._process.returncode is None:
            assert self._process.stdin
            self._process.stdin.close()
            await self._process.wait()


async def obey(do: Callable[..., Awaitable[Round]]) -> None:
    """Be the bare client: do what each line says, and answer with what it took."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        launches, at_once, *words = line.split()
        spent = time.process_time()
        done = await do(int(launches), int(at_once), *words)
        done.cpu = time.process_time() - spent
        print(json.dumps(asdict(done)), flush=True)


def spec_of(runner_id: str, slot: Path, command: tuple[str, ...], **options: JsonValue) -> LaunchSpec:
    """Write what the service makes of the same launch."""
    context = {
        **dict.fromkeys(("spec_name", "task_title", "task_description", "required_skill", "branch_name"), "unknown"),
        "task_id": runner_id,
        "dependencies": [],
        "slot_id": slot.name,
        "slot_path": str(slot),
        "metadata": {},
    }
    text = json.dumps(context)
    environment = {
        "RUNNER_ID": runner_id,
        "POOL_NAME": "at-once",
        "RUNNER_LAUNCHER_URL": "http://127.0.0.1:8080",
        "RUNNER_TOKEN": secrets.token_urlsafe(32),
        "TRACEPARENT": f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01",
        "TASK_CONTEXT": text,
    }
    labels = {"runner_id": runner_id, "task_id": runner_id, "pool_name": "at-once", "slot_id": slot.name, "policy": "{}"}
    return LaunchSpec(
        command=command,
        environment=environment,
        context=text.encode(),
        working_dir=str(slot),
        labels={**labels, "slot_place": f"bench:{slot}", "token_sha256": secrets.token_hex(32)},
        options=options,
    )
