"""What an example is made of: tokens and labels, exact to the token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from neox.data.corpus import Record
from neox.data.documents import MASKED
from neox.data.examples import Example, ExampleEncoder
from neox.errors import DataError
from neox.tokenizer import Tokenizer, load_tokenizer
from neox.tokenizer.chat import load_chat_template
from tests import small_tokenizer
from tests.data.test_preprocess_labels import CHAT, CHATML

EOD = 0  # of both tokenizers used here


def encoder(tokenizer: Tokenizer | None = None, folder: Path | None = None) -> ExampleEncoder:
    def template(where: str) -> Any:
        assert folder is not None, "no conversation is expected"
        return load_chat_template(str(folder))

    return ExampleEncoder(tokenizer or load_tokenizer("CharLevelTokenizer"), template)


def encode(value: Any, **given: Any) -> Example | None:
    return encoder(**given).encode("a.jsonl", Record("a.jsonl:3", value))


def learnt(example: Example) -> bytes:
    """What counts, as bytes; the labels that do are the tokens themselves."""
    pairs = list(zip(example.tokens, example.labels, strict=True))
    assert all(label in (token, MASKED) for token, label in pairs)
    return bytes(token for token, label in pairs if label >= 0)


@pytest.mark.parametrize("value", ["hello", {"text": "hello", "id": 3}, {"text": "\ufeffhello"}])
def test_a_text_is_learnt_to_its_end(value: Any) -> None:
    example = encode(value)
    assert example == Example([*b"hello", EOD], [*b"hello", EOD])
    assert example.learnt == 5  # nothing comes before the first


def test_a_completion_is_learnt_and_its_prompt_is_not() -> None:
    example = encode({"prompt": "Q: a\nA:", "completion": " b"})
    assert example == Example([*b"Q: a\nA: b", EOD], [MASKED] * 7 + [*b" b", EOD], 7)
    assert example.learnt == 3


@pytest.mark.parametrize("text", ["", "  \n", "\ufeff"])
def test_what_has_no_text_is_passed_over(text: str) -> None:
    assert encode(text) is None
    assert encode({"text": text}) is None
    if text != "\ufeff":
        assert encode({"prompt": "Q", "completion": text}) is None


def test_without_a_prompt_a_completion_is_a_text() -> None:
    assert encode({"prompt": "", "completion": "ab"}) == Example([*b"ab", 0], [*b"ab", 0], 0)


def test_the_end_is_there_once(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("HFTokenizer", str(small_tokenizer.write(tmp_path)))
    ids = tokenizer.tokenize("the best")
    for text in ("the best", "the best<|endoftext|>"):
        assert encode(text, tokenizer=tokenizer) == Example([*ids, 0], [*ids, 0])
        prompt = {"prompt": "It was", "completion": text}
        example = encode(prompt, tokenizer=tokenizer)
        assert example is not None and example.labels[-len(ids) - 1 :] == [*ids, 0]


def test_a_prompt_is_tokenized_as_when_it_is_continued(tmp_path: Path) -> None:
    """By itself, though tokens of the whole text would join the two."""
    tokenizer = load_tokenizer("HFTokenizer", str(small_tokenizer.write(tmp_path)))
    before, after = tokenizer.tokenize("the be"), tokenizer.tokenize("st of times")
    assert before + after != tokenizer.tokenize("the best of times")
    example = encode({"prompt": "the be", "completion": "st of times"}, tokenizer=tokenizer)
    assert example == Example(
        [*before, *after, 0], [MASKED] * len(before) + [*after, 0], len(before)
    )


class Beginning:
    """Bytes behind a token 1, which some tokenizers begin every text with."""

    vocab_size, eod = 512, EOD

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[1, *text.encode()] for text in texts]


def test_a_completion_does_not_begin_as_a_text() -> None:
    example = encode({"prompt": "ab", "completion": "c"}, tokenizer=Beginning())
    assert example == Example([1, *b"abc", EOD], [MASKED] * 3 + [*b"c", EOD], 3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    small_tokenizer.train(special=special).save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHATML}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}.get(turn["role"], turn["role"])}
    | {"value": turn["content"]}
    for turn in CHAT
]


@pytest.mark.parametrize(
    "value", [{"messages": CHAT}, {"conversations": SHAREGPT}, {"conversation": CHAT, "x": 1}]
)
def test_of_a_conversation_the_assistants_turns_are_learnt(folder: Path, value: Any) -> None:
    tokenizer = load_tokenizer("HFTokenizer", str(folder / "tokenizer.json"))
    example = encode(value, tokenizer=tokenizer, folder=folder)
    assert example is not None
    parts = [
        "<|im_start|>system\nIt was<|im_end|>\n<|im_start|>user\nthe best of times?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "the worst<|im_end|>\n",
        "<|im_start|>user\nthe age<|im_end|>\n<|im_start|>assistant\n",
        "of foolishness<|im_end|>\n<|endoftext|>",
    ]
    ids = [tokenizer.tokenize(part) for part in parts]
    assert example.tokens == [token for part in ids for token in part]
    assert example.labels == [
        *([MASKED] * len(ids[0])), *ids[1], *([MASKED] * len(ids[2])), *ids[3],
    ]  # fmt: skip
    assert example.prompt == 0


def test_a_conversation_that_the_assistant_does_not_end(folder: Path) -> None:
    tokenizer = load_tokenizer("HFTokenizer", str(folder / "tokenizer.json"))
    example = encode({"messages": CHAT[:2]}, tokenizer=tokenizer, folder=folder)
    assert example is not None and example.learnt == 0


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"txt": "a", "id": 1}, r'^a.jsonl:3 is no example: it has "txt" and "id", but "text",'),
        ({}, "it has no keys, but"),
        ({"prompt": "a"}, '^a.jsonl:3 has a "prompt", but no "completion"$'),
        ({"completion": "a"}, '^a.jsonl:3 has a "completion", but no "prompt"$'),
        ({"prompt": "a", "completion": 3}, '^a.jsonl:3: "completion" is a int, text is needed'),
        ({"text": None}, '"text" is a NoneType, text is needed'),
        ({"text": "a", "messages": []}, 'has "text" and "messages": which of them'),
        ({"text": "\ud800"}, "^a.jsonl:3: half a surrogate pair"),
        ({"prompt": "\ud800", "completion": "a"}, "half a surrogate pair"),
        ({"messages": []}, '^a.jsonl:3: "messages" is no conversation'),
        ({"messages": "hello"}, "is no conversation"),
        ({"messages": [{"content": "a"}]}, "is no conversation"),
        ({"conversations": [{"from": 3, "value": "a"}]}, "is no conversation"),
        ({"conversations": [{"from": [], "value": "a"}]}, "is no conversation"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half a surrogate pair"),
    ],
)
def test_what_is_no_example_is_named(folder: Path, value: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        encode(value, folder=folder)


def test_other_keys_are_not_read(folder: Path) -> None:
    """Such as a "prompt" beside "messages", which published conversations have."""
    tokenizer = load_tokenizer("HFTokenizer", str(folder / "tokenizer.json"))
    value = {"prompt": "a", "messages": CHAT}
    assert encode(value, tokenizer=tokenizer, folder=folder) == encode(
        {"messages": CHAT}, tokenizer=tokenizer, folder=folder
    )


def test_a_file_holds_one_kind() -> None:
    made = encoder()
    made.encode("a.jsonl", Record("a.jsonl:1", {"text": "a"}))
    made.encode("b.jsonl", Record("b.jsonl:1", {"prompt": "a", "completion": "b"}))
    made.encode("a.jsonl", Record("a.jsonl:2", "a"))
    with pytest.raises(
        DataError,
        match=r'^a.jsonl:7 has "prompt" and "completion", but a.jsonl:1 has "text": the examples',
    ):
        made.encode("a.jsonl", Record("a.jsonl:7", {"prompt": "a", "completion": "b"}))


@pytest.mark.parametrize(
    ("prompt", "completion", "room", "kept"),
    [
        ("", "abcdef", 4, "abcd"),
        ("pqrs", "ab", 7, "pqrsab."),  # fits
        ("pqrstu", "ab", 7, "rstuab."),  # the prompt's beginning goes
        ("pqrstuvw", "ab", 3, "wab"),  # half the room is the prompt's; then the end goes
        ("pq", "abcdef", 6, "pqabcd"),  # less than half: all of it stays
        ("pqrst", "abcdef", 6, "rstabc"),
        ("pqrst", "abcdef", 2, "ta"),
    ],
)
def test_examples_are_cut_where_it_costs_least(
    prompt: str, completion: str, room: int, kept: str
) -> None:
    whole = encode({"prompt": prompt, "completion": completion})
    assert whole is not None
    example = whole.cut(room)
    assert bytes(example.tokens).replace(b"\0", b".") == kept.encode()
    assert learnt(example).replace(b"\0", b".").decode() == kept[example.prompt :]
    assert kept[: example.prompt] in prompt
    assert example.learnt >= 1


def test_a_conversation_is_cut_at_its_end() -> None:
    example = Example([1, 2, 3, 4], [MASKED, MASKED, 3, 4])
    assert example.cut(3) == Example([1, 2, 3], [MASKED, MASKED, 3])
    assert example.cut(2).learnt == 0
