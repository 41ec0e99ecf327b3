"""The real model with a cache gives the logits it gives without one, however the tokens come."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from neox.config import NeoXConfig
from neox.inference.generate import complete
from neox.inference.stages import InferenceModel
from neox.model.gpt import build_layers, layers
from neox.model.init import initialize
from neox.parallel.groups import ProcessGroups
from tests.inference.fakes import ByteTokenizer, config

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "rotary": {"pos_emb": "rotary", "rotary_pct": 0.25, "gpt_j_residual": True},
    "learned, tied": {"pos_emb": "learned", "no_weight_tying": False},
    "grouped heads, rmsnorm": {"pos_emb": "rotary", "num_kv_heads": 2, "norm": "rmsnorm"},
    "window": {"pos_emb": "rotary", "sliding_window_width": 5},
    "no positions": {"pos_emb": "none"},
    "gpt-j": {
        "pos_emb": "rotary",
        "rotary_pct": 0.5,
        "rotary_interleaved": True,
        "gpt_j_residual": True,
        "gpt_j_tied": True,
    },
}


def settings(architecture: str, **values: Any) -> NeoXConfig:
    shape = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "precision": "fp32"}
    return config(**({"no_weight_tying": True} | shape | ARCHITECTURES[architecture] | values))


def random_model(settings: NeoXConfig) -> InferenceModel:
    groups = ProcessGroups.single()
    stage = build_layers(
        layers(settings, 264, torch.float32, groups),
        lambda module, layer: initialize(module, layer, settings, 1234, groups),
    )
    return InferenceModel(settings, groups, stage, 264, torch.float32)


@pytest.mark.parametrize("pieces", [[20], [12] + [1] * 8, [1] * 20, [7, 6, 1, 4, 2]])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_with_a_cache_are_those_without(architecture, pieces):
    model = random_model(settings(architecture))
    tokens_BS = torch.randint(0, 264, (3, 20), generator=torch.Generator().manual_seed(1))
    cache = model.new_cache(3, 20)
    got = torch.cat([model(piece, cache) for piece in tokens_BS.split(pieces, dim=1)], dim=1)
    assert cache.length == 20
    torch.testing.assert_close(got, model(tokens_BS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_recompute_gives_the_same_text(architecture):
    texts = []
    for recompute in (False, True):
        values = settings(architecture, recompute=recompute, maximum_tokens=24, temperature=1.0)
        texts.append(complete(random_model(values), ByteTokenizer(), values, "Once", 0)["text"])
    assert texts[0] == texts[1] and texts[0]
