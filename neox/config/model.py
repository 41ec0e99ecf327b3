"""The architecture: what the model computes, and how its weights start."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from neox.config.fields import REQUIRED, ignored, key, refused

InitMethod = Literal[
    "normal",
    "scaled_normal",
    "orthogonal",
    "scaled_orthogonal",
    "xavier_uniform",
    "xavier_normal",
    "wang_init",
    "small_init",
    "single_residual_scaled_normal",
]
GATED = ("geglu", "reglu", "swiglu", "bilinear", "glu")

FUSED = "torch fuses what is worth fusing by itself, and the result is the same"
TRANSFORMER_ENGINE = "Transformer Engine is not used: the same layers run on torch"
FP8 = "nothing is computed in 8-bit floating point"
MAMBA = "Mamba layers are not supported"
RWKV = "RWKV layers are not supported"
REINFORCE = "online reinforcement learning is not supported"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What defines the network. Can be made alone, without the other sections."""

    num_layers: int = key(REQUIRED, "Transformer layers.", low=1)
    hidden_size: int = key(REQUIRED, "Width of the residual stream.", low=1)
    num_attention_heads: int = key(REQUIRED, "Query heads of each layer.", low=1)
    seq_length: int = key(REQUIRED, "Tokens in a training sample; the longest context.", low=1)
    max_position_embeddings: int = key(
        REQUIRED, "Positions a learned embedding holds; at least seq_length.", low=1
    )
    precision: Literal["fp16", "fp32", "bfloat16"] | None = key(
        None, "Type of the weights; the fp16 and bf16 blocks set it when it is left out."
    )

    num_kv_heads: int | None = key(
        None, "Heads of keys and values (grouped-query attention); all heads by default.", low=1
    )
    attention_config: list[Any] | None = key(
        None, 'Layer kinds as [[["global"], repeats or "all"], ...]; "global" and "flash" are one.'
    )
    sliding_window_width: int | None = key(
        None, "Tokens back that attention reaches; everything by default.", low=1
    )
    attention_dropout: float = key(0.0, "Dropout of the attention weights.", low=0, high=1)
    attention_softmax_in_fp32: bool = ignored(
        False, "Softmax in fp32.", "torch's attention always accumulates it in fp32"
    )
    apply_query_key_layer_scaling: bool = ignored(
        False,
        "Divide the scores by the layer's number before the softmax and undo it after.",
        "it guards fp16 scores against overflow, and torch's attention keeps scores in fp32",
    )
    use_qk_layernorm: bool = refused(
        False, "Normalise queries and keys.", "normalised queries and keys are not supported"
    )
    sparsity_config: dict[str, Any] | None = refused(
        None, "Shape of sparse attention.", "sparse attention is not supported"
    )

    pos_emb: Literal["learned", "rotary", "sinusoidal", "rpe", "alibi", "none"] = key(
        "learned",
        "How positions enter.",
        refused=dict.fromkeys(
            ("sinusoidal", "rpe", "alibi"), "it is not supported. Use rotary, learned or none"
        ),
    )
    rotary_pct: float = key(1.0, "Share of each head that is rotated.", above=0, high=1)
    rotary_emb_base: int = key(10000, "Base of the rotary wavelengths.", low=1)
    rotary_interleaved: bool = key(
        False, "Turn neighbouring dimensions of a head as pairs (GPT-J); NeoX's are half apart."
    )
    rotary_save_freqs_buffer: bool = ignored(
        False, "Keep the rotary frequencies in checkpoints.", "they are computed, never saved"
    )
    rpe_num_buckets: int = refused(
        32, "Buckets of relative positions.", "pos_emb: rpe is not supported"
    )
    rpe_max_distance: int = refused(
        128, "Furthest relative position.", "pos_emb: rpe is not supported"
    )
    opt_pos_emb_offset: int = refused(
        0, "Offset of learned positions, as OPT has it.", "OPT's position offset is not supported"
    )

    norm: Literal[
        "layernorm",
        "rmsnorm",
        "non_parametric_layernorm",
        "scalenorm",
        "te_rmsnorm",
        "te_layernorm",
    ] = key(
        "layernorm",
        "Normalisation in every layer.",
        refused={
            "non_parametric_layernorm": "it is not supported. Use layernorm or rmsnorm",
            "scalenorm": "it is not supported. Use layernorm or rmsnorm",
            "te_rmsnorm": "Transformer Engine is not used. Use rmsnorm, the same arithmetic",
            "te_layernorm": "Transformer Engine is not used. Use layernorm, the same arithmetic",
        },
    )
    layernorm_epsilon: float = key(1e-05, "Added to the variance by layernorm.", above=0)
    rms_norm_epsilon: float = key(1e-08, "Added to the root mean square by rmsnorm.", above=0)
    scalenorm_epsilon: float = refused(
        1e-08, "Smallest norm of scalenorm.", "norm: scalenorm is not supported"
    )
    layernorm_fusion: bool = ignored(False, "Fused layer norm kernel.", FUSED)
    rmsnorm_fusion: bool = ignored(False, "Fused RMS norm kernel.", FUSED)
    use_bias_in_norms: bool = ignored(
        True,
        "Biases in the norms.",
        "layernorm has a bias and rmsnorm has none, whatever it says (also upstream)",
    )

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
    ] = key("gelu", "Activation of the MLP; the gated ones multiply two projections.")
    intermediate_size: int | None = key(
        None, "Inner width of the MLP, before a gated activation's 2/3; 4 x hidden_size.", low=1
    )
    expansion_factor: float | None = key(
        None, "Inner width of the MLP as a multiple of hidden_size.", above=0
    )
    mlp_multiple_of: int = key(1, "The inner width is rounded up to a multiple of it.", low=1)
    use_flashattn_swiglu: bool = ignored(False, "flash-attn's SwiGLU kernel.", FUSED)
    bias_gelu_fusion: bool = key(False, "GELU by its tanh approximation, as the kernel had it.")
    onnx_safe: bool = ignored(
        False, "GELU written with erf.", "GELU is the erf form unless bias_gelu_fusion is on"
    )

    gpt_j_residual: bool = key(False, "Attention and MLP side by side on one residual.")
    gpt_j_tied: bool = key(False, "With gpt_j_residual: one norm feeds both branches.")
    hidden_dropout: float = key(0.0, "Dropout of both branches' outputs.", low=0, high=1)
    use_bias_in_attn_linear: bool = key(True, "Biases in the attention's projections.")
    use_bias_in_mlp: bool = key(True, "Biases in the MLP's projections.")
    no_weight_tying: bool = key(False, "Give the output layer weights of its own.")
    use_bias_in_final_linear: bool = key(
        False, "A bias in the output layer, one number a token (GPT-J)."
    )
    make_vocab_size_divisible_by: int = key(
        128, "The vocabulary is padded to a multiple of this times model_parallel_size.", low=1
    )
    output_layer_parallelism: Literal["column", "row"] = key(
        "column",
        "How the output layer is split.",
        refused={"row": "it gave wrong losses upstream and was removed there. Use column"},
    )
    num_unique_layers: int | None = ignored(
        None, "Layers with weights of their own.", "layers never share weights (nor upstream)"
    )
    param_sharing_style: str = ignored(
        "grouped", "How layers share weights.", "layers never share weights (nor upstream)"
    )

    init_method: InitMethod = key("normal", "Initialisation of all weights but the next.")
    output_layer_init_method: InitMethod = key(
        "scaled_normal", "Initialisation of the projections back into the residual stream."
    )
    init_method_std: float = key(0.02, "Standard deviation of the normal methods.", above=0)
    use_cpu_initialization: bool = ignored(
        False,
        "Initialise weights on the CPU.",
        "a weight's values depend on the seed and its place, not on the device",
    )

    scaled_upper_triang_masked_softmax_fusion: bool = ignored(False, "Fused softmax.", FUSED)
    scaled_masked_softmax_fusion: bool = ignored(False, "Fused softmax.", FUSED)
    bias_dropout_fusion: bool = ignored(False, "Fused bias and dropout.", FUSED)
    rope_fusion: bool = ignored(False, "Fused rotary embedding.", FUSED)
    fused_kernels_build_path: str | None = ignored(
        None, "Where kernels are compiled.", "no kernels are compiled"
    )
    fp16_lm_cross_entropy: bool = ignored(
        False, "The loss in fp16.", "the loss is always computed in fp32"
    )

    te_columnparallel: bool = ignored(False, "Transformer Engine's layer.", TRANSFORMER_ENGINE)
    te_rowparallel: bool = ignored(False, "Transformer Engine's layer.", TRANSFORMER_ENGINE)
    te_layernorm_mlp: bool = ignored(False, "Transformer Engine's layer.", TRANSFORMER_ENGINE)
    te_mha: bool = ignored(False, "Transformer Engine's layer.", TRANSFORMER_ENGINE)
    te_fp8_format: Literal["e4m3", "hybrid"] = ignored("hybrid", "8-bit format.", FP8)
    te_fp8_wgrad: bool = ignored(True, "Weight gradients in 8 bits.", FP8)
    te_fp8_amax_history_len: int = ignored(1, "Steps of history for 8-bit scales.", FP8)
    te_fp8_amax_compute_algo: str = ignored("most_recent", "How 8-bit scales are chosen.", FP8)
    te_fp8_margin: int = ignored(0, "Margin of the 8-bit scales.", FP8)
    te_fp8_mha: bool = ignored(False, "Attention in 8 bits.", FP8)

    soft_prompt_tuning: dict[str, Any] | None = refused(
        None, "Train a soft prompt only.", "soft prompts are not supported"
    )
    gmlp_attn_dim: int = refused(64, "Attention width of gMLP.", "gMLP layers are not supported")
    mamba_selective_scan_fusion: bool = refused(False, "Mamba kernel.", MAMBA)
    mamba_causal_conv_fusion: bool = refused(False, "Mamba kernel.", MAMBA)
    mamba_inner_func_fusion: bool = refused(False, "Mamba kernel.", MAMBA)
    mamba_selective_fp32_params: bool = refused(True, "Mamba's A and D in fp32.", MAMBA)
    mamba_use_bias_in_conv: bool = refused(True, "Bias in Mamba's convolution.", MAMBA)
    mamba_use_bias_in_linears: bool = refused(False, "Biases in Mamba's projections.", MAMBA)
    dim_att: int | None = refused(None, "Attention width of RWKV.", RWKV)
    head_size: int | None = refused(None, "Head width of RWKV.", RWKV)
    ffn_dim: int | None = refused(None, "Inner width of RWKV.", RWKV)
    serve_model_weights: bool = refused(False, "Serve weights to samplers.", REINFORCE)
    weight_server_port: int | list[int] = refused(6000, "Port of the weight server.", REINFORCE)
    online_dataserver_ips: str | list[str] = refused(
        "localhost", "Hosts that send samples.", REINFORCE
    )
    online_dataserver_ports: int | list[int] = refused(
        10000, "Ports of the hosts that send samples.", REINFORCE
    )

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
    def shares_norm(self) -> bool:
        """Whether one norm feeds attention and MLP. The sequential residual always has two."""
        return self.gpt_j_residual and self.gpt_j_tied

    @property
    def is_gated(self) -> bool:
        """Whether the MLP multiplies its inner activations by a second projection."""
        return self.activation in GATED

    @property
    def ffn_size(self) -> int:
        """The MLP's inner width: what its last projection reads.

        A gated MLP has 2/3 of the width in its first projection, half of it for the values and
        half for the gate (so 1/3 here), each half rounded up to `mlp_multiple_of`.
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
        """The weights' type, by its name in torch."""
        if self.precision == "fp16":
            return "float16"
        return "bfloat16" if self.precision == "bfloat16" else "float32"
