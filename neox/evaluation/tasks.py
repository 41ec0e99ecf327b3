"""From the names of tasks to lm-eval's task objects, with documents from local files or the hub.

Prompts, targets and metrics are those of the task definitions, lm-eval's or the user's own; for
LAMBADA and PIQA only the source of the documents is replaced, so the scores are lm-eval's.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import io
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from neox import log
from neox.config import NeoXConfig
from neox.errors import ConfigError, DataError, NeoXError
from neox.evaluation import hub
from neox.evaluation.chat import chat_template_of
from neox.evaluation.local import FILES, READERS, LocalData

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict

    from neox.evaluation.definitions import BrokenTaskError, Entry
    from neox.tokenizer.chat import ChatTemplate

    Found = dict[str, list[Entry]]  # a requested name -> the tasks that it stands for

# Whoever quotes LAMBADA means OpenAI's version; to lm-eval the name stands for two versions.
ALIASES = {"lambada": "lambada_openai"}


def load_tasks(config: NeoXConfig) -> TaskDict:
    """lm-eval's tasks and groups for `eval_tasks`, with their documents. Not collective.

    ConfigError for a name that no task has, and for a definition of the user's or a chat template
    that is unusable; DataError for documents that are missing, damaged, or not those that were
    published.
    """
    from neox.evaluation.definitions import Factory, read_own

    chat = chat_template_of(config)
    folder = _folder("eval_data_dir", config.eval_data_dir)
    own_folder = _folder("include_path", config.include_path)
    own = {} if own_folder is None else read_own(own_folder)
    manager, found = _find(config.eval_tasks or list(READERS), own, own_folder)
    names = {entry.name for entries in found.values() for entry in entries}
    local = _read_local(folder, names - own.keys(), config.eval_own_documents)
    if not config.eval_tasks:
        found = {name: found[name] for name in found if name in local} or found
        log.info(f"no eval_tasks given: evaluating {', '.join(found)}")
    _tell(found, own, _ask_hub(found, local))

    manager._factory = Factory(local, config.num_fewshot)
    tasks: TaskDict = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in found:
        loaded = _load(manager, name, own, folder)
        tasks["tasks"].update(loaded["tasks"])
        tasks["groups"].update(loaded["groups"])
        tasks["group_map"].update(loaded["group_map"])
    for name, task in tasks["tasks"].items():
        if name in local:
            _attach(name, task, local[name])
        _set_fewshot(task, config.num_fewshot)
        _check(name, task, config, chat)
    return tasks


def local_data(task: Task) -> LocalData | None:
    """The local files that a task of `load_tasks` has its documents from; None if from elsewhere.

    Those that the user's own definitions name are elsewhere.
    """
    return getattr(task, "neox_local_data", None)


def match_names(requested: Sequence[str], known: Sequence[str]) -> list[str]:
    """The known names that the requested ones and their wildcards stand for, each once, in order.

    ConfigError for one that stands for none, with the nearest names.
    """
    names: dict[str, None] = {}
    for name in requested:
        matches = [name] if name in known else fnmatch.filter(known, name)
        if not matches:
            raise ConfigError(f"eval_tasks: lm-eval has no task {name!r}; {_hint(name, known)}")
        names.update(dict.fromkeys(matches))
    return list(names)


def _hint(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them"


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Keep what lm-eval and datasets print, and their progress bars, from the console."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _folder(key: str, value: str | None) -> Path | None:
    if value and not Path(value).is_dir():
        raise DataError(f"{key}: {value} is not a folder")
    return Path(value) if value else None


def _find(
    requested: Sequence[str], own: Mapping[str, Path], own_folder: Path | None
) -> tuple[TaskManager, Found]:
    """lm-eval's index, and what the requested names and wildcards stand for. ConfigError."""
    from neox.evaluation import definitions

    names = [name if name in own else ALIASES.get(name, name) for name in requested]
    with silenced():  # lm-eval warns of every name that is defined anew
        manager = definitions.index(own_folder, whole=False)
    tasks = definitions.tasks_of(manager.task_index, names)
    if not all(map(definitions.is_complete, tasks)):
        log.info("looking through lm-eval's task definitions")
        with silenced():
            manager = definitions.index(own_folder, whole=True)
    found: Found = {}
    for name in match_names(names, manager.all_tasks):
        found[name] = list(definitions.tasks_of(manager.task_index, [name]))
        for entry in found[name]:
            if not definitions.is_complete(entry):
                hint = _hint(entry.name, manager.all_tasks)
                raise ConfigError(
                    f"eval_tasks: {name} is a group, and lm-eval has no task {entry.name!r} that "
                    f"it names; {hint}"
                )
    return manager, found


