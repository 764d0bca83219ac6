"""URPE: the theorem and the way out of it, exact properties, then independent implementations."""

import pytest
import torch

from formwright.contracts import Context, Toeplitz, UnsupportedContext, hooks
from formwright.errors import FormwrightError
from formwright.models.transformer import TransformerConfig, TransformerModel
from formwright.parts.attention.softmax import SoftmaxAttention
from formwright.parts.mixing.multihead import MultiHeadAttention
from formwright.parts.position.alibi import ALiBi
from formwright.parts.position.roformer import RoPE
from formwright.parts.position.t5 import T5Bias, t5_buckets
from formwright.parts.position.urpe import URPE

N = 31


def drawn(part, *, std=0.3, seed=0):
    """The same part with factors around 1."""
    with torch.no_grad():
        part.c.add_(torch.randn(part.c.shape, generator=torch.Generator().manual_seed(seed)), alpha=std)
    return part


def stack(position, *, architecture="encoder", layers=3, block="pre"):
    torch.manual_seed(0)
    config = TransformerConfig(
        architecture=architecture,
        vocab_size=5,
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=layers,
        intermediate_size=64,
        max_position_embeddings=N,
        position=position,
        block=block,
        init="xavier",
    )
    return TransformerModel(config).eval()


def spread(model):
    """How far the outputs of equal tokens lie apart."""
    one = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(1))
    y = model(inputs_embeds=one.expand(2, N, 32)).last_hidden_state
    return (y - y[:, :1]).abs().max().item()


@pytest.mark.parametrize("architecture", ["encoder", "decoder"])
@pytest.mark.parametrize("layers", [1, 6])
@pytest.mark.parametrize("position", ["none", "alibi", "t5", "rope", "kerple"])
def test_positions_inside_the_softmax_cannot_tell_equal_tokens_apart(position, layers, architecture):
    assert spread(stack(position, layers=layers, architecture=architecture)) < 1e-5
    assert spread(stack(f"urpe(inner={position})", layers=layers, architecture=architecture)) < 1e-5  # c = 1


@pytest.mark.parametrize("architecture", ["encoder", "decoder"])
@pytest.mark.parametrize("block", ["pre", "post"])
@pytest.mark.parametrize("inner", ["none", "alibi", "t5", "rope", "kerple"])
def test_factors_after_the_softmax_can(inner, block, architecture):
    model = stack(f"urpe(inner={inner})", architecture=architecture, block=block)
    for module in model.modules():
        if isinstance(module, URPE):
            drawn(module)
    assert spread(model) > 1e-2


def test_the_papers_net_computes_the_position():
    """W_Q = W_K = 0, B = 0, c_(j - i) = 1 for j >= i, else 0; a 1 in the values becomes (N - i + 1) / N."""
    part = URPE(heads=1, length=N, inner="none")
    with torch.no_grad():
        lags = torch.arange(1 - N, N)  # i - j
        part.c.copy_((lags <= 0).float()[:, None])
    zeros, ones = torch.zeros(1, 1, N, 8), torch.ones(1, 1, N, 1)
    context = Context(queries=N, keys=N)
    got = SoftmaxAttention()(zeros, zeros, ones, mask=context.mask, scale=part.scale(context))
    torch.testing.assert_close(got[0, 0, :, 0], torch.arange(N, 0, -1) / N)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("inner", ["t5", "alibi", "rope"])
def test_factors_of_one_change_nothing(inner, causal):
    plain = {
        "t5": T5Bias(dim=32, heads=4, causal=causal),
        "alibi": ALiBi(heads=4),
        "rope": RoPE(head_dim=8),
    }[inner]
    part = URPE(dim=32, heads=4, head_dim=8, length=N, causal=causal, inner=inner)
    part.inner.load_state_dict(plain.state_dict())
    mixer = MultiHeadAttention(dim=32, heads=4, attention=SoftmaxAttention(), position=plain)
    x = torch.randn(2, N, 32, generator=torch.Generator().manual_seed(0))
    expected = mixer(x, Context.of(x, causal=causal))
    mixer.position = part
    torch.testing.assert_close(mixer(x, Context.of(x, causal=causal)), expected, atol=1e-6, rtol=1e-6)
    drawn(part)
    assert (mixer(x, Context.of(x, causal=causal)) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (3, 25)])
def test_a_factor_is_set_by_the_distance_alone(causal, queries, keys):
    part = drawn(URPE(heads=3, length=N, causal=causal, inner="none"))
    found = part.scale(Context(queries=queries, keys=keys, causal=causal))
    assert isinstance(found, Toeplitz)
    for a, i in enumerate(range(keys - queries, keys)):
        for j in range(i + 1 if causal else keys):
            assert torch.equal(found.dense()[:, a, j], part.c[i - j + (0 if causal else N - 1)])


