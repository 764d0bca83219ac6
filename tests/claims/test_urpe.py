"""The rules of URPE's claims give each verdict for outcomes that earn it."""

import pytest

from formwright.claims import Outcome, urpe


def outcome(ours, theirs):
    named = {f"{urpe.OURS}, {name}": value for name, value in ours.items()}
    others = {f"{position}, {name}": value for position in urpe.OTHERS for name, value in theirs.items()}
    return Outcome(scale="full", seed=0, measured=named, baseline=others)


def identified(random, same, others_random=0.2, others_same=0.03):
    return outcome(
        {"identified": random, "identified, one symbol": same},
        {"identified": others_random, "identified, one symbol": others_same},
    )


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        ([identified(0.99, 1.0), identified(0.96, 0.97)], "holds"),
        ([identified(0.99, 1.0), identified(0.96, 0.94)], "holds in direction"),
        ([identified(0.99, 1.0, others_same=0.11)], "holds in direction"),
        ([identified(0.99, 1.0), identified(0.39, 1.0)], "does not hold here"),
        ([identified(0.99, 1.0), identified(0.99, 0.22)], "does not hold here"),
    ],
)
def test_identification(outcomes, verdict):
    assert urpe.identifies(outcomes) == verdict


def moved(ours, loss, theirs=0.6, their_loss=1.0):
    return outcome({"even": ours, "even, loss": loss}, {"even": theirs, "even, loss": their_loss})


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        ([moved(0.99, 0.1), moved(0.96, 0.2)], "holds"),
        ([moved(0.99, 0.1), moved(0.94, 0.2)], "holds in direction"),
        ([moved(0.99, 0.1, theirs=0.76)], "holds in direction"),
        ([moved(0.99, 0.1), moved(0.94, 0.81)], "does not hold here"),
    ],
)
def test_even_tokens(outcomes, verdict):
    assert urpe.moves(outcomes) == verdict
