"""Learned positions: exact properties."""

import pytest
import torch

from formwright.contracts import Context
from formwright.errors import FormwrightError
from formwright.parts.position.learned import Learned


def test_every_token_gets_its_row():
    part, x = Learned(dim=4, length=7), torch.randn(2, 7, 4)
    assert torch.equal(part.embed(x, Context.of(x)), x + part.weight)


def test_a_cached_step_continues_the_count():
    part, x = Learned(dim=4, length=9), torch.zeros(1, 2, 4)
    assert torch.equal(part.embed(x, Context(queries=2, keys=9))[0], part.weight[7:])


def test_given_positions_are_followed_row_by_row():
    part, x = Learned(dim=4, length=9), torch.zeros(2, 3, 4)
    positions = torch.tensor([[0, 0, 1, 2], [4, 5, 6, 7]])
    assert torch.equal(part.embed(x, Context(queries=3, keys=4, positions=positions)), part.weight[positions[:, 1:]])


def test_a_grid_is_counted_row_by_row():
    part, x = Learned(dim=4, length=6), torch.zeros(1, 6, 4)
    assert torch.equal(part.embed(x, Context.of(x, grid=(2, 3)))[0], part.weight)


def test_std_is_the_scale_of_the_first_values():
    torch.manual_seed(0)
    assert Learned(dim=64, length=1000).weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert Learned(dim=64, length=1000, std=1.0).weight.std().item() == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize(
    "facts", [{"queries": 4, "keys": 8}, {"queries": 4, "keys": 4, "positions": torch.tensor([[4, 5, 6, 7]])}]
)
def test_beyond_the_table_the_error_names_the_way_out(facts):
    with pytest.raises(FormwrightError, match=r"end after 7 tokens and 8 are needed.*max_position_embeddings.*rope"):
        Learned(dim=4, length=7).embed(torch.zeros(1, 4, 4), Context(**facts))


def test_a_padded_row_may_be_longer_than_the_table():
    part, x = Learned(dim=4, length=3), torch.zeros(1, 5, 4)
    positions = torch.tensor([[0, 0, 0, 1, 2]])
    out = part.embed(x, Context(queries=5, keys=5, positions=positions, padding=torch.arange(5)[None] > 1))
    assert torch.equal(out[0, 2:], part.weight)


@pytest.mark.parametrize(
    "options", [{"dim": 0, "length": 4}, {"dim": 4, "length": 0}, {"dim": 4, "length": 4, "std": -1.0}]
)
def test_impossible_options_are_named(options):
    with pytest.raises(FormwrightError, match="need dim >= 1, length >= 1 and std >= 0"):
        Learned(**options)


def test_with_a_memory_the_tokens_count_for_themselves():
    part, x = Learned(dim=4, length=9), torch.zeros(1, 5, 4)
    memory = torch.zeros(1, 3, 4)
    out = part.embed(x, Context(queries=5, keys=3, memory=memory, positions=torch.tensor([[0, 0, 1]])))
    assert torch.equal(out[0], part.weight[:5])
