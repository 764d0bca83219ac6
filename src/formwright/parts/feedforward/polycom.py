"""PolyCom: activations that compose a low polynomial with ReLU (PolyReLU) or with normalisation (PolyNorm).

Paper    Zhuo et al.: Polynomial Composition Activations: Unleashing the Dynamics of Large Language Models (ICLR 2025),
         arXiv:2411.03884.
Idea     A few learnt scalars a layer choose the shape of the activation; the layer keeps two matrices and no gate.

             PolyReLU(x) = a_0 + a_1 ReLU(x) + a_2 ReLU(x)^2 + a_3 ReLU(x)^3
             PolyNorm(x) = a_0 + a_1 norm(x) + a_2 norm(x^2) + a_3 norm(x^3)     norm(y) = y / sqrt(mean(y^2) + eps)

             y = Poly(x W_1) W_2

         The powers are taken element by element, the mean over all hidden channels of one token. PolyReLU with
         a = (0, 1, 0, 0) is ReLU, and x^2 = ReLU(x)^2 + ReLU(-x)^2, so polynomials are represented exactly. PolyNorm is
         not monotone, and does not change when x is multiplied by a positive number (up to eps).
Stores   x alone: the backward pass computes the powers again. norm(x^3) needs x^6, which half precision cannot hold and
         which overflows float32 from x = 3e6 on. PolyNorm divides by m = max(1, max |x|) first, u = x / m, and uses
         norm(x^i) = u^i / sqrt(mean(u^2i) + eps / m^2i), which is the same number. PolyReLU has no such protection: it
         is evaluated in float32, and x^3 may still exceed what float16 can return.
Differs  In nothing from the paper. The release wraps the powers in activation checkpointing for the memory that the
         backward pass saves here; it stores the coefficients as weight = [a_3, a_2, a_1], bias = [a_0], like ours. Its
         mixture-of-experts configuration applies weight decay to them; here, as all vectors, they are free of it.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formwright.errors import FormwrightError
from formwright.parts.feedforward.mlp import MLP


def polyrelu(x: Float[Tensor, "..."], weight: Float[Tensor, " r"], bias: Float[Tensor, " 1"]) -> Float[Tensor, "..."]:
    """bias + the sum over i = 1 .. r of weight[r - i] ReLU(x)^i, evaluated in float32 at least."""
    return _PolyReLU.apply(x, weight, bias)


def polynorm(
    x: Float[Tensor, "... h"], weight: Float[Tensor, " r"], bias: Float[Tensor, " 1"], eps: float = 1e-6
) -> Float[Tensor, "... h"]:
    """bias + the sum over i = 1 .. r of weight[r - i] norm(x^i), evaluated in float32 at least.

    Finite for every finite x.
    """
    return _PolyNorm.apply(x, weight, bias, eps)


def polyrelu_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The definition, power by power."""
    order = len(weight)
    return sum((weight[order - i] * x.relu() ** i for i in range(1, order + 1)), bias)


def polynorm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """The definition, power by power; overflows where |x|^2r does."""
    order = len(weight)
    powers = [x**i for i in range(1, order + 1)]
    normed = [y * (y.square().mean(-1, keepdim=True) + eps).rsqrt() for y in powers]
    return sum((weight[order - i] * normed[i - 1] for i in range(1, order + 1)), bias)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _horner(u: Tensor, coefficients: list[Tensor]) -> Tensor:
    """c_0 + c_1 u + c_2 u^2 + ..., the coefficients in that order."""
    value = coefficients[-1] * u if len(coefficients) > 1 else coefficients[0].expand_as(u)
    for coefficient in coefficients[-2:0:-1]:
        value = (value + coefficient) * u
    return value + coefficients[0] if len(coefficients) > 1 else value


