"""What a run evaluates while it trains: losses on held-out batches, and scores on tasks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from neox.config import NeoXConfig
from neox.data.loaders import Batch, Loaders
from neox.engine.base import Engine
from neox.parallel.groups import ProcessGroups
from neox.tokenizer import Tokenizer

MOST_NATS = 20.0  # upstream's cap: a diverged model's perplexity stays a number


class Scores(Protocol):
    """Of tasks; neox.evaluation has them."""

    def at(self, iteration: int, engine: Engine) -> dict[str, float]:
        """By `{task}_{metric}`, after `iteration` steps. Collective over the world."""


@dataclass(frozen=True)
class Evaluations:
    """All methods are collective over the world; every rank makes one."""

    config: NeoXConfig
    groups: ProcessGroups
    engine: Engine
    loaders: Loaders
    tokenizer: Tokenizer
    scores: Scores | None = None  # of eval_tasks

    def validate(self, iteration: int) -> dict[str, float]:
        """Metrics on the next validation batches and on the tasks; {} where there is neither."""
        losses = self._losses(self.loaders.valid) if self.loaders.valid is not None else {}
        return losses | self._scores(iteration)

    def test(self, iteration: int) -> dict[str, float]:
        """Metrics on the test batches, with the tasks' beside them; {} where there are none."""
        if self.loaders.test is None:
            return {}
        return self._losses(self.loaders.test) | self._scores(iteration)

    def at_the_end(self, iteration: int) -> Iterator[tuple[str, str, dict[str, float]]]:
        """(chart, the data's name, metrics) of a run that has ended, as upstream calls them."""
        yield "validation", "val", self.validate(iteration)
        yield "test", "test", self.test(iteration)

    def _scores(self, iteration: int) -> dict[str, float]:
        return {} if self.scores is None else self.scores.at(iteration, self.engine)

    def _losses(self, batches: Iterator[Batch]) -> dict[str, float]:
        """Mean loss and perplexity over `eval_iters` global batches."""
        config = self.config
        counted = _Counted(batches, self.tokenizer) if self._counts_characters else batches
        losses = [self.engine.eval_batch(counted) for _ in range(config.eval_iters)]
        loss = sum(losses) / len(losses)
        metrics = {"lm_loss": loss, "lm_loss_ppl": _perplexity(loss)}
        if config.char_level_ppl:
            own = (counted.tokens, counted.characters) if isinstance(counted, _Counted) else (0, 0)
            tokens, characters = map(sum, zip(*self.groups.gather(own), strict=True))
            nats = loss * tokens / characters if characters else math.inf
            metrics["lm_loss_char_lvl_ppl"] = _perplexity(nats)
        return metrics

    @property
    def _counts_characters(self) -> bool:
        """One rank of each replica, of those that draw the batches."""
        groups = self.groups
        return self.config.char_level_ppl and groups.is_first_stage and groups.tp_rank == 0


class _Counted:
    """Batches that pass through, with their tokens and the characters of their text counted.

    As upstream counts: whole samples of seq_length + 1 tokens. Special tokens have no characters.
    """

    def __init__(self, batches: Iterator[Batch], tokenizer: Tokenizer) -> None:
        self._batches = batches
        self._tokenizer = tokenizer
        self.tokens = self.characters = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        for row, labels in zip(batch.tokens_BS.tolist(), batch.labels_BS.tolist(), strict=True):
            ids = row + [label for label in labels[-1:] if label >= 0]  # below 0: not a token
            self.tokens += len(ids)
            self.characters += len(self._tokenizer.detokenize(ids))
        return batch


def _perplexity(nats: float) -> float:
    return math.exp(min(MOST_NATS, nats))
