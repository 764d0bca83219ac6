"""The rules of the rotary claims give each verdict for outcomes that earn it."""

import pytest

from formwright.claims import Outcome, carope, harope, hope


def outcome(measured, baseline):
    return Outcome(scale="full", seed=0, measured=measured, baseline=baseline)


@pytest.mark.parametrize(
    ("errors", "verdict"),
    [
        ([(0.30, 0.31), (0.29, 0.32)], "holds"),
        ([(0.30, 0.31), (0.33, 0.33)], "holds in direction"),
        ([(0.30, 0.31), (0.35, 0.33)], "does not hold here"),
    ],
)
def test_harope(errors, verdict):
    made_up = [outcome({"harope": ours}, dict.fromkeys(harope.OTHERS, theirs)) for ours, theirs in errors]
    assert harope.verdict(made_up) == verdict


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ([(1.7, 1.74, 1.7, 1.9), (1.8, 1.7, 1.7, 1.8)], "holds"),
        ([(1.7, 1.76, 1.7, 1.9), (1.8, 1.7, 1.7, 1.8)], "holds in direction"),  # ours rises by more than a quarter
        ([(1.7, 1.6, 1.7, 1.69)], "holds in direction"),  # RoPE's falls
        ([(1.7, 1.7, 1.7, 1.8), (1.8, 1.8, 1.6, 1.65)], "does not hold here"),
    ],
)
def test_carope(losses, verdict):
    made_up = [
        outcome({"carope at 64": a, "carope at 128": b}, {"rope at 64": c, "rope at 128": d}) for a, b, c, d in losses
    ]
    assert carope.verdict(made_up) == verdict


@pytest.mark.parametrize(
    ("rows", "verdict"),
    [
        ([(1.7, 0, 2.0, 0.4, 1.8, 2.1), (1.7, 0, 2.0, 0.4, 1.8, 2.1)], "holds"),
        ([(1.7, 0, 2.0, 0.4, 1.6, 2.1), (1.7, 0, 2.0, 0.4, 1.8, 2.1)], "holds in direction"),  # ALiBi once lower
        ([(1.7, 0, 2.0, 0.4, 1.8, 2.1), (2.1, 0, 2.0, 0.4, 1.8, 2.3)], "holds in direction"),
        ([(1.7, 0.1, 2.0, 0.4, 1.8, 2.1)], "does not hold here"),  # it rises
        ([(2.2, 0, 2.0, 0.4, 1.8, 2.1)], "does not hold here"),
    ],
)
def test_hope(rows, verdict):
    made_up = [
        outcome(
            {"hope at 512": ours, "hope, rises": up},
            {"rope at 512": rope, "rope, rises": wave, "alibi at 512": alibi, "sinusoidal at 512": sinusoidal},
        )
        for ours, up, rope, wave, alibi, sinusoidal in rows
    ]
    assert hope.verdict(made_up) == verdict
