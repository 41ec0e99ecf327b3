"""The perplexity of texts, token by token, by windows that slide over them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from neox.engine.memory import keep_freed_memory
from neox.evaluation.scoring import Pair, Scorer
from neox.inference.stages import InferenceModel


@dataclass(frozen=True)
class Perplexity:
    """loss: mean of -log p over the tokens, natural logarithm. Rate: of tokens that were computed,
    of which those that are context in a window come more than once."""

    loss: float
    tokens: int
    tokens_per_second: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # no float has e**710


def windows(tokens: Sequence[int], eod: int, length: int, stride: int) -> Iterator[Pair]:
    """(context, what is scored behind it) so that each token of a document is scored once.

    The first window scores `length` tokens behind an end-of-document token, each later one the next
    `stride` (at most `length`) with at least `length` - `stride` tokens in front. No window gives
    the model more than `length` tokens.
    """
    text = [eod, *tokens]
    start, stop = 1, min(1 + length, len(text))
    while start < stop:
        yield text[max(0, stop - 1 - length) : start], text[start:stop]
        start, stop = stop, min(stop + stride, len(text))


def measure(model: InferenceModel, pairs: Sequence[Pair], bar: Any) -> Perplexity:
    """The perplexity of what `pairs`, at least one, score. `bar` (tqdm's) counts the windows.

    Raises NotFiniteError. Collective over the world.
    """
    if model.device.type == "cpu":
        keep_freed_memory()
    started = time.perf_counter()
    scorer = Scorer(model, model.config.seq_length, batch_size=None, bar=bar, together=False)
    scores = scorer.score(pairs, tell=lambda which, scores: None)
    seconds = time.perf_counter() - started
    tokens = sum(len(continuation) for _, continuation in pairs)
    computed = sum(len(context) + len(continuation) - 1 for context, continuation in pairs)
    loss = -math.fsum(score for score, _ in scores) / tokens
    return Perplexity(loss, tokens, computed / seconds)
