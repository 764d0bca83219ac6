"""The verdicts of TokenFormer's claims, on made-up outcomes."""

import pytest

from formwright.claims import Outcome, tokenformer


def growth(grown=(1.9, 1.8, 1.7), compute=0.7, scratch=(2.1, 1.9, 1.75), small=2.0, softmax=2.2):
    measured = {f"loss, grown +{steps}": loss for steps, loss in zip((40, 80, 160), grown, strict=True)}
    measured |= {f"compute, grown +{steps}": compute * steps / 160 for steps in (40, 80, 160)}
    measured |= {"loss, small": small, "loss, grown +80, random keys": 0.0}
    baseline = {f"loss, scratch {steps}": loss for steps, loss in zip((120, 240, 480), scratch, strict=True)}
    return Outcome(scale="full", seed=0, measured=measured, baseline=baseline | {"loss, small, softmax": softmax})


@pytest.mark.parametrize(
    ("outcomes", "wanted"),
    [
        ([growth()], "holds"),
        ([growth(), growth(grown=(1.9, 1.8, 1.75))], "holds"),
        ([growth(), growth(grown=(1.9, 1.8, 1.76))], "holds in direction"),
        ([growth(compute=1.1)], "holds in direction"),
        ([growth(grown=(2.2, 2.2, 2.2))], "does not hold here"),
        ([growth(), growth(grown=(2.2, 2.2, 2.0), scratch=(2.0, 1.9, 1.75))], "does not hold here"),
    ],
)
def test_a_grown_model_must_reach_the_loss_from_scratch_with_less_compute(outcomes, wanted):
    assert tokenformer.growing_verdict(outcomes) == wanted


@pytest.mark.parametrize(
    ("losses", "wanted"),
    [
        ([(2.0, 2.2), (2.01, 2.2), (2.0, 2.21)], "holds"),
        ([(2.0, 2.2), (2.0, 1.9), (2.0, 2.2)], "holds in direction"),
        ([(2.0, 2.0)], "does not hold here"),
    ],
)
def test_the_modified_softmax_must_be_below_softmax(losses, wanted):
    assert tokenformer.softmax_verdict([growth(small=a, softmax=b) for a, b in losses]) == wanted
