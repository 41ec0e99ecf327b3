"""What the training loop asks of an engine, whichever way the model is walked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from neox.checkpoint.manifest import Entry
from neox.checkpoint.neox import Checkpoint
from neox.data.loaders import Batch
from neox.model.gpt import LocalLayers


@dataclass(frozen=True)
class TrainStep:
    """The outcome of one optimizer step, the same on every rank."""

    loss: float  # mean over micro-batches and data-parallel ranks
    grad_norm: float | None  # before clipping, over the whole model
    skipped: bool  # an fp16 overflow: the weights did not change
    loss_scale: float | None  # fp16 only


class Engine(Protocol):
    """All methods are collective over the world.

    Batch iterators are drawn from on every rank that needs tokens or labels; each rank brings its
    own.
    """

    def train_batch(self, batches: Iterator[Batch], iteration: int, rate: float) -> TrainStep:
        """Optimizer step number `iteration` at learning rate `rate`.

        Draws gradient_accumulation_steps micro-batches. Dropout is a function of the seed and
        `iteration`.
        """

    def eval_batch(self, batches: Iterator[Batch]) -> float:
        """Mean loss over gradient_accumulation_steps micro-batches, without dropout."""

    def lend(self) -> AbstractContextManager[LocalLayers]:
        """This rank's layers for an evaluation, whole and without dropout, while the block lasts.

        Training goes on afterwards as if there had been none. The layers are the training's own,
        without a copy; under ZeRO 3 they are copies.
        """

    def save(self, folder: Path, state: dict[str, Any]) -> dict[str, Entry]:
        """Write layer files, optimizer state and `state` into `folder`, which exists.

        Returns what this rank wrote, by file name. Raises OSError on a rank that cannot write, once
        every rank is through.
        """

    def load_optimizer(self, checkpoint: Checkpoint, scratch: Path) -> dict[str, Any]:
        """Restore what `save` wrote besides the layer files, at any grid; return its `state`.

        State of another grid is rearranged in `scratch`, a folder that all ranks see; what is
        written there is gone in the end. The optimizer's settings remain the configuration's.
        Raises CheckpointError.
        """
