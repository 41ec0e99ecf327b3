"""Answers are kept for the next run of the same model, whole or not at all."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from neox.checkpoint.identity import weights_digest
from neox.checkpoint.neox import Checkpoint
from neox.evaluation import answers, run
from neox.evaluation.adapter import NeoXLM
from neox.evaluation.answers import Answers, cache_folder
from neox.tokenizer import Tokenizer, tokenizer_digest
from tests.evaluation import models
from tests.models import write_model

PAIRS = [("It was", f" the {word} of times") for word in ("best", "worst", "age", "season")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return models.tokenizer(tmp_path_factory.mktemp("tokenizer"))


def ask(tokenizer: Tokenizer, folder: Path | None, pairs: list[tuple[str, str]], **values: Any):
    """Scores of pairs, of a rolling text and a generated one, and how many were computed."""
    model = models.random_model()
    lm = NeoXLM(
        values.get("load", lambda: model),
        tokenizer,
        model.groups,
        model.config.seq_length,
        batch_size=1,
        seed=1,
        answers=Answers(folder),
    )
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    text = [Instance("loglikelihood_rolling", {}, ("It was the best of times " * 9,), 0)]
    options = {"until": ["\n"], "max_gen_toks": 5}
    prompt = [Instance("generate_until", {}, ("It was", options), 0)]
    found = lm.loglikelihood(requests), lm.loglikelihood_rolling(text), lm.generate_until(prompt)
    return found, lm.computed


def assert_close(got: Any, expected: Any) -> None:
    assert [s for s, _ in got] == pytest.approx([s for s, _ in expected], rel=1e-5)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]


def refuse() -> Any:
    raise AssertionError("the model is not needed")


def test_a_second_run_needs_no_model(tokenizer: Tokenizer, tmp_path: Path) -> None:
    first, computed = ask(tokenizer, tmp_path, PAIRS)
    assert computed == len(PAIRS) + 2
    second, computed = ask(tokenizer, tmp_path, PAIRS, load=refuse)
    assert second == first and computed == 0


def test_only_what_is_new_is_computed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ask(tokenizer, tmp_path, PAIRS[:2])
    (scores, *_), computed = ask(tokenizer, tmp_path, PAIRS)
    assert computed == 2
    assert_close(scores, ask(tokenizer, None, PAIRS)[0][0])


def test_damaged_lines_are_computed_anew(tokenizer: Tokenizer, tmp_path: Path) -> None:
    first, _ = ask(tokenizer, tmp_path, PAIRS)
    [path] = tmp_path.glob("*.jsonl")
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        known = Answers(tmp_path).read()
        assert known.items() <= answers_of(whole).items(), at
        path.write_bytes(whole[:at])
        assert Answers(tmp_path).read().items() <= answers_of(whole).items(), at
    path.write_bytes(whole[:-30])
    assert ask(tokenizer, tmp_path, PAIRS) == (first, 1)


def answers_of(text: bytes) -> dict[str, Any]:
    return {k: v for line in text.decode().splitlines() for k, v in answers._parse(line).items()}


def test_a_folder_that_cannot_be_written_ends_the_keeping_only(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").touch()
    found, _ = ask(tokenizer, tmp_path / "file" / "below", PAIRS)
    assert_close(found[0], ask(tokenizer, None, PAIRS)[0][0])
    warning = "warning: answers are not kept in .*below any more: (Not a directory|File exists)\n"
    assert re.fullmatch(warning, capsys.readouterr().err)


def test_where_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEOX_CACHE", "/one")
    assert cache_folder(models.config()) == Path("/one/answers")
    assert cache_folder(models.config(eval_cache_dir="/two")) == Path("/two")
    assert cache_folder(models.config(eval_use_cache=False)) is None
    monkeypatch.delenv("NEOX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/three")
    assert cache_folder(models.config()) == Path("/three/neox/answers")


def test_what_answers_depend_on(tmp_path: Path) -> None:
    """Another model, tokenizer or precision is asked anew; another grid or batch is not."""
    from neox.parallel.groups import ProcessGroups

    def identity(folder: Path, **values: Any) -> str:
        settings = models.config(load=str(folder), **values)
        tokenizer = tokenizer_digest(settings)
        groups = ProcessGroups.single()
        found = run._identity(settings, Checkpoint.open(folder), tokenizer, groups)
        found["checkpoint"] = found["checkpoint"]["digest"]
        return answers.digest(found)

    one, same, other = (tmp_path / name for name in ("one", "same", "other"))
    for folder, seed in ((one, 0), (same, 0), (other, 1)):
        write_model(folder, 3, seed=seed)
    base = identity(one)
    assert identity(same) == base
    assert identity(one, eval_batch_size=3, limit=2, num_fewshot=1) == base
    changed = [
        identity(other),
        identity(one, precision="bfloat16"),
        identity(one, rotary_pct=0.5),
        identity(one, seq_length=32),
        identity(one, tokenizer_type="GPT2BPETokenizer", vocab_file="a", merge_file="b"),
    ]
    assert len({base, *changed}) == 6


def test_the_digest_of_weights_without_a_manifest_is_of_their_checksums(tmp_path: Path) -> None:
    digests = set()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        step = write_model(tmp_path / name, 3, seed=seed)
        with_manifest = Checkpoint.open(step)
        bare = dataclasses.replace(with_manifest, manifest=None)
        digests |= {weights_digest(bare), weights_digest(with_manifest)}
    assert len(digests) == 4


def test_a_question_asked_twice_is_no_answer_of_an_earlier_run(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = models.random_model()

    def run() -> tuple[int, int, int]:
        lm = NeoXLM(
            lambda: model,
            tokenizer,
            model.groups,
            model.config.seq_length,
            batch_size=1,
            seed=1,
            answers=Answers(tmp_path),
        )
        pairs = [PAIRS[0], PAIRS[0], PAIRS[1]]
        lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
        return lm.asked, lm.computed, lm.remembered

    assert run() == (3, 2, 0)
    assert run() == (3, 0, 3)
