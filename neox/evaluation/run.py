"""Score a model on tasks, and say what was measured: the numbers, on what, of what, and how."""

from __future__ import annotations

import datetime
import errno
import json
import os
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from neox import atomic, log
from neox.config import NeoXConfig
from neox.errors import ConfigError
from neox.evaluation.tasks import load_tasks, seed_fewshot, silenced
from neox.inference.stages import InferenceModel
from neox.parallel.groups import ProcessGroups
from neox.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lm_eval.tasks.manager import TaskDict

BOOTSTRAP_ITERATIONS = 10_000  # for the standard error of metrics that have no formula for it
LIBRARIES = ("lm-eval", "torch", "datasets", "tokenizers")


class Score(NamedTuple):
    task: str
    metric: str  # lm-eval's name; with its filter's name behind it unless that is "none"
    value: float
    stderr: float | None
    documents: int


def evaluate(
    config: NeoXConfig,
    model: InferenceModel,
    tokenizer: Tokenizer,
    groups: ProcessGroups,
    tasks: TaskDict | None = None,
) -> dict[str, Any]:
    """Score `model` on every document of `tasks` (default: the configuration's), or on `limit`.

    Returns lm-eval's dictionary of results, and in it `n_docs` (documents scored, by task) and
    what the scores depend on besides the checkpoint. Collective over the world. Every rank gets
    the scores, rank 0 alone their standard errors.
    """
    tasks = load_tasks(config) if tasks is None else tasks
    started = time.time()
    results = score(
        config,
        model,
        tokenizer,
        groups,
        tasks,
        batch_size=config.train_micro_batch_size_per_gpu,
    )
    return {
        **results,
        "n_docs": {task: count["effective"] for task, count in results["n-samples"].items()},
        **_conditions(config, tokenizer, groups),
        "date": started,
        "duration_seconds": time.time() - started,
    }


def score(
    config: NeoXConfig,
    model: InferenceModel,
    tokenizer: Tokenizer,
    groups: ProcessGroups,
    tasks: TaskDict,
    *,
    batch_size: int,
    bootstrap_iterations: int = BOOTSTRAP_ITERATIONS,
    together: bool = False,
) -> dict[str, Any]:
    """lm-eval's dictionary of results. Collective over the world, as `evaluate`.

    NotFiniteError when the model's logits are not numbers; `together` as NeoXLM has it.
    """
    from lm_eval import evaluator

    from neox.evaluation.adapter import NeoXLM

    # lm-eval would bootstrap in forked processes, and a process with communicators cannot fork.
    os.environ["DISABLE_MULTIPROC"] = "1"
    for task in tasks["tasks"].values():  # a task draws its examples anew each time it is scored
        seed_fewshot(task)
    with log.progress(total=0, desc="evaluating", unit=" inputs") as bar, silenced():
        lm = NeoXLM(
            model,
            tokenizer,
            batch_size=batch_size,
            seed=config.seed,
            bar=bar,
            together=together,
        )
        results = evaluator.evaluate(
            lm,
            tasks,
            limit=config.limit,
            bootstrap_iters=bootstrap_iterations if groups.rank == 0 else 0,
            log_samples=False,
        )
    for definition in results["configs"].values():
        definition.pop("custom_dataset", None)  # a function; dataset_path says what it read
    return results


def check_prefix(prefix: str) -> None:
    """Make the results' folder before hours go into them. Raises ConfigError where that fails."""
    folder = Path(f"{prefix}_").parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ConfigError(
            f"eval_results_prefix is {prefix!r}, but results cannot be written to {folder}: "
            f"{error.strerror}."
        ) from error


def write_results(results: Mapping[str, Any], prefix: str) -> Path:
    """Write `[{prefix}_]eval_results_{now}.json`; in the working directory, as upstream does."""
    now = datetime.datetime.now().strftime("%m-%d-%Y-%H-%M-%S")
    path = Path(f"{prefix}_eval_results_{now}.json" if prefix else f"eval_results_{now}.json")
    atomic.write_text(path, json.dumps(results, indent=4, default=str) + "\n")
    return path


def scores(results: Mapping[str, Any]) -> list[Score]:
    """Every metric of every task and group in `evaluate`'s results."""
    found = []
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, str):
                continue
            stderr = values.get(f"{metric}_stderr,{filtered}")
            found.append(
                Score(
                    task,
                    metric if filtered == "none" else f"{metric}_{filtered}",
                    float(value),
                    None if stderr is None or isinstance(stderr, str) else float(stderr),
                    int(values["sample_len"]),
                )
            )
    return found


def tracker_metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """`metrics` under the names of W&B's charts, `eval/{task}_{metric}`."""
    return {f"eval/{name}": value for name, value in metrics(results).items()}


def metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """`{task}_{metric}` -> value, and `{task}_{metric}_stderr` where there is one."""
    values = {}
    for score in scores(results):
        values[f"{score.task}_{score.metric}"] = score.value
        if score.stderr is not None:
            values[f"{score.task}_{score.metric}_stderr"] = score.stderr
    return values


def table(results: Mapping[str, Any]) -> str:
    """The scores for people: task, metric, value, standard error, documents scored (of all)."""
    rows = [("task", "metric", "value", "stderr", "documents")]
    for score in scores(results):
        stderr = "" if score.stderr is None else _four_digits(score.stderr)
        documents = str(score.documents)
        everything = results["n-samples"].get(score.task, {}).get("original", score.documents)
        if score.documents < everything:
            documents += f" of {everything}"
        rows.append((score.task, score.metric, _four_digits(score.value), stderr, documents))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _four_digits(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3e}"


def _conditions(config: NeoXConfig, tokenizer: Tokenizer, groups: ProcessGroups) -> dict[str, Any]:
    """What the scores are of and depend on. `config` has the keys of upstream's results files."""
    return {
        "config": {
            "model": "neox",
            "model_args": {"load": config.load, "iteration": config.iteration},
            "batch_size": config.train_micro_batch_size_per_gpu,
            "device": str(groups.device),
            "use_cache": None,
            "limit": config.limit,
            "num_fewshot": config.num_fewshot,
            "bootstrap_iters": BOOTSTRAP_ITERATIONS,
            "seed": config.seed,
            "precision": config.dtype,
        },
        "tokenizer": {
            "type": tokenizer.name,
            "vocab_file": config.vocab_file,
            "vocab_size": tokenizer.vocab_size,
        },
        "grid": {"tp": groups.tp, "pp": groups.pp, "dp": groups.dp},
        "library_versions": {library: version(library) for library in LIBRARIES},
        "git_hash": _git_hash(),
    }


def _git_hash() -> str | None:
    """The commit of the code that runs; None where it is not a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None
