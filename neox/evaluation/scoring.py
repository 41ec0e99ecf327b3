"""Log-probabilities of continuations, in as few and as full forward passes as will do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from neox.errors import CheckpointError
from neox.evaluation.trees import Tree, passes, plant
from neox.inference.stages import InferenceModel
from neox.model.packing import Packing

Pair = tuple[list[int], list[int]]  # tokens of a context, tokens of what follows it
Tell = Callable[[Sequence[int], Sequence[Sequence[float]]], None]  # (which pairs, their scores)

# Forward passes that may be lost when the run is killed: their scores come together.
MOST_WAITING = 8

# Of a forward pass when no batch size is given: as many as matrix products are fast with.
AUTOMATIC_TOKENS = {"cpu": 2048, "cuda": 16384}


class NotFiniteError(CheckpointError):
    """The model computes NaN or infinity."""


class _Pass(NamedTuple):
    """What a forward pass found, up to the output projection.

    U tokens that something is asked of, K different questions (what follows a token?), E entries
    (a pair asks a question). `rows_K` index `hidden_UH`, `question_of_E` the questions.
    """

    hidden_UH: Tensor
    rows_K: Tensor
    targets_K: Tensor
    pair_of_E: Tensor
    question_of_E: Tensor


class Scorer:
    """Scores pairs by one model.

    batch_size: inputs of a forward pass, None for as many as are fast.
    bar: of tqdm; counts the inputs.
    together: whether a NotFiniteError waits until every rank can raise it, for who goes on after
        it; otherwise the rank that finds a reason for it raises it at once.
    """

    def __init__(
        self,
        model: InferenceModel,
        max_length: int,
        batch_size: int | None,
        bar: Any,
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
        # The output projection is as large as many layers: it gets the tokens of several passes.
        waiting: list[_Pass] = []
        rows = 0
        for batch in passes(mine, **limits):
            asked = self._forward(batch, texts, askers, pairs)
            if asked is not None:
                waiting.append(asked)
                rows += len(asked.hidden_UH)
            if rows >= 4 * self._model.logit_rows or len(waiting) >= MOST_WAITING:
                self._finish(waiting, scores_P2, tell)
                waiting, rows = [], 0
            self._bar.update(sum(len(tree.paths) for tree in batch))
        self._finish(waiting, scores_P2, tell)
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
    ) -> _Pass | None:
        """Some trees up to the output projection; None before the last stage.

        A token that several pairs score is computed once.
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
        wanted_U, rows_K = asked_K.unique(return_inverse=True)
        packing = Packing.of([tree.runs for tree in batch])
        hidden_UH = self._model.hidden(tokens_S, packing, wanted_U)
        if hidden_UH is None:
            return None
        of_pairs = torch.tensor(pair_of_E), torch.tensor(question_of_E)
        return _Pass(hidden_UH, rows_K, targets_K, *of_pairs)

    def _finish(self, waiting: Sequence[_Pass], scores_P2: Tensor, tell: Tell) -> None:
        """Add the scores of every token that waits to those of its pair."""
        if not waiting:
            return
        rows, questions = [0], [0]  # where each pass begins among all
        for one in waiting:
            rows.append(rows[-1] + len(one.hidden_UH))
            questions.append(questions[-1] + len(one.rows_K))
        rows_K = torch.cat([one.rows_K + at for one, at in zip(waiting, rows, strict=False)])
        targets_K = torch.cat([one.targets_K for one in waiting])
        hidden_UH = torch.cat([one.hidden_UH for one in waiting])
        scores_K2 = self._model.target_scores(hidden_UH, rows_K, targets_K).double().cpu()
        scores_K2[:, 1] = 1 - scores_K2[:, 1]
        pair_of_E = torch.cat([one.pair_of_E for one in waiting])
        question_of_E = torch.cat(
            [one.question_of_E + at for one, at in zip(waiting, questions, strict=False)]
        )
        scores_P2.index_add_(0, pair_of_E, scores_K2[question_of_E])
        done_D = pair_of_E.unique()
        if not self._together:
            _check_finite(scores_P2[done_D])
        if self._model.groups.tp_rank == 0 and scores_P2[done_D].isfinite().all():
            tell(done_D.tolist(), scores_P2[done_D].tolist())


def _check_finite(scores: Tensor) -> None:
    if not scores.isfinite().all():
        raise NotFiniteError(
            "the model's logits are not finite numbers: the checkpoint is damaged, or its "
            "activations overflow this precision; try `precision: fp32`"
        )
