"""Next-token cross-entropy, computed together with the output projection.

The logits of a batch are its largest tensor: 2048 tokens of a vocabulary of 50,000 are 400 MB in
float32, and the textbook way holds several such. Here they exist for some positions at a time, and
their gradient goes into the projection's at once: the products are the same, each computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neox.model.projection import (
    Weight,
    adapter_of,
    bias_of,
    product,
    product_back,
    weight_of,
)
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
    owner: nn.Module,
    labels_BS: Tensor,
    loss_mask_BS: Tensor,
    groups: ProcessGroups,
) -> Tensor:
    """Mean loss of the tokens that `loss_mask_BS` (float32, 0 or 1) selects: a float32 scalar.

    `owner` is the output projection, this rank's slice of it over the padded vocabulary: see
    neox.model.projection. Padding rows take part in the softmax, as upstream's do. A micro-batch
    with nothing selected has loss 0, not NaN. The softmax is float32 whatever the weights are. At
    tp > 1 the gradient of x is this rank's summand: the caller sums it. Collective over the tp
    group.
    """
    mask = loss_mask_BS.flatten().float()
    count = mask.sum().clamp(min=1.0)
    shares = mask / count  # of each token in the mean
    scale = None
    if torch.is_grad_enabled():
        small = x_BSH.dtype == torch.float16
        scale = count.clamp(max=_LARGEST_SCALE) if small else torch.ones_like(count)
    x_TH, adapter = x_BSH.flatten(0, 1), adapter_of(owner)
    low_rank = (None, None) if adapter is None else adapter.low_rank(x_TH)
    weight, bias = weight_of(owner), bias_of(owner)
    return _OutputLoss.apply(
        x_TH, weight, bias, *low_rank, labels_BS.flatten(), shares, groups, scale
    )


def chunks(tokens: int, local_vocab: int) -> int:
    """In how many pieces the positions of a micro-batch are taken: messages per loss at tp > 1."""
    return -(-tokens * local_vocab * 4 // CHUNK_BYTES)


class _OutputLoss(torch.autograd.Function):
    """Gradients are found in the forward pass, while the logits are there.

    The logits are x W^T + bias + h up^T, the last of them with an adapter: h [T, R], up [V, R].
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        weight_VH: Weight,
        bias_V: Tensor | None,
        h_TR: Tensor | None,
        up_VR: Tensor | None,
        labels_T: Tensor,
        shares_T: Tensor,
        groups: ProcessGroups,
        grad_scale: Tensor | None,
    ) -> Tensor:
        loss = shares_T.new_zeros(())
        vocab, dtype = weight_VH.shape[0], x_TH.dtype
        size = -(-len(x_TH) // chunks(len(x_TH), vocab))
        grads = _Gradients(x_TH, weight_VH, bias_V, h_TR, up_VR)
        if grad_scale is not None:
            grads.allocate(ctx.needs_input_grad)
        for start in range(0, len(x_TH), size):
            part = slice(start, start + size)
            labels, shares = labels_T[part, None] - groups.tp_rank * vocab, shares_T[part]
            logits = product(x_TH[part], weight_VH, bias_V)
            if h_TR is not None and up_VR is not None:
                logits += linear(h_TR[part], up_VR)
            logits = logits.float()
            losses, scale = _softmax_parts(logits, labels, groups)
            loss += torch.dot(losses, shares)
            if grad_scale is None:
                continue
            # A row of the logits' gradient is (probability - 1 at the target) * share. In float32
            # its factors wait for the small sides of the products: a pass less over V.
            of_row = shares * grad_scale
            if dtype == torch.float32:
                _subtract_targets(logits, labels, 1.0 / scale)
                of_row = of_row * scale
            else:
                _subtract_targets(logits.mul_(scale[:, None]), labels, torch.ones_like(scale))
            grads.add(part, logits, of_row)
            del logits
        ctx.grads, ctx.grad_scale, ctx.dtype = grads.found, grad_scale, dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        # The only references: none is copied.
        grads, ctx.grads = ctx.grads, None
        assert grads, "the loss was computed without gradients, or for none"
        factor = grad_loss / ctx.grad_scale
        if not (factor.device.type == "cpu" and factor == 1):  # the usual case, and a pass less
            for grad in grads.values():
                grad.mul_(factor)
        return *(grads[i].to(ctx.dtype) if i in grads else None for i in range(5)), *[None] * 4


class _Gradients:
    """Those of the inputs of `_OutputLoss`, by their place among them, summed over the chunks.

    Only of those that want one. Sums over the chunks keep float32 where the weights are of 16 bits.
    """

    def __init__(self, *inputs: Any) -> None:
        self._x_TH, self._weight_VH, _, self._h_TR, self._up_VR = self._inputs = inputs
        self.found: dict[int, Tensor] = {}

    def allocate(self, wanted: Sequence[bool]) -> None:
        of_chunks = (0, 3)  # x and h: each chunk writes its own rows
        for place in range(5):
            if wanted[place]:
                like = self._inputs[place]
                dtype = like.dtype if place in of_chunks else torch.float32
                make = torch.zeros_like if place in (2, 4) else torch.empty_like
                self.found[place] = make(like, dtype=dtype)

    def add(self, part: slice, grad_TV: Tensor, factor_T: Tensor) -> None:
        """The gradients by a chunk's logits, whose own is grad_TV times each row's factor."""
        if 2 in self.found:
            self.found[2] += factor_T @ grad_TV
        grad_TV, factor_T1 = grad_TV.to(self._x_TH.dtype), factor_T[:, None].to(self._x_TH.dtype)
        if 0 in self.found:
            self.found[0][part] = product_back(grad_TV, self._weight_VH) * factor_T1
        if 1 in self.found:
            x_TH = self._x_TH[part] * factor_T1
            _add_product(self.found[1], grad_TV, x_TH, first=part.start == 0)
        if 3 in self.found:
            self.found[3][part] = linear(grad_TV, self._up_VR.t()) * factor_T1
        if 4 in self.found:
            self.found[4] += linear(grad_TV.t(), (self._h_TR[part] * factor_T1).t())


def _softmax_parts(
    logits_TV: Tensor, labels_T1: Tensor, groups: ProcessGroups
) -> tuple[Tensor, Tensor]:
    """(loss of each token, factor that makes its row of `logits_TV` probabilities).

    The logits become exponentials of their distance to this rank's largest. `labels_T1` count from
    this rank's first row. One message of three numbers for each token.
    """
    mine = (labels_T1 >= 0) & (labels_T1 < logits_TV.shape[1])
    targets = logits_TV.gather(1, labels_T1.where(mine, 0)).where(mine, 0.0)
    # Some megabytes at a time, which stay in the processor's cache from one operation to the next.
    parts = []
    for rows_TV in logits_TV.split(max(1, _SOFTMAX_LOGITS // logits_TV.shape[1])):
        top = rows_TV.amax(dim=1, keepdim=True)
        parts.append((top, rows_TV.sub_(top).exp_().sum(dim=1, keepdim=True)))
    largest, total = (torch.cat(part) for part in zip(*parts, strict=True))
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


def _subtract_targets(grad_TV: Tensor, labels_T1: Tensor, ones_T: Tensor) -> None:
    """The gradient of -log p is p, less 1 at the label where that is in this rank's slice.

    `ones_T` is what stands for 1 in each row.
    """
    mine = (labels_T1 >= 0) & (labels_T1 < grad_TV.shape[1])
    grad_TV.scatter_add_(1, labels_T1.where(mine, 0), -ones_T[:, None] * mine)


def _add_product(total_VH: Tensor, grad_TV: Tensor, x_TH: Tensor, *, first: bool) -> None:
    """total += grad^T x, by some rows; the first is written over what the new tensor holds."""
    for start in range(0, len(total_VH), _GRADIENT_ROWS):
        part = slice(start, start + _GRADIENT_ROWS)
        product = linear(grad_TV[:, part].t(), x_TH.t())
        total_VH[part].copy_(product) if first else total_VH[part].add_(product)
