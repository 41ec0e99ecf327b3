"""Activations of some layers computed again in the backward pass instead of kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from neox.config import NeoXConfig
from neox.parallel.groups import ProcessGroups
from neox.parallel.region import TensorParallelRegion
from neox.parallel.rng import DropoutStreams

Kept = tuple[Tensor, torch.Size | None, torch.device]


class Recompute:
    """Calls layers so that their input is all that is kept of them, as the configuration says.

    What would be kept on every rank of a tp group alike is split over them and gathered again
    (partition_activations), and lies in the CPU's memory meanwhile (checkpoint_in_cpu). Collective
    over the tp group in the backward pass.
    """

    def __init__(
        self,
        config: NeoXConfig,
        streams: DropoutStreams,
        region: TensorParallelRegion,
        groups: ProcessGroups,
    ) -> None:
        self.layers_at_once = config.checkpoint_num_layers if config.checkpoint_activations else 0
        self._partitions = config.partition_activations and groups.tp > 1
        self._in_cpu = config.checkpoint_in_cpu
        self._streams = streams
        self._region = region
        self._groups = groups

    def __call__(self, layers: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        # torch saves the inputs outside its own hooks, which keep what is computed from them.
        with saved_tensors_hooks(self._keep, self._give):
            return checkpoint(
                layers, *inputs, use_reentrant=False, context_fn=self._streams.recompute_contexts
            )

    def _keep(self, x: Tensor) -> Kept:
        kept, shape, device = x.detach(), None, x.device
        tp = self._groups.tp
        # Shards along the sequence are split already; token ids are small.
        alike = not self._region.splits_sequence and x.is_floating_point()
        if self._partitions and alike and x.numel() % tp == 0:
            shape = x.shape
            kept = kept.reshape(tp, -1)[self._groups.tp_rank].clone()
        return (kept.cpu() if self._in_cpu else kept), shape, device

    def _give(self, kept: Kept) -> Tensor:
        x, shape, device = kept
        x = x.to(device)
        if shape is None:
            return x
        whole = x.new_empty(shape)
        dist.all_gather_single(whole.view(-1), x, group=self._groups.tp_group)
        return whole
