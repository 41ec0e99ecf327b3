"""The pass that the kernels carry out is the eager one, for every kind of weight and machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from neox.inference.stages import InferenceModel
from neox.kernels import library
from neox.kernels.build import instruction_sets
from neox.parallel.groups import ProcessGroups
from tests.inference.small import small_model
from tests.models import ARCHITECTURES, tokens

GROUPS = ProcessGroups.single()


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
@pytest.mark.parametrize("storage", ["packed", "int8", "int4"])
@pytest.mark.parametrize("architecture", ["neox", "llama", "gpt_j", "tied"])
def test_compiled_is_eager(kernels: str, storage: str, architecture: str) -> None:
    values = ARCHITECTURES[architecture]
    model = small_model(GROUPS, storage, **values)
    assert model.compiles
    eager = decoded(small_model(GROUPS, storage, compile_decoding=False, **values), together=True)
    # Activations are rounded to 8 bits: where the last bits of one differ, so may its rounding.
    tolerance = 1e-5 if storage == "packed" else 5e-2
    found = decoded(model, together=True)
    torch.testing.assert_close(found, eager, rtol=0, atol=tolerance * eager.abs().max().item())


@pytest.mark.parametrize("storage", ["packed", "int8", "int4"])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_alone_are_rows_together(storage: str, compiled: bool, architecture: str) -> None:
    values = {"compile_decoding": compiled, **ARCHITECTURES[architecture]}
    model = small_model(GROUPS, storage, **values)
    assert torch.equal(decoded(model, together=True), decoded(model, together=False))


@pytest.mark.parametrize("storage", ["packed", "int8", "int4"])
@pytest.mark.parametrize("architecture", ["neox", "window", "grouped_interleaved"])
def test_a_position_does_not_depend_on_its_chunk(storage: str, architecture: str) -> None:
    """Bit for bit: a prompt at once, in pieces, and token by token."""
    model, text = small_model(GROUPS, storage, **ARCHITECTURES[architecture]), tokens(1, 16)
    found = []
    for pieces in ([16], [5, 8, 3], [1] * 16):
        cache, done, logits = model.new_cache(2, 16), 0, None
        for size in pieces:
            new = text[:, done : done + size]
            logits = model(new, cache.view([1], [done], size), logits="last")
            done += size
        found.append((logits, cache.keys_LRKTD[:, 1], cache.values_LRKTD[:, 1]))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_packed_weights_stay_near(storage: str) -> None:
    exact, packed = (
        small_model(GROUPS, "dense")(tokens(2, 16)),
        small_model(GROUPS, storage)(tokens(2, 16)),
    )
    spread = (exact - exact.mean()).square().mean().sqrt()
    error = (exact - packed).square().mean().sqrt() / spread
    assert 0 < error < (0.03 if storage == "int8" else 0.2)
