"""The blocked attention equals torch's kernel, outputs and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from neox.model.cpu_attention import causal_attention


def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def results(attend, heads_SBND3: Tensor) -> tuple[Tensor, Tensor]:
    heads = heads_SBND3.clone().requires_grad_()
    q, k, v = (x.permute(1, 2, 0, 3) for x in heads.chunk(3, dim=-1))  # strided, as in the model
    out = attend(q, k, v)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    (out * weights).sum().backward()
    assert heads.grad is not None
    return out.detach(), heads.grad


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 130, 256])
@pytest.mark.parametrize("size", [1, 30], ids=["", "large-scores"])
def test_as_close_to_the_truth_as_torchs_kernel(length: int, size: float) -> None:
    """The truth is float64's; scores reach some thousands where heads are 30 times as large."""
    generator = torch.Generator().manual_seed(length)
    heads = size * torch.randn(length, 2, 3, 3 * 16, generator=generator)
    truth = results(theirs, heads.double())
    found, expected = results(causal_attention, heads), results(theirs, heads)
    for ours, kernels, true in zip(found, expected, truth, strict=True):
        scale = true.abs().max()
        error, allowed = (ours - true).abs().max(), (kernels - true).abs().max()
        assert error <= 4 * allowed + 1e-6 * scale
        assert_close(ours, true.float(), atol=float(1e-3 * scale), rtol=0.0)
