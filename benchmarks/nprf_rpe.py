"""NPRF attention by FFT against softmax attention, by length: one interleaved run, medians, exponents, crossover.

    python benchmarks/nprf_rpe.py [--lengths 512 1024 .. 16384] [--width 32] [--heads 1] [--causal] [--rounds 3]

    nprf            normalised features, m = width, under a bias for every distance: diagonals, by FFT
    softmax + bias  torch's scaled_dot_product_attention with the same bias, made an array for it
    softmax         the same function without any bias, which it fuses: the fastest it can be

A forward pass and a training step (forward and backward, the bias learning), one thread, milliseconds of processor
time, so that other programs on the machine count less. NPRF is by FFT at all lengths, also where it would choose to
make its weights outright. Memory is the most bytes alive at once in a step, counted storage by storage, what was there
before not counted; inside one fused call nothing is seen. Softmax with its array is left out where the step would need
more than --most gigabytes. Exponents are the slope of the logarithms, by least squares over all lengths and between the
last two. "crosses" is the length, between two measured ones and on a straight line of the logarithms, from which NPRF
is the lower.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from formwright.conformance.growth import cost
from formwright.contracts import Mask, Toeplitz
from formwright.parts.attention import nprf_rpe
from formwright.parts.attention.nprf_rpe import NPRF, materialised

METHODS = ("nprf", "softmax + bias", "softmax")


def calls(length: int, width: int, heads: int, causal: bool) -> tuple[dict[str, Callable[[], Tensor]], list[Tensor]]:
    """A forward pass of every method, and the leaves of them all."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, heads, length, width, generator=generator).requires_grad_() for _ in range(3)]
    b = (0.5 * torch.randn(heads, 2 * length - 1, generator=generator)).requires_grad_()
    q, k, v = leaves
    mask, attention = Mask(queries=length, keys=length, causal=causal), NPRF(head_dim=width)

    def softmax_with_bias() -> Tensor:
        added, seen = Toeplitz(b, length).dense()[None], mask.dense()
        added = added if seen is None else added.masked_fill(~seen, -torch.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=added)

    return {
        "nprf": lambda: attention(q, k, v, mask=mask, bias=Toeplitz(b, length)),
        "softmax + bias": softmax_with_bias,
        "softmax": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal),
    }, [*leaves, b]


def milliseconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return 1e3 * (time.process_time() - start)


@torch.no_grad()
def error(length: int, width: int, heads: int, causal: bool) -> float:
    """How far the FFT is from the array of weights, relative to the largest output."""
    q, k, v, b = calls(length, width, heads, causal)[1]
    mask, attention = Mask(queries=length, keys=length, causal=causal), NPRF(head_dim=width)
    bias = Toeplitz(b, length)
    phi_q, phi_k = attention._features(q, k, mask, None)
    exact = materialised(phi_q, phi_k, v, mask=mask, bias=bias)
    return float((attention(q, k, v, mask=mask, bias=bias) - exact).abs().max() / exact.abs().max())


def measure(length: int, width: int, heads: int, causal: bool, rounds: int, most: float) -> dict[str, float]:
    forwards, leaves = calls(length, width, heads, causal)
    if 4 * 4 * heads * length**2 > most * 2**30:  # bias, weights and the gradients of both
        del forwards["softmax + bias"]

    def step(name: str) -> None:
        for leaf in leaves:
            leaf.grad = None
        forwards[name]().sum().backward()

    def forward(name: str) -> None:
        with torch.no_grad():
            forwards[name]()

    taken: dict[str, list[float]] = {}
    for _ in range(rounds + 1):
        for name in forwards:
            taken.setdefault(f"{name}, forward", []).append(milliseconds(lambda name=name: forward(name)))
            taken.setdefault(f"{name}, step", []).append(milliseconds(lambda name=name: step(name)))
    row = {f"{what} ms": statistics.median(times[1:]) for what, times in taken.items()}
    return row | {f"{name}, step MB": cost(forwards[name], *leaves)[1] / 2**20 for name in forwards}


def slope(x: list[float], y: list[float]) -> float:
    x, y = ([math.log(value) for value in values] for values in (x, y))
    middle = statistics.fmean(x)
    return sum((a - middle) * b for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


def crossing(lengths: list[int], ours: list[float], theirs: list[float]) -> float | str:
    """The length from which ours is below theirs."""
    ratios = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
    if ratios[-1] >= 0:
        return f"beyond {lengths[-1]}"
    last = max((i for i, ratio in enumerate(ratios) if ratio >= 0), default=-1)
    if last < 0:
        return f"below {lengths[0]}"
    share = ratios[last] / (ratios[last] - ratios[last + 1])
    return round(lengths[last] * (lengths[last + 1] / lengths[last]) ** share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--most", type=float, default=4.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    nprf_rpe.OUTRIGHT = 0.0
    shape = (options.width, options.heads, options.causal)
    rows = {}
    for length in options.lengths:
        rows[length] = measure(length, *shape, options.rounds, options.most)
        if length <= 4096:
            rows[length]["error"] = error(length, *shape)
        print(json.dumps({"length": length} | {name: float(f"{value:.3g}") for name, value in rows[length].items()}))
    for what in ("forward ms", "step ms", "step MB"):
        found = {}
        for name in METHODS:
            known = [length for length in rows if f"{name}, {what}" in rows[length]]
            values = [rows[length][f"{name}, {what}"] for length in known]
            if len(known) > 1:
                found[name] = {"all": slope(known, values), "last two": slope(known[-2:], values[-2:])}
                if name != "nprf":
                    found[name]["crosses"] = crossing(known, [rows[n][f"nprf, {what}"] for n in known], values)
        print(json.dumps({"exponents": what} | found))


if __name__ == "__main__":
    main()
