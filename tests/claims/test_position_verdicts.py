"""The rules of the position claims give each verdict for outcomes that earn it."""

import pytest

from formwright.claims import Outcome, alibi, kerple, roformer


def outcome(measured, baseline):
    return Outcome(scale="full", seed=0, measured=measured, baseline=baseline)


def language(rope, halfway, others=2.0):
    return outcome(
        {"rope": rope, "rope, halfway": halfway},
        {f"{name}{when}": others for name in roformer.OTHERS for when in ("", ", halfway")},
    )


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        ([language(1.9, 1.9), language(1.8, 1.99)], "holds"),
        ([language(1.9, 1.9), language(1.8, 2.0)], "holds in direction"),
        ([language(1.7, 1.9), language(2.1, 1.9)], "holds in direction"),
        ([language(1.9, 1.9), language(2.2, 1.9)], "does not hold here"),
    ],
)
def test_roformer(outcomes, verdict):
    assert roformer.verdict(outcomes) == verdict


@pytest.mark.parametrize(
    ("rises", "verdict"),
    [
        ([(-0.01, 0.5), (0.0, 0.1)], "holds"),
        ([(-0.01, 0.5), (0.01, 0.1)], "holds in direction"),
        ([(-0.03, -0.01), (-0.03, 0.5)], "holds in direction"),
        ([(-0.01, 0.5), (0.2, 0.1)], "does not hold here"),
    ],
)
def test_alibi(rises, verdict):
    assert alibi.verdict([outcome({"alibi": a}, {"sinusoidal": s}) for a, s in rises]) == verdict


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ([(1.0, 1.1, 1.2), (1.0, 1.2, 1.1)], "holds"),
        ([(1.0, 1.3, 1.2), (1.1, 1.2, 1.0)], "holds in direction"),
        ([(1.0, 1.1, 1.3), (1.4, 1.1, 1.3)], "does not hold here"),
    ],
)
def test_kerple(losses, verdict):
    made_up = [outcome({"kerple": k}, {"alibi": a, "t5": t}) for k, a, t in losses]
    assert kerple.verdict(made_up) == verdict
