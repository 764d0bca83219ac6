"""Arithmetic of a network in whole numbers: add, multiply, shift, and one division a row.

Paper    Kim et al.: I-BERT (ICML 2021), arXiv:2101.01321.
Idea     A real tensor is S q, q whole and S > 0 known beforehand. Products of q are exact; a change of S is one
         multiplication and a shift; exp, erf and the square root are parabolas and Newton's method on q.

    dyadic      S / S' = m / 2^e                          requantise  q' = clamp((q m + 2^(e-1)) >> e)
    polynomial  a (x + b)^2 + c  ->  (q + floor(b/S))^2 + floor(c / (a S^2)),  scale a S^2
    i-exp       x = p - z ln 2,  exp(x) = (0.3585 (p + 1.353)^2 + 0.344) >> z
    i-softmax   floor(2^32 / sum) exp >> (32 - bits)
    i-GELU      x (1 + L(x / sqrt 2)) / 2,  L(t) = sign(t) (-0.2888 (min(|t|, 1.769) - 1.769)^2 + 1)
    i-sqrt      x <- (x + floor(n / x)) / 2 until it stops falling, from 2^ceil(bits(n) / 2)
    i-LayerNorm y = q - mean,  y floor(2^46 / i-sqrt(sum y^2)) >> 16,  scale sqrt(D) / 2^30

Every function takes q as integers, and computes in integers; or as whole numbers carried in floats, and gives the same
numbers with straight-through gradients (rounding counts as the identity). Those floats should be float64: in float32
numbers above 2^24 are not exact.
Differs  i-LayerNorm sums squares in 64 bits, so that they need no shift, and divides with 15 more bits: the paper's
         floor(2^31 / std) has few digits left where std is large. The shift of i-GELU's erf follows from S; the
         release's 14 is right only for small S. tanh (the pooler's) is (1 - e) / (1 + e), e = i-exp(-2 |x|).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int8, Int32, Integer, Num
from torch import Tensor

EXP = (0.3585, 1.353, 0.344)
ERF = (-0.2888, -1.769, 1.0)
LN2_STEPS = 30  # exp is 0 below -30 ln 2
EXP_BITS = 45  # of exp(0)


# Whole numbers, as integers or carried in floats


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, smooth: Tensor, value: Tensor) -> Tensor:  # noqa: ARG004 - torch's signature
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradients[0], None


def straight(smooth: Float[Tensor, "*n"], value: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """`value`, with the gradient of `smooth`."""
    return _Straight.apply(smooth, value.detach())


def _divide(q: Tensor, by: Tensor | int) -> Tensor:
    """floor(q / by)."""
    if not q.is_floating_point() and not (isinstance(by, Tensor) and by.is_floating_point()):
        return torch.div(q, by, rounding_mode="floor")
    smooth = q / by
    return straight(smooth, torch.div(q.detach(), by.detach() if isinstance(by, Tensor) else by, rounding_mode="floor"))


def _down(q: Tensor, bits: Tensor | int) -> Tensor:
    """floor(q / 2^bits)."""
    if not q.is_floating_point():
        return q >> bits
    smooth = q / 2.0**bits
    return straight(smooth, smooth.floor())


def _wide(q: Tensor) -> Tensor:
    """With room for products."""
    return q if q.is_floating_point() else q.long()


# Scales


def scale_of(largest: Float[Tensor, "*n"], bits: int) -> Float[Tensor, "*n"]:
    """S such that `largest` is the largest whole number of `bits` bits, in float64; never 0."""
    return largest.detach().double().abs().clamp_min(1e-8) / (2 ** (bits - 1) - 1)


def quantise(x: Float[Tensor, "*n"], scale: Float[Tensor, "*s"], bits: int) -> Float[Tensor, "*n"]:
    """round(x / S) between -(2^(b-1) - 1) and 2^(b-1) - 1, carried in float64."""
    top = 2 ** (bits - 1) - 1
    smooth = (x.double() / scale).clamp(-top, top)
    return straight(smooth, smooth.round())


def dyadic(ratio: Float[Tensor, "*n"], bits: int = 31) -> tuple[Integer[Tensor, "*n"], Integer[Tensor, "*n"]]:
    """m of at most `bits` bits and e with ratio = m / 2^e, m negative where the ratio is; 1 <= e <= 62.

    A ratio of 2^(bits-2) and more is taken for 2^(bits-2).
    """
    most = 2.0 ** (bits - 2)
    mantissa, exponent = torch.frexp(ratio.detach().double().clamp(-most, most))
    e = bits - exponent.long()
    m = torch.floor(mantissa * 2.0**bits + 0.5)
    late = (e - 62).clamp_min(0)  # below 2^-31 or so: fewer digits, down to none
    return torch.floor(m * 2.0 ** -late.double() + 0.5).long(), e - late


def requantise(
    q: Num[Tensor, "*n"],
    m: Integer[Tensor, "*s"],
    e: Integer[Tensor, "*s"],
    bits: int,
    offset: Integer[Tensor, "*s"] | None = None,
) -> Num[Tensor, "*n"]:
    """(q m + offset) / 2^e rounded, half up, and cut to `bits` bits. |q m + offset| must stay below 2^62.

    Args:
        offset: something to add in units of 2^-e, so that it is rounded only once.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    whole = q.detach().long() * m
    half = torch.ones_like(e) << (e - 1)
    whole = (whole + (half if offset is None else half + offset)) >> e
    if not q.is_floating_point():
        return whole.clamp(low, high)
    smooth = q * (m.to(q.dtype) / 2.0**e)
    if offset is not None:
        smooth = smooth + offset.to(q.dtype) / 2.0**e
    inside = (whole >= low) & (whole <= high)
    return straight(torch.where(inside, smooth, smooth.detach()), whole.clamp(low, high).to(q.dtype))


