"""Sinusoidal positions: exact properties, then an independent implementation."""

import math

import pytest
import torch

from formwright.contracts import Context, UnsupportedContext
from formwright.errors import FormwrightError
from formwright.parts.position.sinusoidal import Sinusoidal


def table(length, dim, **options):
    x = torch.zeros(1, length, dim)
    return Sinusoidal(dim=dim, **options).embed(x, Context.of(x))[0]


@pytest.mark.parametrize("dim", [1, 2, 7, 64])
def test_every_number_is_the_papers(dim):
    expected = [
        [(math.cos if c % 2 else math.sin)(p * 10000 ** (-(c // 2 * 2) / dim)) for c in range(dim)] for p in range(63)
    ]
    torch.testing.assert_close(table(63, dim), torch.tensor(expected), atol=1e-5, rtol=0)


def test_an_offset_is_one_rotation_everywhere():
    pairs = torch.view_as_complex(table(63, 16).unflatten(-1, (-1, 2)).flip(-1).contiguous())  # cos + i sin
    turned = pairs[5:] / pairs[:-5]
    torch.testing.assert_close(turned, turned[:1].expand_as(turned), atol=1e-4, rtol=0)


def test_amplitude_and_base_are_what_they_say():
    torch.testing.assert_close(table(9, 8, amplitude=0.25), 0.25 * table(9, 8))
    torch.testing.assert_close(
        table(9, 4, base=100.0)[3, 2:],
        torch.tensor([0.3, 0.3]).sin().lerp(torch.tensor([0.3, 0.3]).cos(), torch.tensor([0.0, 1.0])),
    )


def test_a_cached_step_is_a_row_of_the_whole():
    step = torch.zeros(1, 1, 8)
    assert torch.equal(Sinusoidal(dim=8).embed(step, Context(queries=1, keys=42))[0, 0], table(42, 8)[-1])


def test_given_positions_are_followed_row_by_row():
    x = torch.zeros(2, 3, 8)
    positions = torch.tensor([[0, 0, 1, 2], [4, 5, 6, 7]])
    out = Sinusoidal(dim=8).embed(x, Context(queries=3, keys=4, positions=positions))
    assert torch.equal(out, table(8, 8)[positions[:, 1:]])


def test_half_precision_tokens_get_angles_in_fp32():
    x = torch.zeros(1, 3000, 8, dtype=torch.bfloat16)
    out = Sinusoidal(dim=8).bfloat16().embed(x, Context.of(x))
    assert torch.equal(out[0], table(3000, 8).bfloat16())


def test_a_grid_gives_each_axis_its_share():
    x = torch.zeros(1, 6, 7)
    out = Sinusoidal(dim=7, axes="grid").embed(x, Context.of(x, grid=(2, 3)))[0].view(2, 3, 7)
    assert torch.equal(out[:, :, :4], table(2, 4)[:, None].expand(2, 3, 4))
    assert torch.equal(out[:, :, 4:], table(3, 3)[None].expand(2, 3, 3))


def test_a_grid_in_sequence_is_counted_row_by_row():
    x = torch.zeros(1, 6, 8)
    assert torch.equal(Sinusoidal(dim=8).embed(x, Context.of(x, grid=(2, 3)))[0], table(6, 8))


@pytest.mark.parametrize(("grid", "says"), [(None, "no grid"), ((2, 2), r"\(2, 2\)")])
def test_grid_axes_need_a_grid_that_holds_the_tokens(grid, says):
    x = torch.zeros(1, 6, 8)
    with pytest.raises(UnsupportedContext, match=says):
        Sinusoidal(dim=8, axes="grid").embed(x, Context.of(x, grid=grid))


@pytest.mark.parametrize("options", [{"dim": 0}, {"dim": 4, "base": 1.0}, {"dim": 4, "amplitude": 0.0}])
def test_impossible_options_are_named(options):
    with pytest.raises(FormwrightError, match="need dim >= 1, base > 1 and amplitude > 0"):
        Sinusoidal(**options)


@pytest.mark.reference
def test_the_channels_are_those_of_marian_in_another_order():
    marian = pytest.importorskip("transformers.models.marian.modeling_marian")
    theirs = marian.MarianSinusoidalPositionalEmbedding(63, 32).create_weight()  # sines first, then cosines
    torch.testing.assert_close(torch.cat((table(63, 32)[:, ::2], table(63, 32)[:, 1::2]), -1), theirs)
