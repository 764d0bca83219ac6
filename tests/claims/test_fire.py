"""The rule of FIRE's claim gives each verdict for outcomes that earn it."""

import pytest

from formwright.claims import Outcome, fire


def outcome(long, others, short=2.0):
    theirs = {f"{name}, 512": others for name in fire.POSITIONS if name != fire.OURS}
    return Outcome(scale="full", seed=0, measured={"fire, 512": long, "fire, 128": short}, baseline=theirs)


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        ([outcome(1.9, 1.95), outcome(2.0, 2.1)], "holds"),
        ([outcome(1.9, 1.95), outcome(2.01, 2.1)], "holds in direction"),
        ([outcome(1.9, 2.1), outcome(2.0, 1.95)], "holds in direction"),
        ([outcome(1.9, 1.95), outcome(2.0, 1.9)], "does not hold here"),
    ],
)
def test_fire(outcomes, verdict):
    assert fire.verdict(outcomes) == verdict
