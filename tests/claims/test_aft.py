"""AFT's verdicts on made-up outcomes."""

import pytest

from formwright.claims import Outcome, load

loss, memory = load("aft").claims


def judged(claim, rows):
    names = ("aft-local", "aft-simple", "exponent, aft-local", "softmax", "exponent, attention map")
    outcomes = []
    for seed, row in enumerate(rows):
        values = dict(zip(names, row, strict=True))
        baseline = {name: values.pop(name) for name in ("softmax", "exponent, attention map")}
        outcomes.append(Outcome(scale="full", seed=seed, measured=values, baseline=baseline))
    return claim.judge(outcomes)


@pytest.mark.parametrize(
    ("local", "softmax", "verdict"),
    [
        ((1.70, 1.71, 1.72), (1.70, 1.75, 1.76), "holds"),
        ((1.70, 1.71, 1.77), (1.70, 1.75, 1.76), "holds in direction"),  # not in every seed
        ((1.80, 1.80, 1.80), (1.75, 1.75, 1.75), "holds in direction"),  # simple is at 2
        ((1.95, 1.95, 1.95), (1.75, 1.75, 1.75), "does not hold here"),
    ],
)
def test_the_loss_is_judged_between_softmax_and_no_bias(local, softmax, verdict):
    assert judged(loss, [(a, 2.0, 1.0, b, 2.0) for a, b in zip(local, softmax, strict=True)]) == verdict


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ((1.0, 1.1), (1.5, 1.9), "holds"),
        ((1.0, 1.2), (1.5, 1.9), "holds in direction"),
        ((1.0, 1.0), (1.4, 1.9), "holds in direction"),
        ((1.0, 1.6), (1.5, 1.9), "does not hold here"),
    ],
)
def test_memory_is_judged_by_the_worst_seed(ours, theirs, verdict):
    assert judged(memory, [(1.7, 2.0, a, 1.7, b) for a, b in zip(ours, theirs, strict=True)]) == verdict
