"""What the two engines share: starting DeepSpeed, stepping, saving and loading.

DeepSpeed schedules the micro-batches, shards the optimizer (ZeRO) and clips. Weights are ours: they
are in place before DeepSpeed sees the model, and neox.checkpoint writes and reads the layer files.
"""

from __future__ import annotations

import contextlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist
from torch import nn

from neox.checkpoint.neox import save_layer
from neox.config import NeoXConfig
from neox.config.deepspeed import to_deepspeed
from neox.data.loaders import Batch
from neox.engine.base import TrainStep
from neox.engine.checkpoint_engine import SafeCheckpointEngine
from neox.engine.optimizers import build_optimizer
from neox.model.gpt import LocalLayers
from neox.parallel.groups import ProcessGroups
from neox.parallel.rng import DropoutStreams


def start_deepspeed(groups: ProcessGroups) -> None:
    """Let DeepSpeed use the process groups that exist. Collective over the world."""
    # On a CPU it would otherwise compile a shared-memory transport for minutes, and a killed
    # compilation leaves a lock on which every later run hangs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", str(groups.rank))
    if not dist.is_initialized():  # one process: DeepSpeed needs a group even then
        backend = "nccl" if groups.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False)


def wrap(model: nn.Module, config: NeoXConfig, mpu: object = None) -> Any:
    """DeepSpeed's engine around a model whose weights are final. Collective over the world.

    `mpu` tells DeepSpeed the groups; a PipelineModule brings its own.
    """
    optimizer = build_optimizer(config, model.parameters())
    # DeepSpeed prints its plan; a user sees ours.
    with contextlib.redirect_stdout(io.StringIO()):
        inner, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=to_deepspeed(config),
            mpu=mpu,
            dist_init_required=False,
        )
    inner.checkpoint_engine = SafeCheckpointEngine()
    # Weights travel in layer files only: DeepSpeed's own files neither repeat nor seek them.
    inner.module_state_dict = lambda exclude_frozen_parameters=False: None
    inner.load_module_state_dict = lambda *args, **kwargs: None
    return inner


class DeepSpeedEngine(ABC):
    """The common part of PipelinedEngine and SequentialEngine; implements Engine with them."""

    def __init__(
        self, inner: Any, local: LocalLayers, streams: DropoutStreams, groups: ProcessGroups
    ) -> None:
        self.inner = inner
        self.local = local
        self.streams = streams
        self.groups = groups

    def train_batch(self, batches: Iterator[Batch], iteration: int, rate: float) -> TrainStep:
        for group in self.inner.optimizer.param_groups:
            group["lr"] = rate
        self.streams.start_iteration(iteration)
        skipped_before = self.inner.skipped_steps
        loss = self.train_loss(batches)
        norm = self.inner.get_global_grad_norm()
        return TrainStep(
            loss=loss,
            grad_norm=None if norm is None else float(norm),
            skipped=self.inner.skipped_steps > skipped_before,
            loss_scale=float(self.inner.loss_scale()) if self.inner.fp16_enabled() else None,
        )

    @abstractmethod
    def train_loss(self, batches: Iterator[Batch]) -> float:
        """Forward, backward and step over one global batch; the mean loss, on every rank."""

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        if self.groups.dp_rank == 0:
            for layer, module in self.local:
                if layer.has_file:
                    save_layer(folder, layer, module, self.groups)
        self.inner.save_checkpoint(
            str(folder.parent), tag=folder.name, client_state=state, save_latest=False
        )

    def load_optimizer(self, folder: Path) -> dict[str, Any]:
        _, state = self.inner.load_checkpoint(str(folder.parent), tag=folder.name)
        return state
