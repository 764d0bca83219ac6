"""The verdicts of RTS and Protoformer: all three words occur, and follow from the numbers alone."""

import pytest

from formwright.claims import Outcome
from formwright.claims.protoformer import NOISE, better, repairs
from formwright.claims.rts_objectives import as_good, faster, maskless


def outcome(measured, baseline=None):
    return Outcome(scale="full", seed=0, measured=measured, baseline=baseline or {})


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ([(1.3, 1.9), (1.2, 1.5)], "holds"),
        ([(1.3, 1.9), (1.1, 1.5)], "holds in direction"),
        ([(1.3, 1.9), (0.9, 1.5), (0.7, 1.5)], "does not hold here"),
        ([(1.3, 0.9)], "does not hold here"),
    ],
)
def test_rts_is_faster(ratios, said):
    told = [outcome({"speed over mlm": mlm, "speed over electra": electra}) for mlm, electra in ratios]
    assert faster(told) == said


def accuracies(**arms):
    return outcome({"rts, accuracy": arms.pop("rts", 0.7)}, {f"{arm}, accuracy": value for arm, value in arms.items()})


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        ([{"rts": 0.70, "none": 0.6, "mlm": 0.705, "electra": 0.69}], "holds"),
        ([{"rts": 0.70, "none": 0.6, "mlm": 0.72, "electra": 0.69}], "holds in direction"),
        (
            [
                {"rts": 0.60, "none": 0.61, "mlm": 0.6, "electra": 0.6},
                {"rts": 0.70, "none": 0.6, "mlm": 0.7, "electra": 0.7},
            ],
            "holds in direction",
        ),
        ([{"rts": 0.60, "none": 0.61, "mlm": 0.6, "electra": 0.6}], "does not hold here"),
        ([{"rts": 0.70, "none": 0.6, "mlm": 0.69, "electra": 0.75}], "does not hold here"),
    ],
)
def test_rts_is_as_good(seeds, said):
    assert as_good([accuracies(**seed) for seed in seeds]) == said


@pytest.mark.parametrize(
    ("gains", "said"),
    [([0.01, 0.02], "holds"), ([-0.01, 0.02], "holds in direction"), ([-0.02, 0.01], "does not hold here")],
)
def test_slm_is_better(gains, said):
    assert maskless([outcome({"slm, accuracy": 0.7 + gain}, {"mlm, accuracy": 0.7}) for gain in gains]) == said


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ([(-0.5, 1.0, 3.0), (0.0, 1.5, 2.0)], "holds"),
        ([(-0.5, 0.5, 3.0), (0.0, 0.9, 2.0)], "holds in direction"),
        ([(0.0, -0.5, 3.0), (0.0, 4.0, 2.0)], "holds in direction"),
        ([(-2.0, 1.0, 3.0), (-1.0, 1.5, 2.0)], "does not hold here"),
        ([(0.0, 1.0, -3.0), (0.0, 1.5, 2.0)], "does not hold here"),
    ],
)
def test_protoformer_is_better(gains, said):
    told = [
        outcome(
            {f"protoformer, {noise} %, accuracy": 0.7 + gain / 100 for noise, gain in zip(NOISE, seed, strict=True)},
            {f"plain, {noise} %, accuracy": 0.7 for noise in NOISE},
        )
        for seed in gains
    ]
    assert better(told) == said


@pytest.mark.parametrize(
    ("right", "said"),
    [
        ([(0.9, 0.81, 0.61)], "holds"),
        ([(0.9, 0.7, 0.59), (0.9, 0.7, 0.65)], "holds in direction"),
        ([(0.9, 0.9, 0.59)], "does not hold here"),
    ],
)
def test_labels_are_repaired(right, said):
    told = [
        outcome({f"protoformer, {noise} %, repaired": value for noise, value in zip(NOISE, seed, strict=True)})
        for seed in right
    ]
    assert repairs(told) == said
