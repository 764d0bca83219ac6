"""The verdicts of outlier-free attention on made-up outcomes, its quantizer and its data."""

import pytest
import torch

from formwright.claims import Outcome, load
from formwright.claims.outlier_free_attention import LENGTH, TRIGGERS, Range, chain

claim = load("outlier-free-attention").claims[0]
WHATS = ("loss", "kurtosis", "infinity norm", "rise at 8 bits", "rise at 6 bits")
VANILLA = (1.0, 100.0, 50.0, 0.5, 0.9)


def judged(*clipped, gated=(1.0, 9.0, 5.0, 0.1, 0.2)):
    def named(name, values):
        return {f"{name}, {what}": value for what, value in zip(WHATS, values, strict=True)}

    return claim.judge(
        [
            Outcome(
                scale="full",
                seed=seed,
                measured=named("clipped softmax", values) | named("gated attention", gated),
                baseline=named("vanilla", VANILLA),
            )
            for seed, values in enumerate(clipped)
        ]
    )


GOOD = (1.01, 10.0, 5.0, 0.1, 0.2)


@pytest.mark.parametrize(
    ("clipped", "verdict"),
    [
        ((GOOD, GOOD, GOOD), "holds"),
        ((GOOD, GOOD, (1.01, 110.0, 5.0, 0.1, 0.2)), "holds in direction"),  # kurtosis above in one seed
        ((GOOD, GOOD, (1.01, 10.0, 5.0, 0.6, 0.2)), "holds in direction"),  # 8 bits cost more in one seed
        ((GOOD, GOOD, (1.10, 10.0, 5.0, 0.1, 0.2)), "does not hold here"),  # the mean loss is 0.04 above
        (((1.0, 110.0, 60.0, 0.1, 0.2),) * 3, "does not hold here"),  # larger outliers by both measures
        (((1.0, 110.0, 5.0, 0.1, 1.0),) * 3, "does not hold here"),  # 6 bits cost more
    ],
)
def test_both_methods_are_judged(clipped, verdict):
    assert judged(*clipped) == verdict
    assert judged(*clipped, gated=VANILLA) == "does not hold here"


@pytest.mark.parametrize(("bits", "error"), [(8, 2 / 255 / 2), (4, 2 / 15 / 2)])
def test_a_range_watches_and_then_rounds_to_its_steps(bits, error):
    layer = torch.nn.Linear(3, 3)
    reads = Range(layer, bits, reads=True)
    x = torch.tensor([[-1.0, 0.3, 1.0]])
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
    reads.watching = False
    rounded = reads(x)
    assert 0 < (rounded - x).abs().max() <= error * 1.01
    assert reads(5 * x).max() <= 1 + error  # beyond the range it is cut


def test_a_trigger_brings_back_the_token_before_it():
    rows = chain(64, seed=3)
    before, trigger, after = rows[:, 1:-2], rows[:, 2:-1], rows[:, 3:]
    triggered = (trigger >= 1) & (trigger <= TRIGGERS)
    assert rows.shape == (64, LENGTH)
    assert triggered.any()
    assert torch.equal(after[triggered], before[triggered])
    assert not torch.equal(after[~triggered], before[~triggered])
    assert (rows[:, 0] == 0).all()
    assert (rows[:, 1:] != 0).all()
