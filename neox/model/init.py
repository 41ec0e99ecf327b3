"""Initial weights: the same model from the same seed at every tp, pp and dp.

Each tensor is drawn whole from a generator of its own, seeded by (seed, layer index, name), and
then cut to this rank's shard.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from neox.config import ModelConfig
from neox.model.gpt import Layer
from neox.model.layout import Init, ParamLayout, Split
from neox.model.shard import shard
from neox.parallel.groups import ProcessGroups
from neox.parallel.rng import derive_seed


def initialize(
    module: nn.Module, layer: Layer, config: ModelConfig, seed: int, groups: ProcessGroups
) -> None:
    """Fill the parameters of one built layer. Not collective; holds one whole tensor at a time."""
    assert layer.layout is not None
    for name, parameter in module.named_parameters():
        layout = layer.layout[name]
        generator = torch.Generator().manual_seed(derive_seed(seed, layer.file_index, name))
        whole = torch.empty(layout.shape, dtype=torch.float32)
        draw(whole, layout, config, generator)
        with torch.no_grad():
            parameter.copy_(shard(whole, layout, groups.tp_rank, groups.tp))


def draw(
    whole: Tensor, layout: ParamLayout, config: ModelConfig, generator: torch.Generator
) -> None:
    """Fill the whole tensor by the rule that its layout names."""
    if layout.init is Init.ZEROS:
        whole.zero_()
    elif layout.init is Init.ONES:
        whole.fill_(1.0)
    else:
        rule = getattr(config, layout.init.value)
        _RULES[rule](whole, config, generator)
    if layout.split is Split.PARTIAL_SUM:
        assert layout.init is Init.ZEROS, "a bias that is stored as summands starts at zero"


def _normal(std: Callable[[ModelConfig], float]) -> Callable[..., Tensor]:
    def rule(tensor: Tensor, config: ModelConfig, generator: torch.Generator) -> Tensor:
        return tensor.normal_(0.0, std(config), generator=generator)

    return rule


def _orthogonal(gain: Callable[[ModelConfig], float]) -> Callable[..., Tensor]:
    def rule(tensor: Tensor, config: ModelConfig, generator: torch.Generator) -> Tensor:
        return nn.init.orthogonal_(tensor, gain(config), generator=generator)

    return rule


# The standard deviations are those of upstream's init_functions.py: h is the hidden size, L the
# number of layers. wang_init: 2 / (L sqrt(h)); small_init: sqrt(2 / 5h), arXiv:1910.05895.
_RULES: dict[str, Callable[..., Tensor]] = {
    "normal": _normal(lambda c: c.init_method_std),
    "scaled_normal": _normal(lambda c: c.init_method_std / math.sqrt(2.0 * c.num_layers)),
    "single_residual_scaled_normal": _normal(lambda c: c.init_method_std / math.sqrt(c.num_layers)),
    "wang_init": _normal(lambda c: 2.0 / c.num_layers / math.sqrt(c.hidden_size)),
    "small_init": _normal(lambda c: math.sqrt(2.0 / (5.0 * c.hidden_size))),
    "orthogonal": _orthogonal(lambda c: 1.0),
    "scaled_orthogonal": _orthogonal(lambda c: 1.0 / math.sqrt(2.0 * c.num_layers)),
    "xavier_uniform": lambda t, c, g: nn.init.xavier_uniform_(t, generator=g),
    "xavier_normal": lambda t, c, g: nn.init.xavier_normal_(t, generator=g),
}
