"""pipe_parallel_size 0: the layer list as one module, under DeepSpeed's plain engine."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import groupby

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import register_external_parameter
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from neox.config import NeoXConfig
from neox.data.loaders import Batch
from neox.engine.deepspeed import DeepSpeedEngine, wrap
from neox.engine.recompute import Recompute
from neox.model.block import TransformerLayer
from neox.model.gpt import Fill, Layer, LocalLayers, build_layers
from neox.parallel.groups import ProcessGroups
from neox.parallel.region import TensorParallelRegion
from neox.parallel.rng import DropoutStreams


class GPT(nn.Module):
    """Token ids, labels and loss mask, [B, S] each -> mean loss."""

    def __init__(self, local: LocalLayers, recompute: Recompute) -> None:
        super().__init__()
        self.sequential = nn.ModuleDict()
        self._walk = local
        self._recompute = recompute
        for layer, module in local:
            if layer.has_file:
                self.sequential[str(layer.index)] = module

    def forward(self, tokens_BS: Tensor, labels_BS: Tensor, loss_mask_BS: Tensor) -> Tensor:
        x = tokens_BS
        *before, (head, projection) = self._walk
        at_once = self._recompute.layers_at_once if self.training else 0
        for is_block, group in groupby(before, lambda at: isinstance(at[1], TransformerLayer)):
            run = list(group)
            if is_block and at_once:
                for start in range(0, len(run), at_once):
                    x = self._recompute(partial(_walk, run[start : start + at_once]), x)
            else:
                x = _walk(run, x)
        return head(projection, x, labels_BS, loss_mask_BS)


def _walk(layers: LocalLayers, x: Tensor) -> Tensor:
    for layer, module in layers:
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
        return self.inner(*(tensor.to(self.groups.device) for tensor in batch))

    def _mean_over_dp(self, loss: Tensor) -> float:
        if self.groups.dp_group is not None:
            dist.all_reduce(loss, group=self.groups.dp_group)
        return float(loss) / self.groups.dp


def build_sequential(
    config: NeoXConfig,
    layers: list[Layer],
    fill: Fill,
    streams: DropoutStreams,
    region: TensorParallelRegion,
    groups: ProcessGroups,
) -> SequentialEngine:
    """The engine over one rank's whole depth. Collective over the world."""
    local = build_layers(layers, fill)
    model = GPT(local, Recompute(config, streams, region, groups))
    if config.zero_stage == 3:
        # A block reads the weights of its parts itself: they are gathered and let go together.
        set_z3_leaf_modules(model, [TransformerLayer])
    mpu = _ModelParallelUnit(groups) if groups.tp > 1 else None
    inner = wrap(model, config, groups, mpu)
    if config.zero_stage == 3:
        # So does the head; and a tied table is read outside of the embedding's own forward.
        reader = model if layers[-1].tied else local[-1][1]
        for parameter in local[-1][1].parameters():
            register_external_parameter(reader, parameter)
    return SequentialEngine(inner, config, layers, local, streams, region, groups)


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
