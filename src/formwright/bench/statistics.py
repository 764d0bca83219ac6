"""What seeds and items can tell apart.

Seeds    Candidate and baseline share a seed's data order, so their differences are tested in pairs: t is the
         mean over std / sqrt(n). Several candidates against one baseline are corrected by Holm's step-down rule.
Items    All see the same held-out items, so the difference is also tested over items: McNemar's exact test for right
         or wrong in one seed, otherwise a paired bootstrap of each item's mean over the seeds. It says whether these
         trained models differ, not whether other seeds would.
Power    The smallest difference n pairs find with 80 % power, in units of the std of the differences,
         averaged over the scatter of their estimated std.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from formwright.errors import require

LEVEL = 0.05

Word = Literal["better", "likely better", "not told apart", "likely worse", "worse"]


def mean_and_error(values: Sequence[int | float] | np.ndarray) -> tuple[float, float | None]:
    """The mean and its standard error; one value has none."""
    array = np.asarray(values, dtype=float)
    if len(array) == 0:
        raise ValueError("The mean of no values is not defined.")
    return float(array.mean()), float(array.std(ddof=1) / len(array) ** 0.5) if len(array) > 1 else None


def paired_t(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Two-sided p that the mean difference is zero; none with fewer than two pairs."""
    difference = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    if len(difference) < 2:
        return None
    spread = difference.std(ddof=1) / len(difference) ** 0.5
    if spread <= 1e-9 * max(abs(difference).max(), 1e-9):
        # No scatter: the test is not defined. Two seeds that agree to the last item of a small test set are chance,
        # not proof.
        return None if difference.any() else 1.0
    stats = require("scipy.stats", extra="report")
    return float(2 * stats.t.sf(abs(difference.mean() / spread), len(difference) - 1))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's corrected p values in the given order; none stays none and is not counted."""
    tested = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, place) in enumerate(tested):
        highest = max(highest, min(1.0, p * (len(tested) - rank)))
        corrected[place] = highest
    return corrected


def mcnemar(ours: Sequence[int | float] | np.ndarray, theirs: Sequence[int | float] | np.ndarray) -> float:
    """Exact two-sided p over the items only one of the two got right."""
    a, b = np.asarray(ours, dtype=bool), np.asarray(theirs, dtype=bool)
    won, lost = int((a & ~b).sum()), int((~a & b).sum())
    if won + lost == 0:
        return 1.0
    stats = require("scipy.stats", extra="report")
    return float(min(1.0, 2 * stats.binom.cdf(min(won, lost), won + lost, 0.5)))


def bootstrap(ours: np.ndarray, theirs: np.ndarray, *, draws: int = 10_000, seed: int = 0) -> float:
    """Two-sided p that the mean difference over items is zero, by resampling items; never below 1 / draws.

    Args:
        ours: (seeds, items), theirs likewise, the same seeds and items in the same order.
    """
    difference = (np.atleast_2d(ours) - np.atleast_2d(theirs)).mean(0)
    if not difference.any():
        return 1.0
    generator = np.random.default_rng(seed)
    means = np.empty(draws)
    for start in range(0, draws, 200):  # a few rows at a time: items may be many
        picks = generator.integers(0, len(difference), (min(200, draws - start), len(difference)))
        means[start : start + len(picks)] = difference[picks].mean(1)
    tail = min((means <= 0).sum(), (means >= 0).sum())
    return float(min(1.0, 2 * max(tail, 0.5) / draws))


