"""The configurable Transformer as an ordinary Hugging Face model."""

import subprocess
import sys

import jaxtyping
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
)

from formwright.contracts import UnsupportedContext
from formwright.errors import FormwrightError
from formwright.models.transformer import (
    TransformerConfig,
    TransformerForCausalLM,
    TransformerForConditionalGeneration,
    TransformerForImageClassification,
    TransformerForSequenceClassification,
    TransformerModel,
    pool,
)

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "init": "normal(std=0.3)",
}
PAIRED = {"architecture": "encoder-decoder", "decoder_start_token_id": 1, "eos_token_id": None}
HEADS = {
    AutoModel: {},
    AutoModelForCausalLM: {"architecture": "decoder"},
    AutoModelForSeq2SeqLM: PAIRED,
    AutoModelForMaskedLM: {"head_transform": True},
    AutoModelForTokenClassification: {"num_labels": 5},
    AutoModelForSequenceClassification: {"num_labels": 5, "pooler": True},
    AutoModelForImageClassification: {"image_size": 8, "patch_size": 4, "vocab_size": 0},
}


def config(**fields):
    return TransformerConfig(**SMALL | fields)


def decoder(**fields):
    torch.manual_seed(0)
    return TransformerForCausalLM(config(architecture="decoder", **fields)).eval()


def ids(rows=2, tokens=9, seed=0):
    return torch.randint(3, 50, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def inputs_of(auto):
    if auto is AutoModelForImageClassification:
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    return {"input_ids": ids()} | ({"decoder_input_ids": ids(tokens=4)} if auto is AutoModelForSeq2SeqLM else {})


@pytest.mark.parametrize("auto", HEADS)
def test_every_head_saves_and_reloads_through_its_auto_class(auto, tmp_path):
    model = auto.from_config(config(**HEADS[auto])).eval()
    model.save_pretrained(tmp_path)
    again, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(again.eval()(**inputs_of(auto))[0], model(**inputs_of(auto))[0])


def test_a_fresh_process_gives_the_same_logits(tmp_path):
    model = decoder(mixer=["aft-simple", "softmax"], position="learned")
    model.save_pretrained(tmp_path / "model")
    torch.save(model(ids()).logits, tmp_path / "logits.pt")
    code = (
        "import sys, torch, formwright.models.transformer; from transformers import AutoModelForCausalLM as A\n"
        "m = A.from_pretrained(sys.argv[1] + '/model').eval()\n"
        "g = torch.Generator().manual_seed(0); x = torch.randint(3, 50, (2, 9), generator=g)\n"
        "assert torch.equal(m(x).logits, torch.load(sys.argv[1] + '/logits.pt', weights_only=True))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_a_part_with_its_own_initialisation_keeps_loaded_weights(tmp_path):
    model = decoder(position="learned")
    with torch.no_grad():
        model.model.decoder.position.weight.fill_(7.0)
    model.save_pretrained(tmp_path)
    assert (AutoModelForCausalLM.from_pretrained(tmp_path).model.decoder.position.weight == 7).all()


def test_the_same_seed_gives_the_same_weights():
    assert all(torch.equal(a, b) for a, b in zip(decoder().parameters(), decoder().parameters(), strict=True))


@pytest.mark.parametrize("fields", [{}, {"num_key_value_heads": 2}, {"num_key_value_heads": 1}, {"head_dim": 6}])
def test_attention_has_the_parameters_its_heads_ask_for(fields):
    mixer = decoder(**fields).model.decoder.mixers[0]
    heads, kv_heads, width = 4, fields.get("num_key_value_heads", 4), fields.get("head_dim", 4)
    assert mixer.query_key_value.weight.shape == ((heads + 2 * kv_heads) * width, 16)
    assert mixer.out.weight.shape == (16, heads * width)


def test_lists_of_parts_repeat_over_the_layers():
    model = decoder(num_hidden_layers=6, mixer=["aft-simple", "aft-simple", "softmax"], feedforward=["gelu", "swiglu"])
    names = [type(mixer).__name__ for mixer in model.model.decoder.mixers]
    assert names == ["AFTSimple", "AFTSimple", "MultiHeadAttention"] * 2
    assert type(model.model.decoder.layers[3].block.feedforward).__name__ == "SwiGLU"


def test_tied_and_untied_embeddings():
    tied, untied = decoder(), decoder(tie_word_embeddings=False)
    assert tied.lm_head.weight is tied.model.embeddings.tokens.weight
    assert untied.lm_head.weight is not untied.model.embeddings.tokens.weight
    assert untied.num_parameters() - tied.num_parameters() == 50 * 16


GENERATING = [
    {"position": "sinusoidal"},
    {"position": "learned", "num_key_value_heads": 2},
    {"position": "alibi"},
    {"position": "rope", "norm": "rmsnorm", "feedforward": "swiglu"},
    {"position": "t5"},
    {"position": "kerple"},
    {"mixer": ["aft-simple", "softmax"]},
    {"mixer": "mamba", "feedforward": "none", "position": "none"},
    {"mixer": ["mamba", "mamba", "softmax"], "position": "rope", "num_hidden_layers": 3},
]


@pytest.mark.parametrize("fields", GENERATING, ids=str)
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"prefill_chunk_size": 3}], ids=str)
def test_generating_with_a_cache_equals_generating_without(fields, how):
    model = decoder(**fields)
    plain = {key: value for key, value in how.items() if key != "prefill_chunk_size"}
    asked = {"max_new_tokens": 7, "do_sample": False}
    with_cache = model.generate(ids(), **asked, **how)
    assert torch.equal(with_cache, model.generate(ids(), use_cache=False, **asked, **plain))
    assert with_cache.shape == (2, 16)


