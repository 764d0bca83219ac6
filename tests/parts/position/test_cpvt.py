"""PEG: exact properties, then an independent implementation."""

import math

import pytest
import torch
from torch import nn

from formwright.contracts import Context, UnsupportedContext
from formwright.errors import FormwrightError
from formwright.parts.position.cpvt import PEG


def peg(dim=6, **options):
    torch.manual_seed(0)
    part = PEG(dim=dim, **options).double()
    with torch.no_grad():
        part.shift.normal_()
    return part


def laid_out(grid, *, dim=6, front=0, batch=2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, math.prod(grid) + front, dim, generator=generator, dtype=torch.float64)
    return x, Context.of(x, grid=grid)


def test_it_has_k_squared_and_one_numbers_a_channel_and_starts_as_the_release_does():
    part = PEG(dim=1000, grid=(4, 4))
    assert sum(p.numel() for p in part.parameters()) == 1000 * (3**2 + 1)
    assert float(part.weight.std()) == pytest.approx(math.sqrt(2) / 3, rel=0.05)
    assert not part.shift.any()


def test_without_weights_it_is_the_identity():
    part, (x, context) = peg(grid=(3, 5)), laid_out((3, 5))
    nn.init.zeros_(part.weight)
    nn.init.zeros_(part.shift)
    assert torch.equal(part.embed(x, context), x)


def test_the_class_token_goes_past_to_the_bit_and_is_no_neighbour():
    part, (x, context) = peg(grid=(4, 4)), laid_out((3, 5), front=1)
    y = part.embed(x, context)
    assert torch.equal(y[:, :1], x[:, :1])
    cells = x[:, 1:]
    assert torch.equal(y[:, 1:], part.embed(cells, Context.of(cells, grid=(3, 5))))


def test_away_from_the_edges_a_shift_of_the_image_is_a_shift_of_the_output():
    part, (x, context) = peg(grid=(8, 9)), laid_out((8, 9))
    moved = x.unflatten(1, (8, 9)).roll((1, 1), (1, 2)).flatten(1, 2)
    first, second = (part.embed(image, context).unflatten(1, (8, 9)) for image in (x, moved))
    assert torch.allclose(second[:, 2:-1, 2:-1], first[:, 1:-2, 1:-2], rtol=0, atol=1e-12)
    assert not torch.allclose(second[:, 1, 1:], first[:, 0, :-1])  # zeros beyond the edge tell where it is


def test_a_sequence_in_a_decoder_sees_the_past_alone():
    part, x = peg(causal=True), laid_out((9,))[0]
    context, other = Context.of(x, causal=True), x.clone()
    other[:, 5] += 1
    changed = (part.embed(other, context) != part.embed(x, context)).any(-1)
    assert changed[0].tolist() == [False] * 5 + [True] * 3 + [False]


@pytest.mark.parametrize("causal", [False, True])
def test_tokens_with_gaps_are_convolved_as_if_zeros_stood_in_them(causal):
    part, x = peg(causal=causal, kernel=5), laid_out((6,))[0]
    places = torch.tensor([0, 1, 3, 4, 5, 9])
    full = torch.zeros(2, 10, 6, dtype=torch.float64)
    full[:, places] = x
    y = part.embed(x, Context.of(x, causal=causal, positions=places[None]))
    assert torch.allclose(y, part.embed(full, Context.of(full, causal=causal))[:, places], rtol=0, atol=1e-12)


def test_pads_on_a_grid_count_as_zeros():
    part, (x, context) = peg(grid=(3, 5)), laid_out((3, 5))
    real = torch.rand(2, 15, generator=torch.Generator().manual_seed(3)) < 0.6
    y = part.embed(x, Context.of(x, grid=(3, 5), padding=real))
    assert torch.equal(y, part.embed(x * real[..., None], context))


@pytest.mark.parametrize(
    ("built", "facts"),
    [
        ({"grid": (4, 4)}, {}),
        ({"grid": (4, 4)}, {"grid": (2, 2, 4)}),
        ({"grid": (4, 4)}, {"grid": (3, 4)}),
        ({"grid": (4, 4)}, {"grid": (4, 4), "causal": True}),
        ({"grid": (4, 4)}, {"grid": (4, 4), "positions": torch.arange(16)[None]}),
        ({}, {"grid": (4, 4)}),
        ({}, {"causal": True}),
        ({"causal": True}, {}),
        ({}, {"memory": torch.zeros(2, 3, 6)}),
        ({"causal": True}, {"causal": True, "keys": 20}),
    ],
)
def test_what_it_was_not_built_for_is_refused(built, facts):
    x = laid_out((16,))[0]
    with pytest.raises(UnsupportedContext, match="PEG"):
        PEG(dim=6, **built).double().embed(x, Context.of(x, **facts))


def test_bad_options_are_refused():
    for wrong in ({"dim": 0}, {"kernel": 4}, {"kernel": 1}, {"grid": (2, 2, 2, 2)}):
        with pytest.raises(FormwrightError, match="PEG"):
            PEG(**{"dim": 4} | wrong)


@pytest.mark.reference
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (7, 4), (2, 3, 4)])
def test_equals_a_grouped_convolution_of_torch_and_the_identity(grid):
    part, (x, context) = peg(grid=grid), laid_out(grid)
    kind = {2: nn.Conv2d, 3: nn.Conv3d}[len(grid)]
    convolution = kind(6, 6, 3, padding=1, groups=6).double()
    with torch.no_grad():
        convolution.weight.copy_(part.weight)
        convolution.bias.copy_(part.shift)
    image = x.transpose(1, 2).reshape(2, 6, *grid)
    expected = (image + convolution(image)).flatten(2).transpose(1, 2)
    assert torch.allclose(part.embed(x, context), expected, rtol=0, atol=1e-12)
    assert torch.allclose(part.float().embed(x.float(), context).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.reference
def test_equals_the_sum_over_neighbours_term_by_term():
    part, (x, context) = peg(grid=(3, 4)), laid_out((3, 4))
    y = part.embed(x, context).unflatten(1, (3, 4))
    image = x.unflatten(1, (3, 4))
    for row in range(3):
        for column in range(4):
            expected = image[:, row, column] + part.shift
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    if 0 <= row + down < 3 and 0 <= column + right < 4:
                        tap = part.weight[:, 0, down + 1, right + 1]
                        expected = expected + tap * image[:, row + down, column + right]
            assert torch.allclose(y[:, row, column], expected, rtol=0, atol=1e-12)
