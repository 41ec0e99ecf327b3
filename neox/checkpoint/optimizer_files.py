"""Which optimizer state a checkpoint's folder holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from neox.checkpoint.sources import load_model_file, model_file
from neox.errors import CheckpointError

_OPTIMIZER_FILE = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")

# What every error about them ends with.
WITHOUT_OPTIMIZER = (
    "Set no_load_optim: true to keep the weights and the iteration and start a fresh optimizer."
)


class OptimizerFiles(NamedTuple):
    """What ZeRO's files depend on: the grid, and whether the weights are bfloat16.

    A part is what one model-parallel rank holds, numbered pp rank * tp + tp rank. Each replica (dp
    rank) has a file of its own for its share of a part's optimizer state.
    """

    tp: int
    pp: int
    dp: int
    is_bf16: bool

    def __str__(self) -> str:
        grid = f"tp {self.tp} x pp {self.pp} x dp {self.dp}"
        return f"{grid} in bfloat16" if self.is_bf16 else grid

    def path(self, folder: Path, part: int, replica: int) -> Path:
        prefix = "bf16_" if self.is_bf16 else ""
        return folder / f"{prefix}zero_pp_rank_{replica}_mp_rank_{part:02d}_optim_states.pt"

    def paths(self, folder: Path) -> list[Path]:
        """All files that there must be, with those of DeepSpeed's own state."""
        parts = range(self.pp * self.tp)
        return [model_file(folder, part) for part in parts] + [
            self.path(folder, part, replica) for part in parts for replica in range(self.dp)
        ]


def optimizer_files(folder: Path, tp: int) -> OptimizerFiles | None:
    """What the step folder of a run at `tp` holds by the names of ZeRO's files; None without any.

    Raises CheckpointError where some of the files are missing.
    """
    names = {path.name for path in folder.iterdir()}
    found = [match for name in names if (match := _OPTIMIZER_FILE.match(name))]
    if not found:
        return None
    dp, parts = (1 + max(int(match[axis]) for match in found) for axis in (2, 3))
    pp = -(-parts // tp)
    first = model_file(folder, 0)
    if first.name in names:  # it tells of the last ones too, which leave no gap
        state = load_model_file(first)
        dp = max(dp, state.get("dp_world_size", 1))
        pp = max(pp, state.get("checkpoint_parallel_dimensions", {}).get("pp_degree", 1))
    files = OptimizerFiles(tp, pp, dp, bool(found[0][1]))
    missing = sorted(path.name for path in files.paths(folder) if path.name not in names)
    if missing:
        raise CheckpointError(
            f"{folder} is incomplete: {', '.join(missing[:4])}"
            f"{' ...' if len(missing) > 4 else ''} {'is' if len(missing) == 1 else 'are'} missing. "
            f"{WITHOUT_OPTIMIZER}"
        )
    return files


def has_plain_state(folder: Path) -> bool:
    """Whether the mp_rank files hold the optimizer's state, as without ZeRO.

    Raises CheckpointError.
    """
    path = model_file(folder, 0)
    optimizer = load_model_file(path).get("optimizer") if path.is_file() else None
    return isinstance(optimizer, dict) and "state" in optimizer
