"""From a token's logits to the token. Shape letters: V vocabulary, C tokens that are possible.

Each function sees one row, so that what is chosen for it never depends on what else is in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neox.config import NeoXConfig
from neox.parallel.rng import derive_seed

# Of a trained model's tokens these hold nearly all of the probability; to find them takes a third
# of the time of sorting all.
LIKELIEST = 1024


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: the likeliest when temperature, top_k and top_p are 0, else at random.

    temperature: divides the logits; 0 beside a top_k or top_p means 1.
    top_k: keep only the k likeliest tokens (and those tied with the k-th); 0 keeps all.
    top_p: keep only the smallest set of likeliest tokens whose probabilities reach p; 0 keeps all.
    repetition_penalty: logits of tokens that are in the prompt or were generated are divided by it
        where they are positive and multiplied where they are negative (arXiv:1909.05858, as
        transformers does); 1 changes nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, config: NeoXConfig) -> Sampling:
        return cls(config.temperature, config.top_k, config.top_p)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0 and self.top_k == 0 and self.top_p == 0


GREEDY = Sampling()


def prompt_seed(seed: int, index: int) -> int:
    """The seed of prompt `index` of a run: its samples do not depend on the other prompts."""
    return derive_seed(seed, "prompt", index)


def penalize(logits_V: Tensor, tokens: Sequence[int], penalty: float) -> Tensor:
    """A copy of the logits in which those of `tokens` are less likely; see `Sampling`."""
    seen = torch.tensor(sorted(set(tokens)), device=logits_V.device)
    of_seen = logits_V[seen]
    of_seen = torch.where(of_seen < 0, of_seen * penalty, of_seen / penalty)
    return logits_V.index_copy(0, seen, of_seen)


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token. Draws one number from `generator`, which is on the CPU, unless greedy."""
    if sampling.is_greedy:
        return int(logits_V.argmax())
    uniform = torch.rand((), dtype=torch.float64, generator=generator)
    return draw(*possible(logits_V, sampling), uniform)


def possible(logits_V: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn (int64 [C], ascending) and their weights (float64 [C]).

    Top-k is taken first, then top-p of what it leaves. Weights are in the probabilities' ratio; the
    largest is 1, so that their sum is a number at any temperature.
    """
    logits_V = logits_V.double()
    tokens_C = None
    if 0 < sampling.top_k < len(logits_V):
        kth = logits_V.topk(sampling.top_k).values[-1]
        tokens_C = (logits_V >= kth).nonzero()[:, 0]
        logits_V = logits_V[tokens_C]
    weights_C = ((logits_V - logits_V.max()) / (sampling.temperature or 1.0)).exp()
    if 0 < sampling.top_p < 1:
        nucleus = _nucleus(weights_C, sampling.top_p)
        tokens_C = nucleus if tokens_C is None else tokens_C[nucleus]
        weights_C = weights_C[nucleus]
    if tokens_C is None:
        tokens_C = torch.arange(len(weights_C), device=weights_C.device)
    return tokens_C, weights_C


def _nucleus(weights_C: Tensor, p: float) -> Tensor:
    """Ascending indices of the fewest largest weights that make up `p` of the sum of all."""
    needed = p * weights_C.sum()
    if len(weights_C) > LIKELIEST:
        likeliest = weights_C.topk(LIKELIEST, sorted=False).indices.sort().values
        of_likeliest = weights_C[likeliest]
        largest = _largest(of_likeliest, needed)
        # Else they are too few, or some that equal the last one are not among them.
        if of_likeliest[largest].min() > of_likeliest.min():
            return likeliest[largest]
    return _largest(weights_C, needed)


def _largest(weights_C: Tensor, needed: Tensor) -> Tensor:
    """Of equal weights the first ones are taken."""
    sorted_C, order_C = weights_C.sort(descending=True, stable=True)
    before_C = sorted_C.cumsum(dim=0) - sorted_C
    # A token is needed while those before it fall short; the first always is.
    count = max(1, int((before_C < needed).sum()))
    return order_C[:count].sort().values


def draw(tokens_C: Tensor, weights_C: Tensor, uniform: Tensor) -> int:
    """Invert the distribution function at a number in [0, 1) (float64).

    Tokens of weight 0 are never drawn: their interval is empty, and a 53-bit number below 1 times
    the total stays below the total.
    """
    cumulative_C = weights_C.cumsum(dim=0)
    target = uniform.to(cumulative_C.device) * cumulative_C[-1]
    return int(tokens_C[torch.searchsorted(cumulative_C, target, right=True)])
