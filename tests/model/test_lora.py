"""Adapters and 8-bit weights compute what dense weights made of them do, cut or whole."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from neox.config import NeoXConfig
from neox.engine.saved_state import in_memory
from neox.model.frozen import Frozen, configured_specs, is_matrix
from neox.model.gpt import Layer, LocalLayers, build_layers, layers
from neox.model.lora import start
from neox.model.projection import weight_of
from neox.model.quantized import EightBit, cut, quantize
from neox.model.shard import shard
from neox.parallel.groups import ProcessGroups, initialize
from neox.parallel.region import TensorParallelRegion
from neox.parallel.topology import Topology
from tests.models import ARCHITECTURES, VOCAB, config_of, forward, random_weights, tokens
from tests.world import World

ALL = ["all-linear", "final_linear"]
NAMES = ["neox", "gpt_j", "sequential", "llama", "grouped_queries", "geglu", "learned"]


def frozen_config(name: str, tp: int = 1, eight_bit: bool = True, **more: Any) -> NeoXConfig:
    lora = {"rank": 3, "alpha": 5.0, "targets": ALL, "biases": True, "norms": True}
    return config_of(
        world_size=tp,
        **{**ARCHITECTURES[name], "model_parallel_size": tp, **more},
        lora=lora,
        load_in_8bit=eight_bit,
        load="somewhere",
    )


def adapted(config: NeoXConfig, groups: ProcessGroups) -> LocalLayers:
    """A model of random weights, adapters included, the same at every tp."""
    weights = random_weights(config)
    values = config.lora_values
    frozen = Frozen(
        torch.float32,
        groups,
        "8bit" if config.load_in_8bit else "dense",
        configured_specs(config),
        values["biases"],
        values["norms"],
    )
    region = TensorParallelRegion(groups, sequence_parallel=config.sequence_parallel)
    model = layers(config, VOCAB, torch.float32, groups, region=region, frozen=frozen)

    @torch.no_grad()
    def fill(module: nn.Module, layer: Layer) -> None:
        for name, layout in (layer.layout or {}).items():
            whole = weights[f"{layer.file_index}.{name}"]
            if config.load_in_8bit and is_matrix(layout):
                place = module.get_submodule(name)
                assert isinstance(place, EightBit)
                place.assign(cut(quantize(whole), layout, groups.tp_rank, groups.tp))
            else:
                module.get_parameter(name).copy_(shard(whole, layout, groups.tp_rank, groups.tp))
        for name, layout in layer.adapters.items():
            generator = torch.Generator().manual_seed(layer.index * 100 + len(name))
            whole = torch.randn(layout.shape, generator=generator) * 0.2
            module.get_parameter(name).copy_(shard(whole, layout, groups.tp_rank, groups.tp))

    return build_layers(model, fill)


def dense(config: NeoXConfig) -> LocalLayers:
    """The same model with its 8-bit weights and adapters multiplied out, all of it trained."""
    local = adapted(config, ProcessGroups.single())
    for _, module in local:
        if isinstance(module, nn.Module):
            for owner in list(module.modules()):
                if len(getattr(owner, "weight", torch.empty(0)).shape) != 2:
                    continue
                weight = weight_of(owner)
                whole = weight.dequantize() if isinstance(weight, EightBit) else weight.detach()
                if (adapter := getattr(owner, "adapter", None)) is not None:
                    whole = whole + adapter.scaling * adapter.lora_B @ adapter.lora_A
                    del owner.adapter
                del owner.weight
                owner.weight = nn.Parameter(whole.detach().clone())
    return local


def loss_of(local: LocalLayers) -> Tensor:
    data = tokens(length=17)
    mask = torch.ones(2, 16)
    mask[0, 5:9] = 0
    *before, (head, projection) = local
    return head(projection, forward(before, data[:, :-1]), data[:, 1:], mask)


def trained(local: LocalLayers) -> dict[str, nn.Parameter]:
    return {
        f"{layer.index}.{name}": parameter
        for layer, module in local
        if layer.has_file
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("eight_bit", [False, True], ids=["plain", "8bit"])
def test_the_loss_and_its_gradients_are_the_dense_models(name: str, eight_bit: bool) -> None:
    config = frozen_config(name, eight_bit=eight_bit)
    local, reference = adapted(config, ProcessGroups.single()), dense(config)
    assert_close(forward(local, tokens()), forward(reference, tokens()), rtol=1e-5, atol=1e-5)
    loss, expected = loss_of(local), loss_of(reference)
    loss.backward()
    expected.backward()
    assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    found, whole = trained(local), trained(reference)
    assert any(key.endswith("lora_A") for key in found)
    for key, parameter in found.items():
        assert parameter.grad is not None, key
        if ".adapter." not in key:
            assert_close(parameter.grad, whole[key].grad, rtol=1e-4, atol=1e-6)
            continue
        # d(s B A) = s dB A + s B dA, and the dense weight's gradient G is of all of it.
        owner = key.partition(".adapter.")[0]
        grad = whole[f"{owner}.weight"].grad
        a, b = found[f"{owner}.adapter.lora_A"], found[f"{owner}.adapter.lora_B"]
        scaling = 5.0 / 3
        expected_grad = scaling * (b.t() @ grad if key.endswith("lora_A") else grad @ a.t())
        assert_close(parameter.grad, expected_grad, rtol=1e-3, atol=1e-5)


def test_only_what_is_asked_for_is_trained() -> None:
    config = config_of()
    frozen = Frozen(torch.float32, ProcessGroups.single(), specs={})
    for layer in layers(config, VOCAB, torch.float32, ProcessGroups.single(), frozen=frozen):
        assert layer.trained == {}
        if layer.has_parameters:
            assert not any(parameter.requires_grad for parameter in layer.build().parameters())


def compare_with_unsharded(rank: int, names: list[str]) -> None:
    groups = initialize(Topology(tp=2), "gloo", torch.device("cpu"))
    for name, sequence_parallel in itertools.product(names, (False, True)):
        config = frozen_config(name, tp=2, sequence_parallel=sequence_parallel)
        local = adapted(config, groups)
        whole = adapted(frozen_config(name), ProcessGroups.single())
        loss, expected = loss_of(local), loss_of(whole)
        loss.backward()
        expected.backward()
        assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        layouts = {
            f"{layer.index}.{name}": layout
            for layer, _ in whole
            for name, layout in layer.trained.items()
        }
        references = trained(whole)
        for key, parameter in trained(local).items():
            layout = layouts[key]
            mine = shard(references[key].grad, in_memory(layout), groups.tp_rank, 2)
            tell = f"{name}, {key}"
            assert_close(parameter.grad, mine, rtol=1e-4, atol=1e-6, msg=tell)


def test_sharded_equals_unsharded(world: World) -> None:
    world.run(2, compare_with_unsharded, NAMES)


def begin(rank: int) -> dict[str, Tensor]:
    groups = initialize(Topology(tp=2), "gloo", torch.device("cpu"))
    return started(groups)


def started(groups: ProcessGroups) -> dict[str, Tensor]:
    config = frozen_config("neox", tp=groups.tp)
    local = adapted(config, groups)
    found = {}
    for layer, module in local:
        if layer.has_parameters:
            start(module, layer.adapters, layer.index, 7, groups)
            for name, layout in layer.adapters.items():
                found[f"{layer.index}.{name}"] = (layout, module.get_parameter(name).detach())
    return found


def test_adapters_start_as_no_change_and_alike_at_every_tp(world: World) -> None:
    whole = started(ProcessGroups.single())
    ranks = world.run(2, begin)
    for key, (layout, tensor) in whole.items():
        if key.endswith("lora_B"):
            assert not tensor.any()
        else:
            bound = tensor.shape[1] ** -0.5
            assert 0.8 * bound < tensor.abs().max() <= bound
        for rank in range(2):
            assert torch.equal(ranks[rank][key][1], shard(tensor, layout, rank, 2))