class _PolyReLU(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _horner(_wide(x).relu(), [_wide(bias), *_wide(weight).flip(0).unbind()]).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        del output
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        g, r = _wide(grad), _wide(x).relu()
        slopes = [i * a for i, a in enumerate(_wide(weight).flip(0).unbind(), start=1)]
        to_x = g * _horner(r, slopes) * (x > 0)
        powers = [g * r]
        for _ in range(1, len(weight)):
            powers.append(powers[-1] * r)
        to_weight = torch.stack([power.sum() for power in reversed(powers)])
        return to_x.to(x.dtype), to_weight.to(weight.dtype), g.sum().view(1).to(weight.dtype)


def _normed(x: Tensor, order: int, eps: float) -> tuple[Tensor, Tensor, list[Tensor]]:
    """u = x / m, m = max(1, max |x|), and 1 / sqrt(mean(u^2i) + eps / m^2i) for i = 1 .. order."""
    m = x.detach().abs().amax(-1, keepdim=True).clamp(min=1)
    u = x / m
    rates, power = [], u
    for i in range(1, order + 1):
        power = power * u if i > 1 else u
        rates.append((power.square().mean(-1, keepdim=True) + eps * m ** (-2 * i)).rsqrt())
    return u, m, rates


class _PolyNorm(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        a = _wide(weight).flip(0).unbind()
        u, _, rates = _normed(_wide(x), len(a), eps)
        terms = [a_i * rate for a_i, rate in zip(a, rates, strict=True)]
        return _horner(u, [_wide(bias), *terms]).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        del output
        ctx.save_for_backward(*inputs[:2])
        ctx.eps = inputs[3]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """With n_i = norm(x^i): to x goes the sum of i x^(i-1) a_i (g - n_i mean(g n_i)) / rms_i, by powers of u."""
        x, weight = ctx.saved_tensors
        g, a = _wide(grad), _wide(weight).flip(0).unbind()
        u, m, rates = _normed(_wide(x), len(a), ctx.eps)
        shared, power = [], g
        for rate in rates:
            power = power * u
            shared.append(power.mean(-1, keepdim=True) * rate)  # mean(g n_i)
        slopes = [i * a_i * rate for i, (a_i, rate) in enumerate(zip(a, rates, strict=True), start=1)]
        pulls = [slope * share * rate for slope, share, rate in zip(slopes, shared, rates, strict=True)]
        to_x = (g * _horner(u, slopes) - u * _horner(u * u, pulls)) / m
        to_weight = torch.stack([share.sum() for share in reversed(shared)]) * x.shape[-1]
        return to_x.to(x.dtype), to_weight.to(weight.dtype), g.sum().view(1).to(weight.dtype), None


class _Coefficients(nn.Module):
    """The scalars of one layer: `weight` (order,), highest power first, and `bias` (1,)."""

    def __init__(self, *, order: int = 3) -> None:
        super().__init__()
        if order < 1:
            raise FormwrightError(f"A polynomial activation needs order >= 1, got order={order}; the paper's is 3.")
        self.weight, self.bias = nn.Parameter(torch.empty(order)), nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 1 / len(self.weight))
        nn.init.zeros_(self.bias)


class PolyReLU(_Coefficients):
    """A learnt polynomial of ReLU, zero for x <= 0 at the start.

    Args:
        order: highest power.
    """

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return polyrelu(x, self.weight, self.bias)


class PolyNorm(_Coefficients):
    """A learnt sum of normalised powers; the root mean square of the output is at most the sum of the |a_i|.

    Args:
        order: highest power.
        eps: added to the mean square of each power; lets the cube of a tiny x vanish.
    """

    def __init__(self, *, order: int = 3, eps: float = 1e-6) -> None:
        super().__init__(order=order)
        if eps <= 0:
            raise FormwrightError(f"PolyNorm needs eps > 0, got eps={eps}; the paper's is 1e-6.")
        self.eps = eps

    def forward(self, x: Float[Tensor, "... h"]) -> Float[Tensor, "... h"]:
        return polynorm(x, self.weight, self.bias, self.eps)


class PolyReLUMLP(MLP):
    """The two-matrix layer with PolyReLU: (b, n, d) -> (b, n, d).

    Args:
        dim: width d.
        hidden: width of the hidden layer; 4 d has the parameters of SwiGLU at 8/3 d.
        bias: whether the two matrices have biases; the paper's models have none.
        order: highest power.
    """

    def __init__(self, *, dim: int, hidden: int, bias: bool = False, order: int = 3) -> None:
        super().__init__(dim=dim, hidden=hidden, bias=bias)
        self.poly = PolyReLU(order=order)

    def activation(self, x: Float[Tensor, "b n h"]) -> Float[Tensor, "b n h"]:
        return self.poly(x)


class PolyNormMLP(MLP):
    """The two-matrix layer with PolyNorm: (b, n, d) -> (b, n, d).

    Args:
        dim: width d.
        hidden: width of the hidden layer; 4 d has the parameters of SwiGLU at 8/3 d.
        bias: whether the two matrices have biases; the paper's models have none.
        order: highest power.
        eps: added to the mean square of each power.
    """

    def __init__(self, *, dim: int, hidden: int, bias: bool = False, order: int = 3, eps: float = 1e-6) -> None:
        super().__init__(dim=dim, hidden=hidden, bias=bias)
        self.poly = PolyNorm(order=order, eps=eps)

    def activation(self, x: Float[Tensor, "b n h"]) -> Float[Tensor, "b n h"]:
        return self.poly(x)
