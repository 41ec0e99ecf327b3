"""`eval_tasks` of a training run: scores of the model as it is between two steps."""

from __future__ import annotations

import random

import torch

from neox import log
from neox.config import NeoXConfig
from neox.engine.base import Engine
from neox.evaluation.run import metrics, score
from neox.evaluation.tasks import load_tasks
from neox.inference.stages import InferenceModel
from neox.model.gpt import torch_dtype
from neox.parallel.groups import ProcessGroups
from neox.tokenizer import Tokenizer

# For the standard error of metrics that have no formula for it. evaluate.py takes a hundred times
# as many, which for LAMBADA's perplexity take longer than a small model's scores.
BOOTSTRAP_ITERATIONS = 100


class TaskScores:
    """The scores of `eval_tasks`, at any moment of the training.

    The tasks and their documents are read, and tried, when it is made, before training starts:
    ConfigError and DataError as in `load_tasks`. Not collective.
    """

    def __init__(
        self,
        config: NeoXConfig,
        groups: ProcessGroups,
        tokenizer: Tokenizer,
        padded_vocab_size: int,
    ) -> None:
        self._config = config
        self._groups = groups
        self._tokenizer = tokenizer
        self._rows = padded_vocab_size
        self._tasks = load_tasks(config)
        self._last: tuple[int, dict[str, float]] | None = None

    def at(self, iteration: int, engine: Engine) -> dict[str, float]:
        """`{task}_{metric}` -> score of `engine`'s model after `iteration` steps.

        Computed once for an iteration. Every rank gets the scores, rank 0 alone their standard
        errors; {} and a warning where the model computes NaN. The engine, the precision of its
        model and the random numbers that follow are as before. Collective over the world.
        """
        if self._last is None or self._last[0] != iteration:
            self._last = (iteration, self._score(iteration, engine))
        return self._last[1]

    def _score(self, iteration: int, engine: Engine) -> dict[str, float]:
        from neox.evaluation.adapter import NotFiniteError

        config, groups = self._config, self._groups
        devices = [groups.device] if groups.device.type == "cuda" else []
        state = random.getstate()  # tasks' own code may draw
        try:
            with torch.random.fork_rng(devices), engine.lend() as stage:
                model = InferenceModel(config, groups, stage, self._rows, torch_dtype(config.dtype))
                results = score(
                    config,
                    model,
                    self._tokenizer,
                    groups,
                    self._tasks,
                    bootstrap_iterations=BOOTSTRAP_ITERATIONS,
                    together=True,
                )
        except NotFiniteError:
            log.warning(
                f"eval_tasks: no scores at iteration {iteration}, since the model's logits are not "
                "finite numbers"
            )
            return {}
        finally:
            random.setstate(state)
        return metrics(results)
