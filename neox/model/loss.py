"""Next-token cross-entropy, computed together with the output projection.

The logits of a batch are its largest tensor: 2048 tokens of a vocabulary of 50,000 are 400 MB in
float32, and the textbook way holds several such. Here they exist for some positions at a time, and
their gradient goes into the projection's at once: the products are the same, each computed once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from neox.parallel.groups import ProcessGroups
from neox.parallel.layers import linear

# Logits held at a time. Fewer would make the products with the projection's weight less efficient.
CHUNK_BYTES = 128 << 20

_GRADIENT_ROWS = 8192  # of the projection's gradient, for which there is memory twice
_SOFTMAX_LOGITS = 1 << 20  # of scores, at a time

# A probability divided by the number of tokens is below what float16 can tell from zero, and the
# engine's loss scale is known in the backward pass only. So until then gradients are those of the
# sum over the tokens, or, where there are more, of this many times the mean: the projection's,
# itself a sum over them, then stays below this times the largest activation.
_LARGEST_SCALE = 4096.0


def output_loss(
    x_BSH: Tensor,
    weight_VH: Tensor,
    labels_BS: Tensor,
    loss_mask_BS: Tensor,
    groups: ProcessGroups,
    bias_V: Tensor | None = None,
) -> Tensor:
    """Mean loss of the tokens that `loss_mask_BS` (float32, 0 or 1) selects: a float32 scalar.

    `weight_VH` and `bias_V` are this rank's slice of the output projection over the padded
    vocabulary; padding rows take part in the softmax, as upstream's do. A micro-batch with nothing
    selected has loss 0, not NaN. The softmax is float32 whatever the weights are. At tp > 1 the
    gradient of x is this rank's summand: the caller sums it. Collective over the tp group.
    """
    mask = loss_mask_BS.flatten().float()
    count = mask.sum().clamp(min=1.0)
    shares = mask / count  # of each token in the mean
    scale = None
    if torch.is_grad_enabled():
        small = weight_VH.dtype == torch.float16
        scale = count.clamp(max=_LARGEST_SCALE) if small else torch.ones_like(count)
    return _OutputLoss.apply(
        x_BSH.flatten(0, 1), weight_VH, bias_V, labels_BS.flatten(), shares, groups, scale
    )


def chunks(tokens: int, local_vocab: int) -> int:
    """In how many pieces the positions of a micro-batch are taken: messages per loss at tp > 1."""
    return -(-tokens * local_vocab * 4 // CHUNK_BYTES)


class _OutputLoss(torch.autograd.Function):
    """Gradients are found in the forward pass, while the logits are there."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        labels_T: Tensor,
        shares_T: Tensor,
        groups: ProcessGroups,
        grad_scale: Tensor | None,
    ) -> Tensor:
        loss = shares_T.new_zeros(())
        pieces = chunks(len(x_TH), len(weight_VH))
        size = -(-len(x_TH) // pieces)
        grad_x, grad_weight, grad_bias = None, None, None
        if grad_scale is not None:
            grad_x = torch.empty_like(x_TH)
            # Sums over the chunks keep float32 where the weights are of 16 bits.
            grad_weight = torch.empty_like(weight_VH, dtype=torch.float32)
            if bias_V is not None:
                grad_bias = torch.zeros_like(bias_V, dtype=torch.float32)
        first_row = groups.tp_rank * len(weight_VH)
        for start in range(0, len(x_TH), size):
            part = slice(start, start + size)
            x, labels, shares = x_TH[part], labels_T[part, None] - first_row, shares_T[part]
            logits = linear(x, weight_VH, bias_V).float()
            losses, scale = _softmax_parts(logits, labels, groups)
            loss += torch.dot(losses, shares)
            if grad_scale is None or grad_x is None or grad_weight is None:
                continue
            scaled = shares * grad_scale
            grad_logits = logits.mul_(scale[:, None] * scaled[:, None])
            _subtract_targets(grad_logits, labels, scaled)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(dim=0)
            grad_logits = grad_logits.to(weight_VH.dtype)
            grad_x[part] = linear(grad_logits, weight_VH.t())
            _add_product(grad_weight, grad_logits, x, first=start == 0)
            del logits, grad_logits
        ctx.grads = (grad_x, grad_weight, grad_bias, grad_scale)
        ctx.weight_dtype = weight_VH.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        # The only references: none is copied.
        (*grads, grad_scale), ctx.grads = ctx.grads, None
        assert grads[0] is not None, "the loss was computed without gradients"
        factor = grad_loss / grad_scale
        if not (factor.device.type == "cpu" and factor == 1):  # the usual case, and a pass less
            grads = [None if grad is None else grad.mul_(factor) for grad in grads]
        grad_x, grad_weight, grad_bias = grads
        return (
            grad_x,
            grad_weight.to(ctx.weight_dtype),
            None if grad_bias is None else grad_bias.to(ctx.weight_dtype),
            *[None] * 4,
        )


def _softmax_parts(
    logits_TV: Tensor, labels_T1: Tensor, groups: ProcessGroups
) -> tuple[Tensor, Tensor]:
    """(loss of each token, factor that makes its row of `logits_TV` probabilities).

    The logits become exponentials of their distance to this rank's largest. `labels_T1` count from
    this rank's first row. One message of three numbers for each token.
    """
    mine = (labels_T1 >= 0) & (labels_T1 < logits_TV.shape[1])
    targets = logits_TV.gather(1, labels_T1.where(mine, 0)).where(mine, 0.0)
    largest = logits_TV.amax(dim=1, keepdim=True)
    total = logits_TV.sub_(largest).exp_().sum(dim=1, keepdim=True)
    local_T3 = torch.cat([largest, total, targets], dim=1)
    if groups.tp == 1:
        ranks_T3 = [local_T3]
    else:
        ranks_T3 = [torch.empty_like(local_T3) for _ in range(groups.tp)]
        dist.all_gather(ranks_T3, local_T3, group=groups.tp_group)
    largest_RT, total_RT, targets_RT = torch.stack(ranks_T3).unbind(dim=2)
    top_T = largest_RT.amax(dim=0)
    sum_T = (total_RT * (largest_RT - top_T).exp()).sum(dim=0)
    losses_T = sum_T.log() + top_T - targets_RT.sum(dim=0)
    return losses_T, (largest[:, 0] - top_T).exp() / sum_T


def score_targets_(
    logits_VU: Tensor, rows_K: Tensor, targets_K: Tensor, vocab: int, groups: ProcessGroups
) -> Tensor:
    """Of each target in its row of logits, [log-probability, 1 if no other is likelier].

    float32 [K, 2]. `logits_VU` is this rank's slice of the vocabulary, a column for each of U
    rows, and is overwritten. `targets_K` and `vocab` count over all of the (padded) vocabulary;
    where tp does not divide it, the last slice's further logits are none of it. Of equal logits the
    first is the likeliest. Collective over the tp group: one message.
    """
    first = groups.tp_rank * len(logits_VU)
    logits_VU = logits_VU[: vocab - first].float()
    targets_K = targets_K - first
    mine = (targets_K >= 0) & (targets_K < len(logits_VU))
    local_K = targets_K.where(mine, 0)
    asked_K = logits_VU[local_K, rows_K].where(mine, 0.0)
    largest_U = logits_VU.amax(dim=0)
    likeliest_K = mine & (asked_K == largest_U[rows_K])
    for k in likeliest_K.nonzero()[:, 0].tolist():  # another may be as likely, and come before
        likeliest_K[k] = logits_VU[:, rows_K[k]].argmax() == local_K[k]
    # Some megabytes at a time, which stay in the processor's cache from one operation to the next.
    total_U = torch.zeros_like(largest_U)
    for part_VU in logits_VU.split(max(1, _SOFTMAX_LOGITS // len(largest_U))):
        total_U += part_VU.sub_(largest_U).exp_().sum(dim=0)
    local_K4 = torch.stack([largest_U[rows_K], total_U[rows_K], asked_K, likeliest_K.float()], 1)
    if groups.tp == 1:
        largest_K, total_K, asked_K, likeliest = local_K4.unbind(1)
        return torch.stack([asked_K - largest_K - total_K.log(), likeliest], 1)
    ranks = [torch.empty_like(local_K4) for _ in range(groups.tp)]
    dist.all_gather(ranks, local_K4, group=groups.tp_group)
    largest_RK, total_RK, asked_RK, likeliest_RK = torch.stack(ranks).unbind(dim=2)
    top_K = largest_RK.amax(dim=0)
    sum_K = (total_RK * (largest_RK - top_K).exp()).sum(dim=0)
    # The likeliest token is that of the first rank that has the largest logit.
    order_R1 = torch.arange(groups.tp, device=top_K.device)[:, None]
    first_K = order_R1.where(largest_RK == top_K, groups.tp - 1).amin(dim=0)
    likeliest = likeliest_RK.gather(0, first_K[None])[0]
    return torch.stack([asked_RK.sum(dim=0) - top_K - sum_K.log(), likeliest], 1)


def _subtract_targets(grad_TV: Tensor, labels_T1: Tensor, shares_T: Tensor) -> None:
    """The gradient of -log p is p, less 1 at the label where that is in this rank's slice."""
    mine = (labels_T1 >= 0) & (labels_T1 < grad_TV.shape[1])
    grad_TV.scatter_add_(1, labels_T1.where(mine, 0), -shares_T[:, None] * mine)


def _add_product(total_VH: Tensor, grad_TV: Tensor, x_TH: Tensor, *, first: bool) -> None:
    """total += grad^T x, by some rows; the first is written over what the new tensor holds."""
    for start in range(0, len(total_VH), _GRADIENT_ROWS):
        part = slice(start, start + _GRADIENT_ROWS)
        product = linear(grad_TV[:, part].t(), x_TH.t())
        total_VH[part].copy_(product) if first else total_VH[part].add_(product)
