"""The gradient's norm, and clipping by it, where the optimizer is torch's own (ZeRO 0).

DeepSpeed's own clipping counts only the parameters of one pipeline stage there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neox.parallel.groups import ProcessGroups


def clip_before_steps(inner: Any, largest: float, groups: ProcessGroups) -> None:
    """From now on each optimizer step first scales the gradient to a norm of at most `largest`.

    The norm before that is DeepSpeed's `get_global_grad_norm()`. With `largest` 0 it is measured
    only. A step whose gradient is not finite is skipped. Steps are collective over the replica's
    tp x pp ranks.
    """
    parameters = [p for group in inner.optimizer.param_groups for p in group["params"]]

    def measure_and_clip(*_: object) -> None:
        norm = float(gradient_norm(parameters, groups))
        inner._global_grad_norm = norm
        if not math.isfinite(norm):  # as with ZeRO, nothing is done; the training loop stops
            for parameter in parameters:
                parameter.grad = None
            inner.skipped_steps += 1
            return
        # DeepSpeed's ZeRO and torch's clip_grad_norm_ have the same 1e-6.
        if largest and norm + 1e-6 > largest:
            gradients = [p.grad for p in parameters if p.grad is not None]
            torch._foreach_mul_(gradients, largest / (norm + 1e-6))

    inner.optimizer.register_step_pre_hook(measure_and_clip)
    inner.clip_fp32_gradients = lambda: None


def gradient_norm(parameters: list[nn.Parameter], groups: ProcessGroups) -> Tensor:
    """The Euclidean norm of the whole model's gradient, each element counted once.

    Collective over the replica's tp x pp ranks.
    """
    gradients = [p.grad for p in parameters if p.grad is not None and _counts_here(p, groups)]
    square = torch.zeros((), device=groups.device)
    if gradients:
        square += torch.stack(torch._foreach_norm(gradients)).float().square().sum()
    if groups.replica_group is not None:
        dist.all_reduce(square, group=groups.replica_group)
    return square.sqrt()


def _counts_here(parameter: nn.Parameter, groups: ProcessGroups) -> bool:
    """A shard counts on its rank, a replica on the first; tied weights where the embedding is."""
    if getattr(parameter, "ds_pipe_replicated", False):  # DeepSpeed marks all copies but one
        return False
    return groups.tp_rank == 0 or getattr(parameter, "tensor_model_parallel", False)
