"""What the two engines share: starting DeepSpeed, stepping, saving and loading.

DeepSpeed schedules the micro-batches, shards the optimizer (ZeRO) and clips. Weights are ours: they
are in place before DeepSpeed sees the model, and neox.checkpoint writes and reads the layer files.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist
from torch import nn

from neox import log
from neox.checkpoint.directory import on_every_rank
from neox.checkpoint.manifest import Entry
from neox.checkpoint.neox import Checkpoint, save_layers
from neox.checkpoint.optimizer_files import WITHOUT_OPTIMIZER, OptimizerFiles, optimizer_files
from neox.checkpoint.peft import write_adapters
from neox.checkpoint.sources import model_file
from neox.config import NeoXConfig
from neox.config.deepspeed import to_deepspeed
from neox.data.loaders import Batch
from neox.engine.adapters import gathered_adapters
from neox.engine.base import TrainStep
from neox.engine.checkpoint_engine import SafeCheckpointEngine, load_deepspeed_file
from neox.engine.clipping import clip_before_steps
from neox.engine.elastic import load_universal, universal_checkpoint
from neox.engine.evaluating import gathered, lent
from neox.engine.optimizers import build_optimizer
from neox.engine.plain_state import PlainState, described, load_plain
from neox.engine.saved_state import SavedState, ZeroState
from neox.engine.sharded_weights import (
    is_sharded,
    load_sharded,
    name_model_files,
    save_gathered,
)
from neox.errors import CheckpointError
from neox.model.gpt import Layer, LocalLayers
from neox.parallel.groups import ProcessGroups
from neox.parallel.region import TensorParallelRegion
from neox.parallel.rng import DropoutStreams


def start_deepspeed(groups: ProcessGroups) -> None:
    """Let DeepSpeed use the process groups that exist. Collective over the world."""
    deepspeed.utils.logger.setLevel(logging.ERROR)  # its import undoes what neox.log has set
    # On a CPU it would otherwise compile a shared-memory transport for minutes, and a killed
    # compilation leaves a lock on which every later run hangs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed asks for files with weights_only=False here and there; torch is not to listen.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ.setdefault("LOCAL_RANK", str(groups.rank))
    if not dist.is_initialized():  # one process: DeepSpeed needs a group even then
        backend = "nccl" if groups.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False)


def wrap(model: nn.Module, config: NeoXConfig, groups: ProcessGroups, mpu: object = None) -> Any:
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
    if not inner.zero_optimization():
        clip_before_steps(inner, config.gradient_clipping, groups)
    if groups.dp == 1:  # nothing to average; DeepSpeed would copy every gradient twice
        inner.buffered_allreduce_fallback = lambda *args, **kwargs: None
    inner.checkpoint_engine = SafeCheckpointEngine()
    # Weights travel in layer files only: DeepSpeed's own files neither repeat nor seek them.
    inner.module_state_dict = lambda exclude_frozen_parameters=False: None
    inner.load_module_state_dict = lambda *args, **kwargs: None
    # Nor does it leave its scripts for turning them into weights beside them.
    inner._copy_recovery_script = lambda save_path: None
    if inner.zero_optimization_partition_weights():
        name_model_files(inner, groups)
    return inner


class DeepSpeedEngine(ABC):
    """The common part of PipelinedEngine and SequentialEngine; implements Engine with them."""

    is_pipelined: bool

    def __init__(
        self,
        inner: Any,
        config: NeoXConfig,
        layers: list[Layer],
        local: LocalLayers,
        streams: DropoutStreams,
        region: TensorParallelRegion,
        groups: ProcessGroups,
    ) -> None:
        self.inner = inner
        self.config = config
        self.layers = layers  # of the whole model
        self.local = local
        self.streams = streams
        self.region = region
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

    @contextlib.contextmanager
    def lend(self) -> Iterator[LocalLayers]:
        with self.region.whole_sequences():
            if self.inner.zero_optimization_partition_weights():
                yield gathered(self.local, self.groups.device)
            else:
                with lent(self.local) as local:
                    yield local

    def save(self, folder: Path, state: dict[str, Any]) -> dict[str, Entry]:
        files = self.inner.checkpoint_engine = SafeCheckpointEngine()
        layers: dict[str, Entry] = {}
        adapters = None
        if self.config.lora is not None:
            adapters = gathered_adapters(self.layers, self.local, self.groups)
        try:
            if adapters is not None:
                if self.groups.rank == 0:
                    layers = write_adapters(folder, self.config, adapters, self.config.load)
            elif self.inner.zero_optimization_partition_weights():
                layers = save_gathered(folder, self.local, self.groups)
            elif self.groups.dp_rank == 0:
                layers = save_layers(folder, self.local, self.groups)
        except OSError as error:
            files.failure = error
        state = {**state, **described(self.inner, self.local)}
        self.inner.save_checkpoint(
            str(folder.parent),
            tag=folder.name,
            client_state=state,
            save_latest=False,
            exclude_frozen_parameters=True,
        )
        if files.failure is not None:
            raise files.failure
        return layers | files.written

    def load_optimizer(self, checkpoint: Checkpoint, scratch: Path) -> dict[str, Any]:
        folder, groups = checkpoint.folder, self.groups
        own = OptimizerFiles(groups.tp, groups.pp, groups.dp, self.inner.bfloat16_enabled())
        try:
            files = optimizer_files(folder, checkpoint.tp)

            def read() -> SavedState:
                return ZeroState(folder, files, self.layers) if files else PlainState(checkpoint)

            if not self.inner.zero_optimization():
                return load_plain(self.inner, folder, read, self.local, groups)
            if files == own and all(on_every_rank(groups, lambda: self._saved_the_same(folder))):
                return self._load(folder, universal=False)
            if self.inner.zero_optimization_partition_weights():
                return load_sharded(self.inner, read, self.local, groups)
            where = f"at {files}" if files else "without ZeRO"
            log.info(f"rearranging the optimizer state, saved {where}, for {own}")
            with universal_checkpoint(
                read,
                self.layers,
                scratch,
                groups,
                optimizer=self.inner.optimizer.optimizer,
                pipelined=self.is_pipelined,
                keep_loss_scale=self.inner.fp16_enabled(),
            ) as universal:
                return self._load(universal, universal=True)
        except CheckpointError as error:
            if WITHOUT_OPTIMIZER in str(error):
                raise
            raise CheckpointError(f"{str(error).rstrip('.')}. {WITHOUT_OPTIMIZER}") from error

    def _saved_the_same(self, folder: Path) -> bool:
        """Whether this rank's part of the model is what the rank of the same place saved."""
        part = self.groups.pp_rank * self.groups.tp + self.groups.tp_rank
        saved = load_deepspeed_file(model_file(folder, part))
        ours = described(self.inner, self.local)
        ours["param_shapes"] = self.inner._get_zero_param_shapes()
        if is_sharded(saved) != self.inner.zero_optimization_partition_weights():
            return False
        return all(saved.get(key) == value for key, value in ours.items())

    def _load(self, folder: Path, *, universal: bool) -> dict[str, Any]:
        """Load state, but no settings: weight decay, betas and clipping are the configuration's."""
        optimizer = self.inner.optimizer
        clip_grad = optimizer.clip_grad
        scaler = getattr(optimizer, "loss_scaler", None)  # its optimizer for bfloat16 has none
        settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints what it does
            if universal:
                state = load_universal(self.inner, folder)
            else:
                _, state = self.inner.load_checkpoint(str(folder.parent), tag=folder.name)
        optimizer.clip_grad = clip_grad
        # A scale that follows the gradients goes on where it was; what another precision had is
        # none: float16 would stay at a scale of 1.
        if scaler is not None and optimizer.loss_scaler.dynamic != scaler.dynamic:
            optimizer.loss_scaler, optimizer.dynamic_loss_scale = scaler, scaler.dynamic
        for group, values in zip(optimizer.param_groups, settings, strict=True):
            group.update(values)
        return state
