"""From the names of tasks to lm-eval's task objects, with documents from local files or the hub.

Prompts, targets and metrics are those of the installed lm-eval's own task definitions; for LAMBADA
and PIQA only the source of the documents is replaced, so the scores are lm-eval's.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import functools
import io
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neox import log
from neox.config import NeoXConfig
from neox.errors import ConfigError, DataError
from neox.evaluation.local import FILES, READERS, LocalData

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict

# Whoever quotes LAMBADA means OpenAI's version; to lm-eval the name stands for two versions.
ALIASES = {"lambada": "lambada_openai"}
OFFLINE_SWITCHES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
HUB_TIMEOUT_S = 5.0


def load_tasks(config: NeoXConfig) -> TaskDict:
    """lm-eval's tasks and groups for `eval_tasks`, with their documents. Not collective.

    ConfigError for a name that no task has; DataError for documents that are missing or damaged.
    """
    folder = Path(config.eval_data_dir) if config.eval_data_dir else None
    if folder is not None and not folder.is_dir():
        raise DataError(f"eval_data_dir: {folder} is not a folder")
    requested = [ALIASES.get(name, name) for name in config.eval_tasks or READERS]
    local = {} if folder is None else _read_local(folder, requested)
    if not config.eval_tasks:
        requested = list(local) or requested
        log.info(f"no eval_tasks given: evaluating {', '.join(requested)}")
    if all(name in local for name in requested) or not _hub_is_reachable():
        # Read by the libraries when they are first imported, below.
        os.environ.update(dict.fromkeys(OFFLINE_SWITCHES, "1"))

    manager = _task_manager(whole=not all(name in READERS for name in requested))
    tasks: TaskDict = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in match_names(requested, manager.all_tasks):
        if name in local:
            loaded = _load_local(manager, name, local[name], config)
        else:
            loaded = _load_from_hub(manager, name, folder)
        tasks["tasks"].update(loaded["tasks"])
        tasks["groups"].update(loaded["groups"])
        tasks["group_map"].update(loaded["group_map"])
    for name, task in tasks["tasks"].items():
        _set_fewshot(task, config.num_fewshot)
        _check(name, task, config)
    return tasks


def match_names(requested: Sequence[str], known: Sequence[str]) -> list[str]:
    """The known names that the requested ones and their wildcards stand for, each once, in order.

    ConfigError for one that stands for none, with the nearest names.
    """
    names: dict[str, None] = {}
    for name in requested:
        matches = [name] if name in known else fnmatch.filter(known, name)
        if not matches:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
            raise ConfigError(f"eval_tasks: lm-eval has no task {name!r}; {hint}")
        names.update(dict.fromkeys(matches))
    return list(names)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Keep what lm-eval and datasets print, and their progress bars, from the console."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _read_local(folder: Path, requested: Sequence[str]) -> dict[str, LocalData]:
    """The data of those requested tasks whose files are there."""
    found = {}
    for task, read in READERS.items():
        if any(fnmatch.fnmatch(task, name) for name in requested) and (data := read(folder)):
            found[task] = data
    return found


def _task_manager(whole: bool) -> TaskManager:
    """lm-eval's index of its task definitions: all 14,000 take seconds, ours an instant."""
    import lm_eval.tasks
    import lm_eval.utils

    # lm-eval compiles a prompt's template anew for each document: 20 seconds for LAMBADA.
    templates = lm_eval.utils.env
    if not hasattr(templates.from_string, "cache_info"):
        templates.from_string = functools.cache(templates.from_string)

    if whole:
        log.info("looking through lm-eval's task definitions")
        return lm_eval.tasks.TaskManager()
    definitions = Path(lm_eval.tasks.__file__).parent
    return lm_eval.tasks.TaskManager(
        include_defaults=False, include_path=[definitions / "lambada", definitions / "piqa"]
    )


def _load_local(manager: TaskManager, name: str, data: LocalData, config: NeoXConfig) -> TaskDict:
    """lm-eval's task `name` over our documents."""
    from datasets import Dataset, DatasetDict
    from lm_eval.api.task import ConfigurableTask

    definition: dict[str, Any] = dict(manager.task_index[name].cfg or {})
    training = definition.get("training_split")
    if training and training not in data.splits:
        if config.num_fewshot:
            raise DataError(
                f"{name}: few-shot examples come from its training set: put train.jsonl and "
                f"train-labels.lst into {data.path.parent}"
            )
        definition["training_split"] = None
    splits = DatasetDict({split: Dataset.from_list(docs) for split, docs in data.splits.items()})
    definition |= {
        "dataset_path": str(data.path),
        "dataset_name": None,
        "custom_dataset": lambda **metadata: splits,
    }
    with silenced():
        task = ConfigurableTask(config=definition)
    log.info(f"{name}: {len(task.eval_docs)} documents in {data.path}")
    return manager.load(task)


def _load_from_hub(manager: TaskManager, name: str, folder: Path | None) -> TaskDict:
    log.info(f"{name}: documents from the Hugging Face hub or its cache")
    try:
        with silenced():
            return manager.load(name)
    except Exception as error:  # datasets and the hub raise dozens, none of which says what to do
        reason = str(error).split("\n")[0]
        raise DataError(_missing(name, folder, reason)) from error


def _missing(name: str, folder: Path | None, reason: str) -> str:
    text = f"{name}: its documents could not be had from the Hugging Face hub ({reason})"
    if name not in FILES:
        return f"{text}; run where there is a network, or where they are in the hub's cache"
    if folder is None:
        return f"{text}; set eval_data_dir to a folder and put into it {FILES[name]}"
    return f"{text}; put into {folder} (eval_data_dir) {FILES[name]}"


def _check(name: str, task: Task, config: NeoXConfig) -> None:
    """Find out before hours of training what would end them. ConfigError, DataError.

    A task that generates must leave room for a prompt, and the first document must become a prompt.
    """
    from neox.evaluation.adapter import generation_options

    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(
            f"eval_tasks: {name} runs the code that the model writes, which is unsafe"
        )
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(
            f"eval_tasks: {name} asks about images or sounds, and the model reads text"
        )
    try:
        if task.OUTPUT_TYPE == "generate_until":
            generation_options(task.get_config("generation_kwargs"), config.seq_length)
    except ConfigError as error:
        raise ConfigError(f"eval_tasks: {name}: {error}") from None
    try:
        with silenced():
            task.build_all_requests(limit=1)
            seed_fewshot(task)
    except Exception as error:  # a task's templates and code may fail in any way
        reason = str(error).split("\n")[0]
        raise DataError(
            f"{name}: no prompt can be made of its first document ({reason})"
        ) from error


def _set_fewshot(task: Task, num_fewshot: int | None) -> None:
    """Give a task its number of examples as lm-eval does: one that is defined as 0 stays 0."""
    if num_fewshot is not None and task.get_config("num_fewshot") != 0:
        task.set_config("num_fewshot", num_fewshot)
    elif task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    seed_fewshot(task)


def seed_fewshot(task: Task) -> None:
    """Let a task draw its examples from the beginning, the same that lm-eval itself draws."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    task.set_fewshot_seed(DEFAULT_OTHER_SEED)


def _hub_is_reachable() -> bool:
    """One quick question, since the hub's client asks for half a minute before it gives up."""
    if any(os.environ.get(name, "0") not in ("", "0") for name in OFFLINE_SWITCHES):
        return False
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(
            urllib.request.Request(address, method="HEAD"), timeout=HUB_TIMEOUT_S
        ):
            return True
    except urllib.error.HTTPError:
        return True  # it answered
    except OSError:
        return False
