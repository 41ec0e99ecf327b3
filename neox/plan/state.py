"""Weights, gradients and optimizer state of a rank: the real layers' shapes, cut as ZeRO cuts them.

What DeepSpeed's optimizers hold (stage_1_and_2.py, bf16_optimizer.py, stage3.py of 0.19): the
weights of an optimizer group lie in one vector, filled up to a multiple of 2 x dp, of which each
replica owns 1/dp: its float32 master and its state. tests/plan compares every number with real
ranks, byte for byte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from neox.config import NeoXConfig
from neox.engine.optimizers import build_optimizer, parameter_groups
from neox.model.gpt import torch_dtype

_ALIGNMENT = 2  # DeepSpeed's nccl_start_alignment_factor
_DEFAULT_BUCKET = 500_000_000  # elements: its reduce_bucket_size


_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Held:
    """Bytes that a rank holds from the end of the backward pass to the optimizer's step."""

    weights: int
    gradients: int
    optimizer: int  # masters and state
    host: int = 0  # of what is offloaded: in the CPU's memory
    bucket: int = 0  # in which gradients are reduced
    step: int = 0  # that the step needs for itself


def zero_setting(config: NeoXConfig, name: str, default: int | bool) -> int | bool:
    value = (config.zero_optimization or {}).get(name)
    return default if value is None else value


def offloads(config: NeoXConfig, what: str) -> bool:
    block = (config.zero_optimization or {}).get(what) or {}
    return bool(block.get("device", "none") != "none")


def accumulation_dtype(config: NeoXConfig) -> torch.dtype:
    """The type in which micro-batches' gradients are summed: see neox.config.deepspeed."""
    given = (config.data_types or {}).get("grad_accum_dtype")
    if given is not None:
        return _DTYPES[given]
    return torch.float32 if config.dtype == "bfloat16" else torch_dtype(config.dtype)


def communication_dtype(config: NeoXConfig) -> torch.dtype:
    """The type in which gradients travel between replicas."""
    name = "fp32" if config.fp32_allreduce else None
    name = config.communication_data_type or name
    if name is None:
        return torch_dtype(config.dtype)
    return _DTYPES[name]


def has_bfloat16_optimizer(config: NeoXConfig) -> bool:
    """Whether DeepSpeed trains with its BF16_Optimizer, and not with ZeRO's."""
    return (
        config.dtype == "bfloat16"
        and config.engine_zero_stage == 1
        and accumulation_dtype(config) == torch.float32
        and not offloads(config, "offload_optimizer")
    )


def group_numels(config: NeoXConfig, trained: Sequence[nn.Parameter]) -> list[list[int]]:
    """Elements of the trained weights, by optimizer group."""
    return [
        [p.numel() for p in group["params"]]  # type: ignore[attr-defined]
        for group in parameter_groups(trained, config.weight_decay)
    ]


def flat_size(numels: Sequence[int], config: NeoXConfig, size: int) -> int:
    """Elements of the vector of one optimizer group; `size` is an element's bytes."""
    aligned, total = 1, 0
    if zero_setting(config, "parameter_alignment", False) and not has_bfloat16_optimizer(config):
        aligned = 16 // math.gcd(16, size)
    for place, numel in enumerate(numels):
        total += numel
        total += -total % aligned if place < len(numels) - 1 else 0
    return total + -total % (_ALIGNMENT * config.dp)


