"""Series of relative kernels: sums and integrals in closed form, then by scipy."""

import math
import sys
from itertools import pairwise
from subprocess import run

import pytest
import torch

from formwright.ops.relative_kernels import (
    KERNELS,
    LEARNED,
    Kernel,
    Series,
    alibi_slopes,
    described,
    kerple_series,
    stretched,
    upper_gamma,
)

CONVERGENT = [name for name, kernel in KERNELS.items() if kernel.integral is not None]
SLOPES = (0.5, 1 / 16, 1 / 256)


def test_the_papers_verdicts():
    assert {name: kernel.series(0.5).converges for name, kernel in KERNELS.items()} == {
        "exponential": True,
        "type-1": True,
        "type-2": True,
        "log-over-square": True,
        "power-1/2": True,
        "power-3/4": True,
        "power-5/4": True,
        "power-2": True,
        "power-4": True,
        "inverse": False,
        "inverse-log": False,
    }


@pytest.mark.parametrize(("r1", "converges"), [(0.5, False), (1.0, False), (1.01, True), (2.0, True)])
def test_kerples_logarithm_converges_above_an_exponent_of_one(r1, converges):
    series = kerple_series("log", r1, 0.3)
    assert series.converges == converges
    assert math.isinf(series.receptive_field()) != converges
    assert kerple_series("power", r1, 0.3).converges


@pytest.mark.parametrize("slope", alibi_slopes(8))
@pytest.mark.parametrize("epsilon", [0.5, 0.1, 0.01, 1e-4])
def test_alibis_field_is_that_of_the_geometric_series(slope, epsilon):
    series = KERNELS["exponential"].series(slope)
    assert series.receptive_field(epsilon) == math.ceil(math.log(1 / epsilon) / slope)
    for j in (0, 1, 63, 64, 65, 500):
        assert series.beyond(j) == pytest.approx(
            math.exp(-slope * j) / (1 - math.exp(-slope)), rel=2e-5
        )  # two correction terms


@pytest.mark.parametrize("slope", SLOPES)
def test_the_sum_of_one_over_n_squared_is_known(slope):
    total = 0.5 + math.pi / (2 * slope) / math.tanh(math.pi / slope)
    assert KERNELS["type-1"].series(slope).beyond(0) == pytest.approx(total, rel=1e-9)


def test_halving_epsilon_doubles_the_field_of_one_over_n_squared():
    fields = [KERNELS["type-1"].series(1 / 16).receptive_field(0.01 / 2**i) for i in range(6)]
    for near, far in pairwise(fields):
        assert far / near == pytest.approx(2, rel=0.02)


def test_type_2_reaches_less_far_than_type_1_as_epsilon_falls():
    fields = {
        name: [KERNELS[name].series(1 / 16).receptive_field(epsilon) for epsilon in (0.01, 1e-4, 1e-6)]
        for name in ("type-1", "type-2")
    }
    ratios = [one / two for one, two in zip(fields["type-1"], fields["type-2"], strict=True)]
    assert ratios == sorted(ratios)
    assert ratios[-1] > 100


@pytest.mark.parametrize("name", CONVERGENT)
@pytest.mark.parametrize("slope", SLOPES)
def test_sums_beyond_are_those_of_the_terms(name, slope):
    """Two far ends differ by the terms between them, and the field is where its definition says."""
    series = KERNELS[name].series(slope)
    total = series.beyond(0)
    for j, k in ((0, 10), (3, 200), (70, 3000)):
        terms = math.fsum(series.b(t) for t in range(j, k))
        assert series.beyond(j) - series.beyond(k) == pytest.approx(terms, rel=1e-5, abs=1e-9 * total)
    for epsilon in (0.3, 0.01):
        field = series.receptive_field(epsilon)
        assert series.beyond(field) < epsilon * total <= series.beyond(field - 1)


@pytest.mark.parametrize("name", list(KERNELS))
def test_kernels_fall_and_take_numbers_and_arrays_alike(name):
    kernel: Kernel = KERNELS[name]
    y = torch.linspace(0, 40, 81, dtype=torch.float64)
    values = kernel.r(y, torch.log)
    assert values.diff().max() < 0
    assert values.tolist() == pytest.approx([kernel.r(float(one), math.log) for one in y])


def test_a_constant_does_not_change_a_field():
    series = KERNELS["type-2"].series(0.25)
    higher = Series(r=lambda t: series.r(t) + 1.2, integral=lambda t: series.integral(t) * math.exp(1.2))
    assert higher.receptive_field() == series.receptive_field()


@pytest.mark.parametrize("name", ["exponential", "type-1", "type-2"])
@pytest.mark.parametrize("n", [7, 512, 4096])
def test_attention_to_a_window_is_within_the_bound(name, n):
    series = KERNELS[name].series(1 / 16)
    random = torch.Generator().manual_seed(0)
    scores = torch.rand(n, generator=random, dtype=torch.float64) * 2 - 1  # of the last query, at most 1
    values = torch.nn.functional.normalize(torch.randn(n, 5, generator=random, dtype=torch.float64), dim=-1)
    bias = torch.tensor([series.r(t) for t in reversed(range(n))], dtype=torch.float64)
    full = (scores + bias).softmax(-1) @ values
    for window in (1, 16, 100, 1000):
        near = (scores + bias)[-window:].softmax(-1) @ values[-window:]
        assert (full - near).norm() <= series.window_error(window, scores=1.0, values=1.0)


def test_a_divergent_series_has_no_bound():
    series = KERNELS["inverse"].series(1.0)
    assert math.isinf(series.beyond(100))
    assert math.isinf(series.window_error(100, scores=1.0, values=1.0))


@pytest.mark.reference
@pytest.mark.parametrize("name", CONVERGENT)
@pytest.mark.parametrize("slope", SLOPES)
def test_integrals_equal_scipys(name, slope):
    integrate = pytest.importorskip("scipy.integrate")
    series = KERNELS[name].series(slope)
    for start in (0.0, 1.0, 70.0):
        # on a logarithmic scale, where slow falls are short
        found, _ = integrate.quad(lambda u, s=start: series.b(s + math.expm1(u)) * math.exp(u), 0, 60, limit=500)
        assert series.integral(start) == pytest.approx(found, rel=1e-6, abs=1e-12)


@pytest.mark.reference
@pytest.mark.parametrize("s", [0.25, 0.5, 0.8, 4 / 3, 2.0, 50.0])
@pytest.mark.parametrize("x", [0.0, 1e-3, 0.7, 2.0, 30.0, 300.0])
def test_the_incomplete_gamma_function_equals_scipys(s, x):
    special = pytest.importorskip("scipy.special")
    assert upper_gamma(s, x) == pytest.approx(special.gammaincc(s, x) * special.gamma(s), rel=1e-9, abs=1e-250)
    assert stretched(1.0, 1.0)(x) == pytest.approx(math.exp(-x))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("exponential", "yes: the sum of exp(-n) converges; 99% of it is within 10 to 1179 tokens in 8 heads"),
        ("inverse", "no: the sum of 1 / n diverges"),
        *LEARNED.items(),
    ],
)
def test_a_kernel_in_a_line(name, says):
    assert described(name) == says


def test_it_needs_no_torch():
    words = "import sys, formwright.ops.relative_kernels; print(sorted({'torch', 'numpy'} & sys.modules.keys()))"
    assert run([sys.executable, "-c", words], capture_output=True, text=True, check=True).stdout == "[]\n"
