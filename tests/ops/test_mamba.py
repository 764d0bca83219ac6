"""Mamba's convolution and decoding step: the native forms against PyTorch."""

import jaxtyping
import pytest
import torch
from torch.nn import functional as F

from formwright.ops import mamba as ops
from formwright.ops import native
from formwright.ops.mamba import causal_conv_silu, causal_conv_silu_reference
from formwright.ops.selective_scan import selective_scan_reference


@pytest.fixture
def untyped(monkeypatch):
    """No shape checks: they wrap functions in code that dynamo cannot trace."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


needs_native = pytest.mark.skipif(native.library() is None, reason=f"The native kernels are {native.describe()}.")
SIZES = [(1, 1, 1, 1), (2, 2, 9, 4), (2, 7, 5, 4), (3, 63, 33, 3), (5, 40, 16, 4), (1, 20, 8, 5)]  # b, l, c, k


def inputs(batch, length, channels, taps):
    g = torch.Generator().manual_seed(length)
    both = torch.randn(batch, length, 2 * channels, generator=g)
    weight, bias = torch.randn(channels, 1, taps, generator=g), torch.randn(channels, generator=g)
    return both, weight, bias


def test_the_reference_is_the_sum_over_earlier_inputs():
    both, weight, bias = inputs(2, 7, 5, 4)
    x, _ = both.chunk(2, -1)
    y = causal_conv_silu_reference(x, weight, bias)
    for t in range(7):
        v = bias + sum(weight[:, 0, k] * x[:, t - 3 + k] for k in range(4) if t - 3 + k >= 0)
        torch.testing.assert_close(y[:, t], F.silu(v))


@needs_native
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_native_convolution_equals_pytorch_with_gradients(size, threads):
    values, before, results = inputs(*size), torch.get_num_threads(), []
    weights = torch.randn(size[:3], generator=torch.Generator().manual_seed(1))
    try:
        torch.set_num_threads(threads)
        for convolve in (causal_conv_silu, causal_conv_silu_reference):
            both, *rest = (value.clone().requires_grad_() for value in values)
            y = convolve(both.chunk(2, -1)[0], *rest)  # a view: rows of 2 c, of which c are read
            results.append([y, *torch.autograd.grad((y * weights).sum(), [both, *rest])])
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*results, atol=5e-5, rtol=1e-5)


@needs_native
def test_the_native_convolution_is_taken_and_the_operator_is_sound():
    both, weight, bias = (value.requires_grad_() for value in inputs(2, 7, 5, 4))
    arguments = both.chunk(2, -1)[0], weight, bias
    assert "causal_conv_silu" in type(causal_conv_silu(*arguments).grad_fn).__name__
    torch.library.opcheck(ops._forward, arguments)
    detached = [argument.detach() for argument in arguments]
    torch.library.opcheck(ops._backward, [*detached, torch.ones(2, 7, 5)])


@needs_native
@pytest.mark.usefixtures("untyped")
def test_the_native_convolution_compiles_without_a_break():
    compiled = torch.compile(causal_conv_silu, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (7, 33):
        both, *rest = inputs(2, length, 5, 4)
        torch.testing.assert_close(compiled(both[..., :5], *rest), causal_conv_silu(both[..., :5], *rest))


@needs_native
@pytest.mark.parametrize(
    ("channels", "states", "rank", "taps"), [(1, 1, 1, 1), (48, 16, 2, 4), (75, 5, 3, 2), (33, 20, 9, 6)]
)
def test_a_step_is_convolution_maps_scan_and_gate(channels, states, rank, taps):
    g = torch.Generator().manual_seed(channels)

    def draw(*shape):
        return torch.randn(*shape, generator=g)

    xz, window, state = draw(3, 1, 2 * channels), draw(3, taps - 1, channels), draw(3, channels, states)
    weights = {
        "conv_weight": draw(channels, 1, taps),
        "conv_bias": draw(channels),
        "x_weight": draw(rank + 2 * states, channels) / channels**0.5,
        "dt_weight": draw(channels, rank),
        "dt_bias": torch.linspace(-60, 60, channels),  # softplus from e^-60 to 60
        "A_log": draw(channels, states),
        "D": draw(channels),
    }
    real = torch.tensor([[True], [False], [True]])
    with torch.no_grad():
        assert ops.can_step(xz, state)
        y, next_window, next_state = ops.mamba_step(xz, window, state, real=real, **weights)
        weights = {name: weight.double() for name, weight in weights.items()}
        x, z = xz.double().chunk(2, -1)
        seen = torch.cat([window, x], 1)
        u = causal_conv_silu_reference(seen, weights["conv_weight"], weights["conv_bias"])[:, -1:] * real[..., None]
        dt, B, C = F.linear(u, weights["x_weight"]).split([rank, states, states], -1)
        delta = F.softplus(F.linear(dt, weights["dt_weight"], weights["dt_bias"]))
        A, D = -weights["A_log"].exp(), weights["D"]
        out, h = selective_scan_reference(u, delta, A, B, C, D, state=state.double())
    torch.testing.assert_close(y.double(), out * F.silu(z), atol=5e-4, rtol=1e-5)
    torch.testing.assert_close(next_state.double(), h, atol=1e-4, rtol=1e-5)  # rounding of an exponent in the tens
    assert torch.equal(next_window.double(), seen[:, 1:])


@needs_native
def test_no_step_where_it_would_be_wrong():
    x = torch.zeros(1, 1, 4)
    assert not ops.can_step(x, x)  # a gradient is wanted
    with torch.no_grad():
        assert ops.can_step(x, x)
        assert not ops.can_step(torch.zeros(1, 2, 4), x)
        assert not ops.can_step(x, x.bfloat16())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not ops.can_step(x, x)


def test_shapes_can_be_found_without_numbers():
    both, weight, bias = (tensor.to("meta") for tensor in inputs(2, 7, 5, 4))
    assert causal_conv_silu(both[..., :5], weight, bias).shape == (2, 7, 5)
    with torch.no_grad():
        assert not ops.can_step(both[:, :1], weight)
