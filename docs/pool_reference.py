"""Writes docs/pools.md of the models in app/pools.py: `make reference`. What stands below a key there describes it here."""

import ast
import inspect
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from app import pools
from app.settings import WebAddress

HEAD = """# Pool reference

Written by `make reference` of the models that read a pool file.

A pool file is YAML: `agent_pools: {NAME: POOL}`. [Getting started](getting-started/local.md) has one to begin with. A wrong
file stops the start and names file, key and reason; on SIGHUP it is read again, and a wrong one then changes nothing. A key
close to a known one is a warning. Other top-level keys are left to whoever shares the file.
"""

WORDS: list[tuple[object, str]] = [
    (pools.Seconds, "seconds, above 0"),
    (pools.SomeSeconds, "seconds"),
    (pools.Count, "a number, 1 or more"),
    (pools.PerSecond, "launches a second, above 0"),
    (pools.Cores, "cores"),
    (pools.Mebibytes, "MiB"),
    (pools.AskedCores, "cores, or as `500m`"),
    (pools.AskedMebibytes, "MiB, or as `2Gi`"),
    (pools.Command, "a list of words"),
    (pools.Environment, "`{NAME: VALUE}`"),
    (pools.AbsolutePath, "an absolute path"),
    (pools.File, "a file"),
    (pools.JobTemplate, "a file"),
    (pools.User, "a name or number"),
    (pools.Amounts, "`{cpu: CORES, memory: MIB}`"),
    (WebAddress, "a URL"),
    (pools.Workspace, "see [below](#workspaces)"),
    (pools.ObjectName, "a name"),
    (bool, "`true` or `false`"),
    (int, "a number"),
]
SECTIONS: list[tuple[str, str, type[BaseModel]]] = [
    ("## A pool", "", pools.Pool),
    (
        "## `config`, for every type",
        "A scalar under `config` that is no key of the launcher is told to runners as `RUNNER_<KEY>`.",
        pools.PoolConfig,
    ),
    ("## `config`, for `local-process`", "", pools.LocalProcessConfig),
    ("## `config`, for `docker`", "More in [Docker pools](docker.md).", pools.DockerConfig),
    ("## `config`, for `kubernetes`", "More in [Runners on Kubernetes](kubernetes.md).", pools.KubernetesConfig),
    ("## `resources`", "Of a local process or a container:", pools.Resources),
    ("", "Of a pod:", pools.PodResources),
]
WORKSPACES: list[type[BaseModel]] = [pools.NoWorkspace, pools.ClaimWorkspace, pools.HostWorkspace, pools.GitWorkspace]


def reference() -> str:
    """Give the page."""
    parts = [HEAD]
    for title, text, model in SECTIONS:
        parts += [f"{title}\n" if title else "", f"{text}\n" if text else "", table(model)]
    parts.append("## Workspaces\n\nHow a pod comes by its slot, by `kind`.\n")
    for model in WORKSPACES:
        kind = get_args(model.__annotations__["kind"])[0]
        parts += [f"### `{kind}`\n\n{inspect.getdoc(model)}\n", table(model)]
    return "\n".join(part for part in parts if part)


def table(model: type[BaseModel]) -> str:
    """Write the keys that a model has of its own."""
    rows = list(_rows(model))
    head = "| key | is | default | means |\n|---|---|---|---|\n"
    return head + "".join(f"| {' | '.join(row)} |\n" for row in rows) if rows else ""


def _rows(model: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    described = _described(model)
    for name, annotation in model.__annotations__.items():
        if (
            name not in model.model_fields
            or (name == "kind" and model in WORKSPACES)
            or (model, name) == (pools.Pool, "name")
        ):
            continue
        yield f"`{name}`", _kind(annotation), _default(model, name), described[name].replace("|", "\\|")


def _described(model: type[BaseModel]) -> dict[str, str]:
    """Read what stands below each key of a model."""
    [body] = ast.parse(inspect.getsource(model)).body
    assert isinstance(body, ast.ClassDef)  # noqa: S101 - the source of a class is one
    said = {}
    for key, text in zip(body.body, body.body[1:], strict=False):
        match key, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                said[name] = words
            case _:
                pass
    return said


def _kind(annotation: Any) -> str:  # noqa: ANN401 - whatever a model's keys are
    for known, words in WORDS:
        if annotation == known:
            return words
    if get_origin(annotation) in (Union, UnionType):
        kinds = [_kind(each) for each in get_args(annotation) if each is not type(None)]
        return " or ".join(dict.fromkeys(kinds))
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) is list:
        return "a list"
    if get_origin(annotation) is dict:
        return "a mapping"
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return ", ".join(f"`{value}`" for value in annotation)
    if isinstance(annotation, type) and issubclass(annotation, pools.PoolConfig):
        return "a mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "see [below](#resources)"
    assert not {int, float} & {annotation, *get_args(annotation)}, annotation  # noqa: S101 - a number is to be said above
    return "text"


def _default(model: type[BaseModel], name: str) -> str:
    field = model.model_fields[name]
    if field.is_required():
        return "needed" if name != "config" else "none"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, pools.NoWorkspace):
        return "`{kind: none}`"
    if value is None or value in ([], {}) or isinstance(value, BaseModel):
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    Path(__file__).with_name("pools.md").write_text(reference(), encoding="utf-8")
