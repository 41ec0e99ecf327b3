"""The optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from neox.config.blocks import Optimizer
from neox.config.fields import derived, ignored, key, refused

_SAY_ZERO = "zero_optimization.{} is the key that acts"


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and what is known about it after loading."""

    optimizer: dict[str, Any] | None = key(
        None, "Type and parameters of the optimizer.", block=Optimizer
    )
    optimizer_type: Literal[
        "adam", "onebitadam", "cpu_adam", "cpu_torch_adam", "sm3", "madgrad_wd", "sgd", "lion"
    ] = key(
        "adam",
        "The optimizer by name; optimizer.type says the same and is the usual place.",
        refused=dict.fromkeys(
            ("onebitadam", "cpu_adam", "cpu_torch_adam", "sm3", "madgrad_wd", "lion"),
            "it is not supported. Use Adam or SGD",
        ),
    )
    use_bnb_optimizer: bool = refused(
        False, "Adam with 8-bit state.", "8-bit Adam is not supported"
    )
    weight_decay: float = key(0.1, "Decoupled decay of all weights of two or more axes.", low=0)
    gradient_clipping: float = key(
        1.0, "Largest norm of the whole gradient; 0 does not clip.", low=0
    )
    lr: float = derived(0.001, "Peak learning rate.", "optimizer.params.lr sets it")
    zero_stage: int = derived(0, "ZeRO stage asked for.", "zero_optimization.stage sets it")
    zero_reduce_scatter: bool | None = ignored(
        None, "A setting of ZeRO's.", _SAY_ZERO.format("reduce_scatter")
    )
    zero_contiguous_gradients: bool | None = ignored(
        None, "A setting of ZeRO's.", _SAY_ZERO.format("contiguous_gradients")
    )
    zero_reduce_bucket_size: int | None = ignored(
        None, "A setting of ZeRO's.", _SAY_ZERO.format("reduce_bucket_size")
    )
    zero_allgather_bucket_size: int | None = ignored(
        None, "A setting of ZeRO's.", _SAY_ZERO.format("allgather_bucket_size")
    )

    @property
    def optimizer_params(self) -> dict[str, Any]:
        """The optimizer's settings, defaults filled in: lr with betas and eps, or momentum."""
        given = (self.optimizer or {}).get("params") or {}
        defaults: dict[str, Any] = {"momentum": 0.0}
        if self.optimizer_type == "adam":
            defaults = {"betas": [0.9, 0.999], "eps": 1e-8}
        return {"lr": self.lr} | {name: given.get(name, defaults[name]) for name in defaults}
