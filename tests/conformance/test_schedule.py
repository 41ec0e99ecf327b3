"""The learning rate against the ones upstream used and printed."""

from __future__ import annotations

import json

import pytest

from neox.config import NeoXConfig, from_dict
from neox.train.schedule import rate_reported, rate_used


def _config(style: str) -> NeoXConfig:
    return from_dict(
        {
            "num_layers": 4,
            "hidden_size": 128,
            "num_attention_heads": 8,
            "seq_length": 128,
            "max_position_embeddings": 128,
            "train_micro_batch_size_per_gpu": 4,
            "optimizer": {"type": "Adam", "params": {"lr": 0.001}},
            "min_lr": 0.0001,
            "warmup": 0.1,
            "train_iters": 24,
            "lr_decay_iters": 20,
            "lr_decay_style": style,
        }
    )


@pytest.mark.parametrize("style", ["cosine", "linear", "exponential", "constant"])
def test_used_rates_equal_upstreams_bit_for_bit(shared, style):
    schedules = json.loads((shared / "upstream/curves/lr_schedules.json").read_text())
    upstream = schedules[style]["lr_used_at_step(1-based)"]
    ours = [rate_used(_config(style), iteration) for iteration in range(1, len(upstream) + 1)]
    end = 21  # iteration 21 uses f(20), the end of the decay; then upstream's cosine rises again
    assert ours[:end] == upstream[:end]
    if style == "cosine":
        assert upstream[end] > 1e-4
        assert ours[end:] == [1e-4] * (len(upstream) - end)
    else:
        assert ours[end:] == upstream[end:]


def test_reported_rates_equal_the_printed_ones(shared):
    curve = json.loads((shared / "upstream/curves/train_mp1pp1.json").read_text())
    printed = [f"{row['lr_printed']:.3E}" for row in curve["iters"]]
    ours = [f"{rate_reported(_config('cosine'), row['iteration']):.3E}" for row in curve["iters"]]
    assert ours == printed
