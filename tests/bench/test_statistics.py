"""Statistics against answers known by hand, by SciPy, and from the table of detectable differences."""

import numpy as np
import pytest

from formwright.bench import statistics
from formwright.bench.statistics import against, detectable, holm, mcnemar, mean_and_error, paired_t, pareto

stats = pytest.importorskip("scipy.stats")


def test_mean_and_error_of_one_two_and_three():
    assert mean_and_error([1, 2, 3]) == (2.0, pytest.approx(1 / 3**0.5))
    assert mean_and_error([4.0]) == (4.0, None)


def test_paired_t_equals_scipy():
    ours, theirs = [0.91, 0.94, 0.93, 0.97], [0.90, 0.90, 0.93, 0.91]
    assert paired_t(ours, theirs) == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)


def test_seeds_without_scatter_prove_nothing():
    assert paired_t([0.5, 0.6], [0.5, 0.6]) == 1.0
    assert paired_t([0.52, 0.62], [0.5, 0.6]) is None
    assert paired_t([0.5], [0.4]) is None


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_holm_counts_only_what_was_tested():
    assert holm([None, 0.02, None]) == [None, 0.02, None]


def test_mcnemar_by_hand():
    ours, theirs = [1] * 8 + [0] * 2 + [1] * 20, [0] * 8 + [1] * 2 + [1] * 20
    assert mcnemar(ours, theirs) == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    assert mcnemar([1, 0, 1], [1, 0, 1]) == 1.0


def test_bootstrap_finds_a_plain_difference_and_no_other():
    rng = np.random.default_rng(0)
    base = (rng.random((2, 500)) < 0.8).astype(float)
    better = np.maximum(base, rng.random((2, 500)) < 0.4)
    same = (rng.random((2, 500)) < 0.8).astype(float)
    assert statistics.bootstrap(better, base) < 0.001
    assert statistics.bootstrap(same, base) > 0.05
    assert statistics.bootstrap(base, base) == 1.0


def test_bootstrap_does_not_depend_on_direction():
    rng = np.random.default_rng(1)
    a, b = rng.random((1, 63)), rng.random((1, 63))
    assert statistics.bootstrap(a, b) == pytest.approx(statistics.bootstrap(b, a))


@pytest.mark.parametrize(("pairs", "sizes"), [(2, 11.6), (3, 3.3), (4, 2.1), (5, 1.7), (8, 1.2), (10, 1.0), (20, 0.7)])
def test_the_smallest_difference_n_seeds_find(pairs, sizes):
    assert detectable(pairs) == pytest.approx(sizes, abs=0.06)


def test_the_smallest_difference_has_the_power_it_says():
    rng = np.random.default_rng(0)
    gaps = rng.normal(detectable(5), 1.0, (20_000, 5))
    t = gaps.mean(1) / (gaps.std(1, ddof=1) / 5**0.5)
    assert np.mean(2 * stats.t.sf(abs(t), 4) < 0.05) == pytest.approx(0.8, abs=0.01)


def test_equal_differences_do_not_say_that_anything_would_be_found():
    [equal] = against(seeds(0.5, 0.6), [seeds(0.52, 0.62)], higher_is_better=True)
    [scattered] = against(seeds(0.5, 0.6), [seeds(0.52, 0.63)], higher_is_better=True)
    assert equal.smallest is None
    assert scattered.smallest == pytest.approx(detectable(2) * 0.01 / 2**0.5)


def seeds(*values):
    return dict(enumerate(values))


@pytest.mark.parametrize(
    ("candidate", "higher", "word"),
    [
        ((0.95, 0.96, 0.955, 0.951, 0.959), True, "better"),
        ((0.95, 0.96, 0.955, 0.951, 0.959), False, "worse"),
        ((0.85, 0.86, 0.855, 0.851, 0.859), True, "worse"),
        ((0.91, 0.89, 0.905, 0.902, 0.90), True, "not told apart"),
    ],
)
def test_verdicts_over_seeds(candidate, higher, word):
    baseline = seeds(0.90, 0.902, 0.899, 0.903, 0.90)
    assert against(baseline, [seeds(*candidate)], higher_is_better=higher)[0].word == word


@pytest.mark.parametrize(("second", "word"), [(0.98, "likely better"), (0.895, "not told apart")])
def test_likely_needs_the_items_and_every_seed(second, word):
    items = {0: np.repeat([1.0, 0.0], [450, 50]), 1: np.repeat([1.0, 0.0], [450, 50])}
    more = {0: np.repeat([1.0, 0.0], [480, 20]), 1: np.repeat([1.0, 0.0], [485, 15])}
    found = against(
        seeds(0.90, 0.90), [seeds(0.96, second)], higher_is_better=True, baseline_items=items, items=[more]
    )[0]
    assert found.p > 0.05
    assert found.p_items < 0.05
    assert found.word == word


def test_candidates_are_paired_by_the_seeds_both_have():
    found = against({0: 0.5, 1: 0.6, 2: 0.7}, [{1: 0.7, 2: 0.8, 9: 0.0}], higher_is_better=True)[0]
    assert found.difference == pytest.approx(0.1)


def test_p_is_corrected_for_the_number_of_candidates():
    baseline, candidate = seeds(0.5, 0.52, 0.51), seeds(0.55, 0.56, 0.58)
    alone = against(baseline, [candidate], higher_is_better=True)[0].p
    noise = [seeds(0.5, 0.53, 0.50), seeds(0.52, 0.51, 0.51)]
    assert against(baseline, [candidate, *noise], higher_is_better=True)[0].p == pytest.approx(3 * alone)


def test_the_front_holds_what_nothing_beats():
    points = [(3.0, 0.9), (1.0, 0.5), (2.0, 0.4), (4.0, 0.9), (2.5, 0.7)]
    assert pareto(points, higher_is_better=True) == [1, 4, 0]
    assert pareto([(1.0, 5.0), (2.0, 3.0), (3.0, 4.0)], higher_is_better=False) == [0, 1]
