"""The optimizers by name, and what `optimizer.params` of each may hold."""

from __future__ import annotations

from neox.config.fields import ignored, key, refused

_NONE_DOES = "neither torch's Adam nor bitsandbytes' can do it"


class AdamParams:
    """optimizer.params of adam, cpu_adam and cpu_torch_adam: AdamW's arithmetic."""

    lr: float = key(None, "Peak learning rate.", above=0)
    betas: list[float] = key(None, "Decay of the two moments: [0.9, 0.999].")
    eps: float = key(1e-8, "Added to the root of the second moment.", low=0)
    adam_w_mode: bool = key(
        True, "Decoupled weight decay; false adds it to the gradient, as the first Adam did."
    )
    bias_correction: bool = refused(True, "Correct the first steps.", _NONE_DOES)
    amsgrad: bool = refused(False, "AMSGrad.", "upstream's Adam, DeepSpeed's, has none either")
    torch_adam: bool = ignored(False, "Use torch's Adam.", "torch's is always used")
    fused: bool = ignored(False, "Use a fused kernel.", "torch's fused kernel is always used")


class SGDParams:
    """optimizer.params of sgd; weight decay is added to the gradient."""

    lr: float = key(None, "Peak learning rate.", above=0)
    momentum: float = key(0.0, "Momentum.", low=0, high=1)
    nesterov: bool = key(False, "Nesterov's momentum.")


class LionParams:
    """optimizer.params of lion; weight decay is decoupled."""

    lr: float = key(None, "Peak learning rate; a third to a tenth of Adam's.", above=0)
    betas: list[float] = key(
        None, "Share of the momentum in a step, and its own decay: [0.9, 0.99]."
    )


class MadgradParams:
    """optimizer.params of madgrad_wd; weight decay is decoupled."""

    lr: float = key(None, "Peak learning rate.", above=0)
    momentum: float = key(0.9, "Momentum; 1 would never move.", low=0, high=1)
    eps: float = key(1e-6, "Added to the cube root of the sum of squares, and to lr.", low=0)


OPTIMIZER_PARAMS = {
    "adam": AdamParams,
    "cpu_adam": AdamParams,
    "cpu_torch_adam": AdamParams,
    "sgd": SGDParams,
    "lion": LionParams,
    "madgrad_wd": MadgradParams,
}
BETAS = {AdamParams: [0.9, 0.999], LionParams: [0.9, 0.99]}  # where none are given
REFUSED = {
    "onebitadam": "it compresses what NCCL sends, on CUDA only, and knows no ZeRO. Use Adam",
    "sm3": "it keeps a number for each row and column of a matrix, and its steps would depend on "
    "how ZeRO and tensor parallelism cut the matrices. Use Adam with use_bnb_optimizer: true, "
    "which needs little memory too",
}
