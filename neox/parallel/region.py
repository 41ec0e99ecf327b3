"""The way into and out of what the ranks of a tp group compute each for itself.

Between transformer layers the activations are whole on every rank, or, with sequence parallelism
(arXiv:2205.05198), shards along the sequence: [S / tp, B, H]. A layer enters the region where each
rank has its own heads and its own part of the MLP, and leaves it with the sum over the ranks. An
all-reduce is a reduce-scatter and an all-gather, so both ways send the same number of bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from neox.parallel.groups import ProcessGroups
from neox.parallel.layers import reduce_from_tensor_parallel


class TensorParallelRegion:
    """Shared by the layers of a model. All methods are collective over the tp group."""

    def __init__(self, groups: ProcessGroups, *, sequence_parallel: bool = False) -> None:
        self.tp = groups.tp
        self.splits_sequence = sequence_parallel and groups.tp > 1
        self._groups = groups

    @contextlib.contextmanager
    def whole_sequences(self) -> Iterator[None]:
        """Keep activations whole meanwhile, as sequences of any length need."""
        before, self.splits_sequence = self.splits_sequence, False
        try:
            yield
        finally:
            self.splits_sequence = before

    def start(self, x_BSH: Tensor) -> Tensor:
        """The embedding's output, or every rank's summand of it, -> x_SBH or its shard."""
        x_SBH = x_BSH.transpose(0, 1).contiguous()
        return _ReduceScatter.apply(self._group, x_SBH) if self.splits_sequence else x_SBH

    def enter(self, x_SBH: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        """The whole x_SBH and the same parameters; gradients are summed over the ranks.

        What the ranks compute from them, each rank for itself, gives each a summand of their
        gradients. Those of the parameters travel in x's message, S*B*H numbers and theirs; with
        sequence parallelism, in one of their own.
        """
        if self.tp == 1:
            return x_SBH, *parameters
        return _Enter.apply(self._group, self.splits_sequence, x_SBH, *parameters)

    def leave(self, summand_SBH: Tensor) -> Tensor:
        """The sum of every rank's summand, or this rank's shard of it. The gradient is whole."""
        if self.splits_sequence:
            return _ReduceScatter.apply(self._group, summand_SBH)
        return reduce_from_tensor_parallel(summand_SBH, self._groups)

    def end(self, x_SBH: Tensor) -> Tensor:
        """The whole x_BSH on every rank, which all do the same with."""
        if self.splits_sequence:
            x_SBH = _Gather.apply(self._group, x_SBH)
        return x_SBH.transpose(0, 1).contiguous()

    def share(self, parameter: Tensor) -> Tensor:
        """This rank's summand, 1/tp, of a replica, where each rank finds the whole gradient."""
        return _Share.apply(self.tp, parameter) if self.tp > 1 else parameter

    @property
    def _group(self) -> dist.ProcessGroup:
        assert self._groups.tp_group is not None
        return self._groups.tp_group


def _gathered(shard: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's shard, joined along the first dimension."""
    whole = shard.new_empty(shard.shape[0] * group.size(), *shard.shape[1:])
    dist.all_gather_single(whole, shard.contiguous(), group=group)
    return whole


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, group: dist.ProcessGroup, splits: bool, x: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.group, ctx.splits = group, splits
        whole = _gathered(x, group) if splits else x.view_as(x)
        return whole, *(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, *riders = grads
        flat = [grad.reshape(-1) for grad in riders]
        if ctx.splits:
            shard = grad_x.new_empty(grad_x.shape[0] // ctx.group.size(), *grad_x.shape[1:])
            dist.reduce_scatter_single(shard, grad_x.contiguous(), group=ctx.group)
            # Not in that message: each rank's part is summed in an order of its own, and copies of
            # a parameter must stay equal to the last bit.
            if flat:
                summed = torch.cat(flat)
                dist.all_reduce(summed, group=ctx.group)
        else:
            whole = torch.cat([grad_x.reshape(-1), *flat])
            dist.all_reduce(whole, group=ctx.group)
            shard = whole[: grad_x.numel()].view_as(grad_x)
            # In memory of their own: parameters keep their gradients, and x's would stay with them.
            summed = whole[grad_x.numel() :].clone()
        pieces = summed.split([grad.numel() for grad in riders]) if riders else ()
        return (
            *(None, None, shard),
            *(piece.view_as(grad) for piece, grad in zip(pieces, riders, strict=True)),
        )


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, summand: Tensor) -> Tensor:
        ctx.group = group
        shard = summand.new_empty(summand.shape[0] // group.size(), *summand.shape[1:])
        dist.reduce_scatter_single(shard, summand.contiguous(), group=group)
        return shard

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, _gathered(grads[0], ctx.group)


class _Gather(torch.autograd.Function):
    """Every rank does the same with the result, so each has its shard's gradient already."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, shard: Tensor) -> Tensor:
        ctx.group = group
        return _gathered(shard, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0].chunk(ctx.group.size())[ctx.group.rank()].contiguous()


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tp: int, parameter: Tensor) -> Tensor:
        return parameter / tp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]
