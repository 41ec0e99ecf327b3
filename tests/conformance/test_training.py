"""Upstream's own run, repeated from its initial weights on its data, at every grid."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from neox.config import from_dict
from neox.entrypoints.train import main
from neox.parallel.groups import initialize
from neox.parallel.topology import Topology
from tests.conformance.small import small_config
from tests.world import World


def run_training(rank: int, upstream: str, topology: Topology, folder: str) -> None:
    config = from_dict(
        {
            **small_config(Path(upstream)),
            "model_parallel_size": topology.tp,
            "pipe_parallel_size": topology.pp,
            # Upstream's vocabulary of 1100 was padded to 1152 = 9 x 128; 18 x 64 keeps it at tp 2.
            "make_vocab_size_divisible_by": 128 // topology.tp,
            "load": f"{folder}/start",
            "log_dir": f"{folder}/logs",
        },
        world_size=topology.world_size,
    )
    main(config, initialize(topology, "gloo", torch.device("cpu")))


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (1, 2), (2, 1), (2, 2), (1, 0)])
def test_the_twenty_losses(world: World, shared: Path, tmp_path: Path, tp: int, pp: int) -> None:
    upstream = shared / "upstream"
    start = tmp_path / "start"
    start.mkdir()
    shutil.copytree(
        upstream / "checkpoints/ckpt_mp1pp1/global_step0",
        start / "global_step0",
        ignore=shutil.ignore_patterns("configs"),
    )
    (start / "latest").write_text("global_step0")
    topology = Topology(pp=max(1, pp), tp=tp)

    world.run(topology.world_size, run_training, str(upstream), topology, str(tmp_path))

    curve = json.loads((upstream / "curves/train_mp1pp1.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "logs/metrics.jsonl").read_text().splitlines()]
    losses = {row["iteration"]: row["train/lm_loss"] for row in rows if "train/lm_loss" in row}
    expected = {step["iteration"]: step["lm_loss"] for step in curve["iters"]}
    assert losses == pytest.approx(expected, abs=1e-5)
    # The validation at iteration 20 and the one at the end of training have one key and one
    # iteration, and the later counts, as on upstream's charts.
    evaluations = {(e["kind"], e["at"]): e["lm_loss"] for e in curve["eval"]}
    by_iteration = {row["iteration"]: row for row in rows}
    assert [
        by_iteration[10]["validation/lm_loss"],
        by_iteration[20]["validation/lm_loss"],
        by_iteration[20]["test/lm_loss"],
    ] == pytest.approx(
        [
            evaluations["validation", "iteration 10"],
            evaluations["validation", "the end of training for val data"],
            evaluations["test", "the end of training for test data"],
        ],
        abs=1e-5,
    )