@pytest.mark.parametrize("fields", GENERATING, ids=str)
def test_a_left_padded_prompt_goes_on_as_it_does_alone(fields):
    model, prompt = decoder(**fields), ids()
    mask = torch.ones_like(prompt)
    mask[0, :4] = 0
    asked = {"max_new_tokens": 6, "do_sample": False}
    alone = model.generate(prompt[:1, 4:], **asked)
    assert torch.equal(model.generate(prompt, attention_mask=mask, **asked)[:1, 4:], alone)


@pytest.mark.parametrize("fields", GENERATING, ids=str)
def test_a_cache_can_be_continued(fields):
    model, whole = decoder(**fields), ids(tokens=12)
    first = model(whole[:, :5], use_cache=True)
    rest = model(whole[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(rest.logits, model(whole, use_cache=False).logits[:, 5:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=str)
def test_an_encoder_decoder_generates_the_same_with_and_without_cache_and_ignores_padding(how):
    torch.manual_seed(0)
    model = TransformerForConditionalGeneration(config(**PAIRED)).eval()
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 5:] = 0
    asked = {"max_new_tokens": 7, "do_sample": False, **how}
    cached = model.generate(ids(), attention_mask=mask, **asked)
    assert torch.equal(cached, model.generate(ids(), attention_mask=mask, use_cache=False, **asked))
    assert torch.equal(cached[:1], model.generate(ids()[:1, :5], **asked))


def test_a_static_cache_is_refused():
    with pytest.raises(FormwrightError, match="no meaning"):
        decoder().generate(ids(), max_new_tokens=2, cache_implementation="static")


def test_a_past_that_is_not_to_be_used_is_refused():
    model = decoder()
    written = model.generate(ids(), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    asked = {"past_key_values": written.past_key_values, "max_new_tokens": 3, "do_sample": False}
    with pytest.raises(FormwrightError, match="use_cache=False"):
        model.generate(written.sequences, use_cache=False, **asked)
    longer = model.generate(ids(), max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(written.sequences, **asked), longer)


def test_assisted_decoding_gives_the_greedy_text():
    model, draft = decoder(), decoder(num_hidden_layers=1)
    asked = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(
        model.generate(ids(rows=1), assistant_model=draft, **asked), model.generate(ids(rows=1), **asked)
    )


def test_hidden_states_and_attention_weights_come_on_request():
    out = decoder()(ids(), output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in out.hidden_states] == [(2, 9, 16)] * 3
    assert [tuple(weights.shape) for weights in out.attentions] == [(2, 4, 9, 9)] * 2
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(2, 4, 9))
    assert not out.attentions[0].triu(1).any()


def test_an_encoder_decoder_keeps_its_two_kinds_of_weights_apart():
    torch.manual_seed(0)
    model = TransformerForConditionalGeneration(config(**PAIRED)).eval()
    asked = {"output_attentions": True, "output_hidden_states": True}
    out = model(ids(), decoder_input_ids=ids(tokens=4), **asked)
    assert [tuple(weights.shape) for weights in out.attentions] == [(2, 4, 4, 4)] * 2
    assert [tuple(weights.shape) for weights in out.cross_attentions] == [(2, 4, 4, 9)] * 2
    written = model.generate(ids(), max_new_tokens=3, return_dict_in_generate=True, **asked)
    assert [tuple(layers[0].shape[-2:]) for layers in written.cross_attentions] == [(1, 9)] * 3
    assert [tuple(layers[0].shape[-2:]) for layers in written.decoder_attentions] == [(1, 1), (1, 2), (1, 3)]
    assert len(written.decoder_hidden_states) == 3


def test_checkpointed_gradients_are_the_plain_ones():
    def gradients(checkpoint):
        model = decoder().train()
        if checkpoint:
            model.gradient_checkpointing_enable()
        model(ids(), labels=ids()).loss.backward()
        return [weight.grad for weight in model.parameters()]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, again)


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (TransformerForCausalLM, {"architecture": "decoder", "position": "learned"}),
        (TransformerForSequenceClassification, {"pooling": "last"}),
    ],
)
def test_a_model_exports_with_free_sizes(cls, fields, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # a free size is no int
    torch.manual_seed(0)
    model, free = cls(config(**fields)).eval(), {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    decodes = cls is TransformerForCausalLM

    def inputs(rows, tokens):
        mask = (torch.arange(tokens) >= torch.arange(rows)[:, None]).long()
        places = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0), "use_cache": False} if decodes else {}
        return {"input_ids": ids(rows, tokens), "attention_mask": mask, **places}

    shapes = {name: free if torch.is_tensor(value) else None for name, value in inputs(2, 9).items()}
    program = torch.export.export(model, (), inputs(2, 9), dynamic_shapes=shapes).module()
    given = inputs(3, 13)
    real = given["attention_mask"].bool() if decodes else ...
    with torch.no_grad():
        torch.testing.assert_close(program(**given).logits[real], model(**given).logits[real], atol=1e-5, rtol=1e-5)


