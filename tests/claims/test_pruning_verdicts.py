"""The verdicts of the claims about pruning and dropping blocks, on made-up outcomes."""

import pytest

from formwright.claims import Outcome, entrodrop, llm_weight_pruning


def pruned(half=10.4, third=10.1, few=2.0, dense=2.1):
    return Outcome(
        scale="full",
        seed=0,
        measured={"50%, trained on": half, "30%, trained on": third, "few data, loss": few},
        baseline={"dense, trained on": 10.0, "few data, dense, loss": dense},
    )


@pytest.mark.parametrize(
    ("outcomes", "wanted"),
    [
        ([pruned()], "holds"),
        ([pruned(), pruned(half=10.6)], "holds in direction"),
        ([pruned(half=12.0, third=10.7), pruned(third=10.2)], "holds in direction"),
        ([pruned(half=12.0, third=11.0)], "does not hold here"),
    ],
)
def test_half_of_the_weights_go_at_little_loss(outcomes, wanted):
    assert llm_weight_pruning.small(outcomes) == wanted


@pytest.mark.parametrize(
    ("outcomes", "wanted"),
    [
        ([pruned(), pruned()], "holds"),
        ([pruned(), pruned(few=2.15)], "holds in direction"),
        ([pruned(), pruned(few=2.3)], "does not hold here"),
    ],
)
def test_the_pruned_model_generalises_better(outcomes, wanted):
    assert llm_weight_pruning.better(outcomes) == wanted


def dropped(bucket=0.1, cosine=0.2, chance=0.3):
    return Outcome(
        scale="full",
        seed=0,
        measured={"layer, bucket, excess": bucket},
        baseline={"layer, cosine, excess": cosine, "layer, random, excess": chance},
    )


@pytest.mark.parametrize(
    ("outcomes", "wanted"),
    [
        ([dropped(), dropped()], "holds"),
        ([dropped(), dropped(bucket=0.25)], "holds in direction"),
        ([dropped(bucket=0.2)], "holds in direction"),
        ([dropped(bucket=0.25)], "does not hold here"),
        ([dropped(cosine=0.5, bucket=0.4)], "does not hold here"),
    ],
)
def test_entropy_must_lose_less_than_cosine_and_chance(outcomes, wanted):
    assert entrodrop.verdict(outcomes) == wanted


def test_rank_correlation():
    assert entrodrop.spearman([1.0, 2.0, 5.0], [0.1, 0.3, 9.0]) == pytest.approx(1)
    assert entrodrop.spearman([1.0, 2.0, 5.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)
