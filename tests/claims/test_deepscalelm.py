"""The verdicts of DeepScaleLM's claims, on made-up outcomes."""

import pytest

from formwright.claims import Outcome, deepscalelm


def outcome(*, ours=(0.1, -0.8), xavier=(3.0, 4.0, -7.0), losses=(2.4, 3.0), deep=(2.0, 2.1)):
    measured = {
        f"{name}, {what}": value
        for name in ("deepscalelm", "deepscalelm-post")
        for what, value in zip(("forward", "backward"), ours, strict=True)
    }
    baseline = {
        "xavier, forward": xavier[0],
        "xavier, backward": xavier[1],
        "xavier-post, forward": 0.0,
        "xavier-post, backward": xavier[2],
        "guessing, loss": 3.1,
        "post, loss": losses[1],
        "wide, loss": deep[1],
    }
    measured |= {"deepscalelm-post, loss": losses[0], "deep, loss": deep[0]}
    return Outcome(scale="full", seed=0, measured=measured, baseline=baseline)


@pytest.mark.parametrize(
    ("outcomes", "wanted"),
    [
        ([outcome()], "holds"),
        ([outcome(), outcome(ours=(0.5, -0.8))], "holds in direction"),
        ([outcome(xavier=(3.0, 4.0, -1.5))], "holds in direction"),
        ([outcome(), outcome(ours=(0.1, -8.0))], "does not hold here"),
    ],
)
def test_moments_stay_near_one(outcomes, wanted):
    assert deepscalelm.near_one(outcomes) == wanted


@pytest.mark.parametrize(
    ("outcomes", "wanted"),
    [
        ([outcome()], "holds"),
        ([outcome(), outcome(losses=(2.9, 3.0))], "holds in direction"),
        ([outcome(losses=(2.5, 2.5))], "does not hold here"),
    ],
)
def test_a_deep_post_norm_model_trains(outcomes, wanted):
    assert deepscalelm.trains(outcomes) == wanted


@pytest.mark.parametrize(
    ("outcomes", "wanted"),
    [
        ([outcome()], "holds"),
        ([outcome(), outcome(deep=(2.15, 2.1))], "holds in direction"),
        ([outcome(deep=(2.1, 2.1))], "does not hold here"),
    ],
)
def test_deep_and_narrow_ends_lower(outcomes, wanted):
    assert deepscalelm.deeper(outcomes) == wanted
