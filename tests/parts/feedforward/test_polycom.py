"""PolyCom: exact properties, then the definition as twin, values and gradients."""

import pytest
import torch
from torch.nn import functional as F

from formwright.errors import FormwrightError
from formwright.parts.feedforward.mlp import ReLUMLP
from formwright.parts.feedforward.polycom import (
    PolyNorm,
    PolyNormMLP,
    PolyReLU,
    PolyReLUMLP,
    polynorm,
    polynorm_reference,
    polyrelu,
    polyrelu_reference,
)
from formwright.training.trainer import decay_groups

PAIRS = [(polyrelu, polyrelu_reference), (polynorm, polynorm_reference)]
SIZES = [(1, 1, 1), (7, 7), (2, 3, 63)]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def coefficients(*highest_first, bias=0.0, dtype=torch.float32):
    return torch.tensor(highest_first, dtype=dtype), torch.tensor([bias], dtype=dtype)


def test_the_linear_coefficient_alone_is_relu():
    x = draw(5, 63)
    assert torch.equal(polyrelu(x, *coefficients(0.0, 0.0, 1.0)), x.relu())
    assert torch.equal(polyrelu(x, *coefficients(0.0, 0.0, 1.0, bias=0.5)), x.relu() + 0.5)


def test_coefficients_are_stored_cubic_first():
    x = torch.tensor([2.0])
    for weight, power in ((coefficients(1.0, 0.0, 0.0), 8.0), (coefficients(0.0, 1.0, 0.0), 4.0)):
        assert polyrelu(x, *weight).item() == power
    three = torch.tensor([1.0, 2.0, -2.0])
    torch.testing.assert_close(polynorm(three, *coefficients(0.0, 1.0, 0.0)), F.rms_norm(three**2, (3,), eps=1e-6))
    torch.testing.assert_close(polynorm(three, *coefficients(1.0, 0.0, 0.0)), F.rms_norm(three**3, (3,), eps=1e-6))


def test_a_new_polyrelu_is_zero_left_of_zero_and_an_even_mix_right_of_it():
    x = torch.tensor([-3.0, -0.5, 0.0, 2.0])
    torch.testing.assert_close(PolyReLU()(x), torch.tensor([0.0, 0.0, 0.0, (2 + 4 + 8) / 3]))


def test_squares_and_products_are_represented_exactly():
    x, y = draw(63, dtype=torch.float64), draw(63, seed=1, dtype=torch.float64)
    square = coefficients(0.0, 1.0, 0.0, dtype=torch.float64)

    def squared(z):
        return polyrelu(z, *square) + polyrelu(-z, *square)

    assert torch.equal(squared(x), x**2)
    torch.testing.assert_close((squared(x + y) - squared(x - y)) / 4, x * y, rtol=1e-12, atol=1e-12)


def test_every_term_of_polynorm_has_root_mean_square_one():
    x = 3 * draw(5, 63)
    for place in range(3):
        weight, bias = coefficients(*(float(place == i) for i in range(3)))
        assert polynorm(x, weight, bias).square().mean(-1).sqrt() == pytest.approx([1.0] * 5, rel=1e-5)


def test_polynorm_ignores_a_positive_factor():
    x, (weight, bias) = draw(5, 63) + 3, coefficients(0.5, -0.25, 0.75, bias=0.1)
    torch.testing.assert_close(polynorm(1000 * x, weight, bias), polynorm(x, weight, bias), rtol=1e-5, atol=1e-5)


def test_eps_lets_the_powers_of_a_tiny_token_vanish():
    x = 1e-4 * draw(63, dtype=torch.float64)
    cubic, linear = (polynorm(x, *coefficients(*w, dtype=torch.float64)) for w in ((1.0, 0, 0), (0, 0, 1.0)))
    assert cubic.abs().max() < 1e-7
    assert linear.abs().max() > 1e-2
    assert torch.equal(polynorm(0 * x, *coefficients(1.0, 1.0, 1.0, bias=0.5, dtype=torch.float64)), 0 * x + 0.5)


