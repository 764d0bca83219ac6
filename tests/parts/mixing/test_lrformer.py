"""Attention by distance: bounded scores, homogeneity, independence of the batch, and the Jacobian at large inputs."""

import math

import pytest
import torch
from torch import nn

from formwright.contracts import Context, UnsupportedContext
from formwright.errors import FormwrightError
from formwright.parts.attention.softmax import SoftmaxAttention
from formwright.parts.mixing.lrformer import L2Attention, LRFormerAttention
from formwright.parts.mixing.multihead import MultiHeadAttention
from formwright.theory.lipschitz import jacobian_norm


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def layer(kind=LRFormerAttention, dim=16, heads=2, **options):
    made = kind(dim=dim, heads=heads, **options).double()
    with torch.no_grad():
        made.out.bias.zero_()
    return made.eval()


def scores(made, x, context):
    q = made.query_value(x)[..., : made.inner_width].unflatten(-1, (made.heads, -1)).transpose(1, 2)
    return made.scores(q, q, x.norm(dim=-1)[:, None], context)


def tokens(b=3, n=7, d=16):
    return torch.randn(b, n, d, dtype=torch.double)


@pytest.mark.reference
@pytest.mark.parametrize("kind", [LRFormerAttention, L2Attention])
def test_it_equals_the_formula_token_by_token(kind):
    made, x = layer(kind), tokens(b=2, n=5)
    w_q, w_v = made.query_value.weight.chunk(2)
    for row in x:
        heads = []
        for h in range(2):
            rows = slice(8 * h, 8 * h + 8)
            q, v = row @ w_q[rows].T, row @ w_v[rows].T
            a, b = torch.linalg.matrix_norm(q), max(token.norm() for token in row)
            factor = 100 / (a * b) if kind is LRFormerAttention else 1 / math.sqrt(8)
            weights = (-factor * torch.cdist(q, q) ** 2).softmax(-1)
            heads.append(weights @ v)
        wanted = torch.cat(heads, -1) @ made.out.weight.T
        torch.testing.assert_close(made(row[None], Context.of(row[None]))[0], wanted)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_scores_are_at_most_zero_zero_on_the_diagonal_and_bounded(size):
    made, x = layer(), size * tokens()
    found = scores(made, x, Context.of(x))
    assert bool((found <= 0).all())
    assert not found.diagonal(dim1=-2, dim2=-1).any()
    lowest = made.lowest_score()
    assert bool((found.amin((0, 2, 3)) >= lowest.double() * (1 + 1e-6)).all())
    weights = found.softmax(-1)
    assert bool((weights.amin((0, 2, 3)) >= (lowest.double() * (1 + 1e-6)).exp() / 7).all())


def test_the_bound_knows_of_length_spectral_norm_and_biases():
    made = layer(by_length=True, spectral=0.1)
    x = tokens(n=9)
    queries = made.query_value.weight[:16]
    shrunk = queries * min(1.0, 0.1 / float(torch.linalg.matrix_norm(queries, 2)))
    heads = torch.linalg.matrix_norm(shrunk.view(2, 8, 16), 2)
    torch.testing.assert_close(made.lowest_score(9), (-400 * 3 * heads).float(), rtol=1e-5, atol=0.0)
    assert bool(torch.isfinite(made(x, Context.of(x))).all())
    with pytest.raises(FormwrightError, match="bias=False"):
        layer(bias=True).lowest_score()


