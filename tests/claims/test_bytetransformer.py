"""What padding-free execution has to show for its verdict."""

import pytest

from formwright.claims import Outcome
from formwright.claims.bytetransformer import SHARES, verdict


def outcome(**changed: float) -> Outcome:
    measured = {f"largest difference, {share}": 1e-6 for share in SHARES}
    measured |= {f"over padded, {share}": 2.0 for share in SHARES}
    measured |= {f"over sorted, {share}": 1.5 for share in SHARES}
    measured |= {f"over our layers with padding, {share}": 1.4 for share in SHARES}
    return Outcome(scale="full", seed=0, measured=measured | changed)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, "holds"),
        ({"over padded, 0.6": 1.54}, "holds in direction"),
        ({"over sorted, 0.6": 0.9}, "holds in direction"),
        ({"over our layers with padding, 0.6": 0.99}, "holds in direction"),
        ({"over padded, 1.0": 0.94}, "holds in direction"),
        ({"over padded, 1.0": 0.96}, "holds"),
        ({"over padded, 0.6": 0.99}, "does not hold here"),
        ({"largest difference, 0.9": 2e-5}, "does not hold here"),
    ],
)
def test_one_seed_that_fails_decides(changed: dict[str, float], expected: str) -> None:
    assert verdict([outcome(), outcome(**changed), outcome()]) == expected
