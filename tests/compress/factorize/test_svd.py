"""Truncated SVD: the best of its rank, stored as two matrices; NumPy's SVD is the reference."""

import numpy as np
import pytest
import torch

import formwright
from formwright.build import build
from formwright.compress.factorize.svd import SVD, LowRankLinear
from formwright.compress.pipeline import apply
from formwright.errors import FormwrightError

from .. import zoo
from ..classifiers import data


@pytest.mark.reference
def test_the_factors_are_numpys_best_of_their_rank():
    weight, bias = torch.randn(12, 20, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    made = LowRankLinear.of(weight, bias, 5)
    u, s, v = np.linalg.svd(weight.numpy(), full_matrices=False)
    np.testing.assert_allclose(made.weight.detach().numpy(), u[:, :5] * s[:5] @ v[:5], atol=1e-12)
    x = torch.randn(3, 4, 20, dtype=torch.float64)
    torch.testing.assert_close(made(x), x @ made.weight.T + bias)
    torch.testing.assert_close(LowRankLinear.of(weight, None, 12).weight, weight)


def test_the_rank_is_what_the_ratio_leaves():
    assert SVD(ratio=2.0).rank_of(768, 768) == 192
    assert SVD(rank=7).rank_of(768, 768) == 7


@pytest.mark.parametrize("family", ["bert", "vit", "gpt2", "llama", "t5"])
def test_a_model_gets_smaller_and_comes_back_exactly(tmp_path, family):
    model = zoo.build(family)
    before = sum(one.numel() for one in model.parameters())
    change = apply(model, build("modifier", "svd(rank=3)"), data())
    assert change.parameters[1] < before
    assert not change.simulated
    model.save_pretrained(tmp_path)
    assert torch.equal(zoo.outputs(formwright.load(tmp_path).eval(), family), zoo.outputs(model, family))


def test_what_cannot_be_is_refused():
    for options in ({"ratio": 1.0}, {"rank": 0}, {"ratio": 2.0, "rank": 3}):
        with pytest.raises(FormwrightError):
            SVD(**options)
    for options, says in (({"rank": 8}, "no smaller"), ({"ratio": 50.0}, "smaller ratio")):
        with pytest.raises(FormwrightError, match=says):
            apply(zoo.build("bert"), SVD(**options), data())
    model = zoo.build("bert")
    apply(model, SVD(), data())
    with pytest.raises(FormwrightError, match="no plain projections"):
        apply(model, SVD(), data())
