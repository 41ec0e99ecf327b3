"""Bytes that the element-wise work of a model moves through a device's memory.

Matrix products are bound by arithmetic, all the rest of a layer by the memory's bandwidth: norms,
residual sums, activations, softmax. Such an operation costs what it reads and writes, so the table
below counts passes: one pass reads or writes a tensor once.
"""

from __future__ import annotations

from dataclasses import dataclass

from neox.config import NeoXConfig

FLOAT32 = 4  # bytes
NORM = 2  # reads and writes
SUM = 3  # reads two, writes one
DROPOUT = 2.5  # reads and writes; the mask has one byte where half precision has two
ACTIVATION = 2  # reads and writes
ROTATION = 10  # of the rotated part of query and of key: two products, a swap, a sum
SCORES = 4  # written by one product, read and written by softmax, read by the next product
ACCUMULATION = 3  # a weight's gradient is added to those of micro-batches before
LOSS = 8  # logits: to float32, maximum, exponential, sum, and written by and read for products


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
    sums: float  # passes over [tokens, hidden] for biases, dropout and residual sums
    copies: float  # passes over [tokens, hidden / tp] around attention: rotation, transpositions
    gated: bool = False
    norms: int = 2
    attention_dropout: bool = False
    scores_in_memory: bool = False  # attention writes its scores, as before FlashAttention
    sequence_parallel: bool = False  # what every tp rank would do, each does a part of

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.sequence

    @property
    def layer(self) -> float:
        """Bytes of one transformer layer's forward pass on this rank.

        What is not split over tp ranks (norms, residual sums) is read and written by each.
        """
        whole = self.hidden * (NORM * self.norms + self.sums)
        if self.sequence_parallel:
            whole /= self.tp
        local = self.ffn * (ACTIVATION + SUM * self.gated) + self.copies * self.hidden
        scores = 0.0
        if self.scores_in_memory:
            passes = SCORES + DROPOUT * self.attention_dropout
            scores = self.heads * self.sequence * passes
        return self.element_size * self.tokens * (whole + (local + scores) / self.tp)

    @property
    def accumulation(self) -> float:
        """Bytes of adding up one layer's gradients of one micro-batch on this rank."""
        weights = self.hidden * (4 * self.hidden + self.ffn * (3 if self.gated else 2)) / self.tp
        return self.element_size * ACCUMULATION * weights

    @property
    def head(self) -> float:
        """Bytes of the loss's forward pass over the logits [tokens, vocab / tp], in float32."""
        return FLOAT32 * LOSS * self.tokens * self.vocab / self.tp


def shape_of(config: NeoXConfig, padded_vocab_size: int) -> Shape:
    """What this engine does for one micro-batch of a configuration.

    Attention keeps its scores out of memory: it is FlashAttention on CUDA, and in blocks on a CPU.
    """
    size = config.train_micro_batch_size_per_gpu
    assert size is not None
    rotated = config.rotary_pct if config.pos_emb == "rotary" else 0.0
    return Shape(
        micro_batch=size,
        sequence=config.seq_length,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        ffn=config.ffn_size,
        vocab=padded_vocab_size,
        tp=config.model_parallel_size,
        element_size=FLOAT32 if config.precision == "fp32" else 2,
        sums=2 * (SUM + DROPOUT * bool(config.hidden_dropout)),
        copies=2 * ROTATION * rotated,
        gated=config.is_gated,
        norms=1 if config.shares_norm else 2,
        attention_dropout=bool(config.attention_dropout),
        sequence_parallel=config.sequence_parallel,
    )
