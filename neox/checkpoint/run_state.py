"""What the mp_rank files of a checkpoint hold that was written without a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neox.checkpoint.files import save_file
from neox.checkpoint.manifest import HAS_MANIFEST, Entry
from neox.checkpoint.sources import model_file

# What a run goes on from besides weights and optimizer state, as upstream calls it.
_KEPT = ("iteration", "global_steps", "global_samples", "skipped_steps", "lr_scheduler", "args")


def save_run_state(
    folder: Path, iteration: int, tp: int, stored: Mapping[str, Any]
) -> dict[str, Entry]:
    """Write a file for each of `tp` ranks, without weights and optimizer state; what was written.

    They hold what upstream and DeepSpeed look up whatever they are asked to load, as far as it is
    in `stored`, another checkpoint's file.
    """
    state = {
        "module": None,
        "optimizer": None,
        "lr_scheduler": None,
        "iteration": iteration,
        "global_steps": iteration,
        "global_samples": 0,
        "skipped_steps": 0,
        **{key: stored[key] for key in _KEPT if key in stored},
        "dp_world_size": 1,
        "mp_world_size": tp,
        HAS_MANIFEST: True,
    }
    paths = [model_file(folder, rank) for rank in range(tp)]
    return {path.name: save_file(state, path) for path in paths}
