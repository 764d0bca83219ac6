"""Clipped softmax and gated attention: exact zeros and ones, identity settings, gates, and the measures of outliers."""

import jaxtyping
import pytest
import torch

from formwright.contracts import Context, Mask
from formwright.errors import FormwrightError
from formwright.parts.attention.outlier_free_attention import (
    ClippedSoftmax,
    GatedAttention,
    HeadGate,
    infinity_norm,
    kurtosis,
)
from formwright.parts.attention.softmax import SoftmaxAttention
from formwright.parts.mixing.multihead import MultiHeadAttention

DIM, HEADS = 16, 4


def heads(n, seed=0, h=HEADS, d=4):
    return torch.randn(2, h, n, d, generator=torch.Generator().manual_seed(seed))


def tokens(n, seed=0):
    return torch.randn(2, n, DIM, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [1, 7, 63])
@pytest.mark.parametrize("causal", [True, False])
def test_without_a_stretch_it_is_softmax_gradients_included(n, causal):
    q, k, v = (heads(n, seed).requires_grad_() for seed in (1, 2, 3))
    mask = Mask(queries=n, keys=n, causal=causal)
    ours = ClippedSoftmax(length=8, gamma=0.0)(q, k, v, mask=mask)
    theirs = SoftmaxAttention()(q, k, v, mask=mask)
    torch.testing.assert_close(ours, theirs)
    cotangent = torch.randn_like(ours)
    for mine, its in zip(*(torch.autograd.grad(y, (q, k, v), cotangent) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, its, atol=1e-5, rtol=1e-4)


def test_a_weight_is_zero_up_to_minus_gamma_over_the_stretch_and_positive_above():
    part = ClippedSoftmax(length=1, gamma=-0.03)  # 0.03 / 1.03 = 0.029126..
    clipped = part.clip(torch.tensor([[[[0.0290, 0.0292, 0.9418]]]], dtype=torch.float64))
    assert clipped[0, 0, 0, 0] == 0
    assert 0 < clipped[0, 0, 0, 1] < 1e-4


def test_a_weight_is_one_from_one_minus_gamma_over_the_stretch_when_zeta_is_above_one():
    clipped = ClippedSoftmax(length=1, gamma=0.0, zeta=1.03).clip(torch.tensor([[[[0.970, 0.972]]]]))
    assert clipped[0, 0, 0, 0] < 1
    assert clipped[0, 0, 0, 1] == 1


def test_clipped_weights_pass_no_gradient():
    weights = torch.tensor([[[[0.01, 0.5, 0.99]]]], requires_grad=True)
    ClippedSoftmax(length=1, gamma=-0.03, zeta=1.03).clip(weights).sum().backward()
    assert weights.grad[0, 0, 0, 0] == weights.grad[0, 0, 0, 2] == 0
    assert weights.grad[0, 0, 0, 1] == pytest.approx(1.06)


def test_gamma_follows_the_length_of_training_and_not_that_of_the_keys():
    assert ClippedSoftmax(length=128).gamma == pytest.approx(-0.025)
    assert ClippedSoftmax(length=512, alpha=12.0).gamma == -12 / 512
    part = ClippedSoftmax(length=16, alpha=4.0)
    q, k = heads(9, 1), heads(9, 2)
    whole = part.weights(q, k, mask=Mask(queries=9, keys=9, causal=True))
    step = part.weights(q[:, :, -1:], k, mask=Mask(queries=1, keys=9, causal=True))
    torch.testing.assert_close(step, whole[:, :, -1:])


def test_masked_keys_have_weight_zero_and_rows_are_not_scaled_back():
    real = torch.tensor([[True, True, True, False, False], [True] * 5])
    part = ClippedSoftmax(length=8, alpha=1.0, zeta=1.1)
    weights = part.weights(heads(5, 1), heads(5, 2), mask=Mask(queries=5, keys=5, causal=True, padding=real))
    assert (weights[0, :, :, 3:] == 0).all()
    assert (weights.triu(1) == 0).all()
    assert ((weights.sum(-1) - 1).abs() > 1e-3).any()


def test_a_row_of_even_weights_below_the_threshold_gives_zero():
    q, v = torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 64, 4)
    y = ClippedSoftmax(length=16, alpha=1.0)(q, torch.zeros(1, 1, 64, 4), v, mask=Mask(queries=1, keys=64))
    assert torch.equal(y, torch.zeros_like(y))


@pytest.mark.parametrize("gate", ["linear", "mlp", "all-heads"])
def test_open_gates_are_multi_head_attention_and_closed_ones_nothing(gate):
    gated, plain, x = (
        GatedAttention(dim=DIM, heads=HEADS, gate=gate),
        MultiHeadAttention(dim=DIM, heads=HEADS, attention=SoftmaxAttention()),
        tokens(7),
    )
    plain.load_state_dict({k: v for k, v in gated.state_dict().items() if not k.startswith("gate.")})
    torch.nn.init.constant_(gated.gate.bias, 100.0)
    torch.testing.assert_close(gated(x, Context.of(x)), plain(x, Context.of(x)))
    torch.nn.init.constant_(gated.gate.bias, -torch.inf)
    assert torch.equal(gated(x, Context.of(x)), gated.out.bias.expand(2, 7, DIM))