def held(
    config: NeoXConfig,
    parameters: Sequence[nn.Parameter],
    reached: Sequence[nn.Parameter],
    frozen_bytes: int,
    dp_rank: int | None = None,
    *,
    on_cpu: bool = True,
) -> Held:
    """Of a rank with these parameters, and `frozen_bytes` of weights in other forms.

    Gradients are of those that are `reached`: see PlannedModel.
    Without `dp_rank`, of the replica that has most: with ZeRO 2 they differ.
    """
    size = torch_dtype(config.dtype).itemsize
    trained = [p for p in parameters if p.requires_grad]
    rest = frozen_bytes + sum(p.nbytes for p in parameters if not p.requires_grad)
    own = sum(p.nbytes for p in trained)
    own_gradients = sum(p.nbytes for p in reached)
    stage = config.engine_zero_stage
    if stage == 0:
        # Without a gradient a weight has no state; but replicas reduce zeros where one is missing.
        stepped = reached if config.dp == 1 else trained
        state = state_bytes(config, [p.numel() for p in stepped], torch.float32)
        copied = min(own, _DEFAULT_BUCKET * size) if config.dp > 1 else 0
        return Held(rest + own, own_gradients, state, step=copied)
    groups = group_numels(config, trained)
    if stage == 3:
        return _sharded(config, groups, rest, size, on_cpu)
    flat = [flat_size(group, config, size) for group in groups]
    parts = [numel // config.dp for numel in flat]
    masters = 4 * sum(parts) + state_bytes(config, parts, torch.float32)
    weights = rest + size * sum(flat)
    accumulated = accumulation_dtype(config).itemsize
    if has_bfloat16_optimizer(config):
        # Sums in float32, and a micro-batch's own gradients until they are added to them.
        return Held(weights, 4 * sum(flat) + own_gradients, masters)
    whole = sum(p.numel() for p in trained)
    if stage == 2:
        gradients, step = accumulated * sum(parts), 4 * max(parts)
        if accumulated == size:
            ranks = range(config.dp) if dp_rank is None else [dp_rank]
            gradients = size * max(_owned_whole(groups, parts, rank) for rank in ranks)
    else:
        gradients = accumulated * sum(p.numel() for p in reached)
        step = accumulated * sum(parts) + 4 * max(parts)
    bucket = _bucket(config, whole, size if stage == 2 else accumulated, on_cpu)
    if offloads(config, "offload_optimizer"):
        largest = max(p.numel() for p in trained)
        host = masters + (4 + size) * sum(parts) + size * largest
        if stage == 2 and accumulated == size and config.gradient_accumulation_steps > 1:
            host += gradients  # sums of micro-batches, which come back for each
        return Held(weights, gradients, 0, host, bucket, size * largest)
    return Held(weights, gradients, masters, 0, bucket, step)


def _owned_whole(groups: Sequence[Sequence[int]], parts: Sequence[int], dp_rank: int) -> int:
    """Elements of the gradients of which a replica owns a part, which are kept whole, and padding.

    So it is where gradients are summed in the type that they have.
    """
    total = 0
    for numels, part in zip(groups, parts, strict=True):
        start, stop = part * dp_rank, part * (dp_rank + 1)
        at = 0
        for numel in numels:
            total += numel if at < stop and at + numel > start else 0
            at += numel
        total += max(0, stop - max(at, start))
    return total


def _sharded(
    config: NeoXConfig, groups: Sequence[Sequence[int]], rest: int, size: int, on_cpu: bool
) -> Held:
    """ZeRO 3: each weight is cut for itself, and filled up to a multiple of dp."""
    numels = [numel for group in groups for numel in group]
    parts = [sum(-(-numel // config.dp) for numel in group) for group in groups]
    # Those that stay whole.
    limit = zero_setting(config, "stage3_param_persistence_threshold", 100_000)
    whole = size * sum(numel for numel in numels if numel <= limit) if config.dp > 1 else 0
    state = 4 * sum(parts) + state_bytes(config, parts, torch.float32)
    accumulated = accumulation_dtype(config).itemsize
    gradients = accumulated * sum(parts)
    weights = size * sum(parts)
    bucket = _bucket(config, sum(numels), size, on_cpu)
    moved = weights if offloads(config, "offload_param") else 0
    on_device = rest + whole + weights - moved
    if offloads(config, "offload_optimizer"):  # gradients too, once more in float32 for the step
        host = moved + state + gradients + 4 * sum(parts)
        return Held(on_device, 0, 0, host, bucket)
    # A group's gradients joined, and that in float32.
    largest = min(max(parts), int(zero_setting(config, "sub_group_size", 10**9)))
    step = largest * (4 + (accumulated if accumulated < 4 else 0))
    return Held(on_device, gradients, state, moved, bucket, step)


def gathered_bytes(config: NeoXConfig, trained: Sequence[nn.Parameter]) -> int:
    """Of the weights that ZeRO 3 has whole at the fullest moment: an upper bound.

    DeepSpeed keeps as many as stage3_max_live_parameters, beside the small ones that stay.
    """
    if config.engine_zero_stage != 3 or config.dp == 1:
        return 0
    limit = zero_setting(config, "stage3_param_persistence_threshold", 100_000)
    live = int(zero_setting(config, "stage3_max_live_parameters", 10**9))
    numel = sum(p.numel() for p in trained if p.numel() > limit)
    return torch_dtype(config.dtype).itemsize * min(numel, live)


def _bucket(config: NeoXConfig, numel: int, size: int, on_cpu: bool) -> int:
    """The buffers in which ZeRO 1 and 2 reduce: of the size asked for, whatever there is for them.

    On a CPU, the system gives memory for what is written only.
    """
    if not zero_setting(config, "contiguous_gradients", True):
        return 0
    twice = zero_setting(config, "overlap_comm", False) and not config.is_pipe_parallel
    asked = int(zero_setting(config, "reduce_bucket_size", _DEFAULT_BUCKET))
    return size * (min(asked, numel) if on_cpu else asked) * (2 if twice else 1)


def state_bytes(config: NeoXConfig, numels: Sequence[int], dtype: torch.dtype) -> int:
    """Of the configured optimizer's own state for vectors of these sizes, after a step."""
    settings = repr(sorted(config.optimizer_params.items()))
    optimizer = (config.optimizer_type, config.use_bnb_optimizer, settings)
    shared, total = 0, 0
    for numel in numels:
        key = (*optimizer, numel, dtype)
        if key not in _STEPPED:
            one, two = (_state_of(config, [numel] * count, dtype) for count in (1, 2))
            _STEPPED[key] = two - one, 2 * one - two  # the second: tables that all vectors use
        own, tables = _STEPPED[key]
        total += own
        shared = max(shared, tables)
    return total + shared


_STEPPED: dict[tuple[Any, ...], tuple[int, int]] = {}


def _state_of(config: NeoXConfig, numels: Sequence[int], dtype: torch.dtype) -> int:
    """By a step of the real optimizer with tensors without contents."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)  # a library has tables of its own
    with fake:
        waiting = [nn.Parameter(torch.empty(numel, dtype=dtype)) for numel in numels]
    optimizer = build_optimizer(config, waiting)
    with fake:
        for parameter in waiting:
            parameter.grad = torch.empty_like(parameter)
        while waiting:
            try:
                optimizer.step()
                break
            except DataDependentOutputException:  # it looks at a number, once its state is made
                left = [parameter for parameter in waiting if not optimizer.state.get(parameter)]
                assert len(left) < len(waiting), "no state was made"
                for parameter in set(waiting) - set(left):
                    parameter.grad = None
                waiting = left
        storages = {
            value.untyped_storage()._cdata: value.untyped_storage().nbytes()
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        }
    return sum(storages.values())
