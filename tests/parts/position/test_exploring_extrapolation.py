"""The fixed biases: exact properties, then independent implementations."""

import math
from typing import get_args

import pytest
import torch

from formwright.contracts import Context, Toeplitz, UnsupportedContext
from formwright.errors import FormwrightError
from formwright.ops.relative_kernels import KERNELS
from formwright.parts.position.alibi import ALiBi
from formwright.parts.position.exploring_extrapolation import Decay, Name

N = 63


@pytest.mark.parametrize("kernel", get_args(Name))
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (3, N)])
def test_every_bias_is_its_formula_of_slope_times_distance(kernel, queries, keys):
    formulas = {
        "exponential": lambda y: -y,
        "type-1": lambda y: -math.log(1 + y**2),
        "type-2": lambda y: -(math.log(3 + y) ** 2),
        "log-over-square": lambda y: math.log((1 + math.log(1 + y)) / (1 + y) ** 2),
        "power-1/2": lambda y: -math.sqrt(y),
        "power-3/4": lambda y: -0.5 * y**0.75,
        "power-5/4": lambda y: -(y**1.25),
        "power-2": lambda y: -(y**2),
        "power-4": lambda y: -(y**4),
        "inverse": lambda y: math.log(1 / (1 + y)),
        "inverse-log": lambda y: math.log(1 / ((3 + y) ** 1 * math.log(3 + y))),
    }
    found = Decay(heads=4, kernel=kernel).bias(Context(queries=queries, keys=keys))
    assert isinstance(found, Toeplitz)
    expected = [
        [[formulas[kernel](2.0 ** -(2 * h) * abs(i - j)) for j in range(keys)] for i in range(keys - queries, keys)]
        for h in range(1, 5)
    ]
    torch.testing.assert_close(found.dense(), torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_the_kernels_are_those_of_the_theory():
    assert set(get_args(Name)) == set(KERNELS)


@pytest.mark.parametrize(("kernel", "start"), [("type-1", 0.0), ("exponential", 0.0), ("type-2", -(math.log(3) ** 2))])
def test_the_query_itself_gets_the_papers_number(kernel, start):
    dense = Decay(heads=4, kernel=kernel).bias(Context(queries=N, keys=N)).dense()
    torch.testing.assert_close(dense.diagonal(dim1=1, dim2=2), torch.full((4, N), start))


def test_a_constant_does_not_change_attention():
    dense = Decay(heads=4, kernel="type-2").bias(Context(queries=N, keys=N)).dense()
    scores = torch.randn(4, N, N, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close((scores + dense).softmax(-1), (scores + dense + math.log(3) ** 2).softmax(-1))


def test_the_exponential_is_alibi():
    context = Context(queries=7, keys=9)
    for heads in (4, 6):
        assert torch.equal(
            Decay(heads=heads, kernel="exponential").bias(context).dense(), ALiBi(heads=heads).bias(context).dense()
        )


@pytest.mark.parametrize("kernel", ["type-1", "power-5/4"])
def test_given_positions_find_what_the_diagonals_hold(kernel):
    part = Decay(heads=3, kernel=kernel)
    given = part.bias(Context(queries=4, keys=9, positions=torch.arange(9).expand(2, 9) + 1000))
    torch.testing.assert_close(given[1], part.bias(Context(queries=4, keys=9)).dense())


@pytest.mark.reference
@pytest.mark.parametrize("heads", [8, 12])
def test_the_exponential_equals_the_bias_of_bloom(heads):
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    theirs = bloom.build_alibi_tensor(torch.ones(1, N), heads, torch.float32)  # m_h j, a constant per row away
    scores = torch.randn(heads, N, N, generator=torch.Generator().manual_seed(0))
    scores = scores.masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf)
    ours = Decay(heads=heads, kernel="exponential").bias(Context(queries=N, keys=N)).dense()
    torch.testing.assert_close((scores + ours).softmax(-1), (scores + theirs).softmax(-1))


@pytest.mark.reference
@pytest.mark.parametrize("heads", [4, 8])
def test_type_1_weighs_keys_as_a_cauchy_distribution_of_scipy(heads):
    """exp(r) = 1 / (1 + (m t)^2) is the density of a Cauchy variable of scale 1 / m, but for a constant."""
    stats = pytest.importorskip("scipy.stats")
    bias = Decay(heads=heads).bias(Context(queries=1, keys=N)).dense()[:, 0]
    distances = range(N - 1, -1, -1)
    theirs = [stats.cauchy.logpdf(distances, scale=2.0 ** (8 * h / heads)) for h in range(1, heads + 1)]
    expected = torch.tensor([list(row) for row in theirs]).softmax(-1).float()
    torch.testing.assert_close(bias.softmax(-1), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("asked", "says"), [({"memory": torch.zeros(1, 5, 8)}, "cross"), ({"grid": (2, 2)}, "grid")])
def test_what_it_cannot_honour_raises(asked, says):
    with pytest.raises(UnsupportedContext, match=says):
        Decay(heads=4).bias(Context(queries=4, keys=4, **asked))


def test_impossible_options_are_named():
    with pytest.raises(FormwrightError, match="heads >= 1"):
        Decay(heads=0)
    with pytest.raises((FormwrightError, TypeError), match="type-1"):  # the type first where types are checked
        Decay(heads=1, kernel="type-3")
