"""A training engine's layers, lent to an evaluation between two steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from torch import nn

from neox.model.gpt import LocalLayers


@contextlib.contextmanager
def lent(local: LocalLayers) -> Iterator[LocalLayers]:
    """The layers themselves, without dropout; as they were afterwards. Not collective.

    They are the training's own parameters: whoever has them computes without gradients and changes
    nothing.
    """
    modules = [module for _, module in local if isinstance(module, nn.Module)]
    training = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield local
    finally:
        for module, was in zip(modules, training, strict=True):
            module.train(was)


@torch.no_grad()
def gathered(local: LocalLayers, device: torch.device) -> LocalLayers:
    """Copies of layers whose parameters ZeRO 3 has spread over the data-parallel ranks.

    A layer at a time is gathered, so besides the training there is one whole model on every rank.
    DeepSpeed's own way, gathering in every module's forward, would hang where one replica has more
    batches to evaluate than another. Collective over the data-parallel group.
    """
    copies: dict[int, nn.Module] = {}  # by the original, which tied layers share
    found: LocalLayers = []
    for layer, module in local:
        copy: Any = module
        if isinstance(module, nn.Module):
            copy = copies.get(id(module))
            if copy is None:
                copy = copies[id(module)] = layer.build().to(device).eval()
                parameters = dict(module.named_parameters())
                with deepspeed.zero.GatheredParameters(list(parameters.values())):
                    for name, parameter in copy.named_parameters():
                        parameter.copy_(parameters[name])
                copy.requires_grad_(False)
        found.append((layer, copy))
    return found
