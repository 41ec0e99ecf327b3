"""A transformers folder as the one shard of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial, reduce
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from neox.checkpoint.files import load_file
from neox.checkpoint.hf import eight_bit
from neox.checkpoint.hf.names import NAMINGS, Names, interleave
from neox.checkpoint.lazy import Lazy, LazyTensors, Recipe
from neox.checkpoint.sources import Shard, as_shard
from neox.config import hf
from neox.config.values import listed
from neox.errors import CheckpointError, ConfigError
from neox.model.quantized import EightBit

SAFETENSORS = "model.safetensors"
_TORCH = "pytorch_model.bin"
_SHOWN = 4


class FolderTensors:
    """Those of model.safetensors or pytorch_model.bin, whole or in parts with an index.

    The three tensors of an 8-bit weight are one here, under the name of its codes.

    Each `load` opens the files anew, since the pages of a mapping that were read stay in memory
    until it is dropped.
    """

    def __init__(self, folder: Path) -> None:
        """Find out which file holds which tensor. Raises CheckpointError."""
        self._paths = {name: folder / file for name, file in files_by_name(folder).items()}
        if missing := {path.name for path in self._paths.values() if not path.is_file()}:
            raise CheckpointError(f"{folder} is incomplete: {_some(missing)} missing.")
        self._folder = folder
        self.eight_bit = eight_bit.weights(self._paths, folder)
        beside = {name for weight in self.eight_bit for name in eight_bit.parts(weight)[1:]}
        self.names = self._paths.keys() - beside

    def files(self, names: Collection[str]) -> list[Path]:
        """The files that hold these, in order."""
        return sorted({self._paths[name] for name in self._parts(names)})

    def load(self, names: Collection[str]) -> dict[str, Tensor | EightBit]:
        """Views of the files. Raises CheckpointError."""
        stored: dict[str, Tensor] = {}
        for path in self.files(names):
            here = [name for name in self._parts(names) if self._paths[name] == path]
            stored |= load_tensors(path, here)
        return {
            name: eight_bit.assemble(name, stored, self._folder)
            if name in self.eight_bit
            else stored[name]
            for name in names
        }

    def _parts(self, names: Collection[str]) -> list[str]:
        """What is stored of each."""
        return [
            part
            for name in names
            for part in (eight_bit.parts(name) if name in self.eight_bit else (name,))
        ]


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
        self._tensors = FolderTensors(folder)
        self._layers = self._sort()
        self._check_rows()

    @property
    def indices(self) -> Collection[int]:
        return self._layers.keys()

    def files(self, index: int) -> list[Path]:
        return self._tensors.files(_theirs(self._layers[index]))

    @property
    def is_eight_bit(self) -> bool:
        return bool(self._tensors.eight_bit)

    def shards(self, index: int) -> list[Shard]:
        found, files = self._layers[index], self.files(index)
        stored = self._tensors.load(_theirs(found))
        where = files[0] if len(files) == 1 else self._folder
        recipes: dict[str, Recipe] = {}
        kept: dict[str, Callable[[], EightBit]] = {}
        for ours, theirs in found.items():
            parts = [stored[name] for name in theirs]
            if len(parts) > 1:
                self._check_heads(where, theirs, parts)
            recipes[ours] = self._recipe(parts)
            weights = [part for part in parts if isinstance(part, EightBit)]
            if len(weights) == len(parts) and _share_table(weights):
                kept[ours] = partial(self._eight_bit, weights)
        shard = as_shard(where, {ours: recipe.described for ours, recipe in recipes.items()})
        today = {name: recipes[ours] for name, ours in shard.names.items()}
        for name, ours in shard.names.items():
            if not today[name].dtype.is_floating_point:
                raise CheckpointError(
                    f"{where}: {_in_short(found[ours])} holds {str(today[name].dtype)[6:]} numbers,"
                    " which are no weights without NAME.absmax and NAME.code beside NAME.weight."
                )
        return [
            Shard(
                where,
                LazyTensors(today),
                buffers={name: recipes[name].make() for name in shard.buffers},
                names={name: _in_short(found[ours]) for name, ours in shard.names.items()},
                eight_bit=Lazy({n: kept[o] for n, o in shard.names.items() if o in kept}),
            )
        ]

    def _recipe(self, parts: Sequence[Tensor | EightBit]) -> Recipe:
        """How one tensor is made of what is stored of it."""
        dense = [
            Recipe(tuple(part.shape), torch.float32, part.dequantize)
            if isinstance(part, EightBit)
            else _there(part)
            for part in parts
        ]
        if len(dense) == 1:
            return dense[0]
        shape = (sum(part.shape[0] for part in dense), *dense[0].shape[1:])
        dtype = reduce(torch.promote_types, (part.dtype for part in dense))
        heads = self.config.values["num_attention_heads"]
        return Recipe(
            shape, dtype, lambda: interleave(heads, [part.make().to(dtype) for part in dense])
        )

    def _eight_bit(self, parts: Sequence[EightBit]) -> EightBit:
        if len(parts) == 1:
            return parts[0]
        return eight_bit.join(self.config.values["num_attention_heads"], parts)

    def _check_heads(
        self, where: Path, names: Sequence[str], parts: Sequence[Tensor | EightBit]
    ) -> None:
        heads, shapes = self.config.values["num_attention_heads"], [list(p.shape) for p in parts]
        if shapes.count(shapes[0]) < len(shapes) or not shapes[0] or shapes[0][0] % heads:
            raise CheckpointError(
                f"{where}: {_in_short(names)} are {listed(map(str, shapes), 'and')}, which are not "
                f"the same rows of {heads} heads."
            )

    def _sort(self) -> dict[int, Names]:
        """For each layer's index the names of its tensors, here (as ever) -> in the folder."""
        kind, depth = self.config.kind, self.config.values["num_layers"]
        layers = NAMINGS[self.config.model_type].sort(self._tensors.names, depth)
        there = set(self._tensors.names)
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
                for name in shard.tensors:
                    shape = shard.described(name).shape
                    if shape[:1] != (rows,):
                        raise CheckpointError(
                            f"{shard.where}: {shard.names[name]} is {list(shape)}, but "
                            f"vocab_size in {self._folder / hf.CONFIG} is {rows}."
                        )


def _there(tensor: Tensor) -> Recipe:
    """A view of a file."""
    return Recipe.like(tensor, lambda: tensor)


def _share_table(parts: Sequence[EightBit]) -> bool:
    return all(torch.equal(part.table, parts[0].table) for part in parts[1:])


def _in_short(names: Sequence[str]) -> str:
    """attn.{q,k,v}_proj.weight for three names."""
    if len(names) == 1:
        return names[0]
    differ = [len(set(letters)) > 1 for letters in zip(*names, strict=True)]  # of equal length
    start, stop = differ.index(True), len(differ) - differ[::-1].index(True)
    parts = ",".join(name[start:stop] for name in names)
    return f"{names[0][:start]}{{{parts}}}{names[0][stop:]}"


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
