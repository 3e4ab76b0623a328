"""The service on a port, with runners that only exist in memory: any number of them, in any state, of any kind of pool."""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn
import yaml

from app.launchers.fake import FakeLauncher, FakeWorld
from app.main import create_app
from app.settings import Settings

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class FakeService:
    """Where it is, who may ask, and the world behind each engine, by the engine's name."""

    url: str
    token: str
    slots: Path
    client: httpx.AsyncClient
    worlds: dict[str, FakeWorld] = field(repr=False)
    ahead: list[float] = field(default_factory=lambda: [0.0])
    """By how many seconds, in all, the service's clock goes before the real one."""

    async def launch(self, pool: str, task: str, *, slot: str | None = None, **more: Any) -> str:  # noqa: ANN401 - JSON
        """Launch a runner, wait for nothing, and give its id."""
        slot = slot or f"slot-{task}"
        (self.slots / slot).mkdir(exist_ok=True)
        body = {
            "task": {"id": task, "title": task, **more},
            "slot": {"slot_id": slot, "slot_path": str(self.slots / slot), "repo_url": "https://git.example.org/a.git"},
            "pool": pool,
        }
        answer = await self.client.post("/runners", json=body, headers={"Prefer": "respond-async"})
        assert answer.status_code in (201, 202), answer.text
        return str(answer.json()["runner_id"])

    def world(self, runner_id: str) -> FakeWorld:
        """Give the world in which a runner lives."""
        return next(world for world in self.worlds.values() if runner_id in world.runners)

    async def runs(self, *runner_ids: str) -> None:
        """Wait until the engines know all these runners."""
        for runner_id in runner_ids:
            while not any(runner_id in world.runners for world in self.worlds.values()):
                await asyncio.sleep(0.01)


@asynccontextmanager
async def fake_service(directory: Path, pools: Json, **settings: Any) -> AsyncIterator[FakeService]:  # noqa: ANN401 - as Settings has them
    """Serve from a directory."""
    (directory / "slots").mkdir()
    (directory / "pools.yaml").write_text(yaml.safe_dump({"agent_pools": pools}))
    worlds: defaultdict[str, FakeWorld] = defaultdict(FakeWorld)
    ahead = [0.0]
    known = {
        "state_dir": directory / "state",
        "pools_file": directory / "pools.yaml",
        "slot_roots": (directory / "slots",),
        **settings,
    }
    app = create_app(
        Settings(**known), launchers=lambda engine: FakeLauncher(worlds[engine]), now=lambda: time.time() + sum(ahead)
    )
    async with app.router.lifespan_context(app):
        config = uvicorn.Config(app, port=0, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        token = (directory / "state" / "token").read_text().strip()
        try:
            headers = {"Authorization": f"Bearer {token}"}
            async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60) as client:
                yield FakeService(url, token, directory / "slots", client, worlds, ahead)
        finally:
            app.state.service.drain()
            server.should_exit = True
            await serving
