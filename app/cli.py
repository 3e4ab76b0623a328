"""The command line: its verbs and their options. What a verb does is in ``server`` and ``terminal``.

Both are imported by the verbs that need them: who starts the service needs no terminal, and who asks it needs no server.
Exit codes are a contract with scripts; they are listed in docs/command-line.md.
"""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from app import __version__

if TYPE_CHECKING:
    from runner_launcher_client import RunnerLauncherClient

    from app.terminal import Terminal

USAGE = 2
REFUSED = 3
NOT_FOUND = 4
UNAVAILABLE = 5
INTERRUPTED = 130
BROKEN_PIPE = 141

ASKING_SECONDS = 5.0
"""How long somebody who reads waits for a service that does not answer."""

GOING_ON_SECONDS = 60.0
"""How long what changes something, or follows, waits for it."""

cli = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Starts AI coding agents, and never loses one.",
    epilog="The service is found by RUNNER_LAUNCHER_URL and RUNNER_LAUNCHER_TOKEN, or RUNNER_LAUNCHER_STATE_DIR.",
)


def _tell_version(wanted: bool) -> None:  # noqa: FBT001 - as typer calls it
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@cli.callback()
def _common(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# The service.


@cli.command(rich_help_panel="The service")
def serve() -> None:
    """Start the service; its settings come from RUNNER_LAUNCHER_* variables.

    A first start wants POOLS_FILE, a file that says where runners may run, and SLOT_ROOTS, the directories for slots.

    LISTEN is 127.0.0.1:8080 unless said otherwise, and STATE_DIR is where records, logs and the token are kept.

    docs/operations.md has them all.
    """
    import logging

    from app.errors import ConfigurationError
    from app.log_lines import write_log
    from app.server import EventLoop, serve_until_told
    from app.settings import load_settings

    write_log("text")  # until the settings say otherwise
    for chatty in ("alembic", "uvicorn"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        settings = load_settings()
        write_log(settings.log_format)
        with asyncio.Runner(loop_factory=EventLoop) as runner:
            runner.run(serve_until_told(settings))
    except ConfigurationError as error:
        sys.exit(f"runner-launcher: {error}")


@cli.command(rich_help_panel="The service")
def token() -> None:
    """Print the token with all rights, made at the service's first start."""
    from app.errors import ConfigurationError
    from app.settings import load_settings

    try:
        path = load_settings().state_dir / "token"
        typer.echo(path.read_text().strip())
    except ConfigurationError as error:
        sys.exit(f"runner-launcher: {error}")
    except OSError as error:
        sys.exit(f"runner-launcher: {path} cannot be read ({error.strerror}); start the service first")


@cli.command(rich_help_panel="The service")
def openapi() -> None:
    """Print the description of the HTTP interface."""
    import yaml

    from app.main import create_app
    from app.settings import Settings

    description = create_app(Settings.model_construct()).openapi()
    typer.echo(yaml.safe_dump(description, sort_keys=False, allow_unicode=True, width=120), nl=False)


# Talking to it.


def _talk(
    work: "Callable[[Terminal], Awaitable[int | None]]", *, as_json: bool, patience: float = ASKING_SECONDS
) -> NoReturn:
    """Do something with the service, and end with the exit code that says how it went."""
    from runner_launcher_client import RunnerLauncherClient, RunnerLauncherError

    from app.terminal import FAILED, Terminal

    terminal = Terminal(as_json=as_json)

    async def go() -> int | None:
        async with RunnerLauncherClient(patience_seconds=patience) as client:
            terminal.client = client
            return await work(terminal)

    try:
        code = asyncio.run(go())
        sys.stdout.flush()
    except RunnerLauncherError as error:
        terminal.refuse(error)
        code = _exit_code(error)
    except KeyboardInterrupt:
        terminal.say("interrupted" + (f"; {terminal.going_on} goes on" if terminal.going_on else ""))
        code = INTERRUPTED
    except BrokenPipeError:  # whoever read us has seen enough; what is left must not fail at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = BROKEN_PIPE
    except OSError as error:
        terminal.say(f"runner-launcher: {error}")
        code = FAILED
    raise typer.Exit(code or 0)


def _exit_code(error: Exception) -> int:
    from runner_launcher_client import NotFoundError, RunnerLaunchError, UnavailableError

    from app.terminal import FAILED

    match error:
        case RunnerLaunchError():
            return FAILED
        case NotFoundError():
            return NOT_FOUND
        case UnavailableError():
            return UNAVAILABLE
        case _:
            return REFUSED


def _suggest(ask: "Callable[[RunnerLauncherClient], Awaitable[list[str]]]", incomplete: str) -> list[str]:
    """Complete a word by asking the service; whatever goes wrong, there are no suggestions."""
    from runner_launcher_client import RunnerLauncherClient, RunnerLauncherError

    async def go() -> list[str]:
        async with RunnerLauncherClient(patience_seconds=0) as client:
            return await ask(client)

    with contextlib.suppress(RunnerLauncherError):
        return [word for word in asyncio.run(go()) if word.startswith(incomplete)]
    return []


def _runner_ids(incomplete: str) -> list[str]:
    async def ask(client: "RunnerLauncherClient") -> list[str]:
        return [runner.runner_id for runner in (await client.page(limit=50)).items]

    return _suggest(ask, incomplete)


def _pool_names(incomplete: str) -> list[str]:
    async def ask(client: "RunnerLauncherClient") -> list[str]:
        return [pool.pool_name for pool in await client.pools()]

    return _suggest(ask, incomplete)


Json = Annotated[bool, typer.Option("--json", help="Print JSON; logs, and what is followed, as an object a line.")]
RunnerId = Annotated[
    str,
    typer.Argument(metavar="RUNNER", help="A runner's id, or a beginning no other has.", autocompletion=_runner_ids),
]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on as it happens.")]


@cli.command(rich_help_panel="Runners")
def launch(
    file: Annotated[
        str | None, typer.Argument(metavar="FILE", help="The launch as JSON; - reads standard input. Options win over it.")
    ] = None,
    *,
    task_id: Annotated[str | None, typer.Option(help="The task's id.")] = None,
    title: Annotated[str | None, typer.Option(help="The task's title.")] = None,
    description: Annotated[str | None, typer.Option(help="What to do.")] = None,
    branch: Annotated[str | None, typer.Option(help="The branch reserved for the task.")] = None,
    slot_path: Annotated[str | None, typer.Option(help="The slot: a checked-out repository, on the runner's host.")] = None,
    slot_id: Annotated[str | None, typer.Option(help="The slot's id; without it, the last part of its path.")] = None,
    repo_url: Annotated[str | None, typer.Option(help="Where the slot was cloned from.")] = None,
    pool: Annotated[str | None, typer.Option(help="The pool that says where to run.", autocompletion=_pool_names)] = None,
    key: Annotated[str | None, typer.Option(help="Idempotency key: the same again launches nothing.")] = None,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Wait for its end; the exit code says how it went.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Launch nothing; show what the engine would be sent.")] = False,
    as_json: Json = False,
) -> None:
    """Launch a runner, and print its id once it has started."""
    request = _read_launch(file) if file else {"task": {}, "slot": {}, "pool": None}
    given = {"id": task_id, "title": title, "description": description, "reserved_branch": branch}
    request["task"] |= {name: value for name, value in given.items() if value is not None}
    if slot_path is not None:
        path = Path(slot_path).absolute()  # of an empty one, which says nothing, it would be this directory
        request["slot"] |= {"slot_path": slot_path and str(path), "slot_id": path.name}
    request["slot"] |= {
        name: value for name, value in {"slot_id": slot_id, "repo_url": repo_url}.items() if value is not None
    }
    request["slot"].setdefault("repo_url", "")
    request["pool"] = pool or request["pool"]
    if not (request["task"].get("id") and request["slot"].get("slot_path") and request["pool"]):
        raise _misused("say what to launch: a file, or --task-id, --slot-path and --pool")
    if dry_run:
        _talk(lambda terminal: terminal.preview(request), as_json=as_json)
    _talk(lambda terminal: terminal.launch(request, key=key, wait=wait), as_json=as_json, patience=GOING_ON_SECONDS)


def _misused(words: str) -> typer.Exit:
    typer.echo(f"runner-launcher: {words}", err=True)
    return typer.Exit(USAGE)


def _read_launch(file: str) -> dict[str, Any]:
    """Read a launch, whole enough for options to be put in."""
    name = "standard input" if file == "-" else file
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        request = json.loads(text)
    except OSError as error:
        raise _misused(f"{name} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise _misused(f"{name} is not JSON: {error}") from None
    if not isinstance(request, dict):
        raise _misused(f'{name} must hold {{"task": {{...}}, "slot": {{...}}, "pool": ...}}')
    request = {"task": {}, "slot": {}, "pool": None, **request}
    if not (isinstance(request["task"], dict) and isinstance(request["slot"], dict)):
        raise _misused(f"{name}: task and slot must be objects")
    return request


@cli.command(rich_help_panel="Runners")
def ps(
    *,
    everything: Annotated[bool, typer.Option("--all", "-a", help="Also those that have ended.")] = False,
    state: Annotated[str | None, typer.Option(help="pending, running, completed or failed.")] = None,
    pool: Annotated[str | None, typer.Option(help="Of this pool alone.", autocompletion=_pool_names)] = None,
    task_id: Annotated[str | None, typer.Option(help="Of this task alone.")] = None,
    slot_id: Annotated[str | None, typer.Option(help="Of this slot alone.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many.")] = 100,
    as_json: Json = False,
) -> None:
    """List live runners, newest first; with --all or --state others too."""
    wanted = {"pool": pool, "task_id": task_id, "slot_id": slot_id}
    states = [state] if state else [None] if everything else ["pending", "running"]
    _talk(lambda terminal: terminal.ps(wanted, states, limit), as_json=as_json)


@cli.command(rich_help_panel="Runners")
def show(runner: RunnerId, *, as_json: Json = False) -> None:
    """Show what became of a runner."""
    _talk(lambda terminal: terminal.show(runner), as_json=as_json)


@cli.command(rich_help_panel="Runners")
def logs(
    runner: RunnerId,
    *,
    follow: Follow = False,
    tail: Annotated[int | None, typer.Option("--tail", "-n", min=0, help="Only the last so many lines.")] = None,
    since: Annotated[
        str | None,
        typer.Option(help="Only what was written since a time (2026-01-05T09:30:00Z), or so long ago (10m, 1h30m)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print a runner's output, also after its end."""
    _talk(lambda terminal: terminal.logs(runner, tail=tail, since=since, follow=follow), as_json=as_json)


@cli.command(rich_help_panel="Runners")
def stop(
    runners: Annotated[
        list[str],
        typer.Argument(metavar="RUNNER", help="Runners' ids, or beginnings no other has.", autocompletion=_runner_ids),
    ],
    *,
    grace: Annotated[float | None, typer.Option(min=0, help="Seconds from TERM to KILL; default: the pool's.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Give up those whose engine is gone for good: lost.")] = False,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Wait for the end.")] = False,
    as_json: Json = False,
) -> None:
    """Stop runners: TERM to all that each has started, and KILL after the grace."""
    _talk(
        lambda terminal: terminal.stop(runners, grace=grace, force=force, wait=wait),
        as_json=as_json,
        patience=GOING_ON_SECONDS,
    )


@cli.command(rich_help_panel="Runners")
def diagnose(runner: RunnerId, *, as_json: Json = False) -> None:
    """Say in plain words what happened to a runner, and what to do next."""
    _talk(lambda terminal: terminal.diagnose(runner), as_json=as_json)


@cli.command(rich_help_panel="Runners")
def events(
    runner: Annotated[
        str | None,
        typer.Argument(
            metavar="RUNNER", help="A runner's id, or a beginning no other has; without it, all.", autocompletion=_runner_ids
        ),
    ] = None,
    *,
    follow: Follow = False,
    as_json: Json = False,
) -> None:
    """Tell what happened, to one runner or to all."""
    patience = GOING_ON_SECONDS if follow else ASKING_SECONDS
    _talk(lambda terminal: terminal.events(runner, follow=follow), as_json=as_json, patience=patience)


@cli.command(rich_help_panel="Where they run")
def pools(
    name: Annotated[str | None, typer.Argument(metavar="POOL", help="One pool alone.", autocompletion=_pool_names)] = None,
    *,
    enable: Annotated[bool | None, typer.Option("--enable/--disable", help="Switch it on or off for launches.")] = None,
    as_json: Json = False,
) -> None:
    """Show pools and their use, or switch one on or off."""
    if enable is not None and name is None:
        raise _misused("say which pool to switch")
    _talk(lambda terminal: terminal.pools(name, enable), as_json=as_json)


@cli.command(rich_help_panel="Where they run")
def engines(*, as_json: Json = False) -> None:
    """Show what each engine can do, and whether it answers."""
    _talk(lambda terminal: terminal.engines(), as_json=as_json)


@cli.command(rich_help_panel="Where they run")
def webhooks(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One target alone.")] = None,
    *,
    retry: Annotated[bool, typer.Option("--retry", help="Tell it again what it did not take.")] = False,
    as_json: Json = False,
) -> None:
    """Show who is told of runners by webhooks, and how far; or try one again."""
    if retry and name is None:
        raise _misused("say which target to try again")
    _talk(lambda terminal: terminal.webhooks(name, retry=retry), as_json=as_json)


def main() -> None:
    """Run the command line."""
    cli()


if __name__ == "__main__":
    main()
