"""What a run evaluates while it trains: losses on held-out batches, and scores on tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from neox import progress
from neox.checkpoint.manifest import FORWARD_PASS
from neox.config import NeoXConfig
from neox.data.loaders import Batch, Loaders
from neox.engine.base import Engine
from neox.inference.fingerprint import take, verify
from neox.inference.stages import InferenceModel
from neox.model.gpt import torch_dtype
from neox.parallel.groups import ProcessGroups
from neox.tokenizer import Tokenizer

MOST_NATS = 20.0  # upstream's cap: a diverged model's perplexity stays a number


Scores = Callable[[InferenceModel, int], dict[str, float]]  # of tasks, after so many steps


class Evaluations:
    """All methods are collective over the world; every rank makes one.

    The engine, its precision and the random numbers that follow are the same after each.
    """

    def __init__(
        self,
        config: NeoXConfig,
        groups: ProcessGroups,
        engine: Engine,
        loaders: Loaders,
        tokenizer: Tokenizer,
        padded_vocab_size: int,
        task_scores: Scores | None = None,
    ) -> None:
        self.config = config
        self.groups = groups
        self.engine = engine
        self.loaders = loaders
        self.tokenizer = tokenizer
        self.padded_vocab_size = padded_vocab_size
        self._task_scores = task_scores
        self._scored: tuple[int, dict[str, float]] | None = None  # the last iteration, its scores

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

    def fingerprint(self) -> dict[str, bytes]:
        """A checkpoint's file, by name, for checkpoint_validation_with_forward_pass."""
        if not self.config.checkpoint_validation_with_forward_pass:
            return {}
        with self._model() as model:
            return {FORWARD_PASS: take(model, self.tokenizer.vocab_size).encode()}

    def check_fingerprint(self, folder: Path) -> None:
        """Compare the weights that came from `folder`, if asked for. Raises CheckpointError."""
        if self.config.checkpoint_validation_with_forward_pass:
            with self._model() as model:
                verify(model, folder)

    @contextmanager
    def _model(self) -> Iterator[InferenceModel]:
        """The engine's own model, for forward passes between two steps."""
        config, device = self.config, self.groups.device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), self.engine.lend() as stage:
            yield InferenceModel(
                config, self.groups, stage, self.padded_vocab_size, torch_dtype(config.dtype)
            )

    def _scores(self, iteration: int) -> dict[str, float]:
        """Of the tasks, which are the same for validation and test."""
        if self._task_scores is None:
            return {}
        if self._scored is None or self._scored[0] != iteration:
            with self._model() as model:
                self._scored = (iteration, self._task_scores(model, iteration))
        return self._scored[1]

    def _losses(self, batches: Iterator[Batch]) -> dict[str, float]:
        """Mean loss and perplexity over `eval_iters` global batches."""
        config = self.config
        counted = _Counted(batches, self.tokenizer) if self._counts_characters else batches
        losses = []
        for _ in range(config.eval_iters):
            losses.append(self.engine.eval_batch(counted))
            progress.tick()
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
