"""The pass that the kernels carry out is the eager one, for every kind of weight and machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from neox.inference.stages import InferenceModel
from neox.kernels import library
from neox.kernels.build import instruction_sets
from neox.model.frozen import Frozen
from neox.model.gpt import Layer, build_layers, layers
from neox.model.packed import Packed, pack
from neox.parallel.groups import ProcessGroups
from tests.models import ARCHITECTURES, VOCAB, config_of, random_weights, tokens

GROUPS = ProcessGroups.single()


def model_of(storage: str, **values: object) -> InferenceModel:
    config = config_of(**values)
    weights = random_weights(config)
    frozen = Frozen(torch.float32, GROUPS, storage) if storage != "dense" else None

    def fill(module: nn.Module, layer: Layer) -> None:
        for name in layer.layout or {}:
            owner = module.get_submodule(name.rpartition(".")[0])
            held, value = getattr(owner, name.rpartition(".")[2]), weights[f"{layer.index}.{name}"]
            if isinstance(held, Packed):
                held.assign(pack(value, held.bits))
            else:
                held.data.copy_(value)

    stage = build_layers(layers(config, VOCAB, torch.float32, GROUPS, frozen=frozen), fill)
    return InferenceModel(config, GROUPS, stage, VOCAB, torch.float32)


def decoded(model: InferenceModel, together: bool) -> Tensor:
    """Logits of the positions behind prompts of 3, 9 and 5 tokens, one after the other."""
    cache, text = model.new_cache(4, 16), tokens(3, 16)
    rows, lengths = [2, 0, 3], [3, 9, 5]
    for b in range(3):
        model(text[b : b + 1, : lengths[b]], cache.view([rows[b]], [0], lengths[b]), logits="none")
    found = []
    for step in range(4):
        last = torch.stack([text[b, lengths[b] + step] for b in range(3)])[:, None]
        now = [length + step for length in lengths]
        if together:
            found.append(model(last, cache.view(rows, now, 1)))
        else:
            alone = [model(last[b : b + 1], cache.view([rows[b]], [now[b]], 1)) for b in range(3)]
            found.append(torch.cat(alone))
    return torch.cat(found, dim=1)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    monkeypatch.setenv("NEOX_KERNELS", request.param)
    library.library.cache_clear()
    yield request.param
    monkeypatch.undo()
    library.library.cache_clear()


@pytest.mark.parametrize("kernels", instruction_sets(), indirect=True)
@pytest.mark.parametrize("storage", ["dense", "int8", "int4"])
@pytest.mark.parametrize("architecture", ["neox", "llama", "gpt_j", "tied"])
def test_compiled_is_eager(kernels: str, storage: str, architecture: str) -> None:
    values = ARCHITECTURES[architecture]
    model = model_of(storage, **values)
    assert model.compiles
    eager = decoded(model_of(storage, compile_decoding=False, **values), together=True)
    # Activations are rounded to 8 bits: where the last bits of one differ, so may its rounding.
    tolerance = 1e-5 if storage == "dense" else 2e-2
    found = decoded(model, together=True)
    torch.testing.assert_close(found, eager, rtol=0, atol=tolerance * eager.abs().max().item())


@pytest.mark.parametrize("storage", ["dense", "int8", "int4"])
@pytest.mark.parametrize("compiled", [True, False])
def test_rows_alone_are_rows_together(storage: str, compiled: bool) -> None:
    model = model_of(storage, compile_decoding=compiled)
    assert torch.equal(decoded(model, together=True), decoded(model, together=False))


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_packed_weights_stay_near(storage: str) -> None:
    exact, packed = model_of("dense")(tokens(2, 16)), model_of(storage)(tokens(2, 16))
    spread = (exact - exact.mean()).square().mean().sqrt()
    error = (exact - packed).square().mean().sqrt() / spread
    assert 0 < error < (0.02 if storage == "int8" else 0.2)
