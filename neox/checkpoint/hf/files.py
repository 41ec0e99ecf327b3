"""A transformers folder as the one shard of a checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from neox.checkpoint.files import load_file
from neox.checkpoint.hf.names import NAMINGS, Names, interleave
from neox.checkpoint.sources import Shard, as_shard
from neox.config import hf
from neox.config.values import listed
from neox.errors import CheckpointError, ConfigError

SAFETENSORS = "model.safetensors"
_TORCH = "pytorch_model.bin"
_SHOWN = 4


class Tensors(Protocol):
    """Tensors by transformers' names, wherever they are."""

    @property
    def names(self) -> Collection[str]: ...

    def files(self, names: Collection[str]) -> list[Path]:
        """The files that hold these, in order."""

    def load(self, names: Collection[str]) -> Mapping[str, Tensor]:
        """These, nothing read yet but their shapes. Raises CheckpointError."""


class FolderTensors:
    """Those of model.safetensors or pytorch_model.bin, whole or in parts with an index.

    Each `load` opens the files anew, since the pages of a mapping that were read stay in memory
    until it is dropped.
    """

    def __init__(self, folder: Path) -> None:
        """Find out which file holds which tensor. Raises CheckpointError."""
        self._paths = {name: folder / file for name, file in files_by_name(folder).items()}
        if missing := {path.name for path in self._paths.values() if not path.is_file()}:
            raise CheckpointError(f"{folder} is incomplete: {_some(missing)} missing.")

    @property
    def names(self) -> Collection[str]:
        return self._paths.keys()

    def files(self, names: Collection[str]) -> list[Path]:
        return sorted({self._paths[name] for name in names})

    def load(self, names: Collection[str]) -> Mapping[str, Tensor]:
        """Views of the files."""
        stored: dict[str, Tensor] = {}
        for path in self.files(names):
            stored |= load_tensors(path, [name for name in names if self._paths[name] == path])
        return stored


class TransformersFiles:
    """A folder's model as layers of one shard. Queries, keys and values are joined on demand."""

    tp = 1

    def __init__(self, folder: Path) -> None:
        """Read config.json and the names of all tensors. Raises CheckpointError."""
        try:
            self.config = hf.read_folder(folder)
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        self._folder = folder
        self._tensors: Tensors = FolderTensors(folder)
        self._layers = self._sort()
        self._check_rows()

    @property
    def indices(self) -> Collection[int]:
        return self._layers.keys()

    def files(self, index: int) -> list[Path]:
        return self._tensors.files(_theirs(self._layers[index]))

    def shards(self, index: int) -> list[Shard]:
        found, files = self._layers[index], self.files(index)
        stored = self._tensors.load(_theirs(found))
        where = files[0] if len(files) == 1 else self._folder
        parts = {ours: [stored[name] for name in theirs] for ours, theirs in found.items()}
        shard = as_shard(where, {ours: tensors[0] for ours, tensors in parts.items()})
        names = {today: ", ".join(found[ours]) for today, ours in shard.names.items()}
        split = {ours: tensors for ours, tensors in parts.items() if len(tensors) > 1}
        heads = self.config.values["num_attention_heads"]
        for ours, tensors in split.items():
            shapes = [list(tensor.shape) for tensor in tensors]
            if shapes.count(shapes[0]) < len(shapes) or not shapes[0] or shapes[0][0] % heads:
                raise CheckpointError(
                    f"{where}: {names[ours]} are {listed(map(str, shapes), 'and')}, which are not "
                    f"the same rows of {heads} heads."
                )
        return [replace(shard, tensors=_Joined(shard.tensors, split, heads), names=names)]

    def _sort(self) -> dict[int, Names]:
        """For each layer's index the names of its tensors, here (as ever) -> in the folder."""
        kind, depth = self.config.kind, self.config.values["num_layers"]
        there = set(self._tensors.names)
        layers = NAMINGS[self.config.model_type].sort(there, depth)
        wanted = {name for found in layers.values() for name in _theirs(found)}
        if foreign := there - wanted:
            raise CheckpointError(
                f"{self._folder} holds {_some(foreign)}, which has no place in a {kind.name} of "
                f"{kind.same['num_layers']} {depth}, as its {hf.CONFIG} has it."
            )
        prefixes = NAMINGS[self.config.model_type].prefixes(depth)
        empty = {prefixes[index][0] + "*" for index, found in layers.items() if not found}
        if not self.config.values["no_weight_tying"]:
            del layers[depth + 4]  # the embedding, which may be stored a second time
            empty.discard(prefixes[depth + 4][0] + "*")
        elif self.config.stated["tie_word_embeddings"]:  # the head is, but for its bias, the table
            layers[depth + 4] |= {
                name.replace("word_embeddings", "final_linear"): theirs
                for name, theirs in layers[0].items()
            }
        if missing := empty | (wanted - there):
            raise CheckpointError(f"{self._folder} is incomplete: it holds no {_some(missing)}.")
        return layers

    def _check_rows(self) -> None:
        rows = self.config.vocab_size
        for index in {0, self.config.values["num_layers"] + 4} & self._layers.keys():
            for shard in self.shards(index):
                for name, tensor in shard.tensors.items():
                    if tensor.shape[:1] != (rows,):
                        raise CheckpointError(
                            f"{shard.where}: {shard.names[name]} is {list(tensor.shape)}, but "
                            f"vocab_size in {self._folder / hf.CONFIG} is {rows}."
                        )


