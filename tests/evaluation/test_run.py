"""A whole evaluation: every document counted, known scores, the results file, the table."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from neox.errors import ConfigError
from neox.evaluation import published, run
from neox.evaluation import results as report
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
    data = {"eval_data_dir": str(DEMO), "eval_own_documents": True}
    settings = models.config(**data | LONG | values)
    return run.evaluate(settings, lambda: model, tokenizer, ProcessGroups.single())


def wise(tokenizer: Tokenizer, texts: list[str]) -> models.Wise:
    return models.Wise([tokenizer.tokenize(text) for text in texts], models.config(**LONG))


@pytest.fixture(scope="module")
def results(tokenizer) -> dict[str, Any]:
    """Of a model that knows the first 30 passages and all right answers by heart."""
    texts = passages()[:30] + right_answers()
    return evaluate(wise(tokenizer, texts), tokenizer, seed=77)


def test_known_scores(results, tokenizer):
    values = report.tracker_metrics(results)
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
    assert [score.documents for score in report.scores(results)] == [documents] * 2


def test_the_conditions_are_told(results):
    assert results["config"] | {"device": "cpu"} == results["config"]
    assert results["config"]["model"] == "neox"
    assert results["config"]["batch_size"] == "auto"
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
    path = report.write_results(results, prefix)
    start = f"{prefix}_" if prefix else ""
    assert re.fullmatch(start + r"eval_results_\d\d-\d\d-\d{4}-\d\d-\d\d-\d\d\.json", str(path))
    written = json.loads(path.read_text())
    assert written["n_docs"] == results["n_docs"]
    assert written["results"] == report.with_old_names(results["results"])
    lambada, piqa = (written["results"][task] for task in ("lambada_openai", "piqa"))
    assert lambada["acc,none"] == lambada["acc"] == 0.75
    assert lambada["ppl"] == lambada["perplexity,none"]
    assert lambada["ppl_stderr"] == lambada["perplexity_stderr,none"]
    assert piqa["acc_norm"] == piqa["acc_norm,none"] == 1.0
    files = {task: tmp_path / name for task, name in written["samples"].items()}
    assert {*files.values(), tmp_path / path} == set(tmp_path.iterdir())
    samples = [json.loads(line) for line in files["piqa"].read_text().splitlines()]
    assert [sample["doc_id"] for sample in samples] == list(range(40))
    assert all(sample["acc"] == 1.0 and len(sample["resps"]) == 2 for sample in samples)


def test_a_prefix_in_a_new_folder_makes_it_and_one_below_a_file_is_refused(tmp_path):
    report.check_prefix(str(tmp_path / "new" / "x"))
    assert (tmp_path / "new").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"eval_results_prefix is .* cannot be written to .*file"):
        report.check_prefix(str(tmp_path / "file" / "x"))


def test_table(results):
    header, *rows = [line.split() for line in report.table(results).splitlines()]
    assert header == ["task", "metric", "value", "stderr", "documents"]
    assert [row[:2] for row in rows] == [
        ["lambada_openai", "perplexity"],
        ["lambada_openai", "acc"],
        ["piqa", "acc"],
        ["piqa", "acc_norm"],
    ]
    assert rows[1][2:] == ["0.7500", "0.0693", "40"]
    assert len({len(line) for line in report.table(results).splitlines()}) == 1


def test_table_with_what_was_published(results):
    model = published.Published(
        "some-model",
        (1, 1, 1),
        0,
        "somewhere",
        {("lambada_openai", "acc"): "0.74", ("piqa", "acc"): "0.5"},
    )
    own = report.published_beside(results, model)
    assert own["figures"] == {}  # these documents are the demo's
    data = {task: {"published": True} for task in ("lambada_openai", "piqa")}
    ours = {**results, "data": data}
    ours["published"] = report.published_beside(ours, model)
    header, *rows = [line.split() for line in report.table(ours).splitlines()]
    assert header[-1] == "some-model"
    assert rows[1][4:] == ["40", "0.74", "agrees"]
    assert rows[2][4:] == ["40", "0.5", "differs"]  # no document is wrong: there is no error
    assert rows[0][4:] == ["40"]
    for other in (
        {"n-shot": {"lambada_openai": 1, "piqa": 1}},
        {"n-samples": {t: {"original": 41, "effective": 40} for t in data}},
        {"config": {**results["config"], "apply_chat_template": True}},
    ):
        assert report.published_beside({**ours, **other}, model)["figures"] == {}


def test_table_of_a_part_and_of_a_large_number():
    values = {"sample_len": 7, "perplexity,none": 9.876e10, "perplexity_stderr,none": 0.5}
    results = {"results": {"t": values}, "n-samples": {"t": {"original": 70, "effective": 7}}}
    line = report.table(results).splitlines()[1]
    assert line.split() == ["t", "perplexity", "9.876e+10", "0.5000", "7", "of", "70"]


def test_a_filter_s_name_goes_behind_the_metric_s():
    values = {"alias": "gsm8k", "sample_len": 7, "exact_match,strict-match": 0.5}
    values |= {"exact_match_stderr,strict-match": "N/A", "acc,none": 0.25}
    results = {"results": {"gsm8k": values}}
    assert report.scores(results) == [
        report.Score("gsm8k", "exact_match_strict-match", 0.5, None, 7),
        report.Score("gsm8k", "acc", 0.25, None, 7),
    ]
    assert report.tracker_metrics(results) == {
        "eval/gsm8k_exact_match_strict-match": 0.5,
        "eval/gsm8k_acc": 0.25,
    }


def test_the_console_gets_our_lines_only(tokenizer, capfd):
    evaluate(wise(tokenizer, []), tokenizer, eval_tasks=["lambada"])
    out, err = capfd.readouterr()
    path = DEMO / "lambada" / "lambada_test.jsonl"
    assert out == f"lambada_openai: 40 documents in {path}, not the published ones\n"
    assert err == ""


def test_no_results_replace_others_of_the_same_second(results, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [report.write_results(results, "") for _ in range(4)]  # in a second or two
    assert len(set(paths)) == 4
    names = [json.loads(path.read_text())["samples"]["piqa"] for path in paths]
    assert len(set(names)) == 4
