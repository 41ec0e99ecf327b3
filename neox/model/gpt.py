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
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neox.config import ModelConfig
from neox.model.block import TransformerLayer
from neox.model.frozen import Frozen
from neox.model.layout import (
    LayerLayout,
    embedding_layout,
    final_norm_layout,
    head_layout,
    transformer_layout,
)
from neox.model.loss import output_loss, score_targets_
from neox.model.norms import build_norm
from neox.model.positions import RotaryTable
from neox.model.projection import adapter_of, bias_of, look_up, project_with, weight_of
from neox.parallel.groups import ProcessGroups
from neox.parallel.layers import column_linear, copy_to_tensor_parallel, linear, vocab_embedding
from neox.parallel.region import TensorParallelRegion
from neox.parallel.rng import DropoutStreams


class Embedding(nn.Module):
    """Token ids [B, S] -> [B, S, H]; with sequence parallelism, this rank's summand of it."""

    def __init__(
        self,
        config: ModelConfig,
        padded_vocab_size: int,
        dtype: torch.dtype,
        groups: ProcessGroups,
        region: TensorParallelRegion,
    ) -> None:
        super().__init__()
        self.groups = groups
        self.region = region
        self.dtype = dtype
        self.dropout = config.hidden_dropout
        self.word_embeddings = vocab_embedding(padded_vocab_size, config.hidden_size, dtype, groups)
        self.position_embeddings: nn.Embedding | None = None
        if config.pos_emb == "learned":
            self.position_embeddings = nn.Embedding(
                config.max_position_embeddings, config.hidden_size, dtype=dtype
            )

    def forward(self, tokens_BS: Tensor, positions: Tensor | None = None) -> Tensor:
        """`positions` of the tokens, [S] or [B, S]; without, they are the first ones."""
        summand = self.region.splits_sequence
        x_BSH = look_up(
            self.word_embeddings, tokens_BS, self.dtype, self.groups, reduce=not summand
        )
        if self.position_embeddings is not None:
            if positions is None:
                positions = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
            added = self.position_embeddings(positions)
            x_BSH = x_BSH + (self.region.share(added) if summand else added)
        return F.dropout(x_BSH, self.dropout, self.training) if self.dropout else x_BSH

    def project(
        self, x_BSH: Tensor, labels_BS: Tensor | None = None, loss_mask_BS: Tensor | None = None
    ) -> Tensor:
        """The table used as the output projection: what `Head` returns."""
        return _project(x_BSH, self.word_embeddings, labels_BS, loss_mask_BS, self.groups)

    def score(self, x_UH: Tensor, rows_K: Tensor, targets_K: Tensor, vocab: int) -> Tensor:
        """The table used as the output projection: what `Head.score` returns."""
        return _score(x_UH, self.word_embeddings, rows_K, targets_K, vocab, self.groups)


class FinalNorm(nn.Module):
    """x_BSH -> x_BSH."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = build_norm(config, dtype)

    def forward(self, x_BSH: Tensor) -> Tensor:
        return self.norm(x_BSH)


class Head(nn.Module):
    """x_BSH -> logits of this rank's vocabulary slice, [B, S, V / tp]; with labels, the loss."""

    def __init__(
        self,
        config: ModelConfig,
        padded_vocab_size: int,
        dtype: torch.dtype,
        groups: ProcessGroups,
    ) -> None:
        super().__init__()
        self.groups = groups
        self.final_linear = column_linear(
            config.hidden_size,
            padded_vocab_size,
            config.use_bias_in_final_linear,
            dtype,
            groups,
        )

    def forward(
        self, x_BSH: Tensor, labels_BS: Tensor | None = None, loss_mask_BS: Tensor | None = None
    ) -> Tensor:
        return _project(x_BSH, self.final_linear, labels_BS, loss_mask_BS, self.groups)

    def score(self, x_UH: Tensor, rows_K: Tensor, targets_K: Tensor, vocab: int) -> Tensor:
        """[K, 2] as neox.model.loss.score_targets_, of targets among the first `vocab` tokens."""
        return _score(x_UH, self.final_linear, rows_K, targets_K, vocab, self.groups)


