"""A small training configuration to vary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from neox.config import NeoXConfig, from_dict


@pytest.fixture
def make_config() -> Callable[..., NeoXConfig]:
    """make_config(key=value, ...): a valid configuration with these keys changed."""

    def make(**changes: Any) -> NeoXConfig:
        values = {
            "num_layers": 4,
            "hidden_size": 128,
            "num_attention_heads": 8,
            "seq_length": 128,
            "max_position_embeddings": 128,
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 2,
            "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
            "min_lr": 1e-4,
            "lr_decay_style": "cosine",
            "warmup": 0.1,
            "train_iters": 20,
            "log_interval": 2,
        }
        return from_dict(values | changes)

    return make
