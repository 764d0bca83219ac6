"""Relative kernels as series: whether the sum of b_t = exp(r(t)) over all distances t converges, how far it reaches.

Paper    Qin, Zhong, Deng: Exploring Transformer Extrapolation (AAAI 2024), arXiv:2307.10156.
Idea     A causal Transformer with a bias r(i - j) on its scores reads any length as well as its own if sum_t b_t is
         finite: then the keys beyond a window w weigh nearly nothing, for every query alike.

             |o_i - o_i^w| <= 2 max|v| e^(2 l) sum_{t >= w} b_t / b_0          l = the largest |q . k| / sqrt(d)
             n(epsilon)     = min {j: sum_{t >= j} b_t < epsilon sum_t b_t}    the theoretical receptive field

         The condition is sufficient: a series that diverges promises nothing.
Differs  Sums beyond the near distances are by their integral and the Euler-Maclaurin terms, so that no table ends them.

Plain Python, so that a command can answer without loading torch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

NEAR = 64  # distances summed one by one


def alibi_slopes(heads: int, max_bias: float = 8.0) -> list[float]:
    """One slope a head; the flattest is 2^-max_bias."""
    power = 1 << (heads.bit_length() - 1)
    steps = [*range(2, 2 * power + 1, 2), *range(1, 2 * power, 2)][:heads]
    return [2.0 ** (-max_bias * step / (2 * power)) for step in steps]


@dataclass(frozen=True, kw_only=True)
class Series:
    """b_t = exp(r(t)) of one head, falling with t.

    Attributes:
        r: the bias at a distance.
        integral: of exp(r) from a distance to infinity; none = it diverges.
    """

    r: Callable[[float], float]
    integral: Callable[[float], float] | None

    @property
    def converges(self) -> bool:
        return self.integral is not None

    def b(self, t: float | int) -> float:
        return math.exp(self.r(t))

    def beyond(self, j: int) -> float:
        """The sum of b_t from t = j on; infinite when it diverges."""
        if self.integral is None:
            return math.inf
        far = max(j, NEAR)
        bend = (self.b(far - 0.5) - self.b(far + 0.5)) / 12  # -b'(far) / 12
        return math.fsum(map(self.b, range(j, far))) + self.integral(far) + self.b(far) / 2 + bend

    def receptive_field(self, epsilon: float = 0.01) -> float | int:
        """How many of the nearest keys hold all of the sum but epsilon; infinite when it diverges."""
        if self.integral is None:
            return math.inf
        least = epsilon * self.beyond(0)
        high = 1
        while self.beyond(high) >= least:
            high *= 2
        low = high // 2  # at low the rest is still too much
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.beyond(middle) >= least else (low, middle)
        return high

    def window_error(self, window: int, *, scores: float, values: float) -> float:
        """The most that attention to the last `window` keys differs from attention to all, at any length.

        Args:
            scores: the largest |q . k| / sqrt(d).
            values: the largest norm of a value.
        """
        return 2 * values * math.exp(2 * scores) * self.beyond(window) / self.b(0)


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One member of the paper's family: r as a function of y = slope x distance.

    Attributes:
        r: (y, log) -> r, for numbers and arrays alike; `log` is theirs.
        integral: of exp(r) from y to infinity; none = it diverges.
        sum: how b_t falls.
    """

    r: Callable[[Any, Callable[[Any], Any]], Any]
    integral: Callable[[float], float] | None
    sum: str

    def series(self, slope: float) -> Series:
        """The slope is inside: with it outside, k log(1 + y^2) would diverge for k <= 1/2."""
        integral = self.integral
        return Series(
            r=lambda t: self.r(slope * t, math.log),
            integral=None if integral is None else lambda t: integral(slope * t) / slope,
        )


def stretched(a: float, p: float) -> Callable[[float | int], float]:
    """The integral of exp(-a y^p) from y to infinity."""
    return lambda y: upper_gamma(1 / p, a * y**p) / (p * a ** (1 / p))


