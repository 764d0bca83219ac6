"""Layer normalisation: by hand, and with extreme inputs."""

import pytest
import torch

from formwright.parts.norm.layernorm import LayerNorm


def test_every_token_gets_mean_zero_and_variance_one():
    y = LayerNorm(dim=63, eps=0.0).double()(torch.randn(2, 7, 63, dtype=torch.double) * 5 + 3)
    torch.testing.assert_close(y.mean(-1), torch.zeros(2, 7, dtype=torch.double))
    torch.testing.assert_close(y.var(-1, unbiased=False), torch.ones(2, 7, dtype=torch.double))


def test_numbers_checked_by_hand():
    norm = LayerNorm(dim=2, eps=3.0)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, 1.0])), norm.bias.copy_(torch.tensor([0.5, 0.0]))
    assert torch.equal(norm(torch.tensor([1.0, 3.0])), torch.tensor([-0.5, 0.5]))  # mean 2, variance 1, 1 / sqrt(1 + 3)


@pytest.mark.parametrize("bias", [True, False])
def test_a_shift_only_when_asked(bias):
    assert sum(weight.numel() for weight in LayerNorm(dim=8, bias=bias).parameters()) == (16 if bias else 8)