def test_the_norm_is_over_the_channels_of_one_token():
    x, (weight, bias) = draw(2, 3, 63), coefficients(0.5, -0.25, 0.75)
    assert torch.equal(polynorm(x, weight, bias)[1, 2], polynorm(x[1, 2], weight, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_polynorm_is_finite_and_right_where_the_sixth_power_overflows(dtype):
    x = (draw(4, 63) * torch.tensor([1.0, 1e2, 1e3, 2e4])[:, None]).to(dtype).requires_grad_()
    big = x if dtype == torch.float16 else (x * 1e15)
    weight, bias = coefficients(0.5, -0.25, 0.75, bias=0.1)
    y = polynorm(big, weight, bias)
    exact = polynorm_reference(big.double(), weight.double(), bias.double())
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
    y.square().sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(("fast", "reference"), PAIRS)
@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", SIZES)
def test_values_and_gradients_are_those_of_the_definition(fast, reference, order, shape):
    weight, bias = draw(order, seed=1, dtype=torch.float64), draw(1, seed=2, dtype=torch.float64)
    found = []
    for function in (fast, reference):
        inputs = [t.clone().requires_grad_() for t in (2 * draw(*shape, dtype=torch.float64), weight, bias)]
        y = function(*inputs)
        grads = torch.autograd.grad(y, inputs, draw(*shape, seed=3, dtype=torch.float64))
        found.append((y.detach(), *grads))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("fast", "_reference"), PAIRS)
def test_first_and_second_derivatives(fast, _reference):
    inputs = [draw(3, 7, dtype=torch.float64), draw(3, seed=1, dtype=torch.float64), draw(1, dtype=torch.float64)]
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(fast, inputs)
    assert torch.autograd.gradgradcheck(fast, inputs)


@pytest.mark.parametrize("module", [PolyReLU(), PolyNorm()])
def test_only_x_is_kept_for_the_backward_pass(module):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        module(draw(5, 63).requires_grad_())
    assert sorted(kept) == [3, 5 * 63]


@pytest.mark.parametrize("layer", [PolyReLUMLP, PolyNormMLP])
def test_four_scalars_a_layer_that_are_not_decayed(layer):
    ours, plain = layer(dim=8, hidden=16, bias=True), ReLUMLP(dim=8, hidden=16)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in plain.parameters()) + 4
    spared = {id(p) for group in decay_groups(ours, 0.1) if not group["weight_decay"] for p in group["params"]}
    assert {"poly.weight", "poly.bias"} <= {name for name, p in ours.named_parameters() if id(p) in spared}
    assert ours.up.bias is not None
    assert layer(dim=8, hidden=16).up.bias is None


@pytest.mark.parametrize("order", [1, 4])
@pytest.mark.parametrize("layer", [PolyReLUMLP, PolyNormMLP])
def test_order_is_the_number_of_powers_and_they_start_equal(layer, order):
    poly = layer(dim=8, hidden=16, order=order).poly
    assert torch.equal(poly.weight, torch.full((order,), 1 / order))
    assert poly.bias.item() == 0


def test_eps_of_the_layer_reaches_the_norm():
    x, layer = draw(1, 2, 8), PolyNormMLP(dim=8, hidden=16)
    other = PolyNormMLP(dim=8, hidden=16, eps=10.0)
    other.load_state_dict(layer.state_dict())
    hidden = layer.up(x)
    torch.testing.assert_close(
        other(x), other.down(polynorm_reference(hidden, other.poly.weight, other.poly.bias, 10.0))
    )
    assert not torch.allclose(layer(x), other(x))


@pytest.mark.parametrize("layer", [PolyReLUMLP, PolyNormMLP])
def test_what_the_second_matrix_reads_passes_through_inner(layer):
    x, ours = draw(1, 2, 8), layer(dim=8, hidden=16)
    ours.inner = torch.nn.RMSNorm(ours.inner_width)
    assert torch.equal(ours(x), ours.down(ours.inner(ours.poly(ours.up(x)))))


@pytest.mark.parametrize(("options", "says"), [({"order": 0}, "order >= 1, got order=0"), ({"eps": 0.0}, "eps > 0")])
def test_impossible_options_are_refused(options, says):
    with pytest.raises(FormwrightError, match=says):
        PolyNormMLP(dim=8, hidden=16, **options)


@pytest.mark.reference
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_polynorm_equals_torch_rms_norm_of_the_powers(dtype):
    x, poly = 3 * draw(5, 63, dtype=dtype), PolyNorm().to(dtype)
    torch.nn.init.normal_(poly.weight, generator=torch.Generator().manual_seed(4))
    a_3, a_2, a_1 = poly.weight
    theirs = sum(a * F.rms_norm(x**i, (63,), eps=1e-6) for i, a in ((1, a_1), (2, a_2), (3, a_3))) + poly.bias
    torch.testing.assert_close(poly(x), theirs, rtol=1e-5, atol=1e-6)
