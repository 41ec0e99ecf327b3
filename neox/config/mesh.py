"""Folders of mesh-transformer-jax, in which GPT-J was trained: which array is which parameter.

    step_383500/shard_S/P.npz     of every model shard S the arrays, divided over pieces P

The arrays of a shard are the leaves of JAX's tree in its order, one after another through the
pieces: the optimizer's state (where the folder is not slim), the parameters by their names *as
strings* (layer_0, layer_1, layer_10, ...), and the step. No name is stored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neox.config.hf import PRECISIONS
from neox.config.npz import Array, arrays
from neox.config.values import show
from neox.errors import CheckpointError, ConfigError, DamageError

_SHARD = re.compile(r"shard_(\d+)$")
_PIECE = re.compile(r"(\d+)\.npz$")

# A shard's parameters in their order, each with its shape. H is the model's width; of one shard, h
# are the heads', f the MLP's and v the vocabulary's.
_EMBEDDING = {"linear/b": "H", "linear/w": "vH"}
_LAYER = {
    "linear/w": "Hh",  # queries
    "linear_1/w": "Hh",  # values
    "linear_2/w": "Hh",  # keys
    "linear_3/w": "hH",
    "linear_4/b": "f",
    "linear_4/w": "Hf",
    "linear_5/b": "H",
    "linear_5/w": "fH",
    "replicated_layer_norm/offset": "H",
    "replicated_layer_norm/scale": "H",
}
_PROJECTION = {
    "linear/b": "v",
    "linear/w": "Hv",
    "replicated_layer_norm/offset": "H",
    "replicated_layer_norm/scale": "H",
}

# What no array tells; and that of GPT-J-6B, whose width is 4096.
UNSTORED = ("num_attention_heads", "rotary_pct", "max_position_embeddings")
WIDTH_OF_6B, _HEADS_OF_6B = 4096, 16
_ROTARY_DIM = 64
_CONTEXT = 2048

Leaves = Mapping[str, Array]  # of one module: "linear/w" -> its array


@dataclass(frozen=True)
class Shard:
    """The parameters of one model shard."""

    path: Path
    embedding: Leaves
    layers: Sequence[Leaves]
    projection: Leaves
    step: Array
    others: int  # arrays of the optimizer's state


@dataclass(frozen=True)
class Folder:
    """What a folder says: `values` are NeoX's keys, where they are known."""

    path: Path
    shards: Sequence[Shard]
    values: Mapping[str, Any]
    vocab_size: int  # rows of the embedding
    precision: str | None
    tokenizer: None = None

    @property
    def where(self) -> Path:
        """What says so."""
        return self.path

    @property
    def untold(self) -> list[str]:
        """The keys that a configuration has to give."""
        return [key for key in UNSTORED if key not in self.values]

    def said(self, name: str) -> str:
        """What the folder says of NeoX's key `name`."""
        return f"{name} is {show(self.values.get(name))}"


def is_mesh(folder: Path) -> bool:
    """Whether a folder holds shards of mesh-transformer-jax."""
    try:
        return any(_SHARD.match(path.parent.name) for path in folder.glob("shard_*/*.npz"))
    except OSError:
        return False


def read_folder(folder: Path, given: Mapping[str, Any] | None = None) -> Folder:
    """Find every parameter and compare shapes; of the arrays only headers are read.

    `given` are NeoX's keys that a configuration has: the heads and how much of them is rotated,
    which no array tells, are taken from there, or are those of GPT-J-6B if the width is.
    Raises CheckpointError naming the file that is missing, damaged or does not fit.
    """
    shards = [_shard(path, _leaves(path, pieces)) for path, pieces in _pieces(folder)]
    first, count = shards[0], len(shards)
    sizes = {"H": first.projection["replicated_layer_norm/scale"].shape[0]}
    sizes |= {
        "h": first.layers[0]["linear/w"].shape[1],
        "f": first.layers[0]["linear_4/w"].shape[1],
        "v": first.embedding["linear/w"].shape[0],
    }
    for shard in shards:
        _check(shard, first, sizes)
    hidden = sizes["H"]
    if sizes["h"] * count != hidden:
        raise DamageError(
            f"{folder} is incomplete, or not a GPT-J: the {count} shards found have queries of "
            f"{sizes['h']} each, {sizes['h'] * count} together, and the model's width is {hidden}."
        )
    values = {
        "num_layers": len(first.layers),
        "hidden_size": hidden,
        "intermediate_size": sizes["f"] * count,
        **_unstored(hidden, given or {}),
        "pos_emb": "rotary",
        "rotary_emb_base": 10000,
        "rotary_interleaved": True,
        "norm": "layernorm",
        "layernorm_epsilon": 1e-5,
        "activation": "gelu",
        "bias_gelu_fusion": True,
        "gpt_j_residual": True,
        "gpt_j_tied": True,
        "use_bias_in_attn_linear": False,
        "use_bias_in_mlp": True,
        "no_weight_tying": True,
        "use_bias_in_final_linear": True,
    }
    _check_heads(folder, count, values)
    precision = PRECISIONS.get(first.embedding["linear/w"].dtype)
    return Folder(folder, shards, values, sizes["v"] * count, precision)


