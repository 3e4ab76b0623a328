"""The service, built to die: kills itself with SIGKILL at a named point, the n-th time that it comes by.

The points lie on the seams that the application has anyway: the launcher port, the feed of committed changes, and the
program that starts a shim. ``CRASH_POINT`` names one,
``CRASH_COUNT`` says how often it may be passed first. A point that is written later into the file ``freeze`` of the state
directory makes it stop where it is, by SIGSTOP, once. ``PLANT=late-intent``
builds in the fault that the crash test must find: the launch comes first, and its intent after it.
"""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from app.errors import ConfigurationError
from app.events import Change
from app.launcher import Exited, Handle, Launcher, LaunchSpec, LogLine, Observation
from app.launchers import open_launcher
from app.main import create_app
from app.runner import Runner
from app.server import serve_until_told
from app.settings import installation, load_settings
from app.store import Intent, Store

POINT = os.environ.get("CRASH_POINT", "")
FREEZE = Path(os.environ["RUNNER_LAUNCHER_STATE_DIR"]) / "freeze"
passes = int(os.environ.get("CRASH_COUNT", "0"))


def crash_at(point: str) -> None:
    global passes  # noqa: PLW0603 - one process, one crash
    if point == POINT:
        if passes == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        passes -= 1
    if FREEZE.exists() and FREEZE.read_text() == point:
        FREEZE.unlink()
        os.kill(os.getpid(), signal.SIGSTOP)


class CrashingLauncher:
    """A launcher with crash points around its calls."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self.watch = launcher.watch
        self.list = launcher.list
        self.log_file = launcher.log_file
        self.ping = launcher.ping
        self.aclose = launcher.aclose

    async def launch(self, runner_id: str, spec: LaunchSpec, *, progress: Callable[[str], None] | None = None) -> Handle:
        crash_at("launch-called")
        handle = await self._launcher.launch(runner_id, spec, progress=progress)
        crash_at("launch-returned")
        return handle

    async def observe(self, handles: Sequence[Handle]) -> Mapping[str, Observation]:
        seen = await self._launcher.observe(handles)
        if any(isinstance(observation, Exited) for observation in seen.values()):
            crash_at("end-observed")
        return seen

    async def stop(self, handle: Handle, grace: float) -> None:
        crash_at("stop-called")
        await self._launcher.stop(handle, grace)
        crash_at("stop-returned")

    def logs(
        self, handle: Handle, *, after: str | None = None, since: float | None = None, follow: bool = False
    ) -> AsyncIterator[LogLine]:
        return self._launcher.logs(handle, after=after, since=since, follow=follow)

    async def remove(self, handle: Handle) -> None:
        crash_at("remove-called")
        await self._launcher.remove(handle)
        crash_at("remove-returned")


def committed(change: Change) -> None:
    crash_at(f"{change.event.type}-committed")


def create(settings: Any, **options: Any) -> FastAPI:  # noqa: ANN401 - passed on as it is
    opened: dict[str, Launcher] = {}

    def launchers(engine: str) -> Launcher:
        opened[engine] = CrashingLauncher(open_launcher(engine, settings.state_dir, installation(settings)))
        return opened[engine]

    if os.environ.get("PLANT") == "late-intent":
        plant_late_intent(lambda engine: open_launcher(engine, settings.state_dir, installation(settings)))
    app = create_app(settings, launchers=launchers, **options)
    lifespan = app.router.lifespan_context

    @asynccontextmanager
    async def listening(app: FastAPI) -> AsyncIterator[Any]:
        async with lifespan(app) as state:
            app.state.feed.listen(committed)
            yield state

    app.router.lifespan_context = listening
    return app


def plant_late_intent(launchers: Any) -> None:  # noqa: ANN401
    intend = Store.intend

    async def late(self: Store, intent: Intent) -> tuple[Runner, bool]:
        await launchers(intent.runner.engine).launch(intent.runner.runner_id, intent.spec)
        crash_at("planted")
        return await intend(self, intent)

    Store.intend = late  # type: ignore[method-assign]


def wrap_setsid() -> None:
    """Put a `setsid` in front of the real one that kills the service before or after the shim is started."""
    if POINT not in ("shim-starting", "shim-started"):
        return
    folder = Path(os.environ["RUNNER_LAUNCHER_STATE_DIR"]) / "bin"
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "setsid"
    kill = f"kill -9 {os.getpid()}"
    steps = {"shim-starting": f'{kill}; exec "$real" "$@"', "shim-started": f'"$real" "$@" & sleep 0.01; {kill}; wait'}
    real = next(path for entry in os.environ["PATH"].split(":") if (path := Path(entry) / "setsid").exists())
    script.write_text(f'#!/bin/sh\nreal={real}\ncase "$*" in *shim.sh*) {steps[POINT]};; *) exec "$real" "$@";; esac\n')
    script.chmod(0o755)
    os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"


if __name__ == "__main__":
    wrap_setsid()
    try:
        asyncio.run(serve_until_told(load_settings(), create))
    except ConfigurationError as error:
        sys.exit(str(error))
