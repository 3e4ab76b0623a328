"""The Runner Launcher's client: launches AI coding agents, and tells what became of them.

``RunnerLauncher`` is for a Dispatcher that launched runners in its own process before: one import changes.
``RunnerLauncherClient`` is everything the service can do, for asyncio. ``TaskContext`` and ``Heartbeat`` are for agents.
"""

from runner_launcher_client.client import RunnerLauncherClient
from runner_launcher_client.context import TaskContext
from runner_launcher_client.errors import (
    Fault,
    InvalidRequestError,
    NotFoundError,
    NotPermittedError,
    PoolFullError,
    RunnerLauncherError,
    RunnerLaunchError,
    SlotBusyError,
    UnavailableError,
)
from runner_launcher_client.heartbeat import Heartbeat
from runner_launcher_client.launcher import RunnerLauncher
from runner_launcher_client.pool import AgentPool, PoolType
from runner_launcher_client.records import (
    Attempt,
    Diagnosis,
    Engine,
    Event,
    PoolStatus,
    Preview,
    Runner,
    RunnerPage,
    RunnerState,
    Webhook,
)

__version__ = "0.1.0"

__all__ = [
    "AgentPool",
    "Attempt",
    "Diagnosis",
    "Engine",
    "Event",
    "Fault",
    "Heartbeat",
    "InvalidRequestError",
    "NotFoundError",
    "NotPermittedError",
    "PoolFullError",
    "PoolStatus",
    "PoolType",
    "Preview",
    "Runner",
    "RunnerLaunchError",
    "RunnerLauncher",
    "RunnerLauncherClient",
    "RunnerLauncherError",
    "RunnerPage",
    "RunnerState",
    "SlotBusyError",
    "TaskContext",
    "UnavailableError",
    "Webhook",
]
