"""A whole evaluation: every document counted, known scores, the results file, the table."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from neox.errors import ConfigError
from neox.evaluation import run
from neox.parallel.groups import ProcessGroups
from neox.tokenizer import Tokenizer
from tests.evaluation import models

DEMO = Path(__file__).parents[2] / "configs" / "demo_eval"
LONG = {"seq_length": 512, "max_position_embeddings": 512}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return models.tokenizer(tmp_path_factory.mktemp("tokenizer"))


def passages() -> list[str]:
    lines = (DEMO / "lambada" / "lambada_test.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def right_answers() -> list[str]:
    questions = map(json.loads, (DEMO / "piqa" / "valid.jsonl").read_text().splitlines())
    labels = (DEMO / "piqa" / "valid-labels.lst").read_text().split()
    return [
        f"Question: {q['goal']}\nAnswer: {q[f'sol{int(label) + 1}']}"
        for q, label in zip(questions, labels, strict=True)
    ]


def evaluate(model: Any, tokenizer: Tokenizer, **values: Any) -> dict[str, Any]:
    settings = models.config(**{"eval_data_dir": str(DEMO)} | LONG | values)
    return run.evaluate(settings, model, tokenizer, ProcessGroups.single())


def wise(tokenizer: Tokenizer, texts: list[str]) -> models.Wise:
    return models.Wise([tokenizer.tokenize(text) for text in texts], models.config(**LONG))


@pytest.fixture(scope="module")
def results(tokenizer) -> dict[str, Any]:
    """Of a model that knows the first 30 passages and all right answers by heart."""
    texts = passages()[:30] + right_answers()
    return evaluate(wise(tokenizer, texts), tokenizer, seed=77)


def test_known_scores(results, tokenizer):
    values = run.tracker_metrics(results)
    assert set(values) == {
        f"eval/{name}{suffix}"
        for name in ("lambada_openai_acc", "lambada_openai_perplexity", "piqa_acc", "piqa_acc_norm")
        for suffix in ("", "_stderr")
    }
    assert values["eval/lambada_openai_acc"] == 30 / 40
    assert values["eval/lambada_openai_acc_stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 39))
    # What it does not know is equally likely, whatever it is; what it knows costs next to nothing.
    unknown = sum(
        len(tokenizer.tokenize(text)) - len(tokenizer.tokenize(text.rpartition(" ")[0]))
        for text in passages()[30:]
    )
    perplexity = models.VOCABULARY ** (unknown / 40)
    assert values["eval/lambada_openai_perplexity"] == pytest.approx(perplexity, rel=1e-3)
    assert values["eval/piqa_acc"] == values["eval/piqa_acc_norm"] == 1.0


def test_every_document_is_scored(results):
    assert results["n_docs"] == {"lambada_openai": 40, "piqa": 40}
    assert results["config"]["limit"] is None


@pytest.mark.parametrize("limit, documents", [(3, 3), (1, 1), (0.25, 10), (1000, 40)])
def test_limit_is_counted_and_told(tokenizer, limit, documents):
    results = evaluate(wise(tokenizer, []), tokenizer, eval_tasks=["lambada"], limit=limit)
    assert results["n_docs"] == {"lambada_openai": documents}
    assert results["config"]["limit"] == limit
    assert [score.documents for score in run.scores(results)] == [documents] * 2


def test_the_conditions_are_told(results):
    assert results["config"] | {"device": "cpu"} == results["config"]
    assert results["config"]["model"] == "neox"
    assert results["config"]["batch_size"] == 4
    assert results["config"]["seed"] == 77
    assert results["config"]["precision"] == "float32"
    assert results["config"]["bootstrap_iters"] == 10_000
    assert results["grid"] == {"tp": 1, "pp": 1, "dp": 1}
    assert results["versions"] == {"lambada_openai": 1.0, "piqa": 1.0}
    assert results["n-shot"] == {"lambada_openai": 0, "piqa": 0}
    assert results["tokenizer"]["vocab_size"] == 280
    assert re.match(r"\d+\.\d+", results["library_versions"]["lm-eval"])
    assert 0 < results["duration_seconds"] < 60
    source = results["configs"]["piqa"]["dataset_path"]
    assert source == str(DEMO / "piqa" / "valid.jsonl")


@pytest.mark.parametrize("prefix", ["", "iteration_26000"])
def test_results_file(results, tmp_path, monkeypatch, prefix):
    monkeypatch.chdir(tmp_path)
    path = run.write_results(results, prefix)
    assert [p.name for p in tmp_path.iterdir()] == [str(path)]
    start = f"{prefix}_" if prefix else ""
    assert re.fullmatch(start + r"eval_results_\d\d-\d\d-\d{4}-\d\d-\d\d-\d\d\.json", str(path))
    written = json.loads(path.read_text())
    assert written["n_docs"] == results["n_docs"]
    assert written["results"] == results["results"]
    assert written["results"]["lambada_openai"]["acc,none"] == 0.75


def test_a_prefix_in_a_new_folder_makes_it_and_one_below_a_file_is_refused(tmp_path):
    run.check_prefix(str(tmp_path / "new" / "x"))
    assert (tmp_path / "new").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"eval_results_prefix is .* cannot be written to .*file"):
        run.check_prefix(str(tmp_path / "file" / "x"))


def test_table(results):
    header, *rows = [line.split() for line in run.table(results).splitlines()]
    assert header == ["task", "metric", "value", "stderr", "documents"]
    assert [row[:2] for row in rows] == [
        ["lambada_openai", "perplexity"],
        ["lambada_openai", "acc"],
        ["piqa", "acc"],
        ["piqa", "acc_norm"],
    ]
    assert rows[1][2:] == ["0.7500", "0.0693", "40"]
    assert len({len(line) for line in run.table(results).splitlines()}) == 1


def test_table_of_a_part_and_of_a_large_number():
    values = {"sample_len": 7, "perplexity,none": 9.876e10, "perplexity_stderr,none": 0.5}
    results = {"results": {"t": values}, "n-samples": {"t": {"original": 70, "effective": 7}}}
    line = run.table(results).splitlines()[1]
    assert line.split() == ["t", "perplexity", "9.876e+10", "0.5000", "7", "of", "70"]


def test_a_filter_s_name_goes_behind_the_metric_s():
    values = {"alias": "gsm8k", "sample_len": 7, "exact_match,strict-match": 0.5}
    values |= {"exact_match_stderr,strict-match": "N/A", "acc,none": 0.25}
    results = {"results": {"gsm8k": values}}
    assert run.scores(results) == [
        run.Score("gsm8k", "exact_match_strict-match", 0.5, None, 7),
        run.Score("gsm8k", "acc", 0.25, None, 7),
    ]
    assert run.tracker_metrics(results) == {
        "eval/gsm8k_exact_match_strict-match": 0.5,
        "eval/gsm8k_acc": 0.25,
    }


def test_the_console_gets_our_lines_only(tokenizer, capfd):
    evaluate(wise(tokenizer, []), tokenizer, eval_tasks=["lambada"])
    out, err = capfd.readouterr()
    assert out == f"lambada_openai: 40 documents in {DEMO / 'lambada' / 'lambada_test.jsonl'}\n"
    assert err == ""
