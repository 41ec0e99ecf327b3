"""What generating takes of a rank: weights as they are held for it, and keys and values."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from neox.inference.cache import KVCache
from neox.model.four_bit import FourBit
from neox.model.frozen import Frozen, Storage
from neox.model.gpt import layers, torch_dtype
from neox.model.packed import GROUP, Packed
from neox.plan.stages import PlannedModel, fill_eight_bits


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


def computed_dtype(model: PlannedModel) -> torch.dtype:
    """As neox.inference.load has it: quantized weights are multiplied in float32 on a CPU."""
    quantized = model.config.quantize != "none"
    return torch.float32 if quantized and model.on_cpu else torch_dtype(model.config.dtype)


def weight_bytes(model: PlannedModel, stage: range) -> int:
    """The real layers with the places that their weights have for inference."""
    config, dtype = model.config, computed_dtype(model)
    storage: Storage = "dense"
    if config.load_in_8bit:
        storage = "8bit"
    elif config.quantize != "none":
        storage = config.quantize
    elif model.on_cpu and dtype is torch.float32:
        storage = "packed"
    device = torch.device("cpu" if model.on_cpu else "cuda")
    groups = dataclasses.replace(model.groups, device=device)
    frozen = Frozen(dtype, groups, storage)
    total = 0
    seen: dict[object, int] = {}
    tied: set[str] = set()
    for layer in layers(config, model.rows, dtype, groups, frozen=frozen)[stage.start : stage.stop]:
        if not layer.has_parameters or layer.tied in tied:
            continue
        tied |= {layer.tied} if layer.tied else set()
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
            dtype=computed_dtype(model),
            device="cpu" if model.on_cpu else "cuda",
        )
    return cache.keys_LRKTD.nbytes + cache.values_LRKTD.nbytes
