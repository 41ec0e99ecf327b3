"""How every parameter is laid out: the one table behind initialisation, checkpoints and sharding.

Names are those of the NeoX layer files. Shapes are of the whole tensor, before any sharding.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import prod

from neox.config import ModelConfig


class Split(Enum):
    """How a tensor is divided over the ranks of a tp group."""

    COLUMN = "column"  # by rows of the weight (dim 0): each rank computes its output features
    ROW = "row"  # by columns of the weight (dim 1): each rank takes its input features
    REPLICATED = "replicated"  # whole on every rank
    # Whole on every rank in memory, but each rank's FILE holds a summand: with a parallel residual
    # upstream adds the row-parallel biases on every rank before the one all-reduce, so the bias
    # that takes effect is the sum over the files.
    PARTIAL_SUM = "partial_sum"


class Init(Enum):
    """Which rule initialises a tensor."""

    WEIGHT = "init_method"
    OUTPUT_WEIGHT = "output_layer_init_method"
    ZEROS = "zeros"
    ONES = "ones"


@dataclass(frozen=True)
class ParamLayout:
    """One parameter: its whole shape, its split, and the blocks fused into its split dimension.

    A rank's shard of a fused tensor is the concatenation of its shards of the blocks, so
    `blocks=(q, k, v)` is laid out as [q_0 k_0 v_0] on rank 0 and [q_1 k_1 v_1] on rank 1.
    """

    shape: tuple[int, ...]
    split: Split
    init: Init
    blocks: tuple[int, ...] = ()
    is_vocab: bool = False  # dim 0 is the padded vocabulary: may be re-padded or trimmed

    @property
    def dim(self) -> int | None:
        """The dimension that is split, or None."""
        return {Split.COLUMN: 0, Split.ROW: 1}.get(self.split)

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Sizes of the fused blocks along `dim`; one block when nothing is fused."""
        assert self.dim is not None
        return self.blocks or (self.shape[self.dim],)

    def shard_shape(self, tp: int) -> tuple[int, ...]:
        if self.dim is None:
            return self.shape
        shape = list(self.shape)
        assert shape[self.dim] % tp == 0, (self, tp)
        shape[self.dim] //= tp
        return tuple(shape)

    @property
    def numel(self) -> int:
        return prod(self.shape)


LayerLayout = dict[str, ParamLayout]


def pad_vocab_size(vocab_size: int, divisible_by: int, tp: int) -> int:
    """The vocabulary rounded up to a multiple of divisible_by * tp, as upstream pads it."""
    multiple = divisible_by * tp
    return -(-vocab_size // multiple) * multiple


def embedding_layout(config: ModelConfig, padded_vocab_size: int) -> LayerLayout:
    hidden = config.hidden_size
    layout = {"word_embeddings.weight": _vocab_table(padded_vocab_size, hidden)}
    if config.pos_emb == "learned":
        layout["position_embeddings.weight"] = ParamLayout(
            (config.max_position_embeddings, hidden), Split.REPLICATED, Init.WEIGHT
        )
    return layout


def head_layout(config: ModelConfig, padded_vocab_size: int) -> LayerLayout:
    layout = {"final_linear.weight": _vocab_table(padded_vocab_size, config.hidden_size)}
    if config.use_bias_in_final_linear:
        layout["final_linear.bias"] = ParamLayout(
            (padded_vocab_size,), Split.COLUMN, Init.ZEROS, is_vocab=True
        )
    return layout


def final_norm_layout(config: ModelConfig) -> LayerLayout:
    return _norm("norm", config)


def transformer_layout(config: ModelConfig) -> LayerLayout:
    hidden, ffn = config.hidden_size, config.ffn_size
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.kv_heads * config.head_dim
    # With as many key as query heads, query, key and value are interleaved per head, and a split
    # by rows is a split by heads. Grouped queries are stacked as three blocks on each rank.
    qkv_blocks = (q_size, kv_size, kv_size) if kv_size != q_size else ()
    layout = _norm("input_layernorm", config)
    if not config.shares_norm:
        layout |= _norm("post_attention_layernorm", config)
    layout |= _linear(
        "attention.query_key_value",
        (q_size + 2 * kv_size, hidden),
        Split.COLUMN,
        config.use_bias_in_attn_linear,
        config,
        qkv_blocks,
    )
    layout |= _linear(
        "attention.dense", (hidden, q_size), Split.ROW, config.use_bias_in_attn_linear, config
    )
    layout |= _linear(
        "mlp.linear1",
        (ffn * (2 if config.is_gated else 1), hidden),
        Split.COLUMN,
        config.use_bias_in_mlp,
        config,
        (ffn, ffn) if config.is_gated else (),
    )
    layout |= _linear("mlp.linear2", (hidden, ffn), Split.ROW, config.use_bias_in_mlp, config)
    return layout


def _vocab_table(rows: int, hidden: int) -> ParamLayout:
    return ParamLayout((rows, hidden), Split.COLUMN, Init.WEIGHT, is_vocab=True)


def _norm(name: str, config: ModelConfig) -> LayerLayout:
    shape = (config.hidden_size,)
    if config.norm == "rmsnorm":
        return {f"{name}.scale": ParamLayout(shape, Split.REPLICATED, Init.ONES)}
    return {
        f"{name}.weight": ParamLayout(shape, Split.REPLICATED, Init.ONES),
        f"{name}.bias": ParamLayout(shape, Split.REPLICATED, Init.ZEROS),
    }


def _linear(
    name: str,
    shape: tuple[int, int],
    split: Split,
    bias: bool,
    config: ModelConfig,
    blocks: tuple[int, ...] = (),
) -> LayerLayout:
    weight_init = Init.WEIGHT if split is Split.COLUMN else Init.OUTPUT_WEIGHT
    layout = {f"{name}.weight": ParamLayout(shape, split, weight_init, blocks)}
    if bias:
        bias_split = split
        if split is Split.ROW:
            bias_split = Split.PARTIAL_SUM if config.gpt_j_residual else Split.REPLICATED
        layout[f"{name}.bias"] = ParamLayout(shape[:1], bias_split, Init.ZEROS, blocks)
    return layout
