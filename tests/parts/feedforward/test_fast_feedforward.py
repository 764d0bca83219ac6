"""FFF: exact properties, then the release."""

import math

import jaxtyping
import pytest
import torch
from torch.nn import functional as F

from formwright.contracts import Context
from formwright.errors import FormwrightError
from formwright.parts.feedforward.fast_feedforward import TOGETHER, FastFeedForward, entropy


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(depth=3, dim=7, hidden=None, seed=0, **options):
    torch.manual_seed(seed)
    return FastFeedForward(dim=dim, hidden=hidden or 5 * 2**depth, depth=depth, **options)


def sharpened(ours, factor=1e7):
    with torch.no_grad():
        ours.node_weight *= factor
        ours.node_bias *= factor
    return ours


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tokens", [1, 63])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_depth_nought_is_the_plain_two_matrix_layer(training, tokens, activation):
    ours, x = layer(depth=0, activation=activation).train(training), draw(1, tokens, 7)
    neurons = getattr(F, activation)(F.linear(x, ours.up[0], ours.up_bias[0]))
    torch.testing.assert_close(ours(x), neurons @ ours.down[0] + ours.down_bias[0], rtol=1e-6, atol=1e-6)
    assert not hasattr(ours, "node_weight")


@pytest.mark.parametrize("depth", [1, 3, 7])
def test_the_parameters_are_counted_by_the_papers_formula(depth):
    dim, leaf = 7, 5
    expected = (2**depth - 1) * (dim + 1) + 2**depth * (dim * leaf + leaf + leaf * dim + dim)
    assert sum(p.numel() for p in layer(depth=depth).parameters()) == expected


@pytest.mark.parametrize(("hidden", "depth", "leaf"), [(40, 3, 5), (41, 3, 6), (8, 3, 1), (9, 0, 9)])
def test_the_training_width_is_shared_out_and_rounded_up(hidden, depth, leaf):
    assert layer(hidden=hidden, depth=depth).leaf == leaf


@pytest.mark.parametrize("depth", [0, 1, 5])
def test_the_mixture_is_a_probability_on_every_level(depth):
    right = draw(63, 2**depth - 1).sigmoid()
    shares = layer(depth=depth).mixture(right)
    assert shares.min() >= 0
    for level in range(depth + 1):
        total = shares[:, 2**level - 1 : 2 ** (level + 1) - 1].sum(1)
        torch.testing.assert_close(total, torch.ones(63))


