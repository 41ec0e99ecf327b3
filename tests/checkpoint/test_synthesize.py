"""Synthesized checkpoints have 20B's layout at any size, and weights that can be computed with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from neox.checkpoint.architecture import describe
from neox.checkpoint.compare import compare
from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.synthesize import synthesize
from neox.checkpoint.verify import verify
from neox.config import NeoXConfig, Override, load_config
from neox.config.architecture import architecture
from neox.errors import CheckpointError
from neox.inference.load import load_model
from neox.parallel.groups import ProcessGroups
from tests.models import ARCHITECTURES, config_of

SINGLE = ProcessGroups.single()
CONFIG = Path(__file__).parents[2] / "configs/20B.yml"
HIDDEN, LAYERS, ROWS = 192, 3, 512


def config_20B(**values: Any) -> NeoXConfig:
    """20B's at a smaller size; each of its 2 heads is 96 wide, as 20B's are."""
    size = {"num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": 2}
    given = {**size, "pipe_parallel_size": 1, **values}
    overrides = {key: Override(value, f"--{key}") for key, value in given.items()}
    return load_config([CONFIG], overrides, check_files=False)


def stored(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {
        path.name: torch.load(path, weights_only=True) for path in sorted(folder.glob("layer_*"))
    }


def test_the_layout_is_that_of_20B(tmp_path: Path) -> None:
    """As reference tables of the published weights have it: names, shapes, files, precision."""
    folder = synthesize(tmp_path, config_20B(), ROWS, legacy_names=True)
    found = stored(folder)
    assert list(found) == [
        f"layer_{index:02d}-model_{rank:02d}-model_states.pt"
        for index in (0, 2, 3, 4, 6, 7)
        for rank in (0, 1)
    ]
    h = HIDDEN
    expected = {
        "input_layernorm.weight": [h],
        "input_layernorm.bias": [h],
        "post_attention_layernorm.weight": [h],
        "post_attention_layernorm.bias": [h],
        "attention.query_key_value.weight": [3 * h // 2, h],
        "attention.query_key_value.bias": [3 * h // 2],
        "attention.dense.weight": [h, h // 2],
        "attention.dense.bias": [h],
        "attention.rotary_emb.inv_freq": [12],
        "mlp.dense_h_to_4h.weight": [4 * h // 2, h],
        "mlp.dense_h_to_4h.bias": [4 * h // 2],
        "mlp.dense_4h_to_h.weight": [h, 4 * h // 2],
        "mlp.dense_4h_to_h.bias": [h],
    }
    for name, tensors in found.items():
        assert all(tensor.dtype == torch.float16 for tensor in tensors.values())
        shapes = {key: list(tensor.shape) for key, tensor in tensors.items()}
        if name.startswith("layer_00"):
            assert shapes == {"word_embeddings.weight": [ROWS // 2, h]}
        elif name.startswith("layer_06"):
            assert shapes == {"norm.weight": [h], "norm.bias": [h]}
        elif name.startswith("layer_07"):
            assert shapes == {"final_linear.weight": [ROWS // 2, h]}
        else:
            assert shapes == expected
    frequencies = found["layer_03-model_01-model_states.pt"]["attention.rotary_emb.inv_freq"]
    by_hand = torch.tensor([10000 ** (-2 * i / 24) for i in range(12)])
    assert torch.equal(frequencies, by_hand.half())
    assert verify(folder) == []
    assert describe(Checkpoint.open(tmp_path)) == architecture(config_20B())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_written_as_it_is_read(tmp_path: Path, name: str) -> None:
    """At two sizes of tp it is the same model, none of whose numbers is left at a constant."""
    folders = []
    for tp in (1, 2):
        config = config_of(world_size=tp, model_parallel_size=tp, **ARCHITECTURES[name])
        synthesize(tmp_path / str(tp), config, 64, legacy_names=tp == 2)
        folders.append(Checkpoint.open(tmp_path / str(tp)))
    one, two = folders
    comparisons = list(compare(one, config, two, config))
    assert comparisons and all(each.verdict.is_same for each in comparisons)
    for index in one.indices:
        (shard,) = one.shards(index)
        assert all(tensor.std() > 1e-3 for tensor in shard.tensors.values())


def test_the_seed_decides(tmp_path: Path) -> None:
    found = []
    for directory, seed in (("a", 1), ("b", 1), ("c", 2)):
        folder = synthesize(tmp_path / directory, config_20B(seed=seed), ROWS, legacy_names=False)
        found.append(stored(folder)["layer_03-model_00-model_states.pt"])
    first, second, third = (tensors["mlp.linear1.weight"] for tensors in found)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_float16_is_wide_enough_for_what_is_computed(tmp_path: Path) -> None:
    synthesize(tmp_path, config_20B(), ROWS, legacy_names=True)
    config = config_20B(load=str(tmp_path), model_parallel_size=1)
    logits = load_model(config, SINGLE)(torch.arange(100)[None])
    assert logits is not None and logits.isfinite().all()
    assert 0.01 < logits.std() < 100


def test_no_checkpoint_is_replaced(tmp_path: Path) -> None:
    synthesize(tmp_path, config_20B(), ROWS, legacy_names=True)
    with pytest.raises(CheckpointError, match="global_step0 is there already"):
        synthesize(tmp_path, config_20B(), ROWS, legacy_names=True)
