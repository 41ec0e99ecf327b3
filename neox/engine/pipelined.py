"""pipe_parallel_size >= 1: the layer list as DeepSpeed's PipelineModule."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from deepspeed.runtime.utils import (
    combine_grad_norm_groups,
    partition_balanced,
    partition_uniform,
)
from torch import Tensor, nn

from neox.config import NeoXConfig
from neox.data.loaders import Batch
from neox.engine.deepspeed import DeepSpeedEngine, wrap
from neox.engine.recompute import Recompute
from neox.errors import ConfigError
from neox.model.gpt import Fill, Layer, LocalLayers
from neox.parallel.groups import ProcessGroups
from neox.parallel.region import TensorParallelRegion
from neox.parallel.rng import DropoutStreams


class PipelinedEngine(DeepSpeedEngine):
    """Stages on different ranks, micro-batches in flight between them (1F1B)."""

    is_pipelined = True

    def train_loss(self, batches: Iterator[Batch]) -> float:
        return float(self.inner.train_batch(_inputs_and_labels(batches)))

    def eval_batch(self, batches: Iterator[Batch]) -> float:
        return float(self.inner.eval_batch(_inputs_and_labels(batches)))


def build_pipelined(
    config: NeoXConfig,
    layers: list[Layer],
    fill: Fill,
    streams: DropoutStreams,
    region: TensorParallelRegion,
    groups: ProcessGroups,
) -> PipelinedEngine:
    """The engine over this rank's stage. Collective over the world."""
    specs = [_spec(layer, fill) for layer in layers]
    recompute = Recompute(config, streams, region, groups)
    _check_method(config.pipe_partition_method, layers)
    with contextlib.redirect_stdout(io.StringIO()):
        model = _Pipeline(
            specs,
            topology=PipeModelDataParallelTopology(groups.pp, groups.tp, groups.dp),
            partition_method=config.pipe_partition_method,
            activation_checkpoint_interval=recompute.layers_at_once,
            activation_checkpoint_func=recompute,
        )
    _check_stages(model, config, groups)
    start, stop = model._local_start, model._local_stop
    local: LocalLayers = list(zip(layers[start:stop], _modules(model, specs), strict=True))
    if groups.is_last_stage:
        # The output projection belongs to the loss: what DeepSpeed calls outputs is its input.
        model.forward_funcs[-1] = _unchanged
        model.loss_fn = partial(_loss, *local[-1])
    inner = wrap(model, config, groups)
    _even_out_norms(inner, groups)
    if groups.is_last_stage:
        _begin_backward_with_the_loss(inner)
    return PipelinedEngine(inner, config, layers, local, streams, region, groups)


def _begin_backward_with_the_loss(inner: Any) -> None:
    """Prepare the backward pass before the output projection's, and not after it.

    DeepSpeed does so when the gradient of the outputs is there, which are the projection's input
    here; in bfloat16 that empties the gradients found so far.
    """
    prepare, inner._backward_prologue = inner._backward_prologue, lambda: None
    compute = inner.module.loss_fn

    def loss_fn(*inputs: Any) -> Tensor:
        loss = compute(*inputs)
        if loss.requires_grad:
            loss.register_hook(lambda gradient: prepare())
        return loss

    inner.module.loss_fn = loss_fn


def _check_method(method: str, layers: list[Layer]) -> None:
    """Raises ConfigError when a type:... matches no layer; case does not matter."""
    kind, _, pattern = method.partition(":")
    if kind.lower() != "type":
        return
    names = dict.fromkeys(layer.kind.__name__ for layer in layers if layer.has_parameters)
    try:
        matches = any(re.search(pattern, name, re.IGNORECASE) for name in names)
    except re.error as error:
        raise ConfigError(f"pipe_partition_method: {method} is no pattern: {error}.") from None
    if not matches:
        raise ConfigError(
            f"pipe_partition_method: {method} matches no layer. The layers are "
            f"{', '.join(names)}; upper and lower case are the same."
        )


def stage_ranges(config: NeoXConfig, layers: list[Layer]) -> list[range]:
    """The layer indices of each stage, as PipelineModule finds them; nothing is built.

    Raises ConfigError for a method that is none.
    """
    _check_method(config.pipe_partition_method, layers)
    kind, _, pattern = config.pipe_partition_method.partition(":")
    if kind.lower() == "uniform":
        bounds = partition_uniform(len(layers), config.pp)
    else:
        weights = [
            sum(param.numel for param in (layer.layout or {}).values())
            if kind.lower() == "parameters"
            else int(bool(re.search(pattern, getattr(layer.kind, "__name__", ""), re.IGNORECASE)))
            for layer in layers
        ]
        bounds = partition_balanced(weights, config.pp)
    return [range(start, stop) for start, stop in pairwise(bounds)]


