"""The kernels' functions, called through ctypes: tensors in, tensors out.

The structures are those of product.h and decode.h, field by field.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys

import torch
from torch import Tensor

from neox import log
from neox.kernels.build import instruction_sets, open_library

FUNCTIONS = {"none": 0, "gelu_tanh": 1, "gelu_erf": 2, "silu": 3, "relu": 4}
LAYER_NORM, RMS_NORM, MULTIPLY, ATTEND, GATE, ADD = range(6)

_I, _P = ctypes.c_int64, ctypes.c_void_p
_MADV_HUGEPAGE = 14  # of Linux's mman.h


class Matrix(ctypes.Structure):
    """A weight [N, width] as neox.model.packed packs it, of 32, 8 or 4 bits."""

    _fields_ = [
        ("bits", _I),
        *((name, _P) for name in ("codes", "scales", "bias")),
        *((name, _I) for name in ("N", "width", "K")),
    ]


class Operation(ctypes.Structure):
    """One step of a decoding pass; decode.h says which fields matter to which kind."""

    _fields_ = [
        *((name, _I) for name in ("kind", "function")),
        *((name, _P) for name in ("input", "second", "output")),
        ("width", _I),
        *((name, _P) for name in ("weight", "bias")),
        ("epsilon", ctypes.c_double),
        ("matrix", Matrix),
        *((name, _I) for name in ("heads", "kv_heads", "head_dim")),
        *((name, _I) for name in ("q_stride", "k_offset", "v_offset", "kv_stride")),
        *((name, _I) for name in ("window", "rotary_dim", "interleaved")),
        *((name, _P) for name in ("cos", "sin", "keys", "values")),
        ("max_length", _I),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels for this machine, or None where there are none and torch has to do.

    NEOX_KERNELS chooses: `off`, or an instruction set (avx512, avx2, plain).
    """
    wanted = os.environ.get("NEOX_KERNELS", "")
    if wanted == "off":
        return None
    available = instruction_sets()
    if wanted and wanted not in available:
        log.warning(f"NEOX_KERNELS={wanted} is not one of {', '.join(available)} or off: ignored")
        wanted = ""
    # Torch was imported first: both then use its OpenMP runtime, and so one team of threads.
    found = open_library([wanted] if wanted else available)
    if found is None:
        return None
    assert found.neox_size() == ctypes.sizeof(Operation), "Operation is not that of decode.h"
    found.neox_multiply.argtypes = [ctypes.POINTER(Matrix), _P, _P, _I, _I]
    found.neox_pack.argtypes = [_I, _P, _I, _I, _I, _P, _P, _I]
    found.neox_decode.argtypes = [_P, _I, _P, _P, _I, _I]
    for function in (found.neox_multiply, found.neox_pack, found.neox_decode):
        function.restype = None
    return found


def matrix(
    bits: int,
    codes: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    shape: tuple[int, int, int],
) -> Matrix:
    """The description of a weight (N, width, K); the tensors have to outlive it."""
    N, width, K = shape
    return Matrix(
        bits,
        codes.data_ptr(),
        None if scales is None else scales.data_ptr(),
        None if bias is None else bias.data_ptr(),
        N,
        width,
        K,
    )


def multiply(x: Tensor, weight: Matrix) -> Tensor:
    """x [..., width] -> [..., N], float32 on the CPU."""
    kernels = library()
    assert kernels is not None
    assert x.dtype is torch.float32 and x.device.type == "cpu", (x.dtype, x.device)
    x = x.contiguous()
    y = torch.empty(*x.shape[:-1], weight.N)
    rows = x.numel() // weight.width
    threads = torch.get_num_threads()
    kernels.neox_multiply(weight, x.data_ptr(), y.data_ptr(), rows, threads)
    return y


def pack(weight: Tensor, bits: int, K: int, codes: Tensor, scales: Tensor) -> None:
    """Fill contiguous codes and scales of some blocks from their rows, float32 [N, width]."""
    kernels = library()
    assert kernels is not None
    N, width = weight.shape
    threads = torch.get_num_threads()
    kernels.neox_pack(
        bits, weight.data_ptr(), N, width, K, codes.data_ptr(), scales.data_ptr(), threads
    )


def advise_large_pages(tensor: Tensor) -> None:
    """Ask the system for pages of 2 MB, before a large tensor is written for the first time.

    Reading a weight from them is a seventh faster. Where the system has none, nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    size = 2 << 20
    first = -(-tensor.data_ptr() // size) * size
    length = (tensor.data_ptr() + tensor.nbytes - first) // size * size
    if length > 0:
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = [_P, ctypes.c_size_t, ctypes.c_int]
        madvise(first, length, _MADV_HUGEPAGE)
