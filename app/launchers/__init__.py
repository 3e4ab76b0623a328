"""The adapters of the port in launcher.py, one per environment; none knows another."""

import importlib.util
from pathlib import Path

from app.errors import LaunchRejected
from app.launcher import Launcher
from app.pools import KubernetesEngine
from app.reason import Reason

_NEEDS = {"docker": "aiodocker", "kubernetes": "kubernetes_asyncio"}


def open_launcher(engine: str, state_dir: Path, installation: str) -> Launcher:
    """Open the launcher of an engine, named as pools name it; its library loads only now. Blocks.

    ``installation`` tells this service's runners from those of others on an engine that they share.
    Raises LaunchRejected when this installation has none for it.
    """
    kind, _, address = engine.partition(":")
    if kind == "local-process":
        from app.launchers.local_process import LocalProcessLauncher  # noqa: PLC0415 - only what a pool needs is loaded

        return LocalProcessLauncher(state_dir / "runners")
    library = _NEEDS.get(kind)
    if library and not importlib.util.find_spec(library):
        raise LaunchRejected(
            f"{kind} pools need the library {library}: in a clone, pip install ./client '.[{kind}]'", Reason.CONFIG_ERROR
        )
    if kind == "docker":
        from app.launchers.docker import DockerLauncher  # noqa: PLC0415 - likewise

        return DockerLauncher(address, installation)
    if kind == "kubernetes":
        from app.launchers.kubernetes import KubernetesLauncher  # noqa: PLC0415 - likewise

        cluster = KubernetesEngine.parse(engine)
        return KubernetesLauncher(cluster.kubeconfig, cluster.context, cluster.namespace, installation)
    raise LaunchRejected(f"there is no launcher for {kind} pools", Reason.CONFIG_ERROR)
