"""The whole configuration as one frozen value."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from neox.config.data import DataConfig
from neox.config.deepspeed import DeepSpeedConfig
from neox.config.evaluation import EvaluationConfig
from neox.config.fields import keys_of
from neox.config.frozen import FrozenConfig
from neox.config.logging import LoggingConfig
from neox.config.lr_scheduler import LRSchedulerConfig
from neox.config.model import ModelConfig
from neox.config.moe import MoEConfig
from neox.config.optimizer import OptimizerConfig
from neox.config.other import OtherConfig
from neox.config.parallel import ParallelConfig
from neox.config.runner import RunnerConfig
from neox.config.serving import ServingConfig
from neox.config.textgen import TextGenConfig
from neox.config.tokenizer import TokenizerConfig
from neox.config.training import TrainingConfig
from neox.config.values import show

SECTIONS = (
    ModelConfig,
    ParallelConfig,
    OptimizerConfig,
    LRSchedulerConfig,
    TrainingConfig,
    FrozenConfig,
    DataConfig,
    TokenizerConfig,
    LoggingConfig,
    TextGenConfig,
    EvaluationConfig,
    ServingConfig,
    MoEConfig,
    DeepSpeedConfig,
    RunnerConfig,
    OtherConfig,
)


@dataclass(frozen=True, kw_only=True, repr=False)
class NeoXConfig(
    ModelConfig,
    ParallelConfig,
    OptimizerConfig,
    LRSchedulerConfig,
    TrainingConfig,
    FrozenConfig,
    DataConfig,
    TokenizerConfig,
    LoggingConfig,
    TextGenConfig,
    EvaluationConfig,
    ServingConfig,
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

    @property
    def engine_zero_stage(self) -> int:
        """The ZeRO stage that trains: in 16 bit, DeepSpeed takes an empty first step at stage 0."""
        return self.zero_stage if self.dtype == "float32" else max(1, self.zero_stage)

    def origin(self, name: str) -> str:
        """Where a value comes from: "pythia.yml:12", "--set", "derived", "fitted" (to the devices
        that are there), "checkpoint" (a schedule that is followed) or "default".

        `name` may be dotted for a value inside a block: "optimizer.params.lr".
        """
        return self.origins.get(name, "default")

    def encode(self) -> str:
        """JSON that `decode` turns back into an equal configuration, origins included."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.dumps(values)

    @classmethod
    def decode(cls, text: str) -> NeoXConfig:
        """The configuration that `encode` wrote."""
        values: dict[str, Any] = json.loads(text)
        return cls(**values)

    def describe(self) -> str:
        """A table of every value and its origin: first what was given, then the rest."""
        rows = [
            row
            for name in keys_of(NeoXConfig)
            if name != "config_files"
            for row in self._rows(name, getattr(self, name), self.origin(name))
        ]
        last = ("derived", "default")
        rows.sort(key=lambda row: last.index(row[2]) if row[2] in last else -1)
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        return "\n".join(
            f"{name:<{widths[0]}}  {value:<{widths[1]}}  {origin}" for name, value, origin in rows
        )

    def _rows(self, path: str, value: Any, origin: str) -> Iterator[tuple[str, str, str]]:
        """A value as one row, a block as a row for each of its values."""
        if not isinstance(value, dict) or not value:
            yield path, show(value), origin
            return
        for name, inner in value.items():
            inside = f"{path}.{name}"
            yield from self._rows(inside, inner, self.origins.get(inside, origin))
