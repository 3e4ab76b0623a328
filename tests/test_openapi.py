"""The published description of the HTTP interface, and whether it tells all there is."""

import copy
import hashlib
import json
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import yaml
from openapi_spec_validator import OpenAPIV31SpecValidator

from app.main import create_app
from app.settings import Settings

FILE = Path(__file__).parents[1] / "openapi" / "runner-launcher.yaml"
VERSIONS = FILE.with_name("versions.yaml")
"""What each version of the contract was, as a digest: no line in it ever changes."""

DESCRIPTION: dict[str, Any] = create_app(Settings.model_construct()).openapi()
PROBE = {"/livez", "/readyz"}
"""What answers anybody and refuses nothing."""


OPERATIONS = [
    pytest.param(path, operation, id=f"{method.upper()} {path}")
    for path, methods in DESCRIPTION["paths"].items()
    for method, operation in methods.items()
]


def test_the_file_is_what_the_app_says() -> None:
    assert yaml.safe_load(FILE.read_text()) == DESCRIPTION, "the interface has changed: make openapi, and review the diff"


def contract(described: Any) -> Any:  # noqa: ANN401 - JSON
    """Leave of a description what programs rely on: no words, no examples, no version."""
    match described:
        case dict():
            told = {key: each for key, each in described.items() if key != "examples" and not _is_said(key, each)}
            return {key: contract(each) for key, each in told.items() if key != "info"}
        case list():
            return [contract(each) for each in described]
        case _:
            return described


def _is_said(key: str, value: object) -> bool:
    return key == "example" or (key in {"title", "summary", "description"} and isinstance(value, str))


def test_a_changed_contract_has_a_higher_version() -> None:
    text = json.dumps(contract(DESCRIPTION), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    known: dict[str, str] = yaml.safe_load(VERSIONS.read_text())
    version = DESCRIPTION["info"]["version"]
    numbers = [tuple(map(int, each.split("."))) for each in known]
    assert numbers == sorted(set(numbers))
    advice = f"raise API_VERSION in app/api/answers.py and add it to {VERSIONS.name}: {digest}"
    assert version in known, advice
    assert version == list(known)[-1]
    assert known[version] == digest, f"the contract of {version} has changed: {advice}"


def test_wording_is_no_contract_and_all_else_is() -> None:
    was = contract(DESCRIPTION)
    changed = copy.deepcopy(DESCRIPTION)
    changed["info"]["version"] = "99.0.0"
    changed["paths"]["/runners"]["get"]["summary"] = "another"
    assert contract(changed) == was
    del changed["paths"]["/runners"]["get"]["responses"]["304"]
    assert contract(changed) != was


def test_it_is_valid() -> None:
    assert [error.message for error in OpenAPIV31SpecValidator(DESCRIPTION).iter_errors()] == []


def test_it_is_openapi_3_1() -> None:
    assert DESCRIPTION["openapi"].startswith("3.1.")


def test_every_operation_has_a_name_of_its_own() -> None:
    names = [operation["operationId"] for methods in DESCRIPTION["paths"].values() for operation in methods.values()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("path", "operation"), OPERATIONS)
def test_every_operation_has_a_summary(path: str, operation: dict[str, Any]) -> None:
    assert operation["summary"], path
    assert not operation["summary"].endswith(".")


@pytest.mark.parametrize(("path", "operation"), OPERATIONS)
def test_every_operation_declares_who_it_refuses(path: str, operation: dict[str, Any]) -> None:
    assert path in PROBE or {"401", "403"} <= set(operation["responses"])


@pytest.mark.parametrize(("path", "operation"), OPERATIONS)
def test_every_operation_that_is_told_something_declares_that_it_may_be_wrong(path: str, operation: dict[str, Any]) -> None:
    told = [parameter for parameter in operation.get("parameters", []) if parameter["in"] == "query"]
    if path not in PROBE and (told or "requestBody" in operation):
        assert "422" in operation["responses"]
    if "requestBody" in operation:
        assert {"400", "413"} <= set(operation["responses"])
    if "{" in path:
        assert "404" in operation["responses"] or path.endswith("/heartbeat")  # which tells nobody what exists


@pytest.mark.parametrize(("path", "operation"), OPERATIONS)
def test_every_body_has_an_example(path: str, operation: dict[str, Any]) -> None:
    bodies = [operation.get("requestBody", {}), *operation["responses"].values()]
    for body in bodies:
        for kind, content in body.get("content", {}).items():
            unshaped = kind == "text/event-stream" or path in {"/metrics", "/livez"} or path.endswith("/logs")
            assert "example" in content or (unshaped and kind != "application/problem+json"), (path, kind)


@pytest.mark.parametrize(("path", "operation"), OPERATIONS)
def test_every_refusal_is_a_problem_and_nothing_else(path: str, operation: dict[str, Any]) -> None:
    for status, response in operation["responses"].items():
        if int(status) >= HTTPStatus.BAD_REQUEST and path not in PROBE:
            assert list(response["content"]) == ["application/problem+json"], status
            schema = response["content"]["application/problem+json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/Problem"}


def test_a_call_needs_a_token_and_the_description_says_so() -> None:
    assert DESCRIPTION["components"]["securitySchemes"]


def test_it_holds_no_shape_that_nothing_answers() -> None:
    assert not {"HTTPValidationError", "ValidationError"} & set(DESCRIPTION["components"]["schemas"])
