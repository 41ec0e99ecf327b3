"""Whether the files that a run will open are there."""

from __future__ import annotations

import difflib
import glob
from pathlib import Path

from neox.config.checks import Findings
from neox.config.config import NeoXConfig
from neox.config.draft import Problem
from neox.config.hf import is_transformers
from neox.config.mesh import is_mesh
from neox.config.values import listed, show

_SHOWN = 8
_NO_VOCAB_FILE = ("CharLevelTokenizer", "TiktokenTokenizer")  # tiktoken's names an encoding


def check_files(config: NeoXConfig, purpose: str) -> list[Problem]:
    """What is missing for `purpose` (a Purpose of neox.config.load) on this machine."""
    problems = []
    for look in (
        *(look(config) for look in _LOOKS[purpose]),
        _checkpoint(config, purpose),
        _adapter(config),
    ):
        try:
            problems += [Problem(text, config.origin(key), key) for key, text in look]
        except OSError as error:  # a name that is too long, a folder that may not be entered
            problems.append(Problem(f"{error.filename} cannot be read: {error.strerror}."))
    return problems


def _for_training(config: NeoXConfig) -> Findings:
    if config.data_path is not None:
        yield from _dataset("data_path", f"data_path is {show(config.data_path)}", config.data_path)
    for split in ("train", "valid", "test"):
        for key in (f"{split}_data_paths", f"{split}_label_data_paths"):
            for path in dict.fromkeys(_read(config, split, getattr(config, key) or [])):
                yield from _dataset(key, f"{key} holds {show(path)}", path)
    for key in ("finetune_data", "finetune_valid_data"):
        yield from _examples(key, getattr(config, key) or [])
    if config.finetune_data and config.chat_template_path is not None:
        yield from _folder("chat_template_path", config.chat_template_path, must_exist=True)
    for key in ("save", "log_dir", "tensorboard_dir"):
        yield from _folder(key, getattr(config, key))
    if config.eval_tasks:
        yield from _for_evaluation(config)


def _read(config: NeoXConfig, split: str, paths: list[str]) -> list[str]:
    """Those of a split's datasets, or of their labels, that are not left out by a weight of 0."""
    weights = getattr(config, f"{split}_data_weights")
    if weights is None or config.weight_by_num_documents:
        return paths
    # Lengths that differ are a problem of their own.
    return [path for path, weight in zip(paths, weights, strict=False) if weight > 0]


def _for_generation(config: NeoXConfig) -> Findings:
    if config.text_gen_type == "input-file" and config.sample_input_file is not None:
        yield from _file("sample_input_file", config.sample_input_file)


def _for_evaluation(config: NeoXConfig) -> Findings:
    names = ["eval_data_dir", "include_path"]
    names += ["chat_template_path"] * config.apply_chat_template
    for name in names:
        if getattr(config, name) is not None:
            yield from _folder(name, getattr(config, name), must_exist=True)


def _for_serving(config: NeoXConfig) -> Findings:
    if config.chat_template_path is not None:
        yield from _folder("chat_template_path", config.chat_template_path, must_exist=True)
    if config.serve_api_keys_file is not None:
        yield from _file("serve_api_keys_file", config.serve_api_keys_file)
    for name, folder in (config.adapters or {}).items():
        if isinstance(folder, str):  # another check says what else it is
            yield from _folder(f"adapters.{name}", folder, must_exist=True)


def _tokenizer(config: NeoXConfig) -> Findings:
    if config.tokenizer_type in _NO_VOCAB_FILE:
        return
    folder_will_do = config.tokenizer_type == "HFGPT2Tokenizer"
    if config.vocab_file is not None and not (folder_will_do and Path(config.vocab_file).is_dir()):
        yield from _file("vocab_file", config.vocab_file)
    if config.merge_file is not None and config.tokenizer_type == "GPT2BPETokenizer":
        yield from _file("merge_file", config.merge_file)


# What each purpose opens besides the checkpoint; `logits` starts from token ids.
_LOOKS = {
    "train": (_tokenizer, _for_training),
    "generate": (_tokenizer, _for_generation),
    "evaluate": (_tokenizer, _for_evaluation),
    "serve": (_tokenizer, _for_serving),
    "logits": (),
}


def _file(key: str, value: str) -> Findings:
    path = Path(value)
    if path.is_dir():
        yield key, f"{key} is {show(value)}, but that is a folder.{_inside(path)}"
    elif not path.exists():
        yield key, f"{key} is {show(value)}, but there is no such file.{_near(path)}"


def _folder(key: str, value: str | None, *, must_exist: bool = False) -> Findings:
    path = Path(value or "")
    if path.exists() and not path.is_dir():
        yield key, f"{key} is {show(value)}, but that is a file. Name a folder."
    elif must_exist and not path.exists():
        yield key, f"{key} is {show(value)}, but there is no such folder.{_near(path)}"


