"""Folders of checkpoints: which step is meant, and what it says of itself.

`{save}/latest` names one of the folders `global_stepN` beside it.
"""

from __future__ import annotations

import re
from pathlib import Path

from neox.checkpoint.manifest import HAS_MANIFEST, MANIFEST, Manifest
from neox.checkpoint.sources import (
    has_layer_files,
    has_model_files,
    load_model_file,
)
from neox.config.hf import is_transformers
from neox.config.mesh import is_mesh
from neox.errors import CheckpointError, DamageError


def step_folder(directory: Path, iteration: int) -> Path:
    return directory / f"global_step{iteration}"


def resolve(directory: Path, iteration: int | None) -> Path:
    """The checkpoint folder in `directory`: of `iteration`, or the one that `latest` names.

    A folder that itself holds a checkpoint's files may be given too, unless a run has saved into
    it since. Raises CheckpointError.
    """
    if not directory.is_dir():
        raise CheckpointError(
            f"load: {directory} is not a folder. Set `load` to the folder that holds `latest` and "
            "the global_step folders."
        )
    if iteration is None:
        if not (directory / "latest").is_file():
            if holds_weights(directory):
                return directory
            raise CheckpointError(
                f"load: {directory} has no `latest` file and no layer files; {_found(directory)}"
            )
        name = latest_name(directory)
    else:
        name = f"global_step{iteration}"
    folder = directory / name
    if not name or not folder.is_dir():
        wanted = "`latest` names" if iteration is None else f"iteration {iteration} asks for"
        raise CheckpointError(
            f"load: {wanted} {name or 'nothing'}, which is not in {directory}; {_found(directory)}"
        )
    return folder


def holds_weights(directory: Path) -> bool:
    """Whether a folder itself holds a checkpoint's files, of any program."""
    return (
        has_layer_files(directory)
        or has_model_files(directory)
        or is_transformers(directory)
        or is_mesh(directory)
    )


def latest_name(directory: Path) -> str:
    """What `latest` says, fit to be printed and looked for whatever it holds; "" without one."""
    try:
        with open(directory / "latest", "rb") as file:
            text = file.read(100).decode(errors="replace").strip()
    except OSError:
        return ""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a step folder; None where it was written without one. DamageError."""
    manifest = Manifest.read(folder)
    step = re.fullmatch(r"global_step(\d+)", folder.name)
    if manifest is None:
        for path in sorted(folder.glob("mp_rank_*_model_states.pt")):
            if _was_written_with_one(path):
                raise DamageError(
                    f"{folder / MANIFEST} is missing: {path.name} was written with it."
                )
    elif step and int(step[1]) != manifest.iteration:
        raise DamageError(
            f"{folder / MANIFEST} is that of iteration {manifest.iteration}, which does not go "
            "with the folder's name."
        )
    return manifest


def _was_written_with_one(path: Path) -> bool:
    try:
        return bool(load_model_file(path).get(HAS_MANIFEST))
    except CheckpointError:
        return False  # damage of the file itself is found where the file is needed


def _found(directory: Path) -> str:
    steps = sorted(
        (p.name for p in directory.glob("global_step*") if p.is_dir()),
        key=lambda name: (len(name), name),
    )
    if steps:
        return f"it holds {', '.join(steps)}. Use --iteration N to choose one."
    others = sorted(p.name for p in directory.iterdir())[:5]
    return f"it holds {', '.join(others)}." if others else "it is empty."
