"""`finetune_data`: files of examples become a dataset with labels, once, and a line of report.

The dataset is an ordinary one of neox.data.indexed, in a folder `finetune_cache` beside the first
file. Its name holds a hash of all that it follows from: the files' contents, the tokenizer, and
where examples are cut.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import itertools
import json
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from neox import log
from neox.atomic import write_bytes, write_text
from neox.config import NeoXConfig
from neox.config.values import show
from neox.data.blend import open_blend
from neox.data.cache import (
    built_once,
    cache_folders,
    checksum,
    is_first_of_machine,
    is_read_only,
)
from neox.data.corpus import find_files, read_chunks
from neox.data.documents import open_documents
from neox.data.example_report import Report
from neox.data.examples import Example, ExampleEncoder
from neox.data.indexed import IndexedWriter, bin_path, idx_path
from neox.errors import DataError
from neox.parallel.groups import ProcessGroups

FOLDER = "finetune_cache"
_OURS = (FOLDER, "index_cache")  # folders that a pattern such as data/** finds, but nobody means
_VERSION = 1  # of the datasets: raise it when the same files become other tokens or labels
_DTYPE = np.dtype(np.int32)  # labels can be negative
_BLOCK = 1 << 20


class _Dataset(NamedTuple):
    text: str  # prefixes
    labels: str
    report: Report


def settle_examples(
    config: NeoXConfig, groups: ProcessGroups, encoder: ExampleEncoder, identity: Sequence[str]
) -> NeoXConfig:
    """With the datasets of `finetune_data` as train_data_paths and so on, if that is given.

    `identity` stands for what the encoder makes of a record. One validation reads each example of
    `finetune_valid_data` about once, at most 100 batches, unless eval_iters is given. Collective
    over the world: rank 0 tokenizes while the others wait. DataError for files that are missing or
    hold something else than examples, naming the line.
    """
    if not config.finetune_data:
        return config
    train_files = find_examples("finetune_data", config.finetune_data)
    train = _dataset("finetune_data", train_files, config, groups, encoder, identity)
    values: dict[str, Any] = {
        "train_data_paths": [train.text],
        "train_label_data_paths": [train.labels],
    }
    if config.finetune_valid_data:
        valid_files = find_examples("finetune_valid_data", config.finetune_valid_data)
        _warn_of_common(train_files, valid_files)
        valid = _dataset("finetune_valid_data", valid_files, config, groups, encoder, identity)
        values |= {"valid_data_paths": [valid.text], "valid_label_data_paths": [valid.labels]}
        if config.origin("eval_iters") == "default":
            once = -(-_samples(valid, config, groups) // config.train_batch_size)
            values["eval_iters"] = min(config.eval_iters, once)
    samples = _samples(train, config, groups)
    log.info(
        f"finetune_data: {samples:,} samples, {samples / config.train_batch_size:,.4g} steps an "
        f"epoch (train_batch_size {config.train_batch_size})"
    )
    origins = {**config.origins, **dict.fromkeys(values, "derived")}
    return dataclasses.replace(config, **values, origins=origins)


def _samples(dataset: _Dataset, config: NeoXConfig, groups: ProcessGroups) -> int:
    """How many there are in an epoch. Collective over the world."""
    if config.pack_impl == "unpacked":
        return dataset.report.examples
    if config.pack_impl == "packed":  # with less than one, documents are repeated within a sample
        return max(1, (dataset.report.tokens - 1) // config.seq_length)
    documents = open_documents(dataset.text, dataset.labels)
    return len(open_blend([documents], None, None, config, groups))


def _warn_of_common(train_files: Sequence[Path], valid_files: Sequence[Path]) -> None:
    trained = {file.resolve() for file in train_files}
    both = [file for file in valid_files if file.resolve() in trained]
    if both:
        more = f" and {len(both) - 1} more" * (len(both) > 1)
        log.warning(
            f"finetune_valid_data reads {both[0]}{more}, which finetune_data trains on: its losses "
            "will not tell how the model does on other texts"
        )


def find_examples(key: str, named: str | Sequence[str]) -> list[Path]:
    """The files that `key` names, in its order: files, folders' readable files, and patterns'.

    What a folder or a pattern holds comes by name; hidden files and caches are passed over.
    DataError: there are none, or one is reached twice.
    """
    names = [named] if isinstance(named, str) else named
    found: dict[Path, str] = {}
    files = []
    for name in names:
        for path in _named(key, name):
            place = path.resolve()
            if place in found:
                raise DataError(
                    f"{key} reaches {path} twice, by {show(found[place])} and by {show(name)}: an "
                    "epoch reads each file once. Keep one of them"
                )
            found[place] = name
            files.append(path)
    return files


def _named(key: str, name: str) -> list[Path]:
    path = Path(name)
    try:
        if path.is_file():
            return find_files([path], any_name=True)
        if path.is_dir():
            files = [file for file in find_files([path]) if _is_meant(file)]
            others = [file for file in path.iterdir() if file not in files and _is_meant(file)]
            if others:
                log.info(
                    f"{key}: {len(others)} of the files in {path} are not read, such as "
                    f"{min(others).name}; a pattern chooses others, such as {path}/*"
                )
            if files:
                return files
    except DataError as error:
        raise DataError(f"{key}: {error}") from None
    if path.exists() and not path.is_dir():
        raise DataError(f"{key}: {path} is neither a file nor a folder; it is read more than once")
    if not path.exists() and not glob.has_magic(name):
        raise DataError(f"{key}: {path} does not exist")
    found = [Path(match) for match in sorted(glob.glob(name, recursive=True))]
    files = [file for file in found if _is_meant(file)]
    if not files:
        raise DataError(f"{key}: no file's name is like {show(name)}")
    return files


def _is_meant(file: Path) -> bool:
    """Whether a file is one of those that a folder or a pattern stands for."""
    return file.is_file() and not file.name.startswith(".") and not {*file.parts} & {*_OURS}


def _dataset(
    key: str,
    files: Sequence[Path],
    config: NeoXConfig,
    groups: ProcessGroups,
    encoder: ExampleEncoder,
    identity: Sequence[str],
) -> _Dataset:
    """The dataset of the files, tokenized if that was not done before. Collective; reports it."""
    cut = config.pack_impl != "packed"
    told = {
        "version": _VERSION,
        "encoder": list(identity),
        "text_per": config.finetune_text_per,
        "room": config.seq_length + 1 if cut else None,
        "allow_chopped": config.allow_chopped or not cut,
    }
    # Read once on each machine; modification times would differ between copies.
    own = _digest(files, told) if is_first_of_machine() else None
    digests = [digest for digest in groups.gather(own) if digest is not None]
    if len(set(digests)) > 1:
        raise DataError(
            f"{key}: the files are not the same on all machines, or not everywhere; copy them anew"
        )
    stem = f"examples-{digests[0]}"
    folders = cache_folders(files[0].parent, FOLDER, config)

    def find() -> _Dataset | None:
        return _find(folders, stem)

    built = []

    def build() -> None:
        _build(key, files, folders, stem, told, config, encoder)
        built.append(True)

    what = f"{stem} in none of {', '.join(map(str, folders))}"
    dataset = built_once(find, build, what, config, groups)
    if not built:
        log.info(f"{key}: tokenized before, in {Path(dataset.text).parent}")
    dataset.report.tell(key, config)
    if not dataset.report.examples:
        raise DataError(f"{key}: there is no example to learn from in {_names(files)}")
    return dataset


def _digest(files: Sequence[Path], told: dict[str, Any]) -> str:
    hasher = hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=10)
    total = sum(file.stat().st_size for file in files)
    with log.progress(total=total, desc="looking for changes", unit="B") as bar:
        for path in files:
            hasher.update(f"\n{path.name} {path.stat().st_size}\n".encode())
            try:
                with open(path, "rb") as file:
                    while block := file.read(_BLOCK):
                        hasher.update(block)
                        bar.update(len(block))
            except OSError as error:
                raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    return hasher.hexdigest()


def _find(folders: Sequence[Path], stem: str) -> _Dataset | None:
    """The dataset of that name, in the first folder where it is whole."""
    for folder in folders:
        about = folder / f"{stem}.json"
        if not about.is_file():
            continue
        text, labels = _prefixes(folder, stem)
        try:
            told = json.loads(about.read_text())
            whole = not is_first_of_machine() or all(
                checksum(folder / name) == crc for name, crc in told["crc32"].items()
            )
            if whole:
                return _Dataset(text, labels, Report(**told["report"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        log.warning(f"{about} or a file beside it is damaged; the examples are tokenized again")
    return None


def _prefixes(folder: Path, stem: str) -> tuple[str, str]:
    """Of the text and its labels, as the preprocessing names them."""
    return f"{folder / stem}_text_document", f"{folder / stem}_label_document"


def _places_path(prefix: str) -> Path:
    return Path(f"{prefix}.places")


def place_of(prefix: str, document: int) -> str | None:
    """File and line (or just the file) that an example came from; None for other datasets."""
    path = _places_path(prefix)
    if not path.is_file():
        return None
    with open(path, encoding="utf-8") as lines:
        return next(itertools.islice(lines, document, None), "").rstrip("\n") or None


def _build(
    key: str,
    files: Sequence[Path],
    folders: Sequence[Path],
    stem: str,
    told: dict[str, Any],
    config: NeoXConfig,
    encoder: ExampleEncoder,
) -> None:
    size = sum(file.stat().st_size for file in files)
    log.info(f"{key}: tokenizing {_names(files)}, {size:,} bytes ...")
    for folder in folders:
        if is_read_only(folder.parent):
            continue
        prefixes = _prefixes(folder, stem)
        try:
            report, places = _write(key, files, prefixes, told, config, encoder)
            lines = "".join(f"{place}\n" for place in places)
            write_bytes(_places_path(prefixes[0]), lines.encode("utf-8", "backslashreplace"))
            paths = [ending(prefix) for prefix in prefixes for ending in (bin_path, idx_path)]
            paths.append(_places_path(prefixes[0]))
            about = {
                "key": told,
                "files": [str(file) for file in files],
                "crc32": {path.name: checksum(path) for path in paths},
                "report": dataclasses.asdict(report),
            }
            write_text(folder / f"{stem}.json", json.dumps(about, indent=1) + "\n")
            return
        except OSError as error:
            log.info(f"cannot keep the tokenized examples in {folder} ({error.strerror})")
        finally:
            with suppress(OSError):  # where nothing came of it
                folder.rmdir()
    raise DataError(
        f"the tokenized examples could be written to none of {', '.join(map(str, folders))}; make "
        "one of them writable, or set log_dir to a folder with space"
    )


def _names(files: Sequence[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{len(files):,} files ({files[0]} ...)"


def _write(
    key: str,
    files: Sequence[Path],
    prefixes: Sequence[str],
    told: dict[str, Any],
    config: NeoXConfig,
    encoder: ExampleEncoder,
) -> tuple[Report, list[str]]:
    """Write both datasets; the report, and the places of the examples that are kept.

    OSError where they cannot be written, DataError for what the files hold.
    """
    report, places = Report(files=len(files)), []
    by_line = config.finetune_text_per == "line"
    size = sum(file.stat().st_size for file in files)
    with ExitStack() as stack:
        bar = stack.enter_context(log.progress(total=size, desc=f"tokenizing {key}", unit="B"))
        writers = [stack.enter_context(IndexedWriter(prefix, dtype=_DTYPE)) for prefix in prefixes]
        for chunk in read_chunks(files, texts_by_line=by_line):
            report.empty += chunk.blank()
            kept: list[Example] = []
            for record in chunk.records():
                example = encoder.encode(chunk.name, record)
                example = report.take(example, told["room"], told["allow_chopped"])
                if example is not None:
                    kept.append(example)
                    places.append(record.where)
            lengths = np.array([len(example.tokens) for example in kept], dtype=np.int32)
            for writer, column in zip(writers, ("tokens", "labels"), strict=True):
                ids = [i for example in kept for i in getattr(example, column)]
                writer.add(np.array(ids, dtype=_DTYPE), lengths)
            bar.update(chunk.bytes_read - bar.n)
    return report, places
