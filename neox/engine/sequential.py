"""pipe_parallel_size 0: the layer list as one module, under DeepSpeed's plain engine."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neox.config import NeoXConfig
from neox.data.loaders import Batch
from neox.engine.deepspeed import DeepSpeedEngine, wrap
from neox.model.block import TransformerLayer
from neox.model.gpt import Fill, Layer, LocalLayers, build_layers
from neox.model.loss import cross_entropy
from neox.parallel.groups import ProcessGroups
from neox.parallel.rng import DropoutStreams


class GPT(nn.Module):
    """Token ids [B, S] -> this rank's slice of the logits, [B, S, V / tp]."""

    def __init__(self, local: LocalLayers, streams: DropoutStreams, recompute: bool) -> None:
        super().__init__()
        self.sequential = nn.ModuleDict()
        self._walk = local
        self._streams = streams
        self._recompute = recompute
        for layer, module in local:
            if layer.has_file:
                self.sequential[str(layer.index)] = module

    def forward(self, tokens_BS: Tensor) -> Tensor:
        x = tokens_BS
        for layer, module in self._walk:
            if self._recompute and self.training and isinstance(module, TransformerLayer):
                x = checkpoint(
                    module, x, use_reentrant=False, context_fn=self._streams.recompute_contexts
                )
            else:
                x = layer(module, x)
        return x


class SequentialEngine(DeepSpeedEngine):
    """One stage; gradients accumulate over the micro-batches of a step."""

    is_pipelined = False

    def train_loss(self, batches: Iterator[Batch]) -> float:
        self.inner.train()
        steps = self.inner.gradient_accumulation_steps()
        total = torch.zeros((), device=self.groups.device)
        for _ in range(steps):
            loss = self._loss(next(batches))
            self.inner.backward(loss)
            self.inner.step()
            total += loss.detach()
        return self._mean_over_dp(total / steps)

    @torch.no_grad()
    def eval_batch(self, batches: Iterator[Batch]) -> float:
        self.inner.eval()
        steps = self.inner.gradient_accumulation_steps()
        losses = [self._loss(next(batches)) for _ in range(steps)]
        return self._mean_over_dp(torch.stack(losses).mean())

    def _loss(self, batch: Batch) -> Tensor:
        tokens, labels, mask = (tensor.to(self.groups.device) for tensor in batch)
        return cross_entropy(self.inner(tokens), labels, mask, self.groups)

    def _mean_over_dp(self, loss: Tensor) -> float:
        if self.groups.dp_group is not None:
            dist.all_reduce(loss, group=self.groups.dp_group)
        return float(loss) / self.groups.dp


def build_sequential(
    config: NeoXConfig,
    layers: list[Layer],
    fill: Fill,
    streams: DropoutStreams,
    groups: ProcessGroups,
) -> SequentialEngine:
    """The engine over one rank's whole depth. Collective over the world."""
    local = build_layers(layers, fill)
    model = GPT(local, streams, config.checkpoint_activations)
    mpu = _ModelParallelUnit(groups) if groups.tp > 1 else None
    return SequentialEngine(wrap(model, config, mpu), layers, local, streams, groups)


class _ModelParallelUnit:
    """The groups under the names that DeepSpeed calls."""

    def __init__(self, groups: ProcessGroups) -> None:
        self._groups = groups

    def get_model_parallel_rank(self) -> int:
        return self._groups.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self._groups.tp

    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._groups.tp_group

    def get_data_parallel_rank(self) -> int:
        return self._groups.dp_rank

    def get_data_parallel_world_size(self) -> int:
        return self._groups.dp

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self._groups.dp_group
