"""An agent pool as a Dispatcher holds it: where to run, and how many at once."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any, Self


class PoolType(StrEnum):
    """Where a pool's runners run."""

    LOCAL_PROCESS = "local-process"
    DOCKER = "docker"
    KUBERNETES = "kubernetes"


@dataclass
class AgentPool:
    """A pool. Launched on by its name if the service has one configured under it; else only where inline pools are allowed.

    ``cpu_quota`` is in cores, ``memory_quota`` in MiB. ``current_running`` is the Dispatcher's own count.
    """

    name: str
    type: PoolType
    max_concurrency: int
    current_running: int = 0
    cpu_quota: float | None = None
    memory_quota: int | None = None
    enabled: bool = True
    config: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Write it as JSON has it."""
        return {**asdict(self), "type": str(self.type)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what ``to_dict`` wrote; keys it does not know are left out. Raises KeyError, TypeError, ValueError."""
        known = {each.name for each in fields(cls)}
        values = {name: value for name, value in data.items() if name in known}
        return cls(**{**values, "type": PoolType(data["type"])})
