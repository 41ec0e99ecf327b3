"""How much memory a process holds."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import torch

MB = 1024 * 1024


def memory_in_mb(device: torch.device) -> dict[str, float]:
    """On CUDA what upstream tells of the allocator; on a CPU the process's resident memory."""
    if device.type == "cuda":
        return {
            "allocated": torch.cuda.memory_allocated(device) / MB,
            "max allocated": torch.cuda.max_memory_allocated(device) / MB,
            "reserved": torch.cuda.memory_reserved(device) / MB,
            "max reserved": torch.cuda.max_memory_reserved(device) / MB,
        }
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident = pages * os.sysconf("SC_PAGE_SIZE") / MB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KB
    return {"resident": resident, "max resident": max(peak, resident)}
