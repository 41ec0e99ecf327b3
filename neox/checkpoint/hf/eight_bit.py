"""Weights of 8 bits in a folder's files, as hivemind/gpt-j-6B-8bit has them.

Of a linear layer or a table NAME: NAME.weight, uint8 codes of the weight's shape, NAME.absmax, a
float32 for each 4096 elements of the flattened weight, and NAME.code, the 256 float32 values that
codes stand for. Biases and norms are as ever.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from neox.checkpoint.hf.names import interleave
from neox.errors import CheckpointError, DamageError
from neox.model.quantized import BLOCK, EightBit, from_blocks, join_rows

_WEIGHT, _SCALES, _TABLE = ".weight", ".absmax", ".code"


def weights(names: Collection[str], where: object) -> set[str]:
    """Those of `names` that are codes. Raises DamageError where a part of one is missing."""
    stems = {
        name.removesuffix(ending)
        for name in names
        for ending in (_SCALES, _TABLE)
        if name.endswith(ending)
    }
    wanted = {stem + ending for stem in stems for ending in (_WEIGHT, _SCALES, _TABLE)}
    if missing := sorted(wanted - set(names)):
        raise DamageError(f"{where} is incomplete: it holds no {', '.join(missing[:4])}.")
    return {stem + _WEIGHT for stem in stems}


def parts(weight: str) -> tuple[str, str, str]:
    """The names of the three tensors of an 8-bit weight."""
    stem = weight.removesuffix(_WEIGHT)
    return weight, stem + _SCALES, stem + _TABLE


def assemble(weight: str, stored: Mapping[str, Tensor], where: object) -> EightBit:
    """One weight of its tensors. Raises CheckpointError where their shapes do not go together."""
    codes, scales, table = (stored[name] for name in parts(weight))
    if codes.dtype != torch.uint8 or codes.dim() != 2 or not codes.numel():
        raise CheckpointError(
            f"{where}: {weight} is {_described(codes)}, but the codes of a matrix are uint8."
        )
    blocks = (codes.numel() - 1) // BLOCK + 1
    for name, tensor, wanted in zip(parts(weight)[1:], (scales, table), (blocks, 256), strict=True):
        if tensor.dtype != torch.float32 or tensor.shape != (wanted,):
            raise CheckpointError(
                f"{where}: {name} is {_described(tensor)}, but beside codes {list(codes.shape)} it "
                f"has to be float32 [{wanted}]."
            )
    # The table goes into every part that is cut out of the weight, and would keep the file mapped.
    return from_blocks(codes, scales, table.clone())


def join(heads: int, qkv: Sequence[EightBit]) -> EightBit:
    """Queries, keys and values, of one table, as `interleave` joins tensors."""
    rows = torch.arange(sum(part.shape[0] for part in qkv))
    order = interleave(heads, rows.chunk(len(qkv)))
    stacked = join_rows(qkv)
    return EightBit(stacked.codes[order], stacked.scales[order], stacked.table)


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
