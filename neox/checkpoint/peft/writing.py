"""Adapters as the folder that PEFT loads onto our export."""

from __future__ import annotations

from pathlib import Path

from neox.checkpoint.manifest import Entry
from neox.checkpoint.peft.adapters import Adapters
from neox.config import NeoXConfig


def write_adapters(
    folder: Path, config: NeoXConfig, adapters: Adapters, base: str | None
) -> dict[str, Entry]:
    """Write `adapters` into `folder`; what was written, by file name. Not collective.

    `base` is the folder that PEFT is told the base is in. Raises OSError.
    """
    raise NotImplementedError