HARDENED = {"feedforward": "fast-feedforward(depth=1)"}


def test_extra_losses_count_once_under_checkpointing():
    def trained(checkpoint):
        model = decoder(**HARDENED).train()
        if checkpoint:
            model.gradient_checkpointing_enable()
        out = model(ids(), labels=ids())
        before = out.extra_losses["hardening"].item()
        out.loss.backward()
        assert out.extra_losses["hardening"].item() == before
        return [weight.grad for weight in model.parameters()]

    for plain, again in zip(trained(False), trained(True), strict=True):
        torch.testing.assert_close(plain, again)


def test_checkpointing_that_would_lose_a_gradient_or_write_a_cache_twice_is_refused():
    model = decoder(**HARDENED).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(FormwrightError, match="use_reentrant"):
        model(ids(), labels=ids())
    model = decoder().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(FormwrightError, match="use_cache=False"):
        model(ids(), labels=ids(), use_cache=True)
    assert model.generate(ids(), max_new_tokens=2).shape == (2, 11)  # no gradient, no second run


def test_the_encoder_of_an_encoder_decoder_hands_its_extra_losses_on():
    torch.manual_seed(0)
    model = TransformerForConditionalGeneration(config(**PAIRED, **HARDENED)).train()
    both, memory = model(ids(), labels=ids(tokens=4)), model.model.encode(ids())
    decoders = model(encoder_outputs=memory, labels=ids(tokens=4)).extra_losses["hardening"]
    encoders = {}
    model.model.encode(ids(), losses=encoders)
    torch.testing.assert_close(both.extra_losses["hardening"], encoders["hardening"] + decoders)


