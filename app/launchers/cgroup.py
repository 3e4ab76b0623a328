"""Control groups for local runners: limits that bite, a tree that cannot be left, and the kernel's word on memory.

What the machine allows is found out once, by trying (``Cgroups.probe``): version 2 with controllers where a subtree is ours,
version 1 where the host still has it, and version 2 without controllers, which limits nothing and still holds a
tree together. A runner's group holds the runner; its shim stays outside, so that no limit and no kill meets it.
Everything blocks.

Files and meanings: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/ of the Linux kernel.
"""

import contextlib
import errno
import functools
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from typing_extensions import override

from app.launcher import EnforcedBy, Enforcement

log = logging.getLogger(__name__)

HOME = "runner-launcher"
CONTROLLERS = ("cpu", "memory", "pids")
PERIOD_MICROSECONDS = 100_000
MAX_PROCESSES = 4096
"""How many processes and threads one runner may have: far more than an agent needs, far fewer than harm a machine."""


@dataclass(frozen=True, slots=True)
class Group:
    """The control groups of one runner, one in each hierarchy that is used."""

    unified: Path | None = None
    legacy: Mapping[str, Path] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Group":
        """Read what ``str`` wrote: a service that was restarted elsewhere finds the group where it was made."""
        rows = dict(line.split(" ", 1) for line in text.splitlines())
        unified = rows.pop("unified", None)
        return cls(Path(unified) if unified else None, {name: Path(path) for name, path in rows.items()})

    @override
    def __str__(self) -> str:
        """Write it as lines of a name and a directory, as the shim reads it."""
        rows = {**({"unified": self.unified} if self.unified else {}), **self.legacy}
        return "".join(f"{name} {path}\n" for name, path in rows.items())

    @property
    def directories(self) -> list[Path]:
        """Every directory that the runner joins."""
        return [*([self.unified] if self.unified else []), *self.legacy.values()]

    def processes(self) -> Iterator[int]:
        """Give the numbers of the processes in it; subgroups that the runner made are its own."""
        for directory in self.directories:
            for group in _with_subgroups(directory):
                try:
                    yield from _processes_in(group)
                except OSError as error:
                    if error.errno not in (errno.ENOENT, errno.ENODEV):  # else it was just removed
                        raise

    def kill(self) -> None:
        """Kill those that live in it in one go, where the kernel can (since 5.14, and not in version 1)."""
        if self.unified:
            with contextlib.suppress(OSError):
                (self.unified / "cgroup.kill").write_text("1")

    def oom_kills(self) -> int:
        """Count the processes that the kernel killed in it for want of memory."""
        text = _read(self.legacy["memory"] / "memory.oom_control") if "memory" in self.legacy else ""
        text += _read(self.unified / "memory.events") if self.unified else ""
        counts = dict(line.split(" ", 1) for line in text.splitlines())
        return int(counts.get("oom_kill", 0))

    def remove(self) -> bool:
        """Remove it; False while it is busy, as one may be for a moment that was just emptied."""
        busy = False
        for directory in filter(Path.exists, self.directories):
            for path in reversed(_with_subgroups(directory)):
                try:
                    path.rmdir()
                except OSError as error:
                    busy = busy or error.errno == errno.EBUSY
        return not busy


def _processes_in(group: Path) -> Iterator[int]:
    try:
        yield from map(int, (group / "cgroup.procs").read_text().split())
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        for thread in (group / "cgroup.threads").read_text().split():  # the runner has made it a group of threads
            if status := _read(Path("/proc", thread, "status")):
                yield int(status.partition("\nTgid:")[2].split(maxsplit=1)[0])


def _with_subgroups(directory: Path) -> list[Path]:
    """Give a group and all that were made in it, each before those within it; one that goes meanwhile is no error."""
    groups = [directory]
    for group in groups:
        with contextlib.suppress(FileNotFoundError), os.scandir(group) as entries:
            groups += [Path(entry) for entry in entries if entry.is_dir(follow_symlinks=False)]
    return groups


