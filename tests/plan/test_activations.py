"""Activations of a plan are what the real model keeps for its backward pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from neox.parallel.topology import Topology
from neox.plan.memory import in_flight, memory
from neox.plan.stages import PlannedModel
from neox.plan.trace import planned_world
from tests.engine.test_grids import RECOMPUTE, SPLIT
from tests.models import ARCHITECTURES, VOCAB, write_model
from tests.plan.runs import Case, configuration, kept_by_ranks
from tests.world import World

WIDE = {"hidden_size": 128, "num_attention_heads": 8, "num_layers": 3, "pipe_parallel_size": 0}
LONG = WIDE | {"seq_length": 96, "max_position_embeddings": 96}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
BF16 = {"precision": "bfloat16"}
TWO_AT_ONCE = {"checkpoint_activations": True, "checkpoint_num_layers": 2}

VALUES = [
    WIDE,
    LONG,
    LONG | DROPOUT,
    LONG | BF16,
    LONG | BF16 | DROPOUT,
    LONG | {"gpt_j_residual": False},
    LONG | {"gpt_j_residual": False, "pos_emb": "learned"} | DROPOUT,
    LONG | {"pos_emb": "none", "no_weight_tying": False},
    LONG | ARCHITECTURES["llama"],
    LONG | {"activation": "geglu", "sliding_window_width": 16, "intermediate_size": 384},
    LONG | {"rotary_interleaved": True, "num_kv_heads": 2} | BF16,
    LONG | RECOMPUTE,
    LONG | TWO_AT_ONCE | DROPOUT,
    LONG | TWO_AT_ONCE | BF16,
]
CASES: list[Case] = [
    *((Topology(), values) for values in VALUES),
    *((Topology(tp=2), values) for values in VALUES),
    (Topology(tp=2), LONG | SPLIT),
    (Topology(tp=2), LONG | SPLIT | RECOMPUTE),
]
LORA = {"lora": {"rank": 4}, "finetune": True}
ADAPTED = [
    LONG | LORA,
    LONG | LORA | RECOMPUTE,
    LONG | LORA | DROPOUT,
    LONG | LORA | BF16,
    LONG | LORA | {"load_in_8bit": True},
    LONG | LORA | {"lora": {"rank": 4, "norms": True, "biases": True}},
]


@pytest.mark.parametrize("size", [1, 2])
def test_what_the_model_keeps(world: World, size: int) -> None:
    check(world, size, [case for case in CASES if case[0].world_size == size])


@pytest.mark.parametrize("size", [1, 2])
def test_what_adapters_keep(world: World, size: int, tmp_path: Path) -> None:
    write_model(tmp_path, 1, **LONG)
    load = {"load": str(tmp_path / "global_step1")}
    check(world, size, [(Topology(tp=size), values | load) for values in ADAPTED])


def check(world: World, size: int, cases: list[Case]) -> None:
    by_rank = world.run(size, kept_by_ranks, cases, timeout=300.0)
    wrong = []
    for (topology, values), *ranks in zip(cases, *by_rank, strict=True):
        with planned_world():
            (planned,) = memory(PlannedModel(configuration(topology, values), VOCAB))
        for kept in ranks:
            if planned.activations != pytest.approx(kept, rel=0.1):
                wrong.append(f"{topology} {values}: {planned.activations}, but {kept} in truth")
    assert not wrong, "\n".join(wrong)


def test_micro_batches_in_flight() -> None:
    assert [in_flight(4, stage, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert [in_flight(4, stage, 2) for stage in range(4)] == [2, 2, 2, 1]
