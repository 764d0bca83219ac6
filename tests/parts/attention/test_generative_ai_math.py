"""PrFlashAttention: exact properties, and torch's attention."""

import pytest
import torch
from torch.nn import functional as F

from formwright.contracts import Context, Mask, Toeplitz, UnsupportedContext
from formwright.errors import FormwrightError
from formwright.parts.attention.generative_ai_math import PrFlashAttention, rectangle
from formwright.parts.mixing.multihead import MultiHeadAttention
from formwright.parts.position.alibi import ALiBi


def heads(n, seed, heads=4, batch=2):
    return torch.randn(batch, heads, n, 8, generator=torch.Generator().manual_seed(seed))


def causal(n):
    return Mask(queries=n, keys=n, causal=True)


def by_mask(part, q, k, v, bias=0.0):
    """The same from a whole array of scores, undrawn blocks hidden before the softmax."""
    n, b = k.shape[2], part.block
    block = torch.arange(n) // b
    seen = part.draw(-(-n // b))[block[:, None], block] & torch.ones(n, n, dtype=torch.bool).tril()
    scores = q @ k.mT / q.shape[-1] ** 0.5 + bias
    if part.weighted:
        scores = scores - part.chance((block[:, None] - block).clamp(min=0)).log().float()
    return scores.masked_fill(~seen[-q.shape[2] :], -torch.inf).softmax(-1) @ v


@pytest.mark.reference
@pytest.mark.parametrize("n", [1, 4, 37, 64])
@pytest.mark.parametrize("kv", [1, 4])
def test_with_certainty_it_is_torchs_causal_attention(n, kv):
    q, k, v = heads(n, 1), heads(n, 2, kv), heads(n, 3, kv)
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    for training in (True, False):
        part = PrFlashAttention(block=4, gamma=0.0).train(training)
        torch.testing.assert_close(part(q, k, v, mask=causal(n)), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"weighted": True}, {"gamma": 2.0, "least": 0.2}, {"layer": 3}])
@pytest.mark.parametrize("n", [5, 37])
def test_only_the_drawn_blocks_meet_and_each_whole(options, n):
    part = PrFlashAttention(block=4, **options).eval()
    q, k, v = (heads(n, seed) for seed in (1, 2, 3))
    torch.testing.assert_close(part(q, k, v, mask=causal(n)), by_mask(part, q, k, v), rtol=1e-4, atol=1e-5)


