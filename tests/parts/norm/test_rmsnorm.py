"""Root-mean-square normalisation: exact properties, then transformers' own."""

import pytest
import torch

from formwright.parts.norm.rmsnorm import RMSNorm


def test_every_token_gets_mean_square_one():
    y = RMSNorm(dim=63, eps=0.0).double()(torch.randn(2, 7, 63, dtype=torch.double) * 5 + 3)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(2, 7, dtype=torch.double))


def test_a_shift_of_the_input_is_not_taken_out():
    norm, x = RMSNorm(dim=8), torch.randn(3, 8)
    assert not torch.allclose(norm(x), norm(x + 1))


@pytest.mark.reference
def test_it_equals_llama():
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    ours, theirs, x = RMSNorm(dim=12, eps=1e-3), modeling.LlamaRMSNorm(12, eps=1e-3), torch.randn(2, 7, 12)
    with torch.no_grad():
        theirs.weight.copy_(torch.randn(12)), ours.weight.copy_(theirs.weight)
    torch.testing.assert_close(ours(x), theirs(x))
