"""The official client of OpenAI, unchanged, against the server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.serving.fakes import FORBIDDEN, Running, serving

TURNS: Any = [{"role": "system", "content": "Be."}, {"role": "user", "content": "x"}]


class Template:
    """Bytes, as the fake decoder's; a turn ends with "q"."""

    eos = ord("q")

    def write(self, turns: Any, next_speaks: bool) -> str:
        assert next_speaks
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in turns) + "<assistant>"

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(template=Template(), serve_rows=4, adapters={"poet": "."}) as running:
        yield running


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def complete(client: openai.OpenAI, **values: Any) -> Any:
    return client.completions.create(
        **{"model": "model", "prompt": "x", "max_tokens": 3, "seed": 0} | values
    )


def chat(client: openai.OpenAI, **values: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "model", "messages": TURNS, "max_tokens": 3, "seed": 0} | values
    )


def test_a_completion(client):
    answer = complete(client)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == ("abc", "length", None)
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (1, 3, 4)
    assert (answer.object, answer.model) == ("text_completion", "model")
    assert answer.id.startswith("cmpl-")


def test_without_max_tokens_a_completion_has_sixteen(client):
    assert complete(client, max_tokens=None).choices[0].text == "abcdefghijklmnop"


@pytest.mark.parametrize(
    ("prompt", "first"),
    [(["x", "yy"], (120,)), ([120, 121], (120, 121)), ([[120], [121, 121]], (120,)), ("", (0,))],
)
def test_every_kind_of_prompt(client, server, prompt, first):
    before = len(server.decoder.submitted)
    answer = complete(client, prompt=prompt)
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    assert [choice.index for choice in answer.choices] == list(range(2 if several else 1))
    assert server.decoder.submitted[before].prompt == first
    assert answer.usage.completion_tokens == 3 * len(answer.choices)


def test_choices_of_a_prompt_have_streams_of_their_own(client):
    answer = complete(client, prompt=["x", "y"], n=2)
    assert [choice.text for choice in answer.choices] == ["abc", "bcd", "abc", "bcd"]
    assert answer.usage.prompt_tokens == 2


def test_sampling_arrives_as_asked_for(client, server):
    complete(
        client,
        temperature=0.5,
        top_p=0.25,
        stop=["s", "t"],
        extra_body={"top_k": 7, "min_tokens": 2, "repetition_penalty": 1.5},
    )
    request = server.decoder.submitted[-1]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.25, 7)
    assert (sampling.repetition_penalty, request.minimum_tokens) == (1.5, 2)
    assert (request.stop, request.seed) == (("s", "t"), 0)


def test_a_model_s_name_chooses_the_adapter(client, server):
    for name, adapter in (("poet", "poet"), ("model", None)):
        assert complete(client, model=name).model == name
        chat = client.chat.completions.create(model=name, messages=TURNS, max_tokens=3)
        assert chat.model == name
        assert [request.adapter for request in server.decoder.submitted[-2:]] == [adapter] * 2
    with pytest.raises(openai.NotFoundError, match="poets"):
        complete(client, model="poets")


@pytest.mark.parametrize("values", [{"temperature": 0}, {"top_p": 0, "temperature": 1}])
def test_nothing_is_greedy_like_zero(client, server, values):
    complete(client, **values)
    assert server.decoder.submitted[-1].sampling.is_greedy


def test_openai_s_defaults(client, server):
    complete(client, seed=None)
    sampling = server.decoder.submitted[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)


def test_stop_strings_end_the_text(client):
    (choice,) = complete(client, max_tokens=9, stop="c").choices
    assert (choice.text, choice.finish_reason) == ("ab", "stop")


def test_echo_puts_the_prompt_in_front(client):
    assert complete(client, prompt="It was ", echo=True).choices[0].text == "It was abc"
    assert complete(client, prompt=[120, 121], echo=True).choices[0].text == "xyabc"


def test_logprobs_of_a_completion(client):
    logprobs = complete(client, prompt="It was ", logprobs=3).choices[0].logprobs
    assert logprobs.tokens == ["a", "b", "c"]
    assert logprobs.token_logprobs == [-0.5] * 3
    assert logprobs.top_logprobs[1] == {"b": -0.5, "a": -1.5, "": -9999.0}
    assert logprobs.text_offset == [7, 8, 9]  # behind the prompt
    assert complete(client, logprobs=0).choices[0].logprobs.top_logprobs[0] == {"a": -0.5}


def test_a_stream_of_a_completion(client):
    chunks = list(complete(client, stream=True, logprobs=1))
    assert [chunk.choices[0].text for chunk in chunks] == ["a", "b", "c"]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, "length"]
    assert [chunk.choices[0].logprobs.text_offset for chunk in chunks] == [[1], [2], [3]]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_begins_with_the_prompt_that_is_to_be_echoed(client):
    chunks = complete(client, stream=True, echo=True)
    assert [chunk.choices[0].text for chunk in chunks] == ["x", "a", "b", "c"]


