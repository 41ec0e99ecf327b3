"""Which dataset each sample of a blend comes from: the door to megatron-core's compiled loops."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np


def build_blend_index(weights: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of `size` samples: int16 dataset, int64 index within it, following `weights`.

    Greedy: every sample comes from the dataset that is furthest behind weight * samples so far.
    `weights` are float64 and sum to 1.
    """
    dataset = np.empty(size, dtype=np.int16)
    index = np.empty(size, dtype=np.int64)
    _helpers().build_blending_indices(dataset, index, weights, len(weights), size, False)
    return dataset, index


def build_whole_blend_index(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `build_blend_index`, but every one of the int64 `sizes` samples exactly once."""
    total = int(sizes.sum())
    dataset = np.empty(total, dtype=np.int16)
    index = np.empty(total, dtype=np.int64)
    _helpers().build_exhaustive_blending_indices(dataset, index, sizes, len(sizes))
    return dataset, index


@functools.cache
def _helpers() -> ModuleType:
    """Loaded from its file: the packages around it take seconds to import, and warn."""
    megatron = importlib.util.find_spec("megatron")
    assert megatron is not None and megatron.submodule_search_locations is not None
    for folder in megatron.submodule_search_locations:
        for file in Path(folder).glob("core/datasets/helpers_cpp*.so"):
            spec = importlib.util.spec_from_file_location("helpers_cpp", file)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise ImportError("megatron-core was installed without its compiled helpers")
