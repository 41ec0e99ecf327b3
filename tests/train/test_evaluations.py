"""Evaluating while training: what is reported, at every grid, and that training does not notice."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from neox.checkpoint.neox import Checkpoint
from neox.config import from_dict
from neox.data.loaders import Loaders, build_loaders
from neox.engine.build import build_engine
from neox.entrypoints.train import main
from neox.errors import ConfigError, DataError
from neox.evaluation import run
from neox.evaluation.results import metrics
from neox.evaluation.while_training import TaskScores
from neox.inference.load import load_model
from neox.parallel.groups import ProcessGroups, initialize
from neox.parallel.topology import Topology
from neox.tokenizer import build_tokenizer
from neox.train.evaluations import Evaluations
from tests import small_tokenizer
from tests.data.datasets import write_dataset
from tests.models import BASE
from tests.world import World

DEMO = str(Path(__file__).parents[2] / "configs/demo_eval")
TASKS = {
    "eval_tasks": ["lambada", "piqa"],
    "eval_data_dir": DEMO,
    "eval_own_documents": True,
    "limit": 5,
}
NAMES = ("lambada_openai_perplexity", "lambada_openai_acc", "piqa_acc", "piqa_acc_norm")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_tokenizer.write(tmp_path)
    write_dataset(tmp_path / "data", [40] * 30, modulo=280)
    return tmp_path


def settings(folder: Path | str, name: str, topology: Topology, values: dict[str, Any]) -> Any:
    return from_dict(
        {
            **BASE,
            "tokenizer_type": "HFTokenizer",
            "vocab_file": f"{folder}/tokenizer.json",
            "data_path": f"{folder}/data",
            "split": "8,1,1",
            "model_parallel_size": topology.tp,
            "pipe_parallel_size": topology.pp,
            "make_vocab_size_divisible_by": 8,
            "eval_interval": 2,
            "eval_iters": 1,
            "log_interval": 1,
            "hidden_dropout": 0.1,
            "attention_dropout": 0.1,
            "train_iters": 4,
            "save": f"{folder}/{name}",
            "load": f"{folder}/{name}",
            "checkpoint_factor": 2,
            "log_dir": f"{folder}/{name}-logs",
            **values,
        },
        world_size=topology.world_size,
    )


def run_training(
    rank: int, folder: str, name: str, topology: Topology, values: dict[str, Any]
) -> None:
    config = settings(folder, name, topology, values)
    main(config, initialize(topology, "gloo", torch.device("cpu")))


def train(world: World, folder: Path, name: str, topology: Topology, **values: Any):
    world.run(topology.world_size, run_training, str(folder), name, topology, values)
    lines = (folder / f"{name}-logs/metrics.jsonl").read_text().splitlines()
    return {row["iteration"]: row for row in map(json.loads, lines)}


def of_tasks(row: dict[str, Any], chart: str = "validation") -> dict[str, float]:
    """The tasks' values in a line of metrics.jsonl, without the chart's name."""
    names = [f"{name}{suffix}" for name in NAMES for suffix in ("", "_stderr")]
    return {name: row[f"{chart}/{name}"] for name in names if f"{chart}/{name}" in row}


GRIDS: dict[str, tuple[Topology, dict[str, Any]]] = {
    "tp2 pp2": (Topology(pp=2, tp=2), {}),
    "dp2 of 3 documents": (Topology(dp=2), {"limit": 3}),
    "pp0 tp2 dp2 ZeRO 2": (
        Topology(tp=2, dp=2),
        {"pipe_parallel_size": 0, "zero_optimization": {"stage": 2}},
    ),
    "pp0 dp2 ZeRO 3": (
        Topology(dp=2),
        {"pipe_parallel_size": 0, "zero_optimization": {"stage": 3}, "no_weight_tying": False},
    ),
    "pp2 bfloat16, stages split anywhere": (
        Topology(pp=2),
        {"precision": "bfloat16", "pipe_partition_method": "uniform", "num_layers": 3},
    ),
    "sequence parallel": (Topology(tp=2), {"sequence_parallel": True}),
}


@pytest.mark.parametrize("name", GRIDS)
def test_training_goes_on_as_without_tasks_and_scores_are_those_of_the_checkpoint(
    world: World, folder: Path, name: str
) -> None:
    topology, values = GRIDS[name]
    without = train(world, folder, "without", topology, **values)
    with_tasks = train(world, folder, "with", topology, **TASKS | values)
    for iteration, row in without.items():
        for key in ("train/lm_loss", "train/grad_norm", "validation/lm_loss", "test/lm_loss"):
            assert with_tasks[iteration].get(key) == row.get(key), (iteration, key)
    assert set(without[3]) == set(with_tasks[3])
    expected, got = (Checkpoint.open(folder / name).source for name in ("without", "with"))
    for index in expected.indices:
        for paths in zip(expected.files(index), got.files(index), strict=True):
            one, other = (torch.load(path, weights_only=True) for path in paths)
            assert all(torch.equal(one[tensor], other[tensor]) for tensor in one)

    for step in (2, 4):
        config = settings(folder, "with", Topology(), {**TASKS, **values, "iteration": step})
        config = config if config.pp == 1 else settings(folder, "with", Topology(), {})
        groups = ProcessGroups.single()
        tokenizer = build_tokenizer(config)
        model = load_model(config, groups, tokens=tokenizer.vocab_size)
        results = metrics(run.evaluate(config, lambda model=model: model, tokenizer, groups))
        tolerance = 0.05 if values.get("precision") == "bfloat16" else 1e-4
        while_training = of_tasks(with_tasks[step])
        assert set(while_training) == set(results)
        # The perplexity's standard error is estimated from fewer draws.
        del results["lambada_openai_perplexity_stderr"]
        assert results == pytest.approx(
            {key: while_training[key] for key in results}, rel=tolerance
        )
    assert of_tasks(with_tasks[4], "test") == of_tasks(with_tasks[4])


def test_tasks_without_validation_data(world: World, folder: Path) -> None:
    for name, values in {"none": {"split": "1,0,0"}, "no losses": {"eval_iters": 0}}.items():
        rows = train(world, folder, name, Topology(), **TASKS | values)
        assert [iteration for iteration, row in rows.items() if of_tasks(row)] == [2, 4]
        for row in rows.values():
            assert "validation/lm_loss" not in row and not of_tasks(row, "test")


def test_a_resumed_run_has_the_same_scores(world: World, folder: Path) -> None:
    """Also with examples, which a task draws anew for every evaluation."""
    values = TASKS | {"num_fewshot": 1, "eval_tasks": ["lambada"], "eval_interval": 1}
    whole = train(world, folder, "whole", Topology(), **values)
    train(world, folder, "parts", Topology(), exit_interval=2, **values)
    parts = train(world, folder, "parts", Topology(), **values)
    for iteration in (1, 2, 3, 4):
        assert of_tasks(parts[iteration]) == of_tasks(whole[iteration]) != {}
    assert len({row["validation/lambada_openai_perplexity"] for row in whole.values()}) == 4


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"eval_tasks": ["lambda"]}, ConfigError, "lm-eval has no task 'lambda'.* lambada"),
        ({"eval_data_dir": "nowhere"}, DataError, "eval_data_dir: nowhere is not a folder"),
        ({"eval_tasks": ["piqa"], "num_fewshot": 2}, DataError, "train.jsonl"),
    ],
)
def test_what_cannot_be_evaluated_is_found_before_training(
    world: World, folder: Path, values: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(world, folder, "run", Topology(), **TASKS | values)
    assert not (folder / "run-logs").exists()


def test_a_model_that_computes_nan_has_no_scores_and_ends_nothing(
    world: World, folder: Path
) -> None:
    assert world.run(2, score_nan, str(folder)) == [{}, {}]


def score_nan(rank: int, folder: str) -> dict[str, float]:
    topology = Topology(pp=2)
    groups = initialize(topology, "gloo", torch.device("cpu"))
    config = settings(folder, "nan", topology, TASKS)
    engine = build_engine(config, groups, 280)
    with engine.lend() as stage, torch.no_grad():
        for _, module in stage:
            for parameter in module.parameters() if isinstance(module, torch.nn.Module) else ():
                parameter.fill_(math.nan)
    tokenizer = build_tokenizer(config)
    scores = TaskScores(config, groups, tokenizer)
    loaders = Loaders(None, None, None)
    return Evaluations(config, groups, engine, loaders, tokenizer, 280, scores).validate(1)


def test_perplexity_by_character(world: World, folder: Path) -> None:
    """The tokens and the characters of both replicas' validation samples are counted."""
    rows = train(
        world, folder, "run", Topology(dp=2), char_level_ppl=True, eval_iters=2, train_iters=2
    )
    config = settings(folder, "run", Topology(dp=2), {"eval_iters": 2, "train_iters": 2})
    tokenizer = build_tokenizer(config)
    loaders = build_loaders(
        config, ProcessGroups.single(), 0, tokenizer.eod, vocab_size=tokenizer.vocab_size
    )
    tokens = characters = 0
    # iteration 2 is an evaluation's and the end's: the second half of what is drawn counts
    for number in range(2 * config.eval_iters * config.gradient_accumulation_steps * 2):
        batch = next(loaders.valid)
        if number >= config.eval_iters * config.gradient_accumulation_steps * 2:
            for row, labels in zip(batch.tokens_BS, batch.labels_BS, strict=True):
                ids = [*row.tolist(), int(labels[-1])]
                tokens, characters = tokens + len(ids), characters + len(tokenizer.detokenize(ids))
    loss = rows[2]["validation/lm_loss"]
    assert characters != tokens
    assert rows[2]["validation/lm_loss_char_lvl_ppl"] == pytest.approx(
        math.exp(loss * tokens / characters), rel=1e-9
    )
    assert "test/lm_loss_char_lvl_ppl" in rows[2]
