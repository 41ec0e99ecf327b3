"""Several adapters over one model: each is the model that was loaded with it alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from neox.checkpoint.peft import Adapters, write_adapters
from neox.entrypoints import serve as entrypoint
from neox.errors import CheckpointError, RequestError
from neox.inference.decoder import Decoder
from neox.inference.load import load_model, prepare
from neox.inference.request import Request
from neox.inference.stages import InferenceModel
from neox.parallel.groups import ProcessGroups, initialize
from neox.parallel.topology import Topology
from tests.checkpoint.peft_folders import MATRICES, random_adapters
from tests.inference.served import Served, logits_of, serve
from tests.inference.small import LetterTokenizer
from tests.models import config_of, tokens, write_model
from tests.world import World

SINGLE = ProcessGroups.single()
STORAGES: dict[str, dict[str, Any]] = {
    "dense": {},
    "8bit": {"load_in_8bit": True},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
}
CHOICES = ["poet", None, "clerk", "poet", None]  # each after each


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint, and adapters that have some matrices in common, and more than matrices."""
    write_model(tmp_path / "base", 1)
    config = config_of()
    poet = random_adapters(config, biases=True, norms=True)
    clerk = random_adapters(config, MATRICES[1:3], head=True, rank=4, alpha=9)
    for name, adapters in (("poet", poet), ("clerk", clerk)):
        specs = {key: replace(spec, dropout=0.5) for key, spec in adapters.specs.items()}
        write_adapters_in(tmp_path / name, Adapters(specs, adapters.tensors))
    return tmp_path


def write_adapters_in(folder: Path, adapters: Adapters) -> None:
    folder.mkdir()
    write_adapters(folder, config_of(), adapters, None)


def paths(folder: Path) -> dict[str, str]:
    return {name: str(folder / name) for name in ("poet", "clerk")}


def with_both(folder: Path, groups: ProcessGroups = SINGLE, **values: Any) -> InferenceModel:
    config = config_of(groups.world_size, load=str(folder / "base"), **values)
    return prepare(config, groups, named=paths(folder)).load()


def with_one(folder: Path, name: str | None, **values: Any) -> InferenceModel:
    if name is not None:
        values["adapter"] = str(folder / name)
    return load_model(config_of(load=str(folder / "base"), **values), SINGLE)


@pytest.mark.parametrize("storage", STORAGES)
def test_each_is_the_model_with_it_alone(folder: Path, storage: str) -> None:
    model = with_both(folder, **STORAGES[storage])
    assert set(model.adapters) == {"poet", "clerk"}
    found = {name: with_one(folder, name, **STORAGES[storage])(tokens()) for name in set(CHOICES)}
    for one, other in (("poet", None), ("clerk", None), ("poet", "clerk")):
        assert (found[one] - found[other]).abs().max() > 0.01
    for name in CHOICES:
        model.select(name)
        assert_close(model(tokens()), found[name], rtol=1e-6, atol=1e-6)
    with pytest.raises(RequestError, match=r"no adapter 'smith' here; .* clerk, poet"):
        model.select("smith")


def requests() -> list[Request]:
    """Of all three at once; prompts that begin alike, which may be shared within one only."""
    prompts = [tuple(t.tolist()) for t in tokens(2, 10).clamp(1, 60)]
    prompts += [(*prompts[0][:8], 5)]
    return [
        Request(prompt, 5, minimum_tokens=5, logits=True, adapter=name)
        for name in ("poet", None, "clerk")
        for prompt in prompts
    ]


def in_a_decoder(model: InferenceModel, wanted: list[Request]) -> list[Served]:
    return serve(Decoder(model, LetterTokenizer(), rows=5, chunk=4), wanted)


@pytest.mark.parametrize("storage", ["dense", "int4"])
def test_answers_of_several_at_once_are_those_of_each_alone(folder: Path, storage: str) -> None:
    model = with_both(folder, **STORAGES[storage])
    model.select(None)
    assert model.compiles == with_one(folder, None, **STORAGES[storage]).compiles
    together = in_a_decoder(model, requests())
    assert len({tuple(served.tokens) for served in together}) > 6
    alone = {name: with_one(folder, name, **STORAGES[storage]) for name in ("poet", None, "clerk")}
    for request, served in zip(requests(), together, strict=True):
        [expected] = in_a_decoder(alone[request.adapter], [replace(request, adapter=None)])
        assert served.tokens == expected.tokens
        assert_close(logits_of(served), logits_of(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("storage", ["dense", "int8", "int4"])
def test_an_answer_is_the_same_bits_in_any_company(folder: Path, storage: str) -> None:
    model = with_both(folder, **STORAGES[storage])
    together = in_a_decoder(model, requests())
    for request, served in zip(requests(), together, strict=True):
        [alone] = in_a_decoder(model, [request])
        assert torch.equal(logits_of(served), logits_of(alone))


def on_a_grid(rank: int, folder: Path, topology: Topology) -> dict[str | None, Tensor | None]:
    groups = initialize(topology, "gloo", torch.device("cpu"))
    grid = {"model_parallel_size": topology.tp, "pipe_parallel_size": topology.pp}
    model = with_both(folder, groups, **grid)
    found = {}
    for name in CHOICES:
        model.select(name)
        found[name] = model(tokens())
    return found


@pytest.mark.parametrize("topology", [Topology(tp=2), Topology(pp=2)], ids=str)
def test_every_grid_is_the_single_process(world: World, folder: Path, topology: Topology) -> None:
    *_, last = world.run(2, on_a_grid, folder, topology)
    for name, logits in last.items():
        assert_close(logits, with_one(folder, name)(tokens()), rtol=1e-5, atol=1e-5)


def test_one_that_does_not_fit_is_told_by_its_name_before_the_server_listens(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listens(*_: object) -> None:
        raise AssertionError("it listens")

    monkeypatch.setattr(entrypoint, "serve", listens)
    (folder / "empty").mkdir()
    write_model(folder / "small", 1, num_layers=1)
    for name, message in (
        ("empty", r"adapters\.smith: .*empty holds no adapter_config\.json"),
        ("poet", r"adapters\.smith: .* is of layer 1, but the model has layers 0 to 0"),
    ):
        config = config_of(
            num_layers=1,
            load=str(folder / "small"),
            tokenizer_type="CharLevelTokenizer",
            make_vocab_size_divisible_by=320,
            adapters={"smith": str(folder / name)},
        )
        with pytest.raises(CheckpointError, match=message):
            entrypoint.main(config, SINGLE)


def test_one_of_another_base_is_told_by_its_name(folder: Path) -> None:
    prepared = prepare(config_of(load=str(folder / "base")), SINGLE, named=paths(folder))
    poet = replace(prepared.named["poet"], copies={(6, "final_linear.weight"): torch.ones(64, 32)})
    with pytest.raises(CheckpointError, match=r"^adapters\.poet: its copy of the base's final_li"):
        replace(prepared, named={"poet": poet}).load()
