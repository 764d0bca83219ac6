"""The rule of Mamba's claim gives each verdict for outcomes that earn it."""

import pytest
import torch

from formwright.claims import Outcome, mamba


@pytest.mark.parametrize(
    ("accuracies", "verdict"),
    [
        ([(0.99, 0.5), (0.96, 0.7)], "holds"),
        ([(0.99, 0.5), (0.94, 0.5)], "holds in direction"),
        ([(0.99, 0.5), (0.99, 0.8)], "holds in direction"),
        ([(0.99, 0.5), (0.99, 0.95)], "does not hold here"),
        ([(0.99, 0.5), (0.3, 0.6)], "does not hold here"),
    ],
)
def test_verdict(accuracies, verdict):
    outcomes = [
        Outcome(scale="full", seed=seed, measured={"selective": ours}, baseline={"constant": theirs})
        for seed, (ours, theirs) in enumerate(accuracies)
    ]
    assert mamba.verdict(outcomes) == verdict


def test_the_rival_has_the_same_weights_and_does_not_see_the_token_in_its_maps():
    projection = torch.nn.Linear(6, 5, bias=False)
    rival, x = mamba.Constant(projection), torch.randn(2, 7, 6)
    maps = rival(x)
    assert maps.shape == (2, 7, 5)
    assert torch.equal(maps, rival(torch.randn(2, 7, 6)))
    assert [p is projection.weight for p in rival.parameters()] == [True]
