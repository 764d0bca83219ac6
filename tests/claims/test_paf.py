"""The rules of PAF's claims give each verdict for outcomes that earn it."""

import pytest
import torch

from formwright import tasks
from formwright.claims import Outcome, paf


def outcome(*, cosine=0.3, series=0.3, none=0.7, less=0.6, ratio=0.3, largest=0.4, loss=2.0, serial=2.0, bare=2.2):
    ours = {"parallel, cosine": cosine, "parallel, cosine less its feed-forward": less}
    ours |= {"parallel, ratio": ratio, "parallel, largest ratio": largest, "parallel, loss": loss}
    rest = {"series, cosine": series, "series, cosine less its feed-forward": less, "none, cosine": none}
    return Outcome(scale="full", seed=0, measured=ours, baseline=rest | {"series, loss": serial, "none, loss": bare})


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        ([outcome(), outcome(cosine=0.5)], "holds"),
        ([outcome(), outcome(series=0.8)], "holds in direction"),
        ([outcome(), outcome(cosine=0.65)], "holds in direction"),
        ([outcome(none=0.2)], "does not hold here"),
        ([outcome(less=0.2)], "does not hold here"),
    ],
)
def test_isotropy(outcomes, verdict):
    assert paf.isotropy(outcomes) == verdict


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        ([outcome(), outcome(largest=0.5)], "holds"),
        ([outcome(), outcome(largest=0.6)], "holds in direction"),
        ([outcome(ratio=1.1, largest=2)], "does not hold here"),
    ],
)
def test_small(outcomes, verdict):
    assert paf.small(outcomes) == verdict


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        ([outcome(), outcome(loss=2.03)], "holds"),
        ([outcome(bare=1.9)], "holds in direction"),
        ([outcome(loss=2.04)], "holds in direction"),
        ([outcome(loss=2.1)], "does not hold here"),
    ],
)
def test_as_good(outcomes, verdict):
    assert paf.as_good(outcomes) == verdict


def test_the_arms_have_equal_parameters_and_read_the_same_hidden_bytes():
    text = tasks.load(paf.TEXT["smoke"])
    task = paf.masked(text, fixed=True)
    sizes = [paf.built(arm, task, "full").num_parameters() for arm in paf.ARMS]
    assert max(sizes) / min(sizes) < 1.01
    first, second = (task.collate([text.test[i] for i in range(4)]) for _ in range(2))
    assert torch.equal(first["input_ids"], second["input_ids"])
    hidden = first["labels"] != -100
    assert (first["input_ids"][hidden] == text.model_config["vocab_size"]).all()
    assert 0.2 < hidden.double().mean() < 0.4
