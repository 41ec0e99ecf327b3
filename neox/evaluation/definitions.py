"""Definitions of tasks, lm-eval's and the user's own: YAML files, found by the names in them.

Prompts, targets and metrics are what a definition says; for LAMBADA and PIQA the source of the
documents is replaced by local files.
"""

from __future__ import annotations

import functools
import glob
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval.tasks
import lm_eval.utils
from datasets import Dataset, DatasetDict
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as FILE_FORMATS
from lm_eval.api.registry import get_metric, metric_registry
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml

from neox.errors import ConfigError, DataError, NeoXError
from neox.evaluation.local import LocalData

Index = dict[str, Entry]
QUICK = ("lambada", "piqa")  # folders of lm-eval's that are always indexed


def read_own(folder: Path) -> dict[str, Path]:
    """The names of the tasks and groups that a folder's YAML files define, and where.

    ConfigError for a file that defines nothing that can be read, and for a name that two of them
    define: lm-eval would leave them out without a word.
    """
    own: dict[str, Path] = {}
    files = list(TaskIndex._iter_yaml_files(folder))
    if not files:
        raise ConfigError(
            f"include_path: no file in {folder} ends in .yaml, as definitions of tasks have to"
        )
    for path in files:
        try:
            definition = load_yaml(path, resolve_func=False)
        except Exception as error:  # of YAML's kinds, or because of a file that it includes
            raise ConfigError(f"include_path: {path} cannot be read ({_place(error)})") from error
        key = "group" if "group" in definition and "class" not in definition else "task"
        if not definition.keys() & {"task", "group", "class"}:
            continue  # a template, for others to include
        name = definition.get(key)
        if not isinstance(name, str):
            raise ConfigError(f"include_path: {path}: {key} has to be a name, it is {name!r}")
        if key == "group" and not isinstance(definition.get("task"), list):
            raise ConfigError(
                f"include_path: {path}: the group {name} has no list of tasks; a task that belongs "
                "to others says tag: instead of group:"
            )
        if name in own:
            raise ConfigError(
                f"include_path: {name} is defined in {own[name]} and in {path}: rename one of them"
            )
        own[name] = path
    return own


def index(folder: Path | None, whole: bool) -> TaskManager:
    """lm-eval's index of definitions, where those in `folder` win over its own of the same name.

    Its own 14,000 take seconds; unless `whole`, they are LAMBADA and PIQA only.
    """
    # lm-eval compiles a prompt's template anew for each document: 20 seconds for LAMBADA.
    templates = lm_eval.utils.env
    if not hasattr(templates.from_string, "cache_info"):
        templates.from_string = functools.cache(templates.from_string)

    own = [] if folder is None else [folder]
    if whole:
        return TaskManager(include_path=own)
    shipped = Path(lm_eval.tasks.__file__).parent
    return TaskManager(
        include_defaults=False, include_path=[*(shipped / name for name in QUICK), *own]
    )


def tasks_of(
    known: Index,
    members: Iterable[Any],
    changes: Mapping[str, Any] | None = None,
    above: tuple[str, ...] = (),
) -> Iterator[Entry]:
    """The tasks that names, or members of a group, stand for, down through groups and tags.

    `cfg` of each is its definition with what the groups `above` change in it; nothing else for an
    unknown name. ConfigError for a group within itself.
    """
    for member in members:
        own = member if isinstance(member, dict) else {}
        name = own.get("group") or own.get("task") if own else member
        if name in above:
            raise ConfigError(f"eval_tasks: the group {name} contains itself")
        changed = {**(changes or {}), **own}
        entry = known.get(name) if isinstance(name, str) else None
        if entry is None and isinstance(own.get("task"), list):  # a group defined in place
            yield from tasks_of(known, own["task"], changes, above)
        elif entry is None:
            yield Entry(str(name), Kind.TASK, None, changed)
        elif entry.kind is Kind.TAG:
            yield from tasks_of(known, sorted(entry.tags), changed, above)
        elif entry.kind is Kind.GROUP:
            group = dict(entry.cfg or {})
            inner = group.pop("task", None) or []
            yield from tasks_of(known, inner, {**group, **changed}, (*above, entry.name))
        else:
            yield replace(entry, cfg={**(entry.cfg or {}), **changed})


def is_complete(entry: Entry) -> bool:
    """Whether an entry of `tasks_of` says what is asked, or is only a name."""
    return entry.yaml_path is not None or "dataset_path" in (entry.cfg or {})


