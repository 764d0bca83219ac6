"""Relative bias: exact properties, then an independent implementation."""

import pytest
import torch

from formwright.contracts import Context, Toeplitz, UnsupportedContext
from formwright.errors import FormwrightError
from formwright.parts.position.nprf_rpe import RelativeBias


def bias(n, **options):
    torch.manual_seed(0)
    part = RelativeBias(heads=3, std=1.0, **options)
    return part, part.bias(Context(queries=n, keys=n, causal=options.get("causal", False)))


def test_it_has_a_number_for_every_head_and_distance_and_starts_at_zero():
    assert RelativeBias(heads=3, length=7).b.shape == (3, 13)
    assert RelativeBias(heads=3, length=7, causal=True).b.shape == (3, 7)
    assert not RelativeBias(heads=3, length=7).b.any()


def test_only_diagonals_are_stored_and_each_is_a_parameter():
    part, found = bias(7, length=7)
    assert isinstance(found, Toeplitz)
    assert torch.equal(found.diagonals, part.b)


def test_beyond_the_length_all_distances_are_one():
    part, found = bias(9, length=4)
    assert torch.equal(found.dense()[:, 8, :6], part.b[:, 6:].expand(-1, 6))
    assert torch.equal(found.dense()[:, 0, 3:], part.b[:, :1].expand(-1, 6))


def test_of_a_decoder_there_is_the_past_alone():
    part, found = bias(6, length=6, causal=True)
    assert torch.equal(found.dense()[:, 5], part.b.flip(-1))
    with pytest.raises(UnsupportedContext, match="both directions"):
        part.bias(Context(queries=6, keys=6))
    with pytest.raises(UnsupportedContext, match="grid"):
        part.bias(Context(queries=6, keys=6, grid=(2, 3)))


def test_bad_options_are_refused():
    for wrong in ({"heads": 0}, {"length": 0}, {"std": -1.0}):
        with pytest.raises(FormwrightError, match="relative bias"):
            RelativeBias(**{"heads": 2, "length": 4} | wrong)


@pytest.mark.reference
def test_equals_the_table_read_entry_by_entry():
    part, found = bias(7, length=7)
    array = [[[float(part.b[h, i - j + 6]) for j in range(7)] for i in range(7)] for h in range(3)]
    assert torch.equal(found.dense(), torch.tensor(array))
