"""The task context: the eleven fields by which a runner knows its task."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from runner_launcher_client.request import slot_fields, task_fields


@dataclass(frozen=True)
class TaskContext:
    """A task and its slot, as the service tells them to a runner."""

    task_id: str
    spec_name: str = "unknown"
    task_title: str = ""
    task_description: str = ""
    dependencies: list[str] = field(default_factory=list)
    required_skill: str | None = None
    slot_id: str = ""
    slot_path: str = ""
    repo_url: str = ""
    branch_name: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, task: object, slot: object) -> Self:
        """Make the context that the service makes of this task and slot. Raises InvalidRequestError."""
        told, place = task_fields(task), slot_fields(slot)
        metadata = told.get("metadata", {})
        named = metadata.get("spec_name")
        return cls(
            task_id=told["id"],
            spec_name=told.get("spec_name") or (named if isinstance(named, str) and named else "unknown"),
            task_title=told.get("title", ""),
            task_description=told.get("description", ""),
            dependencies=told.get("dependencies", []),
            required_skill=told.get("required_skill"),
            **place,
            branch_name=told.get("reserved_branch"),
            metadata=metadata,
        )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Read what this runner was told. Raises KeyError where there is no context, OSError, ValueError."""
        text = environment.get("TASK_CONTEXT")
        if text is None:  # too long for the environment; the file is always there
            text = Path(environment["TASK_CONTEXT_FILE"]).read_text(encoding="utf-8")
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what ``to_dict`` wrote; keys it does not know are left out. Raises TypeError without a ``task_id``."""
        known = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in data.items() if name in known})

    def to_dict(self) -> dict[str, Any]:
        """Write the eleven fields."""
        return asdict(self)

    def to_json(self) -> str:
        """Write the eleven fields as the service does: UTF-8, nothing escaped to ASCII, no spaces."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
