"""Score a model on tasks, and say what was measured: on what, of what, and how."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neox import log
from neox.checkpoint.identity import weights_digest
from neox.checkpoint.manifest import digest
from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.peft import find_adapter
from neox.config import NeoXConfig
from neox.config.architecture import architecture
from neox.evaluation import answers
from neox.evaluation.answers import Answers
from neox.evaluation.chat import chat_template_of
from neox.evaluation.tasks import load_tasks, local_data, seed_fewshot, silenced
from neox.inference.stages import InferenceModel
from neox.parallel.groups import ProcessGroups
from neox.tokenizer import Tokenizer, tokenizer_digest

if TYPE_CHECKING:
    from lm_eval.tasks.manager import TaskDict

    from neox.evaluation.adapter import NeoXLM

BOOTSTRAP_ITERATIONS = 10_000  # for the standard error of metrics that have no formula for it
LIBRARIES = ("lm-eval", "torch", "datasets", "tokenizers")


def evaluate(
    config: NeoXConfig,
    load: Callable[[], InferenceModel],
    tokenizer: Tokenizer,
    groups: ProcessGroups,
    tasks: TaskDict | None = None,
    checkpoint: Checkpoint | None = None,
) -> dict[str, Any]:
    """Score a model on every document of `tasks` (default: the configuration's), or on `limit`.

    `load` is called when the model is needed, which it is not where all answers of `checkpoint` are
    known; without a checkpoint none are kept. Returns lm-eval's dictionary of results, and in it
    `n_docs` (documents scored, by task), `samples` (what was asked and answered, by task) and what
    the scores depend on. Collective over the world. Every rank gets the scores, rank 0 alone their
    standard errors.
    """
    from neox.evaluation.adapter import NeoXLM

    tasks = load_tasks(config) if tasks is None else tasks
    started = time.time()
    conditions = _conditions(config, tokenizer, groups)
    folder = None
    if checkpoint is not None:
        identity = _identity(config, checkpoint, conditions["tokenizer"]["digest"], groups)
        conditions["checkpoint"] = identity.pop("checkpoint")
        cache = answers.cache_folder(config)
        folder = cache and cache / answers.digest([identity, conditions["checkpoint"]["digest"]])
    with (
        contextlib.closing(Answers(folder)) as kept,
        log.progress(total=0, desc="evaluating", unit=" inputs") as bar,
    ):
        lm = NeoXLM(
            load,
            tokenizer,
            groups,
            config.seq_length,
            batch_size=config.eval_batch_size,
            seed=config.seed,
            chat=chat_template_of(config),
            bar=bar,
            answers=kept,
        )
        results = score(config, lm, tasks, groups, BOOTSTRAP_ITERATIONS, log_samples=True)
    local = {name: local_data(task) for name, task in tasks["tasks"].items()}
    return {
        **results,
        "n_docs": {task: count["effective"] for task, count in results["n-samples"].items()},
        **conditions,
        "data": {name: data.facts() for name, data in local.items() if data is not None},
        "answers": {
            "asked": lm.asked,
            "computed": lm.computed,
            "remembered": lm.remembered,
            "folder": str(folder) if folder else None,
        },
        "date": started,
        "duration_seconds": time.time() - started,
    }


def score(
    config: NeoXConfig,
    lm: NeoXLM,
    tasks: TaskDict,
    groups: ProcessGroups,
    bootstrap_iterations: int,
    *,
    log_samples: bool = False,
) -> dict[str, Any]:
    """lm-eval's dictionary of results. Collective over the world, as `evaluate`.

    NotFiniteError when the model's logits are not numbers.
    """
    from lm_eval import evaluator

    # lm-eval would bootstrap in forked processes, and a process with communicators cannot fork.
    os.environ["DISABLE_MULTIPROC"] = "1"
    for task in tasks["tasks"].values():  # a task draws its examples anew each time it is scored
        seed_fewshot(task)
    with silenced():
        results = evaluator.evaluate(
            lm,
            tasks,
            limit=config.limit,
            bootstrap_iters=bootstrap_iterations if groups.rank == 0 else 0,
            log_samples=log_samples,
            system_instruction=config.system_instruction,
            apply_chat_template=config.apply_chat_template,
            fewshot_as_multiturn=config.fewshot_as_multiturn,
        )
    for definition in results["configs"].values():
        definition.pop("custom_dataset", None)  # a function; dataset_path says what it read
    return results


def _conditions(config: NeoXConfig, tokenizer: Tokenizer, groups: ProcessGroups) -> dict[str, Any]:
    """What the scores are of and depend on. `config` has the keys of upstream's results files."""
    return {
        "config": {
            "model": "neox",
            "model_args": {
                "load": config.load,
                "iteration": config.iteration,
                "adapter": config.adapter,
                "load_in_8bit": config.load_in_8bit,
            },
            "batch_size": config.eval_batch_size or "auto",
            "device": str(groups.device),
            "use_cache": config.eval_use_cache,
            "limit": config.limit,
            "num_fewshot": config.num_fewshot,
            "bootstrap_iters": BOOTSTRAP_ITERATIONS,
            "seed": config.seed,
            "precision": config.dtype,
            "system_instruction": config.system_instruction,
            "apply_chat_template": config.apply_chat_template,
            "fewshot_as_multiturn": config.fewshot_as_multiturn,
        },
        "tokenizer": {
            "type": tokenizer.name,
            "vocab_file": config.vocab_file,
            "vocab_size": tokenizer.vocab_size,
            "digest": tokenizer_digest(config),
        },
        "grid": {"tp": groups.tp, "pp": groups.pp, "dp": groups.dp},
        "library_versions": {library: version(library) for library in LIBRARIES},
        "git_hash": _git_hash(),
    }


def _identity(
    config: NeoXConfig, checkpoint: Checkpoint, tokenizer: str, groups: ProcessGroups
) -> dict[str, Any]:
    """Everything that a model's answers depend on, but for rounding. Collective over the world."""
    weights = groups.gather(weights_digest(checkpoint) if groups.rank == 0 else "")[0]
    return {
        "checkpoint": {
            "folder": str(checkpoint.folder.resolve()),
            "iteration": checkpoint.iteration,
            "digest": weights,
        },
        **_treatment(config, groups),
        "architecture": architecture(config),
        "seq_length": config.seq_length,
        "precision": config.dtype,
        "tokenizer": tokenizer,
        "version": answers.VERSION,
    }


def _treatment(config: NeoXConfig, groups: ProcessGroups) -> dict[str, Any]:
    """What is done to the checkpoint's weights, if anything. Collective over the world."""
    found: dict[str, Any] = {}
    if config.load_in_8bit:
        found["load_in_8bit"] = True
    if config.adapter is not None:
        folder = groups.gather(find_adapter(Path(config.adapter)))[0]
        entries = {path.name: digest(path) for path in sorted(folder.glob("adapter_*"))}
        found["adapter"] = {name: entry.xxh128 for name, entry in entries.items()}
    return found


def _git_hash() -> str | None:
    """The commit of the code that runs; None where it is not a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None
