"""What `inspect` tells of a checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.sources import layer_file
from neox.checkpoint.summary import describe, summarize, table, tensors_of, to_json
from neox.model.gpt import count_parameters
from tests.checkpoint.test_reshard import write_shards
from tests.checkpoint.test_sources import write as write_model_files
from tests.models import ARCHITECTURES, VOCAB, config_of, random_weights, write_model


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_are_counted_once(tmp_path: Path, name: str, tp: int) -> None:
    config = config_of(**ARCHITECTURES[name])
    weights = random_weights(config)
    write_shards(tmp_path / "global_step5", tp, weights, **ARCHITECTURES[name])
    summary = summarize(Checkpoint.open(tmp_path / "global_step5"))
    assert summary.parameters == count_parameters(config, VOCAB)
    assert (summary.layers, summary.shards, summary.padded_vocab_size) == (2, tp, VOCAB)


def test_the_rest_is_told(tmp_path: Path) -> None:
    folder = write_model(tmp_path, 5)
    summary = summarize(Checkpoint.open(tmp_path))
    assert summary.kind == "a NeoX checkpoint of layer files"
    assert (summary.iteration, summary.has_manifest, summary.optimizer) == (5, True, None)
    assert summary.dtypes == {"float32": summary.parameters}
    assert summary.bytes == sum(path.stat().st_size for path in folder.rglob("*.*"))
    assert summary.names == "of today's upstream (linear1)"
    text = describe(summary)
    assert "gpt_j_residual" in text and "global_step5/manifest.json" in text
    assert "not told" not in text


def test_what_nothing_tells_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path / "global_step5", 2, random_weights(config_of()))
    path = layer_file(tmp_path / "global_step5", 2, 0)
    tensors = torch.load(path, weights_only=True)
    old = {name.replace("linear1", "dense_h_to_4h"): tensor for name, tensor in tensors.items()}
    torch.save({**old, "attention.rotary_emb.inv_freq": torch.ones(2)}, path)
    checkpoint = Checkpoint.open(tmp_path / "global_step5")
    summary = summarize(checkpoint)
    assert summary.names == "of the 20B and Pythia era (dense_h_to_4h)"
    assert summary.parameters == count_parameters(config_of(), VOCAB)  # without the buffer
    last = describe(summary).splitlines()[-1]
    assert last.startswith("  not told: num_attention_heads,") and "gpt_j_residual" in last
    splits = {tensor.name: tensor.split for tensor in tensors_of(checkpoint) if tensor.layer == 2}
    assert splits["mlp.linear2.bias"] == "replicated or partial_sum"
    assert splits["mlp.dense_h_to_4h.weight"] == "column"
    assert splits["attention.rotary_emb.inv_freq"] is None


def test_optimizer_state_is_told(tmp_path: Path) -> None:
    write_model_files(tmp_path / "global_step20", {})
    summary = summarize(Checkpoint.open(tmp_path / "global_step20"))
    assert summary.kind.endswith("whole-model files (pipe_parallel_size 0)")
    assert summary.optimizer is not None and "mp_rank files, without ZeRO" in summary.optimizer
    folder = write_model(tmp_path / "zero", 5)
    for part in range(2):
        torch.save({"module": None}, folder / f"mp_rank_{part:02d}_model_states.pt")
        (folder / f"bf16_zero_pp_rank_0_mp_rank_{part:02d}_optim_states.pt").touch()
    summary = summarize(Checkpoint.open(tmp_path / "zero"))
    assert summary.optimizer == "ZeRO's, of tp 1 x pp 2 x dp 1 in bfloat16"
    (folder / "mp_rank_00_model_states.pt").unlink()
    summary = summarize(Checkpoint.open(tmp_path / "zero"))
    assert summary.optimizer is not None and "mp_rank_00_model_states.pt is" in summary.optimizer


def test_statistics_are_of_whole_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neox.checkpoint.summary._CHUNK", 100)
    weights = random_weights(config_of())
    write_shards(tmp_path / "global_step5", 2, weights)
    (tmp_path / "global_step5/configs").mkdir()
    (tmp_path / "global_step5/configs/small.yml").write_text(
        json.dumps({"num_layers": 2, "hidden_size": 32, "pos_emb": "none", "gpt_j_residual": True})
    )
    tensors = list(tensors_of(Checkpoint.open(tmp_path / "global_step5"), values=True))
    assert len(tensors) == len(weights)
    for tensor in tensors:
        whole = weights[f"{tensor.layer}.{tensor.name}"].double()
        assert list(tensor.shape) == list(whole.shape)
        assert tensor.statistics is not None
        expected = (whole.min(), whole.max(), whole.mean(), whole.std(correction=0))
        found = [getattr(tensor.statistics, name) for name in ("min", "max", "mean", "std")]
        assert found == pytest.approx([float(number) for number in expected], rel=1e-6, abs=1e-12)
    lines = table(tensors).splitlines()
    assert lines[0].split() == [
        "layer",
        "name",
        "shape",
        "dtype",
        "split",
        "min",
        "max",
        "mean",
        "std",
    ]
    assert lines[1].startswith("00     word_embeddings.weight")


def test_json_has_no_numbers_that_are_none(tmp_path: Path) -> None:
    weights = random_weights(config_of())
    weights["5.norm.bias"][0] = math.nan
    write_shards(tmp_path / "global_step5", 1, weights)
    checkpoint = Checkpoint.open(tmp_path / "global_step5")
    tensors = list(tensors_of(checkpoint, values=True))
    text = json.dumps(to_json(summarize(checkpoint), tensors), allow_nan=False)
    found = {(tensor["layer"], tensor["name"]): tensor for tensor in json.loads(text)["tensors"]}
    assert found[5, "norm.bias"]["mean"] is None
    assert found[5, "norm.weight"]["mean"] == pytest.approx(1.0, abs=0.2)
