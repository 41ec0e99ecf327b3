"""A checkpoint whose weights have the adapters in them."""

from __future__ import annotations

from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.peft.adapters import Adapters
from neox.model.gpt import Layer


def merged(checkpoint: Checkpoint, adapters: Adapters, model: list[Layer]) -> Checkpoint:
    """`checkpoint` with W + scaling B A in place of W, and what else was trained in its place."""
    raise NotImplementedError
