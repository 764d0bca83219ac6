"""Transformer-XL's attention: exact properties, then two independent computations."""

import math

import pytest
import torch

from formwright.conformance.growth import Meter
from formwright.contracts import Context, UnsupportedContext
from formwright.errors import FormwrightError
from formwright.models.cache import KeyValues
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM
from formwright.parts.mixing.transformer_xl import GlobalBiases, TransformerXLAttention

DIM, HEADS = 16, 4


def tokens(n, batch=2, seed=0):
    return torch.randn(batch, n, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention(**options):
    torch.manual_seed(3)
    part = TransformerXLAttention(dim=DIM, heads=HEADS, **options).double().eval()
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return part


def one_by_one(part, x, *, past=0, causal=True):
    """The score of every pair from its own wave, then softmax: two loops."""
    heads, d = part.heads, part.head_dim
    q, k, v = (t.unflatten(-1, (heads, d)) for t in part.query_key_value(x).split([heads * d] * 3, dim=-1))
    u, w = part.biases.content[:, 0], part.biases.distance[:, 0]
    rates = torch.tensor([10000.0 ** (-2 * i / DIM) for i in range(DIM // 2)], dtype=x.dtype)
    n = x.shape[1]
    scores = x.new_full((len(x), heads, n - past, n), -math.inf)
    for i in range(past, n):
        for j in range(i + 1 if causal else n):
            angles = (i - j) * rates
            r = part.relative(torch.cat([angles.sin(), angles.cos()])).unflatten(-1, (heads, d))
            pair = ((q[:, i] + u) * k[:, j]).sum(-1) + ((q[:, i] + w) * r).sum(-1)
            scores[:, :, i - past, j] = pair / math.sqrt(d)
    mixed = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
    return part.out(mixed.flatten(2))


@pytest.mark.reference
@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("n", [1, 7])
def test_equal_to_two_loops_over_the_pairs_with_and_without_memory(n, past):
    part, x = attention(), tokens(past + n)
    cache = KeyValues()
    with torch.no_grad():
        if past:
            part(x[:, :past], Context.of(x[:, :past], causal=True, cache=cache))
        context = Context(queries=n, keys=past + n, causal=True, cache=cache)
        torch.testing.assert_close(part(x[:, past:], context), one_by_one(part, x, past=past))


@pytest.mark.reference
def test_both_directions_equal_two_loops_over_the_pairs():
    part, x = attention(), tokens(6)
    torch.testing.assert_close(part(x, Context.of(x)), one_by_one(part, x, causal=False))


@pytest.mark.reference
@pytest.mark.parametrize("past", [0, 4])
def test_outputs_and_gradients_equal_the_attention_of_transformers_xlnet(past):
    from transformers import XLNetConfig
    from transformers.models.xlnet.modeling_xlnet import XLNetRelativeAttention

    part, x = attention(qkv_bias=False), tokens(past + 7).requires_grad_()
    theirs = XLNetRelativeAttention(XLNetConfig(d_model=DIM, n_head=HEADS, dropout=0.0)).double().eval()
    d, n, keys = DIM // HEADS, 7, past + 7
    with torch.no_grad():
        for name, weight in zip("qkv", part.query_key_value.weight.chunk(3), strict=True):
            getattr(theirs, name).copy_(weight.mT.unflatten(-1, (HEADS, d)))
        theirs.r.copy_(part.relative.weight.mT.unflatten(-1, (HEADS, d)))
        theirs.o.copy_(part.out.weight.unflatten(-1, (HEADS, d)))
        theirs.r_w_bias.copy_(part.biases.content[:, 0])
        theirs.r_r_bias.copy_(part.biases.distance[:, 0])
    rates = 10000.0 ** (-2 * torch.arange(DIM // 2, dtype=torch.float64) / DIM)
    angles = torch.arange(keys, -1, -1, dtype=torch.float64)[:, None] * rates  # from distance `keys`, as theirs
    r = torch.cat([angles.sin(), angles.cos()], -1)[:, None].expand(-1, 2, -1)
    flow = x.transpose(0, 1)
    q = torch.einsum("ibh,hnd->ibnd", flow[past:], theirs.q)
    k, v = (torch.einsum("jbh,hnd->jbnd", flow, getattr(theirs, name)) for name in "kv")
    hidden = torch.ones(n, keys, dtype=torch.float64).triu(1 + past)[:, :, None, None]
    mixed = theirs.rel_attn_core(q, k, v, torch.einsum("tbh,hnd->tbnd", r, theirs.r), attn_mask=hidden)
    wanted = torch.einsum("ibnd,hnd->ibh", mixed, theirs.o).transpose(0, 1)

    class Past:
        def recall(self, new):
            return torch.cat([x[:, :past], new], 1)

    ours = part(x[:, past:], Context(queries=n, keys=keys, causal=True, cache=Past()))
    torch.testing.assert_close(ours, wanted)
    a, b = (torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for y in (ours, wanted))
    torch.testing.assert_close(a, b)
    weight = torch.autograd.grad(ours.square().sum(), part.relative.weight)[0]
    theirs_weight = torch.autograd.grad(wanted.square().sum(), theirs.r)[0].flatten(1).mT
    torch.testing.assert_close(weight, theirs_weight)


@pytest.mark.parametrize("clamp_len", [None, 3])
def test_only_distances_enter(clamp_len):
    part, x = attention(clamp_len=clamp_len), tokens(9)
    plain = part(x, Context.of(x, causal=True))
    moved = torch.arange(9)[None] + torch.tensor([[0], [5000]])
    torch.testing.assert_close(part(x, Context.of(x, causal=True, positions=moved)), plain)
    spread = part(x, Context.of(x, causal=True, positions=2 * torch.arange(9)[None]))
    assert (spread - plain)[:, 1:].abs().max() > 1e-3


def test_a_token_sees_none_after_it():
    part, x = attention(), tokens(9)
    changed = x.clone()
    changed[:, 5:] += 1
    before, after = (part(y, Context.of(y, causal=True)) for y in (x, changed))
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] - after[:, 5:]).abs().min() > 0


def test_clamping_changes_only_queries_that_see_further_and_nothing_when_nothing_is_further():
    x = tokens(9)
    free, near, far = (attention(clamp_len=c)(x, Context.of(x, causal=True)) for c in (None, 3, 8))
    torch.testing.assert_close(far, free)
    torch.testing.assert_close(near[:, :4], free[:, :4])
    assert (near - free)[:, 4:].abs().amax(-1).min() > 1e-6


def test_a_window_is_the_same_length_for_every_query():
    part, x = attention(window=3), tokens(9)
    shown = []
    part(x, Context.of(x, causal=True, attentions=shown))
    lags = torch.arange(9)[:, None] - torch.arange(9)
    assert torch.equal((shown[0] > 0)[0, 0], (lags >= 0) & (lags < 3))


def test_parameters_are_five_matrices_and_two_vectors_a_head():
    part = attention(qkv_bias=False)
    assert sum(p.numel() for p in part.parameters()) == 5 * DIM * DIM + 2 * DIM
    wide = TransformerXLAttention(dim=DIM, heads=3, head_dim=10, kv_heads=1, qkv_bias=False)
    assert sum(p.numel() for p in wide.parameters()) == DIM * 10 * (3 + 2 + 3 + 3) + 2 * 30


def test_the_global_biases_start_small_and_are_spared_weight_decay():
    torch.manual_seed(0)
    biases = GlobalBiases(heads=64, head_dim=64)
    assert float(biases.content.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(biases.distance.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert biases.no_weight_decay == ("content", "distance")


def test_shared_biases_are_read_and_belong_to_their_owner():
    first, second, x = attention(), attention(), tokens(5)
    second.share(first.biases)
    assert not [name for name, _ in second.named_parameters() if "biases" in name]
    before = second(x, Context.of(x, causal=True))
    with torch.no_grad():
        first.biases.content.add_(1)
    assert (second(x, Context.of(x, causal=True)) - before).abs().max() > 1e-6


def test_the_relative_term_takes_memory_for_the_scores_and_none_times_the_width():
    n, part = 256, TransformerXLAttention(dim=DIM, heads=1, head_dim=64).eval()
    x = torch.randn(1, n, DIM)
    meter = Meter()
    with torch.no_grad(), meter:
        part(x, Context.of(x, causal=True))
    assert meter.peak < 6 * 4 * n * n  # a q x k x d array alone would be 64 times 4 n^2


def test_grouped_heads_equal_repeated_ones():
    grouped, x = attention(kv_heads=2), tokens(6)
    whole = attention()
    d = DIM // HEADS
    q, k, v = grouped.query_key_value.weight.split([4 * d, 2 * d, 2 * d])
    bq, bk, bv = grouped.query_key_value.bias.split([4 * d, 2 * d, 2 * d])
    repeated = [t.unflatten(0, (2, d)).repeat_interleave(2, 0).flatten(0, 1) for t in (k, v, bk, bv)]
    state = grouped.state_dict() | {
        "query_key_value.weight": torch.cat([q, repeated[0], repeated[1]]),
        "query_key_value.bias": torch.cat([bq, repeated[2], repeated[3]]),
    }
    whole.load_state_dict(state)
    torch.testing.assert_close(grouped(x, Context.of(x, causal=True)), whole(x, Context.of(x, causal=True)))


def test_an_adapter_in_the_place_of_a_matrix_is_used_on_every_way():
    part, x = attention(), tokens(6)
    positions = torch.arange(6)[None]

    class Doubled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, y):
            return 2 * self.inner(y)

    part.relative = Doubled(part.relative)
    by_table = part(x, Context.of(x, causal=True))
    torch.testing.assert_close(part(x, Context.of(x, causal=True, positions=positions)), by_table)


def test_a_decoder_of_it_learns_and_decodes():
    torch.manual_seed(0)
    config = TransformerConfig(architecture="decoder", mixer="transformer-xl", position="none", block="sub-ln")
    model = TransformerForCausalLM(config).eval()
    ids = torch.randint(256, (2, 9))
    kept = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(kept, model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False))
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dim": 15, "heads": 3}, "even width"),
        ({"dim": 16, "heads": 3}, "does not split"),
        ({"dim": 16, "heads": 4, "kv_heads": 3}, "must divide"),
        ({"dim": 16, "heads": 4, "dropout": 1.0}, "probability"),
        ({"dim": 16, "heads": 4, "window": 0}, "window"),
        ({"dim": 16, "heads": 4, "clamp_len": 0}, "clamp_len"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(FormwrightError, match=words):
        TransformerXLAttention(**options)


def test_what_has_no_distance_is_refused():
    part, x = attention(), tokens(4)
    for asked in ({"memory": x}, {"grid": (2, 2)}, {"cache": KeyValues()}):
        with pytest.raises(UnsupportedContext):
            part(x, Context.of(x, **asked))
