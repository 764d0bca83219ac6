"""NPRF attention: exact properties, then independent sums."""

import math

import pytest
import torch

from formwright.build import build
from formwright.contracts import Context, Mask, Toeplitz, UnsupportedContext
from formwright.errors import FormwrightError
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM
from formwright.parts.attention import nprf_rpe
from formwright.parts.attention.nprf_rpe import NPRF, by_fft, materialised, orthogonal_features
from formwright.parts.mixing.multihead import MultiHeadAttention


def heads(n, seed, dtype=torch.float64, d=6):
    return torch.randn(2, 3, n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def diagonals(queries, keys, seed=9, size=1.0, dtype=torch.float64):
    values = torch.randn(3, queries + keys - 1, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return Toeplitz(size * values, keys)


def features(queries, keys, dtype=torch.float64, padding=None, **options):
    mask = Mask(queries=queries, keys=keys, padding=padding)
    q, k = heads(queries, 1, dtype), heads(keys, 2, dtype)
    return *NPRF(head_dim=6, **options)._features(q, k, mask, None), heads(keys, 3, dtype, d=5)


def close(a, b, tolerance):
    return float((a - b).norm() / b.norm()) < tolerance


@pytest.fixture
def always_by_fft(monkeypatch):
    monkeypatch.setattr(nprf_rpe, "OUTRIGHT", 0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (63, 63), (64, 64), (5, 64), (200, 200)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_fft_is_the_explicit_product_and_so_are_its_gradients(queries, keys, causal, dtype, tolerance):
    made = []
    for how in (by_fft, materialised):
        leaves = [x.detach().requires_grad_() for x in features(queries, keys, dtype)]
        b, c = (diagonals(queries, keys, seed, dtype=dtype) for seed in (9, 10))
        leaves += [b.diagonals.requires_grad_(), c.diagonals.requires_grad_()]
        y = how(*leaves[:3], mask=Mask(queries=queries, keys=keys, causal=causal), bias=b, scale=c)
        made.append((y, *torch.autograd.grad(y.sin().sum(), leaves)))
    for ours, explicit in zip(*made, strict=True):
        assert torch.allclose(
            ours, explicit, rtol=0, atol=10 * tolerance * float(explicit.detach().abs().max().clamp(min=1))
        )
    assert close(made[0][0], made[1][0], tolerance)


@pytest.mark.usefixtures("always_by_fft")
def test_a_bias_of_zero_is_plain_kernel_attention():
    mask = Mask(queries=40, keys=40)
    phi_q, phi_k, v = features(40, 40)
    flat = Toeplitz(torch.zeros(3, 79, dtype=torch.float64), 40)
    plain = phi_q @ (phi_k.mT @ v) / (phi_q @ phi_k.sum(-2)[..., None])
    assert close(by_fft(phi_q, phi_k, v, mask=mask, bias=flat), plain, 1e-12)


def test_more_features_come_nearer_to_the_softmax_as_one_over_their_root():
    q, k, v, b = heads(24, 1), heads(24, 2), heads(24, 3), diagonals(24, 24)
    unit = torch.nn.functional.normalize
    exact = (unit(q, dim=-1) @ unit(k, dim=-1).mT + b.dense()).softmax(-1) @ v
    errors = []
    for count in (256, 4096):
        each = [
            NPRF(head_dim=6, features=count, seed=s)(q, k, v, mask=Mask(queries=24, keys=24), bias=b) for s in range(8)
        ]
        errors.append(math.sqrt(sum(float((y - exact).square().mean()) for y in each) / 8))
    assert 2.6 < errors[0] / errors[1] < 6.2  # sqrt(16) = 4, from eight draws
    assert errors[1] < 0.05 * float(exact.std())


@pytest.mark.usefixtures("always_by_fft")
def test_a_constant_added_to_the_bias_changes_nothing():
    q, k, v, b = heads(30, 1), heads(30, 2), heads(30, 3), diagonals(30, 30)
    attention, mask = NPRF(head_dim=6), Mask(queries=30, keys=30)
    raised = Toeplitz(b.diagonals + 500.0, 30)
    assert close(attention(q, k, v, mask=mask, bias=raised), attention(q, k, v, mask=mask, bias=b), 1e-10)


@pytest.mark.usefixtures("always_by_fft")
def test_later_tokens_and_pads_are_not_seen_by_fft():
    q, k, v = (heads(50, seed, torch.float32) for seed in (1, 2, 3))
    attention, b = NPRF(head_dim=6), diagonals(50, 50, dtype=torch.float32)
    other_k, other_v = k.clone(), v.clone()
    other_k[:, :, 20:], other_v[:, :, 20:] = heads(30, 5, torch.float32), 10 * heads(30, 6, torch.float32)
    causal = Mask(queries=50, keys=50, causal=True)
    first, second = attention(q, k, v, mask=causal, bias=b), attention(q, other_k, other_v, mask=causal, bias=b)
    # rounding mixes all of a sequence, in proportion to its largest value and the bias's spread
    assert torch.allclose(first[:, :, :20], second[:, :, :20], atol=1e-4)
    assert not torch.allclose(first[:, :, 20:], second[:, :, 20:], atol=1e-2)
    other_v[:, :, 20:] = torch.nan
    padded = Mask(queries=50, keys=50, padding=torch.arange(50).expand(2, -1) < 20)
    first, second = (
        attention(q, k, v, mask=padded, bias=b),
        attention(q, other_k, other_v, mask=padded, bias=b),
    )
    assert torch.equal(first, second)


@pytest.mark.usefixtures("always_by_fft")
@pytest.mark.parametrize("causal", [False, True])
def test_a_row_padded_on_the_left_is_the_row_alone(causal):
    q, k, v = (heads(40, seed, torch.float32) for seed in (1, 2, 3))
    attention, b = NPRF(head_dim=6), diagonals(40, 40, dtype=torch.float32)
    padding = torch.ones(2, 40, dtype=torch.bool)
    padding[0, :13] = False
    y = attention(q, k, v, mask=Mask(queries=40, keys=40, causal=causal, padding=padding), bias=b)
    short = Toeplitz(b.diagonals[:, 13:-13], 27)
    alone = attention(*(x[:1, :, 13:] for x in (q, k, v)), mask=Mask(queries=27, keys=27, causal=causal), bias=short)
    assert torch.allclose(y[:1, :, 13:], alone, atol=2e-5)
    assert torch.isfinite(y).all()
    assert not causal or not y[0, :, :13].any()


@pytest.mark.usefixtures("always_by_fft")
def test_a_bias_that_rises_away_from_the_query_keeps_its_digits():
    n = 60
    q, k, v = (heads(n, seed, torch.float32) for seed in (1, 2, 3))
    steep = Toeplitz(0.3 * torch.arange(1.0 - n, n).abs().expand(3, -1), n)  # e^18 from the diagonal to the corner
    mask, attention = Mask(queries=n, keys=n, causal=True), NPRF(head_dim=6)
    exact = attention(q.double(), k.double(), v.double(), mask=mask, bias=steep.dense()[None])
    assert torch.allclose(attention(q, k, v, mask=mask, bias=steep).double(), exact, atol=1e-5)


def test_the_map_is_positive_and_its_error_grows_with_the_norm_unless_normalised():
    mask = Mask(queries=300, keys=300)

    def error(size, **options):
        q, k = (size * torch.nn.functional.normalize(heads(300, seed), dim=-1) for seed in (1, 2))
        phi_q, phi_k = NPRF(head_dim=6, features=64, **options)._features(q, k, mask, 1.0)
        assert (phi_q > 0).all()
        weights = phi_q @ phi_k.mT
        unit = q / size, k / size
        exact = (unit[0] @ unit[1].mT * (1 if "normalise" not in options else size**2)).softmax(-1)
        return float((weights / weights.sum(-1, keepdim=True) - exact).norm() / exact.norm())

    assert error(1.0) == pytest.approx(error(4.0), rel=1e-6)
    assert error(1.0) < 0.3
    assert error(1.0, normalise=False) < error(2.0, normalise=False) < error(3.0, normalise=False)
    assert error(3.0, normalise=False) > 3 * error(1.0, normalise=False)


def test_features_are_orthogonal_in_blocks_and_drawn_for_each_layer():
    w = orthogonal_features(10, 4, seed=0)
    products = w[:4] @ w[:4].mT
    assert torch.allclose(products, products.diagonal().diag(), atol=1e-12)
    assert w.shape == (10, 4)
    first, second, again = (NPRF(head_dim=4, layer=layer).w[0] for layer in (0, 1, 0))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_nothing_of_n_by_n_is_stored():
    from formwright.conformance.growth import cost

    torch.manual_seed(0)
    n, peaks = 2048, []
    for length in (n // 2, n):
        q, k, v = (torch.randn(1, 1, length, 8, requires_grad=True) for _ in range(3))
        flat = 0.1 * torch.randn(1, 2 * length - 1)  # a steep one is summed in float64, at either length or at both
        b = Toeplitz(flat.requires_grad_(), length)
        mask = Mask(queries=length, keys=length, causal=True)
        peaks.append(cost(lambda q=q, k=k, v=v, b=b, m=mask: NPRF(head_dim=8)(q, k, v, mask=m, bias=b), q, k, v)[1])
    assert peaks[1] < 2.3 * peaks[0]
    assert peaks[1] < 4 * n * n


@pytest.mark.usefixtures("always_by_fft")
@pytest.mark.parametrize("position", ["rpe", "t5", "kerple", "alibi", "fire", "urpe", "rope", "decay"])
def test_any_position_on_scores_works_and_diagonals_never_become_an_array(position, monkeypatch):
    torch.manual_seed(0)
    known = {"dim": 24, "heads": 3, "head_dim": 8, "length": 48, "causal": True, "layer": 0, "layers": 1}
    part = build("position", position, **known)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    mixer = MultiHeadAttention(dim=24, heads=3, attention=NPRF(head_dim=8), position=part)
    x = torch.randn(2, 48, 24)
    context = Context.of(x, causal=True)
    by_array = MultiHeadAttention(dim=24, heads=3, attention=NPRF(head_dim=8), position=part)
    by_array.load_state_dict(mixer.state_dict())
    y = mixer(x, context)
    monkeypatch.setattr(nprf_rpe, "OUTRIGHT", 10**9)
    assert torch.allclose(y, by_array(x, context), atol=1e-5)


@pytest.mark.usefixtures("always_by_fft")
def test_a_decoder_with_a_cache_says_what_it_says_without():
    torch.manual_seed(0)
    config = TransformerConfig(
        architecture="decoder", vocab_size=40, mixer="nprf", position="rpe(std=0.5)", max_position_embeddings=64
    )
    model = TransformerForCausalLM(config).eval()
    ids = torch.randint(40, (2, 30))
    with torch.no_grad():
        full = model(ids).logits
        start = model(ids[:, :20], use_cache=True)
        step = model(ids[:, 20:21], past_key_values=start.past_key_values)
    assert torch.allclose(start.logits, full[:, :20], atol=1e-5)
    assert torch.allclose(step.logits[:, 0], full[:, 20], atol=1e-5)


@pytest.mark.parametrize(("queries", "keys", "short"), [(1, 10**6, True), (500, 500, True), (1000, 1000, False)])
def test_weights_are_made_where_that_is_less_work(queries, keys, short):
    assert nprf_rpe._is_short(Mask(queries=queries, keys=keys), 32, 32) == short


def test_bad_options_and_scores_without_a_product_are_refused():
    for wrong in ({"features": 0}, {"head_dim": 0}, {"seed": -1}):
        with pytest.raises(FormwrightError, match="NPRF"):
            NPRF(**{"head_dim": 4} | wrong)
    x = heads(4, 1)
    with pytest.raises(UnsupportedContext, match="scaling"):
        NPRF(head_dim=6)(x, x, x, mask=Mask(queries=4, keys=4), scaling=0.0)


@pytest.mark.usefixtures("always_by_fft")
@pytest.mark.reference
@pytest.mark.parametrize("kernel", ["positive", "trigonometric"])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_sums_of_the_paper_term_by_term(kernel, causal):
    n, d, m = 9, 6, 12
    q, k, v, b = heads(n, 1), heads(n, 2), heads(n, 3), diagonals(n, n)
    attention = NPRF(head_dim=d, features=m, kernel=kernel)
    y = attention(q, k, v, mask=Mask(queries=n, keys=n, causal=causal), bias=b)
    w = attention.w[0]

    def phi(x):
        x = x / math.sqrt(float(x @ x))
        if kernel == "positive":
            return [math.exp(float(row @ x)) * math.exp(-0.5) / math.sqrt(m) for row in w]
        waves = [f(float(row @ x)) for f in (math.sin, math.cos) for row in w]
        return [math.exp(0.5) * wave / math.sqrt(m) for wave in waves]

    for row, head, i in ((0, 0, 0), (1, 2, 4), (0, 1, 8)):
        above, below = torch.zeros(d, dtype=torch.float64), 0.0
        for j in range(i + 1 if causal else n):
            kernel_value = sum(a * c for a, c in zip(phi(q[row, head, i]), phi(k[row, head, j]), strict=True))
            weight = kernel_value * math.exp(float(b.diagonals[head, i - j + n - 1]))
            above, below = above + weight * v[row, head, j], below + weight
        assert torch.allclose(y[row, head, i], above / below, rtol=1e-9)