def _project(
    x_BSH: Tensor,
    owner: nn.Module,
    labels_BS: Tensor | None,
    loss_mask_BS: Tensor | None,
    groups: ProcessGroups,
) -> Tensor:
    """Logits by the layer `owner`, or the mean loss: neox.model.loss.output_loss."""
    x_BSH = copy_to_tensor_parallel(x_BSH, groups)
    if labels_BS is None or loss_mask_BS is None:
        return project_with(owner, x_BSH, bias_of(owner))  # not owner(x): it may be the table
    return output_loss(x_BSH, owner, labels_BS, loss_mask_BS, groups)


def _score(
    x_UH: Tensor,
    owner: nn.Module,
    rows_K: Tensor,
    targets_K: Tensor,
    vocab: int,
    groups: ProcessGroups,
) -> Tensor:
    weight_VH, bias_V = weight_of(owner), bias_of(owner)
    if isinstance(weight_VH, Tensor) and adapter_of(owner) is None:
        # V x U instead of U x V: with few hundred rows the product is a tenth faster on a CPU.
        logits_VU = linear(weight_VH, x_UH)
        if bias_V is not None:
            logits_VU += bias_V[:, None]
    else:
        logits_VU = project_with(owner, x_UH, bias_V).t().contiguous()
    return score_targets_(logits_VU, rows_K, targets_K, vocab, groups)


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
    forward: Callable[..., Tensor] | None = None
    frozen: Frozen | None = None

    @cached_property
    def adapters(self) -> LayerLayout:
        """The layout of its LoRA adapters; none where it is trained whole."""
        return self.frozen.adapters(self.index, self.layout) if self.frozen and self.layout else {}

    @cached_property
    def trained(self) -> LayerLayout:
        """The layout of what an optimizer changes."""
        if self.layout is None:
            return {}
        return self.layout if self.frozen is None else self.frozen.trained(self.index, self.layout)

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

    def __call__(self, module: Any, *inputs: Tensor) -> Tensor:
        """Run `module`, which `build` made, as this layer.

        The last one takes x_BSH, or x_BSH with labels and loss mask (see `Head`).
        """
        return self.forward(module, *inputs) if self.forward else module(*inputs)

    def build(self) -> Any:
        """The module on the CPU, its parameters allocated and not yet filled; or the function."""
        if not self.has_parameters:
            return self.kind
        module = self.kind(*self.args)
        assert self.layout is not None
        if self.frozen is not None:
            self.frozen.treat(module, self.index, self.layout, is_tied=self.tied is not None)
        layout = self.layout | self.adapters
        for name, parameter in module.named_parameters():
            # DeepSpeed counts a parameter in the gradient norm on every tp rank if it is a shard,
            # and on the first one only if it is a replica.
            parameter.tensor_model_parallel = layout[name].dim is not None
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
    region: TensorParallelRegion | None = None,
    frozen: Frozen | None = None,
) -> list[Layer]:
    """The whole model; position in the list is NeoX's layer index. Nothing is allocated yet.

    With a `region` of its own, a model may be told to split sequences (sequence_parallel). Of a
    `frozen` one only what that says is trained.
    """
    depth = config.num_layers
    rotary = RotaryTable(config) if config.pos_emb == "rotary" else None
    region = region or TensorParallelRegion(groups)
    block_args = (config, dtype, groups, rotary, streams, region)
    vocab_args = (config, padded_vocab_size, dtype, groups)
    first = partial(
        Layer,
        kind=Embedding,
        args=(*vocab_args, region),
        layout=embedding_layout(config, padded_vocab_size),
        tied=None if config.no_weight_tying else TIED_EMBEDDING,
        frozen=frozen,
    )
    if config.no_weight_tying:
        head_params = head_layout(config, padded_vocab_size)
        head = Layer(depth + 4, Head, vocab_args, head_params, frozen=frozen)
    else:
        head = first(depth + 4, forward=Embedding.project)
    block_layout = transformer_layout(config)
    return [
        first(0),
        Layer(1, region.start),
        *(
            Layer(i + 2, TransformerLayer, block_args, block_layout, frozen=frozen)
            for i in range(depth)
        ),
        Layer(depth + 2, region.end),
        Layer(depth + 3, FinalNorm, (config, dtype), final_norm_layout(config), frozen=frozen),
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
