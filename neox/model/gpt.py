"""The model as a list of layers, each at its place in NeoX's numbering.

    0        embedding
    1        batch-first -> sequence-first   (no parameters, so no file)
    2 ..     transformer layers
    L + 2    sequence-first -> batch-first   (no parameters, so no file)
    L + 3    final norm
    L + 4    output projection; with tied weights the embedding again, and no file

The sequential, the pipelined and the generating model are three ways of walking this list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neox.config import ModelConfig
from neox.model.block import TransformerLayer
from neox.model.layout import (
    LayerLayout,
    embedding_layout,
    final_norm_layout,
    head_layout,
    transformer_layout,
)
from neox.model.norms import build_norm
from neox.model.positions import RotaryTable
from neox.parallel.groups import ProcessGroups
from neox.parallel.layers import column_linear, copy_to_tensor_parallel, vocab_embedding
from neox.parallel.rng import DropoutStreams


class Embedding(nn.Module):
    """Token ids [B, S] -> [B, S, H]."""

    def __init__(
        self,
        config: ModelConfig,
        padded_vocab_size: int,
        dtype: torch.dtype,
        groups: ProcessGroups,
    ) -> None:
        super().__init__()
        self.groups = groups
        self.dropout = config.hidden_dropout
        self.word_embeddings = vocab_embedding(padded_vocab_size, config.hidden_size, dtype, groups)
        self.position_embeddings: nn.Embedding | None = None
        if config.pos_emb == "learned":
            self.position_embeddings = nn.Embedding(
                config.max_position_embeddings, config.hidden_size, dtype=dtype
            )

    def forward(self, tokens_BS: Tensor, start: int = 0) -> Tensor:
        """`start` is the position of the first token: the number of tokens already cached."""
        x_BSH = self.word_embeddings(tokens_BS)
        if self.position_embeddings is not None:
            stop = start + tokens_BS.shape[1]
            positions = torch.arange(start, stop, device=tokens_BS.device)
            x_BSH = x_BSH + self.position_embeddings(positions)
        return F.dropout(x_BSH, self.dropout, self.training) if self.dropout else x_BSH

    def logits(self, x_BSH: Tensor) -> Tensor:
        """The table used as the output projection: this rank's vocabulary slice, [B, S, V / tp]."""
        (x_BSH,) = copy_to_tensor_parallel((x_BSH,), self.groups)
        return F.linear(x_BSH, self.word_embeddings.get_parameter("weight"))


class FinalNorm(nn.Module):
    """x_BSH -> x_BSH."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = build_norm(config, dtype)

    def forward(self, x_BSH: Tensor) -> Tensor:
        return self.norm(x_BSH)


class Head(nn.Module):
    """x_BSH -> logits of this rank's vocabulary slice, [B, S, V / tp]."""

    def __init__(
        self,
        config: ModelConfig,
        padded_vocab_size: int,
        dtype: torch.dtype,
        groups: ProcessGroups,
    ) -> None:
        super().__init__()
        self.final_linear = column_linear(
            config.hidden_size, padded_vocab_size, False, dtype, groups
        )

    def forward(self, x_BSH: Tensor) -> Tensor:
        return self.final_linear(x_BSH)


def to_sequence_first(x_BSH: Tensor) -> Tensor:
    return x_BSH.transpose(0, 1).contiguous()


def to_batch_first(x_SBH: Tensor) -> Tensor:
    return x_SBH.transpose(0, 1).contiguous()


def tied_logits(embedding: Embedding, x_BSH: Tensor) -> Tensor:
    return embedding.logits(x_BSH)


TIED_EMBEDDING = "embed"  # upstream's key of the weights that first and last stage share


