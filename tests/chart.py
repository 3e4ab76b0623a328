"""The chart in deploy/helm, and helm's own code, which `make .venv/shipping` installs."""

import importlib
from pathlib import Path
from typing import Any

import pytest
from engines import REQUIRED

CHART = Path(__file__).parent.parent / "deploy" / "helm" / "runner-launcher"


def _helm() -> Any:  # noqa: ANN401 - where it is not installed nobody knows its types
    if "helm" in REQUIRED:
        return importlib.import_module("helm_python")
    return pytest.importorskip("helm_python", reason="helm's code is not installed; `make .venv/shipping` gets it")


helm = _helm()
