"""DeepSpeed's files: read without the ability to run code, errors told as CheckpointError."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from neox.checkpoint.neox import save_file
from neox.errors import CheckpointError

# The classes that DeepSpeed itself writes into its optimizer files; they hold numbers only.
_KNOWN_CLASSES = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


class SafeCheckpointEngine(TorchCheckpointEngine):
    """Loads with weights_only: a pickle from outside never executes."""

    def save(self, state_dict: object, path: str) -> None:
        save_file(state_dict, Path(path))

    def load(self, path: str, map_location: object = None) -> object:
        try:
            with torch.serialization.safe_globals(_KNOWN_CLASSES):
                return torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path} was refused: it is damaged, or holds more than tensors and numbers, which "
                "could run code."
            ) from error
        except Exception as error:  # an unpickler can stumble over damage in any way
            raise CheckpointError(f"{path} cannot be read: it is damaged or missing.") from error