def may_need_hub(entry: Entry) -> bool:
    """Whether making a task may ask for documents or a metric that are not on this machine."""
    definition = _beside(entry.cfg or {}, entry.yaml_path)
    if entry.kind is Kind.PY_TASK or definition.get("custom_dataset"):
        return True  # code of its own
    source = definition.get("dataset_path")
    if source in FILE_FORMATS:
        remote = "://" in str(definition.get("dataset_kwargs"))
    else:
        remote = not source or not Path(source).is_dir()
    # What lm-eval has no metric for it looks for on the hub.
    metrics = [] if definition.get("process_results") else definition.get("metric_list") or []
    return remote or not all(
        isinstance(metric, dict)
        and str(metric.get("metric")) in metric_registry
        and not metric.get("hf_evaluate")
        for metric in metrics
    )


class BrokenTaskError(Exception):
    """No task could be made of the definition `entry`, because of `reason`."""

    def __init__(self, entry: Entry, error: Exception) -> None:
        self.entry = entry
        self.reason = reason(error)
        splits = [value for key, value in (entry.cfg or {}).items() if key.endswith("_split")]
        if isinstance(error, KeyError) and error.args[0] in splits:
            self.reason = f"its documents have no split {error.args[0]!r}"
        super().__init__(self.reason)


class Factory(TaskFactory):
    """Makes tasks as lm-eval does, with the documents of `local` under the names of their tasks.

    Files that a definition names are looked for beside it.
    """

    def __init__(self, local: Mapping[str, LocalData], num_fewshot: int | None) -> None:
        super().__init__()
        self._local = local
        self._num_fewshot = num_fewshot

    def _build_task(self, entry: Entry, overrides: dict[str, Any] | None) -> Task:
        try:
            return super()._build_task(entry, overrides)
        except NeoXError:
            raise
        except Exception as error:  # a definition, its code and datasets may fail in any way
            raise BrokenTaskError(entry, error) from error

    def _load_full_config(
        self, entry: Entry, overrides: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        definition = super()._load_full_config(entry, overrides)
        _check_metrics(entry.name, definition)
        if entry.name in self._local and entry.kind is Kind.TASK:
            return self._over(entry.name, definition)
        return _beside(definition, entry.yaml_path)

    def _over(self, name: str, definition: dict[str, Any]) -> dict[str, Any]:
        """The definition, but of our documents."""
        data = self._local[name]
        training = definition.get("training_split")
        if training and training not in data.splits:
            if self._num_fewshot or definition.get("num_fewshot"):
                raise DataError(
                    f"{name}: few-shot examples come from its training set: put train.jsonl and "
                    f"train-labels.lst into {data.path.parent}"
                )
            definition["training_split"] = None
        splits = DatasetDict(
            {split: Dataset.from_list(docs) for split, docs in data.splits.items()}
        )
        return definition | {
            "dataset_path": str(data.path),
            "dataset_name": None,
            "custom_dataset": lambda **metadata: splits,
        }


def reason(error: Exception) -> str:
    """What went wrong, in one line."""
    if type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__  # datasets only says that it failed
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _check_metrics(name: str, definition: dict[str, Any]) -> None:
    """ConfigError for a metric that does not exist, which lm-eval finds out when all is scored."""
    if definition.get("process_results"):
        return  # the metrics are code of its own
    for item in definition.get("metric_list") or []:
        metric = item.get("metric") if isinstance(item, dict) else None
        if isinstance(metric, str) and get_metric(metric, item.get("hf_evaluate", False)) is None:
            raise ConfigError(
                f"eval_tasks: {name} asks for {metric!r}, and there is no such metric"
            )


def _place(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return str(error).split("\n")[0]
    return f"line {mark.line + 1}: {getattr(error, 'problem', None)}"


def _beside(definition: dict[str, Any], path: Path | None) -> dict[str, Any]:
    """The definition with its relative names of local files made relative to its own file.

    lm-eval has them relative to the working directory, where they are left if they are only there.
    """
    if path is None:
        return definition
    definition = dict(definition)
    source, arguments = definition.get("dataset_path"), definition.get("dataset_kwargs")
    if source in FILE_FORMATS and isinstance(arguments, dict):
        definition["dataset_kwargs"] = {
            key: _locate(value, path.parent) if key in ("data_files", "data_dir") else value
            for key, value in arguments.items()
        }
    elif source and source not in FILE_FORMATS and (path.parent / source).is_dir():
        definition["dataset_path"] = str(path.parent / source)
    if isinstance(definition.get("task"), list):  # a group, which may define tasks in place
        definition["task"] = [
            _beside(member, path) if isinstance(member, dict) else member
            for member in definition["task"]
        ]
    return definition


def _locate(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {key: _locate(inner, folder) for key, inner in value.items()}
    if isinstance(value, list):
        return [_locate(inner, folder) for inner in value]
    if not isinstance(value, str) or "://" in value or value.startswith(("/", "~")):
        return value
    elsewhere = not glob.glob(str(folder / value), recursive=True)
    return value if elsewhere and glob.glob(value, recursive=True) else str(folder / value)
