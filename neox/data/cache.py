"""Arrays too large to build in every process: built once, kept as .npy files, mapped by all."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from neox import log
from neox.atomic import replacing, write_text
from neox.config import NeoXConfig
from neox.errors import DataError
from neox.parallel.groups import ProcessGroups

Arrays = tuple[np.ndarray, ...]
Found = TypeVar("Found")
_CHUNK = 1 << 22


def cached_arrays(
    prefix: str | Path,
    names: Sequence[str],
    key: Mapping[str, Any],
    build: Callable[[], Arrays],
    config: NeoXConfig,
    groups: ProcessGroups,
) -> Arrays:
    """The arrays `names` that `build` makes, memory-mapped read-only. Collective over the world.

    `key` holds everything that they depend on; its hash is part of the file names, so a change of
    anything makes new files. A .json file beside them holds the key and the files' checksums; what
    does not agree with it is built anew, with a warning. They lie in a folder `index_cache` next to
    the dataset `prefix`, or, where that cannot be written, in `log_dir` or the temporary folder.
    """
    text = json.dumps(key, sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=10).hexdigest()
    stem = f"{Path(prefix).name}-{digest}"
    folders = cache_folders(Path(prefix).parent, "index_cache", config)

    def find() -> Path | None:
        return _find(folders, stem, names, text)

    def write() -> None:
        _write(folders, stem, names, text, build())

    folder = built_once(find, write, f"{stem} in none of {_listed(folders)}", config, groups)
    return tuple(_map(folder / f"{stem}-{name}.npy") for name in names)


def built_once(
    find: Callable[[], Found | None],
    build: Callable[[], None],
    what: str,
    config: NeoXConfig,
    groups: ProcessGroups,
) -> Found:
    """What `find` finds, after `build` where it was not there. Collective over the world.

    Rank 0 builds, then each machine that does not see its files; at once on all of them when
    nothing is shared. Files are replaced whole, so building one twice costs only time. DataError:
    a rank sees `what` ("THIS in none of THOSE") that another of its machine has built.
    """
    first_here = is_first_of_machine()
    turns = [groups.rank == 0, first_here] if config.use_shared_fs else [first_here]
    for my_turn in turns:
        if my_turn and find() is None:
            build()
        groups.barrier()
    found = find()
    if found is None:
        raise DataError(
            f"rank {groups.rank} sees {what}, where another rank of this machine put it: the ranks "
            "need the same view of one of them"
        )
    return found


def is_first_of_machine() -> bool:
    """Whether this rank does what is done once for all ranks of a machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def cache_folders(beside: Path, name: str, config: NeoXConfig) -> list[Path]:
    """Where files made of those in the folder `beside` may be kept, in order of preference."""
    parents = [beside, *([Path(config.log_dir)] if config.log_dir else [])]
    private = Path(tempfile.gettempdir()) / f"neox-{os.getuid()}"
    return [parent / name for parent in (*parents, private)]


def _listed(folders: Sequence[Path]) -> str:
    return ", ".join(map(str, folders))


def _find(folders: Sequence[Path], stem: str, names: Sequence[str], key: str) -> Path | None:
    """The first folder where the files are there and whole."""
    for folder in folders:
        about = folder / f"{stem}.json"
        if not os.path.isfile(about):  # nor where somebody else's folder may not be entered
            continue
        problem = _damage(about, names, key)
        if problem is None:
            return folder
        log.warning(f"{problem}; it is not used, and the order of samples built anew")
    return None


def _damage(about: Path, names: Sequence[str], key: str) -> str | None:
    """What is wrong with the arrays that `about` tells of, None when nothing is."""
    try:
        told = json.loads(about.read_text())
        if json.dumps(told["key"], sort_keys=True) != key:
            return f"{about} belongs to other data"
        for name in names:
            file = about.with_name(f"{about.stem}-{name}.npy")
            if not file.is_file():
                return f"{file} is missing"
            if checksum(file) != told["crc32"][name]:
                return f"{file} is damaged"
            _map(file)
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError):
        return f"{about} is damaged"
    return None


def _write(
    folders: Sequence[Path], stem: str, names: Sequence[str], key: str, arrays: Arrays
) -> None:
    for folder in folders:
        if is_read_only(folder.parent):
            continue
        checksums: dict[str, int] = {}
        try:
            for name, array in zip(names, arrays, strict=True):
                file = folder / f"{stem}-{name}.npy"
                with replacing(file) as stream:
                    np.save(stream, array, allow_pickle=False)
                checksums[name] = checksum(file)
            told = {"key": json.loads(key), "crc32": checksums}
            write_text(folder / f"{stem}.json", json.dumps(told, indent=1) + "\n")
            return
        except OSError as error:
            for name in checksums:  # of no use by themselves, on a disk that may be full
                (folder / f"{stem}-{name}.npy").unlink(missing_ok=True)
            log.info(f"cannot keep the sample order in {folder} ({error.strerror})")
    raise DataError(
        f"the sample order could be written to none of {_listed(folders)}; make one of "
        "them writable, or set log_dir to a folder with space"
    )


def is_read_only(folder: Path) -> bool:
    """Whether nobody is meant to write there; root could all the same."""
    return folder.is_dir() and not folder.stat().st_mode & 0o222


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    with open(path, "rb") as file:
        crc = 0
        while part := file.read(_CHUNK):
            crc = zlib.crc32(part, crc)
    return crc


def _map(path: Path) -> np.ndarray:
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
