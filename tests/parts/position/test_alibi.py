"""ALiBi: exact properties, then an independent implementation."""

import pytest
import torch

from formwright.contracts import Context, Toeplitz, UnsupportedContext
from formwright.errors import FormwrightError
from formwright.parts.position.alibi import ALiBi, alibi_slopes


def dense(heads, queries, keys):
    return ALiBi(heads=heads).bias(Context(queries=queries, keys=keys)).dense()


def test_eight_heads_halve_from_one_half():
    assert alibi_slopes(8) == [2.0**-h for h in range(1, 9)]


@pytest.mark.parametrize(("heads", "power"), [(1, 1), (3, 2), (12, 8), (16, 16), (20, 16)])
def test_any_head_count_keeps_the_power_of_two_below_and_fills_in_between(heads, power):
    slopes = alibi_slopes(heads)
    assert slopes == alibi_slopes(power) + alibi_slopes(2 * power)[::2][: heads - power]


def test_max_bias_sets_the_flattest_head():
    assert alibi_slopes(4, max_bias=4.0) == [0.5, 0.25, 0.125, 0.0625]


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (1, 9), (3, 9)])
def test_bias_is_minus_slope_times_distance(queries, keys):
    slopes, i, j = torch.tensor(alibi_slopes(6)), torch.arange(keys - queries, keys), torch.arange(keys)
    assert torch.equal(dense(6, queries, keys), -slopes[:, None, None] * (i[:, None] - j).abs())


def test_positions_count_by_their_differences_alone():
    n = torch.arange(9).expand(2, 9)
    near, far = (ALiBi(heads=6).bias(Context(queries=4, keys=9, positions=n + start)) for start in (0, 100_000))
    assert torch.equal(near, far)
    assert torch.equal(near[1], dense(6, 4, 9))


def test_storage_grows_with_length_and_not_with_its_square():
    bias = ALiBi(heads=2).bias(Context(queries=1000, keys=1000))
    assert isinstance(bias, Toeplitz)
    assert bias.diagonals.shape == (2, 1999)


def test_a_bfloat16_model_keeps_exact_slopes():
    bias = ALiBi(heads=12).bfloat16().bias(Context(queries=1, keys=3000))
    assert torch.equal(bias.dense(), dense(12, 1, 3000))


@pytest.mark.reference
@pytest.mark.parametrize("heads", [8, 12])
def test_attention_equals_bloom(heads):
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    theirs = bloom.build_alibi_tensor(torch.ones(1, 50), heads, torch.float32)  # the release's form, m_h j
    scores = torch.randn(heads, 50, 50, generator=torch.Generator().manual_seed(0))
    scores = scores.masked_fill(torch.ones(50, 50).triu(1).bool(), -torch.inf)
    torch.testing.assert_close((scores + dense(heads, 50, 50)).softmax(-1), (scores + theirs).softmax(-1))


@pytest.mark.parametrize(("asked", "says"), [({"memory": torch.zeros(1, 5, 8)}, "cross"), ({"grid": (2, 2)}, "grid")])
def test_what_it_cannot_honour_raises(asked, says):
    with pytest.raises(UnsupportedContext, match=says):
        ALiBi(heads=4).bias(Context(queries=4, keys=4, **asked))


@pytest.mark.parametrize("options", [{"heads": 0}, {"heads": 2, "max_bias": 0.0}])
def test_impossible_options_are_named(options):
    with pytest.raises(FormwrightError, match="ALiBi needs heads >= 1 and max_bias > 0"):
        ALiBi(**options)
