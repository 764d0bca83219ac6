"""The rules of FTFI's claims give each verdict for outcomes that earn it."""

import pytest

from formwright.claims import Outcome, ftfi


def timing(ratio, error):
    return Outcome(
        scale="full", seed=0, measured={"ratio, 2000 nodes": ratio, "error, 2000 nodes": error}, baseline={"ms": 1.0}
    )


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        ([timing(5.7, 1e-6), timing(13.0, 1e-5)], "holds"),
        ([timing(5.6, 1e-6), timing(13.0, 1e-6)], "holds in direction"),
        ([timing(0.5, 1e-6), timing(1.2, 1e-6)], "does not hold here"),
        ([timing(20.0, 2e-5), timing(20.0, 1e-6)], "does not hold here"),
    ],
)
def test_speed(outcomes, verdict):
    assert ftfi.fast(outcomes) == verdict


def learnt(loss, accuracy, with_positions):
    """Gains of the mask over a model without one, whose loss is 1 and whose accuracy is one half."""
    found = {"no positions": (loss, accuracy), "positions": (0.0, with_positions)}
    return Outcome(
        scale="full",
        seed=0,
        measured={
            f"mask, {name}, {what}": start + gain
            for name, gains in found.items()
            for what, start, gain in zip(("loss", "accuracy"), (1.0, 0.5), gains, strict=True)
        },
        baseline={
            f"no mask, {name}, {what}": start for name in found for what, start in (("loss", 1.0), ("accuracy", 0.5))
        },
    )


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        ([learnt(-0.1, 0.01, 0.02), learnt(-0.2, 0.03, -0.01)], "holds"),
        ([learnt(-0.1, 0.01, -0.02), learnt(-0.2, 0.03, 0.01)], "holds in direction"),
        ([learnt(0.1, 0.01, 0.02), learnt(-0.2, 0.03, 0.02)], "holds in direction"),
        ([learnt(0.1, 0.01, 0.02), learnt(-0.05, 0.03, 0.02)], "does not hold here"),
    ],
)
def test_accuracy(outcomes, verdict):
    assert ftfi.better(outcomes) == verdict
