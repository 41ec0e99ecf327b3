"""What a plan says of generating is what a loaded model holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from neox.inference.load import load_model
from neox.parallel.groups import ProcessGroups
from neox.parallel.topology import Topology
from neox.plan.generation import cache_bytes, generation
from neox.plan.stages import PlannedModel
from neox.plan.trace import planned_world
from tests.models import VOCAB, config_of, write_model
from tests.plan.runs import configuration

SHAPE = {"hidden_size": 96, "num_attention_heads": 4, "num_kv_heads": 2}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"precision": "bfloat16"},
        {"no_weight_tying": False},
        {"load_in_8bit": True},
        {"quantize": "int8"},
        {"quantize": "int4"},
        {"quantize": "int4", "no_weight_tying": False},
    ],
)
def test_weights_and_keys(values: dict[str, Any], tmp_path: Path) -> None:
    tying = {name: value for name, value in values.items() if name == "no_weight_tying"}
    folder = write_model(tmp_path, 1, **SHAPE, **tying)
    config = config_of(**SHAPE, **values, load=str(folder))
    model = load_model(config, ProcessGroups.single())
    cache = model.new_cache(3, 16)
    with planned_world():
        planned = PlannedModel(configuration(Topology(), SHAPE | values), VOCAB)
        (one,) = generation(planned)
        keys = cache_bytes(planned, planned.stages()[0], 3, 16)
    assert one.weights == model.weight_bytes
    assert keys == cache.keys_LRKTD.nbytes + cache.values_LRKTD.nbytes