def _check_stages(model: nn.Module, config: NeoXConfig, groups: ProcessGroups) -> None:
    """Raises ConfigError on every rank when a stage has nothing to train."""
    sizes = groups.gather(sum(parameter.requires_grad for parameter in model.parameters()))
    empty = {groups.topology.coordinate(rank).pp for rank, size in enumerate(sizes) if size == 0}
    if empty:
        raise nothing_to_train(config, empty)


def nothing_to_train(config: NeoXConfig, stages: Iterable[int]) -> ConfigError:
    """What is said of stages that training cannot have."""
    return ConfigError(
        f"pipe_partition_method: {config.pipe_partition_method} leaves "
        f"{', '.join(f'stage {stage}' for stage in sorted(stages))} of {config.pp} without weights "
        "to train. Use type:transformer|mlp, or fewer stages (pipe_parallel_size)."
    )


def _even_out_norms(inner: Any, groups: ProcessGroups) -> None:
    """Let stages of one and of two optimizer groups find the gradient's norm together.

    DeepSpeed sums it over the stages for one group after the other; a stage that has matrices only,
    or norms and biases only, has but one, and the others would wait for its second for ever. What a
    group holds does not matter to the sum of all.
    """
    optimizer = inner.optimizer
    if not hasattr(optimizer, "scaled_global_norm"):  # torch's, bfloat16's: sum once
        return
    mine = len(optimizer.param_groups)
    lacking = max(groups.gather(mine)) - mine
    norm_of_mine = optimizer.scaled_global_norm

    def scaled_global_norm(norm_type: int = 2) -> Tensor:
        norms = [norm_of_mine(norm_type)]
        norms += [optimizer.get_grad_norm_direct([], []) for _ in range(lacking)]
        return combine_grad_norm_groups(norms, norm_type)

    optimizer.scaled_global_norm = scaled_global_norm


class _Pipeline(PipelineModule):
    """Balances stages by the layout table; DeepSpeed would build every layer on every rank."""

    def _count_layer_params(self) -> list[int]:
        return [getattr(spec, "numel", 0) for spec in self._layer_specs]


def _spec(layer: Layer, fill: Fill) -> Any:
    """How DeepSpeed is told to build a layer: it calls `build` on the rank that owns it."""
    if not layer.has_parameters:
        return layer.kind
    if layer.tied:
        return _FilledTiedSpec(layer, fill)
    return _FilledSpec(layer, fill)


class _Filled:
    """Builds a layer with its weights in place; mixed into DeepSpeed's two kinds of spec."""

    layer: Layer
    fill: Fill

    def build(self, log: bool = False) -> nn.Module:
        module = self.layer.build()
        self.fill(module, self.layer)
        return module

    @property
    def numel(self) -> int:
        assert self.layer.layout is not None
        return sum(parameter.numel for parameter in self.layer.layout.values())


class _FilledSpec(_Filled, LayerSpec):
    def __init__(self, layer: Layer, fill: Fill) -> None:
        LayerSpec.__init__(self, layer.kind, *layer.args)
        self.layer, self.fill = layer, fill


class _FilledTiedSpec(_Filled, TiedLayerSpec):
    """The embedding on the first stage and its twin, the output projection, on the last."""

    def __init__(self, layer: Layer, fill: Fill) -> None:
        TiedLayerSpec.__init__(
            self,
            layer.tied,
            layer.kind,
            *layer.args,
            forward_fn=layer.forward,
            # Sent at the start, and their gradients summed. Frozen ones have none, are equal as
            # they were loaded, and may be in 8 bits.
            tied_weight_attr=[] if layer.frozen else ["word_embeddings.weight"],
        )
        self.layer, self.fill = layer, fill


def _modules(model: PipelineModule, specs: list[Any]) -> list[Any]:
    """This stage's modules and functions, in the order of its layers."""
    found = []
    for index in range(model._local_start, model._local_stop):
        spec = specs[index]
        if isinstance(spec, TiedLayerSpec):
            found.append(model.tied_modules[spec.key])
        elif isinstance(spec, LayerSpec):
            found.append(getattr(model, str(index)))
        else:
            found.append(spec)
    return found


def _unchanged(x_BSH: Tensor) -> Tensor:
    return x_BSH


def _loss(
    head: Layer, projection: nn.Module, x_BSH: Tensor, targets: tuple[Tensor, Tensor]
) -> Tensor:
    return head(projection, x_BSH, *targets)


def _inputs_and_labels(batches: Iterator[Batch]) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
    for batch in batches:
        yield batch.tokens_BS, (batch.labels_BS, batch.loss_mask_BS)
