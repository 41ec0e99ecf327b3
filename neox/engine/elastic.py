"""Optimizer state for another grid, through a universal checkpoint.

A universal checkpoint is DeepSpeed's form of a checkpoint that belongs to no grid: a folder for
each parameter, with a file for each kind of state, whole. DeepSpeed's loader cuts from them what a
rank needs. Here they are written into a folder aside that lives as long as the loading.

DeepSpeed's own converter, ds_to_universal, is not used. It wants a layer 01, which NeoX's numbering
lacks; it needs patterns of parameter names stored with the checkpoint, which upstream's don't have;
it knows Adam only; and it unpickles whatever it is given.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint.constants import (
    CAT_DIM,
    DS_VERSION,
    LOSS_SCALER,
    PARAM,
    PARAM_GROUPS,
    SUB_PARAM_SHAPE,
)
from deepspeed.checkpoint.universal_checkpoint import SubparamShape
from torch.optim import Optimizer
from torch.utils.serialization import config as serialization

from neox import log
from neox.checkpoint.directory import UNFINISHED, FailedError, on_every_rank
from neox.checkpoint.files import save_file
from neox.checkpoint.sources import model_file
from neox.engine.checkpoint_engine import KNOWN_CLASSES
from neox.engine.eight_bit import is_eight_bit, quantized
from neox.engine.optimizers import check_state, step_counter
from neox.engine.saved_state import SavedState, parameter_name
from neox.errors import CheckpointError
from neox.model.gpt import Layer
from neox.model.layout import ParamLayout
from neox.parallel.groups import ProcessGroups


@contextlib.contextmanager
def universal_checkpoint(
    read: Callable[[], SavedState],
    layers: list[Layer],
    directory: Path,
    groups: ProcessGroups,
    *,
    optimizer: Optimizer,
    pipelined: bool,
    keep_loss_scale: bool,
) -> Iterator[Path]:
    """A universal checkpoint of the state that `read` opens, as a folder in `directory`.

    Every rank must see the directory: they share the work. The folder is deleted at the end, also
    after a failure. It is for torch's `optimizer`; `pipelined` tells which of DeepSpeed's modules
    will load it, by whose names; `keep_loss_scale`, that fp16's goes on where it was. Collective
    over the world. Raises CheckpointError on every rank for what goes wrong on any.
    """

    def make() -> Path | None:
        if groups.rank > 0:
            return None
        unfinished = directory / UNFINISHED
        unfinished.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="universal-", dir=unfinished))

    def write() -> None:
        assert folder is not None
        state = read()
        _write_parameters(folder, state, layers, groups, optimizer, pipelined)
        if groups.rank == 0:
            _write_the_rest(folder, state, keep_loss_scale)

    folder = None
    try:
        (folder, *_) = on_every_rank(groups, make)
        assert folder is not None
        on_every_rank(groups, write)
        yield folder
        groups.barrier()
    except FailedError as failed:
        raise CheckpointError(
            f"the optimizer state could not be rearranged in {directory}: {failed}."
        ) from failed
    finally:
        if groups.rank == 0 and folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # other remains are in it
                folder.parent.rmdir()


def _write_parameters(
    target: Path,
    state: SavedState,
    layers: list[Layer],
    groups: ProcessGroups,
    optimizer: Optimizer,
    pipelined: bool,
) -> None:
    """This rank's share of the parameters. Raises CheckpointError and OSError."""
    parameters = [
        (layer, name, layout)
        for layer in layers
        if layer.has_file
        for name, layout in layer.trained.items()
    ]
    mine = parameters[groups.rank :: groups.world_size]
    zero = target / "zero"
    zero.mkdir(exist_ok=True)
    with log.progress(total=len(mine), desc="optimizer state", unit="tensor") as bar:
        for layer, name, layout in mine:
            found = state.of((layer.index, name), layout)
            check_state(optimizer, found.shards)
            folder = zero / parameter_name(layer, name, pipelined=pipelined)
            folder.mkdir()
            for kind, whole in found.whole(layout).items():
                save_file({PARAM: whole, **_cut(layout)}, folder / f"{kind}.pt")
            if found.step is not None:
                save_file(torch.tensor(found.step), folder / "step.pt")
            bar.update()


def _write_the_rest(target: Path, state: SavedState, keep_loss_scale: bool) -> None:
    kept = (LOSS_SCALER, "dynamic_loss_scale", "overflow") if keep_loss_scale else ()
    shared = {key: state.shared[key] for key in kept if key in state.shared}
    # No settings for the optimizer's groups, of which there are up to two: they have theirs.
    shared |= {DS_VERSION: deepspeed.__version__, PARAM_GROUPS: [{}, {}]}
    save_file(shared, target / "zero" / "optimizer_state.pt")
    save_file({**state.model, "mp_world_size": 1}, model_file(target, 0))


def _cut(layout: ParamLayout) -> dict[str, Any]:
    """How the loader is to cut the whole tensor, unless it has the wanted shape already."""
    dim = layout.dim or 0
    if not layout.blocks:
        return {CAT_DIM: dim}
    shape: list[Any] = list(layout.shape)
    shape[dim] = layout.blocks
    return {SUB_PARAM_SHAPE: SubparamShape([], tuple(shape), dim)}


def load_universal(inner: Any, folder: Path) -> dict[str, Any]:
    """Have DeepSpeed's engine `inner` load a universal checkpoint; the client's state in it.

    Collective over the world.
    """
    # As {"checkpoint": {"load_universal": true}} would from the start, but for this load only.
    inner._config.load_universal_checkpoint = True
    try:
        with (
            torch.serialization.safe_globals([SubparamShape, *KNOWN_CLASSES]),
            serialization.patch("load.mmap", True),  # a rank reads its slices only
        ):
            _, state = inner.load_checkpoint(str(folder.parent), tag=folder.name)
    finally:
        inner._config.load_universal_checkpoint = False
    base = inner.optimizer.optimizer
    for parameter, values in list(base.state.items()):
        if is_eight_bit(base):
            base.state[parameter] = quantized(base, parameter, values)
        elif "step" in values:  # in the file, on the CPU
            values["step"] = step_counter(base, parameter, float(values["step"]))
    return state
