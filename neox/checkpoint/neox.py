"""NeoX checkpoints: `{save}/latest` names a folder `global_stepN` of layer files.

A layer's file `layer_03-model_01-model_states.pt` holds tensors by name: the shard that tp rank 1
wrote. Any number of shards is read into any tp: each rank maps the files into memory and copies its
own slices (neox.model.shard). Files are loaded with weights_only, so a pickle never runs.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neox.errors import CheckpointError
from neox.model.gpt import Layer
from neox.model.layout import ParamLayout
from neox.model.shard import file_shard, reshard
from neox.parallel.groups import ProcessGroups

_LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt$")

# Names of the 20B and Pythia era, and what they are called now.
_RENAMED = (("mlp.dense_h_to_4h.", "mlp.linear1."), ("mlp.dense_4h_to_h.", "mlp.linear2."))

# Buffers that older files hold and that are recomputed: the rotary frequencies and causal masks.
_RECOMPUTED = re.compile(r"(rotary_emb\.inv_freq|attention\.bias|attention\.masked_bias)$")


def layer_file(folder: Path, index: int, tp_rank: int) -> Path:
    return folder / f"layer_{index:02d}-model_{tp_rank:02d}-model_states.pt"


def step_folder(directory: Path, iteration: int) -> Path:
    return directory / f"global_step{iteration}"


def resolve(directory: Path, iteration: int | None) -> Path:
    """The checkpoint folder in `directory`: of `iteration`, or the one that `latest` names.

    A folder that itself holds layer files may be given too. Raises CheckpointError.
    """
    if not directory.is_dir():
        raise CheckpointError(
            f"load: {directory} is not a folder. Set `load` to the folder that holds `latest` and "
            "the global_step folders."
        )
    if iteration is None and any(directory.glob("layer_*-model_*-model_states.pt")):
        return directory
    if iteration is None:
        latest = directory / "latest"
        if not latest.is_file():
            raise CheckpointError(
                f"load: {directory} has no `latest` file and no layer files; {_found(directory)}"
            )
        name = latest.read_text(encoding="utf-8", errors="replace").strip()
    else:
        name = f"global_step{iteration}"
    folder = directory / name
    if not name or not folder.is_dir():
        wanted = "`latest` names" if iteration is None else f"iteration {iteration} asks for"
        raise CheckpointError(
            f"load: {wanted} {name or 'nothing'}, which is not in {directory}; {_found(directory)}"
        )
    return folder


def _found(directory: Path) -> str:
    steps = sorted(
        (p.name for p in directory.glob("global_step*") if p.is_dir()),
        key=lambda name: (len(name), name),
    )
    if steps:
        return f"it holds {', '.join(steps)}. Use --iteration N to choose one."
    others = sorted(p.name for p in directory.iterdir())[:5]
    return f"it holds {', '.join(others)}." if others else "it is empty."


@dataclass(frozen=True)
class Checkpoint:
    """An opened folder of layer files: which shards exist; tensors are read on demand."""

    folder: Path
    shards: dict[int, list[Path]] = field(repr=False)

    @classmethod
    def open(cls, directory: Path, iteration: int | None = None) -> Checkpoint:
        """Find the layer files and check that every layer has the same shards."""
        folder = resolve(directory, iteration)
        found: dict[int, dict[int, Path]] = {}
        for path in folder.iterdir():
            if match := _LAYER_FILE.match(path.name):
                found.setdefault(int(match[1]), {})[int(match[2])] = path
        if not found:
            raise CheckpointError(
                f"{folder} holds no layer files (layer_XX-model_YY-model_states.pt)."
            )
        tp = 1 + max(rank for ranks in found.values() for rank in ranks)
        missing = [
            layer_file(folder, index, rank).name
            for index, ranks in sorted(found.items())
            for rank in range(tp)
            if rank not in ranks
        ]
        if missing:
            raise CheckpointError(
                f"{folder} is incomplete: its files have {tp} shards a layer, but "
                f"{', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''} "
                f"{'is' if len(missing) == 1 else 'are'} missing."
            )
        return cls(folder, {i: [ranks[r] for r in range(tp)] for i, ranks in found.items()})

    @property
    def tp(self) -> int:
        """The number of shards of each layer."""
        return len(next(iter(self.shards.values())))

    @property
    def iteration(self) -> int:
        """The training step that the folder's name tells; 0 where it tells none."""
        match = re.match(r"global_step(\d+)$", self.folder.name)
        return int(match[1]) if match else 0

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding over all shards."""
        name = "word_embeddings.weight"
        rows = 0
        for path, tensors in self._open_layer(0):
            if name not in tensors:
                raise CheckpointError(f"{path} holds no {name}: it is not an embedding layer.")
            rows += tensors[name].shape[0]
        return rows

    def read(self, layer: Layer, groups: ProcessGroups) -> dict[str, Tensor]:
        """This rank's tensors of one layer, by today's names, in the precision of the files."""
        assert layer.layout is not None
        index = layer.file_index
        if layer.index != index and layer.index in self.shards:
            raise CheckpointError(
                f"{self.folder} holds {layer_file(self.folder, layer.index, 0).name}, an output "
                "projection of its own, but the configuration ties it to the embedding. Set "
                "no_weight_tying: true."
            )
        if index not in self.shards:
            raise CheckpointError(
                f"{self.folder} holds no {layer_file(self.folder, index, 0).name}. Its files are "
                f"those of num_layers {self._depth}; check num_layers and no_weight_tying, or find "
                "the missing file."
            )
        paths, stored = zip(*self._open_layer(index), strict=True)
        for path, tensors in zip(paths, stored, strict=True):
            self._check_names(path, tensors, layer)
        result = {}
        for name, layout in layer.layout.items():
            shards = [tensors[name] for tensors in stored]
            self._check_shapes(paths[0], name, shards, layout)
            result[name] = reshard(shards, layout, groups.tp_rank, groups.tp)
        return result

    @property
    def _depth(self) -> int:
        """Transformer layers by the files: they are numbered from 2, and a gap follows the last."""
        depth = 0
        while depth + 2 in self.shards:
            depth += 1
        return depth

    def load_into(self, module: nn.Module, layer: Layer, groups: ProcessGroups) -> None:
        """Fill a built layer's parameters, converting to their precision. Not collective."""
        tensors = self.read(layer, groups)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(tensors[name])

    def _open_layer(self, index: int) -> Iterator[tuple[Path, dict[str, Tensor]]]:
        for path in self.shards[index]:
            yield path, {_today(name): tensor for name, tensor in _load_layer(path).items()}

    def _check_names(self, path: Path, stored: dict[str, Tensor], layer: Layer) -> None:
        assert layer.layout is not None
        present = {name for name in stored if not _RECOMPUTED.search(name)}
        # With gpt_j_tied upstream still writes the second norm, which nothing reads.
        ignored = {name for name in present if name.startswith("post_attention_layernorm.")}
        missing = set(layer.layout) - present
        surplus = present - set(layer.layout) - ignored
        if missing or surplus:
            raise CheckpointError(
                f"{path} does not fit the configuration's architecture: "
                + "; ".join(
                    f"{what} {', '.join(sorted(names))}"
                    for what, names in (("it lacks", missing), ("it also has", surplus))
                    if names
                )
                + ". Check num_layers, norm, pos_emb, gpt_j_residual, gpt_j_tied, "
                "use_bias_in_attn_linear, use_bias_in_mlp and no_weight_tying."
            )

    def _check_shapes(
        self, path: Path, name: str, shards: list[Tensor], layout: ParamLayout
    ) -> None:
        shapes = [list(tensor.shape) for tensor in shards]
        if any(shape != shapes[0] for shape in shapes):
            raise CheckpointError(
                f"{path.parent}: the shards of {name} of layer {path.name[6:8]} have different "
                f"shapes, {shapes}: they are not of one checkpoint."
            )
        whole = list(shapes[0])
        if layout.dim is not None:
            whole[layout.dim] = sum(tensor.shape[layout.dim] for tensor in shards)
        wanted = list(layout.shape)
        if layout.is_vocab:
            whole[0] = wanted[0]  # vocabulary rows are padded or trimmed
        if whole != wanted:
            raise CheckpointError(
                f"{path.parent}: {name} of layer {path.name[6:8]} is {whole} "
                f"(over {len(shards)} shards), but the configuration makes it {wanted}. Check "
                "hidden_size, num_attention_heads, num_kv_heads and intermediate_size."
            )


