"""Where a checkpoint's tensors are: a file for each layer and shard, or one file for each shard."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from neox.checkpoint.files import load_file
from neox.checkpoint.lazy import LazyTensors
from neox.errors import CheckpointError, DamageError
from neox.model.quantized import EightBit

_LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt$")
_MODEL_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt$")
_SEQUENTIAL = re.compile(r"(?:module\.)?sequential\.(\d+)\.(.+)$")

# Names of the 20B and Pythia era, and what they are called now.
_RENAMED = (("mlp.dense_h_to_4h.", "mlp.linear1."), ("mlp.dense_4h_to_h.", "mlp.linear2."))

# Buffers that older files hold and that are recomputed: the rotary frequencies and causal masks.
_RECOMPUTED = re.compile(r"(rotary_emb\.inv_freq|(attention|attn)\.(masked_)?bias)$")


class _Unread:
    """Stands for an object that is not needed, so that the class it names is never touched."""

    def __init__(self, *arguments: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


# Upstream keeps numpy's random state in its mp_rank files. Numpy's own classes are no safe place
# for what a file says: an array's state is its memory.
_RANDOM_STATE: list[Any] = [
    (_Unread, "numpy.ndarray"),
    (_Unread, "numpy.dtype"),
    (_Unread, "numpy._core.multiarray._reconstruct"),
    (_Unread, "numpy.core.multiarray._reconstruct"),  # before numpy 2
]


@dataclass(frozen=True)
class Shard:
    """One tp rank's tensors of one layer, by today's names; views of the file `where`, or made of
    what it holds each time that they are looked up.

    `buffers` are those that older files hold and nobody needs. `names` are the names as found.
    `eight_bit` has those of the tensors that are stored so; `tensors` has them, too, in float32.
    """

    where: Path
    tensors: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    eight_bit: Mapping[str, EightBit] = field(default_factory=dict)

    def described(self, name: str) -> Tensor:
        """A tensor of the shape and precision of `name`, whose numbers may not be there."""
        if isinstance(self.tensors, LazyTensors):
            return self.tensors.described(name)
        return self.tensors[name]


class Source(Protocol):
    """The tensors of one checkpoint. Not collective, any rank may read anything."""

    tp: int  # shards of every layer

    @property
    def indices(self) -> Collection[int]:
        """The NeoX indices of the layers that have tensors."""

    def files(self, index: int) -> list[Path]:
        """The files that `shards(index)` reads."""

    def shards(self, index: int) -> list[Shard]:
        """Every shard of a layer, nothing read yet but names and shapes. CheckpointError."""


ADAPTERS = "adapter_model.safetensors"  # PEFT's name


def layer_file(folder: Path, index: int, tp_rank: int) -> Path:
    return folder / f"layer_{index:02d}-model_{tp_rank:02d}-model_states.pt"


def model_file(folder: Path, part: int) -> Path:
    return folder / f"mp_rank_{part:02d}_model_states.pt"


def has_layer_files(folder: Path) -> bool:
    return any(_LAYER_FILE.match(path.name) for path in folder.glob("layer_*"))


def has_model_files(folder: Path) -> bool:
    return any(_MODEL_FILE.match(path.name) for path in folder.glob("mp_rank_*"))


class LayerFiles:
    """layer_03-model_01-model_states.pt: layer 3's tensors of tp rank 1."""

    def __init__(self, folder: Path) -> None:
        found: dict[int, dict[int, Path]] = {}
        for path in folder.iterdir():
            if match := _LAYER_FILE.match(path.name):
                found.setdefault(int(match[1]), {})[int(match[2])] = path
        self.tp = 1 + max(rank for ranks in found.values() for rank in ranks)
        missing = [
            layer_file(folder, index, rank).name
            for index, ranks in sorted(found.items())
            for rank in range(self.tp)
            if rank not in ranks
        ]
        if missing:
            raise DamageError(
                f"{folder} is incomplete: its files have {self.tp} shards a layer, but "
                f"{', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''} "
                f"{'is' if len(missing) == 1 else 'are'} missing."
            )
        self._files = {
            index: [ranks[rank] for rank in range(self.tp)]
            for index, ranks in sorted(found.items())
        }

    @property
    def indices(self) -> Collection[int]:
        return self._files.keys()

    def files(self, index: int) -> list[Path]:
        return self._files[index]

    def shards(self, index: int) -> list[Shard]:
        return [as_shard(path, load_file(path, mmap=True)) for path in self.files(index)]


