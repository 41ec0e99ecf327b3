"""The whole configuration as one frozen value."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neox.config.deepspeed import DeepSpeedConfig
from neox.config.logging import LoggingConfig
from neox.config.lr_scheduler import LRSchedulerConfig
from neox.config.model import ModelConfig
from neox.config.moe import MoEConfig
from neox.config.optimizer import OptimizerConfig
from neox.config.other import OtherConfig
from neox.config.parallel import ParallelConfig
from neox.config.runner import RunnerConfig
from neox.config.textgen import TextGenConfig
from neox.config.tokenizer import TokenizerConfig
from neox.config.training import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class NeoXConfig(
    ModelConfig,
    ParallelConfig,
    OptimizerConfig,
    LRSchedulerConfig,
    TrainingConfig,
    TokenizerConfig,
    LoggingConfig,
    TextGenConfig,
    MoEConfig,
    DeepSpeedConfig,
    RunnerConfig,
    OtherConfig,
):
    """Every key, flat. Made by `load_config` or `from_dict`, which check it; knows no rank."""

    origins: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def tp(self) -> int:
        """Tensor-parallel degree."""
        return self.model_parallel_size

    @property
    def pp(self) -> int:
        """Pipeline stages; `pipe_parallel_size` 0 and 1 are both one stage."""
        return max(1, self.pipe_parallel_size)

    @property
    def dp(self) -> int:
        """Data-parallel replicas."""
        return self.world_size // (self.tp * self.pp)

    def origin(self, name: str) -> str:
        """Where a value comes from: "pythia.yml:12", "--set", "derived" or "default".

        `name` may be dotted for a value inside a block: "optimizer.params.lr".
        """
        return self.origins.get(name, "default")

    def encode(self) -> str:
        """JSON that `decode` turns back into an equal configuration, origins included."""
        return json.dumps({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})

    @classmethod
    def decode(cls, text: str) -> NeoXConfig:
        """The configuration that `encode` wrote."""
        values: dict[str, Any] = json.loads(text)
        return cls(**values)