def _examples(key: str, named: str | list[str]) -> Findings:
    for name in [named] if isinstance(named, str) else named:
        path = Path(name)
        if path.exists():
            continue
        if not glob.has_magic(name):
            yield key, f"{key} names {show(name)}, but there is no such file.{_near(path)}"
        elif not glob.glob(name, recursive=True):
            yield key, f"{key} names {show(name)}, but no file's name is like that."


def _dataset(key: str, opening: str, prefix: str) -> Findings:
    files = [Path(f"{prefix}.bin"), Path(f"{prefix}.idx")]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        verb = "does" if len(missing) == 1 else "do"
        problem = f"{listed(missing, 'and')} {verb} not exist."
        yield key, f"{opening}, but {problem} {_dataset_hint(prefix)}"


def _dataset_hint(prefix: str) -> str:
    for ending in (".bin", ".idx"):
        if prefix.endswith(ending) and Path(prefix).is_file():
            return f"Leave {ending} off: {show(prefix.removesuffix(ending))}."
    if Path(f"{prefix}_text_document.bin").is_file():
        return f"Did you mean {show(prefix + '_text_document')}?"
    folder = Path(prefix).parent
    if not folder.is_dir():
        return f"There is no folder {_first_missing(folder)}."
    others = sorted(file.stem for file in folder.glob("*.bin"))
    where = "the current folder" if folder == Path() else str(folder)
    return f"In {where} there is {_some(others) if others else 'no dataset'}."


def _checkpoint(config: NeoXConfig, purpose: str) -> Findings:
    """A checkpoint must be there, except that training may begin without one."""
    if config.load is None:
        return
    folder = Path(config.load)
    needed = purpose != "train" or config.finetune or config.iteration is not None
    needed = needed or config.lora is not None
    if folder.exists() and not folder.is_dir():
        yield "load", f"load is {show(config.load)}, but that is not a folder."
    elif needed and not folder.exists():
        yield "load", f"load is {show(config.load)}, but there is no such folder.{_near(folder)}"
    elif config.iteration is not None:
        step = f"global_step{config.iteration}"
        if not (folder / step).is_dir():
            said = f"iteration is {config.iteration}, but {folder} holds no {step}."
            yield "iteration", f"{said}{_inside(folder)}"
    elif needed and not is_transformers(folder) and not _is_step(folder):
        yield from _latest(config.load, folder)


def _adapter(config: NeoXConfig) -> Findings:
    if config.adapter is not None:
        yield from _folder("adapter", config.adapter, must_exist=True)


def _is_step(folder: Path) -> bool:
    """Whether a folder is itself one checkpoint, not a folder of them."""
    patterns = ("layer_*-model_*-model_states.pt", "mp_rank_*_model_states.pt")
    return is_mesh(folder) or any(any(folder.glob(pattern)) for pattern in patterns)


def _latest(load: str, folder: Path) -> Findings:
    """Without an iteration, the file `latest` names the step."""
    said = f"load is {show(load)}, but"
    pointer = folder / "latest"
    steps = _steps(folder)
    if pointer.is_file():
        step = pointer.read_text(errors="replace").strip()
        if not (folder / step).is_dir():
            yield (
                "load",
                f"{said} its file `latest` names {show(step)}, which is not there."
                f"{_inside(folder)}",
            )
    elif steps:
        yield (
            "load",
            f"{said} it has no file `latest`.{_inside(folder)} Choose one with --iteration "
            f"{steps[-1].removeprefix('global_step')}.",
        )
    else:
        yield "load", f"{said} it holds no checkpoint.{_inside(folder)}"


def _steps(folder: Path) -> list[str]:
    def number(name: str) -> int:
        digits = name.removeprefix("global_step")
        return int(digits) if digits.isdigit() else -1

    names = [path.name for path in folder.glob("global_step*") if path.is_dir()]
    return sorted(names, key=number)


def _inside(folder: Path) -> str:
    """The steps that a folder holds, or whatever else it does."""
    everything = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    names = _steps(folder) or everything
    return f" It holds {_some(names)}." if names else " It is empty."


def _some(names: list[str]) -> str:
    if len(names) <= _SHOWN:
        return listed(names, "and")
    return f"{', '.join(names[:_SHOWN])} and {len(names) - _SHOWN} more"


def _near(path: Path) -> str:
    """The nearest name in the same folder, or the first folder of the path that is missing."""
    if path.parent.is_dir():
        names = [entry.name for entry in path.parent.iterdir()]
        near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.7)
        return f" Did you mean {show(str(path.with_name(near[0])))}?" if near else ""
    return f" There is no folder {_first_missing(path.parent)}."


def _first_missing(folder: Path) -> Path:
    while not folder.parent.is_dir():
        folder = folder.parent
    return folder
