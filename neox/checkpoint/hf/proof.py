"""That a folder computes what its checkpoint does: both models' logits, in fp32, layer by layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neox import log
from neox.checkpoint.hf.files import files_by_name, load_tensors
from neox.checkpoint.neox import Checkpoint
from neox.config import ModelConfig
from neox.errors import CheckpointError
from neox.model.gpt import layers
from neox.parallel.groups import ProcessGroups

# Of the logits, and relative to the largest where that is more than 1; see docs/numerics.md.
TOLERANCE = 1e-5
_BATCH, _LENGTH, _SEED = 2, 32, 1234


def prove(
    checkpoint: Checkpoint, config: ModelConfig, folder: Path, dtype: torch.dtype | None
) -> None:
    """Compare on random tokens. `dtype` is what the weights were rounded to, None for none.

    Raises CheckpointError with the difference, and for a damaged checkpoint.
    """
    generator = torch.Generator().manual_seed(_SEED)
    shape = (_BATCH, min(_LENGTH, config.seq_length))
    tokens_BS = torch.randint(0, checkpoint.padded_vocab_size, shape, generator=generator)
    with torch.inference_mode():
        ours = _our_logits(checkpoint, config, tokens_BS, dtype)
        theirs = _their_logits(folder, tokens_BS)
    if not ours.isfinite().all():
        raise CheckpointError(f"{checkpoint.folder}: its logits are not finite.")
    largest, difference = ours.abs().max().item(), (ours - theirs).abs().max().item()
    allowed = TOLERANCE * max(1.0, largest)
    if not difference <= allowed:
        raise CheckpointError(
            f"the export is given up: transformers computes logits from it that differ by "
            f"{difference:.3g} from the checkpoint's, whose largest is {largest:.3g}, and "
            f"{allowed:.3g} is allowed.{_hint(config)}"
        )
    log.info(f"the logits of transformers differ by {difference:.2g} (allowed: {allowed:.2g})")


def _hint(config: ModelConfig) -> str:
    if config.norm != "rmsnorm":
        return ""
    return (
        f" rms_norm_epsilon ({config.rms_norm_epsilon:g}) is added to the root mean square in NeoX "
        "and under the root in transformers, which is not the same function unless it is much "
        "smaller than the activations."
    )


def _our_logits(
    checkpoint: Checkpoint, config: ModelConfig, tokens_BS: Tensor, dtype: torch.dtype | None
) -> Tensor:
    groups = ProcessGroups.single()
    rows = checkpoint.padded_vocab_size
    model = layers(config, rows, dtype or torch.float32, groups)
    x = tokens_BS
    with log.progress(total=len(model), desc="proof: this program", unit="layer") as bar:
        for layer in model:
            module = layer.build()
            if layer.has_parameters:
                checkpoint.load_into(module, layer, groups)
                module.float().eval()
            x = layer(module, x)
            bar.update()
    return x


def _their_logits(folder: Path, tokens_BS: Tensor) -> Tensor:
    """Of transformers' model, whose modules have weights only while they run."""
    from transformers import AutoModelForCausalLM

    with _without_bars():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            device_map="meta",
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
        )
    model, found = loaded
    if any(found.values()):
        raise CheckpointError(f"the export is given up: transformers does not load it: {found}.")
    for module in model.modules():
        buffers = dict(module.named_buffers(recurse=False))  # the rotary frequencies
        for name, buffer in buffers.items():
            setattr(module, name, torch.empty_like(buffer, device="cpu"))
        if buffers:
            model._init_weights(module)
    paths = {name: folder / file for name, file in files_by_name(folder).items()}
    with log.progress(total=len(paths), desc="proof: transformers", unit="tensor") as bar:

        def fill(stored: dict[str, str], module: nn.Module, inputs: Any) -> None:
            for name, theirs in stored.items():
                weight = load_tensors(paths[theirs], [theirs])[theirs].float()
                setattr(module, name, nn.Parameter(weight, requires_grad=False))
                bar.update()

        def drop(stored: dict[str, str], module: nn.Module, inputs: Any, outputs: Any) -> None:
            for name in stored:
                meta = module.get_parameter(name).to("meta")
                setattr(module, name, nn.Parameter(meta, requires_grad=False))

        for module, stored in _stored_names(model, paths):
            module.register_forward_pre_hook(partial(fill, stored))
            module.register_forward_hook(partial(drop, stored))
        return model(tokens_BS, use_cache=False).logits


def _stored_names(
    model: Any, paths: Mapping[str, Path]
) -> Iterator[tuple[nn.Module, dict[str, str]]]:
    """The modules that have parameters of their own, with the names of these in the files."""
    embedding = model.get_input_embeddings()
    for prefix, module in model.named_modules():
        names = [name for name, _ in module.named_parameters(recurse=False)]
        if module is embedding:
            table = f"{prefix}.weight"
        if not names:
            continue
        stored = {name: f"{prefix}.{name}" for name in names}
        if module is model.get_output_embeddings() and stored["weight"] not in paths:
            # Tied to the embedding; or in GPTNeoX, whose files kept its former name, embed_out.
            stored["weight"] = "embed_out.weight" if "embed_out.weight" in paths else table
        yield module, stored


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Transformers counts the tensors of its model in a bar of its own."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()
