"""The pool reference in docs/ is what the models say. `make reference` writes it anew."""

import importlib.util
from pathlib import Path

import pytest
from pydantic import BaseModel

from app import pools

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def written() -> str:
    place = importlib.util.spec_from_file_location("pool_reference", DOCS / "pool_reference.py")
    assert place
    assert place.loader
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    page: str = module.reference()
    return page


def test_the_reference_is_what_the_models_say(written: str) -> None:
    assert written == (DOCS / "pools.md").read_text(), "look at the difference after `make reference`"


def test_every_key_is_in_it_and_described(written: str) -> None:
    models: list[type[BaseModel]] = [
        pools.Pool,
        pools.LocalProcessConfig,
        pools.DockerConfig,
        pools.KubernetesConfig,
        pools.GitWorkspace,
        pools.Resources,
    ]
    keys = {name for model in models for name in model.model_fields} - {"name", "kind"}
    rows = [line.split(" | ") for line in written.splitlines() if line.startswith("| `")]
    assert keys <= {row[0].strip("|` ") for row in rows}
    assert not [row for row in rows if not row[-1].strip("| ")]
