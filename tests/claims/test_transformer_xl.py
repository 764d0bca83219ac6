"""The rules of Transformer-XL's claims, and that its arms are as fair as they say."""

import pytest
import torch

from formwright import tasks
from formwright.claims import Outcome
from formwright.claims import transformer_xl as claim


def outcome(measured, baseline=None):
    return Outcome(scale="full", seed=0, measured=measured, baseline=baseline or {})


def reading(what, ours, *rest):
    others = dict(zip((claim.NO_MEMORY, claim.ABSOLUTE, claim.LONG), rest, strict=True))
    return outcome({f"{claim.OURS}, {what}": ours}, {f"{arm}, {what}": value for arm, value in others.items()})


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ([(1.5, 1.6, 1.7, 1.6), (1.6, 1.7, 1.7, 1.7)], "holds"),
        ([(1.5, 1.6, 1.7, 1.4), (1.6, 1.7, 1.7, 1.7)], "holds in direction"),
        ([(1.8, 1.6, 1.7, 1.6), (1.7, 1.7, 1.7, 1.7)], "does not hold here"),
    ],
)
def test_better(losses, verdict):
    assert claim.better([reading("loss", *each) for each in losses]) == verdict


@pytest.mark.parametrize(
    ("contexts", "verdict"),
    [
        ([(128, 32, 32, 64), (128, 16, 16, 64)], "holds"),
        ([(64, 64, 32, 64), (128, 16, 16, 64)], "holds in direction"),
        ([(64, 64, 32, 64), (64, 16, 16, 64)], "does not hold here"),
    ],
)
def test_further(contexts, verdict):
    assert claim.further([reading("context", *each) for each in contexts]) == verdict


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([(12, 20, 40), (10, 11, 30)], "holds"),
        ([(12, 20, 19)], "holds in direction"),
        ([(9, 20, 40)], "holds in direction"),
        ([(12, 20, 40), (12, 0.9, 40)], "does not hold here"),
    ],
)
def test_quicker(ratios, verdict):
    seeds = [dict(zip((f"speed-up at {at}" for at in claim.SPEED_AT), each, strict=True)) for each in ratios]
    assert claim.quicker([outcome(seed) for seed in seeds]) == verdict


def test_reach_stops_at_the_first_doubling_that_gains_too_little():
    assert claim.reach([5.0, 4.98, 4.96, 4.95, 4.0]) == 64
    assert claim.reach([5.0, 5.1, 4.0, 3.0, 2.0]) == 16
    assert claim.reach([5.0, 4.0, 3.0, 2.0, 1.0]) == 256


def test_all_arms_have_the_same_number_of_parameters():
    sizes = [claim.parameters(claim.built(arm, 96)) for arm in claim.ARMS]
    assert max(sizes) / min(sizes) < 1.001


@pytest.mark.parametrize("length", [8, 9])
def test_overlapping_windows_tell_every_byte_once(length):
    symbols = torch.arange(100)
    rows = claim.overlapping(symbols, length)
    labels = rows.columns["labels"]
    told = labels[:, 1:][labels[:, 1:] >= 0]
    assert torch.equal(told, torch.arange(1, len(told) + 1))
    assert len(told) >= 99 - length // 2


def test_the_losses_are_those_of_the_bytes_after_the_starts():
    text = tasks.load("char-lm(length=17, test=0.01)")
    model, symbols = claim.built(claim.OURS, text.model_config["vocab_size"]).eval(), text.test.symbols.long()
    with torch.no_grad():
        told = claim.told(model, symbols, torch.tensor([40, 90]), 8)
        row = symbols[90 - 8 : 90 + claim.TOLD + 1]
        logits = model(row[None, :-1]).logits[0, -claim.TOLD :]
        wanted = torch.nn.functional.cross_entropy(logits, row[-claim.TOLD :], reduction="none")
    torch.testing.assert_close(told[claim.TOLD :], wanted)
