"""Kernel attention under a Toeplitz matrix: n log n work, and nothing of n x n, forward or backward.

    out[i, e] = sum_r phi_q[r, i] y[r, e, i]        y[r, e, i] = sum_j c[i - j] phi_k[r, j] v[e, j]

Each y is a convolution along the sequence: c and x = phi_k v are transformed, multiplied and transformed back. The
diagonals c run from i - j = 1 - q to k - 1, so query i is at place k - 1 + i of c * x. A period of L >= q + k - 1 is
long enough: what wraps around ends before place k - 1.

The y of all r at once would be q x m x e numbers. They are made a few r at a time, summed into `out`, and made again in
the backward pass, which keeps the inputs alone:

    d phi_q = sum_e g y        z = c^T (phi_q g)        d phi_k = sum_e z v        d v = sum_r z phi_k

and d c is the correlation of x and phi_q g, summed over r and e before it is transformed back.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

AT_ONCE = 1 << 18  # numbers in the y of one step, when they can be so few


def fast_length(least: int) -> int:
    """The smallest number from `least` on whose only prime factors are 2, 3 and 5, and that is even."""
    best = 1 << (least - 1).bit_length()
    fives = 1
    while fives < best:
        threes = fives
        while threes < best:
            twos = threes * max(2, 1 << (-(-least // threes) - 1).bit_length())
            best = min(best, twos)
            threes *= 3
        fives *= 5
    return max(best, 2)


def toeplitz_attend(
    phi_q: Float[Tensor, "b h m q"],
    phi_k: Float[Tensor, "b h m k"],
    v: Float[Tensor, "b h e k"],
    diagonals: Float[Tensor, "h lags"],
) -> Float[Tensor, "b h e q"]:
    """The sums `out`, not divided by anything; the sequence is the last axis. All in float32 or all in float64.

    Errors are relative to the largest diagonal: float32 keeps nothing of one 10^-7 times as large.
    """
    return _ToeplitzAttend.apply(phi_q, phi_k, v, diagonals)


def toeplitz_attend_reference(phi_q: Tensor, phi_k: Tensor, v: Tensor, diagonals: Tensor) -> Tensor:
    """The same through the q x k array."""
    c = diagonals.unfold(-1, phi_k.shape[-1], 1).flip(-1)
    return v @ (phi_q.mT @ phi_k * c).mT


class _ToeplitzAttend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, phi_q: Tensor, phi_k: Tensor, v: Tensor, diagonals: Tensor) -> Tensor:
        ctx.save_for_backward(phi_q, phi_k, v, diagonals)
        queries, keys = phi_q.shape[-1], phi_k.shape[-1]
        length = fast_length(queries + keys - 1)
        spectrum = torch.fft.rfft(diagonals, length)[:, None, None]  # (h, 1, 1, frequencies)
        out = v.new_zeros(*v.shape[:3], queries)
        for some in _features(phi_q, v, length):
            x = phi_k[:, :, some, None] * v[:, :, None]
            y = torch.fft.irfft(torch.fft.rfft(x, length).mul_(spectrum), length)[..., keys - 1 : keys - 1 + queries]
            out += (phi_q[:, :, some, None] * y).sum(2)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        phi_q, phi_k, v, diagonals = ctx.saved_tensors
        queries, keys = phi_q.shape[-1], phi_k.shape[-1]
        length = fast_length(queries + keys - 1)
        spectrum = torch.fft.rfft(diagonals, length)[:, None, None]
        turned = spectrum.conj()
        d_q, d_k, d_v = torch.empty_like(phi_q), torch.empty_like(phi_k), torch.zeros_like(v)
        d_spectrum = torch.zeros_like(spectrum[:, 0, 0])
        for some in _features(phi_q, v, length):
            x = torch.fft.rfft(phi_k[:, :, some, None] * v[:, :, None], length)
            y = torch.fft.irfft(x * spectrum, length)[..., keys - 1 : keys - 1 + queries]
            d_q[:, :, some] = (g[:, :, None] * y).sum(3)
            d_y = F.pad(phi_q[:, :, some, None] * g[:, :, None], (keys - 1, 0))
            d_y = torch.fft.rfft(d_y, length)
            if ctx.needs_input_grad[3]:
                d_spectrum += (x.conj() * d_y).sum((0, 2, 3))
            z = torch.fft.irfft(d_y.mul_(turned), length)[..., :keys]
            d_k[:, :, some] = (z * v[:, :, None]).sum(3)
            d_v += (z * phi_k[:, :, some, None]).sum(2)
        d_c = torch.fft.irfft(d_spectrum, length)[:, : queries + keys - 1] if ctx.needs_input_grad[3] else None
        return d_q, d_k, d_v, d_c


def _features(phi: Tensor, v: Tensor, length: int) -> Iterator[slice]:
    """The features, a few at a time."""
    batch, heads, features = phi.shape[:3]
    step = max(1, AT_ONCE // (batch * heads * v.shape[2] * length))
    return (slice(start, min(start + step, features)) for start in range(0, features, step))
