"""What generating takes of a rank: weights as they are held for it, and keys and values."""

from __future__ import annotations

import dataclasses

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from neox.inference.cache import KVCache
from neox.inference.load import computed_dtype, storage
from neox.model.four_bit import FourBit
from neox.model.frozen import Frozen
from neox.model.gpt import layers
from neox.model.packed import GROUP, Packed
from neox.plan.stages import PlannedModel, fill_eight_bits, holders


@dataclasses.dataclass(frozen=True)
class Generation:
    """Bytes of a rank of one stage."""

    weights: int
    cache: int  # keys and values of one sequence of `seq_length` tokens


def generation(model: PlannedModel) -> list[Generation]:
    """By stage, on the grid of the configuration. Inside `planned_world`."""
    return [
        Generation(
            weight_bytes(model, stage),
            cache_bytes(model, stage, 1, model.config.seq_length),
        )
        for stage in model.stages()
    ]


def weight_bytes(model: PlannedModel, stage: range) -> int:
    """The real layers with the places that their weights have for inference."""
    config, device = model.config, model.device
    dtype = computed_dtype(config, device)
    groups = dataclasses.replace(model.groups, device=device)
    frozen = Frozen(dtype, groups, storage(config, device))
    total = 0
    seen: dict[object, int] = {}
    every = layers(config, model.rows, dtype, groups, frozen=frozen)
    for layer in holders(every, stage):
        if layer.kind not in seen:
            assert layer.layout is not None
            with FakeTensorMode():
                module = layer.build()
                fill_eight_bits(module, layer.layout)
                seen[layer.kind] = _held_by(module)
        total += seen[layer.kind]
    return total


def _held_by(module: nn.Module) -> int:
    total = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    for part in module.modules():
        if isinstance(part, Packed):
            rows, columns = part.padded
            total += rows * columns * part.bits // 8
            total += 2 * rows * columns // GROUP[part.bits] if part.bits < 32 else 0
        elif isinstance(part, FourBit):
            rows, columns = part.shape
            groups = -(-columns // 64)  # of elements that share a scale
            total += rows * groups * (64 // 2 + 4)
    return total


def cache_bytes(model: PlannedModel, stage: range, rows: int, length: int) -> int:
    """Keys and values of a stage's layers, for `rows` of `length` tokens."""
    config = model.config
    blocks = sum(model.is_block(layer) for layer in model.layers[stage.start : stage.stop])
    with FakeTensorMode():
        cache = KVCache(
            num_layers=blocks,
            rows=rows,
            kv_heads_local=config.kv_heads // config.tp,
            max_length=length,
            head_dim=config.head_dim,
            dtype=computed_dtype(config, model.device),
            device=model.device,
        )
    return cache.keys_LRKTD.nbytes + cache.values_LRKTD.nbytes
