"""Parts of our tensors put together again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neox.checkpoint.peft.names import Part
from neox.errors import CheckpointError
from neox.model.lora import AdapterSpec


@dataclass(frozen=True)
class Piece:
    """A part of one of our tensors: its rows as they are in the file `where` under `name`."""

    part: Part
    tensor: Tensor
    where: str
    name: str


@dataclass(frozen=True)
class Pair:
    """An adapter of the file: A [rank, K], and B with the rows of a part."""

    down: Tensor
    up: Piece
    spec: AdapterSpec


def join(pieces: Sequence[Piece]) -> Tensor:
    """One of our tensors, zero where no piece has rows. The pieces have the same width.

    Vocabulary rows are padded with zeros, or dropped. Raises CheckpointError when rows that are
    the same one here differ.
    """
    first, layout = pieces[0].tensor, pieces[0].part.layout
    whole = first.new_zeros((layout.shape[0], *first.shape[1:]))
    for piece in pieces:
        whole[piece.part.rows[: len(piece.tensor)]] = piece.tensor[: len(piece.part.rows)]
    for piece in pieces:
        rows, stored = piece.part.rows[: len(piece.tensor)], piece.tensor[: len(piece.part.rows)]
        if not torch.equal(whole[rows], stored):
            others = sorted({other.name for other in pieces} - {piece.name})
            among = f"from {others[0]}" if others else "among heads that share"
            raise CheckpointError(
                f"{piece.where}: {piece.name} differs {among}, and they are one tensor here, "
                f"layer {piece.part.index:02d}'s {piece.part.source}: only a model that has them "
                "apart can have them differ."
            )
    return whole


def fuse(pairs: Sequence[Pair]) -> tuple[AdapterSpec, Tensor, Tensor]:
    """One adapter of all parts of a matrix: its spec, A and B.

    sum_i s_i B_i A_i is s [s_1/s B_1 | s_2/s B_2 ...] [A_1; A_2; ...], where each B_i has rows of
    its own; with one A for all it is s B A as it stands.
    """
    spec, down = pairs[0].spec, pairs[0].down
    if all(pair.spec == spec and torch.equal(pair.down, down) for pair in pairs):
        return spec, down, join([pair.up for pair in pairs])
    columns = []
    for pair in pairs:
        up = join([pair.up])
        ratio = pair.spec.scaling / spec.scaling if spec.scaling else 1.0
        columns.append(up if ratio == 1.0 else up * ratio)
    down = torch.cat([pair.down for pair in pairs])
    return AdapterSpec(len(down), spec.scaling, spec.dropout), down, torch.cat(columns, 1)
