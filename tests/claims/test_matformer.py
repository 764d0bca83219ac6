"""The verdicts of MatFormer's claims, on made-up outcomes."""

import pytest

from formwright.claims import Outcome, matformer


def nested(gaps=(0.04, 0.03, 0.02, 0.01), excess=(0.005, 0.03), agreement=(0.8, 0.7), same=1):
    measured = {f"gap, sample, size {i}": gap for i, gap in enumerate(gaps, 1)}
    measured |= {"median excess": excess[0], "excess of 19 in 20": excess[1]}
    measured |= {"agreement": agreement[0], "text is the largest's own": same}
    return Outcome(scale="full", seed=0, measured=measured, baseline={"agreement, twins": agreement[1]})


@pytest.mark.parametrize(
    ("outcomes", "wanted"),
    [
        ([nested()], "holds"),
        ([nested(), nested(gaps=(0.08, 0.03, 0.02, 0.01))], "holds in direction"),
        ([nested(gaps=(0.3, 0.1, 0.1, 0.1))], "does not hold here"),
    ],
)
def test_every_size_must_be_near_its_twin(outcomes, wanted):
    assert matformer.gap_verdict(outcomes) == wanted


@pytest.mark.parametrize(
    ("outcomes", "wanted"),
    [
        ([nested()], "holds"),
        ([nested(excess=(-0.01, 0.06))], "holds in direction"),
        ([nested(), nested(excess=(0.04, 0.06))], "holds in direction"),
        ([nested(excess=(0.06, 0.1))], "does not hold here"),
    ],
)
def test_mixtures_must_lie_on_the_line(outcomes, wanted):
    assert matformer.line_verdict(outcomes) == wanted


@pytest.mark.parametrize(
    ("outcomes", "wanted"),
    [
        ([nested()], "holds"),
        ([nested(), nested(agreement=(0.6, 0.65))], "holds in direction"),
        ([nested(), nested(same=0)], "does not hold here"),
        ([nested(agreement=(0.6, 0.7))], "does not hold here"),
    ],
)
def test_a_drafter_must_leave_the_text_and_agree_more_often(outcomes, wanted):
    assert matformer.drafting_verdict(outcomes) == wanted


def test_a_point_between_sizes_is_read_from_the_line():
    line = [(100, 2.0), (200, 1.8), (400, 1.7)]
    assert [matformer.between(line, x) for x in (100, 150, 200, 300, 400)] == pytest.approx([2.0, 1.9, 1.8, 1.75, 1.7])
