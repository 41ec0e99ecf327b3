"""Our layers against the oracle, forward and backward, over the architectures."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from neox.model.norms import build_norm
from neox.parallel.groups import ProcessGroups
from tests.models import ARCHITECTURES, built, config_of, forward, random_weights, tokens
from tests.reference import reference_logits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_the_oracle(name: str) -> None:
    config = config_of(**ARCHITECTURES[name])
    weights = random_weights(config)
    stage = built(config, weights, ProcessGroups.single())
    for tensor in weights.values():
        tensor.requires_grad_()

    ours = forward(stage, tokens())
    expected = reference_logits(config, weights, tokens())
    assert_close(ours, expected, atol=1e-5, rtol=1e-5)

    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    (ours * direction).sum().backward()
    (expected * direction).sum().backward()
    for layer, module in stage:
        if layer.has_parameters:
            for parameter_name, parameter in module.named_parameters():
                wanted = weights[f"{layer.file_index}.{parameter_name}"].grad
                assert wanted is not None and parameter.grad is not None
                assert_close(
                    parameter.grad,
                    wanted,
                    atol=1e-5 * max(1.0, wanted.abs().max().item()),
                    rtol=1e-4,
                    msg=lambda text, at=f"{layer.file_index}.{parameter_name}": f"{at}: {text}",
                )


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_a_row_of_zeros_has_a_finite_gradient(norm: str) -> None:
    layer = build_norm(config_of(norm=norm), torch.float32)
    for parameter in layer.parameters():
        torch.nn.init.ones_(parameter)
    x = torch.zeros(1, 32, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
