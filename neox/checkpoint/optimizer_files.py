"""Which optimizer files a checkpoint's folder holds, by their names alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from neox.errors import CheckpointError

_OPTIMIZER_FILE = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")


class OptimizerFiles(NamedTuple):
    """What optimizer files depend on: the grid, and whether the weights are bfloat16."""

    tp: int
    pp: int
    dp: int
    is_bf16: bool

    def __str__(self) -> str:
        grid = f"tp {self.tp} x pp {self.pp} x dp {self.dp}"
        return f"{grid} in bfloat16" if self.is_bf16 else grid


def optimizer_files(folder: Path, tp: int) -> OptimizerFiles | None:
    """What the step folder of a run at `tp` holds; None where it holds no ZeRO optimizer state.

    Raises CheckpointError where some of the files are missing.
    """
    names = {path.name for path in folder.iterdir()}
    found = [match for name in names if (match := _OPTIMIZER_FILE.match(name))]
    if not found:
        return None
    prefix = found[0][1] or ""
    dp, parts = (1 + max(int(match[axis]) for match in found) for axis in (2, 3))
    needed = {f"mp_rank_{part:02d}_model_states.pt" for part in range(parts)} | {
        f"{prefix}zero_pp_rank_{replica}_mp_rank_{part:02d}_optim_states.pt"
        for replica in range(dp)
        for part in range(parts)
    }
    if missing := sorted(needed - names):
        raise CheckpointError(
            f"{folder} is incomplete: {', '.join(missing[:4])}"
            f"{' ...' if len(missing) > 4 else ''} {'is' if len(missing) == 1 else 'are'} missing. "
            "Set no_load_optim: true to keep the weights and the iteration and start a fresh "
            "optimizer."
        )
    return OptimizerFiles(tp, parts // tp, dp, bool(prefix))
