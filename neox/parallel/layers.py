"""Linear and embedding layers that are plain torch at tp 1 and megatron-core's above it.

Column-parallel layers split their output features, row-parallel layers their input features
(Megatron-LM, arXiv:1909.08053). Parameters are allocated, not initialised: neox.model.init or a
checkpoint fills them. All have the parameter names of torch.nn: `weight` and `bias`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from neox.parallel.groups import ProcessGroups

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, by the fastest product that there is.

    torch multiplies float32 on a CPU by MKL, which does not use AMD's AVX-512: oneDNN, which torch
    has too, took 0.45 of its time with 256 rows and 0.4 to 0.9 with one.
    """
    if not (_ONEDNN and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Product.apply(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])
    return _onednn(x, weight, bias)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    """[T, K] -> [T, N]; oneDNN's operator has no gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight_NK: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TK, weight_NK)
        return _onednn(x_TK, weight_NK, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, weight_NK = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        grad_TN = grads[0]
        grad_NK = None
        if of_weight:
            # oneDNN's operator copies a first operand that is transposed: the narrower one.
            if weight_NK.shape[0] > weight_NK.shape[1]:
                grad_NK = _onednn(x_TK.t(), grad_TN.t()).t()
            else:
                grad_NK = _onednn(grad_TN.t(), x_TK.t())
        return (
            _onednn(grad_TN, weight_NK.t()) if of_x else None,
            grad_NK,
            grad_TN.sum(dim=0) if of_bias else None,
        )


class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Nothing: see the module's docstring."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Nothing: see the module's docstring."""


class PlannedEmbedding(Embedding):
    """A rank's rows of a table, for a plan: what megatron-core's layer keeps and sends."""

    groups: ProcessGroups

    def forward(self, tokens: Tensor, *, reduce: bool = True) -> Tensor:
        elsewhere = (tokens < 0) | (tokens >= self.num_embeddings)
        found = super().forward(tokens.masked_fill(elsewhere, 0))
        summand = found.masked_fill(elsewhere[..., None], 0.0)
        return reduce_from_tensor_parallel(summand, self.groups) if reduce else summand


def column_linear(
    in_size: int,
    out_size: int,
    bias: bool,
    dtype: torch.dtype,
    groups: ProcessGroups,
) -> nn.Module:
    """[..., in_size] -> [..., out_size / tp].

    At tp > 1 the gradient of the input is this rank's summand only: the caller reduces it
    (`copy_to_tensor_parallel`, neox.parallel.region).
    """
    if groups.tp == 1 or groups.planned:
        return Linear(in_size, out_size // groups.tp, bias, dtype=dtype)
    from neox.parallel import megatron

    assert groups.tp_group is not None
    return megatron.column_parallel_linear(in_size, out_size, bias, dtype, groups.tp_group)


def row_linear(
    in_size: int, out_size: int, bias: bool, dtype: torch.dtype, groups: ProcessGroups
) -> nn.Module:
    """The weight [out_size, in_size / tp] and bias of a product that the caller sums over ranks."""
    if groups.tp == 1 or groups.planned:
        return Linear(in_size // groups.tp, out_size, bias, dtype=dtype)
    from neox.parallel import megatron

    assert groups.tp_group is not None
    return megatron.row_parallel_linear(in_size, out_size, bias, dtype, groups.tp_group)


def vocab_embedding(
    vocab_size: int, hidden_size: int, dtype: torch.dtype, groups: ProcessGroups
) -> nn.Module:
    """Token ids [...] -> [..., hidden_size]; the table's rows are split over the ranks."""
    if groups.tp == 1:
        return Embedding(vocab_size, hidden_size, dtype=dtype)
    if groups.planned:
        table = PlannedEmbedding(vocab_size // groups.tp, hidden_size, dtype=dtype)
        table.groups = groups
        return table
    from neox.parallel import megatron

    assert groups.tp_group is not None
    return megatron.vocab_parallel_embedding(vocab_size, hidden_size, dtype, groups.tp_group)


def reduce_from_tensor_parallel(x: Tensor, groups: ProcessGroups) -> Tensor:
    """Sum of every rank's x; its gradient passes through. One all-reduce forward, none backward."""
    return x if groups.tp == 1 else _SumOverTensorParallel.apply(groups.tp_group, x)


def gather_from_tensor_parallel(x: Tensor, groups: ProcessGroups) -> Tensor:
    """Join the ranks' shards along the last dimension, on every rank. Has no gradient."""
    if groups.tp == 1:
        return x
    shards = [torch.empty_like(x) for _ in range(groups.tp)]
    dist.all_gather(shards, x.contiguous(), group=groups.tp_group)
    return torch.cat(shards, dim=-1)


def copy_to_tensor_parallel(x: Tensor, groups: ProcessGroups) -> Tensor:
    """The same tensor; its gradient is summed over the ranks. One all-reduce backward."""
    return x if groups.tp == 1 else _CopyToTensorParallel.apply(groups.tp_group, x)


class _SumOverTensorParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, x: Tensor) -> Tensor:
        x = x.contiguous()
        dist.all_reduce(x, group=group)  # in place: a summand is of no further use
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]


class _CopyToTensorParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, x: Tensor) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        # Of its own: another function may hold the gradient that came.
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return None, grad
