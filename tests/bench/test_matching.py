"""Widths are found on made-up budgets, whose answers are known, and on real models."""

import pytest

from formwright.bench.matching import match
from formwright.errors import FormwrightError


def parameters(config, extra=0):
    """A block's: four matrices of attention, two of the feed-forward."""
    d = config["hidden_size"]
    return 4 * d * d + 2 * d * (config.get("intermediate_size") or 4 * d) + extra


BASE = {"hidden_size": 64, "num_attention_heads": 4}


def test_equal_budgets_are_left_alone():
    assert match(BASE, parameters(BASE), parameters, 0.01) == (BASE, 1.0)


@pytest.mark.parametrize("extra", [7, 2_000, -3_000])
def test_the_feedforward_is_turned_first(extra):
    found, ratio = match(BASE, parameters(BASE), lambda c: parameters(c, extra), 0.01)
    assert found["hidden_size"] == 64
    assert abs(ratio - 1) <= 0.01
    assert ratio == parameters(found, extra) / parameters(BASE)


def test_the_nearest_of_all_widths_is_chosen():
    found, ratio = match(BASE, 40_000, parameters, 0.01)
    best = min(range(64, 513), key=lambda w: abs(parameters({**BASE, "intermediate_size": w}) - 40_000))
    assert found["intermediate_size"] == best
    assert abs(ratio - 1) <= 0.01


@pytest.mark.parametrize("factor", [0.2, 5])
def test_what_the_feedforward_cannot_reach_the_width_does(factor):
    target = factor * parameters(BASE)
    found, ratio = match(BASE, target, parameters, 0.01)
    assert found["hidden_size"] != 64
    assert found["hidden_size"] % 4 == 0
    assert abs(ratio - 1) <= 0.01


def test_a_width_under_comparison_is_held():
    target = 1.3 * parameters(BASE)
    found, _ = match(BASE, target, parameters, 0.01, held=["hidden_size"])
    assert found["hidden_size"] == 64
    with pytest.raises(FormwrightError, match=r"costs 0\.7692 times the baseline.*match=none"):
        match(BASE, target, parameters, 0.01, held=["hidden_size", "intermediate_size"])


def test_out_of_reach_names_the_nearest():
    with pytest.raises(FormwrightError, match="the nearest, with hidden_size 256"):
        match(BASE, 1e9, parameters, 0.01)
