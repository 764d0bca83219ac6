"""I-BERT's verdict on made-up outcomes."""

import pytest

from formwright.claims import Outcome
from formwright.claims.i_bert import verdict


def outcomes(*drops: float) -> list[Outcome]:
    return [Outcome(scale="full", seed=i, measured={"drop": d}, baseline={}) for i, d in enumerate(drops)]


@pytest.mark.parametrize(
    ("drops", "wanted"),
    [
        ((0.004, 0.006, -0.001), "holds"),
        ((0.0, 0.0, 0.012), "holds in direction"),
        ((0.006, 0.006, 0.006), "holds in direction"),
        ((0.02, 0.03, 0.02), "does not hold here"),
    ],
)
def test_the_verdict(drops, wanted) -> None:
    assert verdict(outcomes(*drops)) == wanted
