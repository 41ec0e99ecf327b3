"""What real ranks hold, keep and send: the numbers that a plan has to meet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from neox.checkpoint.neox import Checkpoint
from neox.config import NeoXConfig
from neox.engine.build import build_engine
from neox.engine.recompute import Recompute
from neox.parallel.groups import ProcessGroups, initialize
from neox.parallel.topology import Topology
from tests.engine.test_grids import OPTIMIZER, Values, batches
from tests.models import VOCAB, config_of
from tests.world import forget_groups

Case = tuple[Topology, Values]


def configuration(topology: Topology, values: Values) -> NeoXConfig:
    return config_of(
        world_size=topology.world_size,
        model_parallel_size=topology.tp,
        train_micro_batch_size_per_gpu=4 // topology.dp,
        **{"pipe_parallel_size": topology.pp, "optimizer": OPTIMIZER, **values},
    )


class HeldBytes(NamedTuple):
    """Of one rank, at the fullest moment between the backward pass and the optimizer's step."""

    weights: int
    gradients: int
    optimizer: int


def held_by_ranks(rank: int, cases: list[Case]) -> list[HeldBytes]:
    """Each case's bytes on this rank, counted tensor by tensor in its second step."""
    return [_held(*case) for case in cases]


def _held(topology: Topology, values: Values) -> HeldBytes:
    groups = initialize(topology, "gloo", torch.device("cpu"))
    config = configuration(topology, values)
    engine = _build(config, groups)
    source = batches(config, groups)
    engine.train_batch(source, 1, 0.01)  # makes the optimizer's state
    inner = engine.inner
    moments: list[int] = []

    def watched(name: str) -> None:
        function = getattr(inner, name, None)
        if function is not None:

            def looked(*args: Any, **kwargs: Any) -> Any:
                moments.append(_gradients(inner))
                return function(*args, **kwargs)

            setattr(inner, name, looked)

    # ZeRO 2 has the gradients of its own part, once they are all reduced; the others whole ones.
    if config.engine_zero_stage < 2:
        watched("allreduce_gradients")
        watched("_bf16_reduce_grads")
    else:
        watched("_take_model_step")
    engine.train_batch(source, 2, 0.01)
    parameters = list(inner.module.parameters())
    shards = [getattr(p, "ds_tensor", None) for p in parameters]  # of ZeRO 3
    weights = storages([*parameters, *shards, *inner.module.buffers()])
    optimizer = storages(_state(inner))
    outcome = HeldBytes(
        sum(weights.values()),
        max(moments),
        sum(size for at, size in optimizer.items() if at not in weights),
    )
    forget_groups()
    return outcome


def _build(config: NeoXConfig, groups: ProcessGroups) -> Any:
    """The engine, which has DeepSpeed's as `inner`; adapters' weights are of a checkpoint."""
    checkpoint = Checkpoint.open(Path(config.load)) if config.load else None
    return build_engine(config, groups, VOCAB, checkpoint)


def _model(config: NeoXConfig, groups: ProcessGroups) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The model in training, and a forward pass of a micro-batch through it."""
    model = _build(config, groups).inner.module.train()
    batch, length = config.train_micro_batch_size_per_gpu, config.seq_length
    tokens = torch.zeros(batch, length, dtype=torch.long)
    return model, lambda: model(tokens, tokens, torch.ones(batch, length))


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Bytes by address, each memory once."""
    found = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            memory = tensor.untyped_storage()
            found[memory.data_ptr()] = memory.nbytes()
    return found


def offloaded_by_ranks(rank: int, cases: list[Case]) -> list[int]:
    """Bytes that each case's offloaded optimizer and weights have in the CPU's memory, after a
    step. On a CPU the rest of the engine lies there, too, so they are counted by their names."""
    return [_offloaded(*case) for case in cases]


def _offloaded(topology: Topology, values: Values) -> int:
    groups = initialize(topology, "gloo", torch.device("cpu"))
    config = configuration(topology, values)
    engine = _build(config, groups)
    engine.train_batch(batches(config, groups), 1, 0.01)
    inner = engine.inner
    optimizer, state = inner.optimizer, _state(inner)
    found = state + [tensor.grad for tensor in state if tensor.is_leaf]
    found.append(getattr(optimizer, "grad_partitions_flat_buffer", None))
    found.append(getattr(optimizer, "temp_grad_buffer_for_cpu_offload", None))
    found += getattr(optimizer, "param_buffer_of_bit16_for_cpu_offload_groups", [])
    found += getattr(optimizer, "accumulated_grads_in_cpu", {}).values()
    found += getattr(optimizer, "param_groups_fp16_flat_cpu_memory", [])
    bytes_found = sum(storages(found).values())
    forget_groups()
    return bytes_found


def _state(inner: Any) -> list[Any]:
    """Master weights and state tensors."""
    optimizer = getattr(inner.optimizer, "optimizer", inner.optimizer)
    masters = [p for group in optimizer.param_groups for p in group["params"]]
    masters += getattr(inner.optimizer, "fp32_partitioned_groups_flat", [])
    return masters + [value for state in optimizer.state.values() for value in state.values()]


def _gradients(inner: Any) -> int:
    """Wherever the engine keeps them, but for the buckets they are reduced in."""
    optimizer = inner.optimizer
    parameters = list(inner.module.parameters())
    kept: list[Any] = [p.grad for p in parameters] + [
        getattr(p, "grad_accum", None) for p in parameters
    ]
    kept += getattr(optimizer, "fp32_groups_gradients_flat", [])
    kept.append(getattr(optimizer, "grad_partitions_flat_buffer", None))  # of ZeRO 3
    for tensors in (getattr(optimizer, "averaged_gradients", None) or {}).values():
        kept += tensors or []
    return sum(storages(kept).values())


def kept_by_ranks(rank: int, cases: list[Case]) -> list[int]:
    """Bytes that a forward pass of each case keeps for the backward pass, counted by torch's hooks.

    Of the real model without a pipeline. Each memory counts once, parameters do not.
    """
    return [_kept(*case) for case in cases]


def products_by_ranks(rank: int, cases: list[Case]) -> list[int]:
    """FLOPs of the matrix products of a micro-batch, both passes, as torch counts them."""
    return [_products(*case) for case in cases]


def _products(topology: Topology, values: Values) -> int:
    groups = initialize(topology, "gloo", torch.device("cpu"))
    config = configuration(topology, values)
    loss_of_a_micro_batch = _model(config, groups)[1]
    with FlopCounterMode(display=False) as counter:
        loss_of_a_micro_batch().backward()
    counts = counter.get_flop_counts()["Global"]
    forget_groups()
    return sum(counts.get(product, 0) for product in (torch.ops.aten.mm, torch.ops.aten.addmm))


def _kept(topology: Topology, values: Values) -> int:
    groups = initialize(topology, "gloo", torch.device("cpu"))
    config = configuration(topology, values)
    model, loss_of_a_micro_batch = _model(config, groups)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    keep = Recompute._keep

    def noted(self: Recompute, tensor: Tensor) -> Any:
        kept = keep(self, tensor)
        saved.append(kept[0])
        return kept

    with (
        mock.patch.object(Recompute, "_keep", noted),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        loss = loss_of_a_micro_batch()
    own = storages(model.parameters())
    kept = sum(size for at, size in storages(saved).items() if at not in own)
    del loss
    forget_groups()
    return kept
