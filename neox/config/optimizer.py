"""The optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from neox.config.blocks import Optimizer
from neox.config.fields import derived, ignored, key, keys_of
from neox.config.optimizer_params import BETAS, OPTIMIZER_PARAMS, REFUSED

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
        refused=REFUSED,
    )
    use_bnb_optimizer: bool = key(
        False, "Adam with 8-bit state, from bitsandbytes: 2 bytes for each weight instead of 8."
    )
    weight_decay: float = key(
        0.1,
        "Decay of all weights of two or more axes; decoupled, but for SGD and adam_w_mode: false.",
        low=0,
    )
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
        """The optimizer's settings that act, lr among them, defaults filled in."""
        block = OPTIMIZER_PARAMS[self.optimizer_type]
        given = (self.optimizer or {}).get("params") or {}
        params: dict[str, Any] = {"lr": self.lr}
        for name, spec in keys_of(block).items():
            if spec.status == "acts" and name != "lr":
                default = BETAS[block] if name == "betas" else spec.default
                params[name] = default if given.get(name) is None else given[name]
        return params

    @property
    def optimizer_state(self) -> str:
        """What the optimizer's state is that of: optimizers of one name go on from each other's."""
        return "adam" if self.optimizer_type.endswith("adam") else self.optimizer_type
