"""pipe_parallel_size >= 1: the layer list as DeepSpeed's PipelineModule."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from functools import partial
from typing import Any

from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neox.config import NeoXConfig
from neox.data.loaders import Batch
from neox.engine.deepspeed import DeepSpeedEngine, wrap
from neox.errors import ConfigError
from neox.model.gpt import Fill, Layer, LocalLayers
from neox.model.loss import cross_entropy
from neox.parallel.groups import ProcessGroups
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
    groups: ProcessGroups,
) -> PipelinedEngine:
    """The engine over this rank's stage. Collective over the world."""
    specs = [_spec(layer, fill) for layer in layers]
    interval = config.checkpoint_num_layers if config.checkpoint_activations else 0
    with contextlib.redirect_stdout(io.StringIO()):
        model = _Pipeline(
            specs,
            topology=PipeModelDataParallelTopology(groups.pp, groups.tp, groups.dp),
            loss_fn=partial(_loss, groups=groups),
            partition_method=config.pipe_partition_method,
            activation_checkpoint_interval=interval,
            activation_checkpoint_func=partial(
                checkpoint, use_reentrant=False, context_fn=streams.recompute_contexts
            ),
        )
    _check_stages(model, config, groups)
    start, stop = model._local_start, model._local_stop
    local: LocalLayers = list(zip(layers[start:stop], _modules(model, specs), strict=True))
    return PipelinedEngine(wrap(model, config), layers, local, streams, groups)


def _check_stages(model: nn.Module, config: NeoXConfig, groups: ProcessGroups) -> None:
    """Raises ConfigError on every rank when a stage lacks one of the optimizer's two groups.

    DeepSpeed sums the gradient's norm group by group over the stages, and would wait for ever.
    """
    kinds = groups.gather({parameter.dim() >= 2 for parameter in model.parameters()})
    lacking = {
        groups.topology.coordinate(rank).pp for rank in range(len(kinds)) if len(kinds[rank]) < 2
    }
    if lacking:
        raise ConfigError(
            f"pipe_partition_method: {config.pipe_partition_method} leaves "
            f"{', '.join(f'stage {stage}' for stage in sorted(lacking))} of {groups.pp} without "
            "matrices or without norms and biases, and every stage needs both. Use "
            "type:transformer|mlp, or fewer stages (pipe_parallel_size)."
        )


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
            tied_weight_attr=["word_embeddings.weight"],
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


def _loss(logits_BSV: Tensor, targets: tuple[Tensor, Tensor], *, groups: ProcessGroups) -> Tensor:
    labels_BS, loss_mask_BS = targets
    return cross_entropy(logits_BSV, labels_BS, loss_mask_BS, groups)


def _inputs_and_labels(batches: Iterator[Batch]) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
    for batch in batches:
        yield batch.tokens_BS, (batch.labels_BS, batch.loss_mask_BS)