def test_a_cache_of_another_model_or_batch_is_refused():
    model, whole = decoder(), ids()
    with pytest.raises(UnsupportedContext, match="not made for this model"):
        model(whole, past_key_values=DynamicCache())
    with pytest.raises(UnsupportedContext, match="not made for this model"):
        model(whole, past_key_values=decoder(mixer="mamba", position="none").model.new_cache())
    cache = model(whole[:1], use_cache=True).past_key_values
    with pytest.raises(UnsupportedContext, match="holds 1 sequences, but 2"):
        model(whole, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    assert model(whole, past_key_values=cache).logits.shape == (2, 9, 50)


@pytest.mark.parametrize(
    ("fields", "labels", "logits"),
    [
        ({"num_labels": 3}, torch.tensor([0, 2]), 3),
        ({"num_labels": 1, "problem_type": "regression"}, torch.tensor([0.5, -1.0]), 1),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, torch.tensor([[0.0, 1, 1], [1, 0, 0]]), 3),
    ],
)
def test_classes_numbers_and_several_classes_train(fields, labels, logits):
    model = TransformerForSequenceClassification(config(**fields))
    out = model(ids(), labels=labels)
    assert out.logits.shape == (2, logits)
    out.loss.backward()
    assert model.classifier.weight.grad.any()


@pytest.mark.parametrize("how", ["mean", "first", "last"])
def test_pooling_sees_real_tokens_alone(how):
    x = torch.randn(2, 6, 3)
    left, right = torch.tensor([[0, 0, 1, 1, 1, 1]]), torch.tensor([[1, 1, 1, 1, 0, 0]])
    mask = torch.cat([left, right])
    pooled = pool(x, mask, how)
    torch.testing.assert_close(pooled[:1], pool(x[:1, 2:], None, how))
    torch.testing.assert_close(pooled[1:], pool(x[1:, :4], None, how))


def test_an_image_is_read_row_by_row():
    model = TransformerForImageClassification(config(image_size=8, patch_size=2, num_channels=1, vocab_size=0))
    patches = model.model.embeddings.patches
    pixels = torch.zeros(1, 1, 8, 8)
    pixels[0, 0, 2:4, 4:6] = 1  # patch row 1, column 2 of 4
    changed = (patches(pixels) - patches(torch.zeros(1, 1, 8, 8))).abs().sum(-1)
    assert changed[0].nonzero().flatten().tolist() == [6]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"architecture": "both"}, "encoder, decoder"),
        ({"pooling": "max"}, "mean, first, last"),
        ({"mixer": "sofmax"}, "softmax"),
        ({"mixer": "softmax(dropuot=0.1)"}, "dropout"),
        ({"mixer": "softmax(dropout=1.5)"}, "probability"),
        ({"num_key_value_heads": 3}, "divide"),
        ({"hidden_size": 18}, "18"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"vocab_size": 0}, "ids or images"),
        ({"mixer": []}, "empty list"),
        ({"architecture": "encoder-decoder", "num_decoder_layers": 0}, "num_decoder_layers"),
        ({"head_dim": 0}, "head_dim"),
        ({"mixer": "softmax(dropout=0.1,dropout=0.2)"}, "sets dropout twice"),
    ],
)
def test_impossible_configs_say_what_is_wrong(fields, says):
    with pytest.raises(FormwrightError, match=says):
        TransformerModel(config(**fields))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: m(ids(), attention_mask=torch.ones(2, 5)), "attention_mask"),
        (lambda m: m(ids(), position_ids=torch.arange(4)[None]), "position_ids"),
        (lambda m: m(), "input_ids"),
        (lambda m: m(ids(), token_type_ids=torch.ones(2, 9, dtype=torch.long)), "type_vocab_size"),
        (lambda _: TransformerModel(config())(ids(), decoder_input_ids=ids()), "encoder-decoder"),
        (lambda _: AutoModelForTokenClassification.from_config(config(**PAIRED)), "encoder or a decoder"),
        (lambda m: m.set_attn_implementation("eager"), "mixer"),
    ],
)
def test_impossible_calls_say_what_is_wrong(call, says):
    with pytest.raises(FormwrightError, match=says):
        call(decoder())


def test_a_position_that_no_mixer_uses_is_refused():
    with pytest.raises(UnsupportedContext, match="added to the tokens"):
        decoder(mixer="mamba", position="rope")


def test_configs_survive_json(tmp_path):
    made = config(mixer=[{"name": "softmax", "dropout": 0.1}, "softmax"], position="rope(base=500.0)")
    made.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert (again.mixer, again.position, again.is_encoder_decoder) == (made.mixer, made.position, False)
