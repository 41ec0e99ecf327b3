"""Fine-tuning a model most of which stays as it is: adapters, and a base of 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from neox.config.fields import key, keys_of

# LoRA's targets: the model's matrices, and what they are called elsewhere.
TARGETS = {
    "query_key_value": "attention.query_key_value",
    "dense": "attention.dense",
    "linear1": "mlp.linear1",
    "linear2": "mlp.linear2",
    "final_linear": "final_linear",
    "dense_h_to_4h": "mlp.linear1",
    "dense_4h_to_h": "mlp.linear2",
    "out_proj": "attention.dense",
    "fc_in": "mlp.linear1",
    "fc_out": "mlp.linear2",
    "embed_out": "final_linear",
    "lm_head": "final_linear",
}
ALL_LINEAR = "all-linear"  # as PEFT has it: every matrix but the output projection


class LoRA:
    """lora"""

    rank: int = key(16, "Columns of B, rows of A.", low=1)
    alpha: float = key(None, "The product B A is scaled by alpha / rank; 2 x rank.", above=0)
    dropout: float = key(0.0, "Dropout of what goes into A.", low=0, high=1)
    targets: str | list[str] = key(
        ALL_LINEAR,
        "Matrices that get adapters: query_key_value, dense, linear1, linear2, final_linear; "
        "all-linear is all but the last.",
    )
    biases: bool = key(False, "Train the model's biases, too.")
    norms: bool = key(False, "Train the model's norms, too.")


@dataclass(frozen=True, kw_only=True)
class FrozenConfig:
    """What is frozen, and what is trained beside it."""

    lora: dict[str, Any] | None = key(
        None, "Train low-rank adapters of a frozen model, which `load` names.", block=LoRA
    )
    adapter: str | None = key(
        None, "Adapters in PEFT's format, or a folder of checkpoints that hold them, to start with."
    )
    load_in_8bit: bool = key(
        False, "Hold the model's matrices in 8 bits, block-wise as bitsandbytes has them; frozen."
    )
    quantize: Literal["none", "int8", "int4"] = key(
        "none",
        "Quantize the model's matrices while they are loaded, for generation and evaluation: int8, "
        "or int4. On a CPU the rest is then computed in float32.",
    )

    @property
    def lora_values(self) -> dict[str, Any]:
        """The values of the block `lora`, defaults included. It must be there."""
        assert self.lora is not None
        values = {name: spec.default for name, spec in keys_of(LoRA).items()} | self.lora
        return {**values, "alpha": values["alpha"] or 2.0 * values["rank"]}

    @property
    def lora_targets(self) -> list[str]:
        """The targets by the matrices' names in NeoX's files. Every name must be known."""
        given = self.lora_values["targets"]
        names = [given] if isinstance(given, str) else given
        chosen: list[str] = []
        for name in names:
            matrices = list(TARGETS.values())[:4] if name == ALL_LINEAR else [TARGETS[name]]
            chosen += [matrix for matrix in matrices if matrix not in chosen]
        return chosen
