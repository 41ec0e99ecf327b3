"""ModelConfig."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from neox.config.fields import REQUIRED, key


GATED = ("geglu", "reglu", "swiglu", "bilinear", "glu")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    precision: Literal["fp16", "fp32", "bfloat16"] | None = key(None, "")
    num_layers: int = key(REQUIRED, "")
    hidden_size: int = key(REQUIRED, "")
    intermediate_size: int | None = key(None, "")
    mlp_multiple_of: int = key(1, "")
    expansion_factor: float | None = key(None, "")
    num_attention_heads: int = key(REQUIRED, "")
    num_kv_heads: int | None = key(None, "")
    seq_length: int = key(REQUIRED, "")
    sliding_window_width: int | None = key(None, "")
    max_position_embeddings: int = key(REQUIRED, "")
    norm: Literal[
        "layernorm",
        "rmsnorm",
        "non_parametric_layernorm",
        "scalenorm",
        "te_rmsnorm",
        "te_layernorm",
    ] = key("layernorm", "")
    layernorm_fusion: bool = key(False, "")
    rmsnorm_fusion: bool = key(False, "")
    use_qk_layernorm: bool = key(False, "")
    layernorm_epsilon: float = key(1e-05, "")
    rms_norm_epsilon: float = key(1e-08, "")
    scalenorm_epsilon: float = key(1e-08, "")
    pos_emb: Literal["learned", "rotary", "sinusoidal", "rpe", "alibi", "none"] = key("learned", "")
    rpe_num_buckets: int = key(32, "")
    rpe_max_distance: int = key(128, "")
    opt_pos_emb_offset: int = key(0, "")
    no_weight_tying: bool = key(False, "")
    attention_config: list | None = key(None, "")
    sparsity_config: dict | None = key(None, "")
    num_unique_layers: int | None = key(None, "")
    param_sharing_style: str = key("grouped", "")
    make_vocab_size_divisible_by: int = key(128, "")
    activation: Literal[
        "gelu",
        "geglu",
        "relu",
        "softsign",
        "swish",
        "mish",
        "silu",
        "reglu",
        "swiglu",
        "bilinear",
        "glu",
    ] = key("gelu", "")
    use_flashattn_swiglu: bool = key(False, "")
    scaled_upper_triang_masked_softmax_fusion: bool = key(False, "")
    scaled_masked_softmax_fusion: bool = key(False, "")
    bias_gelu_fusion: bool = key(False, "")
    bias_dropout_fusion: bool = key(False, "")
    rope_fusion: bool = key(False, "")
    fused_kernels_build_path: str | None = key(None, "")
    fp16_lm_cross_entropy: bool = key(False, "")
    init_method_std: float = key(0.02, "")
    apply_query_key_layer_scaling: bool = key(False, "")
    use_cpu_initialization: bool = key(False, "")
    attention_softmax_in_fp32: bool = key(False, "")
    rotary_pct: float = key(1.0, "")
    rotary_emb_base: int = key(10000, "")
    rotary_save_freqs_buffer: bool = key(False, "")
    init_method: Literal[
        "normal",
        "scaled_normal",
        "orthogonal",
        "scaled_orthogonal",
        "xavier_uniform",
        "xavier_normal",
        "wang_init",
        "small_init",
        "single_residual_scaled_normal",
    ] = key("normal", "")
    output_layer_init_method: Literal[
        "normal",
        "scaled_normal",
        "orthogonal",
        "scaled_orthogonal",
        "xavier_uniform",
        "xavier_normal",
        "wang_init",
        "small_init",
        "single_residual_scaled_normal",
    ] = key("scaled_normal", "")
    gmlp_attn_dim: int = key(64, "")
    gpt_j_residual: bool = key(False, "")
    gpt_j_tied: bool = key(False, "")
    use_bias_in_norms: bool = key(True, "")
    use_bias_in_attn_linear: bool = key(True, "")
    use_bias_in_mlp: bool = key(True, "")
    soft_prompt_tuning: dict | None = key(None, "")
    mamba_selective_scan_fusion: bool = key(False, "")
    mamba_causal_conv_fusion: bool = key(False, "")
    mamba_inner_func_fusion: bool = key(False, "")
    mamba_selective_fp32_params: bool = key(True, "")
    mamba_use_bias_in_conv: bool = key(True, "")
    mamba_use_bias_in_linears: bool = key(False, "")
    output_layer_parallelism: Literal["column"] = key("column", "")
    serve_model_weights: bool = key(False, "")
    weight_server_port: int | list[int] = key(6000, "")
    online_dataserver_ips: str | list[str] = key("localhost", "")
    online_dataserver_ports: int | list[int] = key(10000, "")
    te_columnparallel: bool = key(False, "")
    te_rowparallel: bool = key(False, "")
    te_layernorm_mlp: bool = key(False, "")
    te_mha: bool = key(False, "")
    te_fp8_format: Literal["e4m3", "hybrid"] = key("hybrid", "")
    te_fp8_wgrad: bool = key(True, "")
    te_fp8_amax_history_len: int = key(1, "")
    te_fp8_amax_compute_algo: str = key("most_recent", "")
    te_fp8_margin: int = key(0, "")
    te_fp8_mha: bool = key(False, "")
    dim_att: int | None = key(None, "")
    head_size: int | None = key(None, "")
    ffn_dim: int | None = key(None, "")
    attention_dropout: float = key(0.0, "")
    hidden_dropout: float = key(0.0, "")
    onnx_safe: bool = key(False, "")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of each head that the rotary embedding turns."""
        return int(self.head_dim * self.rotary_pct)

    @property
    def kv_heads(self) -> int:
        """Heads of the keys and values: `num_kv_heads`, or one for every query head."""
        return self.num_kv_heads or self.num_attention_heads

    @property
    def is_gated(self) -> bool:
        """Whether the MLP multiplies its inner activations by a second projection."""
        return self.activation in GATED

    @property
    def ffn_size(self) -> int:
        """The MLP's inner width: what its last projection reads.

        A gated MLP scales the width by 2/3, which keeps the parameter count, packs both halves
        into one projection of 2 * ffn_size rows, and rounds each half up to `mlp_multiple_of`.
        """
        if self.intermediate_size is not None:
            width = self.intermediate_size
        elif self.expansion_factor is not None:
            width = int(self.expansion_factor * self.hidden_size)
        else:
            width = 4 * self.hidden_size
        if self.is_gated:
            width = math.ceil(int(width * 2 / 3) / 2)
        return math.ceil(width / self.mlp_multiple_of) * self.mlp_multiple_of

    @property
    def gelu_approximation(self) -> Literal["none", "tanh"]:
        """The `approximate` argument of torch's GELU; upstream's fused kernel is the tanh form."""
        return "tanh" if self.bias_gelu_fusion and self.activation == "gelu" else "none"

    @property
    def dtype(self) -> Literal["float32", "bfloat16", "float16"]:
        """The parameters' type, by its name in torch."""
        names = {"fp16": "float16", "bfloat16": "bfloat16", "fp32": "float32", None: "float32"}
        return names[self.precision]  # type: ignore[return-value]
