"""LAMBADA and PIQA as published, every document of them, and scores of upstream's checkpoints."""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from neox.checkpoint.hf.export import export
from neox.checkpoint.neox import Checkpoint
from neox.config import NeoXConfig, from_dict
from neox.entrypoints import evaluate
from neox.evaluation import run
from neox.evaluation.results import tracker_metrics
from neox.evaluation.tasks import load_tasks
from neox.inference.load import load_model
from neox.parallel.groups import ProcessGroups, initialize
from neox.parallel.topology import Topology
from neox.tokenizer import build_tokenizer
from tests.conformance.small import MODEL


def config(shared: Path, **values: Any) -> NeoXConfig:
    model = {
        **MODEL,
        "vocab_file": str(shared / "upstream/tok/small_tokenizer.json"),
        "load": str(shared / "upstream/checkpoints/ckpt_mp1pp1"),
        "eval_tasks": ["lambada", "piqa"],
        "eval_data_dir": str(shared / "data"),
        "eval_use_cache": False,
    }
    degrees = ("model_parallel_size", "pipe_parallel_size")
    replica = [values.get(degree, 1) for degree in degrees]
    world_size = values.pop("world_size", replica[0] * replica[1])
    return from_dict(model | values, world_size=world_size)


def test_every_document_of_lambada(shared):
    task = load_tasks(config(shared))["tasks"]["lambada_openai"]
    task.build_all_requests()
    lines = (shared / "data/lambada/lambada_test.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert len(texts) == len(task.instances) == 5153
    for text, instance in zip(texts, task.instances, strict=True):
        context, target = instance.args
        assert context + target == text
        assert target == " " + text.split(" ")[-1]


def test_every_document_of_piqa(shared):
    task = load_tasks(config(shared))["tasks"]["piqa"]
    task.build_all_requests()
    questions = (shared / "data/piqa/valid.jsonl").read_text(encoding="utf-8").splitlines()
    labels = (shared / "data/piqa/valid-labels.lst").read_text().split()
    assert len(questions) == len(task.eval_docs) == 1838
    assert len(task.instances) == 2 * 1838
    for i, (line, label) in enumerate(zip(questions, labels, strict=True)):
        question = json.loads(line)
        for j, answer in enumerate((question["sol1"], question["sol2"])):
            context = f"Question: {question['goal']}\nAnswer:"
            assert task.instances[2 * i + j].args == (context, f" {answer}")
        assert task.eval_docs[i]["label"] == int(label)


def run_entry_point(rank: int, settings: NeoXConfig) -> None:
    groups = initialize(
        Topology(pp=settings.pp, dp=settings.dp, tp=settings.tp), "gloo", torch.device("cpu")
    )
    evaluate.main(settings, groups)


def scores(world: Any, shared: Path, prefix: Path, **values: Any) -> dict[str, Any]:
    settings = config(shared, limit=300, eval_results_prefix=str(prefix), **values)
    world.run(settings.world_size, run_entry_point, settings)
    [path] = prefix.parent.glob(f"{prefix.name}_eval_results_*.json")
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def single(world, shared, tmp_path_factory) -> dict[str, Any]:
    return scores(world, shared, tmp_path_factory.mktemp("single") / "single")


def test_the_results_say_what_was_measured(single, shared):
    assert single["n_docs"] == {"lambada_openai": 300, "piqa": 300}
    assert single["n-samples"]["lambada_openai"] == {"original": 5153, "effective": 300}
    assert single["data"]["piqa"]["published"] and single["data"]["lambada_openai"]["published"]
    folder = shared / "upstream/checkpoints/ckpt_mp1pp1/global_step20"
    assert (
        single["checkpoint"] | {"folder": str(folder.resolve()), "iteration": 20}
        == (single["checkpoint"])
    )
    assert single["answers"] == {
        "asked": 900,
        "computed": 900,
        "remembered": 0,
        "folder": None,
    }
    # A model with 20 steps of training behind it; it has 1152 tokens to guess from.
    perplexity = tracker_metrics(single)["eval/lambada_openai_perplexity"]
    assert 1152 < perplexity < 1152**5


@pytest.mark.parametrize(
    "grid",
    [
        {"model_parallel_size": 2},
        {"pipe_parallel_size": 2},
        {"world_size": 2},
        {"model_parallel_size": 2, "pipe_parallel_size": 2},
        {"eval_batch_size": 1},
        {"eval_batch_size": 7},
    ],
    ids=["tp2", "pp2", "dp2", "tp2 pp2", "batch 1", "batch 7"],
)
def test_scores_are_the_same_on_every_grid(world, shared, single, tmp_path, grid):
    got = scores(world, shared, tmp_path / "grid", **grid)
    assert got["n_docs"] == single["n_docs"]
    for name, value in tracker_metrics(single).items():
        exact = "_acc" in name  # of right answers, and their standard error
        assert tracker_metrics(got)[name] == (value if exact else pytest.approx(value, rel=1e-6))


LENGTH = 640  # HFLM takes no continuation that is longer than the model's context
LONG = {"seq_length": LENGTH, "max_position_embeddings": LENGTH}
OWN_TASKS = {
    "own_rolling": """
        task: own_rolling
        dataset_path: json
        dataset_kwargs: {data_files: {test: texts.jsonl}}
        test_split: test
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{text}}"
        metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
    """,
    "own_generation": """
        task: own_generation
        dataset_path: json
        dataset_kwargs: {data_files: {test: texts.jsonl}}
        test_split: test
        output_type: generate_until
        doc_to_text: "{{text[:60]}}"
        doc_to_target: "{{text[60:]}}"
        generation_kwargs: {until: ["\\n", "the"], max_gen_toks: 16, do_sample: false}
        metric_list: [{metric: exact_match}]
    """,
}


@pytest.fixture(scope="module")
def exported(shared, tmp_path_factory) -> Path:
    """The checkpoint as a transformers folder."""
    settings = config(shared, **LONG)
    folder = tmp_path_factory.mktemp("exported") / "hf"
    checkpoint = Checkpoint.open(Path(settings.load))
    export(checkpoint, settings, folder, tokenizer=build_tokenizer(settings))
    return folder


def test_every_score_is_that_of_lm_evals_hf_backend(shared, exported, tmp_path, monkeypatch):
    """LAMBADA and PIQA, and tasks of one's own; the model as it was exported.

    With NEOX_EVAL_WHOLE=1 all documents, which takes the backend some minutes.
    """
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(run, "BOOTSTRAP_ITERATIONS", 200)
    texts = (shared / "data/lambada/lambada_test.jsonl").read_text().splitlines()[:24]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts) + "\n")
    for name, definition in OWN_TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(textwrap.dedent(definition))
    values = {"eval_tasks": ["lambada", "piqa", *OWN_TASKS], "include_path": str(tmp_path)}
    limit = None if os.environ.get("NEOX_EVAL_WHOLE") else 300
    settings = config(shared, limit=limit, **values, **LONG)
    tasks = load_tasks(settings)
    groups = ProcessGroups.single()
    tokenizer = build_tokenizer(settings)
    got = run.evaluate(settings, lambda: load_model(settings, groups), tokenizer, groups, tasks)
    theirs = HFLM(
        pretrained=str(exported), device="cpu", batch_size=16, max_length=LENGTH, logits_cache=False
    )
    expected = evaluator.evaluate(theirs, load_tasks(settings), limit=limit, bootstrap_iters=200)
    assert got["n_docs"]["lambada_openai"] == (limit or 5153)
    assert got["n_docs"]["piqa"] == (limit or 1838)
    assert_same_answers(got["samples"], expected["samples"])
    ours, others = tracker_metrics(got), tracker_metrics(expected)
    assert len(others) == 8 + 3 + 2
    for name, value in others.items():
        exact = "_acc" in name or "exact" in name
        assert ours[name] == (value if exact else pytest.approx(value, rel=1e-6)), name


def assert_same_answers(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """Document by document: what was right, and every text that was written."""
    for task, samples in expected.items():
        for ours, theirs in zip(got[task], samples, strict=True):
            assert ours["doc_hash"] == theirs["doc_hash"]
            if "acc" in theirs:
                assert ours["acc"] == theirs["acc"], (task, ours["doc_id"])
            if task == "own_generation":
                assert ours["resps"] == theirs["resps"]
