"""finetune_data: the files that are read, what is told of them, the cache, and the batches."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from neox.config import NeoXConfig
from neox.data.changes import order_facts
from neox.data.documents import MASKED
from neox.data.finetune import find_examples
from neox.data.indexed import open_indexed
from neox.data.loaders import Batch, build_loaders, settle_iterations
from neox.errors import ConfigError, DataError
from neox.parallel.groups import ProcessGroups
from neox.parallel.topology import Topology
from neox.tokenizer import build_tokenizer
from neox.train.examples import tokenize_examples
from tests import small_tokenizer
from tests.data.datasets import Replica, training_config
from tests.world import World

SINGLE = ProcessGroups.single()


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def settings(data: Any, **values: Any) -> NeoXConfig:
    given = {"data_path": None, "split": None, "finetune_data": data, "train_iters": None}
    given |= {"train_epochs": 2, "seq_length": 16, "max_position_embeddings": 64}
    if "train_iters" in values:
        given["train_epochs"] = None
    return training_config(Path(), **{**given, **values})


def settle(data: Any, groups: ProcessGroups = SINGLE, **values: Any) -> NeoXConfig:
    config = settings(data, **values)
    return tokenize_examples(config, groups, build_tokenizer(config))


def write(name: str, text: str) -> Path:
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text(text)
    return Path(name)


def write_jsonl(name: str, *records: Any) -> Path:
    return write(name, "".join(json.dumps(record) + "\n" for record in records))


def datasets(config: NeoXConfig, split: str = "train") -> list[tuple[bytes, bytes]]:
    """(text, labels) of each example, bytes; "." stands for the end, "_" for what is masked."""
    (text,) = getattr(config, f"{split}_data_paths")
    (labels,) = getattr(config, f"{split}_label_data_paths")
    both = open_indexed(text), open_indexed(labels)
    shown = {0: ord("."), MASKED: ord("_")}
    return [
        tuple(bytes(shown.get(i, i) for i in part.get(n).tolist()) for part in both)
        for n in range(len(both[0]))
    ]


def test_a_line_is_an_example(capsys) -> None:
    Path("a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\n  two \n\t\nthree")
    config = settle("a.txt")
    assert datasets(config) == [(text, text) for text in (b"one.", b"  two .", b"three.")]
    assert (
        "finetune_data: 3 examples in 1 file, and 2 empty: 17 tokens, 14 of them learnt; "
        "4 to 7 tokens each\n"
    ) in capsys.readouterr().out
    assert config.origin("train_data_paths") == "derived"


def test_a_file_is_an_example(capsys) -> None:
    for name, text in (("b.md", "one\n\ntwo\n"), ("a.md", "three"), ("c.md", " \n")):
        write(name, text)
    config = settle("*.md", finetune_text_per="file")
    assert datasets(config) == [(text, text) for text in (b"three.", b"one\n\ntwo\n.")]
    assert "2 examples in 3 files, and 1 empty" in capsys.readouterr().out


def test_every_format_in_the_order_that_is_named() -> None:
    write_jsonl("z.jsonl", {"prompt": "Q", "completion": "A"}, {"prompt": "", "completion": " "})
    with gzip.open("y.jsonl.gz", "wt") as file:
        file.write('\n{"text": "a\\nb"}\n"c"\n')
    write("texts/b.txt", "d\n")
    write("texts/a.txt", "e\nf\n")
    write("texts/.hidden.txt", "g\n")
    write("x.json", '[{"text": "h"}]')
    config = settle(["z.jsonl", "y.jsonl.gz", "texts", "x.json"])
    assert datasets(config) == [
        (b"QA.", b"_A."), (b"a\nb.", b"a\nb."), (b"c.", b"c."),
        (b"e.", b"e."), (b"f.", b"f."), (b"d.", b"d."), (b"h.", b"h."),
    ]  # fmt: skip


def test_files_folders_and_patterns(capsys) -> None:
    for name in ("data/b.txt", "data/a.jsonl", "data/x.md", "data/.c.txt", "data/sub/d.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    for cache in ("finetune_cache", "index_cache"):
        write(f"data/{cache}/old.txt", "a")

    def find(*named: str) -> list[str]:
        return [str(file) for file in find_examples("finetune_data", named)]

    assert find("data") == ["data/a.jsonl", "data/b.txt"]
    said = "finetune_data: 1 of the files in data are not read, such as x.md; a pattern chooses"
    assert said in capsys.readouterr().out
    assert find("data/*") == ["data/a.jsonl", "data/b.txt", "data/x.md"]
    assert find("data/**") == ["data/a.jsonl", "data/b.txt", "data/sub/d.txt", "data/x.md"]
    assert find("data/x.md", "data/?.txt") == ["data/x.md", "data/b.txt"]
    assert find_examples("finetune_data", "data/.c.txt") == [Path("data/.c.txt")]
    write("odd[1].txt", "a")
    assert find("odd[1].txt") == ["odd[1].txt"]
    for named, said in (
        (["data/none.txt"], "^finetune_data: data/none.txt does not exist"),
        (["*.none"], 'no file\'s name is like "\\*.none"'),
        (["data/sub", "data/**/d.txt"], "reaches data/sub/d.txt twice, by .data/sub. and by"),
        (["data/b.txt", "data/b.txt"], "reaches data/b.txt twice"),
        (["data/finetune_cache/*"], "no file's name is like"),
    ):
        with pytest.raises(DataError, match=said):
            find(*named)
    os.mkfifo("pipe")
    with pytest.raises(DataError, match="pipe is neither a file nor a folder"):
        find("pipe")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": }\n', "^a.jsonl:2, column 10: not JSON"),
        ("a.jsonl", '{"text": "a"}\n\n["b"]\n', "^a.jsonl:3: a JSON object is needed"),
        ("a.jsonl", '{"text": "a"}\n{"prompt": "b"}\n', '^a.jsonl:2 has a "prompt", but no'),
        (
            "a.jsonl",
            '{"text": "a"}\n{"prompt": "b", "completion": "c"}\n',
            '^a.jsonl:2 has "prompt" and "completion", but a.jsonl:1 has "text"',
        ),
        ("a.txt", "\n \n", "^finetune_data: there is no example to learn from in a.txt"),
        ("a.txt", "a\n\udcff\n", "^a.txt:2 is not UTF-8 text"),
    ],
)
def test_what_cannot_be_used_is_named_by_its_line(name: str, text: str, said: str) -> None:
    Path(name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=said):
        settle(name)
    assert not list(Path().glob("finetune_cache/*.bin")) or "no example" in said


def test_conversations_need_a_template() -> None:
    write_jsonl("a.jsonl", {"messages": [{"role": "user", "content": "a"}]})
    with pytest.raises(
        ConfigError,
        match=r"^finetune_data has a conversation \(a.jsonl:1\) without chat_template_path, and ",
    ):
        settle("a.jsonl")


def test_what_is_cut_is_told(capsys) -> None:
    long = "abcdefghijklmnopqrstuvwxyz"
    write_jsonl("a.jsonl", {"prompt": long, "completion": "A"}, {"prompt": "Q", "completion": "B"})
    write("a.txt", f"{long}\nshort\n")
    config = settle(["a.jsonl", "a.txt"])
    assert datasets(config) == [
        (b"lmnopqrstuvwxyzA.", b"_" * 15 + b"A."), (b"QB.", b"_B."),
        (b"abcdefghijklmnopq", b"abcdefghijklmnopq"), (b"short.", b"short."),
    ]  # fmt: skip
    assert (
        "warning: finetune_data: 2 of 4 examples are longer than a sample, seq_length + 1 = 17 "
        "tokens; the longest has 28, 11 too many: 1 lost the end, 1 lost the beginning of the "
        "prompt, 21 tokens in all."
    ) in capsys.readouterr().err
    # Told again by the next run, which reads the cache.
    settle(["a.jsonl", "a.txt"])
    assert "2 of 4 examples are longer" in capsys.readouterr().err

    assert [text for text, _ in datasets(settle("a.txt", allow_chopped=False))] == [b"short."]
    said = capsys.readouterr().err
    assert "10 too many: 1 left out (allow_chopped: false). A larger" in said
    # One stream, cut every so many tokens, loses nothing.
    assert datasets(settle("a.txt", pack_impl="packed"))[0][0] == long.encode() + b"."
    assert capsys.readouterr().err == ""


def test_examples_without_anything_to_learn_are_left_out_and_told(tmp_path: Path, capsys) -> None:
    small_tokenizer.write(tmp_path)
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    long = "\x01" * 20  # a token each
    said = (
        [("user", "a"), ("assistant", "b")],
        [("user", long), ("assistant", "b")],
        [("user", "a")],
    )
    write_jsonl(
        "a.jsonl",
        *({"messages": [{"role": r, "content": c} for r, c in turns]} for turns in said),
    )
    tokenizer = {"tokenizer_type": "HFTokenizer", "vocab_file": "tokenizer.json"}
    assert len(datasets(settle("a.jsonl", **tokenizer))) == 1
    err = capsys.readouterr().err
    assert "1 of 3 examples is longer" in err
    assert "5 too many: 1 left out, as nothing that is learnt was left. A larger" in err
    assert "left out 1 of 3 examples, which have nothing to be learnt" in err


def test_padding_is_told(capsys) -> None:
    write("a.txt", "abc\nab\n")
    settle("a.txt", seq_length=16)
    said = capsys.readouterr().out
    assert "79% of the batches is padding, as the longest example has 4 of a sample's 17" in said
    assert "seq_length: 8 would do" in said
    write("a.txt", f"{'abc' * 5}\n" + "ab\n" * 9)
    settle("a.txt", seq_length=16)
    said = capsys.readouterr().out
    assert "finetune_data: 75% of the batches is padding; less with pack_impl: pack_until" in said
    write("a.txt", "abc\nab\n")
    settle("a.txt", seq_length=4)
    settle("a.txt", seq_length=16, pack_impl="pack_until_overflow")
    assert "padding" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("packing", "samples", "steps"),
    [("unpacked", 10, "2.5"), ("pack_until_overflow", 4, "1"), ("packed", 3, "0.75")],
)
def test_epochs_follow_from_the_examples(packing: str, samples: int, steps: str, capsys) -> None:
    write("a.txt", "".join(f"text{n}\n" for n in range(10)))  # 6 tokens each, three in 18
    config = settle("a.txt", pack_impl=packing, train_epochs=6, seq_length=17)
    config = settle_iterations(config, SINGLE)
    said = capsys.readouterr().out
    assert f"finetune_data: {samples} samples, {steps} steps an epoch (train_batch_size 4)" in said
    assert config.train_iters == samples * 6 // 4


def batches(config: NeoXConfig, groups: ProcessGroups, start: int, count: int) -> list[Batch]:
    loader = build_loaders(config, groups, start, 0).train
    assert loader is not None
    return [next(loader) for _ in range(count)]


def test_a_sample_is_one_example_with_its_padding_masked() -> None:
    write_jsonl("a.jsonl", *({"prompt": "Q" * n, "completion": "A"} for n in range(1, 5)))
    config = settle("a.jsonl", train_iters=1, num_workers=0)
    seen = set()
    for batch in batches(config, SINGLE, 0, 2):
        for tokens, labels, mask in zip(*batch, strict=True):
            n = tokens.tolist().count(ord("Q"))
            assert tokens.tolist() == [*b"Q" * n, ord("A"), *[0] * (15 - n)]
            counts = mask.bool()
            assert labels[counts].tolist() == [ord("A"), 0]
            assert counts.nonzero().flatten().tolist() == [n - 1, n]
            seen.add(n)
    assert seen == {1, 2, 3, 4}


@pytest.mark.parametrize("packing", ["unpacked", "pack_until_overflow"])
def test_the_same_batches_from_any_step_and_at_any_grid(packing: str) -> None:
    write("a.txt", "".join(f"text {n}\n" for n in range(40)))
    config = settle("a.txt", pack_impl=packing, train_iters=12)
    whole = batches(config, SINGLE, 0, 24)  # two micro-batches of two rows a step
    for start in (1, 7):
        rest = batches(config, SINGLE, start, 4)
        for one, other in zip(whole[2 * start :], rest, strict=False):
            assert all(map(torch.equal, one, other))
    two = settings(
        "a.txt", pack_impl=packing, train_iters=12, world_size=2, gradient_accumulation_steps=1
    )
    ranks = [batches(_like(two, config), Replica.of(rank, 2), 0, 12) for rank in range(2)]
    for step in range(12):
        for one, other in zip(
            whole[2 * step : 2 * step + 2], (r[step] for r in ranks), strict=True
        ):
            assert all(map(torch.equal, one, other))


def _like(config: NeoXConfig, settled: NeoXConfig) -> NeoXConfig:
    names = ("train_data_paths", "train_label_data_paths")
    return dataclasses.replace(config, **{name: getattr(settled, name) for name in names})


def _in_a_world(rank: int, folder: str) -> tuple[str, Any]:
    os.chdir(folder)
    groups = ProcessGroups(Topology(dp=2), rank, torch.device("cpu"))
    config = settle("a.txt", groups, world_size=2, finetune_valid_data="b.txt")
    config = settle_iterations(config, groups)
    return config.train_data_paths, config.train_iters


def test_ranks_share_what_one_tokenizes(world: World, tmp_path: Path) -> None:
    write("a.txt", "".join(f"text {n}\n" for n in range(40)))
    write("b.txt", "other\n")
    one, two = world.run(2, _in_a_world, str(tmp_path))
    assert one == two
    assert len(list(Path("finetune_cache").glob("*.json"))) == 2
    assert one[0] == settle("a.txt").train_data_paths


def test_the_cache_is_found_again(capsys) -> None:
    write("data/a.txt", "one\ntwo\n")
    first = settle("data/a.txt")
    assert "finetune_data: tokenizing data/a.txt" in capsys.readouterr().out
    files = {path: path.stat().st_mtime_ns for path in Path("data/finetune_cache").iterdir()}
    os.utime("data/a.txt", (0, 0))  # copied, say: the contents are what counts
    again = settle("data/a.txt")
    said = capsys.readouterr().out
    assert "finetune_data: tokenized before, in data/finetune_cache\n" in said
    assert "2 examples in 1 file: 8 tokens, 6 of them learnt" in said
    assert again.train_data_paths == first.train_data_paths
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_what_changes_makes_another(tmp_path: Path) -> None:
    write("a.txt", "one\ntwo\n")
    write("b.txt", "one\ntwo\n")
    small_tokenizer.write(tmp_path)

    def name(data: Any = "a.txt", **values: Any) -> str:
        (path,) = settle(data, **values).train_data_paths or []
        return path

    hf = {"tokenizer_type": "HFTokenizer", "vocab_file": "tokenizer.json"}
    names = [
        name(),
        name(["a.txt", "b.txt"]),
        name(["b.txt", "a.txt"]),
        name(seq_length=4),
        name(pack_impl="packed"),
        name(allow_chopped=False),
        name(finetune_text_per="file"),
        name(**hf),
    ]
    assert len(set(names)) == len(names)
    # Not so what does not matter to it.
    assert name(seed=3) == name(train_micro_batch_size_per_gpu=1) == names[0]
    assert name(pack_impl="packed", seq_length=8) == names[4]
    write("a.txt", "one\ntwO\n")
    names.append(name())
    small_tokenizer.train(special=("<|endoftext|>", "x")).save("tokenizer.json")
    names.append(name(**hf))
    write("tokenizer_config.json", "{}")
    names.append(name(**hf))
    assert len(set(names)) == len(names)
    assert [text for text, _ in datasets(settle("a.txt"))] == [b"one.", b"twO."]


@pytest.mark.parametrize("damage", ["missing", "changed", "json"])
def test_a_damaged_cache_is_built_again(damage: str, capsys) -> None:
    write("a.txt", "one\ntwo\n")
    expected = datasets(settle("a.txt"))
    (about,) = Path("finetune_cache").glob("*.json")
    (labels,) = Path("finetune_cache").glob("*_label_document.bin")
    if damage == "missing":
        labels.unlink()
    elif damage == "changed":
        labels.write_bytes(bytes(len(labels.read_bytes())))
    else:
        about.write_text("[]")
    capsys.readouterr()
    assert datasets(settle("a.txt")) == expected
    said = capsys.readouterr()
    assert "tokenizing a.txt" in said.out
    assert said.err.count("is damaged; the examples are tokenized again") == 1


def test_a_cache_beside_files_that_may_not_be_written_beside(tmp_path: Path) -> None:
    write("data/a.txt", "one\n")
    os.chmod("data", 0o555)
    try:
        (path,) = settle("data/a.txt", log_dir="logs").train_data_paths or []
    finally:
        os.chmod("data", 0o755)
    assert path.startswith("logs/finetune_cache/examples-")


def test_a_checkpoint_tells_of_other_examples() -> None:
    write("a.txt", "one\ntwo\n" * 4)

    def facts() -> Any:
        config = settle("a.txt", train_iters=1)
        loader = build_loaders(config, SINGLE, 0, 0).train
        assert loader is not None
        return order_facts(config, loader)

    before = facts()
    assert facts() == before
    write("a.txt", "one\nsix\n" * 4)
    assert facts()["data"] != before["data"]


def test_validation_reads_its_own_files_once(capsys) -> None:
    write("a.txt", "a\n" * 20)
    write("v.txt", "".join(f"v{n}\n" for n in range(10)))
    config = settle("a.txt", finetune_valid_data="v.txt", eval_iters=None, train_iters=6)
    assert (config.eval_iters, config.origin("eval_iters")) == (3, "derived")  # 10 by batches of 4
    loaders = build_loaders(config, SINGLE, 0, 0)
    assert loaders.valid is not None and loaders.test is None
    seen = {tuple(row) for _ in range(6) for row in next(loaders.valid).tokens_BS[:, :3].tolist()}
    assert seen == {(*f"v{n}".encode(), 0) for n in range(10)}
    said = capsys.readouterr()
    assert "finetune_valid_data: 10 examples in 1 file: 30 tokens" in said.out
    assert "warning" not in said.err
    assert settle("a.txt", finetune_valid_data="v.txt", eval_iters=7).eval_iters == 7
    many = write("v.txt", "v\n" * 1000)
    assert settle("a.txt", finetune_valid_data=str(many), eval_iters=None).eval_iters == 100
    settle("*.txt", finetune_valid_data=["v.txt"])
    assert (
        "finetune_valid_data reads v.txt, which finetune_data trains on" in capsys.readouterr().err
    )


def test_without_the_key_nothing_happens() -> None:
    config = training_config(Path())
    assert tokenize_examples(config, SINGLE, build_tokenizer(config)) is config
