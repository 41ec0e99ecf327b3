"""The configuration that every genuine checkpoint was made with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def small_config(upstream: Path) -> dict[str, Any]:
    """small.yml with its paths made absolute; nothing is loaded or saved unless the test says."""
    path = upstream / "checkpoints/ckpt_mp1pp1/global_step20/configs/small.yml"
    values = yaml.safe_load(path.read_text())
    for key in ("vocab_file", "data_path"):
        values[key] = str(upstream / values[key])
    for key in ("checkpoint_factor", "extra_save_iters"):
        del values[key]
    return values
