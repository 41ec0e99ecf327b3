"""From a configuration to a model that generates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from neox import log
from neox.checkpoint.architecture import check_architecture
from neox.checkpoint.folders import resolve
from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.peft import Adapters, find_adapter, read_adapters
from neox.checkpoint.peft import fill as fill_adapters
from neox.checkpoint.verify import tell_newer, telling_another
from neox.checkpoint.vocabulary import padded_vocab_size
from neox.config import NeoXConfig
from neox.errors import CheckpointError
from neox.inference.adapters import NamedAdapters, read_named
from neox.inference.fingerprint import verify
from neox.inference.stages import InferenceModel
from neox.kernels.library import library
from neox.model.frozen import Frozen, Storage
from neox.model.gpt import Layer, build_layers, layers, partition, torch_dtype
from neox.model.layout import pad_vocab_size
from neox.model.lora import pack_adapters
from neox.parallel.groups import ProcessGroups


def open_checkpoint(config: NeoXConfig, groups: ProcessGroups) -> Checkpoint:
    """The one in `config.load`: of `config.iteration`, or the `latest`. Raises CheckpointError.

    Collective over the world: a run may be saving there, so rank 0 decides which is the latest.
    """
    if config.load is None:
        raise CheckpointError(
            "load is not set: there is no checkpoint to generate from or evaluate. Set `load` to "
            "the folder that holds `latest` and the global_step folders."
        )
    directory = Path(config.load)
    folder = groups.gather(resolve(directory, config.iteration))[0]
    with telling_another(folder):
        checkpoint = Checkpoint.open(folder, config=config)
    if config.iteration is None and folder != directory:
        tell_newer(folder)
    return checkpoint


def computed_dtype(config: NeoXConfig, device: torch.device) -> torch.dtype:
    """The type in which a model is computed for inference."""
    if config.quantize != "none" and device.type == "cpu":
        return torch.float32  # what the kernels take; 16 bits are slower on most CPUs
    return torch_dtype(config.dtype)


def storage(config: NeoXConfig, device: torch.device) -> Storage:
    """How weights are held for inference, where a CPU has kernels."""
    if config.load_in_8bit:
        return "8bit"
    if config.quantize != "none":
        return config.quantize
    is_packed = device.type == "cpu" and computed_dtype(config, device) is torch.float32
    return "packed" if is_packed else "dense"


@dataclass(frozen=True)
class Prepared:
    """A model that is known to be there and to fit, all but its weights read.

    rows: of the vocabulary, padded. adapters: part of the model; named: to be selected.
    """

    config: NeoXConfig
    groups: ProcessGroups
    checkpoint: Checkpoint
    rows: int
    adapters: Adapters | None
    named: Mapping[str, Adapters]

    @property
    def dtype(self) -> torch.dtype:
        return computed_dtype(self.config, self.groups.device)

    def load(self) -> InferenceModel:
        """Build this rank's stage and fill it.

        Collective over the world. Raises CheckpointError.
        """
        config, groups, dtype = self.config, self.groups, self.dtype
        model = layers(config, _padded(self.rows, groups), dtype, groups, frozen=self._frozen())
        mine = partition(config.num_layers, groups.pp)[groups.pp_rank]
        wanted = model[mine.start : mine.stop]
        choice = NamedAdapters(self.named)
        with (
            log.progress(total=len(wanted), desc="loading", unit="layer") as bar,
            telling_another(self.checkpoint.folder),
            self.checkpoint.verifying_ahead(wanted, groups),
        ):

            def fill(module: nn.Module, layer: Layer) -> None:
                self.checkpoint.load_into(module, layer, groups)
                if self.adapters is not None:
                    fill_adapters(module, layer, self.adapters, groups)
                module.to(groups.device)
                if self._packs:
                    pack_adapters(module)
                choice.add(module, layer, self.named, dtype, groups, packs=self._packs)
                bar.update()

            stage = build_layers(wanted, fill)
        loaded = InferenceModel(config, groups, stage, self.rows, dtype, choice)
        if config.checkpoint_validation_with_forward_pass:
            verify(loaded, self.checkpoint.folder)
        return loaded

    @property
    def _packs(self) -> bool:
        """Whether products are the kernels', and so adapters' are to be."""
        held = storage(self.config, self.groups.device)
        is_packed = self.groups.device.type == "cpu" and held in ("packed", "int8", "int4")
        return is_packed and library() is not None

    def _frozen(self) -> Frozen | None:
        held = storage(self.config, self.groups.device)
        if held == "packed" and library() is None:
            held = "dense"
        if held == "dense" and self.adapters is None and not self.named:
            return None
        specs = self.adapters.specs if self.adapters is not None else {}
        return Frozen(self.dtype, self.groups, held, specs)


def _padded(rows: int, groups: ProcessGroups) -> int:
    """Rows of all shards together; the last one may have some that InferenceModel cuts off."""
    return pad_vocab_size(rows, 1, groups.tp)


def prepare(
    config: NeoXConfig,
    groups: ProcessGroups,
    checkpoint: Checkpoint | None = None,
    tokens: int | None = None,
    named: Mapping[str, str] | None = None,
) -> Prepared:
    """Find `checkpoint`, by default the configuration's, and read the adapters.

    The checkpoint may have any number of shards. `tokens` is the size of the tokenizer, None
    without one; see `padded_vocab_size` for the model's. `named` are folders of adapters by the
    names they are selected by, beside `config.adapter`.
    Collective over the world. Raises CheckpointError when something is not there or does not fit.
    """
    checkpoint = checkpoint or open_checkpoint(config, groups)
    with telling_another(checkpoint.folder):
        check_architecture(config, checkpoint)
        rows = padded_vocab_size(config, checkpoint.padded_vocab_size, tokens)
    adapters = None
    if config.adapter is not None:
        folder = groups.gather(find_adapter(Path(config.adapter)))[0]
        adapters = read_adapters(folder, config, _padded(rows, groups))
        log.info(f"adapter: {len(adapters.specs)} matrices have adapters, from {folder}")
    by_name = read_named(named or {}, config, groups, _padded(rows, groups))
    return Prepared(config, groups, checkpoint, rows, adapters, by_name)


def load_model(
    config: NeoXConfig,
    groups: ProcessGroups,
    checkpoint: Checkpoint | None = None,
    tokens: int | None = None,
) -> InferenceModel:
    """`prepare` and `load` in one."""
    return prepare(config, groups, checkpoint, tokens).load()
