"""AFT against softmax attention by length: one layer, one interleaved run, medians.

    python benchmarks/aft.py [--dim 128] [--heads 4] [--threads 1] [--rounds 3] [--lengths 512 1024 2048 4096]

Forward and backward of one causal layer on one sequence. "softmax" is torch's fused attention, "attention map" the same
with its (heads, T, T) weights in memory. Ratios above 1 say how many times as much attention takes; the exponent is
the slope between the shortest and the longest sequence.
"""

import argparse
import json
import math
import statistics
import time

import torch
from torch import nn

from formwright.bench.measure import peak_memory
from formwright.contracts import Context
from formwright.parts.assemble import mixer

MIXERS = {
    "attention map": "clipped-softmax(gamma=0.0)",
    "softmax": "softmax",
    "aft-full": "aft-full",
    "aft-simple": "aft-simple",
    "aft-local": "aft-local(window=32)",
    "aft-conv": "aft-conv",
}


def step(part: nn.Module, x: torch.Tensor) -> None:
    part(x, Context.of(x, causal=True)).sum().backward()


def measure(dim: int, heads: int, length: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds and peak megabytes of every mixer, one call of each in turn."""
    parts = {name: mixer(spec, dim=dim, heads=heads, length=length, causal=True) for name, spec in MIXERS.items()}
    x = torch.randn(1, length, dim)
    taken: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds + 1):
        for name, part in parts.items():
            start = time.perf_counter()
            step(part, x)
            taken[name].append(time.perf_counter() - start)
    return {
        name: {
            "ms": round(1e3 * statistics.median(taken[name][1:]), 2),
            "peak_mb": round(peak_memory(lambda part=part: step(part, x)) / 1e6, 2),
        }
        for name, part in parts.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = {}
    for length in sorted(options.lengths):
        row = table[length] = measure(options.dim, options.heads, length, options.rounds)
        ratios = {
            name: {f"{what} of the map / its": round(row["attention map"][what] / cost[what], 2) for what in cost}
            for name, cost in row.items()
        }
        print(json.dumps({"length": length, "cost": row, "ratio": ratios}), flush=True)
    shortest, longest = min(table), max(table)
    if longest > shortest:
        scale = math.log(longest / shortest)
        exponents = {
            name: {
                what: round(math.log(table[longest][name][what] / table[shortest][name][what]) / scale, 2)
                for what in ("ms", "peak_mb")
            }
            for name in MIXERS
        }
        print(json.dumps({"exponents": exponents, "from": shortest, "to": longest, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
