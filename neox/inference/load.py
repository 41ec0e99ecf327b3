"""From a configuration to a model that generates."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from neox import log
from neox.checkpoint.architecture import check_architecture
from neox.checkpoint.folders import resolve
from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.peft import fill as fill_adapters
from neox.checkpoint.peft import find_adapter, read_adapters
from neox.checkpoint.verify import tell_newer, telling_another
from neox.checkpoint.vocabulary import padded_vocab_size
from neox.config import NeoXConfig
from neox.errors import CheckpointError
from neox.inference.fingerprint import verify
from neox.inference.stages import InferenceModel
from neox.kernels.library import library
from neox.model.frozen import Frozen, Storage
from neox.model.gpt import Layer, build_layers, layers, partition, torch_dtype
from neox.model.layout import pad_vocab_size
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


def _storage(config: NeoXConfig, dtype: torch.dtype, groups: ProcessGroups) -> Storage:
    if config.load_in_8bit:
        return "8bit"
    if config.quantize != "none":
        return config.quantize
    has_kernels = groups.device.type == "cpu" and dtype is torch.float32 and library() is not None
    return "packed" if has_kernels else "dense"


def load_model(
    config: NeoXConfig,
    groups: ProcessGroups,
    checkpoint: Checkpoint | None = None,
    tokens: int | None = None,
) -> InferenceModel:
    """Build this rank's stage and fill it from `checkpoint`, by default the configuration's.

    The checkpoint may have any number of shards. `tokens` is the size of the tokenizer, None
    without one; see `padded_vocab_size` for the model's.
    Collective over the world. Raises CheckpointError when there is no checkpoint or it does not
    fit.
    """
    checkpoint = checkpoint or open_checkpoint(config, groups)
    with telling_another(checkpoint.folder):
        check_architecture(config, checkpoint)
        rows = padded_vocab_size(config, checkpoint.padded_vocab_size, tokens)
    dtype = torch_dtype(config.dtype)
    if config.quantize != "none" and groups.device.type == "cpu":
        dtype = torch.float32  # what the kernels take; 16 bits are slower on most CPUs
    # Where tp does not divide the vocabulary, the last shard has rows that InferenceModel cuts off.
    padded = pad_vocab_size(rows, 1, groups.tp)
    adapters = None
    if config.adapter is not None:
        folder = groups.gather(find_adapter(Path(config.adapter)))[0]
        adapters = read_adapters(folder, config, padded)
        log.info(f"adapter: {len(adapters.specs)} matrices have adapters, from {folder}")
    frozen = None
    storage = _storage(config, dtype, groups)
    if storage != "dense" or adapters is not None:
        specs = adapters.specs if adapters is not None else {}
        frozen = Frozen(dtype, groups, storage, specs)
    model = layers(config, padded, dtype, groups, frozen=frozen)
    mine = partition(config.num_layers, groups.pp)[groups.pp_rank]

    wanted = model[mine.start : mine.stop]
    with (
        log.progress(total=len(wanted), desc="loading", unit="layer") as bar,
        telling_another(checkpoint.folder),
        checkpoint.verifying_ahead(wanted, groups),
    ):

        def fill(module: nn.Module, layer: Layer) -> None:
            checkpoint.load_into(module, layer, groups)
            if adapters is not None:
                fill_adapters(module, layer, adapters, groups)
            module.to(groups.device)
            bar.update()

        stage = build_layers(wanted, fill)
    loaded = InferenceModel(config, groups, stage, rows, dtype)
    if config.checkpoint_validation_with_forward_pass:
        verify(loaded, checkpoint.folder)
    return loaded
