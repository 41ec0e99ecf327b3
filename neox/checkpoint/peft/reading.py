"""A folder of PEFT's, read whole or refused with one message.

For a model of ours every tensor has a place, or the adapters are of another one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from neox.checkpoint.folders import read_manifest
from neox.checkpoint.hf.files import load_tensors
from neox.checkpoint.peft.adapters import (
    SAFETENSORS,
    SETTINGS,
    TORCH,
    Adapters,
    Name,
    half,
    is_norm,
)
from neox.checkpoint.peft.joining import Pair, Piece, fuse, join
from neox.checkpoint.peft.names import HEAD, HEAD_5, PREFIX, Part, parts
from neox.checkpoint.peft.settings import Settings, read_settings
from neox.config import NeoXConfig
from neox.errors import CheckpointError
from neox.model.lora import AdapterSpec

_HALF = re.compile(r"(.+)\.lora_([AB])\.weight$")
_LAYER = re.compile(r"(gpt_neox\.layers|transformer\.h)\.(\d+)\.")
_FOREIGN = {
    ".lora_embedding_": "is an adapter of an embedding, which is not supported",
    ".lora_magnitude_vector": "is of DoRA, which is not supported",
    ".lora_B.bias": "is a bias of an adapter (lora_bias), which is not supported",
    ".token_adapter.": "is of single tokens that were trained, which is not supported",
}
# What PEFT puts around a module: what has an adapter, or was trained whole as well as kept.
_BASE, _KEPT, _SAVED = "base_layer", "original_module", "modules_to_save"


def read_adapters(folder: Path, config: NeoXConfig, padded_vocab_size: int) -> Adapters:
    """The adapters in `folder` for a model of `config`, whole, in the precision of the file.

    Vocabulary rows are padded with zeros, or dropped, to `padded_vocab_size`. Files that a
    manifest lists are verified. Not collective, any rank may read. Raises CheckpointError naming
    the file and the tensor or key, for everything that would not be computed as PEFT does.
    """
    settings, path = folder / SETTINGS, folder / SAFETENSORS
    if not path.is_file() and (folder / TORCH).is_file():
        path = folder / TORCH
    for needed in (settings, path):
        if not needed.is_file():
            raise CheckpointError(f"adapter: {folder} is incomplete: {needed.name} is missing.")
    if manifest := read_manifest(folder):
        manifest.check(settings)
        manifest.check(path)
    reading = _Reading(path, read_settings(settings), config, padded_vocab_size)
    for name, tensor in load_tensors(path).items():
        reading.sort(name, tensor)
    return reading.result()


@dataclass
class _Reading:
    """What was found so far of one file."""

    path: Path
    settings: Settings
    config: NeoXConfig
    rows: int  # of the vocabulary
    down: dict[str, Piece] = field(default_factory=dict)  # A and B, by the weight they go with
    up: dict[str, Piece] = field(default_factory=dict)
    trained: dict[str, Piece] = field(default_factory=dict)  # the base's, by name
    again: dict[str, Piece] = field(default_factory=dict)  # those that PEFT has saved twice
    copies: dict[str, Piece] = field(default_factory=dict)

    @cached_property
    def parts(self) -> dict[str, Part]:
        return {part.name: part for part in parts(self.config, self.rows)}

    @property
    def _is_tied(self) -> bool:
        return not self.config.no_weight_tying

    def sort(self, name: str, tensor: Tensor) -> None:
        """Find the place of a tensor. Raises CheckpointError."""
        if not name.startswith(PREFIX):
            raise self._error(name, f"does not begin with {PREFIX}, as all of PEFT's names do")
        if not tensor.is_floating_point():
            raise self._error(name, f"holds {tensor.dtype} numbers, which are no weights")
        plain = name.removeprefix(PREFIX)
        if match := _HALF.match(plain):
            part = self._part(name, match[1], "weight")
            if part.matrix is None:
                raise self._error(name, self._why_no_place(f"{match[1]}.weight"))
            found = self.down if match[2] == "A" else self.up
        else:
            part, found = self._parameter(name, plain, tensor)
        if part.name in found and not torch.equal(tensor, found[part.name].tensor):
            raise self._error(name, f"is not the same as {found[part.name].name}")
        found[part.name] = Piece(part, tensor, str(self.path), name)

    def _part(self, name: str, module: str, kind: str) -> Part:
        if module == HEAD_5 and f"{HEAD}.weight" in self.parts:
            module = HEAD
        part = self.parts.get(f"{module}.{kind}")
        if part is None and self._is_tied and module in (HEAD, HEAD_5) and kind == "weight":
            return next(p for p in self.parts.values() if p.source == "word_embeddings.weight")
        if part is None:
            raise self._error(name, self._why_no_place(f"{module}.{kind}"))
        return part

    def _parameter(self, name: str, plain: str, tensor: Tensor) -> tuple[Part, dict[str, Piece]]:
        """A parameter of the base, and whether it was trained."""
        module, _, kind = plain.rpartition(".")
        owner, _, wrapping = module.rpartition(".")
        if wrapping not in (_BASE, _KEPT, _SAVED):
            owner, wrapping = module, ""
        part = self._part(name, owner, kind)
        self._check_shape(name, tensor, part, part.layout.shape[1:])
        is_saved, bias = self.settings.saves(owner), self.settings.bias
        if is_saved and not is_norm(part.source) and wrapping in ("", _SAVED):
            raise self._error(name, "was trained whole (modules_to_save), as only norms can be")
        if wrapping == _SAVED:
            return part, self.again
        is_trained = kind == "bias" and (bias == "all" or (bias == "lora_only" and wrapping))
        if wrapping != _KEPT and (is_trained or is_saved):
            return part, self.trained
        if len(part.rows) == part.layout.shape[0] and (wrapping or part.layout.is_vocab):
            return part, self.copies
        raise self._error(
            name,
            f"is there, but by {self.settings.path.name} it was not trained: bias is {bias}, "
            f"modules_to_save {self.settings.modules_to_save}",
        )

    def _check_shape(self, name: str, tensor: Tensor, part: Part, width: tuple[int, ...]) -> None:
        """Raises CheckpointError unless it has the part's rows, if not vocabulary's, of `width`."""
        rows = len(tensor) if part.layout.is_vocab and tensor.dim() else len(part.rows)
        if tuple(tensor.shape) != (rows, *width):
            raise self._error(name, f"is {list(tensor.shape)}, and {[rows, *width]} fits the model")

    def result(self) -> Adapters:
        """Check that nothing lacks, and put together what is one tensor here."""
        self._check_whole()
        specs: dict[Name, AdapterSpec] = {}
        tensors: dict[Name, Tensor] = {}
        pairs: dict[Name, list[Pair]] = {}
        for name, part in self.parts.items():
            if name in self.up:
                assert part.matrix is not None
                pairs.setdefault((part.index, part.matrix), []).append(self._pair(part))
        for (index, matrix), found in pairs.items():
            specs[index, matrix], down, up = fuse(found)
            tensors |= {(index, half(matrix, "A")): down, (index, half(matrix, "B")): up}
        trained: dict[Name, list[Piece]] = {}
        for piece in self.trained.values():
            trained.setdefault(piece.part.key, []).append(piece)
        tensors |= {key: join(pieces) for key, pieces in trained.items()}
        copies = {
            piece.part.key: join([piece])[: len(piece.tensor)] for piece in self.copies.values()
        }
        return Adapters(specs, tensors, copies)

    def _pair(self, part: Part) -> Pair:
        """A, B and what they are scaled by. Raises CheckpointError when their shapes don't fit."""
        down, up = self.down[part.name], self.up[part.name]
        module = up.name.removeprefix(PREFIX).removesuffix(".lora_B.weight")
        rank = self.settings.rank_of(module)
        if len(down.tensor) != rank:
            raise self._error(
                down.name,
                f"has rank {len(down.tensor)}, but by {self.settings.path.name} it is {rank} "
                "(r, rank_pattern)",
            )
        if tuple(down.tensor.shape) != (rank, part.layout.shape[1]):
            wanted = [rank, part.layout.shape[1]]
            raise self._error(
                down.name, f"is {list(down.tensor.shape)}, and {wanted} fits the model"
            )
        self._check_shape(up.name, up.tensor, part, (rank,))
        spec = AdapterSpec(rank, self.settings.scaling_of(module), self.settings.dropout)
        return Pair(down.tensor, up, spec)

    def _check_whole(self) -> None:
        for one, other, letter in ((self.down, self.up, "B"), (self.up, self.down, "A")):
            for name in sorted(one.keys() - other.keys()):
                raise self._error(one[name].name, f"is there without its lora_{letter}")
        if not self.up:
            raise CheckpointError(f"{self.path} holds no adapters: no lora_A and lora_B.")
        for name, part in self.parts.items():
            is_target = any(map(self.settings.targets, part.modules))
            if part.matrix and is_target and name not in self.up:
                raise CheckpointError(
                    f"{self.path} is incomplete: target_modules in {self.settings.path.name} has "
                    f"{part.module}, but there is no {PREFIX}{part.module}.lora_A.weight."
                )
        for name, piece in self.again.items():
            if name not in self.trained or not torch.equal(piece.tensor, self.trained[name].tensor):
                raise self._error(piece.name, f"is not the same as {PREFIX}{name}")
        keys = {piece.part.key for piece in self.trained.values()}
        for name, part in self.parts.items():
            if part.key in keys and name not in self.trained:
                raise CheckpointError(
                    f"{self.path} has no {PREFIX}{name}, but one that is the same tensor here: "
                    f"layer {part.index:02d}'s {part.source}. They can only be trained together."
                )

    def _why_no_place(self, plain: str) -> str:
        for text, reason in _FOREIGN.items():
            if text in f"{plain}.":
                return reason
        known = [match for name in self.parts if (match := _LAYER.match(name))]
        layer, depth = _LAYER.match(plain), self.config.num_layers
        if layer and layer[1] == known[0][1] and int(layer[2]) >= depth:
            return f"is of layer {layer[2]}, but the model has layers 0 to {depth - 1} (num_layers)"
        if plain.startswith((f"{HEAD}.", f"{HEAD_5}.")) and self._is_tied:
            return "adapts the output projection, which is the embedding here (no_weight_tying)"
        return f"has no place in this model, whose names are like {known[0].string}"

    def _error(self, name: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {name} {problem}.")
