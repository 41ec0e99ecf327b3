"""Initial weights: one model at every tp, with the spread each rule promises."""

from __future__ import annotations

import math

import pytest
import torch

from neox.model.init import initialize
from neox.model.shard import shard
from neox.parallel.groups import ProcessGroups
from neox.parallel.topology import Topology
from tests.models import config_of, model_layers

SPREADS = {
    "normal": 0.02,
    "scaled_normal": 0.02 / math.sqrt(2 * 4),
    "single_residual_scaled_normal": 0.02 / math.sqrt(4),
    "wang_init": 2 / 4 / math.sqrt(128),
    "small_init": math.sqrt(2 / (5 * 128)),
    "xavier_normal": math.sqrt(2 / (128 + 512)),
    "xavier_uniform": math.sqrt(2 / (128 + 512)),
    "orthogonal": 1 / math.sqrt(512),
    "scaled_orthogonal": 1 / math.sqrt(2 * 4) / math.sqrt(512),
}


@pytest.mark.parametrize("rule", SPREADS)
def test_spread(rule: str) -> None:
    config = config_of(
        num_layers=4, hidden_size=128, init_method=rule, output_layer_init_method=rule
    )
    layer = model_layers(config, ProcessGroups.single())[2]
    module = layer.build()
    initialize(module, layer, config, 1, ProcessGroups.single())
    for linear in (module.mlp.linear1, module.mlp.linear2):  # 128 x 512 and its transpose
        assert linear.weight.std().item() == pytest.approx(SPREADS[rule], rel=0.02)
        assert abs(linear.weight.mean().item()) < SPREADS[rule] / 50
        assert linear.bias.abs().max() == 0
    assert torch.equal(module.input_layernorm.weight, torch.ones(128))


def test_every_tensor_has_its_own_stream_and_every_seed_its_own_model() -> None:
    config = config_of()
    single = ProcessGroups.single()
    first, second = model_layers(config, single)[2:4]

    def weights(layer, seed):
        module = layer.build()
        initialize(module, layer, config, seed, single)
        return module.mlp.linear1.weight.detach(), module.attention.query_key_value.weight.detach()

    a, b = weights(first, 1)
    assert torch.equal(a, weights(first, 1)[0])
    assert not torch.equal(a, weights(first, 2)[0])
    assert not torch.equal(a, weights(second, 1)[0])
    assert not torch.equal(a.flatten()[: b.numel()], b.flatten()[: a.numel()])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_draws_its_shard_of_the_same_model(rank: int) -> None:
    config = config_of(num_kv_heads=2, world_size=2, model_parallel_size=2)
    whole_layer = model_layers(config, ProcessGroups.single())[2]
    whole = whole_layer.build()
    initialize(whole, whole_layer, config, 1, ProcessGroups.single())

    # Only the place in the grid matters to `initialize`: no communication is needed.
    groups = ProcessGroups(Topology(tp=2), rank, torch.device("cpu"))
    local = torch.nn.ParameterDict(
        {
            name.replace(".", "/"): torch.empty(layout.shard_shape(2))
            for name, layout in whole_layer.layout.items()
        }
    )
    named = [(name.replace("/", "."), parameter) for name, parameter in local.items()]
    local.named_parameters = lambda: iter(named)
    initialize(local, whole_layer, config, 1, groups)
    for name, parameter in named:
        expected = shard(whole.get_parameter(name), whole_layer.layout[name], rank, 2)
        assert torch.equal(parameter, expected), name
