"""Messages of a plan are those that real ranks send, one by one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from neox.parallel.topology import Topology
from neox.plan.messages import work
from neox.plan.stages import PlannedModel
from neox.plan.trace import planned_world
from tests.engine.test_grids import NO_PIPELINE, RECOMPUTE, SPLIT, ZERO_1, ZERO_2
from tests.engine.test_messages import step_messages
from tests.models import VOCAB, write_model
from tests.plan.runs import Case, configuration
from tests.world import World

BF16 = {"precision": "bfloat16"}
TIED = {"no_weight_tying": False}
SMALL_BUCKETS = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 3000}}

CASES: list[Case] = [
    (Topology(tp=2), NO_PIPELINE),
    (Topology(tp=2), NO_PIPELINE | SPLIT),
    (Topology(tp=2), NO_PIPELINE | RECOMPUTE),
    (Topology(tp=2), {"gpt_j_residual": False, "hidden_dropout": 0.1} | RECOMPUTE),
    (Topology(tp=2), NO_PIPELINE | BF16 | TIED),
    (Topology(pp=2), {}),
    (Topology(pp=2), ZERO_1 | TIED),
    (Topology(pp=2), BF16),
    (Topology(dp=2), {}),
    (Topology(dp=2), NO_PIPELINE | ZERO_1),
    (Topology(dp=2), SMALL_BUCKETS),
    (Topology(dp=2), SMALL_BUCKETS | NO_PIPELINE),
    (Topology(dp=2), ZERO_2),
    (Topology(dp=2), NO_PIPELINE | BF16),
    (Topology(pp=2, tp=2), TIED),
    (Topology(pp=2, tp=2), SPLIT | ZERO_1),
    (Topology(pp=2, tp=2), BF16 | RECOMPUTE),
    (Topology(dp=2, tp=2), ZERO_1),
    (Topology(dp=2, tp=2), BF16 | NO_PIPELINE),
    (Topology(pp=2, dp=2), ZERO_1),
    (Topology(pp=2, dp=2), BF16 | TIED),
    (Topology(pp=2, dp=2), ZERO_1 | TIED | {"pos_emb": "learned"}),
    (Topology(pp=2, dp=2), TIED | {"pos_emb": "learned"}),
    (Topology(dp=4), ZERO_1),
]


LORA = {"lora": {"rank": 4}, "finetune": True}
ADAPTED: list[Case] = [
    (Topology(tp=2), LORA),  # the first block's input needs no gradient
    (Topology(tp=2), LORA | RECOMPUTE),
    (Topology(tp=2), LORA | {"lora": {"rank": 4, "norms": True, "biases": True}} | NO_PIPELINE),
    (Topology(pp=2), LORA | ZERO_1 | TIED),  # of the frozen table nothing is sent
    (Topology(pp=2), LORA | BF16 | TIED),
    (Topology(dp=2), LORA | ZERO_2),
    (Topology(dp=2), LORA | ZERO_1),
]


@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_sends_what_was_planned(world: World, size: int) -> None:
    check(world, size, [case for case in CASES if case[0].world_size == size])


def test_of_adapters(world: World, tmp_path: Path) -> None:
    write_model(tmp_path, 1)
    write_model(tmp_path, 2, **TIED)
    folders = [f"global_step{2 if TIED.items() <= values.items() else 1}" for _, values in ADAPTED]
    pairs = zip(ADAPTED, folders, strict=True)
    check(world, 2, [(at, v | {"load": str(tmp_path / folder)}) for (at, v), folder in pairs])


def check(world: World, size: int, cases: list[Case]) -> None:
    by_rank = world.run(size, step_messages, cases, timeout=300.0)
    wrong = []
    for (topology, values), *ranks in zip(cases, *by_rank, strict=True):
        with planned_world():
            planned = work(PlannedModel(configuration(topology, values), VOCAB))
        for rank, counted in enumerate(ranks):
            want: Counter[tuple[str, str, int]] = Counter()
            for message in planned.stages[topology.coordinate(rank).pp].messages:
                want[message.operation, message.axis, message.bytes // message.count] += (
                    message.count
                )
            found: Counter[tuple[str, str, int]] = Counter()
            for one, number in counted.items():
                found[one.kind, one.axis, one.elements * one.size] += number
            if found != want:
                more, less = dict(found - want), dict(want - found)
                wrong.append(f"{topology} {values} rank {rank}: more {more}, less {less}")
    assert not wrong, "\n".join(wrong)
