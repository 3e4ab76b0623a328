"""The server: listens, serves an application until a signal ends it, and lets streams end with a farewell."""

import asyncio
import functools
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from typing_extensions import override

from app import open_files
from app.connection import Connection
from app.errors import ConfigurationError
from app.main import create_app
from app.service import RunnerService
from app.settings import Settings
from app.slots import look_at
from app.targets import load_targets

log = logging.getLogger("app")

GRACEFUL_SECONDS = 10
BACKLOG = 2048
RESOLVERS = 32


class EventLoop(asyncio.SelectorEventLoop):
    """asyncio's own, with threads of their own to look names up: where a name server is silent, each takes many seconds.

    In the few threads of the default executor files and processes would wait behind them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._resolvers = ThreadPoolExecutor(RESOLVERS, thread_name_prefix="resolver")

    @override
    async def getaddrinfo(self, *named: Any, **wanted: Any) -> list[Any]:
        return await self.run_in_executor(self._resolvers, functools.partial(socket.getaddrinfo, *named, **wanted))

    @override
    def close(self) -> None:
        self._resolvers.shutdown(wait=False)
        super().close()


class _Server(uvicorn.Server):
    """A server that takes its signals from us and lets streams end with a farewell before it closes connections."""

    def __init__(self, config: uvicorn.Config, service: RunnerService) -> None:
        super().__init__(config)
        self._service = service

    @override
    def capture_signals(self) -> nullcontext[None]:  # type: ignore[override] # ours outlive the server
        return nullcontext()

    @override
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        log.info("going down: requests under way have %d s to end, and runners go on", GRACEFUL_SECONDS)
        self._service.drain()
        await super().shutdown(sockets)


async def serve_until_told(settings: Settings, create: Callable[..., FastAPI] = create_app) -> None:
    """Serve an application until a signal ends it. Raises ConfigurationError."""
    open_files.raise_limit()
    _watch_processes_without_threads()
    listener = _listen(settings)
    host, port = listener.getsockname()[:2]
    url = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else f'[{host}]' if ':' in host else host}:{port}"  # noqa: S104
    app = create(settings, url=url)
    async with app.router.lifespan_context(app):
        config = uvicorn.Config(
            app,
            lifespan="off",  # opened here, so that what goes wrong there is told in one line
            http=functools.partial(Connection, most=settings.max_connections),  # type: ignore[arg-type] # makes one
            loop="asyncio",  # uvloop starts processes by a slow fork
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=GRACEFUL_SECONDS,
        )
        server = _Server(config, app.state.service)
        _handle_signals(server, app, settings)
        log.info("listening on %s; the token is in %s", url, settings.state_dir / "token")
        if not settings.pools_file and not settings.allow_inline_pools:
            log.warning("nothing can be launched: RUNNER_LAUNCHER_POOLS_FILE names no file with pools")
        elif not settings.slot_roots:
            log.warning("nothing can be launched: RUNNER_LAUNCHER_SLOT_ROOTS names no directory where slots may be")
        elif any(pool.enters_slot for pool in app.state.service.pools.by_name.values()):
            await asyncio.gather(*map(_look_at_root, settings.slot_roots))
        await server.serve(sockets=[listener])


async def _look_at_root(root: Path) -> None:
    """Say what is wrong with a slot root, if anything is."""
    try:
        if not await look_at(f"{root}/", root.is_dir):
            log.warning("no slot can be under %s (RUNNER_LAUNCHER_SLOT_ROOTS): there is no such directory", root)
    except OSError as error:
        log.warning("no slot can be under %s (RUNNER_LAUNCHER_SLOT_ROOTS) now: %s", root, error)


def _watch_processes_without_threads() -> None:
    """Let Python 3.11 do what later ones do by themselves: it would begin a thread for every process that it starts."""
    if sys.version_info >= (3, 12):
        return
    with suppress(AttributeError, OSError):  # of a kernel, or a sandbox, without them
        os.close(os.pidfd_open(os.getpid()))
        watcher = asyncio.PidfdChildWatcher()
        watcher.attach_loop(asyncio.get_running_loop())
        asyncio.set_child_watcher(watcher)


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sends at once only where this is said
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(BACKLOG)  # from here on a client waits, and is not refused
    except OSError as error:
        listener.close()
        raise ConfigurationError(f"RUNNER_LAUNCHER_LISTEN: cannot listen on {settings.listen}: {error.strerror}") from error
    return listener


def _handle_signals(server: _Server, app: FastAPI, settings: Settings) -> None:
    loop = asyncio.get_running_loop()

    def end() -> None:
        server.force_exit = server.should_exit
        server.should_exit = True

    async def reload_webhooks() -> None:
        await app.state.webhooks.set(await asyncio.to_thread(load_targets, settings.webhooks_file))

    async def reload() -> None:
        service: RunnerService = app.state.service
        for what, read in (("pools", service.reload_pools(settings.pools_file)), ("webhooks", reload_webhooks())):
            try:
                await read
            except ConfigurationError as error:
                log.error("the %s stay as they were: %s", what, error)  # noqa: TRY400 - it says all there is
            else:
                log.info("the %s were read again", what)

    reloads: set[asyncio.Task[None]] = set()

    def hang_up() -> None:
        task = asyncio.create_task(reload())
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    loop.add_signal_handler(signal.SIGTERM, end)
    loop.add_signal_handler(signal.SIGINT, end)
    loop.add_signal_handler(signal.SIGHUP, hang_up)