@pytest.mark.parametrize("causal", [True, False])
def test_given_positions_find_what_the_diagonals_hold(causal):
    part = drawn(URPE(heads=3, length=N, causal=causal, inner="none"))
    positions = torch.arange(9).expand(2, 9) + 1000
    given = part.scale(Context(queries=4, keys=9, causal=True, positions=positions))
    torch.testing.assert_close(given[1], part.scale(Context(queries=4, keys=9, causal=True)).dense())


@pytest.mark.parametrize("causal", [True, False])
def test_beyond_the_reach_the_edge_counts(causal):
    part = drawn(URPE(heads=2, length=7, causal=causal, inner="none"))
    last = part.scale(Context(queries=1, keys=50, causal=True)).dense()[:, 0]
    assert torch.equal(last[:, :44], part.c[-1][:, None].expand(2, 44))
    assert not torch.equal(last[:, 44], last[:, 43])


@pytest.mark.parametrize(
    ("options", "entries"),
    [
        ({}, 2 * N - 1),
        ({"causal": True}, N),
        ({"reach": 5}, 9),
        ({"buckets": 16}, 16),
        ({"buckets": 16, "causal": True}, 16),
    ],
)
def test_parameters_are_one_a_head_and_distance(options, entries):
    part = URPE(heads=4, length=N, inner="none", **options)
    assert [tuple(p.shape) for p in part.parameters()] == [(entries, 4)]
    assert bool((part.c == 1).all())


@pytest.mark.parametrize("causal", [True, False])
def test_buckets_are_those_of_t5(causal):
    part = drawn(URPE(heads=2, length=64, causal=causal, inner="none", buckets=16, reach=40))
    lags = torch.arange(-49, 50)
    expected = part.c[t5_buckets(lags, buckets=16, max_distance=40, causal=causal)].T
    assert torch.equal(part.scale(Context(queries=50, keys=50, causal=causal)).diagonals, expected)


def test_padded_keys_get_no_weight():
    part = drawn(URPE(dim=32, heads=4, length=N))
    padding = torch.arange(N)[None] < torch.tensor([[20], [N]])
    context = Context(queries=N, keys=N, padding=padding)
    q, k = (torch.randn(2, 4, N, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    weights = SoftmaxAttention().weights(q, k, mask=context.mask, bias=part.bias(context), scale=part.scale(context))
    assert not weights[0, :, :, 20:].any()
    assert weights[0, :, :, :20].all()


@pytest.mark.parametrize("inner", ["t5", "rope", "kerple", "none"])
def test_a_decoder_with_a_cache_equals_the_full_pass(inner):
    model = stack(f"urpe(inner={inner})", architecture="decoder")
    for module in model.modules():
        if isinstance(module, URPE):
            drawn(module)
    ids = torch.randint(5, (2, N + 9), generator=torch.Generator().manual_seed(0))  # beyond the length as well
    with torch.no_grad():
        full = model(ids, use_cache=False).last_hidden_state
        step = model(ids[:, :20], use_cache=True)
        found = [step.last_hidden_state]
        for t in range(20, N + 9):
            step = model(ids[:, t : t + 1], past_key_values=step.past_key_values, use_cache=True)
            found.append(step.last_hidden_state)
    torch.testing.assert_close(torch.cat(found, 1), full, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("inner", "given", "where"),
    [("none", set(), "model"), ("rope", {"rotate"}, "model"), ("t5", {"bias"}, "model"), ("kerple", {"bias"}, "layer")],
)
def test_it_has_the_hooks_and_the_scope_of_what_it_goes_with(inner, given, where):
    part = URPE(dim=32, heads=4, head_dim=8, length=N, inner=inner)
    assert hooks(part) == given | {"scale"}
    assert part.scope == where


def test_options_of_the_inner_position_are_handed_on():
    by_text = URPE(dim=32, heads=4, length=N, inner="t5(buckets=8, max_distance=20)")
    by_table = URPE(dim=32, heads=4, length=N, inner={"name": "t5", "buckets": 8, "max_distance": 20})
    assert by_text.inner.buckets == by_table.inner.buckets == 8
    learned = stack("urpe(inner=sinusoidal)")
    assert spread(learned) > 1e-2  # added to the tokens


def test_weight_decay_spares_the_factors():
    assert URPE.no_weight_decay == ("c",)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"heads": 0}, "heads and reach from 1"),
        ({"reach": 0}, "heads and reach from 1"),
        ({"buckets": 6}, "a multiple of 4 as buckets"),
        ({"buckets": 64, "reach": 16}, "a reach beyond the 16 single distances"),
        ({"inner": "nothing"}, "URPE's inner position: No position is called 'nothing'"),
        ({"inner": "t5"}, "URPE's inner position: position t5 needs dim"),
        ({"inner": "urpe(inner=none)"}, "has factors of its own"),
    ],
)
def test_impossible_options_are_named(options, says):
    with pytest.raises(FormwrightError, match=says):
        URPE(**({"heads": 4, "length": N, "inner": "none"} | options))


