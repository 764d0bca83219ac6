"""TokenFormer: exact properties of Pattention and its layers, then an independent implementation."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from formwright.contracts import Context
from formwright.errors import FormwrightError
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM, TransformerModel
from formwright.parts.feedforward.tokenformer import (
    Pattention,
    TokenFormerAttention,
    TokenFormerBlock,
    TokenFormerFeedForward,
    modified_softmax,
)
from formwright.parts.norm.layernorm import LayerNorm
from formwright.parts.norm.rmsnorm import RMSNorm

THETAS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def pattention(tokens=5, inputs=4, outputs=3, seed=0, std=1.0, **options):
    layer = Pattention(inputs=inputs, outputs=outputs, tokens=tokens, layers=2, width=4, **options).double()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    return layer


def tokens(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_softmax_is_n_times_the_softmax_of_the_scores():
    layer, x = pattention(theta="softmax"), tokens(2, 7, 4)
    torch.testing.assert_close(layer(x), 5 * (x @ layer.keys.T).softmax(-1) @ layer.values, **EXACT)


def test_normalised_scores_have_root_mean_square_one_before_gelu_and_the_weights_are_no_distribution():
    a = tokens(7, 63)
    normed = a / a.square().mean(-1, keepdim=True).sqrt()
    weights = modified_softmax(a, math.sqrt(63))
    torch.testing.assert_close(weights, F.gelu(normed), **EXACT)
    assert weights.min() < 0
    torch.testing.assert_close(modified_softmax(a, 3.0, "gelu_l2_norm").norm(dim=-1), torch.full((7,), 3.0).double())


@pytest.mark.parametrize("theta", THETAS)
def test_tau_is_the_root_of_the_tokens_unless_set(theta):
    x, sizes = tokens(2, 7, 4), {"theta": theta}
    plain, set_ = pattention(**sizes), pattention(tau_tokens=11, **sizes)
    assert (plain.tau, set_.tau) == (math.sqrt(5), math.sqrt(11))
    assert not torch.allclose(plain(x), set_(x))
    torch.testing.assert_close(plain(x), pattention(tau_tokens=5, **sizes)(x), rtol=0, atol=0)


def test_a_positive_factor_on_the_token_changes_nothing():
    layer, x = pattention(), tokens(2, 7, 4)
    for factor in (1e-2, 3.0, 1e4):
        torch.testing.assert_close(layer(factor * x), layer(x), **EXACT)


@pytest.mark.parametrize("theta", THETAS)
def test_the_order_of_parameter_tokens_does_not_matter(theta):
    layer, other, x = pattention(theta=theta), pattention(theta=theta), tokens(2, 7, 4)
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        other.keys.copy_(layer.keys[order])
        other.values.copy_(layer.values[order])
    torch.testing.assert_close(other(x), layer(x), **EXACT)


def test_a_token_without_scores_gives_zero_and_finite_gradients():
    layer, x = pattention(), torch.zeros(1, 2, 4, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert not y.any()
    assert all(value.grad.isfinite().all() for value in (x, *layer.parameters()))


@pytest.mark.parametrize("theta", ["l2_norm_gelu", "gelu_l2_norm"])
def test_zero_keys_under_the_same_tau_change_nothing(theta):
    layer, x = pattention(theta=theta), tokens(2, 7, 4)
    before = layer(x)
    layer.grow(9, keys="zero", tau_tokens=5)
    assert layer.tokens == 9
    assert layer.values[5:].all()
    torch.testing.assert_close(layer(x), before, **EXACT)


def test_under_the_grown_tau_the_layer_is_the_old_one_with_a_larger_tau():
    layer, old, x = pattention(), pattention(tau_tokens=9), tokens(2, 7, 4)
    before = layer(x)
    layer.grow(9, keys="zero", tau_tokens=None)
    torch.testing.assert_close(layer(x), old(x), **EXACT)
    assert (layer(x) - before).abs().max() > 0.1


def test_new_values_learn_from_the_second_step_on():
    layer, x = pattention(), tokens(2, 7, 4)
    layer.grow(9, keys="zero", tau_tokens=5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x).square().sum().backward()
    assert not layer.values.grad[5:].any()
    assert layer.keys.grad[5:].all()
    optimizer.step()
    optimizer.zero_grad()
    layer(x).square().sum().backward()
    assert layer.values.grad[5:].all()


def test_initial_keys_and_values_have_the_papers_sizes():
    torch.manual_seed(0)
    layer = Pattention(inputs=64, outputs=64, tokens=512, layers=6, width=64)
    assert layer.keys.std().item() == pytest.approx(0.02, rel=0.02)
    assert layer.values.std().item() == pytest.approx(2 / (6 * 8), rel=0.02)


def test_a_layer_has_2_d_times_all_its_tokens_as_parameters():
    d, n_qkv, n_ffn = 16, 12, 40
    config = TransformerConfig(
        architecture="decoder",
        hidden_size=d,
        num_hidden_layers=3,
        mixer=f"tokenformer(tokens={n_qkv})",
        feedforward="tokenformer",
        block="tokenformer",
        intermediate_size=n_ffn,
    )
    model = TransformerModel(config)
    for layer in model.decoder.layers:
        assert sum(p.numel() for p in layer.parameters()) == 2 * d * (3 * n_qkv + n_qkv + n_ffn)
    assert model.decoder.norm.weight is not None
    assert model.decoder.layers[0].block.mixer_norm.weight is None


def test_the_language_model_looks_back_alone():
    torch.manual_seed(0)
    parts = {"mixer": "tokenformer", "feedforward": "tokenformer", "block": "tokenformer"}
    config = TransformerConfig(architecture="decoder", position="rope(fraction=0.25, layout=half)", **parts)
    model, ids = TransformerForCausalLM(config).eval(), torch.randint(256, (1, 12))
    other = ids.clone()
    other[:, 7:] = (other[:, 7:] + 1) % 256
    with torch.no_grad():
        a, b = model(ids).logits, model(other).logits
    assert torch.equal(a[:, :7], b[:, :7])
    assert not torch.equal(a[:, 7:], b[:, 7:])


def test_shared_keys_and_values_have_their_own_width():
    layer = TokenFormerAttention(dim=16, heads=4, kv_heads=2, head_dim=6, layers=2, tokens=10)
    shapes = {name: tuple(one.values.shape) for name, one in layer.named_children() if isinstance(one, Pattention)}
    assert shapes == {"query": (10, 24), "key": (10, 12), "value": (10, 12), "out": (10, 16)}
    x = torch.randn(2, 5, 16)
    assert layer(x, Context.of(x)).shape == x.shape


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
def test_the_norms_of_a_block_learn_nothing(norm):
    feedforward = TokenFormerFeedForward(dim=16, hidden=8, layers=1)
    mixer = TokenFormerAttention(dim=16, heads=4, layers=1)
    block = TokenFormerBlock(dim=16, mixer=mixer, feedforward=feedforward, norm=lambda width: norm(dim=width))
    assert sum(p.numel() for p in block.parameters()) == 2 * 16 * (4 * 16 + 8)
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(block.mixer_norm(x), norm(dim=16)(x))


class Learning(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(1))


def test_what_is_impossible_is_refused():
    with pytest.raises(FormwrightError, match="at least 1"):
        Pattention(inputs=4, outputs=4, tokens=0, layers=1, width=4)
    with pytest.raises(FormwrightError, match="tau_tokens=0"):
        Pattention(inputs=4, outputs=4, tokens=3, tau_tokens=0, layers=1, width=4)
    with pytest.raises((FormwrightError, TypeError), match="theta"):
        Pattention(inputs=4, outputs=4, tokens=3, theta="relu", layers=1, width=4)
    mixer = TokenFormerAttention(dim=16, heads=4, layers=1)
    with pytest.raises(FormwrightError, match="Learning does"):
        TokenFormerBlock(dim=16, mixer=mixer, feedforward=None, norm=lambda _: Learning())


@pytest.mark.reference
@pytest.mark.parametrize("outputs", [4, 16])
def test_pattention_equals_torchs_attention_over_the_parameter_tokens(outputs):
    """Softmax of the scores by torch's own attention, times n: an independent form of theta = softmax."""
    layer, x = pattention(tokens=63, inputs=16, outputs=outputs, theta="softmax"), tokens(2, 7, 16)
    memory = (layer.keys.expand(2, -1, -1), layer.values.expand(2, -1, -1))
    torch.testing.assert_close(layer(x), 63 * F.scaled_dot_product_attention(x, *memory, scale=1.0), **EXACT)


@pytest.mark.reference
def test_pattention_equals_an_rms_norm_between_two_linear_layers():
    """x K^T through torch's RMSNorm over the n scores (tau = sqrt(n)), GELU, and a second matrix, with gradients."""
    layer, x = pattention(tokens=63, inputs=16, outputs=8), tokens(2, 7, 16).requires_grad_()
    first, second = nn.Linear(16, 63, bias=False).double(), nn.Linear(63, 8, bias=False).double()
    with torch.no_grad():
        first.weight.copy_(layer.keys)
        second.weight.copy_(layer.values.T)
    twin = nn.Sequential(first, nn.RMSNorm(63, eps=0.0, elementwise_affine=False), nn.GELU(), second)
    again = x.detach().clone().requires_grad_()
    cotangent = tokens(2, 7, 8, seed=3)
    (layer(x) * cotangent).sum().backward()
    (twin(again) * cotangent).sum().backward()
    torch.testing.assert_close(layer(x), twin(again), **EXACT)
    torch.testing.assert_close(x.grad, again.grad, **EXACT)
    torch.testing.assert_close(layer.keys.grad, first.weight.grad, **EXACT)
    torch.testing.assert_close(layer.values.grad, second.weight.grad.T, **EXACT)