def test_a_bias_falls_on_the_right_places():
    part = PrFlashAttention(block=4).eval()
    q, k, v = (heads(23, seed) for seed in (1, 2, 3))
    bias = ALiBi(heads=4).bias(Context(queries=23, keys=23))
    wanted = by_mask(part, q, k, v, bias.dense())
    for given in (bias, bias.dense()[None], bias.dense()[None].expand(2, -1, -1, -1)):
        torch.testing.assert_close(part(q, k, v, mask=causal(23), bias=given), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("queries", [1, 2, 6, 11])
@pytest.mark.parametrize("biased", [False, True])
def test_the_last_queries_see_what_they_see_in_one_forward(queries, biased):
    part = PrFlashAttention(block=4).eval()
    q, k, v = (heads(23, seed) for seed in (1, 2, 3))
    full = Toeplitz(torch.randn(4, 45, generator=torch.Generator().manual_seed(4)), 23)
    bias = Toeplitz(full.diagonals[:, 23 - queries :], 23)
    last = part(
        q[:, :, -queries:],
        k,
        v,
        mask=Mask(queries=queries, keys=23, causal=True),
        bias=bias if biased else None,
    )
    whole = part(q, k, v, mask=causal(23), bias=full if biased else None)
    torch.testing.assert_close(last, whole[:, :, -queries:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("biased", [False, True])
def test_padding_moves_no_block(side, biased):
    part = PrFlashAttention(block=4).eval()
    q, k, v = (heads(23, seed) for seed in (1, 2, 3))
    real = torch.ones(2, 23, dtype=torch.bool)
    real[1, slice(0, 6) if side == "left" else slice(17, 23)] = False
    bias = ALiBi(heads=4).bias(Context(queries=23, keys=23)) if biased else None
    y = part(q, k, v, mask=Mask(queries=23, keys=23, causal=True, padding=real), bias=bias)
    row = [x[1:, :, real[1]] for x in (q, k, v)]
    short = ALiBi(heads=4).bias(Context(queries=17, keys=17)) if biased else None
    torch.testing.assert_close(y[1:, :, real[1]], part(*row, mask=causal(17), bias=short), rtol=1e-4, atol=1e-5)
    assert not y[1, :, ~real[1]].any()


@pytest.mark.parametrize("blocks", [1, 2, 5, 8])
def test_the_rectangle_holds_every_cell_of_the_triangle_once(blocks):
    i, j = rectangle(blocks)
    assert i.shape == ((blocks + 1) // 2, blocks + 1)
    real = i >= 0
    cells = sorted(zip(i[real].tolist(), j[real].tolist(), strict=True))
    assert cells == [(a, b) for a in range(blocks) for b in range(a + 1)]


def test_the_near_blocks_are_always_drawn_and_as_many_others_as_expected():
    part = PrFlashAttention(gamma=1.0)
    torch.manual_seed(0)
    draws = [part.draw(64) for _ in range(50)]
    assert all(drawn.diagonal().all() and drawn.diagonal(-1).all() and not drawn.triu(1).any() for drawn in draws)
    expected = sum(1 + sum(1 / r for r in range(1, i + 1)) for i in range(64))
    assert sum(int(drawn.sum()) for drawn in draws) / 50 == pytest.approx(expected, rel=0.02)
    assert float(sum(drawn.float() for drawn in draws).diagonal(-8).mean()) / 50 == pytest.approx(1 / 8, abs=0.03)
    torch.testing.assert_close(part.chance(torch.tensor([0, 1, 2, 4])), torch.tensor([1, 1, 0.5, 0.25]).double())


def test_evaluation_draws_as_often_as_the_chance_says_and_for_any_length_the_same():
    drawn = [PrFlashAttention(layer=layer).eval().draw(64) for layer in range(20)]
    expected = sum(1 + sum(1 / r for r in range(1, i + 1)) for i in range(64))
    assert sum(int(one.sum()) for one in drawn) / 20 == pytest.approx(expected, rel=0.03)
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(PrFlashAttention(layer=1).eval().draw(30), drawn[1][:30, :30])


def test_training_draws_anew_and_once_for_all_heads_and_rows():
    part = PrFlashAttention(block=1).train()
    q = torch.zeros(2, 3, 24, 4)
    v = torch.eye(24).expand(2, 3, 24, 24)
    torch.manual_seed(0)
    first, second = (part(q, q, v, mask=causal(24)) > 0 for _ in range(2))
    assert not torch.equal(first, second)
    assert all(torch.equal(first[b, h], first[0, 0]) for b in range(2) for h in range(3))


def test_the_work_is_that_of_the_drawn_blocks(monkeypatch):
    met = []
    real = F.scaled_dot_product_attention

    def counted(q, k, v, **rest):
        met.append(q.shape[0] * q.shape[2] * k.shape[2])
        return real(q, k, v, **rest)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    part = PrFlashAttention(block=4).eval()
    q = heads(64, 1, batch=1)
    part(q, q, q, mask=causal(64))
    assert sum(met) == 16 * int(part.draw(16).sum())


def test_every_query_keeps_a_key_whatever_the_chance():
    part = PrFlashAttention(block=4, gamma=50.0).train()
    q = heads(30, 1).requires_grad_()
    y = part(q, q, q, mask=causal(30))
    y.sum().backward()
    assert y.isfinite().all()
    assert q.grad.isfinite().all()


def test_inside_a_mixer_gradients_reach_a_learned_bias():
    class Learned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = torch.nn.Parameter(torch.ones(4))

        def bias(self, context):
            lags = torch.arange(1 - context.queries, context.keys)
            return Toeplitz(-self.slope[:, None] * lags.abs(), context.keys)

    position = Learned()
    mixer = MultiHeadAttention(dim=16, heads=4, attention=PrFlashAttention(block=4), position=position)
    x = torch.randn(2, 13, 16)
    mixer(x, Context.of(x, causal=True)).square().sum().backward()
    assert position.slope.grad.abs().min() > 0


@pytest.mark.parametrize("asked", [{"scale": Toeplitz(torch.ones(4, 9), 5)}, {"mask": Mask(queries=5, keys=5)}])
def test_what_it_cannot_do_it_refuses(asked):
    q = heads(5, 1)
    with pytest.raises(UnsupportedContext):
        PrFlashAttention()(q, q, q, **({"mask": causal(5)} | asked))


@pytest.mark.parametrize("wrong", [{"block": 0}, {"gamma": -1.0}, {"least": 1.5}])
def test_impossible_options_are_refused(wrong):
    with pytest.raises(FormwrightError):
        PrFlashAttention(**wrong)