def int_matmul(a: Int8[Tensor, "m k"], b: Int8[Tensor, "k n"]) -> Int32[Tensor, "m n"]:
    """The exact product in int32."""
    if a.is_cuda:  # its kernel wants more than 16 rows and multiples of 8
        rows, columns = a.shape[0], b.shape[1]
        return torch._int_mm(*padded(a, b))[:rows, :columns]
    return torch._int_mm(a, b)


def padded(a: Int8[Tensor, "m k"], b: Int8[Tensor, "k n"]) -> tuple[Int8[Tensor, "m2 k2"], Int8[Tensor, "k2 n2"]]:
    """Zeros around, to more than 16 rows of a and multiples of 8 everywhere."""
    (m, k), n = a.shape, b.shape[1]
    rows, inner, columns = max(24, m + -m % 8), -k % 8, -n % 8
    return F.pad(a, (0, inner, 0, rows - m)), F.pad(b, (0, columns, 0, inner))


# Functions


def polynomial(
    q: Num[Tensor, "*n"], scale: float, coefficients: tuple[float, float, float]
) -> tuple[Num[Tensor, "*n"], float]:
    """a (x + b)^2 + c and its scale, which has the sign of a."""
    a, b, c = coefficients
    return (q + math.floor(b / scale)) ** 2 + math.floor(c / (a * scale**2)), a * scale**2


def i_exp(q: Num[Tensor, "*n"], scale: float) -> tuple[Num[Tensor, "*n"], float]:
    """exp of what is not above 0, and its scale. `scale` must be from 2^-20 to 2^-4."""
    ln2 = math.floor(math.log(2) / scale)
    q = _wide(q).clamp(-LN2_STEPS * ln2, 0)
    z = _divide(-q, ln2).detach()  # within a step of ln 2 the parabola alone has a slope
    value, unit = polynomial(q + z * ln2, scale, EXP)
    up = max(0, EXP_BITS - math.floor(1 / unit).bit_length())
    if value.is_floating_point():
        return _down(value * 2.0**up, z), unit / 2**up
    return (value << up) >> z, unit / 2**up


