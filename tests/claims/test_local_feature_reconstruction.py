"""The rules of the claims of local learning give each verdict for outcomes that earn it."""

import pytest

from formwright.claims import Outcome
from formwright.claims import local_feature_reconstruction as local


def outcome(*, two=0.4, four=0.5, loss=1.5, theirs=1.6, mb=100, their_mb=110):
    ours = {"2 modules, saved": two, "4 modules, saved": four, "4 modules, loss": loss, "4 modules, MB": mb}
    rest = {"4 modules, image, loss": theirs, "4 modules, image, MB": their_mb}
    return Outcome(scale="full", seed=0, measured=ours, baseline=rest)


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        ([outcome(), outcome(two=0.36, four=0.45)], "holds"),
        ([outcome(two=0.3)], "holds in direction"),
        ([outcome(two=0.3, four=0.3)], "does not hold here"),
        ([outcome(two=0.1)], "does not hold here"),
    ],
)
def test_saves(outcomes, verdict):
    assert local.saves(outcomes) == verdict


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        ([outcome(), outcome(loss=1.55)], "holds"),
        ([outcome(), outcome(loss=1.65)], "holds in direction"),
        ([outcome(their_mb=90)], "holds in direction"),
        ([outcome(loss=1.7)], "does not hold here"),
    ],
)
def test_features_beat_the_image(outcomes, verdict):
    assert local.features_beat_the_image(outcomes) == verdict
