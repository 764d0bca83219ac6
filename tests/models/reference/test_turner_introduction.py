"""The plain Transformer's exact properties, and the fast one against it."""

import numpy as np
import pytest
import torch
from torch import nn

from formwright.errors import FormwrightError
from formwright.models.reference.turner_introduction import TurnerTransformer
from formwright.models.transformer import TransformerConfig, TransformerModel


def model(**fields):
    torch.manual_seed(0)
    made = {"hidden_size": 12, "num_attention_heads": 3, "vocab_size": 20, "init": "normal(std=0.3)"} | fields
    return TransformerModel(TransformerConfig(**made)).double().eval()


def ids(n, seed=0):
    return np.random.default_rng(seed).integers(0, 20, n)


@pytest.mark.parametrize("architecture", ["encoder", "decoder"])
@pytest.mark.parametrize("block", ["pre", "post"])
@pytest.mark.parametrize("position", ["sinusoidal", "learned", "none"])
@pytest.mark.parametrize("feedforward", ["gelu", "relu"])
def test_the_fast_one_equals_the_definition(architecture, block, position, feedforward):
    fast = model(architecture=architecture, block=block, position=position, feedforward=feedforward)
    for n in (1, 7, 33):
        wanted = TurnerTransformer.of(fast)(ids(n))
        got = fast(torch.tensor(ids(n))[None]).last_hidden_state[0].detach().numpy()
        np.testing.assert_allclose(got, wanted, atol=1e-10)


@pytest.mark.parametrize("fields", [{"num_key_value_heads": 1}, {"head_dim": 6}, {"qkv_bias": False}])
def test_shared_heads_wide_heads_and_no_biases(fields):
    fast = model(**fields)
    got = fast(torch.tensor(ids(9))[None]).last_hidden_state[0].detach().numpy()
    np.testing.assert_allclose(got, TurnerTransformer.of(fast)(ids(9)), atol=1e-10)


@pytest.mark.parametrize("architecture", ["encoder", "decoder"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_fast_one_hides_padding_as_the_definition_does(architecture, side):
    fast = model(architecture=architecture)
    real = np.array([False, False] + [True] * 6) if side == "left" else np.array([True] * 6 + [False, False])
    mask = torch.tensor(real)[None].long()
    got = fast(torch.tensor(ids(8))[None], attention_mask=mask).last_hidden_state[0].detach().numpy()
    np.testing.assert_allclose(got[real], TurnerTransformer.of(fast)(ids(8), real)[real], atol=1e-10)
    np.testing.assert_allclose(got[real], TurnerTransformer.of(fast)(ids(8)[real]), atol=1e-10)


def test_columns_of_attention_sum_to_one_and_none_looks_ahead():
    head = TurnerTransformer.of(model(architecture="decoder")).layers[0].heads[0]
    x = np.random.default_rng(0).normal(size=(12, 7))
    attention = head.attention(x, np.arange(7)[:, None] <= np.arange(7))
    np.testing.assert_allclose(attention.sum(0), 1)
    assert not np.tril(attention, -1).any()


def test_equal_keys_get_equal_weights():
    head = TurnerTransformer.of(model()).layers[0].heads[0]
    same = np.repeat(np.random.default_rng(0).normal(size=(12, 1)), 5, axis=1)
    np.testing.assert_allclose(head.attention(same, np.ones((5, 5), dtype=bool)), 1 / 5)


def test_without_positions_the_order_of_tokens_only_orders_the_outputs():
    plain, order = TurnerTransformer.of(model(position="none")), np.array([3, 0, 4, 1, 2])
    np.testing.assert_allclose(plain(ids(5)[order]), plain(ids(5))[order], atol=1e-12)


def test_zero_output_projections_leave_a_pre_norm_stream_as_it_was():
    fast = model(position="none")
    with torch.no_grad():
        for layer in fast.encoder.layers:
            for linear in (layer.block.mixer.out, layer.block.feedforward.down):
                linear.weight.zero_(), linear.bias.zero_()
    plain = TurnerTransformer.of(fast)
    np.testing.assert_allclose(plain(ids(4)), plain.norm(plain.tokens[ids(4)].T).T)


def test_a_block_has_12_d_squared_and_13_d_parameters():
    block = model(num_hidden_layers=1).encoder.layers[0].block
    assert sum(weight.numel() for weight in block.parameters()) == 12 * 12**2 + 13 * 12


@pytest.mark.reference
@pytest.mark.parametrize("order", ["pre", "post"])
def test_a_layer_equals_torch(order):
    theirs = nn.TransformerEncoderLayer(
        12, 3, 48, dropout=0, activation="gelu", norm_first=order == "pre", batch_first=True, dtype=torch.double
    ).eval()
    fast = model(num_hidden_layers=1, block=order, position="none")
    block, attention = fast.encoder.layers[0].block, theirs.self_attn
    pairs = [
        (block.mixer.query_key_value.weight, attention.in_proj_weight),
        (block.mixer.query_key_value.bias, attention.in_proj_bias),
        (block.mixer.out, attention.out_proj),
        (block.feedforward.up, theirs.linear1),
        (block.feedforward.down, theirs.linear2),
        (block.mixer_norm, theirs.norm1),
        (block.feedforward_norm, theirs.norm2),
    ]
    with torch.no_grad():
        for ours, other in pairs:
            if isinstance(ours, nn.Module):
                ours.load_state_dict(other.state_dict())
            else:
                ours.copy_(other)
        x = torch.randn(1, 9, 12, dtype=torch.double)
        wanted = theirs(x)[0].numpy()
    layer = TurnerTransformer.of(fast).layers[0]
    np.testing.assert_allclose(layer(x[0].T.numpy(), np.ones((9, 9), dtype=bool)).T, wanted, atol=1e-10)


@pytest.mark.parametrize("fields", [{"mixer": "aft-simple"}, {"position": "rope"}, {"block": "sub-ln"}])
def test_what_the_introduction_does_not_describe_is_refused(fields):
    with pytest.raises(FormwrightError, match="introduction describes"):
        TurnerTransformer.of(model(**fields))
