"""Moments of what travels through a Transformer of random weights, forward and backward, in closed form.

Paper    Kedia et al.: Transformers Get Stable (DeepScaleLM; ICML 2024), arXiv:2403.09635, the component formulas.
Idea     Follow three numbers: mean, variance s^2, and the covariance of two tokens of one sequence, r s^2.

             linear       s^2 <- d_in w^2 (s^2 + m^2), m <- 0, the covariance likewise       g^2 <- d_out w^2 g^2
             ReLU         m = s / sqrt(2 pi), s^2 <- s^2 (pi - 1) / 2 pi                        g^2 <- g^2 / 2
                          E f(u) f(v) = s^2 (r / 2 (1 - arccos(r) / pi) + sqrt(1 - r^2) / 2 pi)
             dropout p    s^2 + m^2 <- (s^2 + m^2) / (1 - p), covariance unchanged              likewise
             norm         s^2 <- 1                                                             g^2 <- g^2 / s^2
             softmax      m = 1 / L, s^2 <- (e^(s^2 (1 - r)) - 1) / L^2
             attention    s^2 <- s_v^2 (r + (1 - r) sum_j a_j^2)

         A gradient is a Moments too, of mean 0.
Differs  The paper's attention leaves out the second summand, which is small for long texts. Activations other than
         ReLU, GELU among them, are integrated numerically. Sums of squared weights are e^(s^2) / (L - 1 + e^(s^2)),
         which is also right for one key. Gradients of queries and keys are of first order in the logits.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from formwright.errors import FormwrightError

Function = Callable[[Tensor], Tensor]

REACH, STEPS = 8.0, 400  # standard deviations integrated over, and points an axis


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Of one feature: its mean and variance over tokens, and the covariance of two tokens of one sequence."""

    mean: float = 0.0
    variance: float
    covariance: float = 0.0

    def __post_init__(self) -> None:
        if not self.variance >= 0:
            raise FormwrightError(f"A variance is at least 0, got {self.variance}.")

    @property
    def second(self) -> float:
        """The mean square."""
        return self.variance + self.mean**2

    @property
    def correlation(self) -> float:
        return self.covariance / self.variance if self.variance else 0.0

    def __add__(self, other: "Moments") -> "Moments":
        """The sum of two that have nothing to do with each other."""
        return Moments(
            mean=self.mean + other.mean,
            variance=self.variance + other.variance,
            covariance=self.covariance + other.covariance,
        )

    def times(self, factor: float) -> "Moments":
        """Multiplied by a constant."""
        return Moments(
            mean=factor * self.mean, variance=factor**2 * self.variance, covariance=factor**2 * self.covariance
        )


@torch.no_grad()
def moments_of(x: Float[Tensor, "b n d"]) -> Moments:
    """Those measured of tokens, all features alike."""
    x = x.double()
    _, n, d = x.shape
    mean = float(x.mean())
    pairs = (x.sum(1).square().sum(-1) - x.square().sum((1, 2))).mean() / (d * n * (n - 1)) if n > 1 else 0.0
    return Moments(mean=mean, variance=float(x.var(correction=0)), covariance=float(pairs) - mean**2 if n > 1 else 0.0)


# Forward


def embedded(variances: Sequence[float], alike: Sequence[float]) -> Moments:
    """The sum of embedding tables.

    Args:
        variances: of each table.
        alike: for each, how often two tokens of a sequence read the same row, from 0 to 1.
    """
    shared = sum(v * a for v, a in zip(variances, alike, strict=True))
    return Moments(variance=sum(variances), covariance=shared)


def linear(x: Moments, *, inputs: int, weight: float) -> Moments:
    """x W with W of mean 0 and variance `weight`, and `inputs` rows."""
    return Moments(variance=inputs * weight * x.second, covariance=inputs * weight * (x.covariance + x.mean**2))


def relu(x: Moments) -> Moments:
    """max(0, x) of a Gaussian of mean 0."""
    r = min(1.0, max(-1.0, x.correlation))
    mean = math.sqrt(x.variance / (2 * math.pi))
    crossed = x.variance * (r / 2 * (1 - math.acos(r) / math.pi) + math.sqrt(1 - r * r) / (2 * math.pi))
    return Moments(mean=mean, variance=x.variance / 2 - mean**2, covariance=crossed - mean**2)


def activated(x: Moments, function: Function) -> Moments:
    """Any function of a Gaussian of mean 0, element by element."""
    mean, second, crossed = _integrals(x, function)
    return Moments(mean=mean, variance=max(0.0, second - mean**2), covariance=crossed - mean**2)


def product(x: Moments, y: Moments) -> Moments:
    """Element by element, of two that have nothing to do with each other."""
    mean = x.mean * y.mean
    crossed = (x.covariance + x.mean**2) * (y.covariance + y.mean**2)
    return Moments(mean=mean, variance=x.second * y.second - mean**2, covariance=crossed - mean**2)


def dropped(x: Moments, p: float) -> Moments:
    """Dropout with probability p in training: what stays is divided by 1 - p."""
    return Moments(mean=x.mean, variance=x.second / (1 - p) - x.mean**2, covariance=x.covariance)


def normed(x: Moments, *, centred: bool = True) -> Moments:
    """Layer normalisation (`centred`) or division by the root mean square."""
    size = x.variance if centred else x.second
    if not size:
        raise FormwrightError("What is to be normalised is constant: it has no variance.")
    return Moments(mean=0.0 if centred else x.mean / math.sqrt(size), **_scaled(x, 1 / size))


