"""FLOPs of a plan are those of the products that the real model multiplies."""

from __future__ import annotations

import pytest

from neox.parallel.topology import Topology
from neox.plan.messages import work
from neox.plan.stages import PlannedModel
from neox.plan.trace import planned_world
from tests.engine.test_grids import SPLIT
from tests.models import ARCHITECTURES, VOCAB
from tests.plan.runs import Case, configuration, products_by_ranks
from tests.world import World

# In float32 a CPU multiplies by an operator that torch does not count.
BF16 = {"precision": "bfloat16", "pipe_parallel_size": 0, "num_layers": 4}
RECOMPUTE = {"checkpoint_activations": True}
VALUES = [
    {},
    {"intermediate_size": 80, "activation": "geglu"},
    RECOMPUTE,
    RECOMPUTE | {"gpt_j_residual": False},
    RECOMPUTE | {"hidden_dropout": 0.1},
    RECOMPUTE | {"checkpoint_num_layers": 2},
    RECOMPUTE | {"checkpoint_num_layers": 3},
    RECOMPUTE | ARCHITECTURES["llama"],
]
CASES: list[Case] = [
    *((Topology(), BF16 | values) for values in VALUES),
    *((Topology(tp=2), BF16 | values) for values in (RECOMPUTE, RECOMPUTE | SPLIT)),
]


@pytest.mark.parametrize("size", [1, 2])
def test_products_are_counted(world: World, size: int) -> None:
    cases = [case for case in CASES if case[0].world_size == size]
    by_rank = world.run(size, products_by_ranks, cases, timeout=300.0)
    for (topology, values), *ranks in zip(cases, *by_rank, strict=True):
        config = configuration(topology, values)
        with planned_world():
            (stage,) = work(PlannedModel(config, VOCAB)).stages
        planned = stage.forward_flops + stage.backward_flops + stage.recompute_flops
        # torch counts attention's products elsewhere: forward, twice backward, and again.
        width = config.num_attention_heads // topology.tp * config.head_dim
        batch, length = config.train_micro_batch_size_per_gpu, config.seq_length
        scores = 4 * batch * length * length * width * config.num_layers
        planned -= scores * (4 if config.checkpoint_activations else 3)
        assert set(ranks) == {planned}, f"{topology} {values}"
