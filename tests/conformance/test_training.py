"""Upstream's own run, repeated from its initial weights on its data, at every grid."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from neox.config import from_dict
from neox.entrypoints.train import main
from neox.parallel.groups import initialize
from neox.parallel.topology import Topology
from tests.conformance.small import small_config
from tests.world import World


def run_training(
    rank: int, upstream: str, topology: Topology, folder: str, values: dict[str, Any]
) -> str:
    """Train; what was printed."""
    config = from_dict(
        {
            **small_config(Path(upstream)),
            "model_parallel_size": topology.tp,
            "pipe_parallel_size": topology.pp,
            # Upstream's vocabulary of 1100 was padded to 1152 = 9 x 128; 18 x 64 keeps it at tp 2.
            "make_vocab_size_divisible_by": 128 // topology.tp,
            # Upstream's step is 2 micro-batches of 4; two replicas take one each.
            "gradient_accumulation_steps": 2 // topology.dp,
            "load": f"{folder}/start",
            "log_dir": f"{folder}/logs",
            **values,
        },
        world_size=topology.world_size,
    )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(config, initialize(topology, "gloo", torch.device("cpu")))
    return printed.getvalue()


def zero(stage: int) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage}}


SEQUENTIAL = {"pipe_parallel_size": 0}
GRIDS: dict[str, tuple[Topology, dict[str, Any]]] = {
    "1": (Topology(), {}),
    "ZeRO 0": (Topology(), zero(0)),
    "pp2": (Topology(pp=2), {}),
    "tp2": (Topology(tp=2), {}),
    "tp2 ZeRO 0": (Topology(tp=2), zero(0)),
    "tp2 pp2": (Topology(pp=2, tp=2), {}),
    "pp2 dp2 ZeRO 0": (Topology(pp=2, dp=2), zero(0)),
    "pp0": (Topology(), SEQUENTIAL),
    "pp0 ZeRO 0": (Topology(), SEQUENTIAL | zero(0)),
    "pp0 tp2 ZeRO 1": (Topology(tp=2), SEQUENTIAL | zero(1)),
    "pp0 dp2 ZeRO 1": (Topology(dp=2), SEQUENTIAL | zero(1)),
    "pp0 dp2 ZeRO 3": (Topology(dp=2), SEQUENTIAL | zero(3)),
    "tp2 dp2": (Topology(tp=2, dp=2), {}),
    "tp2 pp2 split sequences": (Topology(pp=2, tp=2), {"sequence_parallel": True}),
}


@pytest.mark.parametrize("name", GRIDS)
def test_the_twenty_losses(world: World, shared: Path, tmp_path: Path, name: str) -> None:
    upstream = shared / "upstream"
    start = tmp_path / "start"
    start.mkdir()
    shutil.copytree(
        upstream / "checkpoints/ckpt_mp1pp1/global_step0",
        start / "global_step0",
        ignore=shutil.ignore_patterns("configs"),
    )
    (start / "latest").write_text("global_step0")
    topology, values = GRIDS[name]
    printed, *_ = world.run(
        topology.world_size, run_training, str(upstream), topology, str(tmp_path), values
    )

    curve = json.loads((upstream / "curves/train_mp1pp1.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "logs/metrics.jsonl").read_text().splitlines()]
    by_iteration = {row["iteration"]: row for row in rows}
    losses = {row["iteration"]: row["train/lm_loss"] for row in rows if "train/lm_loss" in row}
    expected = {step["iteration"]: step["lm_loss"] for step in curve["iters"]}
    assert len(losses) == 20
    assert losses == pytest.approx(expected, abs=1e-5)
    # Upstream's rates were printed with four digits; tests/conformance/test_schedule.py has all.
    assert {
        iteration: f"{row['train/learning_rate']:.3E}" for iteration, row in by_iteration.items()
    } == {step["iteration"]: f"{step['lr_printed']:.3E}" for step in curve["iters"]}

    boxes = [line for line in printed.splitlines() if " results at " in line]
    assert len(boxes) == len(curve["eval"]) == 4
    for box, evaluation in zip(boxes, curve["eval"], strict=True):
        kind, at, loss = evaluation["kind"], evaluation["at"], evaluation["lm_loss"]
        head, loss_field, perplexity_field, _ = box.split(" | ")
        assert head == f" {kind} results at {at}"
        assert float(loss_field.removeprefix("lm_loss value: ")) == pytest.approx(loss, abs=1e-5)
        perplexity = float(perplexity_field.removeprefix("lm_loss_ppl value: "))
        assert perplexity == pytest.approx(math.exp(loss), rel=2e-5)
    # The validation at iteration 20 and the one at the end of training have one key and one
    # iteration, and the later counts, as on upstream's charts.
    assert [
        by_iteration[10]["validation/lm_loss"],
        by_iteration[20]["validation/lm_loss"],
        by_iteration[20]["test/lm_loss"],
    ] == pytest.approx([curve["eval"][i]["lm_loss"] for i in (0, 2, 3)], abs=1e-5)
