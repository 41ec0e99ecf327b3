"""`eval_tasks` of a training run: scores of the model as it is between two steps."""

from __future__ import annotations

import random

from neox import log
from neox.config import NeoXConfig
from neox.evaluation.chat import chat_template_of
from neox.evaluation.results import metrics
from neox.evaluation.run import score
from neox.evaluation.tasks import load_tasks
from neox.inference.stages import InferenceModel
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

    def __init__(self, config: NeoXConfig, groups: ProcessGroups, tokenizer: Tokenizer) -> None:
        self._config = config
        self._groups = groups
        self._tokenizer = tokenizer
        self._tasks = load_tasks(config)
        self._chat = chat_template_of(config)

    def __call__(self, model: InferenceModel, iteration: int) -> dict[str, float]:
        """`{task}_{metric}` -> score of the model after `iteration` steps.

        Every rank gets the scores, rank 0 alone their standard errors; {} and a warning where the
        model computes NaN. Collective over the world.
        """
        from neox.evaluation.adapter import NeoXLM
        from neox.evaluation.scoring import NotFiniteError

        lm = NeoXLM(
            lambda: model,
            self._tokenizer,
            self._groups,
            self._config.seq_length,
            batch_size=self._config.eval_batch_size,
            seed=self._config.seed,
            chat=self._chat,
            together=True,
        )
        state = random.getstate()  # tasks' own code may draw
        try:
            results = score(self._config, lm, self._tasks, self._groups, BOOTSTRAP_ITERATIONS)
        except NotFiniteError:
            log.warning(
                f"eval_tasks: no scores at iteration {iteration}, since the model's logits are not "
                "finite numbers"
            )
            return {}
        finally:
            random.setstate(state)
        return metrics(results)
