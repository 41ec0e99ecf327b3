"""The configuration that every genuine checkpoint was made with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

# The model of every genuine checkpoint, as a YAML file would describe it.
MODEL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 8,
    "seq_length": 128,
    "max_position_embeddings": 128,
    "pos_emb": "rotary",
    "rotary_pct": 0.25,
    "no_weight_tying": True,
    "gpt_j_residual": True,
    "precision": "fp32",
    "tokenizer_type": "HFTokenizer",
}


def small_config(upstream: Path) -> dict[str, Any]:
    """small.yml with its paths made absolute; nothing is loaded or saved unless the test says."""
    path = upstream / "checkpoints/ckpt_mp1pp1/global_step20/configs/small.yml"
    values = yaml.safe_load(path.read_text())
    for key in ("vocab_file", "data_path"):
        values[key] = str(upstream / values[key])
    for key in ("checkpoint_factor", "extra_save_iters"):
        del values[key]
    return values
