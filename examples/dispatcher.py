#!/usr/bin/env python3
"""A Dispatcher's side: launch a runner for a task, and say what became of it.

    make serve                                                        # in one terminal
    RUNNER_LAUNCHER_STATE_DIR=state/service .venv/bin/python examples/dispatcher.py state/slots/example [POOL]

The task, the slot and the pool are the Dispatcher's own objects. A pool that bears the name of one that the service has
configured means that one; POOL is such a name, `local` unless told otherwise.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner_launcher_client import AgentPool, PoolType, RunnerLauncher, RunnerLaunchError

TYPES = {"docker": PoolType.DOCKER, "kubernetes": PoolType.KUBERNETES}


@dataclass
class Task:
    """A task, as a Task Registry holds it."""

    id: str
    title: str
    description: str
    dependencies: list[str] = field(default_factory=list)
    required_skill: str | None = None
    reserved_branch: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass
class Slot:
    """A workspace slot: a checked-out repository."""

    slot_id: str
    slot_path: Path
    repo_url: str


def main(slot_path: str, pool_name: str = "local") -> int:
    """Launch one runner in the slot, and wait for its end."""
    task = Task(
        id="1.1",
        title="Add a greeting",
        description="Write a file that says who did this task and when.",
        required_skill="backend",
        metadata={"spec_name": "hello"},
    )
    path = Path(slot_path).absolute()
    slot = Slot(slot_id=path.name, slot_path=path, repo_url="https://git.example.org/example.git")

    # Create launcher
    launcher = RunnerLauncher(retry_attempts=3)

    # Create pool
    pool = AgentPool(name=pool_name, type=TYPES.get(pool_name, PoolType.LOCAL_PROCESS), max_concurrency=4)

    # Launch runner
    try:
        runner = launcher.launch(task, slot, pool)
    except RunnerLaunchError as error:
        print(f"The launch failed: {error}", file=sys.stderr)
        return 1
    print(f"Launched runner {runner.runner_id} with container {runner.container_id}")

    runner = launcher.wait(runner.runner_id)
    print(f"It {runner.state.value}" + (f": {runner.message}" if runner.message else ""))
    return 0 if runner.state.value == "completed" else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if sys.argv[1:] else __doc__)
