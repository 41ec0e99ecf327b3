"""Next-token cross-entropy over a vocabulary that may be split over the ranks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from neox.parallel.groups import ProcessGroups


def cross_entropy(
    logits_BSV: Tensor, labels_BS: Tensor, loss_mask_BS: Tensor, groups: ProcessGroups
) -> Tensor:
    """Mean loss of the tokens that `loss_mask_BS` (float32, 0 or 1) selects: a float32 scalar.

    `logits_BSV` is this rank's slice of the padded vocabulary; padding rows take part in the
    softmax, as upstream's do. A micro-batch with nothing selected has loss 0, not NaN.
    Collective over the tp group.
    """
    if groups.tp == 1:
        losses = F.cross_entropy(
            logits_BSV.flatten(0, 1).float(), labels_BS.flatten(), reduction="none"
        )
    else:
        from neox.parallel import megatron

        losses = megatron.vocab_parallel_cross_entropy(logits_BSV, labels_BS).flatten()
    mask = loss_mask_BS.flatten()
    return (losses * mask).sum() / mask.sum().clamp(min=1.0)
