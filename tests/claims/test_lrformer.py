"""The verdict of LRFormer's claim, on made-up outcomes."""

import pytest

from formwright.claims import Outcome, lrformer


def outcome(accuracy=0.97, ece=0.01, auroc=0.95):
    def arm(name, *values):
        return {f"{name}, {what}": v for what, v in zip(("accuracy", "ece", "auroc 8 and 9"), values, strict=True)}

    return Outcome(
        scale="full", seed=0, measured=arm("lrformer", accuracy, ece, auroc), baseline=arm("softmax", 0.97, 0.02, 0.9)
    )


@pytest.mark.parametrize(
    ("outcomes", "wanted"),
    [
        ([outcome(), outcome(accuracy=0.962)], "holds"),
        ([outcome(), outcome(ece=0.025)], "holds in direction"),
        ([outcome(), outcome(auroc=0.89)], "holds in direction"),
        ([outcome(ece=0.03)], "does not hold here"),
        ([outcome(accuracy=0.9)], "does not hold here"),
        ([outcome(auroc=0.9)], "does not hold here"),  # a tie is no win
    ],
)
def test_it_must_be_calibrated_and_notice_at_equal_accuracy(outcomes, wanted):
    assert lrformer.verdict(outcomes) == wanted


def test_eight_and_nine_are_seen_by_no_training():
    task, unknown = lrformer.known_digits(0)
    for rows in (task.train, task.validation, task.test):
        assert int(rows.columns["labels"].max()) == 7
    assert len(unknown["8 and 9"]) + sum(map(len, (task.train, task.validation, task.test))) == 1797
    assert task.model_config["num_labels"] == 8
