"""POST /prompt/ and POST /complete, as programs that were written for them expect them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.serving.fakes import Running, serving


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(maximum_tokens=5) as running:
        yield running


@pytest.mark.parametrize("length", ["10", 10, 10.0])
@pytest.mark.parametrize("temperature", ["0.9", 0.9])
@pytest.mark.parametrize("path", ["/prompt/", "/prompt"])
def test_prompt_counts_both_in_length(
    server: Running, length: Any, temperature: Any, path: str
) -> None:
    body = {"input": "Once", "length": length, "temperature": temperature, "output": {}}
    response = httpx.post(server.url + path, json=body)
    (output,) = response.json().values()
    assert output.startswith("Once") and len(output) == 10
    request = server.decoder.submitted[-1]
    assert (request.minimum_tokens, request.maximum_tokens) == (6, 6)
    assert request.sampling.temperature == 0.9


def test_the_reply_is_encoded_twice_where_that_is_asked_for() -> None:
    with serving(legacy_double_json=True) as server:
        body = {"input": "Once", "length": "6", "temperature": "0.9"}
        reply = httpx.post(f"{server.url}/prompt/", json=body).json()
        assert json.loads(reply)["output"].startswith("Once")
        schema = httpx.get(f"{server.url}/openapi.json").json()
        answer = schema["paths"]["/prompt/"]["post"]["responses"]["200"]
        assert answer["content"]["application/json"]["schema"]["type"] == "string"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"length": "4"}, "length (4) counts the prompt's tokens too, which are 4"),
        ({"length": "many"}, "length must be a number from 1"),
        ({"length": "nan"}, "length must be a number from 1"),
        ({"length": "9" * 4000}, "length must be a number from 1"),
        ({"length": 600}, "there is room for 508"),
        ({"length": None}, "length"),
        ({"temperature": "-1"}, "temperature must be a number from 0 to 100"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"input": 5}, "input: Input should be a valid string"),
    ],
)
def test_what_is_wrong_with_a_prompt(server: Running, values: dict[str, Any], words: str) -> None:
    body = {"input": "Once", "length": 10, "temperature": 1} | values
    response = httpx.post(f"{server.url}/prompt/", json=body)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


def test_complete_gives_what_follows(server: Running) -> None:
    body = {"context": "x", "top_p": 0.5, "temp": 0.75}
    response = httpx.post(f"{server.url}/complete", json=body)
    (completion,) = response.json().values()
    request = server.decoder.submitted[-1]
    assert len(completion) <= 5 and request.maximum_tokens == 5
    assert (request.sampling.top_p, request.sampling.temperature) == (0.5, 0.75)


def test_errors_of_complete_are_texts(server: Running) -> None:
    response = httpx.post(f"{server.url}/complete", json={"context": 1})
    assert response.status_code == 400
    assert response.json() == {"error": "context: Input should be a valid string"}
