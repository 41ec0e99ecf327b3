"""A checkpoint written anew at another number of shards, file by file.

Values stay as they are, bit for bit, and so do names and the buffers of older files, unless the
caller asks for today's names or another precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neox import log
from neox.checkpoint.directory import check_writable, write_checkpoint, write_file
from neox.checkpoint.files import save_file
from neox.checkpoint.folders import step_folder
from neox.checkpoint.lock import saving_alone
from neox.checkpoint.manifest import FORWARD_PASS, Entry
from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.optimizer_files import has_plain_state
from neox.checkpoint.run_state import save_run_state
from neox.checkpoint.sources import layer_file, load_model_file, model_file
from neox.checkpoint.vocabulary import asks_for_others, check_tokens, padded_vocab_size
from neox.config import NeoXConfig
from neox.config.architecture import architecture
from neox.errors import CheckpointError
from neox.model.gpt import Layer, layers
from neox.model.layout import ParamLayout, pad_vocab_size
from neox.model.shard import file_shard
from neox.model.shard import reshard as cut
from neox.parallel.groups import ProcessGroups

_SINGLE = ProcessGroups.single()


def choose_rows(
    checkpoint: Checkpoint, config: NeoXConfig, asked: int | None, tokens: int | None
) -> int:
    """Vocabulary rows of a checkpoint that is cut into config.tp shards.

    Those that are stored, unless `asked` for others or the configuration asks (see
    `padded_vocab_size`). `tokens` is the tokenizer's size, None if it is unknown; rows are trimmed
    beyond it only. Raises CheckpointError, also when the rows can't be cut into equal shards.
    """
    stored = checkpoint.padded_vocab_size
    rows = padded_vocab_size(config, stored, tokens) if asked is None else asked
    if asked is None and tokens is None and asks_for_others(config, stored):
        raise CheckpointError(
            f"make_vocab_size_divisible_by ({config.make_vocab_size_divisible_by}) does not divide "
            f"the checkpoint's {stored} rows, and how many are needed depends on the tokenizer, "
            "which is not there. Give its vocab_file, or the rows by --padded_vocab_size."
        )
    if rows < stored and tokens is None:
        raise CheckpointError(
            f"padded_vocab_size: {rows} is less than the checkpoint's {stored} rows, and nothing "
            "tells which of them are padding. Give a configuration with the tokenizer that the "
            "model was trained with (tokenizer_type and vocab_file)."
        )
    if tokens is not None:
        check_tokens(tokens, rows)
    if rows % config.tp:
        raise CheckpointError(
            f"the vocabulary's {rows} rows can't be cut into {config.tp} equal shards. Choose "
            "another model_parallel_size, or ask for other rows: "
            f"--padded_vocab_size {pad_vocab_size(rows, 1, config.tp)}."
        )
    return rows


def reshard(
    checkpoint: Checkpoint,
    directory: Path,
    config: NeoXConfig,
    rows: int,
    *,
    todays_names: bool = False,
    dtype: torch.dtype | None = None,
    configs: Mapping[str, str] | None = None,
    as_recorded: bool = True,
) -> Path:
    """Write `checkpoint` into `directory` as config.tp shards of `rows` rows; return its folder.

    `config` tells the architecture, which says how each tensor is split. `configs` are the YAML
    files to keep; by default those that the checkpoint kept. Logits that were recorded with it go
    along, unless it computes others (not `as_recorded`). Every file is verified before it is
    read. Memory holds one shard of one layer, besides the pages of that layer's files. Optimizer
    state is left behind, with a line about it. Not collective, one process. Raises CheckpointError.
    """
    model = layers(config, rows, torch.float32, _SINGLE)
    with_files = [layer for layer in model if layer.has_file]
    check_layers(checkpoint, with_files)
    check_free(directory, checkpoint.iteration)
    run_state = _run_state(checkpoint)

    def write(folder: Path) -> Mapping[str, Entry]:
        written = {}
        total = len(with_files) * config.tp
        with (
            checkpoint.verifying_ahead(with_files, _SINGLE),
            log.progress(total=total, desc="writing", unit="file") as bar,
        ):
            for layer in with_files:
                checkpoint.verify_layer(layer.index, _SINGLE)
                for rank in range(config.tp):
                    path = layer_file(folder, layer.index, rank)
                    # In one expression, for what was written to be freed before the next is read.
                    written[path.name] = save_file(
                        dict(
                            _file_tensors(checkpoint, layer, rank, config.tp, todays_names, dtype)
                        ),
                        path,
                    )
                    bar.update()
        forward_pass = checkpoint.folder / FORWARD_PASS
        if as_recorded and forward_pass.is_file():
            written[FORWARD_PASS] = write_file(folder / FORWARD_PASS, forward_pass.read_bytes())
        return written | save_run_state(folder, checkpoint.iteration, config.tp, run_state)

    with saving_alone(directory, _SINGLE):  # a run's unfinished save is its own
        return write_checkpoint(
            directory,
            checkpoint.iteration,
            write,
            _configs(checkpoint.folder) if configs is None else configs,
            _SINGLE,
            grid={"tp": config.tp, "pp": 1, "dp": 1},
            padded_vocab_size=rows,
            architecture=architecture(config),
        )


def check_free(directory: Path, iteration: int) -> None:
    """Raises CheckpointError where a checkpoint would be replaced, or nothing can be written."""
    check_writable(directory)
    folder = step_folder(directory, iteration)
    if folder.exists():
        raise CheckpointError(f"{folder} is there already. Name another output folder.")


def check_layers(checkpoint: Checkpoint, model: Sequence[Layer]) -> None:
    """Raises CheckpointError when the files hold a layer that `model` has no place for."""
    surplus = sorted(set(checkpoint.indices) - {layer.index for layer in model})
    if surplus:
        raise CheckpointError(
            f"{checkpoint.folder} holds {layer_file(checkpoint.folder, surplus[0], 0).name}, for "
            "which the architecture has no place. Check num_layers and no_weight_tying."
        )


def _file_tensors(
    checkpoint: Checkpoint,
    layer: Layer,
    rank: int,
    tp: int,
    todays_names: bool,
    dtype: torch.dtype | None,
) -> Iterator[tuple[str, Tensor]]:
    """What rank `rank`'s file holds of a layer, by the names to be written."""
    stored = checkpoint.shards(layer.index)
    own = stored[rank % len(stored)]  # whose buffers go along: every shard has the same
    names = {today: today for today in own.tensors} if todays_names else own.names
    with_layout = {name: (layout, shards) for name, layout, shards in checkpoint.tensors(layer)}
    for name, written in names.items():
        if name in with_layout:
            tensor = _cut(*with_layout[name], rank, tp, dtype)
        else:
            tensor = own.tensors[name].clone()
        yield written, tensor
    if not todays_names:
        yield from ((name, buffer.clone()) for name, buffer in own.buffers.items())


