"""The service as its users run it: in a process of its own, in a temporary home, asked over HTTP."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
from figures import Json

SERVE = (sys.executable, "-m", "app.cli", "serve")
PRIVATE = ("Private_Clean:", "Private_Dirty:")


class Refused(SystemExit):
    """A launch was not answered by a runner that has started."""


class Service:
    """One service; it can be ended and started again. ``command`` is what is run, for a service with another engine."""

    def __init__(self, home: Path, pools: Json, *, command: tuple[str, ...] = SERVE, **settings: str) -> None:
        self.home = home
        self.state = home / "state"
        self.url = self.token = ""
        self._command = command
        self._process: asyncio.subprocess.Process | None = None
        (home / "slots").mkdir(parents=True, exist_ok=True)
        (home / "pools.yaml").write_text(json.dumps({"agent_pools": pools}))
        self._settings = {
            "LISTEN": "127.0.0.1:0",
            "STATE_DIR": str(self.state),
            "POOLS_FILE": str(home / "pools.yaml"),
            "SLOT_ROOTS": str(home / "slots"),
            **{name.upper(): value for name, value in settings.items()},
        }

    async def start(self) -> float:
        """Start it; gives the seconds until it said that it was ready."""
        env = {**os.environ, **{f"RUNNER_LAUNCHER_{name}": value for name, value in self._settings.items()}}
        log, began = self.home / "service.log", time.perf_counter()
        with log.open("wb") as file:
            self._process = await asyncio.create_subprocess_exec(*self._command, env=env, stdout=file, stderr=file)
        while "listening on" not in (text := log.read_text()):
            if self._process.returncode is not None:
                raise SystemExit(f"the service did not start: {text}")
            await asyncio.sleep(0.005)
        self.url = text.split("listening on ")[1].split(";")[0]
        self.token = (self.state / "token").read_text().strip()
        async with self.client() as client, client.get("/readyz") as answer:
            if answer.status != 200:
                raise SystemExit(f"the service is not ready: {await answer.text()}")
        return time.perf_counter() - began

    async def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self._process and self._process.returncode is None:
            self._process.send_signal(number)
            await self._process.wait()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Service"]:
        try:
            await self.start()
            yield self
        finally:
            await self.end()

    def client(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            self.url,
            headers={"Authorization": f"Bearer {self.token}"},
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2),  # shorter than the service's own
            timeout=aiohttp.ClientTimeout(total=120),
        )

    def slot(self, number: int) -> Path:
        return self.home / "slots" / f"slot-{number}"

    async def launch(self, client: aiohttp.ClientSession, pool: str, number: int) -> Json:
        """Launch a runner in a slot of this number, which must be there and free; gives its record once it has started."""
        body = {
            "task": {"id": f"bench-{number}"},
            "slot": {"slot_id": f"slot-{number}", "slot_path": str(self.slot(number)), "repo_url": "none"},
            "pool": pool,
        }
        async with client.post(
            "/runners", json=body, headers={"Prefer": "wait=100"}
        ) as answer:  # a slow machine fails nothing
            record: Json = await answer.json()
            if answer.status != 201:
                raise Refused(f"a launch was answered {answer.status}: {record}")
            return record

    async def until_end(self, client: aiohttp.ClientSession, record: Json) -> tuple[Json, float]:
        """Long-poll until the end is told; gives the last record and the time of its receipt."""
        tag, told = f'W/"{record["revision"]}"', record
        while told["phase"] != "finished":
            headers = {"If-None-Match": tag, "Prefer": "wait=30"}
            async with client.get(record["links"]["self"], headers=headers) as answer:
                tag = answer.headers["ETag"]
                if answer.status == 200:
                    told = await answer.json()
        return told, time.time()

    async def live(self, client: aiohttp.ClientSession, pool: str) -> list[Json]:
        """Give the records of all live runners of a pool."""
        items: list[Json] = []
        for state in ("running", "pending"):
            wanted = {"pool": pool, "state": state, "limit": "500"}
            while True:
                async with client.get("/runners", params=wanted) as answer:
                    page = await answer.json()
                items += page["items"]
                if page["next_cursor"] is None:
                    break
                wanted["cursor"] = page["next_cursor"]
        return items

    async def stop_all(self, client: aiohttp.ClientSession, pool: str, *, grace: int = 0) -> int:
        """Stop every runner of a pool, and wait for the ends; gives how many there were."""
        items = await self.live(client, pool)
        pending = iter(items)

        async def work() -> None:
            for one in pending:
                async with client.delete(one["links"]["self"], params={"grace": str(grace)}) as told:
                    await told.read()

        await asyncio.gather(*(work() for _ in range(16)))
        while True:
            async with client.get(f"/pools/{pool}") as answer:
                if not (await answer.json())["current_running"]:
                    return len(items)
            await asyncio.sleep(0.1)

    # What it costs.

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    def cpu_seconds(self) -> float:
        return cpu_seconds(self.pid)

    def resident_kib(self) -> int:
        return int(Path(f"/proc/{self.pid}/status").read_text().split("VmRSS:")[1].split()[0])

    def private_kib(self) -> int:
        return private_kib(self.pid)


def cpu_seconds(pid: int) -> float:
    """Processor time of a process, without its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def private_kib(pid: int | str) -> int:
    """Memory that only this process has."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(PRIVATE))
