"""LLM-FP4's verdict on made-up outcomes, and the spreading of channels, which must change no output."""

import pytest
import torch

from formwright import tasks
from formwright.claims import Outcome
from formwright.claims.llm_fp4 import TASK, spread, trained, verdict
from formwright.compress.modifier import Data


def outcome(fpq: float = 4.6, baseline: float = 4.8, fp: float = 30.0, integer: float = 40.0) -> Outcome:
    theirs = {"full precision": 4.4, "fpq baseline": baseline, "minmax fp": fp, "minmax int": integer}
    return Outcome(scale="full", seed=0, measured={"fpq": fpq}, baseline=theirs)


@pytest.mark.parametrize(
    ("outcomes", "wanted"),
    [
        ([outcome(), outcome(fpq=4.7)], "holds"),
        ([outcome(), outcome(fpq=5.4, baseline=5.5)], "holds in direction"),
        ([outcome(), outcome(baseline=35.0)], "holds in direction"),
        ([outcome(), outcome(fpq=4.9)], "holds in direction"),
        ([outcome(fpq=4.9)], "does not hold here"),
        ([outcome(fp=4.5)], "does not hold here"),
    ],
)
def test_the_verdict(outcomes, wanted) -> None:
    assert verdict(outcomes) == wanted


def test_spreading_channels_changes_no_output_but_their_reach() -> None:
    task = tasks.load(TASK["smoke"])
    model = trained(task, "smoke", 0)
    ids = task.collate([task.test[i] for i in range(2)])["input_ids"]
    norm = model.model.layers[0].input_layernorm
    with torch.no_grad():
        before = model(ids).logits
        gains = norm.weight.clone()
        spread(model, Data(task=task, kind="causal-lm"), 0)
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)  # sums in another order
    assert torch.equal((norm.weight / gains).unique(), torch.tensor([1.0, 16.0]))
