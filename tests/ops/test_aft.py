"""The sums of AFT: outputs and gradients against the definition, and keys that overflow float32."""

import pytest
import torch

from formwright.ops import aft
from formwright.ops.aft import aft_reference

SIZES = [1, 2, 7, 16, 63]
REACH = [1, 3, 8, 70]


def draw(tokens, channels=5, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, batch, tokens, channels, generator=generator, dtype=torch.float64)
    return k.requires_grad_(), v.requires_grad_(), torch.randn(tokens, tokens, generator=generator, dtype=torch.float64)


def lower(tokens):
    return torch.ones(1, tokens, tokens, dtype=torch.bool).tril()


def same(ours, theirs, *leaves):
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(9), dtype=ours.dtype)
    for mine, reference in zip(
        torch.autograd.grad((ours * weight).sum(), leaves, materialize_grads=True),
        torch.autograd.grad((theirs * weight).sum(), leaves, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("causal", [True, False])
def test_full_equals_the_definition(tokens, causal):
    k, v, w = draw(tokens)
    w.requires_grad_()
    seen = lower(tokens) if causal else torch.ones(1, tokens, tokens, dtype=torch.bool)
    same(aft.full(k, v, w, causal=causal), aft_reference(k, v, w[None, :, :, None], seen), k, v, w)


@pytest.mark.parametrize("past", [1, 6])
def test_full_with_past_keys_is_the_last_rows(past):
    k, v, w = draw(9)
    whole = aft.full(k, v, w, causal=True)
    torch.testing.assert_close(aft.full(k, v, w[past:], causal=True), whole[:, past:])


@pytest.mark.parametrize("tokens", SIZES)
def test_prefix_is_full_without_bias(tokens):
    k, v, w = draw(tokens)
    same(aft.prefix(k, v).mean(), aft_reference(k, v, w[None, :, :, None] * 0, lower(tokens)), k, v)


@pytest.mark.parametrize("cut", [1, 6, 12])
def test_a_prefix_goes_on_from_its_last_row(cut):
    k, v, _ = draw(13)
    first = aft.prefix(k[:, :cut], v[:, :cut])
    rest = aft.prefix(k[:, cut:], v[:, cut:], first.at(slice(-1, None)))
    torch.testing.assert_close(rest.mean(), aft.prefix(k, v).mean()[:, cut:])


@pytest.mark.parametrize("cuts", [(1,), (6, 7, 8), (2, 3, 9, 10, 12)])
@pytest.mark.parametrize("reach", [1, 4, 30])
@pytest.mark.parametrize("kind", ["local", "conv"])
def test_a_window_goes_on_from_its_start_and_the_last_keys(cuts, reach, kind):
    k, v, w = draw(13)
    w = torch.cat([w, w, w], 1)[:, :reach]
    k, v = k[:, None], v[:, None]

    def piece(k, v, past, end, start):
        if kind == "local":
            return aft.local(k, v, w[past:end], reach=reach, causal=True, start=start)
        return aft.causal_conv(k[..., 0], v, w[:1], queries=end - past, start=start)

    whole, _ = piece(k, v, 0, 13, None)
    start, past, tail = None, 0, 0
    for end in (*cuts, 13):
        y, start = piece(k[..., past - tail : end, :], v[..., past - tail : end, :], past, end, start)
        torch.testing.assert_close(y, whole[..., past:end, :])
        past, tail = end, min(reach - 1, end)


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("reach", REACH)
@pytest.mark.parametrize("causal", [True, False])
def test_local_is_full_with_a_bias_of_zero_beyond_the_window(tokens, reach, causal):
    k, v, _ = draw(tokens)
    lags = reach if causal else 2 * reach - 1
    band = torch.randn(
        tokens, lags, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True
    )
    i = torch.arange(tokens)
    lag = i - i[:, None]
    inside = (lag > -reach) & (lag < (1 if causal else reach))
    w = band.gather(1, (lag + reach - 1).clamp(0, lags - 1)) * inside
    seen = lower(tokens) if causal else torch.ones(1, tokens, tokens, dtype=torch.bool)
    ours, _ = aft.local(k, v, band, reach=reach, causal=causal)
    same(ours, aft_reference(k, v, w[None, :, :, None], seen), k, v, band)


def test_local_is_the_simple_sum_and_the_window_of_e_to_the_w_minus_one():
    k, v, w = draw(9)
    i = torch.arange(9)
    w = w * ((i - i[:, None]).abs() < 3)
    num = k.exp().mul(v).sum(1, keepdim=True) + torch.expm1(w) @ (k.exp() * v)
    den = k.exp().sum(1, keepdim=True) + torch.expm1(w) @ k.exp()
    band = w.new_zeros(9, 5)
    for lag in range(-2, 3):
        for t in range(9):
            if 0 <= t + lag < 9:
                band[t, lag + 2] = w[t, t + lag]
    torch.testing.assert_close(aft.local(k, v, band, reach=3, causal=False)[0], num / den)


def toeplitz(w, tokens, tap):
    """(h, t, t): w[:, tap + j - i] within the kernel, 0 beyond."""
    i = torch.arange(tokens)
    at = tap + i - i[:, None]
    return w[:, at.clamp(0, w.shape[1] - 1)] * ((at >= 0) & (at < w.shape[1]))


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("side", [1, 5, 131])
@pytest.mark.parametrize("causal", [True, False])
def test_conv_is_full_with_a_toeplitz_bias(tokens, side, causal):
    generator = torch.Generator().manual_seed(2)
    k = torch.randn(2, 3, tokens, generator=generator, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, 3, tokens, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, side, generator=generator, dtype=torch.float64, requires_grad=True)
    ours = aft.causal_conv(k, v, w, queries=tokens)[0] if causal else aft.conv(k, v, w, grid=(tokens,))
    seen = lower(tokens) if causal else torch.ones(1, tokens, tokens, dtype=torch.bool)
    bias = toeplitz(w, tokens, side - 1 if causal else side // 2)
    theirs = torch.stack(
        [aft_reference(k[:, h, :, None], v[:, h], bias[h][None, :, :, None], seen) for h in range(3)], 1
    )
    same(ours, theirs, k, v, w)


def test_conv_on_a_grid_counts_both_axes():
    generator = torch.Generator().manual_seed(2)
    k, v = torch.randn(1, 2, 12, generator=generator), torch.randn(1, 2, 12, 3, generator=generator)
    w = torch.randn(2, 3, 5, generator=generator)
    y, x = torch.arange(12) // 4, torch.arange(12) % 4
    down, right = y - y[:, None] + 1, x - x[:, None] + 2
    bias = w[:, down.clamp(0, 2), right.clamp(0, 4)] * ((down >= 0) & (down < 3) & (right >= 0) & (right < 5))
    seen = torch.ones(1, 12, 12, dtype=torch.bool)
    theirs = torch.stack([aft_reference(k[:, h, :, None], v[:, h], bias[h][None, :, :, None], seen) for h in (0, 1)], 1)
    torch.testing.assert_close(aft.conv(k, v, w, grid=(3, 4)), theirs)


def extreme(tokens=40):
    """Keys that rise from -300 to 300: exp overflows float32, and the last key's maximum would blot out the first
    rows.
    """
    k, v, w = draw(tokens, seed=4)
    with torch.no_grad():
        k += torch.linspace(-300, 300, tokens, dtype=torch.float64)[:, None] + 3 * torch.randn(tokens, 1).double()
    return k.detach(), v.detach(), w


@pytest.mark.parametrize("kind", ["full", "prefix", "local", "conv"])
def test_keys_of_any_size_are_exact_in_float32(kind):
    k, v, w = extreme()
    i = torch.arange(40)
    lag = i - i[:, None]
    small = [part.float().requires_grad_() for part in (k, v)]
    if kind == "full":
        ours = aft.full(*small, w.float(), causal=True)
    elif kind == "prefix":
        ours, w = aft.prefix(*small).mean(), w * 0
    elif kind == "local":
        ours = aft.local(*small, w[:, :8].float(), reach=8, causal=True)[0]
        w = w[:, :8].gather(1, (lag + 7).clamp(0, 7)) * ((lag <= 0) & (lag > -8))
    else:
        k = k[..., :1].expand_as(k)
        ours = aft.causal_conv(small[0][:, None, :, 0], small[1][:, None], w[:1, :8].float(), queries=40)[0][:, 0]
        w = toeplitz(w[:1, :8], 40, 7)[0]
    torch.testing.assert_close(ours, aft_reference(k, v, w[None, :, :, None], lower(40)).float(), rtol=1e-4, atol=1e-4)
    grads = torch.autograd.grad(ours.sum(), small)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("kind", ["full", "both", "prefix", "local", "local both", "conv", "conv both"])
def test_a_hidden_key_counts_nowhere_and_a_blind_row_is_zero(kind):
    k, v, w = draw(9)
    k = k.detach().clone()
    k[0, :4] = k[1] = -torch.inf
    keep = k.clone().requires_grad_()
    per_head = keep[..., 0][:, None], v[:, None]
    ours = {
        "full": lambda: aft.full(keep, v, w, causal=True),
        "both": lambda: aft.full(keep, v, w, causal=False),
        "prefix": lambda: aft.prefix(keep, v).mean(),
        "local": lambda: aft.local(keep, v, w[:, :3], reach=3, causal=True)[0],
        "local both": lambda: aft.local(keep, v, w[:, :5], reach=3, causal=False)[0],
        "conv": lambda: aft.causal_conv(*per_head, w[:1, :5], queries=9)[0][:, 0],
        "conv both": lambda: aft.conv(*per_head, w[:1, :5], grid=(9,))[:, 0],
    }[kind]()
    assert torch.equal(ours[1], torch.zeros_like(ours[1]))
    assert ("both" in kind) or torch.equal(ours[0, :4], torch.zeros_like(ours[0, :4]))
    assert (ours[0, 4:] != 0).all()
    grads = torch.autograd.grad(ours.sum(), [keep, v])
    assert all(grad.isfinite().all() and (grad[0, :4] == 0).all() for grad in grads)