@dataclass(frozen=True, slots=True)
class Cgroups:
    """Where groups of runners can be made on this machine, and what they can enforce."""

    unified: Path | None = None
    controllers: frozenset[str] = frozenset()
    legacy: Mapping[str, Path] = field(default_factory=dict)

    @classmethod
    def probe(cls) -> "Cgroups":
        """Find out what this process may make."""
        own = _own_groups()
        unified, controllers = _try_unified(own[""]) if "" in own else (None, frozenset[str]())
        others = [name for name in ("cpu", "memory") if name in own and name not in controllers]
        return cls(unified, controllers, {name: home for name in others if (home := _try_home(own[name]))})

    def enforcement(self, cpu: float | None, memory_mib: int | None) -> Enforcement:
        """Say what holds these limits."""
        return Enforcement(
            cpu="none" if cpu is None else self._enforced("cpu"),
            memory_mib="none" if memory_mib is None else self._enforced("memory"),
        )

    def _enforced(self, controller: str) -> EnforcedBy:
        return "cgroup2" if controller in self.controllers else "cgroup1" if controller in self.legacy else "none"

    def group(self, runner_id: str, *controllers: str) -> Group:
        """Name a runner's group, with these hierarchies of version 1; it may exist or not."""
        unified = self.unified / runner_id if self.unified else None
        return Group(unified, {name: home / runner_id for name, home in self.legacy.items() if name in controllers})

    def create(self, runner_id: str, cpu: float | None, memory_mib: int | None) -> Group:
        """Make a runner's group with its limits (cores, MiB; None: no limit). Raises OSError.

        Joining a hierarchy takes the kernel milliseconds, so only those of version 1 are used that have a limit to hold.
        """
        group = self.group(runner_id, *(name for name, limit in (("cpu", cpu), ("memory", memory_mib)) if limit is not None))
        for home in group.directories:
            home.mkdir(exist_ok=True)
        for name, text in _limits(cpu, memory_mib).items():
            controller = name.partition(".")[0]
            directory = group.legacy.get(controller) or (group.unified if controller in self.controllers else None)
            if directory and (directory / name).exists():
                (directory / name).write_text(text)
        return group


@functools.cache
def probed() -> Cgroups:
    """Find out, once for this process, what it may make; the log says it once too."""
    cgroups = Cgroups.probe()
    enforced = cgroups.enforcement(1, 1)
    tree = "control groups" if cgroups.unified or cgroups.legacy else "what /proc shows"
    log.info("local limits: cpu by %s, memory by %s; trees of processes by %s", enforced.cpu, enforced.memory_mib, tree)
    return cgroups


def _limits(cpu: float | None, memory_mib: int | None) -> dict[str, str]:
    """What to write for limits, by file; each version has its own names, and each file is written where it exists."""
    files = {"pids.max": str(MAX_PROCESSES)}
    if cpu is not None:
        quota = max(1000, round(cpu * PERIOD_MICROSECONDS))
        files |= {"cpu.max": f"{quota} {PERIOD_MICROSECONDS}"}
        files |= {"cpu.cfs_period_us": str(PERIOD_MICROSECONDS), "cpu.cfs_quota_us": str(quota)}
    if memory_mib is not None:
        limit = str(memory_mib << 20)
        files |= {"memory.max": limit, "memory.swap.max": "0", "memory.oom.group": "1"}
        files |= {"memory.limit_in_bytes": limit, "memory.memsw.limit_in_bytes": limit}
    return files


def _own_groups() -> dict[str, Path]:
    """Where this process is, by controller; version 2 bears the empty name."""
    mounts: dict[str, tuple[Path, str]] = {}
    for line in _read(Path("/proc/self/mountinfo")).splitlines():
        before, _, after = line.partition(" - ")
        root, point = before.split()[3:5]
        kind, _, options = after.split(" ", 2)
        for name in [""] if kind == "cgroup2" else options.split(",") if kind == "cgroup" else []:
            mounts.setdefault(name, (Path(point), root))
    own = {}
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, names, path = line.split(":", 2)
        for name in names.split(","):
            if name in mounts:
                mounted, root = mounts[name]
                own[name] = mounted / path.removeprefix(root if root != "/" else "").lstrip("/")
    return own


def _try_unified(own: Path) -> tuple[Path | None, frozenset[str]]:
    """Make a home for groups below our own version 2 group, with as many controllers as are ours to give on."""
    base = own.parent if own.name == f"{HOME}-service" else own
    home = _try_home(base)
    if home is None:
        return None, frozenset()
    wanted = [name for name in CONTROLLERS if name in _read(base / "cgroup.controllers").split()]
    with contextlib.suppress(OSError):
        if wanted and (base / "cgroup.type").exists():  # not the root: a group with processes cannot have limited children
            if set(_read(base / "cgroup.procs").split()) - {str(os.getpid())}:
                return home, frozenset()  # not ours alone: leave it as it is
            service = base / f"{HOME}-service"
            service.mkdir(exist_ok=True)
            (service / "cgroup.procs").write_text("0")
        for group in (base, home):
            (group / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in wanted))
        return home, frozenset(wanted)
    return home, frozenset()


def _try_home(base: Path) -> Path | None:
    home = base / HOME
    with contextlib.suppress(OSError):
        home.mkdir(exist_ok=True)
        Path(tempfile.mkdtemp(prefix="probe-", dir=home)).rmdir()  # a name of its own: others may probe now, too
        return home
    return None


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text()
    return ""
