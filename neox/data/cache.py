"""Arrays too large to build in every process: built once, kept as .npy files, mapped by all."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neox import log
from neox.atomic import replacing
from neox.config import NeoXConfig
from neox.errors import DataError
from neox.parallel.groups import ProcessGroups

Arrays = tuple[np.ndarray, ...]


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
    anything makes new files. They lie in a folder `index_cache` next to the dataset `prefix`, or,
    where that cannot be written, in `log_dir` or the temporary folder.
    """
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=10).hexdigest()
    files = [f"{Path(prefix).name}-{digest}-{name}.npy" for name in names]
    folders = _folders(prefix, config)
    # Rank 0 builds, then each machine that does not see its files; at once on all of them when
    # nothing is shared. Files are replaced whole, so building one twice costs only time.
    first_of_machine = int(os.environ.get("LOCAL_RANK", "0")) == 0
    turns = [groups.rank == 0, first_of_machine] if config.use_shared_fs else [first_of_machine]
    for my_turn in turns:
        if my_turn and _find(folders, files) is None:
            _write(folders, files, build())
        groups.barrier()
    folder = _find(folders, files)
    if folder is None:
        raise DataError(
            f"rank {groups.rank} sees {files[0]} in none of {', '.join(map(str, folders))}, where "
            "another rank of this machine put it: the ranks need the same view of one of them"
        )
    return tuple(_map(folder / file) for file in files)


def _folders(prefix: str | Path, config: NeoXConfig) -> list[Path]:
    parents = [Path(prefix).parent, *([Path(config.log_dir)] if config.log_dir else [])]
    private = Path(tempfile.gettempdir()) / f"neox-{os.getuid()}"
    return [parent / "index_cache" for parent in (*parents, private)]


def _find(folders: Sequence[Path], files: Sequence[str]) -> Path | None:
    return next((f for f in folders if all((f / file).is_file() for file in files)), None)


def _write(folders: Sequence[Path], files: Sequence[str], arrays: Arrays) -> None:
    for folder in folders:
        if _is_read_only(folder.parent):
            continue
        try:
            for file, array in zip(files, arrays, strict=True):
                with replacing(folder / file) as stream:
                    np.save(stream, array, allow_pickle=False)
            return
        except OSError as error:
            log.info(f"cannot keep the sample order in {folder} ({error.strerror})")
    raise DataError(
        f"the sample order could be written to none of {', '.join(map(str, folders))}; make one of "
        "them writable, or set log_dir to a folder with space"
    )


def _is_read_only(folder: Path) -> bool:
    """Whether nobody is meant to write there; root could all the same."""
    return folder.is_dir() and not folder.stat().st_mode & 0o222


def _map(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise DataError(f"{path} is damaged ({error}); delete it to have it rebuilt") from None
