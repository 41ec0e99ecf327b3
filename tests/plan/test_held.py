"""Weights, gradients and optimizer state of a plan are those of real ranks, to the byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from neox.parallel.topology import Topology
from neox.plan.memory import memory, of_replica
from neox.plan.stages import PlannedModel
from neox.plan.trace import planned_world
from tests.engine.test_grids import (
    NO_PIPELINE,
    OFFLOAD,
    OFFLOAD_WEIGHTS,
    ZERO_1,
    ZERO_2,
    ZERO_3,
)
from tests.models import VOCAB, write_model
from tests.plan.runs import Case, HeldBytes, configuration, held_by_ranks, offloaded_by_ranks
from tests.world import World

BF16 = {"precision": "bfloat16"}
TIED = {"no_weight_tying": False}
# Sizes that ZeRO has to fill up.
ODD = {"hidden_size": 18, "num_attention_heads": 2, "pos_emb": "none", "num_layers": 3}
# With a threshold that leaves norms and biases whole, and the default, which leaves all.
SOME_WHOLE = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100}}
ALL_WHOLE = {"zero_optimization": {"stage": 3}} | NO_PIPELINE
ODD_2 = ODD | {"num_layers": 2, "use_bias_in_attn_linear": False}
TABLE = TIED | {"pos_emb": "learned"}  # of positions, which the last stage has and does not use

CASES: list[Case] = [
    (Topology(), NO_PIPELINE),
    (Topology(), ZERO_1 | TIED),
    (Topology(), BF16),
    (Topology(), NO_PIPELINE | {"use_bnb_optimizer": True, "hidden_size": 64}),
    (Topology(tp=2), NO_PIPELINE | ZERO_1),
    (Topology(tp=2), {}),
    (Topology(tp=2), BF16 | TIED),
    (Topology(pp=2), {}),
    (Topology(pp=2), ZERO_1 | TIED),
    (Topology(pp=2), BF16),
    (Topology(pp=2), TABLE),
    (Topology(pp=2), TABLE | BF16 | {"data_types": {"grad_accum_dtype": "bf16"}}),
    (Topology(pp=2), {"num_layers": 3, "pipe_partition_method": "parameters"} | ZERO_1),
    (Topology(pp=2), {"num_layers": 5, "pipe_partition_method": "uniform"}),
    (Topology(pp=2), {"num_layers": 6, "pipe_partition_method": "type:norm|transformer"}),
    (Topology(dp=2), NO_PIPELINE),
    (Topology(dp=2), ZERO_1 | ODD),
    (Topology(dp=2), BF16 | ODD),
    (Topology(dp=2), ZERO_2 | TIED),
    (Topology(dp=2), ZERO_2 | BF16),
    (Topology(), ZERO_3),
    (Topology(dp=2), ZERO_3 | ODD),
    (Topology(dp=2), ZERO_3 | BF16 | TIED),
    (Topology(dp=2), NO_PIPELINE | SOME_WHOLE | BF16),
    (Topology(dp=2), ALL_WHOLE),
    (Topology(dp=2), NO_PIPELINE | {"optimizer": {"type": "Lion", "params": {"lr": 0.01}}}),
    (Topology(dp=2), ZERO_1 | {"optimizer": {"type": "madgrad_wd", "params": {"lr": 0.01}}}),
    (Topology(pp=2, tp=2), ZERO_1 | TIED),
    (Topology(pp=2, tp=2), BF16),
    (Topology(dp=2, tp=2), ZERO_1 | {"gpt_j_residual": False, "norm": "rmsnorm"}),
    (Topology(dp=2, tp=2), ZERO_2 | BF16),
    (Topology(pp=2, dp=2), BF16 | TIED),
    (Topology(pp=2, dp=2), TABLE),
    (Topology(pp=2, dp=2), TABLE | ZERO_1),
    (Topology(pp=2, dp=2), TABLE | BF16),
    (Topology(pp=2, dp=2), ZERO_1 | ODD_2),
    (Topology(dp=2, tp=2), ZERO_3 | BF16),
    (Topology(dp=4), ZERO_1 | ODD),
    (Topology(dp=4), ZERO_3 | ODD),
    (Topology(dp=4), NO_PIPELINE | BF16 | ODD),
]


LORA = {"lora": {"rank": 4}}
ADAPTED: list[Case] = [
    (Topology(), LORA | NO_PIPELINE),
    (Topology(), LORA | {"load_in_8bit": True}),
    (Topology(tp=2), LORA | {"load_in_8bit": True}),
    (Topology(pp=2), LORA | BF16),
    (Topology(pp=2), LORA | BF16 | TIED),
    (Topology(pp=2), LORA | {"load_in_8bit": True} | TIED),
    (Topology(dp=2), LORA | ZERO_2),
    (Topology(dp=2), {"lora": {"rank": 4, "biases": True, "norms": True}} | ZERO_1),
]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rank_holds_what_was_planned(world: World, size: int) -> None:
    check(world, size, [case for case in CASES if case[0].world_size == size])


OFFLOADED: list[Case] = [
    (Topology(dp=2), {"zero_optimization": {"stage": stage} | OFFLOAD} | NO_PIPELINE | values)
    for stage in (1, 2, 3)
    for values in ({}, BF16 | ODD, {"gradient_accumulation_steps": 1})
]
OFFLOADED.append(
    (Topology(dp=2), {"zero_optimization": {"stage": 3} | OFFLOAD | OFFLOAD_WEIGHTS} | NO_PIPELINE)
)


def test_what_is_offloaded(world: World) -> None:
    by_rank = world.run(2, offloaded_by_ranks, OFFLOADED, timeout=300.0)
    wrong = []
    for (topology, values), *ranks in zip(OFFLOADED, *by_rank, strict=True):
        with planned_world():
            (planned,) = memory(PlannedModel(configuration(topology, values), VOCAB))
        if planned.host != max(ranks):
            wrong.append(f"{topology} {values}: {planned.host}, but {ranks} in truth")
        assert planned.optimizer == 0
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("size", [1, 2])
def test_frozen_weights_and_adapters(world: World, size: int, tmp_path: Path) -> None:
    write_model(tmp_path, 1)
    write_model(tmp_path, 2, **TIED)
    cases = [
        (grid, v | {"load": str(tmp_path / f"global_step{2 if TIED.items() <= v.items() else 1}")})
        for grid, v in ADAPTED
        if grid.world_size == size
    ]
    check(world, size, [(grid, v | {"finetune": True}) for grid, v in cases])


def check(world: World, size: int, cases: list[Case]) -> None:
    by_rank = world.run(size, held_by_ranks, cases, timeout=300.0)
    for (topology, values), *ranks in zip(cases, *by_rank, strict=True):
        with planned_world():
            model = PlannedModel(configuration(topology, values), VOCAB)
            stages = memory(model)
            for rank, found in enumerate(ranks):
                at = topology.coordinate(rank)
                one = of_replica(model, model.stages()[at.pp], at.dp)
                planned = HeldBytes(one.weights, one.gradients, one.optimizer)
                assert found == planned, f"{topology} {values} rank {rank}"
        for number, stage in enumerate(stages):  # what is shown is what the fullest replica has
            mine = [held for r, held in enumerate(ranks) if topology.coordinate(r).pp == number]
            most = HeldBytes(*map(max, zip(*mine, strict=True)))
            assert most == (stage.weights, stage.gradients, stage.optimizer)