def test_a_stream_of_several_choices_with_usage(client):
    texts = {0: "", 1: ""}
    *chunks, last = complete(client, stream=True, n=2, stream_options={"include_usage": True})
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {0: "abc", 1: "bcd"}
    assert (last.choices, last.usage.completion_tokens, last.usage.prompt_tokens) == ([], 6, 1)


def test_a_chat(client, server):
    answer = chat(client)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "abc")
    assert (choice.finish_reason, answer.object) == ("length", "chat.completion")
    prompt = bytes(server.decoder.submitted[-1].prompt)
    assert prompt == b"<system>Be.<user>x<assistant>"
    parts = [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]
    chat(client, messages=[{"role": "user", "content": parts}])
    assert bytes(server.decoder.submitted[-1].prompt) == b"<user>xy<assistant>"


@pytest.mark.parametrize("minimum", [0, 2])
def test_a_turn_ends_with_the_template_s_token(client, minimum):
    answer = chat(client, seed=14, max_tokens=20, extra_body={"min_tokens": minimum})
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == "op"
    assert answer.usage.completion_tokens == 3  # o p q


def test_a_chat_without_max_tokens_has_all_the_room(client, server):
    chat(client, max_tokens=None, max_completion_tokens=None)
    request = server.decoder.submitted[-1]
    assert request.maximum_tokens == 512 - len(request.prompt)


def test_logprobs_of_a_chat(client):
    answer = chat(client, logprobs=True, top_logprobs=2)
    entry = answer.choices[0].logprobs.content[1]
    assert (entry.token, entry.logprob, entry.bytes) == ("b", -0.5, [98])
    assert [(top.token, top.logprob) for top in entry.top_logprobs] == [("b", -0.5), ("a", -1.5)]
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_a_stream_of_a_chat(client):
    first, *chunks, last = chat(client, stream=True, logprobs=True)
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["a", "b", "c"]
    assert chunks[0].choices[0].logprobs.content[0].token == "a"
    assert (last.choices[0].delta.content, last.choices[0].finish_reason) == (None, "length")


def test_models(client):
    assert [model.id for model in client.models.list()] == ["model", "poet"]
    assert client.models.retrieve("model").owned_by == "neox"


@pytest.mark.parametrize(
    ("values", "param", "words"),
    [
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 600}, "max_tokens", "there is room for 511"),
        ({"prompt": "x" * 512}, "prompt", "the prompt has 512 tokens, and may have 511"),
        ({"prompt": [5, 700]}, "prompt", "there is no token 700: they are 0 to 511"),
        ({"prompt": [5, -1]}, "prompt", "prompt.1: Input should be greater than or equal to 0"),
        ({"prompt": []}, "prompt", ""),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"best_of": 2}, "best_of", "only the value of n"),
        ({"suffix": "x"}, "suffix", "suffix is not supported"),
        ({"presence_penalty": 1}, "presence_penalty", "repetition_penalty is"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "logit_bias is not supported"),
        ({"echo": True, "logprobs": 1}, "echo", "one of the two"),
        ({"n": 100}, "n", "the server takes 68 at a time"),
        ({"stop": FORBIDDEN}, None, "this stop string is refused"),
        ({"extra_body": {"min_tokens": 4}}, "min_tokens", "is more than max_tokens (3)"),
        ({"extra_body": {"temprature": 1}}, "temprature", "there is no parameter temprature"),
    ],
)
def test_what_is_wrong_is_a_bad_request(client, values, param, words):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as raised:
            complete(client, stream=stream, **values)
        assert raised.value.param == param
        assert words in raised.value.message


def test_neutral_values_of_what_is_not_supported_are_fine(client):
    neutral = {"best_of": 1, "suffix": None, "presence_penalty": 0, "frequency_penalty": 0.0}
    assert complete(client, logit_bias={}, user="me", **neutral).choices[0].text == "abc"
    assert complete(client, suffix="").choices[0].text == "abc"


def test_other_errors_have_their_classes(client, server):
    with pytest.raises(openai.NotFoundError) as missing:
        complete(client, model="gpt")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")
    with pytest.raises(openai.BadRequestError, match="top_logprobs needs logprobs"):
        chat(client, top_logprobs=2)
    with pytest.raises(openai.APIStatusError) as large:
        complete(client, prompt="x" * (1 << 20))
    assert large.value.status_code == 413


def test_a_chat_needs_a_template():
    with (
        serving() as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="-") as client,
        pytest.raises(openai.BadRequestError, match="has no chat template"),
    ):
        chat(client)


def test_a_wrong_key_is_an_authentication_error():
    keys = ("first", "second")
    with serving(keys=keys) as server:
        for key in keys:
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key) as client:
                assert complete(client).choices[0].text == "abc"
        for key in ("third", "secon"):
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key)
            with client, pytest.raises(openai.AuthenticationError):
                complete(client)
