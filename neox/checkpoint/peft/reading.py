"""A folder of PEFT's, read whole or refused with one message."""

from __future__ import annotations

from pathlib import Path

from neox.checkpoint.peft.adapters import Adapters
from neox.config import NeoXConfig


def read_adapters(folder: Path, config: NeoXConfig, padded_vocab_size: int) -> Adapters:
    """The adapters in `folder` for a model of `config`, whole. Not collective.

    Raises CheckpointError.
    """
    raise NotImplementedError
