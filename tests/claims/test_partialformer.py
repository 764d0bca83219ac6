"""The rule of PartialFormer's claim gives each verdict for outcomes that earn it."""

import pytest

from formwright import tasks
from formwright.claims import Outcome, partialformer


def outcome(ours, wide, narrow):
    rest = {"transformer, loss": wide, "narrow, loss": narrow}
    return Outcome(scale="full", seed=0, measured={"partialformer, loss": ours}, baseline=rest)


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        ([outcome(1.0, 1.2, 1.1), outcome(1.1, 1.2, 1.3)], "holds"),
        ([outcome(1.0, 1.2, 1.1), outcome(1.1, 1.3, 1.05)], "holds in direction"),
        ([outcome(1.2, 1.1, 1.3)], "does not hold here"),
    ],
)
def test_verdict(outcomes, verdict):
    assert partialformer.verdict(outcomes) == verdict


def test_the_arms_have_equal_parameters():
    task = tasks.load(partialformer.TEXT["smoke"])
    known = task.model_config["vocab_size"], task.model_config["max_position_embeddings"]
    sizes = {
        arm: partialformer.built(arm, task, intermediate_size=partialformer.hidden(arm, *known)).num_parameters()
        for arm in partialformer.ARMS
    }
    assert max(sizes.values()) / min(sizes.values()) < 1.002
