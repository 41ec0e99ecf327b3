"""A transformers folder of GPTNeoXForCausalLM as the one shard of a checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from neox.checkpoint.files import load_file
from neox.checkpoint.hf.tensors import gpt_neox_prefixes
from neox.checkpoint.sources import Shard, as_shard
from neox.config import hf
from neox.errors import CheckpointError, ConfigError

SAFETENSORS = "model.safetensors"
_TORCH = "pytorch_model.bin"
_HEAD = "lm_head."  # what transformers 5 calls embed_out in memory, and in torch.save of that
_SHOWN = 4


class TransformersFiles:
    """The tensors of model.safetensors or pytorch_model.bin, whole or in parts with an index.

    Each layer opens its files anew, since the pages of a mapping that were read stay in memory
    until it is dropped.
    """

    tp = 1

    def __init__(self, folder: Path) -> None:
        """Find out which file holds which tensor. Raises CheckpointError."""
        try:
            self.config = hf.read_folder(folder)
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        self._folder = folder
        self._paths = {name: folder / file for name, file in files_by_name(folder).items()}
        if missing := {path.name for path in self._paths.values() if not path.is_file()}:
            raise CheckpointError(f"{folder} is incomplete: {_some(missing)} missing.")
        self._layers = self._sort()
        self._check_rows()

    @property
    def indices(self) -> Collection[int]:
        return self._layers.keys()

    def files(self, index: int) -> list[Path]:
        return sorted({self._paths[name] for name in self._layers[index].values()})

    def shards(self, index: int) -> list[Shard]:
        found, files = self._layers[index], self.files(index)
        stored: dict[str, Tensor] = {}
        for path in files:
            stored |= load_tensors(path, [n for n in found.values() if self._paths[n] == path])
        where = files[0] if len(files) == 1 else self._folder
        shard = as_shard(where, {here: stored[there] for here, there in found.items()})
        return [replace(shard, names={today: found[old] for today, old in shard.names.items()})]

    def _sort(self) -> dict[int, dict[str, str]]:
        """For each layer's index the names of its tensors, here (as ever) -> in the folder."""
        depth = self.config.values["num_layers"]
        prefixes = gpt_neox_prefixes(depth)
        if any(name.startswith(_HEAD) for name in self._paths):
            prefixes[depth + 4] = (_HEAD, prefixes[depth + 4][1])
        layers = {
            index: {
                ours + name.removeprefix(theirs): name
                for name in self._paths
                if name.startswith(theirs)
            }
            for index, (theirs, ours) in prefixes.items()
        }
        foreign = self._paths.keys() - {
            name for found in layers.values() for name in found.values()
        }
        if foreign:
            raise CheckpointError(
                f"{self._folder} holds {_some(foreign)}, which has no place in a "
                f"GPTNeoXForCausalLM of num_hidden_layers {depth}, as its {hf.CONFIG} has it."
            )
        if not self.config.values["no_weight_tying"]:
            del layers[depth + 4]  # the embedding, which may be stored a second time
        if empty := {prefixes[index][0] + "*" for index, found in layers.items() if not found}:
            raise CheckpointError(f"{self._folder} is incomplete: it holds no {_some(empty)}.")
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
