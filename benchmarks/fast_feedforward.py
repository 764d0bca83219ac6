"""FFF at inference against the dense layer of the same training width: one interleaved run, medians.

    python benchmarks/fast_feedforward.py [--dims 256,768] [--tokens 1,256,2048] [--leaf 32] [--seconds 60]

Times are processor seconds of one thread. Ratios above 1 say how many times as long the dense layer (two matrices,
ReLU) takes. `growth` is the slope of the logarithm of the time over that of the width, over the widths from 2^12 on:
1 = linear, 0 = flat. A case gets an equal part of the seconds and at least three rounds; the first warms up.
"""

import argparse
import math
import statistics
import time

import torch
from torch import Tensor, nn

from formwright.parts.feedforward.fast_feedforward import FastFeedForward
from formwright.parts.feedforward.mlp import ReLUMLP

WIDTHS = [2**power for power in range(8, 17, 2)]


def interleaved(layers: dict[str, nn.Module], x: Tensor, budget: float) -> dict[str, float]:
    """Median seconds of every layer, one call of each in turn, until the budget is spent."""
    taken: dict[str, list[float]] = {name: [] for name in layers}
    until = time.perf_counter() + budget
    while min(map(len, taken.values())) < 4 or time.perf_counter() < until:
        for name, layer in layers.items():
            start = time.process_time()
            layer(x)
            taken[name].append(time.process_time() - start)
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


def slope(seconds: dict[int, float]) -> float:
    """Of log seconds over log width, by least squares."""
    points = [(math.log(width), math.log(taken)) for width, taken in seconds.items() if width >= 2**12]
    return statistics.linear_regression(*zip(*points, strict=True)).slope


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", default="256,768")
    parser.add_argument("--tokens", default="1,256,2048")
    parser.add_argument("--leaf", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dims, tokens = ([int(number) for number in text.split(",")] for text in (options.dims, options.tokens))
    budget = options.seconds / (len(dims) * len(tokens) * len(WIDTHS))
    grown: dict[tuple[int, int, str], dict[int, float]] = {}
    print("| dim | tokens | width | depth | weights MB | dense ms | tree ms | times faster |\n" + "| ---: " * 8 + "|")
    for dim in dims:
        for width in WIDTHS:
            depth = int(math.log2(width // options.leaf))
            tree = FastFeedForward(dim=dim, hidden=width, depth=depth).eval()
            dense = ReLUMLP(dim=dim, hidden=width).eval()
            megabytes = sum(p.numel() * p.element_size() for p in tree.parameters()) / 1e6
            for count in tokens:
                taken = interleaved({"dense": dense, "tree": tree}, torch.randn(1, count, dim), budget)
                for name, seconds in taken.items():
                    grown.setdefault((dim, count, name), {})[width] = seconds
                print(
                    f"| {dim} | {count} | {width} | {depth} | {megabytes:.1f} | {1000 * taken['dense']:.3f} "
                    f"| {1000 * taken['tree']:.3f} | {taken['dense'] / taken['tree']:.2f} |",
                    flush=True,
                )
    print("\n| dim | tokens | growth dense | growth tree |\n" + "| ---: " * 4 + "|")
    for dim in dims:
        for count in tokens:
            dense_slope, tree_slope = (slope(grown[dim, count, name]) for name in ("dense", "tree"))
            print(f"| {dim} | {count} | {dense_slope:.2f} | {tree_slope:.2f} |")


if __name__ == "__main__":
    main()