def test_a_grid_raises():
    with pytest.raises(UnsupportedContext, match="grid"):
        URPE(heads=4, length=N, inner="none").scale(Context(queries=4, keys=4, grid=(2, 2)))


def test_in_cross_attention_the_queries_count_their_own_sequence():
    part = drawn(URPE(heads=2, length=N, inner="none"))
    found = part.scale(Context(queries=4, keys=9, memory=torch.zeros(1, 9, 8)))
    lags = torch.arange(4)[:, None] - torch.arange(9)
    assert torch.equal(found[0], part.c[lags + N - 1].movedim(-1, 0))


def test_a_decoders_factors_are_not_for_both_directions():
    with pytest.raises(UnsupportedContext, match="causal=False"):
        URPE(heads=4, length=N, causal=True, inner="none").scale(Context(queries=4, keys=4))


def convolved(diagonals, values):
    """sum_j t_(i - j) values_j by FFT: (h, 2n - 1) diagonals from 1 - n up, (b, h, n, e) -> (b, h, n, e)."""
    n = values.shape[2]
    size = 2 * n - 1 + n
    spectrum = torch.fft.rfft(diagonals, size)[None, :, :, None] * torch.fft.rfft(values, size, dim=2)
    return torch.fft.irfft(spectrum, size, dim=2)[:, :, n - 1 : 2 * n - 1]


@pytest.mark.parametrize("n", [1, 7, 63])
def test_the_diagonals_serve_kernel_attention_by_fft(n):
    """(phi(q) phi(k)^T * e^B, rows scaled to 1, * C) v without any n x n array."""
    part = drawn(URPE(dim=16, heads=2, length=63))
    with torch.no_grad():
        part.inner.weight.normal_(generator=torch.Generator().manual_seed(3))
    context = Context(queries=n, keys=n)
    random = torch.Generator().manual_seed(0)
    q, k = (torch.rand(2, 2, n, 5, generator=random, dtype=torch.float64) for _ in range(2))
    v = torch.randn(2, 2, n, 4, generator=random, dtype=torch.float64)
    b, c = (found.diagonals.double() for found in (part.bias(context), part.scale(context)))

    def mixed(diagonals, values):
        outer = (k[..., :, None] * values[..., None, :]).flatten(-2)
        return (q[..., None] * convolved(diagonals, outer).unflatten(-1, (5, -1))).sum(-2)

    fast = mixed(b.exp() * c, v) / mixed(b.exp(), torch.ones_like(v[..., :1]))
    weights = q @ k.mT * Toeplitz(b.exp(), n).dense()
    slow = weights / weights.sum(-1, keepdim=True) * Toeplitz(c, n).dense() @ v
    torch.testing.assert_close(fast, slow)


@pytest.mark.reference
@pytest.mark.parametrize("n", [1, 7, N])
def test_equal_to_the_t5_attention_of_transformers_and_a_toeplitz_matrix_of_scipy(n):
    """Their scores and bias, our factors put into scipy's Toeplitz matrix, in numpy."""
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    linalg = pytest.importorskip("scipy.linalg")
    special = pytest.importorskip("scipy.special")
    from transformers import T5Config

    torch.manual_seed(0)
    config = T5Config(d_model=32, d_kv=8, num_heads=4, dropout_rate=0.0)
    theirs = modeling.T5Attention(config, has_relative_attention_bias=True).eval()
    part = drawn(URPE(dim=32, heads=4, length=N))
    part.inner.weight.data.copy_(theirs.relative_attention_bias.weight)
    x = torch.randn(2, n, 32)
    q, k, v = (linear(x).unflatten(-1, (4, 8)).transpose(1, 2) for linear in (theirs.q, theirs.k, theirs.v))
    context = Context.of(x)
    ours = SoftmaxAttention()(
        q, k, v, mask=context.mask, bias=part.bias(context), scale=part.scale(context), scaling=1.0
    )
    bias = theirs.compute_bias(n, n).detach().numpy()
    weights = special.softmax((q @ k.mT).detach().numpy() + bias, axis=-1)
    c = part.c.detach().numpy()
    factors = [linalg.toeplitz(c[N - 1 : N - 1 + n, h], c[N - 1 :: -1, h][:n]) for h in range(4)]
    expected = (weights * factors) @ v.detach().numpy()
    torch.testing.assert_close(ours.detach(), torch.from_numpy(expected), atol=1e-6, rtol=1e-5)


def test_the_last_query_needs_the_past_alone():
    part = drawn(URPE(heads=2, length=N, causal=True, inner="none"))
    assert part.scale(Context(queries=1, keys=20, causal=True)).diagonals.shape == (2, 20)
    whole = part.scale(Context(queries=20, keys=20, causal=True)).dense()[:, -1:]
    assert torch.equal(part.scale(Context(queries=1, keys=20, causal=True)).dense(), whole)