def test_right_means_a_logit_of_at_least_nought():
    ours = layer(depth=1).eval()
    with torch.no_grad():
        ours.node_weight.zero_()
        ours.node_bias.zero_()
    assert ours.choose(draw(3, 7)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("depth", [1, 4, TOGETHER + 2])
def test_the_chosen_leaf_is_where_a_hard_mixture_ends(depth):
    ours, x = layer(depth=depth, hidden=2**depth).eval(), draw(63, 7)
    right = (F.linear(x, ours.node_weight, ours.node_bias) >= 0).float()
    assert torch.equal(ours.choose(x), ours.mixture(right)[:, ours.nodes :].argmax(1))
    assert len(ours.choose(x).unique()) > 1


@pytest.mark.parametrize("depth", [1, 4, TOGETHER + 2])
def test_sharp_decisions_make_training_and_evaluation_one_function(depth):
    ours, x = sharpened(layer(depth=depth)), draw(7, 9, 7)
    torch.testing.assert_close(ours.train()(x), ours.eval()(x), rtol=1e-5, atol=1e-5)


def test_training_hardened_is_evaluation_and_leaves_the_nodes_without_gradient():
    ours, x = layer(depth=4, train_hardened=True), draw(7, 9, 7)
    y = ours.train()(x)
    torch.testing.assert_close(y, ours.eval()(x), rtol=1e-5, atol=1e-6)
    y.sum().backward()
    assert ours.node_weight.grad is None or not ours.node_weight.grad.any()
    assert not torch.allclose(y, layer(depth=4).train()(x), atol=1e-3)


def test_evaluation_reads_one_leaf():
    ours, x = layer(depth=4).eval(), draw(1, 1, 7)
    before, leaf = ours(x), ours.choose(x[0]).item()
    with torch.no_grad():
        for parameter in (ours.up, ours.up_bias, ours.down, ours.down_bias):
            kept = parameter[leaf].clone()
            parameter.fill_(torch.nan)
            parameter[leaf] = kept
    assert torch.equal(ours(x), before)


def one_hot_mixture(ours, x):
    return ours._mix(x, F.one_hot(ours.choose(x), ours.leaves))


@pytest.mark.parametrize("tokens", [1, 2, 63])
@pytest.mark.parametrize("depth", [0, 1, TOGETHER + 1])
def test_one_leaf_is_the_mixture_that_puts_all_on_it_in_values_and_gradients(tokens, depth):
    ours, x = layer(depth=depth).eval(), draw(tokens, 7).requires_grad_()
    found = []
    for way in (lambda x: ours(x[None])[0], lambda x: one_hot_mixture(ours, x)):
        y = way(x)
        inputs = [x, ours.up, ours.up_bias, ours.down, ours.down_bias]
        found.append((y.detach(), *torch.autograd.grad(y, inputs, draw(tokens, 7, seed=1))))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("depth", [0, 4, TOGETHER + 2])
def test_one_token_and_many_get_the_same_answer(depth):
    ours, x = layer(depth=depth).eval(), draw(1, 63, 7)
    one_by_one = torch.cat([ours(x[:, i : i + 1]) for i in range(63)], dim=1)
    torch.testing.assert_close(ours(x), one_by_one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_no_tokens_give_no_tokens(training):
    assert layer().train(training)(torch.empty(2, 0, 7)).shape == (2, 0, 7)


def test_entropy_is_that_of_a_coin():
    logits = torch.tensor([0.0, 2.0, -2.0, 1e4, -1e4], dtype=torch.float64)
    assert entropy(logits)[0].item() == pytest.approx(math.log(2))
    p = logits[1:3].sigmoid()
    torch.testing.assert_close(entropy(logits)[1:3], -p * p.log() - (1 - p) * (1 - p).log())
    assert torch.equal(entropy(logits)[3:], torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("hardening", [3.0, 0.5])
def test_hardening_is_the_weighted_entropy_of_all_nodes(hardening):
    ours, x = layer(depth=3, hardening=hardening), draw(2, 9, 7)
    context = Context.of(x)
    ours(x, context)
    logits = F.linear(x.flatten(0, 1), ours.node_weight, ours.node_bias)
    expected = hardening * entropy(logits).mean(0).sum()
    torch.testing.assert_close(context.losses["hardening"], expected)
    context.losses["hardening"].backward()
    assert ours.node_weight.grad.any()


def test_hardening_and_usage_see_real_tokens_alone():
    ours, x = layer(depth=3, usage="soft"), draw(2, 9, 7)
    real = torch.tensor([[True] * 4 + [False] * 5, [False] * 7 + [True] * 2])
    padded, packed = Context.of(x, padding=real), Context.of(x[real][None])
    ours(x, padded)
    usage = ours.leaf_usage.clone(), ours.node_usage.clone()
    ours.reset_parameters()
    ours = layer(depth=3, usage="soft")
    ours(x[real][None], packed)
    torch.testing.assert_close(padded.losses, packed.losses)
    torch.testing.assert_close(usage, (ours.leaf_usage, ours.node_usage))
    assert ours.node_usage[0] == 6


@pytest.mark.parametrize("options", [{"hardening": 0.0}, {"depth": 0}])
def test_without_hardening_or_nodes_nothing_is_added(options):
    ours, x = layer(**options), draw(2, 9, 7)
    context = Context.of(x)
    ours(x, context)
    assert not context.losses


def test_evaluation_adds_no_loss_and_counts_nothing():
    ours, x = layer(usage="hard").eval(), draw(2, 9, 7)
    context = Context.of(x)
    ours(x, context)
    assert not context.losses
    assert not ours.leaf_usage.any()


def test_soft_usage_sums_the_mixture_and_hard_usage_the_decisions():
    x = draw(2, 9, 7)
    soft, hard, none = (layer(depth=3, usage=usage) for usage in ("soft", "hard", "none"))
    for ours in (soft, hard, none):
        ours(x)
    right = F.linear(x.flatten(0, 1), soft.node_weight, soft.node_bias).sigmoid()
    torch.testing.assert_close(soft.leaf_usage, soft.mixture(right)[:, 7:].sum(0).detach())
    assert torch.equal(hard.leaf_usage, torch.bincount(hard.choose(x.flatten(0, 1)), minlength=8).float())
    assert hard.node_usage[0] == 18
    assert torch.equal(hard.node_usage[3:], hard.leaf_usage.view(4, 2).sum(1))
    assert not none.leaf_usage.any()
    soft.reset_parameters()
    assert not soft.leaf_usage.any()


def test_region_leak_turns_decisions_round_in_training_alone():
    ours, x = sharpened(layer(depth=1, region_leak=0.25, usage="hard")), draw(1, 4000, 7)
    torch.manual_seed(1)
    ours.train()(x)
    straight = (ours.choose(x[0]) == 0).float().mean().item()
    leaked = ours.leaf_usage[0].item() / 4000
    assert leaked == pytest.approx(straight * 0.75 + (1 - straight) * 0.25, abs=0.03)
    assert abs(leaked - straight) > 0.03 or straight == pytest.approx(0.5, abs=0.06)
    torch.testing.assert_close(ours.eval()(x), sharpened(layer(depth=1)).eval()(x))


def test_dropout_is_inside_the_leaves_in_training_alone():
    ours, plain, x = layer(dropout=0.5), layer(), draw(2, 9, 7)
    assert not torch.allclose(ours(x), plain(x))
    assert torch.equal(ours.eval()(x), plain.eval()(x))
    with torch.no_grad():
        ours.up.zero_()
        ours.up_bias.zero_()
    assert torch.isfinite(ours.train()(x)).all()


def test_no_array_of_leaves_times_width_is_stored_in_training():
    ours, x, kept = layer(depth=5, dim=63, hidden=32), draw(1, 50, 63), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        ours(x)
    assert max(kept) < 50 * 32 * 63 / 10


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"depth": -1, "hidden": 8}, "depth=-1"),
        ({"depth": 3, "hidden": 7}, "hidden=7"),
        ({"hardening": -1.0}, "hardening=-1.0"),
        ({"region_leak": 0.6}, "region_leak=0.6"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_impossible_options_are_refused(options, says):
    with pytest.raises(FormwrightError, match=says):
        layer(**options)


def release(ours, **options):
    fff = pytest.importorskip("fastfeedforward", reason="the release is not installed").FFF
    theirs = fff(ours.up.shape[-1], ours.leaf, ours.up.shape[-1], ours.depth, **options)
    with torch.no_grad():
        theirs.node_weights.copy_(ours.node_weight)
        theirs.node_biases.copy_(ours.node_bias[:, None])
        theirs.w1s.copy_(ours.up.transpose(1, 2))
        theirs.b1s.copy_(ours.up_bias)
        theirs.w2s.copy_(ours.down)
        theirs.b2s.copy_(ours.down_bias)
    return theirs


@pytest.mark.reference
@pytest.mark.parametrize("depth", [1, 3, 7])
@pytest.mark.parametrize("tokens", [1, 63])
def test_training_equals_the_release(depth, tokens):
    ours, x = layer(depth=depth, hardening=1.0, usage="soft"), draw(1, tokens, 7)
    theirs, context = release(ours, usage_mode="soft"), Context.of(x)
    y, entropies = theirs.training_forward(x[0], return_entropies=True)
    torch.testing.assert_close(ours(x, context)[0], y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(context.losses["hardening"], entropies.sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.leaf_usage, theirs.leaf_usage.data, rtol=1e-5, atol=1e-5)


@pytest.mark.reference
@pytest.mark.parametrize("depth", [1, 3, 7])
@pytest.mark.parametrize("tokens", [1, 63])
def test_evaluation_equals_the_release_and_its_forgotten_bias(depth, tokens):
    ours, x = layer(depth=depth).eval(), draw(1, tokens, 7)
    theirs = release(ours).eval_forward(x[0]) + ours.down_bias[ours.choose(x[0])]
    torch.testing.assert_close(ours(x)[0], theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.reference
def test_gradients_equal_the_releases():
    ours, x = layer(depth=3), draw(1, 63, 7)
    theirs, g = release(ours), draw(1, 63, 7, seed=1)
    (ours(x) * g).sum().backward()
    (theirs.training_forward(x[0]) * g[0]).sum().backward()
    torch.testing.assert_close(ours.node_weight.grad, theirs.node_weights.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.up.grad, theirs.w1s.grad.transpose(1, 2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.down.grad, theirs.w2s.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.down_bias.grad, theirs.b2s.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("option", [{"activation": "rleu"}, {"usage": "sfot"}])
def test_a_misspelt_choice_is_no_other_choice(option, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    with pytest.raises(FormwrightError, match=next(iter(option.values()))):
        FastFeedForward(dim=8, hidden=16, **option)