def test_it_is_homogeneous():
    made, x = layer(), tokens()
    torch.testing.assert_close(made(10 * x, Context.of(x)), 10 * made(x, Context.of(x)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
def test_a_row_does_not_depend_on_its_batch(causal):
    made, x = layer(), tokens(b=8)
    x[3] *= 50
    alone = made(x[2:3], Context.of(x[2:3], causal=causal))
    torch.testing.assert_close(made(x, Context.of(x, causal=causal))[2:3], alone)


def test_tokens_may_be_reordered():
    made, x, order = layer(), tokens(), torch.randperm(7)
    torch.testing.assert_close(made(x[:, order], Context.of(x)), made(x, Context.of(x))[:, order])


def test_padded_tokens_count_for_neither_norm():
    made, x = layer(), tokens()
    x[:, 5:] *= 1000
    padding = (torch.arange(7) < 5).expand(3, -1)
    short = made(x[:, :5], Context.of(x[:, :5]))
    torch.testing.assert_close(made(x, Context.of(x, padding=padding))[:, :5], short)


def test_a_later_token_changes_no_norm_of_an_earlier_one():
    made, x = layer(), tokens()
    other = x.clone()
    other[:, 4:] *= 100
    context = Context.of(x, causal=True)
    torch.testing.assert_close(made(x, context)[:, :4], made(other, context)[:, :4], rtol=0, atol=0)
    torch.testing.assert_close(made(x, context)[:, -1], made(x, Context.of(x))[:, -1])  # the last has seen all


def test_two_projections_and_the_output():
    assert sum(weight.numel() for weight in layer(dim=64, heads=4).parameters()) == 3 * 64**2 + 64


def test_l2_is_the_same_layer_with_another_factor():
    made, plain, x = layer(), layer(L2Attention), tokens()
    plain.load_state_dict(made.state_dict())
    made.factor = lambda *_: 8**-0.5
    assert torch.equal(made(x, Context.of(x)), plain(x, Context.of(x)))


def test_by_length_keeps_scores_when_tokens_are_doubled():
    x = tokens()
    twice = torch.cat([x, x], 1)
    plain, even = layer(), layer(by_length=True)
    single = scores(even, x, Context.of(x))
    torch.testing.assert_close(scores(even, twice, Context.of(twice))[..., :7, :7], single)
    ratio = scores(plain, twice, Context.of(twice))[..., 0, 1] / scores(plain, x, Context.of(x))[..., 0, 1]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.5**0.5))


def test_small_alpha_attends_to_all_alike_and_large_alpha_to_itself():
    x = tokens()
    for alpha, wanted in ((1e-9, torch.full((7, 7), 1 / 7)), (1e7, torch.eye(7))):
        weights = scores(layer(alpha=alpha), x, Context.of(x)).softmax(-1)
        torch.testing.assert_close(weights, wanted.double().expand_as(weights), rtol=0, atol=1e-6)


def test_spectral_norms_are_those_asked_for():
    made, x = layer(spectral=0.5), tokens()
    with torch.no_grad():
        made.query_value.weight.mul_(10), made.out.weight.mul_(1e-3)
    shrunk = torch.cat([half * 0.5 / torch.linalg.matrix_norm(half, 2) for half in made.query_value.weight.chunk(2)])
    plain = layer()
    plain.load_state_dict(made.state_dict())
    with torch.no_grad():
        plain.query_value.weight.copy_(shrunk)  # the output's is below 0.5 already and stays
    torch.testing.assert_close(made(x, Context.of(x)), plain(x, Context.of(x)), rtol=1e-5, atol=1e-7)


def jacobians(made, sizes):
    """The largest stretch over a few inputs of each size."""
    x = tokens(b=4, n=8)
    found = []
    for size in sizes:
        one = [jacobian_norm(lambda x: made(x[None], Context.of(x[None]))[0], size * row) for row in x]
        found.append(max(one))
    return found


def test_the_jacobian_stays_bounded_where_that_of_dot_products_grows():
    dots = MultiHeadAttention(dim=16, heads=2, attention=SoftmaxAttention(), bias=False).double()
    distances = layer()
    with torch.no_grad():  # both of matrices that keep the size of a token
        for made in (dots, distances):
            for weight in made.parameters():
                if weight.ndim == 2:
                    nn.init.normal_(weight, std=0.25)
    ours, theirs = jacobians(distances, (1, 30)), jacobians(dots, (1, 30))
    assert ours[1] == pytest.approx(ours[0], rel=1e-6)
    assert theirs[1] / ours[1] > 50


def test_no_gradient_is_lost_at_tokens_of_zero():
    made, x = layer(), torch.zeros(1, 3, 16, dtype=torch.double, requires_grad=True)
    made(x, Context.of(x)).sum().backward()
    assert bool(torch.isfinite(x.grad).all())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"alpha": 0.0}, "above 0"),
        ({"heads": 3}, "heads"),
        ({"spectral": -1.0}, "spectral"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_impossible_options_are_refused(options, says):
    with pytest.raises(FormwrightError, match=says):
        LRFormerAttention(**{"dim": 16, "heads": 2} | options)


def test_cross_attention_is_refused():
    x = tokens()
    with pytest.raises(UnsupportedContext, match="queries are its keys"):
        layer()(x, Context(queries=7, keys=7, memory=x))
