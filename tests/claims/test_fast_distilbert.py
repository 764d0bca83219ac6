"""The verdicts of Fast DistilBERT's claims, and that what they show is measured."""

import pytest

from formwright.claims import Outcome
from formwright.claims import fast_distilbert as claim

ACCURACY = {"blocks, distilled": 0.75, "blocks": 0.73, "single weights": 0.74, "blocks, distilled, int8": 0.748}
SPEED = {"PyTorch float32": 8.0, "ONNX Runtime float32": 6.0, "ONNX Runtime int8": 2.0}


def outcome(*, seed: int = 0, slow: float = 1.5, **changed: float) -> Outcome:
    measured = {**ACCURACY, "drop": 0.004, "drop by int8": 0.002}
    measured |= {f"times as fast as {name}": value for name, value in SPEED.items()}
    measured |= {f"{name}, 90% zero, times float32": slow for name in ("square", "wide")}
    return Outcome(scale="full", seed=seed, measured=measured | changed)


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "holds"),
        ({"drop": 0.011}, "holds in direction"),
        ({"blocks": 0.76}, "holds in direction"),
        ({"drop": 0.02, "drop by int8": 0.011}, "does not hold here"),
        ({"drop": 0.031}, "does not hold here"),
    ],
)
def test_the_loss_is_judged_on_the_mean(changed, verdict) -> None:
    assert claim.little([outcome(**changed), outcome(seed=1, **changed)]) == verdict
    assert claim.little([outcome(drop=0.015), outcome(seed=1, drop=0.005)]) == "holds"


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "holds"),
        ({"times as fast as ONNX Runtime float32": 4.0}, "holds in direction"),
        ({"times as fast as ONNX Runtime int8": 0.9}, "holds in direction"),
        ({"times as fast as ONNX Runtime float32": 0.9}, "does not hold here"),
        ({"times as fast as ONNX Runtime int8": 0.9, "slow": 0.8}, "does not hold here"),
    ],
)
def test_speed_is_judged_in_every_seed(changed, verdict) -> None:
    assert claim.fast([outcome(seed=1), outcome(**changed)]) == verdict


def test_every_claim_shows_what_decides_it() -> None:
    shown = {name for one in claim.CLAIMS for name in one.shows}
    assert set(outcome().measured) <= shown
