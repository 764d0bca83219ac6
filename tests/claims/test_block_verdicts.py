"""The verdicts of the claims about blocks, on made-up outcomes."""

import pytest

from formwright.claims import Outcome, magneto, turner_introduction


def stability(ours=(1.5, 2e-2), pre=(1.6, 1e-2), post=(1.7, 3e-3), growth=(0.0, 0.5)):
    def arm(name, loss, stands, grows):
        return {f"{name}, loss": loss, f"{name}, stands": stands, f"{name}, growth": grows}

    baseline = arm("pre", *pre, 0.4) | arm("post", *post, growth[1])
    return Outcome(scale="full", seed=0, measured=arm("magneto", *ours, growth[0]), baseline=baseline)


@pytest.mark.parametrize(
    ("outcomes", "wanted"),
    [
        ([stability()], "holds"),
        ([stability(), stability(pre=(1.4, 2e-2))], "does not hold here"),  # equal means are no win
        ([stability(ours=(1.5, 3e-3))], "holds in direction"),
        ([stability(), stability(ours=(1.5, 3e-3))], "holds in direction"),
        ([stability(post=(1.4, 3e-3))], "does not hold here"),
    ],
)
def test_magneto_must_stand_the_rates_and_end_lowest(outcomes, wanted):
    assert magneto.better(outcomes) == wanted


@pytest.mark.parametrize(
    ("growths", "wanted"),
    [
        ([(0.05, 0.5)], "holds"),
        ([(0.05, 0.5), (0.2, 0.5)], "holds in direction"),
        ([(0.05, 0.04)], "does not hold here"),
        ([(0.9, 0.5)], "does not hold here"),
    ],
)
def test_magneto_must_not_grow_with_depth(growths, wanted):
    assert magneto.steady([stability(growth=pair) for pair in growths]) == wanted


def text(two=1.9, pre=1.8, post=2.2):
    measured = {"two layers": two, "pre-norm": pre}
    return Outcome(scale="full", seed=0, measured=measured, baseline={"unigram": 3.1, "bigram": 2.5, "post-norm": post})


@pytest.mark.parametrize(
    ("outcomes", "wanted"),
    [
        ([text()], "holds"),
        ([text(), text(two=2.7)], "holds in direction"),
        ([text(), text(two=3.3)], "does not hold here"),
    ],
)
def test_text_is_predicted_when_frequencies_are_beaten(outcomes, wanted):
    assert turner_introduction.predicts(outcomes) == wanted


@pytest.mark.parametrize(
    ("outcomes", "wanted"),
    [
        ([text()], "holds"),
        ([text(), text(post=1.85)], "holds in direction"),
        ([text(post=1.7)], "does not hold here"),
    ],
)
def test_pre_norm_must_win_by_a_margin_in_every_seed(outcomes, wanted):
    assert turner_introduction.before(outcomes) == wanted
