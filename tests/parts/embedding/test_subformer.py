"""SAFE: exact properties, then torch's own layer with the change of width written out."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import formwright
from formwright.contracts import Context
from formwright.errors import FormwrightError
from formwright.models.transformer import (
    TransformerConfig,
    TransformerForCausalLM,
    TransformerForConditionalGeneration,
    TransformerForMaskedLM,
    TransformerForSequenceClassification,
    TransformerModel,
)

D, R, V = 20, 12, 30
SAFE = f"safe(rank={R}, heads=3)"
SIZES = {"vocab_size": V, "hidden_size": D, "num_attention_heads": 2, "num_hidden_layers": 3}
PAIR = {"architecture": "encoder-decoder", "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}


def model(kind=TransformerForCausalLM, **options):
    torch.manual_seed(0)
    made = kind(TransformerConfig(**{"architecture": "decoder", "embedding": SAFE, **SIZES, **options})).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def ids(length=9):
    return torch.randint(2, V, (2, length), generator=torch.Generator().manual_seed(1))


def size(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_are_counted_as_in_the_paper():
    norms, attention, feedforward = 2 * R + 2 * D, 4 * R * R + 4 * R, R * R + R + R * D + D
    made, linear, plain = model(), model(embedding=f"factorised(rank={R})"), model(embedding="none")
    table, lower, places = V * R, D * R + R, 512 * R
    assert size(plain) - size(made) == (V + 512) * D - (table + places + lower + norms + attention + feedforward)
    assert size(plain) - size(linear) == (V + 512) * D - (table + places + lower + R * D + D)


@torch.no_grad()
def test_tied_logits_are_the_lowered_states_times_the_narrow_table():
    made = model()
    table = made.model.embeddings.tokens.weight
    assert made.lm_head.weight is table
    assert table.shape == (V, R)
    lowered = F.linear(made.model(ids()).last_hidden_state, made.lower.weight, made.lower.bias)
    torch.testing.assert_close(made(ids()).logits, lowered @ table.T)
    untied = model(tie_word_embeddings=False)
    assert untied.lower is None
    assert untied.lm_head.weight.shape == (V, D)


@torch.no_grad()
@pytest.mark.parametrize("position", ["learned", "rope", "alibi", "none", "t5"])
def test_a_decoder_sees_no_later_token_and_decodes_with_a_cache(position):
    made = model(position=position)
    whole = made(ids()).logits
    changed = ids()
    changed[:, 5] = (changed[:, 5] + 1) % V
    after = made(changed).logits
    assert torch.equal(after[:, :5], whole[:, :5])
    assert not torch.allclose(after[:, 6], whole[:, 6])
    cache, steps = None, []
    for part in (ids()[:, :4], *ids()[:, 4:].split(1, dim=1)):
        output = made(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-4, rtol=1e-4)
    assert len(cache.layers) == 3 + 1  # the lift keeps keys of its own
    assert made(ids(), output_attentions=True).attentions[0].shape[1] == 2  # and is no layer


@torch.no_grad()
def test_padding_on_either_side_is_not_read_and_beams_reorder_the_lifts_cache():
    made = model(pad_token_id=0, bos_token_id=1, eos_token_id=None)
    zeros = torch.zeros_like(ids()[:, :2])
    left, right = torch.cat([zeros, ids()], 1), torch.cat([ids(), zeros], 1)
    whole = made(ids()).logits
    for padded, kept in ((left, slice(2, None)), (right, slice(0, 9))):
        found = made(padded, attention_mask=(padded != 0).long()).logits[:, kept]
        torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)
    choice = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    assert torch.equal(made.generate(ids(), **choice), made.generate(ids(), **choice, use_cache=False))


@torch.no_grad()
def test_an_encoder_decoder_has_one_table_and_a_lift_on_each_side():
    made = model(TransformerForConditionalGeneration, **PAIR)
    assert made.model.encoder.lift is not made.model.decoder.lift
    assert made.lm_head.weight is made.model.embeddings.tokens.weight
    assert made.model.encoder.lift.scale == pytest.approx(R**0.5)
    assert made.model.decoder.lift.scale == pytest.approx(D**0.5)
    choice = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(made.generate(ids(), **choice), made.generate(ids(), **choice, use_cache=False))


@pytest.mark.parametrize("embedding", [SAFE, f"factorised(rank={R})"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (TransformerForCausalLM, {"position": "rope"}),
        (TransformerForCausalLM, {"position": "sinusoidal", "block": "post"}),
        (TransformerForMaskedLM, {"architecture": "encoder", "embedding_norm": True, "type_vocab_size": 2}),
        (TransformerForSequenceClassification, {"architecture": "encoder", "position": ["alibi", "rope"]}),
    ],
)
def test_every_parameter_learns_and_a_saved_model_is_the_same(tmp_path, embedding, kind, options):
    made = model(kind, embedding=embedding, **options)
    labels = torch.tensor([0, 1]) if kind is TransformerForSequenceClassification else ids()
    made.train()(ids(), labels=labels).loss.backward()
    assert all(parameter.grad is not None for parameter in made.parameters())
    made.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(formwright.load(tmp_path)(ids()).logits, made(ids()).logits)


def test_bad_input_is_refused():
    for options, said in (
        ({"embedding": "safe"}, "rank"),
        ({"embedding": f"safe(rank={D})"}, "below the model's width"),
        ({"embedding": "factorised(rank=0)"}, "rank=1 or more"),
        ({"embedding": "safe(rank=12, heads=5)"}, "does not split"),
        ({"embedding": SAFE, "image_size": 8}, "reads images"),
    ):
        with pytest.raises(FormwrightError, match=said):
            model(**options)


@torch.no_grad()
@pytest.mark.reference
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_the_lift_is_torchs_attention_and_two_matrices(side):
    made = model(TransformerModel, architecture=side, norm={"name": "layernorm", "eps": 1e-5})
    stack = getattr(made, side)
    lift = stack.lift
    attention = nn.MultiheadAttention(R, 3, batch_first=True).eval()
    attention.in_proj_weight.copy_(lift.mixer.query_key_value.weight)
    attention.in_proj_bias.copy_(lift.mixer.query_key_value.bias)
    attention.out_proj.load_state_dict(lift.mixer.out.state_dict())
    z = made.embeddings.tokens(ids()) * (R if side == "encoder" else D) ** 0.5 + stack.position.weight[:9]
    hidden = nn.Transformer.generate_square_subsequent_mask(9) if side == "decoder" else None
    z = F.layer_norm(z + attention(z, z, z, attn_mask=hidden)[0], (R,), lift.mixer_norm.weight, lift.mixer_norm.bias)
    x = F.linear(F.relu(F.linear(z, lift.up.weight, lift.up.bias)), lift.down.weight, lift.down.bias)
    x = F.layer_norm(x, (D,), lift.feedforward_norm.weight, lift.feedforward_norm.bias)
    found = made(ids(), output_hidden_states=True).hidden_states[0]
    torch.testing.assert_close(found, x, atol=1e-5, rtol=1e-5)
    context = Context.of(z, causal=side == "decoder")
    assert lift(z, context).shape == (2, 9, D)
