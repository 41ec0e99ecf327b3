"""Calls made from our own OpenAPI schema, in and out of its bounds, find no server error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serving.fakes import Running, serving
from tests.serving.test_openai import Template

# Calls of each operation, and as many with what its schema does not allow.
EXAMPLES = int(os.environ.get("NEOX_SCHEMA_EXAMPLES", "15"))
KEY = {"Authorization": "Bearer k"}
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(template=Template(), keys=("k",), serve_rows=4) as running:
        yield running


@pytest.fixture(scope="module")
def operations(server: Running) -> dict[str, Any]:
    schema = httpx.get(f"{server.url}/openapi.json", headers=KEY).json()
    config = schemathesis.Config.from_dict({"base-url": server.url})
    published = schemathesis.openapi.from_dict(schema, config=config)
    return {result.ok().label: result.ok() for result in published.get_all_operations()}


OPERATIONS = [
    "POST /v1/completions",
    "POST /v1/chat/completions",
    "POST /prompt/",
    "POST /complete",
    "GET /v1/models",
    "GET /v1/models/{model}",
    "GET /health",
    "GET /metrics",
]


def test_there_are_no_other_operations(operations: dict[str, Any]) -> None:
    assert set(operations) == set(OPERATIONS)


@pytest.mark.parametrize("label", OPERATIONS)
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_calls_from_the_schema_find_no_error(
    operations: dict[str, Any], label: str, mode: GenerationMode
) -> None:
    operation = operations[label]
    if mode is GenerationMode.NEGATIVE and not (operation.body or operation.path_parameters):
        return  # nothing of it can be wrong

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def call(case: Any) -> None:
        case.call_and_validate(headers=KEY, checks=CHECKS)

    call()