def check_tokens(tokens: int, rows: int) -> None:
    """Raises CheckpointError when a tokenizer has more tokens than a checkpoint has rows."""
    if tokens > rows:
        raise CheckpointError(
            f"the tokenizer has {tokens} tokens, but the checkpoint's vocabulary has {rows}: set "
            "tokenizer_type and vocab_file to the tokenizer that the model was trained with"
        )


def save_layer(folder: Path, layer: Layer, module: nn.Module, groups: ProcessGroups) -> None:
    """Write this rank's shard of one layer into `folder`, which is not yet in its final place."""
    assert layer.layout is not None
    tensors = {
        # A clone: a parameter may be a view of a large flat buffer, which torch would save whole.
        name: file_shard(parameter.detach(), layer.layout[name], groups.tp).cpu().clone()
        for name, parameter in module.named_parameters()
    }
    save_file(tensors, layer_file(folder, layer.index, groups.tp_rank))


def save_file(contents: object, path: Path) -> None:
    """torch.save. OSError with the system's reason (a full disk) where torch hides it."""
    with open(path, "wb") as file:
        try:
            torch.save(contents, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def _today(name: str) -> str:
    for old, new in _RENAMED:
        name = name.replace(old, new)
    return name


def load_file(
    path: Path, map_location: Any = "cpu", *, mmap: bool = False, classes: Sequence[type] = ()
) -> Any:
    """torch.load that runs no code: tensors, numbers, plain containers, and instances of `classes`.

    Raises CheckpointError for anything else and for every kind of damage.
    """
    try:
        # Files of before torch 1.6 are no zip archives, and cannot be mapped.
        mmap = mmap and zipfile.is_zipfile(path)
        with torch.serialization.safe_globals(list(classes)):
            return torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} was refused: it is damaged, or holds more than tensors, which could run code."
        ) from error
    except Exception as error:  # an unpickler can stumble over damage in any way
        raise CheckpointError(f"{path} cannot be read: {_first_line(error)}") from error


def _load_layer(path: Path) -> dict[str, Tensor]:
    tensors = load_file(path, mmap=True)
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise CheckpointError(
            f"{path} is not a layer file: it is not a mapping of tensors by name."
        )
    return tensors


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