class _Joined(Mapping[str, Tensor]):
    """`whole` tensors by our names; the others are made of their parts when they are asked for."""

    def __init__(
        self, whole: Mapping[str, Tensor], split: Mapping[str, Sequence[Tensor]], heads: int
    ) -> None:
        self._whole, self._split, self._heads = whole, split, heads

    def __getitem__(self, name: str) -> Tensor:
        if name in self._split:
            return interleave(self._heads, self._split[name])
        return self._whole[name]

    def __contains__(self, name: object) -> bool:
        return name in self._whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole)

    def __len__(self) -> int:
        return len(self._whole)


def _theirs(found: Names) -> list[str]:
    return list(dict.fromkeys(name for names in found.values() for name in names))


def files_by_name(folder: Path) -> dict[str, str]:
    """The file of every tensor, in the order in which transformers looks for files.

    Raises CheckpointError.
    """
    for single in (SAFETENSORS, _TORCH):
        if (folder / single).is_file():
            return dict.fromkeys(load_tensors(folder / single), single)
        index = folder / f"{single}.index.json"
        if index.is_file():
            return _weight_map(index)
    raise CheckpointError(
        f"{folder} holds neither {SAFETENSORS} nor {_TORCH}, nor the index of its parts "
        f"({SAFETENSORS}.index.json)."
    )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = hf.read_json(index).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(found, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in found.values()
    ):
        raise CheckpointError(f"{index} is damaged: its weight_map does not name files.")
    return found


def load_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The named tensors of a file, or all, as views of it. Raises CheckpointError."""
    if path.suffix == ".bin":
        stored = load_file(path, mmap=True)
        if not isinstance(stored, dict) or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in stored.items()
        ):
            raise CheckpointError(f"{path} is not a mapping of tensors by name.")
        if lacking := set(names or ()) - stored.keys():
            raise CheckpointError(f"{path} is damaged: it lacks {_some(lacking)}.")
        return {name: stored[name] for name in names or stored}
    try:
        path.open("rb").close()  # safetensors calls every file missing that it may not read
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names or file.keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error


def check_new(output: Path, remains: Collection[str] = ()) -> None:
    """Raises CheckpointError unless `output` is missing, or a folder with at most `remains`."""
    if output.exists() and (
        not output.is_dir() or any(path.name not in remains for path in output.iterdir())
    ):
        raise CheckpointError(f"{output} is there already, and not empty. Name a new folder.")


def _some(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
