"""From logits to the next token. Shape letters: B batch rows, V (padded) vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neox.config import NeoXConfig
from neox.parallel.rng import derive_seed


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: greedily when everything is 0, else at random.

    temperature: divides the logits; 0 beside a top_k or top_p means 1.
    top_k: keep only the k likeliest tokens (and those tied with the k-th); 0 keeps all.
    top_p: keep only the smallest set of likeliest tokens whose probabilities reach p; 0 keeps all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0

    @classmethod
    def of(cls, config: NeoXConfig) -> Sampling:
        return cls(config.temperature, config.top_k, config.top_p)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0 and self.top_k == 0 and self.top_p == 0


def prompt_generator(seed: int, index: int) -> torch.Generator:
    """The random stream of prompt `index`: its samples do not depend on the other prompts.

    The generator lives on the CPU, so a seed means the same draws on every device.
    """
    return torch.Generator().manual_seed(derive_seed(seed, "prompt", index))


def choose(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """The next token of every row (int64, [B]), from fp32 logits. Draws B numbers unless greedy."""
    if sampling.is_greedy:
        return logits_BV.argmax(dim=-1)
    uniform_B = torch.rand(logits_BV.size(0), dtype=torch.float64, generator=generator)
    return draw(probabilities(logits_BV, sampling), uniform_B)


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that sampling draws from (float64, [B, V]): top-k first, then top-p."""
    logits_BV = logits_BV.double() / (sampling.temperature or 1.0)
    if 0 < sampling.top_k < logits_BV.size(-1):
        kth_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)
    probabilities_BV = logits_BV.softmax(dim=-1)
    if 0 < sampling.top_p < 1:
        sorted_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
        before_BV = sorted_BV.cumsum(dim=-1) - sorted_BV
        # A token is needed while those before it fall short of p; the first always is.
        sorted_BV = sorted_BV.masked_fill(before_BV >= sampling.top_p, 0.0)
        probabilities_BV = torch.zeros_like(sorted_BV).scatter_(-1, order_BV, sorted_BV)
        probabilities_BV /= probabilities_BV.sum(dim=-1, keepdim=True)
    return probabilities_BV


def draw(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Invert each row's distribution function at a number in [0, 1) (float64). int64, [B].

    Tokens of probability 0 are never drawn: their interval is empty, and a 53-bit number below 1
    times the total stays below the total.
    """
    cumulative_BV = probabilities_BV.cumsum(dim=-1)
    target_B1 = uniform_B.to(cumulative_BV.device).unsqueeze(-1) * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(-1)
