#!/usr/bin/env python3
"""An example agent runner: what a program that the service launches finds, and how it behaves well.

It reads its task context, works in its current directory (the git slot), tells what it does on its output, beats its
heart, commits, and ends with 0. Asked to stop (TERM) it leaves the worktree clean and ends with 143. It needs git and
Python 3.9 or later, nothing else, and can be run by hand at the top of any git repository. Where there is no git, or
the slot is no repository of its own, it leaves its work uncommitted, and says so.

    TASK_CONTEXT='{"task_id": "7", "task_title": "Say hello"}' python3 agent.py
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

SECONDS_PER_STEP = float(os.environ.get("RUNNER_SECONDS_PER_STEP", "1"))
BEAT_SECONDS = 10
NO_GIT = "there is no git here, so it stays uncommitted"
AUTHOR = ("-c", "user.name=Example Agent", "-c", "user.email=agent@example.org", "-c", "commit.gpgsign=false")


class Stopped(Exception):
    """The service asked for an end."""


def has_git() -> bool:
    """Say whether the slot is a repository. One around it is somebody else's, and git would find that too."""
    if not shutil.which("git"):
        return False
    done = subprocess.run(["git", "rev-parse", "--show-toplevel"], capture_output=True, text=True, check=False)
    return done.returncode == 0 and Path(done.stdout.rstrip("\n")).resolve() == Path.cwd().resolve()


HAS_GIT = has_git()


def main() -> int:
    """Work on the task, and say how it went with the exit code."""
    # TERM waits until work() looks for it, between two steps, so it never cuts a commit in half.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    context = read_context()
    threading.Thread(target=beat, daemon=True).start()
    path = Path("task-{}.md".format(re.sub(r"[^A-Za-z0-9._-]", "-", context["task_id"])[:100]))
    try:
        work(context, path)
    except Stopped:
        put_back(path)
        say("asked to stop; the worktree is as it was")
        return 143
    except subprocess.CalledProcessError as error:
        say(f"git failed: {(error.stderr or error.stdout).strip()}")
        return 1
    say("done")
    return 0


def read_context() -> "dict[str, Any]":
    """Read the task: from the environment, or from the file when it is too long for that."""
    text = os.environ.get("TASK_CONTEXT")
    if text is None:
        file = os.environ.get("TASK_CONTEXT_FILE") or sys.exit("no task: set TASK_CONTEXT or TASK_CONTEXT_FILE")
        text = Path(file).read_text(encoding="utf-8")
    context: dict[str, Any] = json.loads(text)
    return context


def work(context: "dict[str, Any]", path: Path) -> None:
    """Do the task, in a few steps. A real agent would think here."""
    title = context.get("task_title") or context["task_id"]
    say(f"task {context['task_id']}: {title}")
    branch = context.get("branch_name")
    if branch and HAS_GIT:
        take_branch(branch)
        say(f"on branch {branch}")
    pause()
    say("reading the repository")
    if HAS_GIT:
        files = len(git("ls-files").splitlines())
        say(f"{files} file{'s' * (files != 1)}, last commit: {git('log', '-1', '--format=%s')}")
    pause()
    say(f"writing {path}")
    path.write_text(report(context, title), encoding="utf-8")
    pause()
    if HAS_GIT:
        git("add", "--", str(path))
        git(*AUTHOR, "commit", "--quiet", "-m", f"{title}\n\nTask: {context['task_id']}", "--", str(path))
        say(f"committed {git('log', '-1', '--format=%h %s')}")
    else:
        say("this slot is not a git repository of its own; the file stays uncommitted" if shutil.which("git") else NO_GIT)
    pause()


def report(context: "dict[str, Any]", title: str) -> str:
    """Write the file's text."""
    runner = os.environ.get("RUNNER_ID", "an agent run by hand")
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return f"# {title}\n\n{context.get('task_description', '')}\n\nDone by {runner} at {now}.\n"


def pause() -> None:
    """Take the time of one step, and notice a TERM that came meanwhile."""
    if signal.sigtimedwait({signal.SIGTERM}, SECONDS_PER_STEP):
        raise Stopped


def take_branch(name: str) -> None:
    """Go to the branch; make it if there is none."""
    new = not git("branch", "--list", "--", name)
    git("checkout", "--quiet", *(["-b"] if new else []), name)


def put_back(path: Path) -> None:
    """Undo what is not committed of our own work; what others left in the slot is theirs."""
    if HAS_GIT:
        git("reset", "--quiet", "--", str(path))
    if HAS_GIT and git("ls-files", "--", str(path)):
        git("checkout", "--quiet", "--", str(path))
    else:
        path.unlink(missing_ok=True)


def git(*arguments: str) -> str:
    """Run git in the slot."""
    done = subprocess.run(["git", *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def beat() -> None:
    """Tell the service every few seconds that we are alive. That it cannot be reached now is no reason to end."""
    service = os.environ.get("RUNNER_LAUNCHER_URL")
    if not service:
        return
    url = f"{service}/runners/{os.environ['RUNNER_ID']}/heartbeat"
    headers = {"Authorization": f"Bearer {os.environ['RUNNER_TOKEN']}"}
    request = urllib.request.Request(url, method="POST", headers=headers)  # noqa: S310 - the service's own address
    while True:
        try:
            urllib.request.urlopen(request, timeout=5).close()  # noqa: S310
        except OSError as error:
            say(f"no heartbeat: {error}")
        time.sleep(BEAT_SECONDS)


def say(text: str) -> None:
    """Print a log line at once."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
