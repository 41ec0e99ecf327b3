"""Loading a checkpoint to generate: at any grid it is the model that was saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from neox.checkpoint.directory import write_checkpoint
from neox.checkpoint.files import save_file
from neox.checkpoint.neox import save_layers
from neox.checkpoint.sources import layer_file
from neox.config.architecture import architecture
from neox.errors import CheckpointError
from neox.inference.load import load_model
from neox.model.gpt import build_layers, layers
from neox.model.init import initialize as fill_weights
from neox.parallel.groups import ProcessGroups, initialize
from neox.parallel.topology import Topology
from tests.models import config_of, write_model
from tests.world import World

SINGLE = ProcessGroups.single()
VOCAB = 61  # no tp divides it
TOKENS = torch.arange(12)[None] % VOCAB


@pytest.fixture(params=[{}, {"no_weight_tying": False, "gpt_j_residual": False}], ids=str)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[dict, Path]:
    config = config_of(**request.param)
    stage = build_layers(
        layers(config, VOCAB, torch.float32, SINGLE),
        lambda module, layer: fill_weights(module, layer, config, 1, SINGLE),
    )
    write_checkpoint(
        tmp_path,
        1,
        lambda folder: save_layers(folder, stage, SINGLE),
        {},
        SINGLE,
        grid={"tp": 1, "pp": 1, "dp": 1},
        padded_vocab_size=VOCAB,
        architecture=architecture(config),
    )
    return request.param, tmp_path


def logits(rank: int, folder: str, topology: Topology, values: dict) -> Tensor | None:
    config = config_of(
        world_size=topology.world_size,
        load=folder,
        model_parallel_size=topology.tp,
        pipe_parallel_size=topology.pp,
        **values,
    )
    groups = (
        initialize(topology, "gloo", torch.device("cpu")) if topology.world_size > 1 else SINGLE
    )
    return load_model(config, groups)(TOKENS)


@pytest.mark.parametrize(
    "topology", [Topology(tp=2), Topology(pp=2, tp=2), Topology(tp=4)], ids=str
)
def test_a_vocabulary_that_tp_does_not_divide(
    world: World, saved: tuple[dict, Path], topology: Topology
) -> None:
    values, folder = saved
    whole = logits(0, str(folder), Topology(), values)
    assert whole is not None and whole.shape == (1, 12, VOCAB)
    *_, last = world.run(topology.world_size, logits, str(folder), topology, values)
    assert_close(last, whole, atol=1e-5, rtol=1e-5)


def test_without_a_checkpoint() -> None:
    with pytest.raises(CheckpointError, match="load is not set"):
        load_model(config_of(), SINGLE)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(saved: tuple[dict, Path]) -> None:
    values, folder = saved
    config = config_of(load=str(folder), **values)
    with pytest.raises(CheckpointError, match=r"tokenizer has 257 tokens, .* vocabulary has 61"):
        load_model(config, SINGLE, tokens=257)
    assert load_model(config, SINGLE, tokens=VOCAB).padded_vocab_size == VOCAB


@pytest.mark.parametrize(
    ("multiple", "tokens", "rows"), [(16, 40, 48), (16, 61, 64), (61, 40, 61)], ids=str
)
def test_a_configuration_may_ask_for_another_vocabulary(
    saved: tuple[dict, Path], multiple: int, tokens: int, rows: int
) -> None:
    values, folder = saved
    whole = load_model(config_of(load=str(folder), **values), SINGLE)(TOKENS % 40)
    config = config_of(load=str(folder), make_vocab_size_divisible_by=multiple, **values)
    logits = load_model(config, SINGLE, tokens=tokens)(TOKENS % 40)
    assert whole is not None and logits is not None and logits.shape[-1] == rows
    kept = min(rows, VOCAB)
    assert_close(logits[..., :kept], whole[..., :kept], atol=1e-6, rtol=1e-6)
    assert not logits[..., VOCAB:].any()


def test_the_last_logits_alone_are_the_last_of_all(saved: tuple[dict, Path]) -> None:
    values, folder = saved
    model = load_model(config_of(load=str(folder), **values), SINGLE)
    whole, last = model(TOKENS), model(TOKENS, logits="last")
    assert whole is not None and last is not None
    assert last.shape == (1, 1, VOCAB)
    assert_close(last, whole[:, -1:], atol=1e-6, rtol=1e-6)


def logits_as_a_run_saves(rank: int, folder: str) -> Tensor | None:
    """Where each rank finds another `latest`, as when a run saves in the meantime."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("neox.checkpoint.folders.latest_name", lambda _: f"global_step{rank}")
        return logits(rank, folder, Topology(tp=2), {})


def test_ranks_load_one_step(world: World, tmp_path: Path) -> None:
    write_model(tmp_path, 1, seed=1)
    write_model(tmp_path, 0, seed=0)
    expected = logits(0, str(tmp_path), Topology(), {})
    for found in world.run(2, logits_as_a_run_saves, str(tmp_path)):
        assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_numbers_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path, 1)
    (folder / "manifest.json").unlink()
    tensors = torch.load(layer_file(folder, 3, 0), weights_only=True)
    tensors["mlp.linear1.weight"][5, 6] = 70000.0
    save_file(tensors, layer_file(folder, 3, 0))
    with pytest.raises(CheckpointError, match=r"mlp\.linear1\.weight of layer 03 .* float16"):
        load_model(config_of(load=str(tmp_path), precision="fp16"), SINGLE)
    load_model(config_of(load=str(tmp_path), precision="bfloat16"), SINGLE)


WIDE = {"hidden_size": 256, "num_attention_heads": 4}  # whole groups of 64 for each of two ranks


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantized_while_loading_at_any_grid(world: World, tmp_path: Path, quantize: str) -> None:
    write_model(tmp_path, 1, **WIDE)
    dense = logits(0, str(tmp_path), Topology(), WIDE)
    values = WIDE | {"quantize": quantize}
    whole = logits(0, str(tmp_path), Topology(), values)
    assert dense is not None and whole is not None
    scale = dense.abs().max()
    error = (whole - dense).abs().max() / scale
    assert 1e-4 < error < (0.05 if quantize == "int8" else 0.5)
    for topology in (Topology(tp=2), Topology(pp=2)):
        *_, last = world.run(2, logits, str(tmp_path), topology, values)
        # The same integers, but sums in another order may round an activation to its neighbour.
        assert_close(last / scale, whole / scale, atol=5e-3 if topology.tp > 1 else 0, rtol=0)


def test_weights_that_are_no_numbers_are_not_quantized(tmp_path: Path) -> None:
    folder = write_model(tmp_path, 1)
    (file,) = folder.glob("layer_02-*")
    tensors = torch.load(file)
    tensors["mlp.linear1.weight"][3, 5] = torch.nan
    torch.save(tensors, file)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"mlp.linear1.weight has numbers that are not fin"):
        logits(0, str(tmp_path), Topology(), {"quantize": "int8"})
