"""PartialFormer: exact properties, then attention of torch and the equations written out head by head."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from formwright.bench.measure import parameters
from formwright.conformance.subject import Subject
from formwright.conformance.suite import checks_for
from formwright.contracts import Context, UnsupportedContext
from formwright.errors import FormwrightError
from formwright.models.transformer import (
    TransformerConfig,
    TransformerForCausalLM,
    TransformerForConditionalGeneration,
    TransformerModel,
)
from formwright.parts.mixing.partialformer import PartialFormer

D, G, E = 12, 3, 5
W = D // G
MIXER = "partialformer(expanded=5)"
SIZES = {
    "vocab_size": 20,
    "hidden_size": D,
    "num_hidden_layers": 3,
    "num_attention_heads": G,
    "feedforward": "none",
    "position": "sinusoidal",
    "init": "xavier",
}


def mixer(seed=0, **options):
    torch.manual_seed(seed)
    return PartialFormer(**{"dim": D, "heads": G, "expanded": E} | options).eval()


def tokens(n=7, seed=1):
    return torch.randn(2, n, D, generator=torch.Generator().manual_seed(seed))


def count(module):
    return parameters(module)[0]


@pytest.mark.parametrize("ratio", [1, 4])
def test_parameters_are_the_paper_s_and_only_the_first_layer_makes_the_shared_map(ratio):
    later = 2 * (D * G * W + G * W) + 2 * (D * E * W + E * W) + (E * W * D + D)
    later += 2 * ratio * W * W + ratio * W + W + (G * E + E) + (E * E + E)
    assert count(mixer(ratio=ratio, layer=1)) == later
    assert count(mixer(ratio=ratio)) == later + 2 * (D * E * W + E * W)
    assert count(mixer(ratio=ratio, residual=False)) == later


def test_permuting_the_expanded_heads_changes_nothing():
    made, x, order = mixer(), tokens(), torch.tensor([3, 0, 4, 1, 2])
    before = made(x, Context.of(x))
    inside = (order[:, None] * W + torch.arange(W)).flatten()
    with torch.no_grad():
        value = slice(2 * G * W, None)
        for layer, rows in ((made.query_key_value, value), (made.gate, slice(None)), (made.head_down, slice(None))):
            chosen = order if layer is made.head_down else inside
            layer.weight[rows] = layer.weight[rows][chosen]
            layer.bias[rows] = layer.bias[rows][chosen]
        for half in (slice(E * W), slice(E * W, None)):
            made.first.weight[half], made.first.bias[half] = (
                made.first.weight[half][inside],
                made.first.bias[half][inside],
            )
        made.out.weight.copy_(made.out.weight[:, inside])
    torch.testing.assert_close(made(x, Context.of(x)), before)


def test_all_layers_add_the_very_map_of_the_first():
    torch.manual_seed(0)
    model = TransformerModel(TransformerConfig(mixer=MIXER, **SIZES)).eval()
    seen = []
    for layer in model.encoder.layers:
        made = layer.block.mixer
        plain = made._first
        made._first = lambda *given, plain=plain: seen.append(plain(*given)) or seen[-1]
    model(torch.arange(6)[None])
    assert len(seen) == 3
    assert all(one is seen[0] for one in seen)
    assert [layer.block.mixer.first is not None for layer in model.encoder.layers] == [True, False, False]


def test_a_later_layer_without_a_first_one_is_refused():
    made, x = mixer(layer=2), tokens()
    with pytest.raises(FormwrightError, match="there is none"):
        made(x, Context.of(x))
    with pytest.raises(FormwrightError, match="that has 5 heads"):
        TransformerModel(TransformerConfig(mixer=[MIXER, "partialformer(expanded=4)"], **SIZES))(torch.arange(6)[None])


def test_the_mask_comes_after_the_network_over_the_heads():
    made, x = mixer(), tokens()
    padding = torch.ones(2, 7, dtype=torch.bool)
    padding[:, 5:] = False
    out = made(x, Context.of(x, padding=padding, causal=True))
    assert out.isfinite().all()
    changed = x.clone()
    changed[:, 4:] += 1
    torch.testing.assert_close(made(changed, Context.of(x, padding=padding, causal=True))[:, :4], out[:, :4])


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_shared_map_learns_from_every_layer_also_under_checkpointing(checkpointed):
    torch.manual_seed(0)
    config = TransformerConfig(architecture="decoder", mixer=MIXER, **SIZES)
    model = TransformerForCausalLM(config).train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.arange(12)[None]
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    gradient = model.model.decoder.layers[0].block.mixer.first.weight.grad
    torch.manual_seed(0)
    plain = TransformerForCausalLM(config).train()
    plain(ids, labels=ids).loss.backward()
    torch.testing.assert_close(gradient, plain.model.decoder.layers[0].block.mixer.first.weight.grad)


def test_reentrant_checkpointing_is_refused():
    torch.manual_seed(0)
    model = TransformerForCausalLM(TransformerConfig(architecture="decoder", mixer=MIXER, **SIZES)).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    ids = torch.arange(12)[None]
    with pytest.raises(FormwrightError, match="Reentrant"):
        model(inputs_embeds=torch.randn(1, 12, D, requires_grad=True), labels=ids, use_cache=False).loss.backward()


def paired():
    torch.manual_seed(0)
    return TransformerForConditionalGeneration(
        TransformerConfig(
            architecture="encoder-decoder",
            mixer=MIXER,
            cross_mixer="partialformer(expanded=5, ratio=2, residual=false)",
            decoder_start_token_id=1,
            pad_token_id=0,
            **SIZES,
        )
    )


def test_an_encoder_decoder_learns_with_every_parameter_and_generates_the_same_with_a_cache():
    model = paired()
    ids = torch.tensor([[5, 6, 7, 8, 9], [11, 12, 3, 0, 0]])
    mask = (ids > 0).long()
    model.train()(ids, attention_mask=mask, labels=ids.flip(1).clamp(min=1)).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    model.eval()
    facts = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    cached = model.generate(ids, **facts)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **facts))
    assert torch.equal(cached[1:], model.generate(ids[1:, :3], max_new_tokens=5, do_sample=False))


def test_cross_attention_passes_what_every_mixer_with_it_must():
    subject = Subject(
        slot="mixer",
        name="partialformer without the shared map",
        target=PartialFormer,
        capabilities=frozenset({"causal", "bidirectional", "cross", "padding", "cache", "grid"}),
        options={"residual": False},
    )
    checks = [check for check in checks_for(subject) if "cross" in check.needs]
    assert checks
    for check in checks:
        check(subject)


def test_cross_attention_with_the_shared_map_and_scored_positions_are_refused():
    made, x = mixer(), tokens()
    with pytest.raises(UnsupportedContext, match="residual=false"):
        made(x, Context(queries=7, keys=7, memory=x))
    with pytest.raises(UnsupportedContext, match="No mixer"):
        TransformerModel(TransformerConfig(**SIZES | {"mixer": MIXER, "position": "alibi"}))


@pytest.mark.parametrize(
    "options", [{"expanded": 2}, {"ratio": 0}, {"dropout": 1.0}, {"activation_dropout": -0.1}, {"dim": 13}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(FormwrightError):
        mixer(**options)


@pytest.mark.reference
@torch.no_grad()
def test_without_what_is_new_it_is_the_attention_of_torch():
    made, x = mixer(expanded=G, head_scaling=False, residual=False), tokens()
    made.down.weight.zero_()
    made.down.bias.zero_()
    made.gate.weight.zero_()
    made.gate.bias.fill_(1)
    theirs = nn.MultiheadAttention(D, G, batch_first=True).eval()
    theirs.in_proj_weight.copy_(made.query_key_value.weight)
    theirs.in_proj_bias.copy_(made.query_key_value.bias)
    theirs.out_proj.load_state_dict(made.out.state_dict())
    hidden = torch.ones(7, 7, dtype=torch.bool).triu(1)
    for causal in (False, True):
        expected, _ = theirs(x, x, x, attn_mask=hidden if causal else None)
        torch.testing.assert_close(made(x, Context.of(x, causal=causal)), expected)


@pytest.mark.reference
@torch.no_grad()
def test_the_equations_head_by_head():
    made, x = mixer(ratio=3), tokens()
    q, k, v = made.query_key_value(x).split([G * W, G * W, E * W], -1)
    q0, k0 = made.first(x).chunk(2, -1)
    gate, out = F.relu(made.gate(x)), []
    raw = torch.stack([q[..., g * W : g * W + W] @ k[..., g * W : g * W + W].mT / W**0.5 for g in range(G)], -1)
    maps = made.head_down(F.relu(made.head_up(raw)))  # (b, n, n, E)
    for e in range(E):
        own = slice(e * W, e * W + W)
        logits = maps[..., e] + q0[..., own] @ k0[..., own].mT / W**0.5
        c = logits.softmax(-1) @ v[..., own]
        out.append((c + made.down(F.relu(made.up(c)))) * gate[..., own])
    torch.testing.assert_close(made(x, Context.of(x)), made.out(torch.cat(out, -1)))
