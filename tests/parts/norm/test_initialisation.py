"""Initialisation schemes: the spread of every matrix, and what they leave alone."""

import math

import pytest
import torch
from torch import nn

from formwright.errors import FormwrightError
from formwright.models.transformer import TransformerConfig, TransformerModel
from formwright.parts.norm.init import Normal


def block(init, **fields):
    torch.manual_seed(0)
    sizes = {"vocab_size": 500, "hidden_size": 128, "num_hidden_layers": 8, "position": "none", "init": init}
    model = TransformerModel(TransformerConfig(**sizes | fields))
    return model, model.encoder.layers[3].block


def std(tensor, wanted):
    assert tensor.std().item() == pytest.approx(wanted, rel=0.05)


def test_normal_divides_what_writes_to_the_stream():
    model, made = block("normal(std=0.05)")
    std(model.embeddings.tokens.weight, 0.05)
    for matrix in (made.mixer.query_key_value.weight, made.feedforward.up.weight):
        std(matrix, 0.05)
    for matrix in (made.mixer.out.weight, made.feedforward.down.weight):
        std(matrix, 0.05 / math.sqrt(16))


def test_fan_in_keeps_the_variance_of_the_inputs():
    model, made = block("fan-in")
    std(model.embeddings.tokens.weight, 128**-0.5)
    std(made.mixer.query_key_value.weight, 128**-0.5)
    std(made.mixer.out.weight, 128**-0.5 / 4)
    std(made.feedforward.down.weight, 512**-0.5 / 4)


def test_xavier_takes_query_key_and_value_each_by_itself():
    _, made = block("xavier", num_key_value_heads=1)
    query, key, value = made.mixer.query_key_value.weight.split([128, 32, 32])
    std(query, math.sqrt(2 / 256) * 0.5**0.5)
    for matrix in (key, value):
        std(matrix, math.sqrt(2 / 160) * 0.5**0.5)
    assert query.abs().max() <= math.sqrt(6 / 256) * 0.5**0.5
    std(made.mixer.out.weight, math.sqrt(2 / 256))


@pytest.mark.parametrize("init", ["normal", "fan-in", "xavier", "magneto"])
def test_biases_start_at_zero_norms_at_one_and_the_padding_id_at_zero(init):
    model, made = block(init)
    assert not any(weight.any() for name, weight in made.named_parameters() if name.endswith("bias"))
    assert all((module.weight == 1).all() for module in made.modules() if isinstance(module, nn.LayerNorm))
    table = nn.Embedding(5, 4, padding_idx=2)
    model._scheme(table)
    assert [bool(row.any()) for row in table.weight] == [True, True, False, True, True]


def test_a_spread_must_be_above_zero():
    with pytest.raises(FormwrightError, match="above 0"):
        Normal(layers=1, std=0.0)
