"""LAMBADA and PIQA as published, every document of them, and scores of upstream's checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from neox.config import NeoXConfig, from_dict
from neox.entrypoints import evaluate
from neox.evaluation.run import tracker_metrics
from neox.evaluation.tasks import load_tasks
from neox.parallel.groups import initialize
from neox.parallel.topology import Topology
from tests.conformance.small import MODEL


def config(shared: Path, **values: Any) -> NeoXConfig:
    model = {
        **MODEL,
        "vocab_file": str(shared / "upstream/tok/small_tokenizer.json"),
        "load": str(shared / "upstream/checkpoints/ckpt_mp1pp1"),
        "eval_tasks": ["lambada", "piqa"],
        "eval_data_dir": str(shared / "data"),
        "train_micro_batch_size_per_gpu": 4,
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
    settings = config(shared, limit=20, eval_results_prefix=str(prefix), **values)
    world.run(settings.world_size, run_entry_point, settings)
    [path] = prefix.parent.glob(f"{prefix.name}_eval_results_*.json")
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def single(world, shared, tmp_path_factory) -> dict[str, Any]:
    return scores(world, shared, tmp_path_factory.mktemp("single") / "single")


def test_the_results_say_what_was_measured(single, shared):
    assert single["n_docs"] == {"lambada_openai": 20, "piqa": 20}
    assert single["n-samples"]["lambada_openai"] == {"original": 5153, "effective": 20}
    assert single["checkpoint"] == {
        "folder": str((shared / "upstream/checkpoints/ckpt_mp1pp1/global_step20").resolve()),
        "iteration": 20,
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
        {"train_micro_batch_size_per_gpu": 7},
    ],
    ids=["tp2", "pp2", "dp2", "tp2 pp2", "batch 7"],
)
def test_scores_are_the_same_on_every_grid(world, shared, single, tmp_path, grid):
    got = scores(world, shared, tmp_path / "grid", **grid)
    assert got["n_docs"] == single["n_docs"]
    assert tracker_metrics(got) == pytest.approx(tracker_metrics(single), rel=1e-4)
