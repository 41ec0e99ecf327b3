"""Real models whose answers are not all alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from neox.inference.stages import InferenceModel
from neox.model.frozen import Storage
from neox.model.gpt import partition
from neox.parallel.groups import ProcessGroups
from tests.models import VOCAB, built, config_of, random_weights


def small_model(
    groups: ProcessGroups, storage: Storage = "packed", **values: Any
) -> InferenceModel:
    """This rank's stage of a model of tests/models.py, its weights doubled."""
    config = config_of(**values)
    mine = partition(config.num_layers, groups.pp)[groups.pp_rank]
    weights = {name: tensor * 2 for name, tensor in random_weights(config).items()}
    stage = built(config, weights, groups, storage)[mine.start : mine.stop]
    return InferenceModel(config, groups, stage, VOCAB, torch.float32)


class LetterTokenizer:
    """A character for each token; the last of the model's rows are padding."""

    name = "letters"
    vocab_size = VOCAB - 3
    eod = 0

    def tokenize(self, text: str) -> list[int]:
        return [ord(character) - 48 for character in text]

    def detokenize(self, ids: Sequence[int]) -> str:
        return "".join(chr(48 + i) for i in ids if i)