def _unstored(hidden: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that no array tells; those that are not known are left out."""
    values: dict[str, Any] = {
        "max_position_embeddings": given.get("max_position_embeddings", _CONTEXT)
    }
    heads = given.get("num_attention_heads", _HEADS_OF_6B if hidden == WIDTH_OF_6B else None)
    if heads is not None:
        values["num_attention_heads"] = heads
    if "rotary_pct" in given:
        values["rotary_pct"] = given["rotary_pct"]
    elif hidden == WIDTH_OF_6B and heads is not None and heads * _ROTARY_DIM <= hidden:
        values["rotary_pct"] = _ROTARY_DIM * heads / hidden
    return values


def _check_heads(folder: Path, shards: int, values: Mapping[str, Any]) -> None:
    heads, hidden = values.get("num_attention_heads"), values["hidden_size"]
    if heads is not None and (hidden % heads or heads % shards):
        raise ConfigError(
            f"num_attention_heads is {heads}, but {folder} divides a width of {hidden} and whole "
            f"heads over {shards} shards: give a multiple of {shards} that divides {hidden}."
        )


def _pieces(folder: Path) -> list[tuple[Path, list[Path]]]:
    """Every shard's folder with its files, in order; none is missing in between."""
    found = {
        int(match[1]): path
        for path in folder.iterdir()
        if path.is_dir() and (match := _SHARD.match(path.name))
    }
    _check_numbers(folder, found, "shard_{}")
    pieces = []
    for _, path in sorted(found.items()):
        files = {}
        for file in path.glob("*.npz"):
            if (match := _PIECE.match(file.name)) is None:
                raise DamageError(f"{file} does not belong to a checkpoint: its name is no number.")
            files[int(match[1])] = file
        _check_numbers(path, files, "{}.npz")
        pieces.append((path, [files[number] for number in sorted(files)]))
    most = max(len(files) for _, files in pieces)
    for path, paths in pieces:
        if len(paths) != most:
            raise DamageError(
                f"{path / f'{len(paths)}.npz'} is missing: another shard has {most} such files."
            )
    return pieces


def _check_numbers(folder: Path, found: Mapping[int, Path], name: str) -> None:
    for number in range(1 + max(found, default=0)):
        if number not in found:
            raise DamageError(f"{folder / name.format(number)} is missing.")


def _leaves(path: Path, pieces: Sequence[Path]) -> list[Array]:
    return [array for piece in pieces for array in arrays(piece)]


def _shard(path: Path, leaves: Sequence[Array]) -> Shard:
    """Sort a shard's arrays, from the end: what comes before the parameters depends on the
    optimizer, and how many there are on the depth."""
    before_step = len(leaves) - 1
    start = before_step - len(_PROJECTION)
    ranks = [len(array.shape) for array in leaves]
    pattern = [len(shape) for shape in _LAYER.values()]
    depth = 0
    while start >= len(pattern) and ranks[start - len(pattern) : start] == pattern:
        start -= len(pattern)
        depth += 1
    first = start - len(_EMBEDDING)
    if (
        first < 0
        or depth == 0
        or ranks[-1] != 0
        or ranks[first:start] != [len(shape) for shape in _EMBEDDING.values()]
        or ranks[before_step - len(_PROJECTION) : before_step]
        != [len(shape) for shape in _PROJECTION.values()]
    ):
        raise DamageError(
            f"{path} is not a shard of GPT-J, or is incomplete: its {len(leaves)} arrays are not "
            "an embedding, layers of 10 arrays, a projection and the step."
        )
    by_name = {}
    for place, name in enumerate(sorted(f"layer_{i}/" for i in range(depth))):
        at = start + place * len(pattern)
        by_name[name] = dict(zip(_LAYER, leaves[at : at + len(pattern)], strict=True))
    return Shard(
        path,
        embedding=dict(zip(_EMBEDDING, leaves[first:start], strict=True)),
        layers=[by_name[f"layer_{i}/"] for i in range(depth)],
        projection=dict(
            zip(_PROJECTION, leaves[before_step - len(_PROJECTION) : before_step], strict=True)
        ),
        step=leaves[-1],
        others=first,
    )


def _check(shard: Shard, first: Shard, sizes: Mapping[str, int]) -> None:
    """Every array has its shape and is of floating-point numbers. Raises CheckpointError."""
    if len(shard.layers) != len(first.layers) or shard.others != first.others:
        raise DamageError(
            f"{shard.path} and {first.path} are not of one checkpoint: they have "
            f"{len(shard.layers)} and {len(first.layers)} layers, and {shard.others} and "
            f"{first.others} arrays of optimizer state."
        )
    modules = [("embedding_shard", shard.embedding, _EMBEDDING)]
    modules += [(f"layer_{i}", leaves, _LAYER) for i, leaves in enumerate(shard.layers)]
    modules.append(("projection_shard", shard.projection, _PROJECTION))
    for module, leaves, shapes in modules:
        for name, array in leaves.items():
            expected = tuple(sizes[letter] for letter in shapes[name])
            if array.shape != expected:
                raise CheckpointError(
                    f"{array} is {list(array.shape)}, but {module}/{name} has to be "
                    f"{list(expected)} beside {first.path}."
                )
            if array.dtype not in PRECISIONS:
                raise CheckpointError(f"{array}, {module}/{name}, holds {array.dtype} numbers.")
