"""The command line."""

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Annotated

import typer
import uvicorn
import yaml
from fastapi import FastAPI
from typing_extensions import override

from app import __version__
from app.errors import ConfigurationError
from app.main import create_app
from app.service import RunnerService
from app.settings import Settings, load_settings

log = logging.getLogger("app")

GRACEFUL_SECONDS = 10
BACKLOG = 2048

cli = typer.Typer(no_args_is_help=True, add_completion=False, help="Starts AI coding agents, and never loses one.")


def _tell_version(wanted: bool) -> None:  # noqa: FBT001 - as typer calls it
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@cli.callback()
def _common(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Say the version and go.")
    ] = False,
) -> None:
    pass


@cli.command()
def serve() -> None:
    """Start the service; its settings come from RUNNER_LAUNCHER_* variables."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        asyncio.run(serve_until_told(load_settings()))
    except ConfigurationError as error:
        sys.exit(f"runner-launcher: {error}")


@cli.command()
def token() -> None:
    """Print the token with all rights, made at the service's first start."""
    path = load_settings().state_dir / "token"
    try:
        typer.echo(path.read_text().strip())
    except OSError as error:
        sys.exit(f"runner-launcher: {path} cannot be read ({error.strerror}); start the service first")


@cli.command()
def openapi() -> None:
    """Print the description of the HTTP interface."""
    description = create_app(Settings.model_construct()).openapi()
    typer.echo(yaml.safe_dump(description, sort_keys=False, allow_unicode=True, width=120), nl=False)


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
        self._service.draining.set()
        await super().shutdown(sockets)


async def serve_until_told(settings: Settings, create: Callable[..., FastAPI] = create_app) -> None:
    """Serve an application until a signal ends it. Raises ConfigurationError."""
    listener = _listen(settings)
    host, port = listener.getsockname()[:2]
    url = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else f'[{host}]' if ':' in host else host}:{port}"  # noqa: S104
    app = create(settings, url=url)
    async with app.router.lifespan_context(app):
        config = uvicorn.Config(
            app,
            lifespan="off",  # opened here, so that what goes wrong there is told in one line
            http="httptools",
            loop="asyncio",  # uvloop starts processes by a slow fork
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=GRACEFUL_SECONDS,
        )
        server = _Server(config, app.state.service)
        _handle_signals(server, app, settings)
        log.info("listening on %s; the token is in %s", url, settings.state_dir / "token")
        await server.serve(sockets=[listener])


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

    async def reload() -> None:
        service: RunnerService = app.state.service
        try:
            await service.reload_pools(settings.pools_file)
        except ConfigurationError as error:
            log.error("the pools stay as they were: %s", error)  # noqa: TRY400 - it says all there is
        else:
            log.info("the pools were read again")

    reloads: set[asyncio.Task[None]] = set()

    def hang_up() -> None:
        task = asyncio.create_task(reload())
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    loop.add_signal_handler(signal.SIGTERM, end)
    loop.add_signal_handler(signal.SIGINT, end)
    loop.add_signal_handler(signal.SIGHUP, hang_up)


def main() -> None:
    """Run the command line."""
    cli()


if __name__ == "__main__":
    main()
