"""Multi-level training's verdicts on made-up outcomes."""

import pytest

from formwright.claims import Outcome, load
from formwright.claims.multilevel_training import Run, curve

[claim] = load("multilevel-training").claims


@pytest.mark.parametrize(
    ("ours", "scratch", "short", "verdict"),
    [
        ((1.50, 1.60, 1.55), (1.51, 1.60, 1.56), (1.55, 1.65, 1.60), "holds"),
        ((1.50, 1.61, 1.55), (1.51, 1.60, 1.56), (1.55, 1.65, 1.60), "holds in direction"),  # not in every seed
        ((1.56, 1.66, 1.61), (1.51, 1.60, 1.56), (1.55, 1.65, 1.60), "does not hold here"),
    ],
)
def test_the_cycle_is_judged_at_four_fifths_of_the_work(ours, scratch, short, verdict):
    outcomes = [
        Outcome(
            scale="full",
            seed=seed,
            measured={"loss": a},
            baseline={"scratch, loss": b, "scratch with 80 %, loss": c},
        )
        for seed, (a, b, c) in enumerate(zip(ours, scratch, short, strict=True))
    ]
    assert claim.judge(outcomes) == verdict


def test_a_curve_is_read_at_each_fifth_as_far_as_it_goes():
    one = Run(validation=1.0, test=1.0, rate=1e-3, curve=[(10.0, 3.0), (45.0, 2.0), (80.0, 1.0)])
    found = curve("cycle", one, 100.0)
    assert found == {f"cycle, validation at {part} %".replace(" %", "%"): loss for part, loss in
                     ((20, 2.0), (40, 2.0), (60, 1.0), (80, 1.0))}  # fmt: skip
