"""The loss that is computed with the output projection equals the textbook's, in every chunking."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import neox.model.loss
from neox.model.loss import chunks, output_loss
from neox.parallel.groups import ProcessGroups, initialize
from neox.parallel.topology import Topology
from tests.world import World

B, S, H, V = 3, 7, 16, 40


def operands(
    dtype: torch.dtype = torch.float32, length: int = S
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, length, H, generator=generator).to(dtype)
    weight = torch.randn(V, H, generator=generator).to(dtype)
    labels = torch.randint(V, (B, length), generator=generator)
    mask = (torch.rand(B, length, generator=generator) < 0.7).float()
    return x, weight, labels, mask


def fused(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor,
    groups: ProcessGroups,
    bias: Tensor | None = None,
) -> Tensor:
    owner = nn.Module()
    owner.weight, owner.bias = weight, bias
    return output_loss(x, owner, labels, mask, groups)


def textbook(x: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    logits = F.linear(x, weight).float().flatten(0, 1)
    losses = F.cross_entropy(logits, labels.flatten(), reduction="none")
    return (losses * mask.flatten()).sum() / mask.sum().clamp(min=1.0)


def with_gradients(loss_of, x: Tensor, weight: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = loss_of(x, weight, *rest)
    (3 * loss).backward()  # the engines scale the loss, too
    assert x.grad is not None and weight.grad is not None
    return loss.detach(), x.grad, weight.grad


@pytest.mark.parametrize("rows", [1, 4, 7, 100], ids="rows-{}".format)
def test_chunked_equals_textbook(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(neox.model.loss, "CHUNK_BYTES", rows * V * 4)
    assert chunks(B * S, V) == -(-B * S // rows)
    groups = ProcessGroups.single()
    ours = with_gradients(lambda *args: fused(*args, groups), *operands())
    for found, expected in zip(ours, with_gradients(textbook, *operands()), strict=True):
        assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_nothing_selected_has_loss_and_gradient_zero() -> None:
    x, weight, labels, mask = operands()
    found = with_gradients(
        lambda *args: fused(*args, ProcessGroups.single()), x, weight, labels, 0 * mask
    )
    assert all(torch.equal(tensor, torch.zeros_like(tensor)) for tensor in found)


def test_large_logits_do_not_overflow() -> None:
    x, weight, labels, mask = operands()
    ours = with_gradients(
        lambda *args: fused(*args, ProcessGroups.single()), 100 * x, weight, labels, mask
    )
    theirs = with_gradients(textbook, 100 * x, weight, labels, mask)
    for found, expected in zip(ours, theirs, strict=True):
        assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_bfloat16_weights_sum_their_gradient_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same rounded logits and their rounded gradient, in chunks of one position."""
    monkeypatch.setattr(neox.model.loss, "CHUNK_BYTES", V * 4)
    x, weight, labels, mask = operands(torch.bfloat16, length=200)
    loss, grad_x, grad_weight = with_gradients(
        lambda *args: fused(*args, ProcessGroups.single()), x, weight, labels, mask
    )
    logits = F.linear(x, weight).float().flatten(0, 1).requires_grad_()
    losses = F.cross_entropy(logits, labels.flatten(), reduction="none")
    expected = (losses * mask.flatten()).sum() / mask.sum()
    expected.backward()
    assert logits.grad is not None
    assert_close(loss, expected.detach(), atol=0.0, rtol=1e-6)
    assert grad_x.dtype == grad_weight.dtype == torch.bfloat16
    product = 3 * logits.grad.bfloat16().float().t() @ x.float().flatten(0, 1)
    # The products and their sum are rounded to 8 bits. Were the sum of 600 products kept in 8 bits,
    # it would be off by ten times as much.
    assert (grad_weight.float() - product).abs().max() < 2 * 2**-8 * product.abs().max()


