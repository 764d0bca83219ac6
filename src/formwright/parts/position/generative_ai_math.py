"""RoPE x ALiBi: a rotation of queries and keys and a penalty on their distance that grows as the harmonic series.

Paper    Li: The Nature of Mathematical Modeling and Probabilistic Optimization Engineering in Generative AI (2024),
         arXiv:2410.18441, whose abstract proposes to combine RoPE and ALiBi with a harmonic series.
Idea     A score that RoPE makes is lowered by the distance, so that its weight factors into a rotation and a decay:

             score[h, i, j] = (R_i q_i) . (R_j k_j) / sqrt(d) - m_h S(i - j)         m_h = steepness 2^(-8 h / H)

             S(t) = H_t = 1 + 1/2 + .. + 1/t, H_0 = 0                     harmonic="distance"
             S(t) = t  and  m_h = steepness / h                           harmonic="heads"

         H_t is ln t + 0.5772 but for 1 / 2t: weights fall as t^-m_h, as KERPLE's log kernel, with nothing to learn.
Differs  The equations are our choice: the paper's own could not be read. H_t is the digamma function of t + 1, which
         knows every distance. Both directions, by |i - j|, are our extension.

t^-m has a finite sum only for m > 1. No slope of the default is that steep: by the criterion of exploring-extrapolation
it promises nothing beyond the training length. steepness above 2^8 makes all slopes so, whatever the number of heads.
"""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from formwright.contracts import Context, Toeplitz
from formwright.errors import FormwrightError
from formwright.ops.relative_kernels import KERNELS, Series
from formwright.parts.position import by_distance, refuse_all_but_one_sequence
from formwright.parts.position.roformer import RoPE

Harmonic = Literal["distance", "heads"]
EULER = 0.5772156649015329


def harmonic(t: Int[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """H_t = 1 + 1/2 + .. + 1/t in fp32, H_0 = 0."""
    return torch.where(t == 0, 0.0, torch.digamma(t.to(torch.float32) + 1) + EULER)


def harmonic_series(slope: float) -> Series:
    """exp(-slope H_t) as a series over distances."""
    tail = None
    if slope > 1:
        # exp(-m H_t) is e^(-m EULER) (t + 1/2)^-m but for a share of m / 24 t^2
        def tail(t: float | int) -> float:
            return math.exp(-slope * EULER) * (t + 0.5) ** (1 - slope) / (slope - 1)

    return Series(r=lambda t: -slope * _harmonic(t), integral=tail)


def _harmonic(t: float | int) -> float:
    """H_t between whole numbers too: up from t by its recurrence to where its asymptotic series is exact."""
    less = 0.0
    while t < 16:
        t += 1
        less += 1 / t
    middle = t + 0.5
    return math.log(middle) + EULER + 1 / (24 * middle**2) - 7 / (960 * middle**4) - less


class HarmonicRoPE(nn.Module):
    """Relative position by rotation and by a penalty of the harmonic kind. No parameters, no longest length.

    Args:
        heads: attention heads, any number from 1.
        head_dim: channels of a head, even.
        harmonic: what is harmonic, the penalty over distances or the slopes over heads.
        steepness: a factor on all slopes; 0 is RoPE alone.
        base: of the rotations, as in RoPE.
    """

    def __init__(
        self,
        *,
        heads: int,
        head_dim: int,
        harmonic: Harmonic = "distance",
        steepness: float = 1.0,
        base: float = 10000.0,
    ) -> None:
        super().__init__()
        if heads < 1 or steepness < 0 or not math.isfinite(steepness):
            raise FormwrightError(
                f"RoPE x ALiBi needs heads >= 1 and steepness >= 0, got heads={heads} and steepness={steepness}."
            )
        if harmonic not in get_args(Harmonic):
            raise FormwrightError(f'RoPE x ALiBi has harmonic="distance" or "heads", got {harmonic!r}.')
        self.rope = RoPE(head_dim=head_dim, base=base)
        self.harmonic = harmonic
        # Floats, not a buffer: model.bfloat16() would round a buffer, and loading through the meta device lose it.
        shares = [2.0 ** (-8 * h / heads) if harmonic == "distance" else 1 / h for h in range(1, heads + 1)]
        self.slopes = [steepness * share for share in shares]

    def rotate(
        self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], context: Context
    ) -> tuple[Float[Tensor, "b h q d"], Float[Tensor, "b g k d"]]:
        """q and k of the new tokens, turned; the keys before they are cached.

        Raises:
            UnsupportedContext: cross-attention or a grid, where |i - j| is no distance.
        """
        refuse_all_but_one_sequence("RoPE x ALiBi", context)
        return self.rope.rotate(q, k, context)

    def bias(self, context: Context) -> Toeplitz | Float[Tensor, "b h {context.queries} {context.keys}"]:
        """The penalty in fp32, nowhere above 0.

        Raises:
            UnsupportedContext: cross-attention or a grid, where |i - j| is no distance.
        """
        refuse_all_but_one_sequence("RoPE x ALiBi", context)
        return by_distance(context, self._values)

    def series(self) -> list[Series]:
        """Each head's fall as a series over distances."""
        if self.harmonic == "distance":
            return [harmonic_series(slope) for slope in self.slopes]
        return [
            KERNELS["exponential"].series(slope) if slope else Series(r=lambda _t: 0.0, integral=None)
            for slope in self.slopes
        ]

    def _values(self, lags: Int[Tensor, "..."]) -> Float[Tensor, "h ..."]:
        slopes = torch.tensor(self.slopes, dtype=torch.float32, device=lags.device).view(-1, *[1] * lags.ndim)
        distance = lags.abs()
        return -slopes * (harmonic(distance) if self.harmonic == "distance" else distance)