@dataclass(frozen=True)
class Layer:
    """A layer that can be built on the rank that owns it: its place, its kind, its layout.

    `kind` is a module class, or a function for the layers without parameters. Layers with the
    same `tied` key share one module; `forward` says how it is called here, if not as itself.
    """

    index: int
    kind: Callable[..., Any]
    args: tuple[Any, ...] = ()
    layout: LayerLayout | None = None
    tied: str | None = None
    forward: Callable[[Any, Tensor], Tensor] | None = None

    @property
    def has_parameters(self) -> bool:
        return self.layout is not None

    @property
    def has_file(self) -> bool:
        """Whether its parameters are its own; a tied output projection's are the embedding's."""
        return self.has_parameters and self.forward is None

    @property
    def file_index(self) -> int:
        """The layer whose file holds its parameters."""
        return 0 if self.tied else self.index

    def __call__(self, module: Any, x: Tensor) -> Tensor:
        """Run `module`, which `build` made, as this layer."""
        return self.forward(module, x) if self.forward else module(x)

    def build(self) -> Any:
        """The module on the CPU, its parameters allocated and not yet filled; or the function."""
        if not self.has_parameters:
            return self.kind
        module = self.kind(*self.args)
        assert self.layout is not None
        for name, parameter in module.named_parameters():
            # DeepSpeed counts a parameter in the gradient norm on every tp rank if it is a shard,
            # and on the first one only if it is a replica.
            parameter.tensor_model_parallel = self.layout[name].dim is not None
        return module


Fill = Callable[[nn.Module, Layer], None]  # sets the parameters of a layer that was just built
LocalLayers = list[tuple[Layer, Any]]  # consecutive layers with their modules or functions


def build_layers(wanted: Iterable[Layer], fill: Fill) -> LocalLayers:
    """Build and fill consecutive layers for one rank; those that are tied share a module."""
    tied: dict[str, Any] = {}
    local: LocalLayers = []
    for layer in wanted:
        module = tied.get(layer.tied) if layer.tied else None
        if module is None:
            module = layer.build()
            if layer.has_parameters:
                fill(module, layer)
            if layer.tied:
                tied[layer.tied] = module
        local.append((layer, module))
    return local


def torch_dtype(name: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def layers(
    config: ModelConfig,
    padded_vocab_size: int,
    dtype: torch.dtype,
    groups: ProcessGroups,
    streams: DropoutStreams | None = None,
) -> list[Layer]:
    """The whole model; position in the list is NeoX's layer index. Nothing is allocated yet."""
    depth = config.num_layers
    rotary = RotaryTable(config) if config.pos_emb == "rotary" else None
    block_args = (config, dtype, groups, rotary, streams)
    vocab_args = (config, padded_vocab_size, dtype, groups)
    first = partial(
        Layer,
        kind=Embedding,
        args=vocab_args,
        layout=embedding_layout(config, padded_vocab_size),
        tied=None if config.no_weight_tying else TIED_EMBEDDING,
    )
    if config.no_weight_tying:
        head = Layer(depth + 4, Head, vocab_args, head_layout(config, padded_vocab_size))
    else:
        head = first(depth + 4, forward=tied_logits)
    block_layout = transformer_layout(config)
    return [
        first(0),
        Layer(1, to_sequence_first),
        *(Layer(i + 2, TransformerLayer, block_args, block_layout) for i in range(depth)),
        Layer(depth + 2, to_batch_first),
        Layer(depth + 3, FinalNorm, (config, dtype), final_norm_layout(config)),
        head,
    ]


def count_parameters(config: ModelConfig, padded_vocab_size: int) -> int:
    """Parameters of the whole model, each counted once."""
    layouts = [
        embedding_layout(config, padded_vocab_size),
        *[transformer_layout(config)] * config.num_layers,
        final_norm_layout(config),
    ]
    if config.no_weight_tying:
        layouts.append(head_layout(config, padded_vocab_size))
    return sum(param.numel for layout in layouts for param in layout.values())


def partition(num_layers: int, stages: int) -> list[range]:
    """The layer indices of each stage: transformer layers spread evenly, the first stages taking
    one more where they don't divide; embedding and head at the ends."""
    quotient, remainder = divmod(num_layers, stages)
    bounds = [0]
    for stage in range(stages):
        bounds.append(bounds[-1] + quotient + (stage < remainder))
    starts = [0] + [2 + bound for bound in bounds[1:-1]]
    return [
        range(start, stop)
        for start, stop in zip(starts, [*starts[1:], num_layers + 5], strict=True)
    ]
