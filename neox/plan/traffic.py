"""Bytes that the element-wise work of a model moves through a device's memory.

Matrix products are bound by arithmetic, all the rest of a layer by the memory's bandwidth: norms,
residual sums, activations, softmax. Such an operation costs what it reads and writes, so they are
counted here in passes: one pass reads or writes a tensor once. The counts are those of kernels
that each do one operation, as PyTorch's do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from neox.config import NeoXConfig

FLOAT32 = 4  # bytes


class Passes(NamedTuple):
    """Over one tensor, in its forward and its backward pass."""

    forward: float
    backward: float

    def times(self, factor: float) -> Passes:
        return Passes(factor * self.forward, factor * self.backward)

    def plus(self, other: Passes) -> Passes:
        return Passes(self.forward + other.forward, self.backward + other.backward)


NONE = Passes(0, 0)
NORM = Passes(2, 5)  # backward: x and dy for dx, both once more for the weights' gradients
SUM = Passes(3, 3)  # of two tensors; backward, of their gradients
BIAS = Passes(2, 1)  # where it is not part of the product
DROPOUT = Passes(2.5, 2.5)  # the mask has one byte where half precision has two
ACTIVATION = Passes(2, 3)
GATE = Passes(3, 6)
COPY = Passes(2, 2)
SPLIT = Passes(0, 2)  # views of one tensor, whose gradients are joined
ROTATION = Passes(10, 10)  # two products, a swap and a sum of them
SCORES = Passes(4, 7)  # product, softmax, product; backward, four products and softmax's three
LOSS = Passes(10, 4.5)  # logits: to float32, maximum, difference, exponential, sum, quotient
ACCUMULATION = 3  # a weight's gradient is added to those of micro-batches before


@dataclass(frozen=True)
class Shape:
    """One micro-batch in one layer on one rank."""

    micro_batch: int
    sequence: int
    hidden: int
    heads: int
    ffn: int  # inner width of the feed-forward layer
    vocab: int  # padded
    tp: int
    element_size: int  # bytes
    sums: Passes  # over [tokens, hidden]: biases, dropout and residual sums, as each rank does them
    copies: Passes  # over [tokens, hidden / tp]: what is done to query, key, value and context
    gated: bool = False
    norms: int = 2
    norm: Passes = NORM
    attention_dropout: bool = False
    scores_in_memory: bool = False  # attention writes its scores, as before FlashAttention

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.sequence

    @property
    def layer(self) -> Passes:
        """Bytes of one transformer layer on this rank.

        What is not split over tp ranks (norms, residual sums) is read and written by each.
        """
        whole = self.norm.times(self.norms).plus(self.sums).times(self.hidden)
        activation = ACTIVATION.plus(GATE if self.gated else NONE).times(self.ffn)
        local = activation.plus(self.copies.times(self.hidden))
        if self.scores_in_memory:
            scores = SCORES.plus(DROPOUT if self.attention_dropout else NONE)
            local = local.plus(scores.times(self.heads * self.sequence))
        return whole.plus(local.times(1 / self.tp)).times(self.element_size * self.tokens)

    @property
    def accumulation(self) -> float:
        """Bytes of adding up one layer's gradients of one micro-batch on this rank."""
        weights = self.hidden * (4 * self.hidden + self.ffn * (3 if self.gated else 2)) / self.tp
        return self.element_size * ACCUMULATION * weights

    @property
    def head(self) -> Passes:
        """Bytes of the loss over the logits [tokens, vocab / tp], in float32."""
        return LOSS.times(FLOAT32 * self.tokens * self.vocab / self.tp)


def shape_of(config: NeoXConfig, padded_vocab_size: int) -> Shape:
    """What this engine does for one micro-batch of a configuration.

    Attention keeps its scores out of memory: it is FlashAttention on CUDA, and in blocks on a CPU.
    """
    size = config.train_micro_batch_size_per_gpu
    assert size is not None
    rotated = config.rotary_pct if config.pos_emb == "rotary" else 0.0
    # Two branches, each with dropout. With sequence parallelism a rank adds a part of the residual
    # stream only; norms, dropout and the sum of parallel branches see whole sequences here.
    part = 1 / config.model_parallel_size if config.sequence_parallel else 1.0
    residual = SUM.times(part).plus(SUM if config.gpt_j_residual else SUM.times(part))
    dropout = DROPOUT.times(2 if config.hidden_dropout else 0)
    return Shape(
        micro_batch=size,
        sequence=config.seq_length,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        ffn=config.ffn_size,
        vocab=padded_vocab_size,
        tp=config.model_parallel_size,
        element_size=FLOAT32 if config.precision == "fp32" else 2,
        sums=residual.plus(dropout),
        copies=ROTATION.times(2 * rotated).plus(SPLIT.times(3)),
        gated=config.is_gated,
        norms=1 if config.shares_norm else 2,
        attention_dropout=bool(config.attention_dropout),
    )
