"""The rules of the claims on extrapolation give each verdict for outcomes that earn it."""

import pytest

from formwright.claims import Outcome
from formwright.claims import exploring_extrapolation as claim


def outcome(flat, steep, rho=0.0):
    rises = {f"{name}, rise": flat for name in claim.CONVERGENT} | {f"{name}, rise": steep for name in claim.DIVERGENT}
    return Outcome(scale="full", seed=0, measured=rises | {"rho": rho})


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        ([outcome(-0.02, 0.02), outcome(0.01, 0.5)], "holds"),
        ([outcome(-0.02, 0.02), outcome(0.011, 0.5)], "holds in direction"),
        ([outcome(-0.03, -0.02), outcome(-0.03, 0.0)], "holds in direction"),
        ([outcome(0.0, 0.02), outcome(0.0, -0.02)], "does not hold here"),
    ],
)
def test_longer_texts(outcomes, verdict):
    assert claim.longer(outcomes) == verdict


@pytest.mark.parametrize(
    ("rho", "verdict"),
    [((0.8, 0.9), "holds"), ((0.7, 0.9), "holds in direction"), ((-0.1, 0.05), "does not hold here")],
)
def test_receptive_fields(rho, verdict):
    assert claim.told([outcome(0.0, 0.0, one) for one in rho]) == verdict


def test_the_correlation_of_ranks():
    stats = pytest.importorskip("scipy.stats")
    for pairs in ([(1, 2), (2, 1), (3, 5), (9, 4)], [(1, 1), (1, 2), (3, 2), (4, 9)], [(5, 1), (4, 2), (3, 3)]):
        assert claim.spearman(pairs) == pytest.approx(stats.spearmanr(*zip(*pairs, strict=True)).statistic)
    assert claim.spearman([(1, 2), (1, 3)]) == 0