class ModelFiles:
    """mp_rank_01_model_states.pt of pipe_parallel_size 0: tp rank 1's tensors of every layer.

    Under "module", as sequential.3.NAME for layer 3. A file is mapped anew for every layer, since
    the pages of a mapping that were read stay in memory until it is dropped.
    """

    def __init__(self, folder: Path) -> None:
        ranks = sorted(
            int(match[1]) for path in folder.iterdir() if (match := _MODEL_FILE.match(path.name))
        )
        self.tp = 1 + ranks[-1]
        if missing := sorted(set(range(self.tp)) - set(ranks)):
            names = ", ".join(model_file(folder, rank).name for rank in missing)
            raise DamageError(f"{folder} is incomplete: {names} missing.")
        self._paths = [model_file(folder, rank) for rank in ranks]
        named = [_sequential(path) for path in self._paths]
        self._indices = sorted({index for index, _ in named[0]})
        for path, weights in zip(self._paths, named, strict=True):
            if not weights:
                raise CheckpointError(
                    f"{path} holds no weights, and there are no layer files "
                    f"(layer_XX-model_YY-model_states.pt) beside it."
                )
            if weights.keys() != named[0].keys():
                raise CheckpointError(
                    f"{path} and {self._paths[0].name} do not hold the same tensors: they are "
                    "not of one checkpoint."
                )

    @property
    def indices(self) -> Collection[int]:
        return self._indices

    def files(self, index: int) -> list[Path]:
        return self._paths

    def shards(self, index: int) -> list[Shard]:
        return [
            as_shard(
                path,
                {name: tensor for (at, name), tensor in _sequential(path).items() if at == index},
            )
            for path in self._paths
        ]


class AdapterFiles:
    """A step of a run that trains adapters: their file, and no layer of the model itself."""

    indices: Collection[int] = ()

    def __init__(self, folder: Path, tp: int) -> None:
        """`tp` is that of the run, whose optimizer state is divided so."""
        self._folder = folder
        self.tp = tp

    def files(self, index: int) -> list[Path]:
        return []

    def shards(self, index: int) -> list[Shard]:
        raise CheckpointError(
            f"{self._folder} holds adapters ({ADAPTERS}) and not the model that they are for. Set "
            "`adapter` to it, and `load` to the model."
        )


def load_model_file(path: Path) -> dict[str, Any]:
    """An mp_rank file: DeepSpeed's and upstream's state besides the layer files. CheckpointError.

    Its tensors are views of the file.
    """
    state = load_file(path, mmap=True, classes=_RANDOM_STATE)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} is not a model file: it is not a mapping.")
    return state


def as_shard(where: Path, stored: Any) -> Shard:
    """Sort what one file holds of a layer. Raises CheckpointError if it is no tensors by name."""
    if not isinstance(stored, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in stored.items()
    ):
        raise CheckpointError(
            f"{where} is not a layer file: it is not a mapping of tensors by name."
        )
    buffers = {name: tensor for name, tensor in stored.items() if _RECOMPUTED.search(name)}
    names = {_today(name): name for name in stored if name not in buffers}
    return Shard(where, {today: stored[name] for today, name in names.items()}, buffers, names)


def _sequential(path: Path) -> dict[tuple[int, str], Any]:
    """The weights of an mp_rank file by layer index and name."""
    module = load_model_file(path).get("module") or {}
    if not isinstance(module, dict):
        raise CheckpointError(f"{path} is not a model file: its weights are not a mapping.")
    found = {}
    for name, tensor in module.items():
        match = _SEQUENTIAL.match(name) if isinstance(name, str) else None
        if match is None:
            raise CheckpointError(
                f"{path} holds {str(name)[:100]}, which is not sequential.N.NAME: it is not a NeoX "
                "checkpoint."
            )
        found[int(match[1]), match[2]] = tensor
    return found


def _today(name: str) -> str:
    for old, new in _RENAMED:
        name = name.replace(old, new)
    return name


def legacy_name(name: str) -> str:
    """What a tensor was called in the 20B and Pythia era."""
    for old, new in _RENAMED:
        name = name.replace(new, old)
    return name