def test_small_gradients_survive_float16() -> None:
    """Half of the gradient lies in probabilities of 1/1024, each shared by 3072 positions.

    float16 rounds numbers below 6e-5 to multiples of 6e-8, and the engine's loss scale comes to
    this function when the gradients are there already.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 1024, H, generator=generator)
    weight = 0.02 * torch.randn(1024, H, generator=generator)
    labels = torch.zeros(3, 1024, dtype=torch.long)
    scale = 2.0**12

    def scaled(loss_of, dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.half().to(dtype).requires_grad_() for tensor in (x, weight)]
        (scale * loss_of(*leaves, labels, torch.ones(3, 1024))).backward()
        return [leaf.grad.float() / scale for leaf in leaves if leaf.grad is not None]

    ours = scaled(lambda *args: fused(*args, ProcessGroups.single()), torch.float16)
    for found, expected in zip(ours, scaled(textbook, torch.float32), strict=True):
        # Of all rows but the label's, too. A product is rounded by 2^-11 of it.
        off = (found - expected)[1:].norm() / expected[1:].norm()
        assert off < 2e-3


def test_without_gradients_none_are_made() -> None:
    x, weight, labels, mask = operands()
    with torch.no_grad():
        loss = fused(x, weight.requires_grad_(), labels, mask, ProcessGroups.single())
    assert not loss.requires_grad
    assert_close(loss, textbook(x, weight, labels, mask).detach())


def with_bias(loss_of, *leaves: Tensor) -> list[Tensor]:
    """The loss and the gradients of the activations, the weight and the bias."""
    leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves)
    loss = loss_of(*leaves)
    (3 * loss).backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("rows", [1, 4, 100], ids="rows-{}".format)
def test_a_bias_has_the_textbook_gradient(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(neox.model.loss, "CHUNK_BYTES", rows * V * 4)
    x, weight, labels, mask = operands()
    bias = torch.randn(V, generator=torch.Generator().manual_seed(1))

    def written_out(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logits = (x @ weight.T + bias).flatten(0, 1)
        losses = F.cross_entropy(logits, labels.flatten(), reduction="none")
        return (losses * mask.flatten()).sum() / mask.sum()

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fused(x, weight, labels, mask, ProcessGroups.single(), bias)

    pairs = zip(
        with_bias(ours, x, weight, bias), with_bias(written_out, x, weight, bias), strict=True
    )
    for found, expected in pairs:
        assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_a_bfloat16_bias_sums_its_gradient_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of one position. Sums of hundreds of numbers in 8 bits would be off by percents."""
    monkeypatch.setattr(neox.model.loss, "CHUNK_BYTES", V * 4)
    x, weight, labels, mask = operands(torch.bfloat16, length=200)
    bias = torch.zeros(V, dtype=torch.bfloat16)
    _, _, _, found = with_bias(
        lambda *leaves: fused(*leaves[:2], labels, mask, ProcessGroups.single(), leaves[2]),
        x,
        weight,
        bias,
    )
    logits = F.linear(x, weight).float().flatten(0, 1).requires_grad_()
    losses = F.cross_entropy(logits, labels.flatten(), reduction="none")
    (3 * (losses * mask.flatten()).sum() / mask.sum()).backward()
    assert logits.grad is not None
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), logits.grad.sum(dim=0), atol=1e-6, rtol=2**-8)


def sliced(rank: int) -> None:
    """Each rank has half of the vocabulary; the gradient of x is a summand."""
    groups = initialize(Topology(tp=2), "gloo", torch.device("cpu"))
    x, weight, labels, mask = operands()
    slice_VH = weight.chunk(2)[rank]
    loss, grad_x, grad_weight = with_gradients(
        lambda *args: fused(*args, groups), x, slice_VH, labels, mask
    )
    torch.distributed.all_reduce(grad_x, group=groups.tp_group)
    expected = with_gradients(textbook, x, weight, labels, mask)
    assert_close(loss, expected[0], atol=1e-6, rtol=1e-6)
    assert_close(grad_x, expected[1], atol=1e-6, rtol=1e-5)
    assert_close(grad_weight, expected[2].chunk(2)[rank], atol=1e-6, rtol=1e-5)


def test_a_sliced_vocabulary_gives_the_same(world: World) -> None:
    world.run(2, sliced)