def _cut(
    layout: ParamLayout, shards: Sequence[Tensor], rank: int, tp: int, dtype: torch.dtype | None
) -> Tensor:
    if len(shards) == tp and dtype is None and not layout.is_vocab:
        return shards[rank].clone()  # replicas and summands that differ stay so
    held = cut(shards, layout, rank, tp)
    return file_shard(held if dtype is None else cast(held, dtype), layout, rank, tp)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Raises CheckpointError when a number that was finite is not so in `dtype`."""
    result = tensor.to(dtype)
    if torch.isfinite(result).all() or torch.equal(result.isfinite(), tensor.isfinite()):
        return result
    largest = tensor.abs().max().item()
    raise CheckpointError(
        f"dtype: numbers of up to {largest:.3g} are too large for {str(dtype).partition('.')[2]}, "
        f"which ends at {torch.finfo(dtype).max:.3g}. Choose bfloat16 or float32."
    )


def _run_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the checkpoint's first mp_rank file holds; {} without one. Says what stays behind."""
    path = model_file(checkpoint.folder, 0)
    state: dict[str, Any] = {}
    has_optimizer = any(checkpoint.folder.glob("*_optim_states.pt"))
    if path.is_file():
        try:
            state = load_model_file(path)
            has_optimizer |= has_plain_state(checkpoint.folder)
        except CheckpointError as error:
            log.warning(f"{error} The new files have the iteration and no more of it.")
    if has_optimizer:
        log.info(f"the optimizer state of {checkpoint.folder} is left behind")
    return state


def _configs(folder: Path) -> dict[str, str]:
    return {
        path.name: path.read_text(encoding="utf-8", errors="replace")
        for path in sorted((folder / "configs").glob("*"))
        if path.is_file()
    }
