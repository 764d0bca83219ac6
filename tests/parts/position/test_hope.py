"""HoPE: exact properties, against the paper's matrices and all pairs in float64."""

import math

import pytest
import torch

from formwright.contracts import Context, UnsupportedContext
from formwright.errors import FormwrightError
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM
from formwright.ops.rotary import rotary_angles, rotate, rotation
from formwright.parts.position.hope import HoPE


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def part(heads=3, head_dim=8, **options):
    torch.manual_seed(0)
    made = HoPE(heads=heads, head_dim=head_dim, **options).double()
    if made.rho is not None:
        with torch.no_grad():
            made.rho.add_(torch.randn_like(made.rho))
    return made


def boost(angle, signature=1.0):
    """The plane's map [[c, s x], [x, c]] with signature s: a boost at 1, a rotation at -1."""
    root = torch.tensor(signature, dtype=torch.complex128).sqrt()
    c, x = (root * angle).cosh().real, ((root * angle).sinh() / root).real
    return torch.stack((torch.stack((c, signature * x), -1), torch.stack((x, c), -1)), -2)


def by_matrices(hope, q, k, at, *, damped=True):
    """Damping times q^T B(t f) k, summed over the pairs of every head, for all pairs of tokens."""
    t = (at[:, None] - at[None, :]).double()
    found = torch.zeros(*q.shape[:2], len(at), len(at), dtype=torch.float64)
    for head in range(q.shape[1]):
        damping = 1 + torch.nn.functional.softplus(hope.rho[head]) if hope.rho is not None else hope.damping
        for pair in range(q.shape[-1] // 2):
            f = hope.base ** (-2 * pair / q.shape[-1])
            channels = slice(2 * pair, 2 * pair + 2)
            product = torch.einsum("bmi,mnij,bnj->bmn", q[:, head, :, channels], boost(t * f), k[:, head, :, channels])
            found[:, head] += product * torch.exp(-t.abs() * damping * f) if damped else product
    return found / math.sqrt(q.shape[-1])


def by_pairs(hope, q, k, at):
    """The two decays of every pair, with an n x n x d array."""
    t = (at[:, None] - at[None, :]).double()
    plus, minus = ([x[..., 0::2] + sign * x[..., 1::2] for x in (q, k)] for sign in (1, -1))
    behind, ahead = (rates.chunk(2, -1) for rates in hope.rates(q))
    found = 0
    for (a, b), back, forth in zip((plus, minus), behind, ahead, strict=True):
        rates = torch.where(t[..., None] >= 0, back[:, None, None], forth[:, None, None])
        found = found + torch.einsum("bhmi,bhni,hmni->bhmn", a, b, torch.exp(-t.abs()[..., None] * rates))
    return found / 2 / math.sqrt(q.shape[-1])


def test_boosts_add_up_keep_the_interval_and_turn_into_rotations():
    one, two = torch.tensor(0.7, dtype=torch.float64), torch.tensor(-1.9, dtype=torch.float64)
    torch.testing.assert_close(boost(one) @ boost(two), boost(one + two))
    torch.testing.assert_close(boost(one) @ boost(-one), torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(torch.linalg.det(boost(one)), torch.ones((), dtype=torch.float64))
    x, angles = draw(1, 1, 7, 8), rotary_angles(torch.arange(7)[None], dim=8, dtype=torch.float64)
    turned = boost(angles, -1.0)[:, None] @ x.unflatten(-1, (4, 2))[..., None]
    torch.testing.assert_close(turned.flatten(-3), rotate(x, rotation(angles)))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", [{}, {"learned": False}, {"damping": 1.0, "learned": False}, {"base": 50.0}])
def test_two_decays_are_the_damped_boost(causal, options):
    hope, at = part(**options), torch.arange(9)
    q, k = draw(2, 3, 9, 8), draw(2, 3, 9, 8, seed=1)
    expected = by_matrices(hope, q, k, at)
    torch.testing.assert_close(by_pairs(hope, q, k, at), expected, atol=1e-10, rtol=1e-10)
    found = hope.scores(q, k, Context(queries=9, keys=9, causal=causal))
    torch.testing.assert_close(found, expected.tril() if causal else expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 17, 63, 130])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_halving_equals_all_pairs_with_gradients(causal, n, dtype):
    hope = part()
    q, k = (draw(2, 3, n, 8, seed=seed).requires_grad_() for seed in (0, 1))
    expected = by_pairs(hope, q, k, torch.arange(n))
    expected = expected.tril() if causal else expected
    cast = part().to(dtype)
    inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k)]
    found = cast.scores(*inputs, Context(queries=n, keys=n, causal=causal))
    assert found.dtype == dtype
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-11, "rtol": 1e-11}
    torch.testing.assert_close(found.double(), expected, **close)
    cotangent = draw(*found.shape, seed=2)
    theirs = torch.autograd.grad(expected, (q, k, hope.rho), cotangent)
    ours = torch.autograd.grad(found, (*inputs, cast.rho), cotangent.to(dtype))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), other, atol=10 * close["atol"], rtol=10 * close["rtol"])


def test_scores_know_the_distance_alone():
    hope, q, k = part().float(), draw(2, 3, 70, 8).float(), draw(2, 3, 70, 8, seed=1).float()
    near, far = (
        hope.scores(q, k, Context(queries=70, keys=70, causal=True, positions=start + torch.arange(70)[None]))
        for start in (0, 1000)
    )
    torch.testing.assert_close(near, far, atol=1e-4, rtol=1e-4)


