"""Sums under a Toeplitz matrix against the array."""

import pytest
import torch

from formwright.ops import toeplitz
from formwright.ops.toeplitz import fast_length, toeplitz_attend, toeplitz_attend_reference


def inputs(queries, keys, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 3, 4, queries), (2, 3, 4, keys), (2, 3, 5, keys), (3, queries + keys - 1))
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("at_once", [1, 1 << 18])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (7, 7), (9, 4), (63, 64)])
def test_outputs_and_gradients_are_those_of_the_array(queries, keys, at_once, monkeypatch):
    monkeypatch.setattr(toeplitz, "AT_ONCE", at_once)
    given = inputs(queries, keys)
    ours, theirs = toeplitz_attend(*given), toeplitz_attend_reference(*given)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-11)
    weight = torch.randn_like(theirs)
    for a, b in zip(*(torch.autograd.grad(y, given, weight) for y in (ours, theirs)), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-10)


def test_fast_lengths_are_the_next_even_numbers_of_two_three_and_five():
    plain = [n for n in range(2, 5001, 2) if not _without(n, 2, 3, 5) > 1]
    for least in (1, 2, 3, 7, 11, 62, 63, 121, 509, 1023, 2047, 4097, 4900):
        assert fast_length(least) == next(n for n in plain if n >= least)


def _without(n, *factors):
    for factor in factors:
        while n % factor == 0:
            n //= factor
    return n
