"""Memory of a process that does the same step again and again."""

from __future__ import annotations

import ctypes
import sys

# From glibc's malloc.h: mallopt's names for its parameters.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Let glibc's allocator keep what is freed: the next training step needs it again.

    By default every large tensor is fresh pages of the kernel's and given back when it is freed;
    zeroing them anew takes a third of a CPU training step. A no-op without glibc. Allocations on a
    GPU are cached by torch anyway.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 64 << 20)
