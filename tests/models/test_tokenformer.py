"""Growing a TokenFormer: the same function at first, the grown config, saving, and training on."""

import pytest
import torch

from formwright.errors import FormwrightError
from formwright.models.tokenformer import grow, grown
from formwright.models.transformer import (
    TransformerConfig,
    TransformerForCausalLM,
    TransformerForConditionalGeneration,
    TransformerForSequenceClassification,
)
from formwright.parts.feedforward.tokenformer import Pattention

PARTS = {"mixer": "tokenformer", "feedforward": "tokenformer", "block": "tokenformer"}


def built(cls=TransformerForCausalLM, architecture="decoder", **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 2, "max_position_embeddings": 32}
    return cls(TransformerConfig(architecture=architecture, **sizes, **PARTS | options)).eval()


def ids(n=9):
    return torch.randint(1, 23, (2, n), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    given = {"decoder_input_ids": ids()} if model.config.is_encoder_decoder else {}
    return model(ids(), **given).logits


def counts(model):
    return sorted({one.tokens for one in model.modules() if isinstance(one, Pattention)})


@pytest.mark.parametrize(
    ("cls", "architecture", "options"),
    [
        (TransformerForCausalLM, "decoder", {}),
        (
            TransformerForCausalLM,
            "decoder",
            {"mixer": ["tokenformer", "softmax"], "feedforward": ["gelu", PARTS["mixer"]]},
        ),
        (TransformerForSequenceClassification, "encoder", {"num_key_value_heads": 2}),
        (TransformerForConditionalGeneration, "encoder-decoder", {"cross_mixer": {"name": "tokenformer", "tokens": 8}}),
    ],
)
def test_growing_leaves_the_function_as_it_was(cls, architecture, options):
    model = built(cls, architecture, **options)
    before = logits(model)
    grow(model, tokens=24, hidden=100)
    assert counts(model) == [24, 100]
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)
    grow(model, tokens=30)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("change", [{"keys": "random"}, {"tau": "current"}])
def test_random_keys_or_the_grown_tau_change_the_function(change):
    model = built()
    before = logits(model)
    grow(model, tokens=24, hidden=100, **change)
    assert not torch.allclose(logits(model), before, rtol=1e-3, atol=1e-4)


def test_a_grown_model_is_saved_and_comes_back(tmp_path):
    model = built(feedforward={"name": "tokenformer", "theta": "gelu_l2_norm"})
    grow(model, tokens=24, hidden=100)
    assert model.config.mixer == "tokenformer(tokens=24, tau_tokens=16)"
    assert model.config.feedforward == {"name": "tokenformer", "theta": "gelu_l2_norm", "hidden": 100, "tau_tokens": 64}
    model.save_pretrained(tmp_path)
    loaded, report = TransformerForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(logits(loaded.eval()), logits(model))


def test_the_grown_config_builds_the_grown_shapes_and_leaves_the_given_one_alone():
    model = built(mixer="tokenformer(tokens=10)", intermediate_size=40)
    given = model.config.to_dict()
    config = grown(model.config, tokens=12, hidden=50, tau="current")
    assert model.config.to_dict() == given
    assert (config.mixer, config.feedforward) == ("tokenformer(tokens=12)", "tokenformer(hidden=50)")
    fresh = TransformerForCausalLM(config)
    grow(model, tokens=12, hidden=50, tau="current")
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert shapes == {name: value.shape for name, value in fresh.state_dict().items()}
    assert model.config.to_dict() == config.to_dict()


def test_the_cache_and_generation_stay():
    model = built()
    before = model.generate(ids(4), max_new_tokens=6, do_sample=False)
    grow(model, tokens=24, hidden=100)
    assert torch.equal(model.generate(ids(4), max_new_tokens=6, do_sample=False), before)
    past = model(ids(4), use_cache=True).past_key_values
    assert past.layers[0].stored()[0].shape == (2, 4, 4, 4)


def test_dtype_and_what_is_frozen_are_kept():
    model = built().to(torch.bfloat16)
    for parameter in model.model.decoder.layers[0].parameters():
        parameter.requires_grad_(False)
    grow(model, tokens=24, hidden=100)
    layers = model.model.decoder.layers
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in layers[0].parameters())
    assert all(p.requires_grad for p in layers[1].parameters())


def test_a_grown_model_trains_on_and_uses_its_new_tokens():
    model = built()
    grow(model, tokens=24, hidden=100)
    layer = model.model.decoder.layers[0].block.feedforward
    new = layer.values[64:].detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model.train()(ids(), labels=ids()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert layer.keys[64:].any()
    assert not torch.equal(layer.values[64:], new)


def test_what_cannot_grow_says_why():
    with pytest.raises(FormwrightError, match="Say how far"):
        grow(built())
    with pytest.raises(FormwrightError, match="tokens is 16 now"):
        grow(built(), tokens=15)
    with pytest.raises(FormwrightError, match="no feed-forward layer called tokenformer"):
        grow(built(feedforward="gelu"), hidden=100)
    with pytest.raises(FormwrightError, match="softmax"):
        grow(built(feedforward="tokenformer(theta=softmax)"), hidden=100)
    with pytest.raises(FormwrightError, match="Linear"):
        grow(torch.nn.Linear(2, 2), tokens=4)
    for wrong in ({"tau": "new"}, {"keys": "ones"}):
        with pytest.raises((FormwrightError, TypeError), match=next(iter(wrong.values()))):
            grow(built(), tokens=24, **wrong)