def _ask_hub(found: Found, local: Collection[str]) -> set[str]:
    """Which names may need the Hugging Face hub. Its libraries are kept off it if it is in vain."""
    from neox.evaluation.definitions import may_need_hub

    remote = {
        name
        for name, entries in found.items()
        if any(entry.name not in local and may_need_hub(entry) for entry in entries)
    }
    hub.set_offline(not remote or not hub.is_reachable())
    return remote


def _tell(found: Found, own: Mapping[str, Path], remote: Collection[str]) -> None:
    """Which tasks the user defined, and which may take a while."""
    for name, entries in found.items():
        defined = [task for task in (name, *(entry.name for entry in entries)) if task in own]
        for task in dict.fromkeys(defined):
            log.info(f"{task}: as {own[task]} defines it")
        if name in remote and not defined:
            log.info(f"{name}: documents from the Hugging Face hub or its cache")


def _read_local(
    folder: Path | None, names: Collection[str], own_documents: bool
) -> dict[str, LocalData]:
    """The data of those tasks whose files are there."""
    if folder is None:
        return {}
    found = {}
    for task, read in READERS.items():
        if task in names and (data := read(folder, own_documents)):
            found[task] = data
    return found


def _load(
    manager: TaskManager, name: str, own: Mapping[str, Path], folder: Path | None
) -> TaskDict:
    from neox.evaluation.definitions import BrokenTaskError, reason

    logging.disable(logging.ERROR)  # what datasets logs before it raises goes past `silenced`
    try:
        with silenced():
            return manager.load(name)
    except NeoXError:
        raise
    except BrokenTaskError as error:
        raise DataError(_explain(error, own, folder)) from error
    except Exception as error:  # a group's definition may be wrong in any way
        source = own.get(name, "lm-eval's definition")
        raise DataError(f"{name}: {source} makes no task ({reason(error)})") from error
    finally:
        logging.disable(logging.NOTSET)


def _explain(error: BrokenTaskError, own: Mapping[str, Path], folder: Path | None) -> str:
    name = error.entry.name
    if name in own:
        return f"{name}: {own[name]} makes no task ({error.reason})"
    text = f"{name}: its documents could not be had from the Hugging Face hub ({error.reason})"
    if name not in FILES:
        return f"{text}; run where there is a network, or where they are in the hub's cache"
    if folder is None:
        return f"{text}; set eval_data_dir to a folder and put into it {FILES[name]}"
    return f"{text}; put into {folder} (eval_data_dir) {FILES[name]}"


def _attach(name: str, task: Task, data: LocalData) -> None:
    task.neox_local_data = data
    remark = "" if data.published else ", not the published ones"
    log.info(f"{name}: {len(task.eval_docs)} documents in {data.path}{remark}")


def _check(name: str, task: Task, config: NeoXConfig, chat: ChatTemplate | None) -> None:
    """Find out before hours of training what would end them. ConfigError, DataError.

    A task that generates must leave room for a prompt, and the first document must become a prompt.
    """
    from neox.evaluation.adapter import generation_options
    from neox.evaluation.definitions import reason

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
            task.build_all_requests(
                limit=1,
                system_instruction=config.system_instruction,
                apply_chat_template=chat is not None,
                fewshot_as_multiturn=config.fewshot_as_multiturn,
                chat_template=chat.prompt if chat else None,
            )
            seed_fewshot(task)
    except Exception as error:  # a task's templates and code may fail in any way
        raise DataError(
            f"{name}: no prompt can be made of its first document ({reason(error)})"
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
