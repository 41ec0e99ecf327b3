"""Whether the files that a run will open are there."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

from neox.config.config import NeoXConfig
from neox.config.draft import Problem
from neox.config.values import listed, show

_SHOWN = 8
_NO_VOCAB_FILE = ("CharLevelTokenizer", "TiktokenTokenizer")  # tiktoken's names an encoding


def check_files(config: NeoXConfig, purpose: str) -> list[Problem]:
    """What is missing for `purpose` ("train", "generate" or "evaluate") on this machine."""
    found = list(_tokenizer(config))
    if purpose == "train":
        found += _data(config)
        for key in ("save", "log_dir", "tensorboard_dir"):
            found += _folder(key, getattr(config, key))
    if config.load is not None:
        found += _checkpoint(config, purpose)
    if purpose == "generate" and config.text_gen_type == "input-file" and config.sample_input_file:
        found += _file("sample_input_file", config.sample_input_file)
    if purpose == "evaluate" and config.eval_data_dir is not None:
        found += _folder("eval_data_dir", config.eval_data_dir, must_exist=True)
    return [Problem(message, config.origin(key), key) for key, message in found]


def _tokenizer(config: NeoXConfig) -> Iterator[tuple[str, str]]:
    if config.tokenizer_type in _NO_VOCAB_FILE:
        return
    folder_will_do = config.tokenizer_type == "HFGPT2Tokenizer"
    if config.vocab_file is not None and not (folder_will_do and Path(config.vocab_file).is_dir()):
        yield from _file("vocab_file", config.vocab_file)
    if config.merge_file is not None and config.tokenizer_type == "GPT2BPETokenizer":
        yield from _file("merge_file", config.merge_file)


def _file(key: str, value: str) -> Iterator[tuple[str, str]]:
    path = Path(value)
    if path.is_dir():
        yield key, f"{key} is {show(value)}, but that is a folder.{_contents(path)}"
    elif not path.exists():
        yield key, f"{key} is {show(value)}, but there is no such file.{_near(path)}"


def _folder(key: str, value: str | None, *, must_exist: bool = False) -> Iterator[tuple[str, str]]:
    path = Path(value or "")
    if path.exists() and not path.is_dir():
        yield key, f"{key} is {show(value)}, but that is a file. Name a folder."
    elif must_exist and not path.exists():
        yield key, f"{key} is {show(value)}, but there is no such folder.{_near(path)}"


def _data(config: NeoXConfig) -> Iterator[tuple[str, str]]:
    if config.data_path is not None:
        yield from _dataset("data_path", f"data_path is {show(config.data_path)}", config.data_path)
    for split in ("train", "valid", "test"):
        key = f"{split}_data_paths"
        for path in dict.fromkeys(getattr(config, key) or []):
            yield from _dataset(key, f"{key} holds {show(path)}", path)


def _dataset(key: str, opening: str, prefix: str) -> Iterator[tuple[str, str]]:
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
        return f"There is no folder {folder}."
    others = sorted(file.stem for file in folder.glob("*.bin"))
    where = "the current folder" if folder == Path() else str(folder)
    return f"In {where} there is {_some(others) if others else 'no dataset'}."


def _checkpoint(config: NeoXConfig, purpose: str) -> Iterator[tuple[str, str]]:
    """A checkpoint must be there, except that training may begin without one."""
    assert config.load is not None, "the caller looked"
    folder = Path(config.load)
    needed = purpose != "train" or config.finetune or config.iteration is not None
    said = f"load is {show(config.load)}, but"
    if not folder.is_dir():
        if needed or folder.exists():
            what = "that is not a folder" if folder.exists() else "there is no such folder"
            yield "load", f"{said} {what}.{_near(folder)}"
        return
    steps = _steps(folder)
    if config.iteration is not None:
        if not (folder / f"global_step{config.iteration}").is_dir():
            yield (
                "iteration",
                f"iteration is {config.iteration}, but {folder} holds no "
                f"global_step{config.iteration}.{_has(folder, steps)}",
            )
        return
    if not needed or (folder / "latest").is_file():
        return
    if folder.name.startswith("global_step"):
        step = folder.name.removeprefix("global_step")
        yield (
            "load",
            f"{said} that is one step of a checkpoint folder. Use {show(str(folder.parent))} with "
            f"iteration: {step}.",
        )
    elif steps:
        yield (
            "load",
            f"{said} it has no file `latest`.{_has(folder, steps)} Choose one with --iteration "
            f"{steps[-1].removeprefix('global_step')}.",
        )
    else:
        yield "load", f"{said} it holds no checkpoint.{_contents(folder)}"


def _steps(folder: Path) -> list[str]:
    def number(name: str) -> int:
        digits = name.removeprefix("global_step")
        return int(digits) if digits.isdigit() else -1

    names = [path.name for path in folder.glob("global_step*") if path.is_dir()]
    return sorted(names, key=number)


def _has(folder: Path, steps: list[str]) -> str:
    return f" It holds {_some(steps)}." if steps else _contents(folder)


def _contents(folder: Path) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    return f" It holds {_some(names)}." if names else " It is empty."


def _some(names: list[str]) -> str:
    if len(names) <= _SHOWN:
        return listed(names, "and")
    return f"{', '.join(names[:_SHOWN])} and {len(names) - _SHOWN} more"


def _near(path: Path) -> str:
    """The nearest name in the same folder, or the part of the path that is missing."""
    if path.parent.is_dir():
        names = [entry.name for entry in path.parent.iterdir()]
        near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.7)
        return f" Did you mean {show(str(path.with_name(near[0])))}?" if near else ""
    missing = path.parent
    while not missing.parent.is_dir():
        missing = missing.parent
    return f" There is no folder {missing}."
