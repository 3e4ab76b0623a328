"""The application: opens what it needs, in order, and closes it in reverse."""

import asyncio
import fcntl
import functools
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import Depends, FastAPI

from app.api import engines, events, gate, health, page, pools, problems, retention, runners, webhooks
from app.api.answers import API_VERSION, describe, known_parameters
from app.api.auth import Authenticator
from app.errors import ConfigurationError
from app.events import Feed
from app.journal import Journal
from app.launcher import Launcher
from app.launchers import open_launcher
from app.logs import Spool
from app.ownership import Ownership
from app.pools import load_pools
from app.reconciler import Reconciler
from app.retention import Keep, Retention
from app.service import RunnerService
from app.settings import Settings, installation
from app.store import Store
from app.targets import load_targets
from app.telemetry import Telemetry
from app.tracing import open_tracing
from app.webhooks import Webhooks

WRITABLE = "name a directory that this user may make, or write to"


def create_app(
    settings: Settings,
    *,
    url: str | None = None,
    launchers: Callable[[str], Launcher] | None = None,
    now: Callable[[], float] = time.time,
) -> FastAPI:
    """Make the application. ``url`` is where runners reach it; ``launchers`` opens the launcher of an engine by its name.

    Its lifespan raises ConfigurationError when something it is told to use cannot be used.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            _take_state_dir(settings, stack)
            app.state.tracing = tracing = open_tracing(os.environ, now)
            feed = Feed()
            if tracing:
                stack.push_async_callback(tracing.aclose)
            spool = Spool(settings.state_dir / "logs")
            configured = load_pools(settings.pools_file)
            targets = load_targets(settings.webhooks_file)
            store = Store(settings.database, feed.publish, replica=_replica(settings))
            stack.push_async_callback(store.aclose)
            await store.open()
            journal = Journal(store, feed)
            name = await _installation(settings, store)
            ours = functools.partial(open_launcher, state_dir=settings.state_dir, installation=name)
            where = settings.public_url or url or f"http://{settings.listen}"
            ownership = Ownership(store, node=settings.node, url=settings.replica_url or where, now=now)
            if tracing:
                feed.listen(lambda change: tracing.changed(change, ours=ownership.acts_on(change.runner)))
            service: RunnerService
            reconciler = Reconciler(
                store,
                feed,
                spool,
                ownership=ownership,
                open_launcher=launchers or ours,
                pools=lambda: service.pools.by_name,
                now=now,
            )
            service = RunnerService(
                settings,
                store,
                feed,
                spool,
                reconciler,
                ownership=ownership,
                journal=journal,
                pools=configured,
                url=where,
                tracing=tracing,
                now=now,
            )
            await journal.open(service.draining)
            stack.push_async_callback(journal.aclose)
            stack.push_async_callback(ownership.aclose)
            stack.push_async_callback(reconciler.aclose)
            app.state.service, app.state.feed = service, feed
            app.state.telemetry = telemetry = Telemetry(feed, lambda: service.pools.by_name, now)
            app.state.webhooks = hooks = Webhooks(
                store, journal, ownership, source=f"urn:runner-launcher:{name}", told=telemetry.webhook_answered, now=now
            )
            stack.push_async_callback(hooks.aclose)
            await hooks.set(targets)
            app.state.retention = Retention(
                store,
                spool,
                Keep(days=settings.retention_days, records=settings.retention_records, logs_mib=settings.retention_logs_mib),
                needed=hooks.needs,
                now=now,
            )
            app.state.authenticator.open(settings)
            if settings.tokens_file:
                reading = asyncio.create_task(app.state.authenticator.keep_reading(settings.tokens_file), name="token file")
                stack.push_async_callback(_cancel, reading)
            await ownership.open({pool.engine for pool in configured.by_name.values()})
            await reconciler.start()
            for name, work in {
                "asking engines": service.keep_asking_engines(),
                "retention": app.state.retention.keep_sweeping(),
                "webhooks": hooks.keep_telling(),
            }.items():
                stack.push_async_callback(_cancel, asyncio.create_task(work, name=name))
            yield

    app = FastAPI(
        title="Runner Launcher",
        summary="Starts AI coding agents and tells the truth about how each one ended.",
        version=API_VERSION,
        license_info={"name": "MIT", "identifier": "MIT"},
        lifespan=lifespan,
        redoc_url=None,
        generate_unique_id_function=lambda route: f"{route.tags[0]}_{route.name}" if route.tags else route.name,
    )
    app.state.authenticator = Authenticator(now)
    app.state.tracing = None
    app.add_middleware(gate.Gate, authenticator=app.state.authenticator, public_url=settings.public_url)
    problems.install(app)
    _add_calls(app)
    app.openapi = functools.partial(describe, app)  # type: ignore[method-assign] # FastAPI's own way
    return app


def _add_calls(app: FastAPI) -> None:
    """Add all calls; a sign of life and the page's files are given whatever is asked besides."""
    for module in (runners, events, pools, engines, webhooks, retention, health):
        app.include_router(module.router, dependencies=[Depends(known_parameters)])
    for free in (health.alive, page.router):
        app.include_router(free)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _installation(settings: Settings, store: Store) -> str:
    """Name the installation as all services that share the database do. Raises ConfigurationError."""
    name = await store.installation(await asyncio.to_thread(installation, settings))
    if settings.installation not in (None, name):
        text = f"{settings.installation}, and the services that share this database are {name}"
        raise ConfigurationError(f"RUNNER_LAUNCHER_INSTALLATION: {text}")
    return name


def _replica(settings: Settings) -> str:
    """Name this replica among those that share a database, the same after a restart: its lock is on this directory."""
    path = settings.state_dir / "replica"
    if not path.exists():
        fresh = path.with_suffix(".new")
        fresh.touch(mode=0o600)
        fresh.write_text(secrets.token_hex(6))
        fresh.rename(path)
    return f"{settings.node} {path.read_text()}"


def _take_state_dir(settings: Settings, stack: AsyncExitStack) -> None:
    """Make the state directory and hold it: two services on one would each know half. Raises ConfigurationError."""
    try:
        settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(settings.state_dir / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigurationError(
            f"RUNNER_LAUNCHER_STATE_DIR: {settings.state_dir} cannot be used: {error.strerror}; {WRITABLE}"
        ) from error
    stack.callback(os.close, lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ConfigurationError(f"RUNNER_LAUNCHER_STATE_DIR: {settings.state_dir} is in use by another service") from None