def softmaxed(x: Moments, *, length: int) -> Moments:
    """One weight of `length`; the covariance of x is that of two logits in a row."""
    spread = math.expm1(x.variance - x.covariance) / length**2
    return Moments(mean=1 / length, variance=spread)


class Mixing(NamedTuple):
    """How a softmax spreads: the mean over queries of c, the sum of squared weights, over pairs of queries that of the
    products of their weights on the same keys, and for the gradients of logits means of c (1 - c) and c (1 - c)^2.
    """

    own: float
    shared: float
    left: float
    left_twice: float
    queries: int
    keys: int


def mixing(q: Moments, k: Moments, weights: Float[Tensor, "h n m"], *, dropout: float = 0.0) -> Mixing:
    """Of queries and keys whose products are divided by the square root of their width.

    Args:
        weights: those of equal logits: 1 / m, causal ones, or with a bias.
        dropout: of the weights.
    """
    logits = q.second * (k.variance - k.covariance)
    alike = logits * min(1.0, max(0.0, q.covariance / q.second if q.second else 0.0))
    n = weights.shape[1]
    own = _sharper(weights.square().sum(-1), logits)
    both = _sharper(weights @ weights.mT, alike)
    pairs = (both.sum((1, 2)) - both.diagonal(dim1=1, dim2=2).sum(-1)).mean() / (n * (n - 1)) if n > 1 else own
    return Mixing(
        own=float(own.mean()) / (1 - dropout),
        shared=float(pairs),
        left=float((own * (1 - own)).mean()) / (1 - dropout),
        left_twice=float((own * (1 - own) ** 2).mean()) / (1 - dropout),
        queries=n,
        keys=weights.shape[2],
    )


def _sharper(concentration: Tensor, variance: float) -> Tensor:
    """A sum of products of weights, 1 / L when equal, once the logits vary."""
    grown = concentration * math.exp(variance)
    return grown / (1 - concentration + grown)


def attended(v: Moments, how: Mixing) -> Moments:
    """Means of values, weighted by a softmax."""
    apart = v.variance - v.covariance
    return Moments(mean=v.mean, variance=v.covariance + apart * how.own, covariance=v.covariance + apart * how.shared)


# Backward: `g` is the gradient by what the forward function gave


def linear_back(g: Moments, *, outputs: int, weight: float) -> Moments:
    return Moments(**_scaled(g, outputs * weight))


def activated_back(g: Moments, x: Moments, slope: Function) -> Moments:
    """`slope` is the derivative of the activation at x."""
    _, second, crossed = _integrals(x, slope)
    return Moments(variance=g.variance * second, covariance=g.covariance * crossed)


def product_back(g: Moments, other: Moments) -> Moments:
    """By one of two factors."""
    return Moments(variance=g.variance * other.second, covariance=g.covariance * (other.covariance + other.mean**2))


def dropped_back(g: Moments, p: float) -> Moments:
    return dropped(g, p)


def normed_back(g: Moments, x: Moments, *, width: int, centred: bool = True) -> Moments:
    """The gradient has no part along x, and none along the ones where the mean is taken out."""
    size, lost = (x.variance, 2) if centred else (x.second, 1)
    return Moments(**_scaled(g, max(width - lost, 0) / width / size))


def softmaxed_back(g: Moments, x: Moments, *, length: int) -> Moments:
    """By one logit; the covariances are those of two logits, or weights, in a row."""
    return Moments(variance=math.exp(x.variance - x.covariance) / length**2 * (g.variance - g.covariance))


def attended_back(g: Moments, q: Moments, k: Moments, v: Moments, how: Mixing) -> tuple[Moments, Moments, Moments]:
    """By queries, keys and values."""
    n, m = how.queries, how.keys
    apart = v.variance - v.covariance
    to_q = Moments(
        variance=g.variance * apart * (k.variance - k.covariance) * how.left_twice,
        covariance=g.covariance * apart * (k.variance - k.covariance) * how.shared,
    )
    others = (n - 1) * how.shared * g.covariance
    to_k = Moments(
        variance=apart * n / m * max(0.0, how.left * g.variance * q.second + others * (q.covariance + q.mean**2))
    )
    between = (
        n * (g.variance * (1 - how.own) + (n - 1) * g.covariance * (1 - how.shared)) / (m * (m - 1)) if m > 1 else 0.0
    )
    to_v = Moments(variance=max(0.0, n / m * (how.own * g.variance + others)), covariance=between)
    return to_q, to_k, to_v


def _scaled(x: Moments, factor: float) -> dict[str, float]:
    return {"variance": factor * x.variance, "covariance": factor * x.covariance}


@torch.no_grad()
def _integrals(x: Moments, function: Function) -> tuple[float, float, float]:
    """E f(u), E f(u)^2 and E f(u) f(v) of Gaussians of mean 0, by the midpoint rule, which does not mind kinks."""
    if x.mean:
        raise FormwrightError(f"An activation reads what a matrix gives, of mean 0; this has mean {x.mean:g}.")
    s, r = math.sqrt(x.variance), min(1.0, max(-1.0, x.correlation))
    z = (torch.arange(STEPS, dtype=torch.float64) + 0.5) * (2 * REACH / STEPS) - REACH
    p = torch.exp(-z * z / 2)
    p = p / p.sum()
    f = function(s * z)
    across = function(s * (r * z[:, None] + math.sqrt(1 - r * r) * z))
    return float(p @ f), float(p @ f.square()), float((p * f) @ (across @ p))
