"""Causal attention on a CPU for training in float32, by blocks of queries.

torch's flash kernel for the CPU multiplies small tiles. Here a block of queries meets all keys that
it may see in one batched product, at the rate of the linear layers, and keys beyond the block are
left out. At 512 positions it takes two thirds of the kernel's time, at 2048 as long.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

LONGEST = 1024  # positions from which torch's kernel is as fast, and takes less memory
_BLOCK = 64  # queries at a time: half of a diagonal block's work is thrown away


def causal_attention(q_BNSD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, where a query sees its own and earlier positions: [B, N, S, D].

    Nothing of size S x S is kept: the backward pass computes the probabilities again.
    """
    return _CausalAttention.apply(q_BNSD, k_BNSD, v_BNSD)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BNSD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor) -> Tensor:
        ctx.heads, ctx.scale = q_BNSD.shape[:2], q_BNSD.shape[-1] ** -0.5
        # Z = B N: one batch dimension, and rows side by side.
        q, k, v = (x.flatten(0, 1).contiguous() for x in (q_BNSD, k_BNSD, v_BNSD))
        q = q * ctx.scale
        out_ZSD = torch.empty_like(q)
        for rows, seen in _blocks(q.shape[1]):
            out_ZSD[:, rows] = torch.bmm(_probabilities(q, k, rows, seen), v[:, seen])
        ctx.save_for_backward(q, k, v)
        return out_ZSD.unflatten(0, ctx.heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q, k, v = ctx.saved_tensors
        grad_ZSD = grads[0].flatten(0, 1).contiguous()
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, seen in _blocks(q.shape[1]):
            p, grad = _probabilities(q, k, rows, seen), grad_ZSD[:, rows]
            grad_v[:, seen].baddbmm_(p.mT, grad)
            grad_p = torch.bmm(grad, v[:, seen].mT)
            grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
            grad_q[:, rows] = torch.bmm(grad_scores, k[:, seen])
            grad_k[:, seen].baddbmm_(grad_scores.mT, q[:, rows])  # q holds the scale
        grad_q *= ctx.scale
        return tuple(grad.unflatten(0, ctx.heads) for grad in (grad_q, grad_k, grad_v))


def _blocks(length: int) -> Iterator[tuple[slice, slice]]:
    """(queries of a block, the keys that its last query sees)."""
    for start in range(0, length, _BLOCK):
        stop = min(start + _BLOCK, length)
        yield slice(start, stop), slice(stop)


def _probabilities(q_ZSD: Tensor, k_ZSD: Tensor, rows: slice, seen: slice) -> Tensor:
    """[Z, queries of the block, keys seen]; 0 where a key is yet to come."""
    scores = torch.bmm(q_ZSD[:, rows], k_ZSD[:, seen].mT)
    size = rows.stop - rows.start
    scores[:, :, rows] += torch.full((size, size), -torch.inf).triu(1)
    return torch.softmax(scores, dim=-1)
