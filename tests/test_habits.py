"""What runs elsewhere than here (CI, git's hooks, a contributor's first hour) names verbs that there are."""

import re
from pathlib import Path

import pytest
import yaml

from app.settings import Settings

PROJECT = Path(__file__).parent.parent
RUN = [".pre-commit-config.yaml", ".github/workflows/ci.yml", ".github/workflows/release.yml"]
READ = [
    ".github/CONTRIBUTING.md",
    "README.md",
    *(str(page.relative_to(PROJECT)) for page in (PROJECT / "docs").glob("**/*.md")),
]
VERBS = set(re.findall(r"^([a-z.][a-z./]*):", (PROJECT / "Makefile").read_text(), re.MULTILINE))


def test_what_is_run_is_a_verb() -> None:
    text = "".join((PROJECT / name).read_text() for name in RUN)
    named = re.findall(r"\bmake ([a-z.][a-z./]*)((?: [a-z]+)*)", text)
    verbs = {first for first, _ in named} | {verb for _, more in named for verb in more.split()}
    assert {"check", "docs", "audit", "test", "image", "dist", "reference", "openapi"} <= verbs <= VERBS


@pytest.mark.parametrize("name", READ)
def test_what_a_reader_is_told_to_make_is_a_verb(name: str) -> None:
    named = re.findall(r"(?:`|^)make ([a-z]+)", (PROJECT / name).read_text(), re.MULTILINE)
    assert set(named) <= VERBS


@pytest.mark.parametrize("name", RUN)
def test_what_is_run_is_yaml(name: str) -> None:
    assert isinstance(yaml.safe_load((PROJECT / name).read_text()), dict)


@pytest.mark.parametrize("name", READ)
def test_every_test_that_is_named_is_there(name: str) -> None:
    text = (PROJECT / name).read_text()
    assert [path for path in re.findall(r"`(tests/[^`*]*)`", text) if not (PROJECT / path).exists()] == []
    code = "".join(file.read_text() for file in (PROJECT / "tests").glob("**/*.py"))
    assert [test for test in re.findall(r"`(test_[a-z_]+)`", text) if f"def {test}(" not in code] == []


def test_every_setting_is_described_to_operators() -> None:
    described = re.findall(r"^\| `([A-Z_]+)` \|", (PROJECT / "docs" / "operations.md").read_text(), re.MULTILINE)
    assert sorted(described) == sorted(name.upper() for name in Settings.model_fields)


def test_every_decision_is_in_the_list_of_them() -> None:
    listed = (PROJECT / "docs" / "decisions" / "index.md").read_text()
    pages = {page.name for page in (PROJECT / "docs" / "decisions").glob("0*.md")}
    assert pages == set(re.findall(r"\((0[^)]*\.md)\)", listed))