@pytest.mark.parametrize(
    ("gate", "count"),
    [("linear", HEADS * (4 + 1)), ("mlp", HEADS * (4 + 1 + 1 + 1)), ("all-heads", HEADS * (DIM + 1))],
)
def test_parameters_of_the_gate(gate, count):
    assert sum(p.numel() for p in GatedAttention(dim=DIM, heads=HEADS, gate=gate).gate.parameters()) == count


@pytest.mark.parametrize("gate", ["linear", "mlp"])
def test_a_gate_reads_its_own_slice_of_its_own_token(gate):
    part, x = HeadGate(dim=DIM, heads=HEADS, kind=gate, opening=0.5, std=1.0), tokens(5)
    if gate == "mlp":
        torch.nn.init.constant_(part.first_bias, 5.0)  # its one hidden unit a head is on
    other = x.clone()
    other[:, 2, 4:8] += 1
    moved = (part(other) != part(x))[..., 0]
    expected = torch.zeros_like(moved)
    expected[:, 1, 2] = True
    assert not (moved & ~expected).any()
    assert moved[:, 1, 2].any()


@pytest.mark.parametrize("gate", ["linear", "mlp", "all-heads"])
@pytest.mark.parametrize("opening", [0.25, 0.5])
def test_gates_start_as_open_as_asked(gate, opening):
    torch.manual_seed(0)
    part = HeadGate(dim=DIM, heads=HEADS, kind=gate, opening=opening, std=0.01)
    torch.testing.assert_close(part(tokens(7, seed=5)), torch.full((2, HEADS, 7, 1), opening), atol=0.04, rtol=0)


@pytest.mark.parametrize("gate", ["linear", "mlp", "all-heads"])
def test_a_pretrained_start_leaves_attention_within_a_few_percent(gate):
    torch.manual_seed(0)
    gated = GatedAttention(dim=DIM, heads=HEADS, gate=gate, opening=0.25, start="pretrained")
    plain, x = MultiHeadAttention(dim=DIM, heads=HEADS, attention=SoftmaxAttention()), tokens(63, seed=5)
    plain.load_state_dict({k: v for k, v in gated.state_dict().items() if not k.startswith("gate.")})
    ours, theirs = gated(x, Context.of(x)), plain(x, Context.of(x))
    assert (ours - theirs).norm() / theirs.norm() < 0.04  # a logit of N(0, 0.01^2 D) moves a gate of 1/4 by 3 %


def test_cross_attention_is_gated_by_the_queries_side():
    part, x, memory = GatedAttention(dim=DIM, heads=HEADS), tokens(3), tokens(5, seed=1)
    torch.nn.init.constant_(part.gate.bias, -torch.inf)
    y = part(x, Context(queries=3, keys=5, memory=memory))
    assert torch.equal(y, part.out.bias.expand(2, 3, DIM))


@pytest.mark.reference
def test_equals_torch_multihead_attention_at_the_identity_settings():
    theirs = torch.nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    clipped = MultiHeadAttention(dim=DIM, heads=HEADS, attention=ClippedSoftmax(length=8, gamma=0.0))
    gated, x = GatedAttention(dim=DIM, heads=HEADS), tokens(7)
    torch.nn.init.constant_(gated.gate.bias, 100.0)
    real = torch.tensor([[True] * 7, [False] * 3 + [True] * 4])
    for part in (clipped, gated):
        part.query_key_value.weight.data.copy_(theirs.in_proj_weight)
        part.query_key_value.bias.data.copy_(theirs.in_proj_bias)
        part.out.load_state_dict(theirs.out_proj.state_dict())
        expected, _ = theirs(x, x, x, key_padding_mask=~real)
        torch.testing.assert_close(part(x, Context.of(x, padding=real)), expected)


def test_measures_of_outliers_by_hand():
    x = torch.tensor([[1.0, -1.0, 1.0, -1.0], [0.0, 0.0, 0.0, -4.0]], dtype=torch.float64)
    assert infinity_norm(x) == 4
    # row 1: moments 1 and 1; row 2: mean -1, fourth moment (3 + 81) / 4 = 21, variance (3 + 9) / 4 = 3
    assert kurtosis(x) == pytest.approx((1 + 21 / 9) / 2, rel=1e-5)
    gaussian = torch.randn(8, 4096, generator=torch.Generator().manual_seed(0))
    assert kurtosis(gaussian) == pytest.approx(3, abs=0.2)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ClippedSoftmax(length=8, alpha=1.0, gamma=-0.1), "alpha or gamma"),
        (lambda: ClippedSoftmax(length=8, gamma=0.1), "gamma <= 0"),
        (lambda: ClippedSoftmax(length=8, zeta=0.9), "zeta >= 1"),
        (lambda: ClippedSoftmax(length=0), "length"),
        (lambda: ClippedSoftmax(length=8, dropout=1.0), "dropout"),
        (lambda: GatedAttention(dim=DIM, heads=HEADS, opening=1.0), "opening"),
        (lambda: GatedAttention(dim=10, heads=4, head_dim=2), "slices"),
    ],
)
def test_impossible_options_are_refused(make, says):
    with pytest.raises(FormwrightError, match=says):
        make()


@pytest.mark.parametrize("option", [{"start": "pretraind"}, {"gate": "mpl"}])
def test_a_misspelt_choice_is_no_other_choice(option, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    with pytest.raises(FormwrightError, match=next(iter(option.values()))):
        GatedAttention(dim=8, heads=2, **option)
