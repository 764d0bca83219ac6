"""PolyCom's verdicts on made-up outcomes."""

import pytest

from formwright.claims import Outcome, load

loss, fit = load("polycom").claims


NAMES = {loss.statement: ("loss polynorm", "loss swiglu"), fit.statement: ("fit polyrelu", "fit relu")}


def judged(claim, ours, theirs):
    measured, baseline = NAMES[claim.statement]
    pairs = enumerate(zip(ours, theirs, strict=True))
    return claim.judge(
        [Outcome(scale="full", seed=s, measured={measured: a}, baseline={baseline: b}) for s, (a, b) in pairs]
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ((1.70, 1.71, 1.72, 1.71), (1.75, 1.76, 1.78, 1.75), "holds"),
        ((1.70, 1.71, 1.72, 1.76), (1.75, 1.76, 1.78, 1.75), "holds in direction"),  # not in every seed
        (
            (1.70, 1.70, 1.70, 1.70),
            (1.71, 1.99, 1.71, 1.71),
            "holds in direction",
        ),  # every seed, but one makes the mean
        ((1.76, 1.76, 1.76, 1.76), (1.75, 1.76, 1.75, 1.75), "does not hold here"),
    ],
)
def test_the_loss_is_judged_by_every_seed_and_a_paired_test(ours, theirs, verdict):
    assert judged(loss, ours, theirs) == verdict


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ((0.001, 0.002, 0.001), (0.02, 0.02, 0.02), "holds"),
        ((0.001, 0.003, 0.001), (0.02, 0.02, 0.02), "holds in direction"),
        ((0.001, 0.021, 0.001), (0.02, 0.02, 0.02), "does not hold here"),
    ],
)
def test_the_fit_is_judged_by_its_worst_seed(ours, theirs, verdict):
    assert judged(fit, ours, theirs) == verdict
