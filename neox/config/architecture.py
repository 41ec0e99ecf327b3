"""The keys that define the function a model computes: what checkpoint and configuration share."""

from __future__ import annotations

from typing import Any

from neox.config.model import ModelConfig

# Not seq_length, dropout or initialisation: they act on training, and on what may be fed.
ARCHITECTURE = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_kv_heads",
    "sliding_window_width",
    "pos_emb",
    "max_position_embeddings",
    "rotary_pct",
    "rotary_emb_base",
    "norm",
    "layernorm_epsilon",
    "rms_norm_epsilon",
    "activation",
    "bias_gelu_fusion",
    "intermediate_size",
    "expansion_factor",
    "mlp_multiple_of",
    "gpt_j_residual",
    "gpt_j_tied",
    "use_bias_in_attn_linear",
    "use_bias_in_mlp",
    "no_weight_tying",
)


def architecture(config: ModelConfig) -> dict[str, Any]:
    """The values of `ARCHITECTURE`'s keys: numbers, words and None."""
    return {key: getattr(config, key) for key in ARCHITECTURE}
