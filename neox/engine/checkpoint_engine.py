"""DeepSpeed's files: read without the ability to run code, errors told as CheckpointError."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from neox.checkpoint.files import load_file, save_file
from neox.checkpoint.manifest import Entry
from neox.checkpoint.sources import load_model_file
from neox.errors import CheckpointError

# The classes that DeepSpeed itself writes into its optimizer files; they hold numbers only.
KNOWN_CLASSES = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]

# Under ZeRO 3 every replica tells what the mp_rank file tells.
_REPETITION = re.compile(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt$")


class SafeCheckpointEngine(TorchCheckpointEngine):
    """Loads with weights_only: a pickle from outside never executes.

    `written` is what was saved, by file name. DeepSpeed's save waits for all ranks, so the one that
    cannot write must not leave it by an exception: it keeps the `failure` and writes no more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[str, Entry] = {}
        self.failure: OSError | None = None

    def save(self, state_dict: object, path: str) -> None:
        if _REPETITION.match(Path(path).name):
            return
        if self.failure is None:
            try:
                self.written[Path(path).name] = save_file(state_dict, Path(path))
            except OSError as error:
                self.failure = error

    def load(self, path: str, map_location: object = None) -> object:
        return load_deepspeed_file(Path(path))


def load_deepspeed_file(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """One of DeepSpeed's files; with `mmap` its tensors are views of it. Raises CheckpointError."""
    if path.name.startswith("mp_rank_"):
        return load_model_file(path)
    contents = load_file(path, mmap=mmap, classes=KNOWN_CLASSES)
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} is not a file of DeepSpeed's: it is not a mapping.")
    return contents
