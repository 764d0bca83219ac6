"""FFF's verdicts on made-up outcomes, and the slope they rest on."""

import pytest

from formwright.claims import Outcome, load
from formwright.claims.fast_feedforward import growth

accuracy, speed = load("fast-feedforward").claims


def outcomes(measured, baseline=None):
    return [
        Outcome(scale="full", seed=seed, measured=numbers, baseline=baseline or {})
        for seed, numbers in enumerate(measured)
    ]


@pytest.mark.parametrize(
    ("one", "eight", "verdict"),
    [
        ((0.942, 0.95, 0.97), (0.99, 0.99, 0.99), "holds"),
        ((0.941, 0.95, 0.97), (0.942, 0.99, 0.99), "holds in direction"),
        ((0.80, 0.80, 0.80), (0.94, 0.99, 0.99), "does not hold here"),
    ],
)
def test_accuracy_is_judged_by_the_worst_seed(one, eight, verdict):
    kept = [{"kept, leaf 1": a, "kept, leaf 8": b} for a, b in zip(one, eight, strict=True)]
    assert accuracy.judge(outcomes(kept)) == verdict


@pytest.mark.parametrize(
    ("faster", "slope", "verdict"),
    [
        ((220.0, 230.0, 240.0), 0.9, "holds"),
        ((219.0, 230.0, 240.0), 0.5, "holds in direction"),
        ((219.0, 230.0, 240.0), 0.6, "does not hold here"),
        ((0.9, 2.0, 2.0), 0.1, "does not hold here"),
    ],
)
def test_speed_is_judged_by_the_worst_seed_and_the_growth(faster, slope, verdict):
    measured = [{"faster": times, "growth": slope} for times in faster]
    assert speed.judge(outcomes(measured, {"growth, dense": 1.0})) == verdict


def test_growth_is_the_slope_in_logarithms_from_the_start_on():
    assert growth({8: 100.0, 16: 3.0, 32: 12.0, 64: 48.0}, 16) == pytest.approx(2.0)