def test_stretched_and_padded_positions_are_read():
    hope, q, k = part(), draw(2, 3, 20, 8), draw(2, 3, 20, 8, seed=1)
    stretched = hope.scores(q, k, Context(queries=20, keys=20, positions=40 * torch.arange(20)[None]))
    torch.testing.assert_close(stretched, by_pairs(hope, q, k, 40 * torch.arange(20)), atol=1e-10, rtol=0)
    padding = torch.arange(20) >= torch.tensor([[6], [0]])
    positions = (padding.long().cumsum(-1) - 1).clamp(min=0)
    padded = hope.scores(q, k, Context(queries=20, keys=20, padding=padding, positions=positions))
    alone = hope.scores(q[:1, :, 6:], k[:1, :, 6:], Context(queries=14, keys=14))
    torch.testing.assert_close(padded[:1, :, 6:, 6:], alone, atol=1e-10, rtol=0)


def test_equal_vectors_score_less_the_farther_they_are():
    hope, x = part(), draw(1, 3, 1, 8).expand(1, 3, 200, 8)
    fall = hope.scores(x, x, Context(queries=200, keys=200, causal=True))[:, :, -1].flip(-1)
    assert (fall.diff(dim=-1) < 0).all()
    assert (fall > 0).all()


def test_without_extra_damping_half_of_the_channels_are_constant():
    hope = part(damping=1.0, learned=False)
    x = torch.ones(1, 3, 100, 8, dtype=torch.float64)  # x- is 0
    found = hope.scores(x, x, Context(queries=100, keys=100, causal=True))
    torch.testing.assert_close(found, torch.full_like(found, 8 / math.sqrt(8)).tril())


def test_thousands_of_tokens_stay_finite():
    hope = HoPE(heads=1, head_dim=4, damping=5.0)
    q, k = (draw(1, 1, 1500, 4, seed=seed, dtype=torch.float32).requires_grad_() for seed in (0, 1))
    square = hope.scores(q, k, Context(queries=1500, keys=1500))
    far = hope.scores(q[:, :, :2], k[:, :, :2].repeat(1, 1, 4096, 1), Context(queries=2, keys=8192, causal=True))
    (square.sum() + far.sum()).backward()
    assert all(torch.isfinite(x).all() for x in (square, far, q.grad, k.grad, hope.rho.grad))


def test_nothing_ahead_is_seen_before_the_mask():
    hope, q = part(), draw(1, 3, 30, 8)
    assert not hope.scores(q, q, Context(queries=30, keys=30, causal=True)).triu(1).any()


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@torch.no_grad()
def test_prefill_and_steps_equal_the_whole_with_shared_key_heads_and_left_padding(kv_heads):
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": kv_heads}
    lm = TransformerForCausalLM(TransformerConfig(architecture="decoder", position="hope", **sizes)).eval()
    ids = torch.randint(1, 11, (2, 23))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    alone, cache, end, steps = lm(ids[1:, 4:], use_cache=False).logits, lm.model.new_cache(), 0, []
    for count in (12, 1, 9, 1):
        end += count
        piece = {"input_ids": ids[:, end - count : end], "attention_mask": mask[:, :end]}
        steps.append(lm(**piece, past_key_values=cache, use_cache=True).logits)
    stepped = torch.cat(steps, 1)
    torch.testing.assert_close(stepped, lm(ids, attention_mask=mask, use_cache=False).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stepped[1:, 4:], alone, atol=1e-5, rtol=1e-5)


def test_content_counts_once():
    """The scores stand in place of q k^T and are not added to it."""
    lm = TransformerForCausalLM(TransformerConfig(architecture="decoder", position="hope", vocab_size=11)).double()
    mixer, x, shown = lm.model.decoder.mixers[0], draw(1, 6, 64), []
    mixer(x, Context.of(x, causal=True, attentions=shown))
    q, k, _ = mixer._projected(x, Context.of(x))
    scores = by_pairs(mixer.position, q, k, torch.arange(6)).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(shown[0], scores.softmax(-1))


@pytest.mark.parametrize("learned", [True, False])
def test_parameters_are_one_a_head(learned):
    hope = HoPE(heads=4, head_dim=8, learned=learned, damping=2.5)
    assert sum(p.numel() for p in hope.parameters()) == (4 if learned else 0)
    slow, fast = hope.rates(torch.zeros(1))[0].chunk(2, -1)
    torch.testing.assert_close(slow[:, 0], torch.full((4,), 1.5))
    torch.testing.assert_close(fast[:, 0], torch.full((4,), 3.5))


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"memory": torch.zeros(1, 4, 6)}, "cross"),
        ({"grid": (2, 2)}, "grid"),
        ({"positions": torch.tensor([[0, 2, 1, 3]])}, "rising order"),
    ],
)
def test_what_it_cannot_honour_raises(asked, says):
    q = torch.zeros(1, 3, 4, 8)
    with pytest.raises(UnsupportedContext, match=says):
        HoPE(heads=3, head_dim=8).scores(q, q, Context(queries=4, keys=4, **asked))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"damping": 0.9}, "above 1"),
        ({"damping": 1.0}, "learned=False"),
        ({"head_dim": 7}, "pairs"),
        ({"base": 0.0}, "base > 0"),
    ],
)
def test_impossible_options_are_named(options, says):
    with pytest.raises(FormwrightError, match=says):
        HoPE(**{"heads": 3, "head_dim": 8} | options)
