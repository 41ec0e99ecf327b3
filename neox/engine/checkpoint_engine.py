"""DeepSpeed's files: read without the ability to run code, errors told as CheckpointError."""

from __future__ import annotations

from pathlib import Path

from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from neox.checkpoint.files import load_file, save_file

# The classes that DeepSpeed itself writes into its optimizer files; they hold numbers only.
_KNOWN_CLASSES = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


class SafeCheckpointEngine(TorchCheckpointEngine):
    """Loads with weights_only: a pickle from outside never executes."""

    def save(self, state_dict: object, path: str) -> None:
        save_file(state_dict, Path(path))

    def load(self, path: str, map_location: object = None) -> object:
        return load_file(Path(path), map_location, classes=_KNOWN_CLASSES)
