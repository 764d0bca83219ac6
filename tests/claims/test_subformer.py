"""Subformer's verdicts on made-up outcomes."""

import pytest

from formwright.claims import Outcome, load

saves, lifts = load("subformer").claims


def judged(claim, measured, baseline):
    count = len(next(iter(measured.values())))
    return claim.judge(
        [
            Outcome(
                scale="full",
                seed=s,
                measured={f"{name}, loss": values[s] for name, values in measured.items()},
                baseline={f"{name}, loss": values[s] for name, values in baseline.items()},
            )
            for s in range(count)
        ]
    )


@pytest.mark.parametrize(
    ("ours", "shared", "narrow", "whole", "verdict"),
    [
        ((2.0, 2.1, 2.0), (2.1, 2.2, 2.1), (2.05, 2.15, 2.1), (1.99, 2.09, 1.98), "holds"),
        ((2.0, 2.1, 2.0), (2.1, 2.2, 2.1), (2.05, 2.15, 2.1), (1.9, 2.0, 1.9), "holds in direction"),
        ((2.0, 2.2, 2.0), (2.1, 2.2, 2.1), (2.05, 2.25, 2.1), (1.99, 2.19, 1.98), "holds in direction"),
        ((2.0, 2.1, 2.0), (2.1, 2.2, 2.1), (1.95, 2.05, 2.0), (1.99, 2.09, 1.98), "does not hold here"),
    ],
)
def test_a_sandwich_is_judged_against_all_three(ours, shared, narrow, whole, verdict):
    assert judged(saves, {"sandwich": ours}, {"all": shared, "narrow": narrow, "none": whole}) == verdict


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ((5.0, 5.1, 5.0), (5.1, 5.2, 5.1), "holds"),
        ((5.0, 5.2, 5.0), (5.1, 5.15, 5.1), "holds in direction"),
        ((5.2, 5.2, 5.2), (5.1, 5.2, 5.1), "does not hold here"),
    ],
)
def test_the_lift_is_judged_by_every_seed(ours, theirs, verdict):
    assert judged(lifts, {"safe": ours}, {"factorised": theirs}) == verdict
