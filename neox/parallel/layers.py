"""Linear and embedding layers that are plain torch at tp 1 and megatron-core's above it.

Column-parallel layers split their output features, row-parallel layers their input features
(Megatron-LM, arXiv:1909.08053). Parameters are allocated, not initialised: neox.model.init or a
checkpoint fills them. All have the parameter names of torch.nn: `weight` and `bias`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neox.parallel.groups import ProcessGroups


class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Nothing: see the module's docstring."""


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Nothing: see the module's docstring."""


def column_linear(
    in_size: int,
    out_size: int,
    bias: bool,
    dtype: torch.dtype,
    groups: ProcessGroups,
    *,
    reduce_input_grad: bool = True,
) -> nn.Module:
    """[..., in_size] -> [..., out_size / tp].

    With reduce_input_grad=False the gradient of the input is this rank's summand only, and the
    caller reduces it (`copy_to_tensor_parallel`).
    """
    if groups.tp == 1:
        return Linear(in_size, out_size, bias, dtype=dtype)
    from neox.parallel import megatron

    assert groups.tp_group is not None
    return megatron.column_parallel_linear(
        in_size, out_size, bias, dtype, groups.tp_group, reduce_input_grad
    )


def row_linear(
    in_size: int, out_size: int, bias: bool, dtype: torch.dtype, groups: ProcessGroups
) -> nn.Module:
    """[..., in_size / tp] -> [..., out_size], summed over the ranks, then the bias."""
    if groups.tp == 1:
        return Linear(in_size, out_size, bias, dtype=dtype)
    from neox.parallel import megatron

    assert groups.tp_group is not None
    return megatron.row_parallel_linear(in_size, out_size, bias, dtype, groups.tp_group)


def vocab_embedding(
    vocab_size: int, hidden_size: int, dtype: torch.dtype, groups: ProcessGroups
) -> nn.Module:
    """Token ids [...] -> [..., hidden_size]; the table's rows are split over the ranks."""
    if groups.tp == 1:
        return Embedding(vocab_size, hidden_size, dtype=dtype)
    from neox.parallel import megatron

    assert groups.tp_group is not None
    return megatron.vocab_parallel_embedding(vocab_size, hidden_size, dtype, groups.tp_group)


def reduce_from_tensor_parallel(x: Tensor, groups: ProcessGroups) -> Tensor:
    """Sum of every rank's x; its gradient passes through. One all-reduce forward, none backward."""
    if groups.tp == 1:
        return x
    from neox.parallel import megatron

    assert groups.tp_group is not None
    return megatron.reduce(x, groups.tp_group)


def gather_from_tensor_parallel(x: Tensor, groups: ProcessGroups) -> Tensor:
    """Join the ranks' shards along the last dimension, on every rank. Has no gradient."""
    if groups.tp == 1:
        return x
    shards = [torch.empty_like(x) for _ in range(groups.tp)]
    dist.all_gather(shards, x.contiguous(), group=groups.tp_group)
    return torch.cat(shards, dim=-1)


def copy_to_tensor_parallel(
    tensors: tuple[Tensor, ...], groups: ProcessGroups
) -> tuple[Tensor, ...]:
    """The same tensors; their gradients are summed over the ranks in ONE all-reduce.

    A parallel-residual block feeds its input through two norms into two column-parallel layers.
    Summing the gradient of each layer's input would cost two all-reduces; summing once before the
    norms leaves the norms' own gradients as summands too. So the block's input and its norms'
    parameters pass through here together, and its row-parallel biases: S*B*H + 6H numbers in one
    message.
    """
    if groups.tp == 1:
        return tensors
    return _CopyToTensorParallel.apply(groups.tp_group, *tensors)


class _CopyToTensorParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat, group=ctx.group)
        pieces = flat.split([grad.numel() for grad in grads])
        return (None, *(piece.view_as(grad) for piece, grad in zip(pieces, grads, strict=True)))
