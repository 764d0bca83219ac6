"""PEER's verdicts on made-up outcomes, and the equal compute they rest on."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from formwright.build import build, parse_spec
from formwright.claims import Outcome, load
from formwright.claims.peer import ARMS

compute, experts, norm = load("peer").claims


def judged(claim, **columns):
    names = {"few": "loss peer 16^2", "more": "loss peer 64^2", "most": "loss peer 128^2"}
    rows = list(zip(*columns.values(), strict=True))
    named = [names.get(name, name) for name in columns]
    return claim.judge(
        [Outcome(scale="full", seed=seed, measured=dict(zip(named, row, strict=True))) for seed, row in enumerate(rows)]
    )


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ((1.50, 1.52, 1.51), "holds"),
        ((1.50, 1.58, 1.70), "holds in direction"),
        ((1.60, 1.61, 1.62), "does not hold here"),
    ],
)
def test_compute_is_judged_against_both_others(ours, verdict):
    others = {"loss dense": (1.7, 1.71, 1.72), "loss moe": (1.6, 1.61, 1.62)}
    assert judged(compute, most=ours, **others) == verdict


@pytest.mark.parametrize(
    ("few", "more", "most", "verdict"),
    [
        ((1.7, 1.7, 1.7), (1.6, 1.6, 1.6), (1.5, 1.5, 1.5), "holds"),
        ((1.7, 1.7, 1.7), (1.4, 1.4, 1.4), (1.5, 1.5, 1.5), "holds in direction"),
        ((1.7, 1.5, 1.7), (1.6, 1.6, 1.6), (1.5, 1.5, 1.5), "holds in direction"),
        ((1.5, 1.5, 1.5), (1.6, 1.6, 1.6), (1.5, 1.5, 1.6), "does not hold here"),
    ],
)
def test_experts_are_judged_by_the_fall(few, more, most, verdict):
    assert judged(experts, few=few, more=more, most=most) == verdict


@pytest.mark.parametrize(
    ("used", "uneven", "loss", "verdict"),
    [
        (0.9, 1.0, 1.5, "holds"),
        (0.9, 1.0, 1.7, "holds in direction"),
        (0.7, 1.0, 1.5, "holds in direction"),
        (0.9, 2.5, 1.5, "does not hold here"),
    ],
)
def test_the_norm_is_judged_by_use_and_loss(used, uneven, loss, verdict):
    columns = {}
    for what, with_norm, without in (("used", used, 0.8), ("uneven", uneven, 2.0), ("loss", loss, 1.6)):
        columns[f"{what} peer 128^2"] = (with_norm,) * 3
        columns[f"{what} peer 128^2 without norm"] = (without,) * 3
    assert judged(norm, **columns) == verdict


def test_the_arms_have_equal_compute():
    work = {}
    for arm in ("dense", "moe", "peer 128^2"):
        spec = parse_spec(ARMS[arm]["feedforward"])
        layer = build("feedforward", spec, dim=64, hidden=ARMS[arm].get("intermediate_size", 256)).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            layer(torch.randn(1, 4, 64))
        work[arm] = counter.get_total_flops()
    assert work["dense"] == work["peer 128^2"] == 4 * 2 * 2 * 64 * 168
    assert abs(work["moe"] / work["dense"] - 1) < 0.01
