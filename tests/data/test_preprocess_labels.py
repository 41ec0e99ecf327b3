"""Datasets of labels: prompts masked up to a pattern, and conversations by a chat template."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from neox.data.documents import MASKED, open_documents
from neox.data.indexed import open_indexed
from neox.data.preprocess import preprocess
from neox.data.recipes import ChatRecipe, TextRecipe, mask_through
from neox.errors import DataError
from neox.tokenizer import load_tokenizer
from neox.tokenizer.chat import ChatTemplate, load_chat_template
from tests import small_tokenizer
from tools import preprocess_data_with_chat_template

ROOT = Path(__file__).parents[2]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [
    {"role": "system", "content": "It was"},
    {"role": "user", "content": "the best of times?"},
    {"role": "assistant", "content": "the worst"},
    {"role": "user", "content": "the age"},
    {"role": "assistant", "content": "of foolishness"},
]


def documents(prefix: Path) -> list[list[int]]:
    indexed = open_indexed(str(prefix))
    assert indexed.dtype == np.int32
    return [indexed.get(n).tolist() for n in range(len(indexed))]


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize(
    ("tokens", "pattern", "labels"),
    [
        ([1, 2, 3, 4], [2], [-100, -100, 3, 4]),
        ([1, 2, 3, 4], [2, 3], [-100, -100, -100, 4]),
        ([1, 2, 3, 4], [3, 4], [-100] * 4),
        ([1, 2, 3, 4], [9], [1, 2, 3, 4]),
        ([1, 2, 3, 4], [4, 5], [1, 2, 3, 4]),
        ([1, 1, 1, 2, 1, 2], [1, 1, 2], [-100] * 4 + [1, 2]),  # begins inside a failed match
        ([5, 6, 5, 6], [5, 6], [-100, -100, 5, 6]),  # the first place counts
        ([], [1], []),
    ],
)
def test_masks_end_with_the_first_pattern(
    tokens: list[int], pattern: list[int], labels: list[int]
) -> None:
    assert mask_through(tokens, pattern) == labels


def test_masked_datasets_are_parallel(tmp_path: Path) -> None:
    texts = ["Q: a A: b", "", "no answer", "A: x A: y", "Q A:"]
    path = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    recipe = TextRecipe(load_tokenizer("CharLevelTokenizer"), append_eod=True, mask_before=b"A:")
    preprocess([path], tmp_path / "out", recipe)
    tokens = documents(tmp_path / "out_text_document")
    labels = documents(tmp_path / "out_label_document")
    assert [bytes(document) for document in tokens] == [
        b"Q: a A: b\0", b"no answer\0", b"A: x A: y\0", b"Q A:\0",
    ]  # fmt: skip
    learnt = [
        bytes(t for t, label in zip(*pair, strict=True) if label >= 0)
        for pair in zip(tokens, labels, strict=True)
    ]
    assert learnt == [b" b\0", b"no answer\0", b" x A: y\0", b"\0"]
    for pair in zip(tokens, labels, strict=True):
        assert all(label in (-100, token) for token, label in zip(*pair, strict=True))


def test_training_reads_what_is_written(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [{"text": "Q: a A: b"}, {"text": "none"}])
    recipe = TextRecipe(load_tokenizer("CharLevelTokenizer"), append_eod=True, mask_before=b"A:")
    done = preprocess([path], tmp_path / "out", recipe)
    assert (done.documents, done.tokens, done.masked) == (2, 15, 7)
    read = open_documents(f"{tmp_path}/out_text_document", f"{tmp_path}/out_label_document", 512)
    tokens, labels = read.read([(0, 5, 10), (1, 0, 2)], 8)
    assert bytes(tokens.tolist()) == b"A: b\0no\0"
    assert labels.tolist() == [MASKED, MASKED, *b" b\0no", MASKED]


def test_several_keys_have_labels_of_their_own(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [{"a": "1:2", "b": "34:"}, {"a": "", "b": "5"}])
    recipe = TextRecipe(load_tokenizer("CharLevelTokenizer"), ["a", "b"], mask_before=b":")
    preprocess([path], tmp_path / "out", recipe)
    assert documents(tmp_path / "out_a_label_document") == [[-100, -100, 50], []]
    assert documents(tmp_path / "out_b_label_document") == [[-100] * 3, [53]]


def test_the_mask_command(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [{"text": f"{n}: {n}"} for n in range(50)])
    command = [sys.executable, ROOT / "tools/preprocess_data_with_mask.py", "--input", path]
    command += ["--tokenizer-type", "CharLevelTokenizer", "--output-prefix", tmp_path / "out"]

    def run(*flags: str) -> subprocess.CompletedProcess:
        return subprocess.run([*command, *flags], capture_output=True, text=True, cwd=tmp_path)

    done = run("--mask-before-token", "58,32", "--workers", "2", "--append-eod")
    assert (done.returncode, done.stderr) == (0, "")
    assert "50 documents, 330 tokens in" in done.stdout
    assert "190 labels are masked, 57.6%" in done.stdout
    assert f"wrote {tmp_path}/out_label_document.bin and .idx" in done.stdout
    labels = documents(tmp_path / "out_label_document")
    assert labels[7] == [-100, -100, -100, ord("7"), 0]
    unmasked = run("--mask-before-token", "59")
    assert unmasked.returncode == 0 and "warning: nothing is masked" in unmasked.stderr
    for flags, said in (
        (["--mask-before-token", "512"], "error: --mask-before-token 512 is no token: the"),
        (["--mask-before-token", "a"], "is not a list of token ids"),
        (["--mask-before-token", "1", "--jsonl-keys", "label"], "take the same name"),
        ([], "required: --mask-before-token"),
    ):
        failed = run(*flags)
        assert failed.returncode == 2 and said in failed.stderr, failed.stderr


@pytest.fixture
def chat_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "chat_model"
    folder.mkdir()
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    small_tokenizer.train(special=special).save(str(folder / "tokenizer.json"))
    return configure(folder, CHATML)


def configure(folder: Path, template: str | None, eos: str | None = "<|endoftext|>") -> Path:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def render(template: ChatTemplate, chat: list[dict], next_speaks: bool) -> list[int]:
    """Ids as transformers computes them in one call."""
    return template._tokenizer.apply_chat_template(
        chat, add_generation_prompt=next_speaks, return_dict=False
    )


def turn_by_turn(
    template: ChatTemplate, chat: list[dict], only_last: bool
) -> tuple[list[int], list[int]]:
    """What upstream computes: each turn is what rendering one turn more adds."""
    tokens: list[int] = []
    labels: list[int] = []
    for i, turn in enumerate(chat):
        following = chat[i + 1]["role"] if i + 1 < len(chat) else None
        added = render(template, chat[: i + 1], following == "assistant")[len(tokens) :]
        tokens += added
        learnt = turn["role"] == "assistant" and (following is None or not only_last)
        labels += added if learnt else [-100] * len(added)
    if template.eos is not None:
        labels.append(-100 if labels[-1] == -100 else template.eos)
        tokens.append(template.eos)
    return tokens, labels


@pytest.mark.parametrize("only_last", [False, True])
@pytest.mark.parametrize("eos", ["<|endoftext|>", None])
@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_what_the_model_says_is_learnt(
    tmp_path: Path, chat_folder: Path, length: int, only_last: bool, eos: str | None
) -> None:
    template = load_chat_template(str(configure(chat_folder, CHATML, eos)))
    chats = [CHAT[:length], CHAT[1:], [*CHAT[:3], CHAT[4], CHAT[4]]]
    path = write_jsonl(tmp_path / "in.jsonl", [{"conversation": chat} for chat in chats])
    preprocess([path], tmp_path / "out", ChatRecipe(template, only_last=only_last))
    tokens = documents(tmp_path / "out_conversation_document")
    labels = documents(tmp_path / "out_conversation_label_document")
    expected = [turn_by_turn(template, chat, only_last) for chat in chats]
    assert list(zip(tokens, labels, strict=True)) == expected


def test_the_words_that_are_learnt(chat_folder: Path, tmp_path: Path) -> None:
    template = load_chat_template(str(chat_folder))
    library = load_tokenizer("HFTokenizer", str(chat_folder / "tokenizer.json"))
    path = write_jsonl(tmp_path / "in.jsonl", [{"conversation": CHAT}])
    for only_last, learnt in ((False, "the worst\nof foolishness\n"), (True, "of foolishness\n")):
        preprocess([path], tmp_path / "out", ChatRecipe(template, only_last=only_last))
        (labels,) = documents(tmp_path / "out_conversation_label_document")
        assert library.detokenize([i for i in labels if i >= 0]) == learnt


def test_a_token_may_join_two_turns(chat_folder: Path, tmp_path: Path) -> None:
    """Where upstream would shift all that follows by one."""
    bare = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    template = load_chat_template(str(configure(chat_folder, bare)))
    chat = [{"role": "user", "content": "the be"}, {"role": "assistant", "content": "st of times"}]
    whole = render(template, chat, False)
    alone = render(template, chat[:1], True)
    path = write_jsonl(tmp_path / "in.jsonl", [{"conversation": chat}])
    preprocess([path], tmp_path / "out", ChatRecipe(template))
    (tokens,) = documents(tmp_path / "out_conversation_document")
    (labels,) = documents(tmp_path / "out_conversation_label_document")
    assert tokens == [*whole, 0]
    start = next(i for i, token in enumerate(alone) if token != whole[i])
    assert 0 < start < len(alone)
    assert labels == [-100] * start + tokens[start:]


FORGETFUL = (  # as templates that drop the thoughts of all turns but the last
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] if loop.last else '...' }}"
    "<|im_end|>{% endfor %}"
)
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}" + (
    CHATML
)


@pytest.mark.parametrize(
    ("template", "record", "message"),
    [
        (CHATML, {"conversation": []}, r'in\.jsonl:2: "conversation" is no conversation'),
        (CHATML, {"conversation": "hello"}, "is no conversation"),
        (CHATML, {"conversation": [{"from": "human", "value": "a"}]}, "is no conversation"),
        (
            CHATML,
            {"conversation": [{"role": "\ud800", "content": "a"}]},
            r"in\.jsonl:2: .*surrogate",
        ),
        (
            CHATML,
            {"messages": CHAT},
            r'in\.jsonl:2: no key "conversation"; this line has: messages',
        ),
        (STRICT, {"conversation": CHAT}, r"jsonl:2: .* does not take these turns \(user first\)"),
        ("{{ 1 // 0 }}", {"conversation": CHAT}, "does not take these turns .integer division"),
        (FORGETFUL, {"conversation": CHAT}, r"in\.jsonl:2: .* writes the first 2 turns otherwise"),
    ],
)
def test_unusable_conversations_are_named(
    tmp_path: Path, chat_folder: Path, template: str, record: dict, message: str
) -> None:
    good = [{"conversation": [{"role": "user", "content": "the"}]}]
    path = write_jsonl(tmp_path / "in.jsonl", [*good, record])
    recipe = ChatRecipe(load_chat_template(str(configure(chat_folder, template))))
    with pytest.raises(DataError, match=message):
        preprocess([path], tmp_path / "out", recipe)
    assert not list(tmp_path.glob("*out*"))


def test_folders_without_a_template_or_with_code_are_refused(
    chat_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="is no folder"):
        load_chat_template(str(tmp_path / "absent"))
    with pytest.raises(DataError, match="has no chat template"):
        load_chat_template(str(configure(chat_folder, None)))
    (chat_folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: pass\n")
    (chat_folder / "tokenizer.json").unlink()
    config = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}
    (chat_folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="has no tokenizer that transformers reads"):
        load_chat_template(str(chat_folder))
    assert not (tmp_path / "ran").exists()


def test_the_chat_command(tmp_path: Path, chat_folder: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [{"chat": CHAT}, {"chat": CHAT[1:3]}])
    flags = ["--input", str(path), "--output-prefix", str(tmp_path / "out"), "--jsonl-keys", "chat"]
    flags += ["--tokenizer-path", str(chat_folder)]
    tool = ROOT / "tools/preprocess_data_with_chat_template.py"
    done = subprocess.run(
        [sys.executable, tool, *flags], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    template = pickle.loads(pickle.dumps(load_chat_template(str(chat_folder))))  # as for a worker
    expected = [turn_by_turn(template, chat, False) for chat in (CHAT, CHAT[1:3])]
    assert documents(tmp_path / "out_chat_document") == [tokens for tokens, _ in expected]
    assert documents(tmp_path / "out_chat_label_document") == [labels for _, labels in expected]
    (tmp_path / "out_chat_label_document.idx").unlink()
    preprocess_data_with_chat_template.main([*flags, "--no-mask"])
    assert documents(tmp_path / "out_chat_document")[1] == render(template, CHAT[1:3], False)
    assert not (tmp_path / "out_chat_label_document.idx").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--for-rm"], "--for-rm: training on rewards"),
        (["--reward-key", "r"], "--reward-key: training on rewards"),
        (["--binary-reward"], "--binary-reward: training on rewards"),
        (["--no-mask", "--only-last"], "and --no-mask that nothing is"),
    ],
)
def test_flags_that_cannot_be_are_refused(
    flags: list[str], said: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as raised:
        preprocess_data_with_chat_template.main(
            ["--input", "x", "--output-prefix", "y", "--tokenizer-path", "z", *flags]
        )
    assert raised.value.code == 2
    assert said in capsys.readouterr().err
