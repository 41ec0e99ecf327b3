"""What the weights of the model's matrices are asked for, in whatever form a module holds them.

A module's `weight` is a parameter, EightBit, FourBit or Packed; it may have an `adapter`
(neox.model.lora) besides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from neox.model.four_bit import FourBit
from neox.model.lora import Adapter
from neox.model.packed import Packed
from neox.model.quantized import EightBit, multiply, multiply_back
from neox.parallel.groups import ProcessGroups
from neox.parallel.layers import linear, reduce_from_tensor_parallel

Weight = Tensor | EightBit | FourBit | Packed


def weight_of(owner: nn.Module) -> Weight:
    weight = owner.weight
    assert isinstance(weight, Weight)
    return weight


def adapter_of(owner: nn.Module) -> Adapter | None:
    adapter = getattr(owner, "adapter", None)
    assert adapter is None or isinstance(adapter, Adapter)
    return adapter


def bias_of(owner: nn.Module) -> Tensor | None:
    bias = getattr(owner, "bias", None)
    assert bias is None or isinstance(bias, Tensor)
    return bias


def project(owner: nn.Module, x: Tensor) -> Tensor:
    """x W^T + bias by the layer `owner`, W [N, K]: [..., K] -> [..., N]."""
    weight = weight_of(owner)
    if isinstance(weight, Tensor) and weight.requires_grad and adapter_of(owner) is None:
        return owner(x)
    # Beside a frozen weight megatron-core's layers give the bias no gradient.
    return project_with(owner, x, bias_of(owner))


def project_with(owner: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """`project` with this bias in place of the layer's own."""
    weight = weight_of(owner)
    if isinstance(weight, EightBit):
        y = _FrozenProduct.apply(x, weight)
        y = y if bias is None else y + bias
    else:
        y = product(x, weight, bias)
    adapter = adapter_of(owner)
    return y if adapter is None else y + adapter(x)


def product(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x W^T + bias: [..., K] -> [..., N]; has gradients where the weight is dense."""
    if isinstance(weight, Tensor):
        return linear(x, weight, bias)
    if isinstance(weight, FourBit | Packed):
        return weight.multiply(x, bias)
    y = multiply(x, weight)
    return y if bias is None else y.add_(bias)


def product_back(grad: Tensor, weight: Weight) -> Tensor:
    """grad W: [..., N] -> [..., K]; has no gradient."""
    assert not isinstance(weight, FourBit | Packed), "weights of `quantize` are for inference"
    return linear(grad, weight.t()) if isinstance(weight, Tensor) else multiply_back(grad, weight)


def look_up(
    owner: nn.Module, tokens: Tensor, dtype: torch.dtype, groups: ProcessGroups, *, reduce: bool
) -> Tensor:
    """Token ids [...] -> rows of the table that `owner` holds a shard of, [..., H].

    Collective over the tp group; without `reduce` it is not, and gives this rank's summand.
    """
    weight = weight_of(owner)
    if isinstance(weight, Tensor):
        found: Tensor = owner(tokens) if reduce else owner(tokens, reduce=False)
        return found
    rows = tokens - groups.tp_rank * weight.shape[0]
    elsewhere = (rows < 0) | (rows >= weight.shape[0])
    found = weight.look_up(rows.masked_fill(elsewhere, 0), dtype)
    summand = found.masked_fill(elsewhere[..., None], 0.0)
    return reduce_from_tensor_parallel(summand, groups) if reduce else summand


class _FrozenProduct(torch.autograd.Function):
    """A product with an 8-bit weight, which is dequantized once more for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: EightBit) -> Tensor:
        ctx.weight = weight
        return multiply(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return multiply_back(grads[0], ctx.weight), None
