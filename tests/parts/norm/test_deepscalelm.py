"""DeepScaleLM's scheme: the released recursion, solved spreads, and variances near 1 through 48 layers."""

import math

import pytest
import torch

from formwright.errors import FormwrightError
from formwright.models.transformer import (
    TransformerConfig,
    TransformerForCausalLM,
    TransformerForConditionalGeneration,
    TransformerForMaskedLM,
    TransformerModel,
)
from formwright.parts.norm.deepscalelm import DeepScaleLM, Residual, correlations, residual, token_correlation

# The released code's sigma_attn_v_out, run for layers 0, 1, 2, N / 2 and N - 1.
RELEASED = [
    (12, 768, 0.1, 1 / 12, [0.052628539928, 0.048748254774, 0.046266048267, 0.041403630859, 0.039058322659]),
    (192, 256, 0.1, 0.005, [0.091155305083, 0.090656839409, 0.090175274129, 0.072236550205, 0.067575755646]),
    (24, 64, 0.0, 1 / 24, [0.182310610166, 0.174738622220, 0.168848934383, 0.142987012017, 0.133912382342]),
]


@pytest.mark.reference
@pytest.mark.parametrize(("layers", "dim", "dropout", "share", "released"), RELEASED)
def test_values_and_outputs_spread_as_in_the_release(layers, dim, dropout, share, released):
    weights = Residual(math.sqrt(1 - share), math.sqrt(share))
    r = correlations(layers, dropout=dropout, weights=weights)
    found = [math.sqrt(math.sqrt((1 - dropout) / r[i]) / dim) for i in (0, 1, 2, layers // 2, layers - 1)]
    assert found == pytest.approx(released, rel=1e-9)


@pytest.mark.parametrize("layers", [2, 48, 1000])
def test_the_squares_of_skip_and_branch_sum_to_one(layers):
    skip, branch = residual(layers)
    assert skip**2 + branch**2 == pytest.approx(1.0, abs=1e-12)
    assert branch**2 == pytest.approx(1 / layers)


def built(**fields):
    torch.manual_seed(0)
    sizes = {"vocab_size": 500, "hidden_size": 128, "num_hidden_layers": 6, "dropout": 0.1, "position": "none"}
    return TransformerModel(TransformerConfig(**sizes | {"init": "deepscalelm", "block": "deepscalelm"} | fields))


def variance(tensor, wanted):
    assert tensor.var().item() == pytest.approx(wanted, rel=0.06)


def test_every_matrix_has_the_variance_of_the_card():
    model = built(type_vocab_size=40, position="learned", feedforward="relu")
    for table in (model.embeddings.tokens.weight, model.embeddings.types.weight, model.encoder.position.weight):
        variance(table, 0.9 / 3)
    for layer, r in zip(model.encoder.layers, correlations(6, dropout=0.1), strict=False):
        query, key, value = layer.block.mixer.query_key_value.weight.split([128] * 3)
        variance(query, 1 / 128), variance(key, 1 / 128)
        for matrix in (value, layer.block.mixer.out.weight):
            variance(matrix, math.sqrt(0.9 / r) / 128)
        for matrix in (layer.block.feedforward.up.weight, layer.block.feedforward.down.weight):
            variance(matrix, math.sqrt(0.9 / 2) / 128)


def test_a_spread_given_to_the_positions_is_kept():
    model = built(position="learned(std=0.5)")
    variance(model.encoder.position.weight, 0.25)
    variance(model.embeddings.tokens.weight, 0.9)


@pytest.mark.parametrize("feedforward", ["relu", "gelu", "gelu-tanh", "swiglu", "geglu", "polyrelu", "polynorm"])
def test_any_feed_forward_layer_keeps_tokens_of_variance_one(feedforward):
    part = built(feedforward=feedforward, intermediate_size=320).encoder.layers[0].block.feedforward
    with torch.no_grad():
        out = part(torch.randn(16, 32, 128))
    assert out.square().mean().item() == pytest.approx(0.9, rel=0.12)


def test_relu_of_any_width_follows_the_general_formula():
    scheme = DeepScaleLM(dim=128, encoder_layers=6, decoder_layers=0, dropout=0.1)
    part = built(feedforward="relu", intermediate_size=200).encoder.layers[0].block.feedforward
    assert scheme.feedforward_std(part) ** 2 == pytest.approx(math.sqrt(2 * 0.9 / (128 * 200)), rel=1e-3)
    assert scheme.variance(part.up, "up") == pytest.approx(math.sqrt(2 * 0.9 / (128 * 200)))


def test_an_encoder_decoder_takes_the_memorys_correlation():
    scheme = DeepScaleLM(dim=64, encoder_layers=6, decoder_layers=4, dropout=0.1)
    assert scheme.r["cross"] == [correlations(6, dropout=0.1)[-1]] * 4
    assert scheme.r["decoder"] == correlations(4, dropout=0.1, crossed=True)
    model = built(architecture="encoder-decoder", num_decoder_layers=4, hidden_size=64)
    values = model.decoder.layers[2].block.cross.query_key_value.weight[128:]
    variance(values, math.sqrt(0.9 / scheme.r["cross"][0]) / 64)


def streams(block, init, layers=48, **fields):
    """Mean squares of stream and gradients at the input of each layer and behind the last, in training mode."""
    model = built(block=block, init=init, num_hidden_layers=layers, feedforward="relu", **fields).train()
    shared, own = torch.randn(2, 1, 128), torch.randn(2, 64, 128)
    x = math.sqrt(0.9) * (0.5 * shared + math.sqrt(0.75) * own)  # dropout brings it to 1
    seen = []

    def keep(x):
        x.retain_grad()
        seen.append(x)

    for layer in model.encoder.layers:
        layer.register_forward_pre_hook(lambda _, given: keep(given[0]))
    model.encoder.layers[-1].register_forward_hook(lambda _, __, y: keep(y))
    y = model(inputs_embeds=x.requires_grad_()).last_hidden_state
    y.backward(torch.randn_like(y))
    return [x.square().mean().item() for x in seen], [x.grad.square().mean().item() for x in seen]


@pytest.mark.parametrize("block", ["deepscalelm", "deepscalelm-post"])
def test_variance_and_gradient_stay_near_one_through_48_layers(block):
    forward, backward = streams(block, "deepscalelm(r0=0.25)")
    assert min(forward) > 0.9
    assert max(forward) < 1.2
    assert 0.3 < backward[0] / backward[-1] < 1.5


def test_xaviers_stream_grows_before_the_norm_and_its_gradient_fades_behind():
    forward, backward = streams("pre", "xavier")
    assert forward[-1] > 20
    assert backward[0] / backward[-1] > 5
    _, backward = streams("post", "xavier")
    assert backward[0] / backward[-1] < 0.05


@pytest.mark.parametrize(
    ("model", "architecture", "calls"),
    [
        (TransformerForCausalLM, "decoder", lambda ids: {"input_ids": ids}),
        (TransformerForMaskedLM, "encoder", lambda ids: {"input_ids": ids}),
        (TransformerForConditionalGeneration, "encoder-decoder", lambda ids: {"input_ids": ids, "labels": ids}),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_start_with_variance_one(model, architecture, calls, tied):
    torch.manual_seed(0)
    config = TransformerConfig(
        architecture=architecture,
        vocab_size=300,
        hidden_size=64,
        block="deepscalelm",
        init="deepscalelm",
        tie_word_embeddings=tied,
        decoder_start_token_id=0,
        pad_token_id=1,
    )
    ids = torch.randint(2, 300, (4, 32))
    made = model(config).eval()
    assert made.get_input_embeddings().weight.var().item() == pytest.approx(0.5, rel=0.06)  # tokens and places
    logits = made(**calls(ids)).logits
    assert logits.var().item() == pytest.approx(1.0, rel=0.25)


def test_the_factor_of_the_head_comes_back_from_a_folder(tmp_path):
    config = TransformerConfig(architecture="decoder", block="deepscalelm", init="deepscalelm")
    model, ids = TransformerForCausalLM(config).eval(), torch.arange(9)[None]
    model.save_pretrained(tmp_path)
    again = TransformerForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(model(ids).logits, again(ids).logits)
    factor = 1 / math.sqrt(64 * 0.5)
    plain = model.model(ids).last_hidden_state @ model.lm_head.weight.T
    torch.testing.assert_close(model(ids).logits, factor * plain)


def test_the_correlation_of_a_batch():
    ids = torch.tensor([[3, 3, 3, 5], [1, 2, 3, 4]])
    assert token_correlation(ids) == pytest.approx((6 / 12 + 0) / 2)
    types = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]])
    assert token_correlation(ids, types, tables=3) == pytest.approx((0.25 + 4 / 12) / 3)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: residual(1), "two layers"),
        (lambda: DeepScaleLM(dim=8, encoder_layers=2, decoder_layers=0, r0=0.0), "r0 above 0"),
        (lambda: DeepScaleLM(dim=8, encoder_layers=2, decoder_layers=0, dropout=1.0), "dropout"),
        (lambda: token_correlation(torch.zeros(2, 1, dtype=torch.long)), "two tokens"),
    ],
)
def test_impossible_input_is_refused(call, says):
    with pytest.raises(FormwrightError, match=says):
        call()