@cache
def detectable(pairs: int, comparisons: int = 1, power: float = 0.8) -> float | None:
    """The smallest difference found with this power by a paired two-sided t-test, in std of the differences.

    Args:
        pairs: seeds an arm; fewer than two find nothing.
        comparisons: candidates against the one baseline; the level is divided by it.
    """
    if pairs < 2:
        return None
    stats = require("scipy.stats", extra="report")
    optimize = require("scipy.optimize", extra="report")
    freedom = pairs - 1
    limit = stats.t.isf(LEVEL / comparisons / 2, freedom)
    # scipy's noncentral t is NaN for one degree of freedom: average the normal over quantiles of the std instead.
    scatter = np.sqrt(stats.chi2.ppf((np.arange(20_000) + 0.5) / 20_000, freedom) / freedom)

    def missing(size: float) -> float:
        shift = size * pairs**0.5
        return float((stats.norm.sf(limit * scatter - shift) + stats.norm.cdf(-limit * scatter - shift)).mean()) - power

    high = 4.0
    while missing(high) < 0:
        high *= 2
    return float(optimize.brentq(missing, 1e-3, high, xtol=1e-4))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A candidate against the baseline on one metric.

    Attributes:
        values: the candidate's, one a seed.
        mean, error: their mean and its standard error.
        difference: mean of (candidate - baseline) over the seeds both have; none for the baseline.
        p: corrected for the number of candidates, over seeds; `p_items` the same over items.
        smallest: the difference these seeds would have found with 80 % power in a single comparison, or none.
        word: the verdict, in the direction of the metric.
    """

    values: tuple[float, ...]
    mean: float
    error: float | None
    difference: float | None = None
    p: float | None = None
    p_items: float | None = None
    smallest: float | None = None
    word: Word | None = None


def against(
    baseline: dict[int, float],
    candidates: Sequence[dict[int, float]],
    *,
    higher_is_better: bool,
    baseline_items: dict[int, np.ndarray] | None = None,
    items: Sequence[dict[int, np.ndarray]] = (),
) -> list[Comparison]:
    """Each candidate against the baseline; values and items by seed.

    "better" and "worse" need the corrected test over seeds; "likely" that over items, with every seed on the same side.
    """
    pairs = [sorted(set(baseline) & set(one)) for one in candidates]
    tests = [
        paired_t([one[s] for s in seeds], [baseline[s] for s in seeds])
        for one, seeds in zip(candidates, pairs, strict=True)
    ]
    over_items = [_items_test(baseline_items or {}, one) for one in items] or [None] * len(candidates)
    found = []
    for one, seeds, p, p_items in zip(candidates, pairs, holm(tests), holm(over_items), strict=True):
        mean, error = mean_and_error(list(one.values()))
        gaps = np.array([one[s] - baseline[s] for s in seeds])
        factor = detectable(len(seeds))
        spread = gaps.std(ddof=1) if len(gaps) > 1 else 0.0
        found.append(
            Comparison(
                values=tuple(one.values()),
                mean=mean,
                error=error,
                difference=float(gaps.mean()) if len(gaps) else None,
                p=p,
                p_items=p_items,
                # differences equal by chance do not say that any difference at all would be found
                smallest=float(factor * spread) if factor is not None and spread > 1e-9 else None,
                word=word(gaps if higher_is_better else -gaps, p, p_items),
            )
        )
    return found


def word(gains: np.ndarray, p: float | None, p_items: float | None) -> Word:
    """The verdict: gains are positive where the candidate is better, one a seed."""
    if len(gains) and p is not None and p < LEVEL:
        return "better" if gains.mean() > 0 else "worse"
    agree = len(gains) > 0 and ((gains > 0).all() or (gains < 0).all())
    if agree and p_items is not None and p_items < LEVEL:
        return "likely better" if gains.mean() > 0 else "likely worse"
    return "not told apart"


def _items_test(theirs: dict[int, np.ndarray], ours: dict[int, np.ndarray]) -> float | None:
    seeds = sorted(s for s in set(theirs) & set(ours) if theirs[s].shape == ours[s].shape)
    if not seeds:
        return None
    binary = all(np.isin(one[s], (0, 1)).all() for one in (theirs, ours) for s in seeds)
    if len(seeds) == 1 and binary:
        return mcnemar(ours[seeds[0]], theirs[seeds[0]])
    return bootstrap(np.stack([ours[s] for s in seeds]), np.stack([theirs[s] for s in seeds]))


def pareto(points: Sequence[tuple[float, float]], *, higher_is_better: bool) -> list[int]:
    """Places of the points (cost, quality) that no other beats in both, by rising cost."""
    sign = 1 if higher_is_better else -1
    best, front = -np.inf, []
    for place in sorted(range(len(points)), key=lambda i: (points[i][0], -sign * points[i][1])):
        if sign * points[place][1] > best:
            best = sign * points[place][1]
            front.append(place)
    return front
