"""Safetensors files, written one tensor at a time: the library wants a whole file's in memory.

The format (https://github.com/huggingface/safetensors): the header's length as 8 bytes, little
endian; a JSON header that tells each tensor's type, shape and place; the numbers, without gaps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
Spec = tuple[str, torch.dtype, tuple[int, ...]]  # name, type, shape


def is_writable(dtype: torch.dtype) -> bool:
    return dtype in _TYPES


def size(spec: Spec) -> int:
    """Bytes of a tensor's numbers."""
    return prod(spec[2]) * spec[1].itemsize


def write_safetensors(path: Path, specs: Sequence[Spec], tensors: Iterator[Tensor]) -> None:
    """Write `tensors`, which come in the order of `specs`, and flush them to the disk.

    Each is let go before the next is taken. Wide types have to come first: readers map the file,
    where a number stands at a multiple of its size. Raises OSError.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        name, dtype, shape = spec
        header[name] = {
            "dtype": _TYPES[dtype],
            "shape": shape,
            "data_offsets": [end, end + size(spec)],
        }
        end += size(spec)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, shape in specs:
            tensor = next(tensors)
            assert (tensor.dtype, tensor.shape) == (dtype, shape), name
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            del tensor
        file.flush()
        os.fsync(file.fileno())