def upper_gamma(s: float, x: float) -> float:
    """The upper incomplete gamma function, by its series near 0 and its continued fraction beyond."""
    if x < s + 1:
        term = total = 1 / s
        n = s
        while term > total * 1e-17:
            n += 1
            term *= x / n
            total += term
        return math.gamma(s) - total * math.exp(s * math.log(x) - x) if x > 0 else math.gamma(s)
    b = x + 1 - s
    c, d = 1e300, 1 / b
    h = d
    for i in range(1, 500):
        b += 2
        a = -i * (i - s)
        d, c = 1 / (a * d + b), b + a / c
        h *= c * d
        if abs(c * d - 1) < 1e-16:
            break
    return math.exp(s * math.log(x) - x) * h


KERNELS: dict[str, Kernel] = {
    "exponential": Kernel(r=lambda y, _log: -y, integral=lambda y: math.exp(-y), sum="exp(-n)"),
    "type-1": Kernel(r=lambda y, log: -log(1 + y * y), integral=lambda y: math.atan2(1, y), sum="1 / n^2"),
    "type-2": Kernel(
        r=lambda y, log: -(log(3 + y) ** 2),
        integral=lambda y: math.exp(0.25) * math.sqrt(math.pi) / 2 * math.erfc(math.log(3 + y) - 0.5),
        sum="exp(-ln^2 n)",
    ),
    "log-over-square": Kernel(
        r=lambda y, log: log(1 + log(1 + y)) - 2 * log(1 + y),
        integral=lambda y: (2 + math.log(1 + y)) / (1 + y),
        sum="ln n / n^2",
    ),
    "power-1/2": Kernel(r=lambda y, _log: -(y**0.5), integral=stretched(1.0, 0.5), sum="exp(-n^0.5)"),
    "power-3/4": Kernel(r=lambda y, _log: -0.5 * y**0.75, integral=stretched(0.5, 0.75), sum="exp(-n^0.75 / 2)"),
    "power-5/4": Kernel(r=lambda y, _log: -(y**1.25), integral=stretched(1.0, 1.25), sum="exp(-n^1.25)"),
    "power-2": Kernel(r=lambda y, _log: -(y**2), integral=stretched(1.0, 2.0), sum="exp(-n^2)"),
    "power-4": Kernel(r=lambda y, _log: -(y**4), integral=stretched(1.0, 4.0), sum="exp(-n^4)"),
    "inverse": Kernel(r=lambda y, log: -log(1 + y), integral=None, sum="1 / n"),
    "inverse-log": Kernel(r=lambda y, log: -(log(3 + y) + log(log(3 + y))), integral=None, sum="1 / (n ln n)"),
}

# What a card may name besides: kernels that training decides.
LEARNED = {
    "kerple": 'in heads whose r1 is above 1 (in all with kernel="power"), which training decides',
    "bounded": "no: at far distances the bias does not fall",
}


def kerple_series(kernel: str, r1: float, r2: float) -> Series:
    """KERPLE's head with the numbers as they are used."""
    if kernel == "power":
        return Series(r=lambda t: -r1 * t**r2, integral=stretched(r1, r2))
    converging = (lambda t: (1 + r2 * t) ** (1 - r1) / (r2 * (r1 - 1))) if r1 > 1 else None
    return Series(r=lambda t: -r1 * math.log1p(r2 * t), integral=converging)


def described(name: str, *, heads: int = 8, epsilon: float = 0.01) -> str:
    """What the criterion says of a kernel by its name on a card, in a line."""
    if name in LEARNED:
        return LEARNED[name]
    kernel = KERNELS[name]
    if kernel.integral is None:
        return f"no: the sum of {kernel.sum} diverges"
    fields = [kernel.series(slope).receptive_field(epsilon) for slope in alibi_slopes(heads)]
    return (
        f"yes: the sum of {kernel.sum} converges; {1 - epsilon:.0%} of it is within {min(fields)} to {max(fields)} "
        f"tokens in {heads} heads"
    )
