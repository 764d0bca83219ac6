"""Calibration and out-of-distribution metrics: by hand, against scikit-learn, and the extremes."""

import inspect
import math

import pytest
import torch

from formwright.errors import FormwrightError
from formwright.training import calibration as c

pytest.importorskip("torchmetrics")


def answers(n=400, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(n, classes, generator=generator), torch.randint(classes, (n,), generator=generator)


@pytest.mark.reference
def test_they_equal_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    logits, labels = answers()
    p = logits.double().softmax(-1).numpy()
    assert c.negative_log_likelihood(logits, labels) == pytest.approx(metrics.log_loss(labels, p), rel=1e-6)
    ours = [metrics.brier_score_loss((labels == k).numpy(), p[:, k]) for k in range(5)]
    assert c.brier_score(logits, labels) == pytest.approx(sum(ours), rel=1e-6)
    others = 0.5 * answers(seed=1)[0]
    kind = [0] * len(logits) + [1] * len(others)
    for score in ("max-probability", "entropy"):
        unsure = torch.cat([c.uncertainty(logits, score), c.uncertainty(others, score)])
        wanted = metrics.roc_auc_score(kind, unsure.numpy())
        assert c.ood_auroc(logits, others, score=score) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_by_its_definition(bins):
    logits, labels = answers()
    confidence, answer = logits.softmax(-1).max(-1)
    wanted = 0.0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            right = (answer == labels)[inside].float().mean()
            wanted += float(inside.float().mean() * (right - confidence[inside].mean()).abs())
    assert c.calibration_error(logits, labels, bins=bins) == pytest.approx(wanted, abs=1e-5)


def test_a_sure_and_right_answer_costs_nothing_and_a_sure_and_wrong_one_all():
    sure = 100 * torch.eye(3)
    right, wrong = torch.arange(3), torch.tensor([1, 2, 0])
    good, bad = c.calibration(sure, right), c.calibration(sure, wrong)
    assert good == pytest.approx({"accuracy": 1.0, "ece": 0.0, "nll": 0.0, "brier": 0.0})
    assert bad == pytest.approx({"accuracy": 0.0, "ece": 1.0, "nll": 100.0, "brier": 2.0})


def test_uncertainty_is_highest_for_equal_classes():
    even = torch.zeros(1, 4)
    assert c.uncertainty(even).item() == pytest.approx(0.75)
    assert c.uncertainty(even, "entropy").item() == pytest.approx(math.log(4))
    assert c.ood_auroc(100 * torch.eye(4), torch.zeros(7, 4)) == 1.0


def test_logits_of_a_model_in_batches():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, pixel_values):
            assert not self.training
            return type("Output", (), {"logits": self.scale * pixel_values.flatten(1)})

    model, pixels = Model().train(), torch.randn(5, 1, 2, 2)
    assert torch.equal(c.logits_of(model, pixels, batch_size=2), 2 * pixels.flatten(1))
    assert model.training


def test_unknown_scores_and_no_bins_are_refused():
    logits, labels = answers()
    with pytest.raises(FormwrightError, match="one bin"):
        c.calibration_error(logits, labels, bins=0)
    with pytest.raises(FormwrightError, match="max-probability"):
        inspect.unwrap(c.uncertainty)(logits, "margin")
