"""The pipeline stages of a planned run: their layers, and how a micro-batch goes through them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from neox.config import NeoXConfig
from neox.config.agreement import DEFAULT_PARTITION
from neox.engine.recompute import Recompute
from neox.model.block import TransformerLayer
from neox.model.frozen import Frozen
from neox.model.gpt import Layer, layers, partition, torch_dtype
from neox.model.layout import LayerLayout, Split
from neox.model.positions import RotaryTable
from neox.model.quantized import BLOCK, EightBit
from neox.parallel.region import TensorParallelRegion
from neox.parallel.rng import DropoutStreams
from neox.parallel.topology import Topology
from neox.plan.state import Held
from neox.plan.trace import Traced, planned_groups, run


@dataclass(frozen=True)
class Chunk:
    """Layers that are run together, and computed again together if `recomputed`.

    Backward, the input of some needs no gradient: nothing before them is trained.
    """

    layers: tuple[Layer, ...]
    recomputed: bool = False
    input_has_gradient: bool = True

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for chunks that do the same."""
        return tuple(layer.kind for layer in self.layers), self.recomputed, self.input_has_gradient


class PlannedModel:
    """The layers as they are on a rank of `config.tp`, of which each kind is built once.

    Its modules hold tensors without contents. Inside `planned_world`. `on_cpu` says where it is to
    run: memory that is asked for and not used costs nothing on a CPU.
    """

    def __init__(self, config: NeoXConfig, padded_vocab_size: int, *, on_cpu: bool = True) -> None:
        self.config = config
        self.on_cpu = on_cpu
        self.extrapolates = False  # see `traced`
        self.rows = padded_vocab_size
        self.dtype = torch_dtype(config.dtype)
        self.groups = planned_groups(Topology(tp=config.tp))
        self._streams = DropoutStreams(config.seed, self.groups)
        self._region = TensorParallelRegion(self.groups, sequence_parallel=config.sequence_parallel)
        self._recompute = Recompute(config, self._streams, self._region, self.groups)
        frozen = None
        if config.lora is not None:
            frozen = Frozen.of_run(config, self.dtype, self.groups, self._streams)
        self.layers = layers(
            config, padded_vocab_size, self.dtype, self.groups, self._streams, self._region, frozen
        )
        self._fake = FakeTensorMode()
        with self._fake:
            for table in self.layers[2].args:
                if isinstance(table, RotaryTable):  # made by whichever layer is the first, for all
                    table.angles(config.seq_length, like=torch.empty(0))
        self._modules: dict[Any, Any] = {}
        self._traced: dict[Any, Traced] = {}
        self.held: dict[Any, Held] = {}  # of neox.plan.memory, by what it depends on

    def variant(self, config: NeoXConfig) -> PlannedModel:
        """The same model with the same tp on another grid, with other batches or recomputation.

        What is known of one is known of the other.
        """
        assert (config.tp, config.dtype) == (self.config.tp, self.config.dtype)
        other = copy.copy(self)
        other.config = config
        other._recompute = Recompute(config, self._streams, self._region, self.groups)
        return other

    def module(self, layer: Layer) -> Any:
        """The layer's module without contents, or its function."""
        key = (layer.kind, layer.tied) if layer.has_parameters else layer.index
        if key not in self._modules:
            with self._fake:
                module = self._modules[key] = layer.build()
                if isinstance(module, nn.Module) and layer.layout is not None:
                    fill_eight_bits(module, layer.layout)
        return self._modules[key]

    def parameters(self, stage: range) -> list[nn.Parameter]:
        """Of a stage, in the order of its layers; those of tied layers once.

        Blocks have the same objects, again and again.
        """
        return [p for layer in holders(self.layers, stage) for p in self.module(layer).parameters()]

    def trained(self, stage: range) -> list[nn.Parameter]:
        """Those of a stage's parameters that the optimizer is given."""
        return [p for p in self.parameters(stage) if p.requires_grad]

    def reached(self, stage: range) -> list[nn.Parameter]:
        """Those of a stage that are trained and ever have a gradient.

        The last stage has its twin of a tied embedding with a table of positions, which has none.
        """
        trained, head = self.trained(stage), self.layers[-1]
        if head.tied is None or head.index not in stage or self.layers[0].index in stage:
            return trained
        positions = self.module(head).position_embeddings
        unused = set() if positions is None else {id(p) for p in positions.parameters()}
        return [p for p in trained if id(p) not in unused]

    def buffer_bytes(self, stage: range) -> int:
        """Of a stage's weights that are no parameters: those of 8 bits."""
        modules = (self.module(layer) for layer in holders(self.layers, stage))
        return sum(buffer.nbytes for module in modules for buffer in module.buffers())

    def stages(self) -> list[range]:
        """The layer indices of each stage."""
        if (
            self.config.pipe_partition_method == DEFAULT_PARTITION
            or not self.config.is_pipe_parallel
        ):
            return partition(self.config.num_layers, self.config.pp)
        from neox.engine.pipelined import stage_ranges  # with DeepSpeed, whose rules they are

        return stage_ranges(self.config, self.layers)

    def untrained(self) -> list[int]:
        """The numbers of stages in which nothing is trained: training refuses them."""
        return [number for number, stage in enumerate(self.stages()) if not self.trained(stage)]

    def chunks(self, stage: range) -> list[Chunk]:
        """How a stage is walked, but for the output projection: see the two engines."""
        mine = self.layers[stage.start : min(stage.stop, len(self.layers) - 1)]
        at_once = self._recompute.layers_at_once
        if self.config.is_pipe_parallel and at_once:
            # DeepSpeed's PipelineModule counts all layers, and recomputes those with parameters.
            parts = [mine[at : at + at_once] for at in range(0, len(mine), at_once)]
            return [self._chunk(p, any(layer.has_parameters for layer in p)) for p in parts]
        found: list[Chunk] = []
        for is_block, group in groupby(mine, lambda layer: layer.kind is TransformerLayer):
            run_of = list(group)
            size = (at_once or 1) if is_block else len(run_of)
            found += [
                self._chunk(run_of[at : at + size], bool(is_block and at_once))
                for at in range(0, len(run_of), size)
            ]
        return found

    def _chunk(self, some: Sequence[Layer], recomputed: bool) -> Chunk:
        return Chunk(tuple(some), recomputed, some[0].index > self._first_trained)

    @cached_property
    def _first_trained(self) -> int:
        """The index of the first layer of the model that has anything to train."""
        return next(
            layer.index
            for layer in self.layers
            if layer.has_parameters
            and any(parameter.requires_grad for parameter in self.module(layer).parameters())
        )

    def traced(self, chunk: Chunk) -> Traced:
        """A micro-batch through a chunk.

        What layers keep, need and send is so much and so much more for each sequence, but for a
        batch of one, which needs fewer copies. So a model that `extrapolates` knows large batches
        from those of 2 and 3.
        """
        batch, length = self._batch_shape
        if not self.extrapolates or batch <= 3:
            return self._traced_at(chunk, batch, length)
        two, three = (self._traced_at(chunk, size, length) for size in (2, 3))
        return two.extrapolated(three, batch - 2)

    def _traced_at(self, chunk: Chunk, batch: int, length: int) -> Traced:
        key = (*chunk.key, batch, length)
        if key not in self._traced:
            built = [(layer, self.module(layer)) for layer in chunk.layers]

            def walk(x: Tensor) -> Tensor:
                for layer, module in built:
                    x = layer(module, x)
                return x

            def forward(x: Tensor) -> Tensor:
                return self._recompute(walk, x) if chunk.recomputed else walk(x)

            modules = [module for _, module in built if isinstance(module, nn.Module)]
            with self._fake:
                self._traced[key] = run(forward, lambda: self._input(chunk, batch, length), modules)
        return self._traced[key]

    @property
    def head(self) -> Traced:
        """A micro-batch through the output projection and the loss, backward too."""
        key = ("head", self._batch_shape)
        if key not in self._traced:
            self._traced[key] = self._trace_head()
        return self._traced[key]

    def _trace_head(self) -> Traced:
        layer = self.layers[-1]
        with torch.device("meta"):  # reads the loss's value only where there is one
            module = layer.build()
            shape = self._batch_shape
            labels = torch.zeros(shape, dtype=torch.long)
            mask = torch.zeros(shape)

        def make_input() -> Tensor:
            size = (*shape, self.config.hidden_size)
            return torch.empty(size, dtype=self.dtype, device="meta", requires_grad=True)

        return run(lambda x: layer(module, x, labels, mask), make_input, [module])

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.on_cpu else "cuda")

    @property
    def topology(self) -> Topology:
        """The whole grid; `groups` are a rank's of one tp group."""
        return Topology(self.config.pp, self.config.dp, self.config.tp)

    @staticmethod
    def is_block(layer: Layer) -> bool:
        return layer.kind is TransformerLayer

    @property
    def activation_bytes(self) -> int:
        """Of what goes from one block to the next, on this rank."""
        split = self.groups.tp if self._region.splits_sequence else 1
        return self.loss_input_bytes // split

    @property
    def loss_input_bytes(self) -> int:
        batch, length = self._batch_shape
        return batch * length * self.config.hidden_size * self.dtype.itemsize

    @property
    def _batch_shape(self) -> tuple[int, int]:
        return self.config.train_micro_batch_size_per_gpu, self.config.seq_length

    def _input(self, chunk: Chunk, batch: int, length: int) -> Tensor:
        first = chunk.layers[0]
        if first.index == 0:
            return torch.zeros(batch, length, dtype=torch.long)
        if first.index == 1 or first.index > self.config.num_layers + 2:
            size = (batch, length, self.config.hidden_size)
        else:
            split = self.groups.tp if self._region.splits_sequence else 1
            size = (length // split, batch, self.config.hidden_size)
        return torch.empty(size, dtype=self.dtype, requires_grad=chunk.input_has_gradient)


def holders(every: Sequence[Layer], stage: range) -> Iterator[Layer]:
    """The layers of a stage that have weights; those that share them once."""
    tied: set[str] = set()
    for layer in every[stage.start : stage.stop]:
        if layer.has_parameters and layer.tied not in tied:
            tied |= {layer.tied} if layer.tied else set()
            yield layer


def fill_eight_bits(module: nn.Module, layout: LayerLayout) -> None:
    """Put what a checkpoint would into the places of 8-bit weights: see neox.model.quantized."""
    for name, place in module.named_modules():
        if isinstance(place, EightBit):
            rows, columns = place.shape
            group = math.gcd(BLOCK, layout[name].shape[1])  # elements that share a scale
            if layout[name].split is Split.ROW:
                group = math.gcd(group, columns)
            codes = torch.empty(rows, columns, dtype=torch.uint8)
            place.assign(EightBit(codes, torch.empty(rows, columns // group), torch.empty(256)))
