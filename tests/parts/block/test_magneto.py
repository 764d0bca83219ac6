"""Sub-LN and its initialisation: exact properties, then an independent implementation."""

import math

import pytest
import torch
from torch import nn

from formwright.contracts import Context, UnsupportedContext
from formwright.errors import FormwrightError
from formwright.models.transformer import TransformerConfig, TransformerModel
from formwright.parts.block.magneto import SubLN
from formwright.parts.norm.init import magneto_gains


def model(**fields):
    torch.manual_seed(0)
    made = {"hidden_size": 64, "vocab_size": 20, "block": "sub-ln", "init": "magneto"} | fields
    return TransformerModel(TransformerConfig(**made)).eval()


@pytest.mark.parametrize("layers", [1, 2, 24])
def test_gains_of_one_stack(layers):
    assert magneto_gains(layers, 0) == {"encoder": math.sqrt(math.log(2 * layers))}
    assert magneto_gains(0, layers) == {"decoder": math.sqrt(math.log(2 * layers))}


def test_gains_of_two_stacks():
    gains = magneto_gains(18, 12)
    assert gains["decoder"] == pytest.approx(math.sqrt(math.log(36)))
    assert gains["encoder"] == pytest.approx(math.sqrt(math.log(36) * math.log(36) / 3))


def test_no_layers_have_no_gain():
    with pytest.raises(FormwrightError, match="at least one layer"):
        magneto_gains(0, 0)


@pytest.mark.parametrize(
    ("fields", "gains"),
    [
        ({"num_hidden_layers": 6}, {"encoder": math.sqrt(math.log(12))}),
        ({"num_hidden_layers": 6, "architecture": "decoder"}, {"decoder": math.sqrt(math.log(12))}),
        (
            {"num_hidden_layers": 6, "num_decoder_layers": 3, "architecture": "encoder-decoder"},
            {"encoder": math.sqrt(math.log(9) * math.log(12) / 3), "decoder": math.sqrt(math.log(9))},
        ),
    ],
)
def test_values_outputs_and_feed_forwards_are_scaled_and_nothing_else(fields, gains):
    made = model(**fields)
    for side, gain in gains.items():
        block = getattr(made, side).layers[1].block
        query, key, value = block.mixer.query_key_value.weight.split(64)
        xavier = math.sqrt(2 / 128)  # std of a square matrix
        for matrix in (query, key):
            assert matrix.std().item() == pytest.approx(xavier * 0.5**0.5, rel=0.05)
        assert value.std().item() == pytest.approx(xavier * 0.5**0.5 * gain, rel=0.05)
        assert block.mixer.out.weight.std().item() == pytest.approx(xavier * gain, rel=0.05)
        for matrix in (block.feedforward.up.weight, block.feedforward.down.weight):
            assert matrix.std().item() == pytest.approx(math.sqrt(2 / (64 + 256)) * gain, rel=0.05)
        if block.cross is not None:
            assert block.cross.out.weight.std().item() == pytest.approx(xavier, rel=0.05)
        assert not any(weight.any() for name, weight in block.named_parameters() if name.endswith("bias"))


def test_a_layer_has_2d_and_2f_more_parameters_than_pre_norm():
    extra = model().num_parameters() - model(block="pre").num_parameters()
    assert extra == 2 * (2 * 64 + 2 * 256)


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_scaling_the_values_changes_nothing(factor):
    """The inner norm makes the sub-layer blind to the scale of what it normalises."""
    mixer = model(norm="layernorm(eps=1e-12)").double().encoder.layers[0].block.mixer
    x = torch.randn(2, 7, 64, dtype=torch.double)
    before = mixer(x, Context.of(x))
    with torch.no_grad():
        mixer.query_key_value.weight[-64:] *= factor
        mixer.query_key_value.bias[-64:] *= factor
    torch.testing.assert_close(mixer(x, Context.of(x)), before)


def test_scaling_the_first_feed_forward_matrix_changes_nothing_under_relu():
    layer = model(feedforward="relu", norm="layernorm(eps=1e-12)").double().encoder.layers[0].block.feedforward
    x = torch.randn(2, 7, 64, dtype=torch.double)
    before = layer(x)
    with torch.no_grad():
        layer.up.weight *= 3
    torch.testing.assert_close(layer(x), before)


def test_without_its_inner_norms_it_is_the_pre_norm_block():
    ours, plain = model(), model(block="pre")
    for layer in ours.encoder.layers:
        layer.block.mixer.inner = layer.block.feedforward.inner = nn.Identity()
    plain.load_state_dict(ours.state_dict())
    ids = torch.arange(9)[None]
    assert torch.equal(ours(ids).last_hidden_state, plain(ids).last_hidden_state)


def test_cross_attention_has_the_inner_norm_only_when_asked():
    paired = {"architecture": "encoder-decoder"}
    release, figure = model(**paired), model(**paired, block="sub-ln(cross_inner=true)")
    assert isinstance(release.decoder.layers[0].block.cross.inner, nn.Identity)
    assert isinstance(figure.decoder.layers[0].block.cross.inner, nn.LayerNorm)


def test_a_mixer_without_a_place_for_the_norm_is_refused():
    class Plain(nn.Linear):
        cache_kind, hooks = None, frozenset()

    with pytest.raises(UnsupportedContext, match="no place for it"):
        SubLN(dim=8, mixer=Plain(8, 8), feedforward=None, norm=nn.LayerNorm)


@pytest.mark.reference
def test_the_block_equals_torch_layers_put_together_by_hand():
    block = model(num_hidden_layers=1).encoder.layers[0].block
    theirs = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(block.mixer.query_key_value.weight)
        theirs.in_proj_bias.copy_(block.mixer.query_key_value.bias)
        theirs.out_proj.load_state_dict(nn.Linear(64, 64).state_dict())
        theirs.out_proj.weight.copy_(torch.eye(64)), theirs.out_proj.bias.zero_()
        x = torch.randn(2, 7, 64)
        h = nn.functional.layer_norm(x, (64,))
        mixed = theirs(h, h, h, need_weights=False)[0]
        wanted = x + nn.functional.layer_norm(mixed, (64,)) @ block.mixer.out.weight.T
        hidden = nn.functional.gelu(nn.functional.layer_norm(wanted, (64,)) @ block.feedforward.up.weight.T)
        wanted = wanted + nn.functional.layer_norm(hidden, (256,)) @ block.feedforward.down.weight.T
    torch.testing.assert_close(block(x, Context.of(x)), wanted, atol=1e-5, rtol=1e-5)
