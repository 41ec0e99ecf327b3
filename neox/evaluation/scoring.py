"""Log-probabilities of continuations, in as few and as full forward passes as will do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from neox.errors import CheckpointError
from neox.evaluation.trees import Tree, passes, plant
from neox.inference.stages import InferenceModel
from neox.model.packing import Packing

Pair = tuple[list[int], list[int]]  # tokens of a context, tokens of what follows it
Tell = Callable[[Sequence[int], Sequence[Sequence[float]]], None]  # (which pairs, their scores)

# Of a forward pass when no batch size is given: as many as matrix products are fast with.
AUTOMATIC_TOKENS = {"cpu": 1024, "cuda": 16384}


class NotFiniteError(CheckpointError):
    """The model computes NaN or infinity."""


class Scorer:
    """Scores pairs by one model.

    batch_size: inputs of a forward pass, None for as many as are fast.
    bar: counts the inputs.
    together: whether a NotFiniteError waits until every rank can raise it, for who goes on after
        it; otherwise the rank that finds a reason for it raises it at once.
    """

    def __init__(
        self,
        model: InferenceModel,
        max_length: int,
        batch_size: int | None,
        bar: tqdm,
        together: bool,
    ) -> None:
        self._model = model
        self._max_length = max_length
        self._batch_size = batch_size
        self._bar = bar
        self._together = together

    def score(self, pairs: Sequence[Pair], tell: Tell) -> list[list[float]]:
        """[log-probability, tokens that were not the likeliest] of every pair's continuation.

        None may have more than max_length tokens; a context that is too long loses its beginning.

        Pairs with the same input (context and continuation without its last token) share it, and so
        get exactly equal scores. The longest trees come first: a pass too big for the memory fails
        at once. `tell` is called with what a pass found, on one rank of its replica. Collective
        over the world.
        """
        groups = self._model.groups
        askers: dict[tuple[int, ...], list[int]] = {}
        for i, (context, continuation) in enumerate(pairs):
            seen = (context + continuation)[-(self._max_length + 1) : -1]
            askers.setdefault(tuple(seen), []).append(i)
        texts = list(askers)
        limits = self._limits()
        # A tree's attention then costs a third of its linear layers: L / (6 H) with L = 2 H.
        size = max(1, min(limits["most_tokens"], 2 * self._model.config.hidden_size))
        trees = plant(texts, most_tokens=size, most_texts=limits["most_texts"])
        mine = trees[groups.dp_rank :: groups.dp]
        self._bar.total += sum(len(tree.paths) for tree in mine)

        # A pair belongs to one replica, the others leave zeros: the sum over replicas is exact.
        scores_P2 = torch.zeros(len(pairs), 2, dtype=torch.float64)
        for batch in passes(mine, **limits):
            done = [i for tree in batch for text in tree.paths for i in askers[texts[text]]]
            found = self._forward(batch, texts, askers, pairs)
            if found is not None:
                scores_P2.index_add_(0, *found)
                if not self._together:
                    _check_finite(scores_P2[done])
                if groups.tp_rank == 0 and scores_P2[done].isfinite().all():
                    tell(done, scores_P2[done].tolist())
            self._bar.update(sum(len(tree.paths) for tree in batch))
        scores_P2 = self._model.broadcast(scores_P2.to(self._model.device))
        if groups.dp_group is not None:
            dist.all_reduce(scores_P2, group=groups.dp_group)
        _check_finite(scores_P2)
        return scores_P2.tolist()

    def _limits(self) -> dict[str, Any]:
        """Of a forward pass, as neox.evaluation.trees takes them."""
        if self._batch_size is not None:
            return {"most_tokens": sys.maxsize, "most_texts": self._batch_size}
        return {"most_tokens": AUTOMATIC_TOKENS[self._model.device.type], "most_texts": None}

    def _forward(
        self,
        batch: Sequence[Tree],
        texts: Sequence[tuple[int, ...]],
        askers: Mapping[tuple[int, ...], Sequence[int]],
        pairs: Sequence[Pair],
    ) -> tuple[Tensor, Tensor] | None:
        """(pair, [log-probability, 1 if not the likeliest]) of each token that is scored.

        int64 [E] and float64 [E, 2], on the last stage. A token that several pairs score is
        computed once.
        """
        questions: dict[tuple[int, int], int] = {}  # (token of the row, the next one) -> which
        pair_of_E: list[int] = []
        question_of_E: list[int] = []
        start = 0
        for tree in batch:
            for text, path in tree.paths.items():
                for i in askers[texts[text]]:
                    continuation = pairs[i][1]
                    for place, target in zip(path[-len(continuation) :], continuation, strict=True):
                        asked = (start + place, target)
                        pair_of_E.append(i)
                        question_of_E.append(questions.setdefault(asked, len(questions)))
            start += len(tree.tokens)
        tokens_S = torch.tensor([token for tree in batch for token in tree.tokens])
        asked_K, targets_K = torch.tensor(list(questions)).unbind(1)
        packing = Packing.of([tree.runs for tree in batch])
        scores_K2 = self._model.token_scores(tokens_S, packing, asked_K, targets_K)
        if scores_K2 is None:
            return None
        scores_E2 = scores_K2.double().cpu()[question_of_E]
        scores_E2[:, 1] = 1 - scores_E2[:, 1]
        return torch.tensor(pair_of_E), scores_E2


def _check_finite(scores: Tensor) -> None:
    if not scores.isfinite().all():
        raise NotFiniteError(
            "the model's logits are not finite numbers: the checkpoint is damaged, or its "
            "activations overflow this precision; try `precision: fp32`"
        )