def i_softmax(
    q: Num[Tensor, "*n k"], scale: float, mask: Bool[Tensor, "*m k"] | None = None, bits: int = 8
) -> Num[Tensor, "*n k"]:
    """Softmax over the last axis, scale 2^-bits, from 0 to 2^bits - 1, of scores whose scale is as for `i_exp`.

    Args:
        mask: true where a key counts; the others get exactly 0, also where no key counts.
    """
    q = _wide(q)
    if mask is not None:  # out of the way of the largest
        q = q.masked_fill(~mask, -(2**40))
    value, _ = i_exp(q - q.amax(-1, keepdim=True).detach(), scale)
    value = _down(value, EXP_BITS - 16)  # 16 bits; a common factor does not matter here
    if mask is not None:
        value = value.masked_fill(~mask, 0)
    total = value.sum(-1, keepdim=True).clamp_min(1)
    share = _divide(torch.full_like(total, 2**32), total)
    return _down(value * share, 32 - bits).clamp(max=2**bits - 1)


def i_gelu(q: Num[Tensor, "*n"], scale: float) -> tuple[Num[Tensor, "*n"], float]:
    """GELU and its scale, which is negative as erf's is.

    `scale` should be that of an accumulator, 2^-8 at most: of int8 the error is large.
    """
    q = _wide(q)
    step = scale / math.sqrt(2)
    size = q.abs().clamp(max=-math.floor(ERF[1] / step))
    erf, unit = polynomial(size, step, ERF)
    down = max(0, math.floor(-14 - math.log2(-unit)))
    erf, unit = _down(q.sign() * erf, down), unit * 2**down
    return q * (erf + math.floor(1 / unit)), scale * unit / 2


def i_tanh(q: Num[Tensor, "*n"], scale: float) -> tuple[Num[Tensor, "*n"], float]:
    """tanh, scale 2^-15."""
    q = _wide(q)
    e, unit = i_exp(-2 * q.abs(), scale)
    one = math.floor(1 / unit)
    e = e.clamp(max=one)
    # one is of 45 bits: 30 of them leave room for the quotient's 15
    return q.sign() * _divide(_down(one - e, 15) * 2**15, _down(one + e, 15)), 2.0**-15


def i_sqrt(n: Num[Tensor, "*n"]) -> Num[Tensor, "*n"]:
    """floor(sqrt(n)) of n >= 0."""
    if n.is_floating_point():
        return straight(n.clamp_min(1).sqrt(), i_sqrt(n.detach().long()).to(n.dtype))
    zero, n = n == 0, n.clamp_min(1)
    left, bits = n, torch.zeros_like(n)
    for step in (32, 16, 8, 4, 2, 1) if n.dtype == torch.int64 else (16, 8, 4, 2, 1):
        more = (left >> step) > 0
        left, bits = torch.where(more, left >> step, left), bits + step * more
    x = torch.ones_like(n) << ((bits + 2) >> 1)
    while True:
        better = (x + torch.div(n, x, rounding_mode="floor")) >> 1
        if not bool((better < x).any()):
            return x.masked_fill(zero, 0)
        x = torch.minimum(x, better)


def i_layernorm(q: Num[Tensor, "*n d"]) -> tuple[Num[Tensor, "*n d"], float]:
    """(x - mean) / std and its scale sqrt(d) / 2^30, whatever the scale of q. q may have 22 bits."""
    q = _wide(q)
    width = q.shape[-1]
    y = q - _divide(2 * q.sum(-1, keepdim=True) + width, 2 * width)
    std = i_sqrt((y * y).sum(-1, keepdim=True)).clamp_min(1)
    share = _divide(torch.full_like(std, 2**46), std)
    return _down(y * share, 16), math.sqrt(width) / 2**30
