"""ParallelConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from neox.config.fields import REQUIRED, key


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    pipe_parallel_size: int = key(0, "")
    model_parallel_size: int = key(1, "")
    pipe_partition_method: str = key("type:transformer|mlp", "")
    world_size: int = key(None, "")
    is_pipe_parallel: bool = key(False, "")
    sequence_parallel: bool = key(False, "")
