"""Figures of local runners, from a client's clock: exit to receipt, a shim's memory, many at once, restart to ready.

    python tests/bench/local_process.py [--runners 500] [--live 2000]

The service runs as its users run it, in a process of its own. Nothing here fails on a slow machine.
"""

import argparse
import asyncio
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

AT_ONCE = 4
LAUNCHING_AT_ONCE = 32
PRIVATE = ("Private_Clean:", "Private_Dirty:")


class Service:
    """The service in a temporary home."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.url = ""
        self.process: asyncio.subprocess.Process | None = None
        (home / "slots").mkdir()
        (home / "pools.yaml").write_text(
            "agent_pools:\n"
            "  last-act: {type: local-process, max_concurrency: 10000, config: {command: [sh, last-act.sh]}}\n"
            "  live: {type: local-process, max_concurrency: 10000, config: {command: [sleep, '3600']}}\n"
        )

    async def start(self) -> float:
        """Start it; gives the seconds until it was ready."""
        settings = {
            "LISTEN": "127.0.0.1:0",
            "STATE_DIR": str(self.home / "state"),
            "POOLS_FILE": str(self.home / "pools.yaml"),
            "SLOT_ROOTS": str(self.home / "slots"),
        }
        env = {**os.environ, **{f"RUNNER_LAUNCHER_{name}": value for name, value in settings.items()}}
        began = time.perf_counter()
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "app.cli", "serve", env=env, stderr=asyncio.subprocess.PIPE
        )
        stream = self.process.stderr
        assert stream
        while b"listening on" not in (line := await stream.readline()):
            if not line:
                raise SystemExit("the service did not start")
        self.url = line.decode().split("listening on ")[1].split(";")[0]
        self._drain = asyncio.create_task(_drain(stream))
        async with self.client() as client:
            while (await _try(client, "/readyz")) is None:
                await asyncio.sleep(0.005)
        return time.perf_counter() - began

    async def end(self, number: signal.Signals) -> None:
        assert self.process
        self.process.send_signal(number)
        await self.process.wait()
        await self._drain

    def client(self) -> httpx.AsyncClient:
        token = (self.home / "state" / "token").read_text().strip()
        return httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=120,
            limits=httpx.Limits(max_connections=100),
        )

    def memory(self) -> float:
        """MiB that the service holds."""
        assert self.process
        return _private(self.process.pid) / 1024

    async def launch(self, client: httpx.AsyncClient, pool: str, name: str) -> dict[str, Any]:
        slot = self.home / "slots" / name
        slot.mkdir(exist_ok=True)
        (slot / "last-act.sh").write_text("sleep 0.2; date +%s.%N >ended")
        body = {
            "task": {"id": name},
            "slot": {"slot_id": name, "slot_path": str(slot), "repo_url": "none"},
            "pool": pool,
        }
        answer = await client.post("/runners", json=body)
        answer.raise_for_status()
        return dict(answer.json())


async def _drain(stream: asyncio.StreamReader) -> None:
    while await stream.readline():
        pass


async def _try(client: httpx.AsyncClient, path: str) -> httpx.Response | None:
    try:
        return await client.get(path)
    except httpx.TransportError:
        return None


def _private(pid: int | str) -> int:
    """KiB of memory that only this process has."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(PRIVATE))


async def exits(service: Service, runners: int) -> None:
    """Measure from a runner's last act to the client's receipt of its end, by long-poll."""
    delays, launches = [], []

    async def one(client: httpx.AsyncClient, number: int) -> None:
        began = time.perf_counter()
        record = await service.launch(client, "last-act", f"exit-{number}")
        launches.append(time.perf_counter() - began)
        tag = ""
        while record["phase"] != "finished":
            headers = {"If-None-Match": tag, "Prefer": "wait=30"} if tag else {}
            answer = await client.get(record["links"]["self"], headers=headers)
            received = time.time()
            tag = answer.headers["ETag"]
            record = answer.json() if answer.status_code == httpx.codes.OK else record
        ended = float((service.home / "slots" / f"exit-{number}" / "ended").read_text())
        delays.append(received - ended)

    async with service.client() as client:
        for first in range(0, runners, AT_ONCE):
            await asyncio.gather(*(one(client, number) for number in range(first, min(runners, first + AT_ONCE))))
    show(f"launch, {AT_ONCE} at once", launches)
    show(f"last act to receipt, {AT_ONCE} at once", delays)


async def many(service: Service, live: int) -> None:
    """Have many alive at once; kill the service and start it again."""
    idle = service.memory()
    gate = asyncio.Semaphore(LAUNCHING_AT_ONCE)

    async def one(client: httpx.AsyncClient, number: int) -> None:
        async with gate:
            await service.launch(client, "live", f"live-{number}")

    async with service.client() as client:
        began = time.perf_counter()
        await asyncio.gather(*(one(client, number) for number in range(live)))
        rate = live / (time.perf_counter() - began)
    print(f"{live} live runners: {rate:.0f} launches/s, {LAUNCHING_AT_ONCE} at once")
    print(
        f"service memory: {idle:.0f} MiB idle, {(service.memory() - idle) * 1024 / live:.1f} KiB more for each live runner"
    )
    shims = [path.read_text().split()[0] for path in (service.home / "state" / "runners").glob("*/claim")]
    sizes = [_private(pid) for pid in shims]
    print(f"private memory of a shim: median {statistics.median(sizes):.0f} KiB, largest {max(sizes)} KiB")
    await service.end(signal.SIGKILL)
    print(f"killed and started again with {live} live runners: ready after {await service.start():.2f} s")
    async with service.client() as client:
        began = time.perf_counter()
        pools = (await client.get("/pools/live")).json()
        print(
            f"  it counts {pools['current_running']} running; that answer took {(time.perf_counter() - began) * 1000:.0f} ms"
        )
        items: list[dict[str, Any]] = []
        cursor = None
        while True:
            page = (
                await client.get(
                    "/runners", params={"state": "running", "limit": 500, **({"cursor": cursor} if cursor else {})}
                )
            ).json()
            items += page["items"]
            cursor = page["next_cursor"]
            if not cursor:
                break

        async def stop(item: dict[str, Any]) -> None:
            async with gate:
                await client.delete(item["links"]["self"], params={"grace": 0})

        began = time.perf_counter()
        await asyncio.gather(*(stop(item) for item in items))
        while (await client.get("/pools/live")).json()["current_running"]:
            await asyncio.sleep(0.1)
        print(f"  all {len(items)} stopped in {time.perf_counter() - began:.1f} s")


def show(name: str, seconds: list[float]) -> None:
    ordered = sorted(1000 * value for value in seconds)
    p99 = ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))]
    print(f"{name}: median {statistics.median(ordered):.1f} ms, p99 {p99:.1f} ms, over {len(ordered)}")


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runners", type=int, default=500)
    parser.add_argument("--live", type=int, default=2000)
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="bench-"))
    service = Service(home)
    try:
        print(f"start with an empty store to ready: {await service.start():.2f} s")
        await exits(service, options.runners)
        await many(service, options.live)
    finally:
        if service.process and service.process.returncode is None:
            await service.end(signal.SIGTERM)
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    asyncio.run(main())
