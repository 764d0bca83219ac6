"""RoPE x ALiBi with a harmonic penalty: exact properties."""

import itertools
import math

import pytest
import torch

from formwright.contracts import Context, Toeplitz, UnsupportedContext
from formwright.errors import FormwrightError
from formwright.parts.attention.softmax import SoftmaxAttention
from formwright.parts.mixing.multihead import MultiHeadAttention
from formwright.parts.position.alibi import ALiBi
from formwright.parts.position.generative_ai_math import HarmonicRoPE, harmonic, harmonic_series
from formwright.parts.position.roformer import RoPE
from formwright.theory.receptive_field import extrapolates


def mixed(position, x, **facts):
    """What attention with this position makes of x, the same weights whatever the position."""
    torch.manual_seed(0)
    mixer = MultiHeadAttention(dim=16, heads=2, attention=SoftmaxAttention(), position=position)
    with torch.no_grad():
        return mixer(x, Context.of(x, causal=True, **facts))


@pytest.fixture
def x():
    return torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.reference
def test_harmonic_numbers_are_the_running_sums():
    sums = torch.cat((torch.zeros(1, dtype=torch.float64), (1 / torch.arange(1, 4097, dtype=torch.float64)).cumsum(0)))
    torch.testing.assert_close(harmonic(torch.arange(4097)).double(), sums, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["distance", "heads"])
def test_without_slopes_it_is_rope(x, kind):
    ours = HarmonicRoPE(heads=2, head_dim=8, harmonic=kind, steepness=0.0)
    torch.testing.assert_close(mixed(ours, x), mixed(RoPE(head_dim=8), x))


def test_without_angles_it_is_a_harmonic_alibi(x):
    class Penalty(torch.nn.Module):
        def bias(self, context):
            i = torch.arange(context.keys)
            table = torch.tensor([math.fsum(1 / r for r in range(1, t + 1)) for t in range(context.keys)])
            return (-torch.tensor([2.0**-4, 2.0**-8])[:, None, None] * table[(i[:, None] - i).abs()])[None]

    ours = HarmonicRoPE(heads=2, head_dim=8)
    ours.rope.rates = lambda channels, _length: torch.zeros(channels // 2)
    torch.testing.assert_close(mixed(ours, x), mixed(Penalty(), x))


def test_harmonic_slopes_are_one_over_the_head_and_the_penalty_then_is_alibis():
    ours = HarmonicRoPE(heads=3, head_dim=8, harmonic="heads", steepness=2.0)
    assert ours.slopes == [2, 1, 2 / 3]
    alibi = ALiBi(heads=3)
    alibi.slopes = ours.slopes
    context = Context(queries=4, keys=9)
    torch.testing.assert_close(ours.bias(context).dense(), alibi.bias(context).dense())


@pytest.mark.parametrize("heads", [1, 3, 8])
def test_slopes_are_the_geometric_ones(heads):
    assert HarmonicRoPE(heads=heads, head_dim=8).slopes == [2.0 ** (-8 * h / heads) for h in range(1, heads + 1)]


def test_only_distances_count(x):
    ours = HarmonicRoPE(heads=2, head_dim=8)
    near, far = (mixed(ours, x, positions=torch.arange(9).expand(2, 9) + start) for start in (0, 500))
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)


def test_a_decoding_step_makes_one_row_of_one_number_a_key():
    bias = HarmonicRoPE(heads=2, head_dim=8).bias(Context(queries=1, keys=2000, causal=True))
    assert isinstance(bias, Toeplitz)
    assert bias.diagonals.shape == (2, 2000)


@pytest.mark.parametrize("slope", [1.5, 4.0])
def test_the_series_is_what_summing_it_gives(slope):
    sums = itertools.accumulate(1 / r for r in range(1, 2_000_000))
    rest = math.fsum(math.exp(-slope * h) for h in sums)
    far = math.exp(-slope * 0.5772156649015329) * 2_000_000.0 ** (1 - slope) / (slope - 1)
    assert harmonic_series(slope).beyond(0) == pytest.approx(1 + rest + far, rel=1e-5)


def test_only_slopes_above_one_promise_to_extrapolate():
    assert not extrapolates(HarmonicRoPE(heads=2, head_dim=8))
    assert not extrapolates(HarmonicRoPE(heads=2, head_dim=8, steepness=256.0))
    assert extrapolates(HarmonicRoPE(heads=2, head_dim=8, steepness=257.0))
    assert extrapolates(HarmonicRoPE(heads=2, head_dim=8, harmonic="heads"))
    assert not extrapolates(HarmonicRoPE(heads=2, head_dim=8, harmonic="heads", steepness=0.0))


@pytest.mark.parametrize("hook", ["rotate", "bias"])
@pytest.mark.parametrize("facts", [{"memory": torch.zeros(1, 9, 16)}, {"grid": (3, 3)}])
def test_other_distances_are_refused(hook, facts):
    ours, q = HarmonicRoPE(heads=2, head_dim=8), torch.zeros(1, 2, 9, 8)
    context = Context(queries=9, keys=9, **facts)
    with pytest.raises(UnsupportedContext):
        ours.bias(context) if hook == "bias" else ours.rotate(q, q, context)


@pytest.mark.parametrize("wrong", [{"steepness": -1.0}, {"steepness": math.inf}, {"heads": 0}, {"head_dim": 7}])
def test_impossible_options_are_refused(wrong):
    with pytest.raises(FormwrightError):
        HarmonicRoPE(**{"heads": 2, "head_dim": 8} | wrong)
