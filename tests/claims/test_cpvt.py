"""The rules of CPVT's claims give each verdict for outcomes that earn it."""

import pytest
import torch

from formwright.claims import Outcome, cpvt


def outcome(loss, other, *, accuracy=0.97, change=0.0, theirs=-0.1):
    ours = {"peg, loss at 16": loss, "peg, accuracy at 16": accuracy, "peg, accuracy at 24": accuracy + change}
    rest = {f"{arm}, loss at 16": other for arm in cpvt.ARMS if arm != "peg"}
    rest |= {f"{arm}, accuracy at 16": 0.95 for arm in cpvt.ARMS if arm != "peg"}
    rest |= {f"{arm}, accuracy at 24": 0.95 + theirs for arm in cpvt.ARMS if arm != "peg"}
    return Outcome(scale="full", seed=0, measured=ours, baseline=rest)


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        ([outcome(0.1, 0.2), outcome(0.1, 0.15)], "holds"),
        ([outcome(0.1, 0.2), outcome(0.2, 0.15)], "holds in direction"),
        ([outcome(0.1, 0.2, accuracy=0.9)], "holds in direction"),
        ([outcome(0.3, 0.2), outcome(0.1, 0.15)], "does not hold here"),
    ],
)
def test_better(outcomes, verdict):
    assert cpvt.better(outcomes) == verdict


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        ([outcome(0.1, 0.2, change=0.01), outcome(0.1, 0.2)], "holds"),
        ([outcome(0.1, 0.2, change=-0.01)], "holds in direction"),
        ([outcome(0.1, 0.2, change=0.02, theirs=-0.1), outcome(0.1, 0.2, theirs=0.01)], "holds in direction"),
        ([outcome(0.1, 0.2, change=-0.2)], "does not hold here"),
    ],
)
def test_larger_images(outcomes, verdict):
    assert cpvt.larger_images(outcomes) == verdict


@torch.no_grad()
def test_a_model_read_at_its_own_size_is_unchanged_and_a_table_is_interpolated():
    task, larger = (cpvt.enlarged(size, "smoke") for size in (16, 24))
    for arm in cpvt.ARMS:
        model = cpvt.built(arm, task).eval()
        pixels = task.test[0]["pixel_values"][None]
        assert torch.equal(model(pixels).logits, cpvt.read_at(model, arm, task)(pixels).logits)
        assert cpvt.read_at(model, arm, larger)(larger.test[0]["pixel_values"][None]).logits.shape == (1, 10)
