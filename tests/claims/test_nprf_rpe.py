"""The rule of NPRF's claim gives each verdict for outcomes that earn it."""

import pytest

from formwright.claims import Outcome, nprf_rpe


def outcome(loss, others, *, stands=0.018, theirs=0.006):
    rest = {f"{arm}, loss": others for arm in nprf_rpe.KERNELS if arm != nprf_rpe.OURS}
    rest |= {"softmax + RPE, loss": 1.0, "PRF + RPE, stands": theirs}
    return Outcome(
        scale="full",
        seed=0,
        measured={f"{nprf_rpe.OURS}, loss": loss, f"{nprf_rpe.OURS}, stands": stands},
        baseline=rest,
    )


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        ([outcome(1.9, 2.0), outcome(1.8, 2.2)], "holds"),
        ([outcome(1.9, 2.0), outcome(2.3, 2.25)], "holds in direction"),
        ([outcome(1.9, 2.0, theirs=0.054)], "holds in direction"),
        ([outcome(2.0, 2.0), outcome(1.9, 1.9)], "does not hold here"),
    ],
)
def test_nprf(outcomes, verdict):
    assert nprf_rpe.verdict(outcomes) == verdict
