"""Moments through whole models: what is predicted is what one training step shows."""

import pytest
import torch

from formwright.errors import FormwrightError
from formwright.models.transformer import TransformerConfig, TransformerModel
from formwright.theory.deepscalelm import compare, errors, predict, texts


def rows(batch=8, n=48, **fields):
    torch.manual_seed(0)
    sizes = {"vocab_size": 200, "hidden_size": 128, "num_hidden_layers": 4, "position": "none", "dropout": 0.1}
    model = TransformerModel(TransformerConfig(**sizes | fields))
    if model.config.image_size:
        inputs = {"pixel_values": torch.randn(batch, 3, 16, 16)}
    else:
        inputs = {"input_ids": texts(200, batch=batch, length=n, seed=0)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = texts(200, batch=batch, length=20, seed=1)
    return model, inputs, compare(model, inputs)


@pytest.mark.parametrize(
    "fields",
    [
        {"block": "deepscalelm", "init": "deepscalelm", "feedforward": "relu"},
        {"block": "deepscalelm-post", "init": "deepscalelm"},
        {"block": "post", "init": "xavier"},
        {"block": "pre", "init": "fan-in", "norm": "rmsnorm", "feedforward": "swiglu", "num_key_value_heads": 2},
        {"block": "sub-ln", "init": "magneto", "architecture": "decoder"},
        {"architecture": "decoder", "position": "alibi", "init": "fan-in", "embedding_norm": True},
        {"architecture": "encoder-decoder", "init": "xavier", "num_decoder_layers": 3},
        {"init": "deepscalelm", "block": "deepscalelm", "position": "learned", "type_vocab_size": 2},
        {"image_size": 16, "vocab_size": 0, "position": "sinusoidal", "init": "fan-in"},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_predicted_is_near_measured(fields):
    _, _, found = rows(**fields)
    assert errors(found)["median"] < 0.12
    assert errors(found)["largest"] < 0.6  # one draw of a matrix that writes one mean for all tokens of a text
    for row in found:
        # formulas take all pairs of tokens for equally alike; here some are the same word and others nothing alike
        assert row.predicted.correlation == pytest.approx(row.measured.correlation, abs=0.25)


def test_every_layer_has_every_row_in_the_order_of_the_model():
    _, _, found = rows(architecture="encoder-decoder", num_hidden_layers=2)
    inside = ("gradient", "attention", "feedforward", "stream")
    crossed = ("gradient", "attention", "cross", "feedforward", "stream")
    wanted = [("encoder", i, what) for i in (0, 1) for what in inside]
    wanted += [("decoder", i, what) for i in (0, 1) for what in crossed]
    assert [(row.stack, row.layer, row.what) for row in found] == wanted


def test_a_stream_before_the_norm_grows_by_what_is_added():
    model, inputs, _ = rows(block="pre", init="fan-in", dropout=0.0)
    found = predict(model, inputs)
    before = found["encoder", 0, "stream"]
    added = [found["encoder", 1, what] for what in ("attention", "feedforward")]
    assert found["encoder", 1, "stream"].second == pytest.approx(before.second + sum(one.second for one in added))


def test_measuring_leaves_the_model_as_it_was():
    model, inputs, _ = rows()
    model.eval()
    weight = next(model.parameters())
    weight.grad = torch.ones_like(weight)
    state = torch.get_rng_state()
    compare(model, inputs)
    assert not model.training
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"mixer": "aft-simple"}, "mixer"),
        ({"mixer": "clipped-softmax(length=48)"}, "ClippedSoftmax"),
        ({"feedforward": "polynorm"}, "PolyNormMLP"),
        ({"position": "urpe"}, "position"),
    ],
)
def test_parts_of_unknown_moments_are_refused(fields, says):
    with pytest.raises(FormwrightError, match=says):
        rows(**fields)
