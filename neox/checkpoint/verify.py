"""Whether a checkpoint is as it was written, and which one in a directory is."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from neox import log
from neox.checkpoint.directory import has_its_files, steps
from neox.checkpoint.files import check_crc
from neox.checkpoint.folders import read_manifest
from neox.checkpoint.manifest import MANIFEST, Manifest
from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.optimizer_files import optimizer_files
from neox.checkpoint.sources import load_model_file
from neox.errors import CheckpointError, DamageError
from neox.parallel.groups import ProcessGroups

_CHECKPOINT_FILE = re.compile(r"(layer_|mp_rank_|(bf16_)?zero_pp_rank_).*\.pt$")
_OPTIMIZER_FILE = re.compile(r"(bf16_)?zero_pp_rank_.*\.pt$")
_MIB = 1 << 20


def verify(
    folder: Path, groups: ProcessGroups | None = None, *, weights_only: bool = False
) -> list[str]:
    """What is wrong in a step folder, a line for each file; nothing when it is as it was written.

    Every file is read through and compared with the manifest. Without one (upstream writes none)
    the CRC-32 in torch's zip archives is recomputed, the files are opened, and their names must
    leave no gap. `weights_only` leaves out the optimizer's state.

    Collective over the world of `groups`, whose ranks share the work; None for this process alone.
    """
    groups = groups or ProcessGroups.single()
    try:
        manifest = read_manifest(folder)
        names = _names(folder, manifest, weights_only)
        problems = []
    except (CheckpointError, OSError) as error:  # maybe on this rank only, and the others wait
        manifest, names, problems = None, [], [str(error)]
    sizes = {name: _size(folder / name) for name in names}
    by_size = sorted(names, key=lambda name: sizes[name], reverse=True)
    mine = by_size[groups.rank :: groups.world_size]
    total = sum(sizes[name] for name in mine) // _MIB
    with log.progress(total=total, desc=f"verifying {folder.name}", unit=" MiB") as bar:
        for name in mine:
            try:
                if manifest is not None:
                    manifest.check(folder / name)
                else:
                    check_crc(folder / name)
            except CheckpointError as error:
                problems.append(str(error))
            bar.update(sizes[name] // _MIB)
    found = {problem for share in groups.gather(problems) for problem in share}
    if not found and manifest is None:
        found.update(_contradictions(folder, weights_only))
    return sorted(found)


def newest_valid(
    directory: Path, besides: Path, groups: ProcessGroups | None = None
) -> Path | None:
    """The highest step whose weights are as they were written, other than the folder `besides`.

    Collective over the world of `groups`; None for this process alone.
    """
    for folder in steps(directory):
        if folder.name != besides.name and not verify(folder, groups, weights_only=True):
            return folder
    return None


@contextlib.contextmanager
def telling_another(folder: Path, groups: ProcessGroups | None = None) -> Iterator[None]:
    """Around the use of a step folder: a DamageError then tells which other step is whole.

    `groups` for what every rank raises alike, and then looks for together; None for this process
    alone.
    """
    try:
        yield
    except DamageError as error:
        if folder not in steps(folder.parent):  # of transformers, or under a name of its own
            raise
        valid = newest_valid(folder.parent, folder, groups)
        if valid is None:
            other = f"No other checkpoint in {folder.parent} is whole."
        else:
            step = valid.name.removeprefix("global_step")
            other = f"The newest other one that is whole is {valid}: use --iteration {step}."
        raise CheckpointError(f"{error} {other}") from error


def tell_newer(folder: Path) -> None:
    """Say it in a line when `latest` names the step `folder` although a higher step is there."""
    found = steps(folder.parent)
    newer = found[: found.index(folder)] if folder in found else []
    if any(has_its_files(step) for step in newer):
        log.info(
            f"load: `latest` in {folder.parent} names {folder.name}, which is used, although "
            f"{newer[0].name} is there; --iteration N chooses another"
        )


def _names(folder: Path, manifest: Manifest | None, weights_only: bool) -> list[str]:
    """The files to verify, relative to `folder`. CheckpointError for one that does not belong."""
    present = {path.name for path in folder.iterdir() if _CHECKPOINT_FILE.match(path.name)}
    if manifest is None:
        names = present | {path.name for path in folder.glob("*.bin")}
        names |= {path.relative_to(folder).as_posix() for path in folder.glob("shard_*/*.npz")}
    else:
        names = set(manifest.files)
        if strange := sorted(present - names):
            raise DamageError(
                f"{folder / strange[0]} does not belong to the checkpoint: {MANIFEST} does not "
                "list it."
            )
    if weights_only:
        layers = {name for name in names if name.startswith("layer_")}
        names = layers or {name for name in names if not _OPTIMIZER_FILE.match(name)}
    return sorted(names)


def _contradictions(folder: Path, weights_only: bool) -> list[str]:
    """What is wrong with files whose checksums are right, by their names and contents."""
    try:
        checkpoint = Checkpoint.open(folder)
        for index in checkpoint.indices:
            checkpoint.shards(index)
        if not weights_only:
            optimizer_files(folder, checkpoint.tp)
            for path in folder.glob("mp_rank_*_model_states.pt"):
                load_model_file(path)
    except CheckpointError as error:
        return [str(error)]
    found = set(checkpoint.indices)
    depth = 0
    while depth + 2 in found:
        depth += 1
    needed = {0, *range(2, depth + 2), depth + 3}  # and depth + 4, an output projection of its own
    if not needed <= found <= needed | {depth + 4}:
        return [
            f"{folder} is incomplete: it holds the layers {', '.join(map(str, sorted(found)))}, "
            "and a model's are 0, 2 to L + 1, L + 3 and, unless it is tied, L + 4."
        ]
    return []


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
