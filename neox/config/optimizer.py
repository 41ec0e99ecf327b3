"""OptimizerConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from neox.config.fields import REQUIRED, key


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    optimizer_type: Literal[
        "adam", "onebitadam", "cpu_adam", "cpu_torch_adam", "sm3", "madgrad_wd", "sgd", "lion"
    ] = key("adam", "")
    use_bnb_optimizer: bool = key(False, "")
    zero_stage: int = key(None, "")
    zero_reduce_scatter: bool | None = key(None, "")
    zero_contiguous_gradients: bool | None = key(None, "")
    zero_reduce_bucket_size: int | None = key(None, "")
    zero_allgather_bucket_size: int | None = key(None, "")
    lr: float = key(None, "")

    @property
    def optimizer_params(self) -> dict[str, Any]:
        """The optimizer's settings, the library's defaults filled in."""
        block = self.optimizer or {}  # type: ignore[attr-defined]
        defaults = {"betas": [0.9, 0.999], "eps": 1e-8} if self.optimizer_type == "adam" else {}
        return {"lr": self.lr, **defaults, **block.get("params", {})}
