"""The learning rate against the ones upstream used and printed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.sources import load_model_file
from neox.config import NeoXConfig, from_dict
from neox.train.saved_schedule import schedule_state, settle_schedule
from neox.train.schedule import rate_reported, rate_used


def _config(style: str, **values: Any) -> NeoXConfig:
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
            **values,
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


@pytest.mark.parametrize("name", ["ckpt_mp1pp1", "ckpt_mp2pp1"])
def test_upstreams_saved_schedule_is_followed(shared, name):
    checkpoint = Checkpoint.open(shared / "upstream/checkpoints" / name)
    other = {"optimizer": {"params": {"lr": 0.5}}, "min_lr": 0.0, "warmup": 0.3}
    config = _config("linear", **other, use_checkpoint_lr_scheduler=True)
    followed = settle_schedule(config, checkpoint, with_optimizer=True)
    rates = [rate_used(followed, iteration) for iteration in range(1, 31)]
    assert rates == [rate_used(_config("cosine"), iteration) for iteration in range(1, 31)]


def test_a_schedule_is_saved_in_upstreams_form(shared, capsys):
    """So that upstream resumes ours: its AnnealingLR compares these values with its own."""
    folder = shared / "upstream/checkpoints/ckpt_mp1pp1/global_step20"
    theirs = load_model_file(folder / "mp_rank_00_model_states.pt")["lr_scheduler"]
    assert schedule_state(_config("cosine"), 20) == theirs
    assert schedule_state(_config("cosine"), 20).keys() == theirs.keys()
    config = _config("cosine")
    assert settle_schedule(config, Checkpoint.open(folder), with_optimizer=True) is config
    assert capsys.readouterr() == ("", "")
