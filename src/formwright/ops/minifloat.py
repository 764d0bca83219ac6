"""Small floating-point numbers, ExMy, with a real-valued exponent bias b in place of a scale.

One sign, E exponent and M mantissa bits, no code for infinity or NaN, subnormals present:

    value = (-1)^s 2^(p - b) (1 + m / 2^M)    p = 1 .. 2^E - 1
            (-1)^s 2^(1 - b) m / 2^M          p = 0

    round   u = clamp(x 2^b, -top, top)       top = (2 - 2^-M) 2^(2^E - 1)
            l = max(floor(log2 |u|), 1)       step = 2^(l - M)
            x^ = step round(u / step) 2^-b

E1My is the symmetric uniform grid: E1M2 is INT4. Multiplying a tensor by 2^t is b <- b - t.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

from formwright.errors import FormwrightError


@dataclass(frozen=True)
class Minifloat:
    """A format: one sign bit, `exponent` and `mantissa` bits, eight at most."""

    exponent: int
    mantissa: int

    def __post_init__(self) -> None:
        if self.exponent < 1 or self.mantissa < 0 or self.bits > 8:
            raise FormwrightError(
                f"E{self.exponent}M{self.mantissa} is no small float: give at least one exponent bit, no negative "
                "number of mantissa bits, and eight bits at most with the sign."
            )

    def __str__(self) -> str:
        return f"E{self.exponent}M{self.mantissa}"

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def top(self) -> float:
        """The largest value at b = 0."""
        return (2 - 2.0**-self.mantissa) * 2.0 ** (2**self.exponent - 1)

    def values(self) -> list[float]:
        """What each code stands for at b = 0; a code is sign, exponent and mantissa in this order."""
        size = 2**self.mantissa
        above = [
            2.0 * m / size if p == 0 else 2.0**p * (1 + m / size) for p in range(2**self.exponent) for m in range(size)
        ]
        return [*above, *(-value for value in above)]

    def bias(self, largest: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The b at which `largest` is the largest value, in float64; 0 counts as the smallest normal float32."""
        return math.log2(self.top) - largest.double().clamp_min(torch.finfo(torch.float32).tiny).log2()


def unit(bias: Float[Tensor, "*n"], dtype: torch.dtype) -> Float[Tensor, "*n"]:
    """2^-b, by which the values at b = 0 are multiplied."""
    return torch.exp2(-bias.double()).to(dtype)


def quantise(x: Float[Tensor, "*n"], form: Minifloat, bias: Float[Tensor, "*b"]) -> Float[Tensor, "*n"]:
    """The nearest representable values; what is larger than the largest becomes the largest.

    Args:
        bias: b, of a shape that broadcasts against x.
    """
    scale = unit(bias, _working(x.dtype))
    return (nearest(x.to(scale.dtype) / scale, form) * scale).to(x.dtype)


def nearest(u: Float[Tensor, "*n"], form: Minifloat) -> Float[Tensor, "*n"]:
    """The nearest values at b = 0, ties to the even code. float32 or float64."""
    u = u.clamp(-form.top, form.top)
    step = _binade(u) * 2.0**-form.mantissa
    return torch.round(u / step) * step


def encode(x: Float[Tensor, "*n"], form: Minifloat, bias: Float[Tensor, "*b"]) -> UInt8[Tensor, "*n"]:
    """The codes of the nearest values; -0 is written as 0."""
    scale = unit(bias, _working(x.dtype))
    u = (x.to(scale.dtype) / scale).clamp(-form.top, form.top)
    binade = _binade(u)
    size = 2**form.mantissa
    # Codes count up through subnormals and binades alike: rounding up to the next binade is the next code.
    code = torch.round(u.abs() / binade * size) + (torch.log2(binade).round() - 1) * size
    negative = (u < 0) & (code > 0)
    return (code + negative * 2 ** (form.bits - 1)).to(torch.uint8)


def decode(
    codes: Integer[Tensor, "*n"], form: Minifloat, scale: Float[Tensor, "*b"] | Float[Tensor, ""]
) -> Float[Tensor, "*n"]:
    """What the codes stand for, in the dtype of `scale` = 2^-b."""
    table = torch.tensor(form.values(), dtype=scale.dtype, device=codes.device)
    return table[codes.int()] * scale


def pack(codes: UInt8[Tensor, "*n width"]) -> UInt8[Tensor, "*n bytes"]:
    """Two codes of four bits in a byte, the first in the low half; an odd width ends with a 0."""
    codes = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: UInt8[Tensor, "*n bytes"], width: int) -> UInt8[Tensor, "*n {width}"]:
    """The codes that `pack` put away."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :width]


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _binade(u: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """2^max(floor(log2 |u|), 1), exactly: the exponent bits alone, where log2 would be off by one at powers of two."""
    bits, mask = (torch.int64, 0x7FF << 52) if u.dtype == torch.float64 else (torch.int32, 0xFF << 23)
    return (u.contiguous().view(bits) & mask).view(u.dtype).clamp_min(2.0)
