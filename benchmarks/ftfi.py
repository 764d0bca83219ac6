"""Fast tree-field integration against brute force by size: one interleaved run, medians.

    python benchmarks/ftfi.py [--nodes 1000 2000 4000 8000 10000] [--channels 8] [--rounds 5]

Brute force fills the matrix of all distances row by row (each row is its parent's, one edge further: n^2 additions and
no more; its order of the nodes is given to it), puts f on it in place and multiplies, all in float32. Trees have random
weights; those "on a lattice" and the image's spanning tree have edges of 1. All on one thread, in milliseconds of
processor time, so that other programs on the machine count less. Ratios above 1 say how many times as long brute force
takes:

    whole         building (distances; halving) and the first integral (f of the matrix and the product; what is worked
                  out once a tree, and the sum)
    another f     one more integral with a new f, all that can be kept being kept
    another x     one more with the same f, for which brute force has kept the matrix f(D)
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from formwright.ops import native
from formwright.ops.ftfi import Exponential, ExponentialQuadratic, Polynomial, Rational, integrate
from formwright.ops.trees import IntegratorTree, all_distances, grid_edges, integrator_tree, spanning_tree


def random_tree(nodes: int, reach: int, generator: torch.Generator) -> Tensor:
    """Each node's parent is one of the `reach` before it; numbered in no order."""
    child = torch.arange(1, nodes)
    parent = child - 1 - (torch.rand(nodes - 1, generator=generator) * child.clamp(max=reach)).long()
    return torch.randperm(nodes, generator=generator)[torch.stack([parent, child], 1)]


def image_tree(nodes: int) -> Tensor:
    side = math.isqrt(nodes)
    edges = grid_edges((side, nodes // side))
    return edges[spanning_tree(edges, nodes=side * (nodes // side), seed=1)]


def timed(call: Callable[[], object]) -> tuple[float, object]:
    start = time.process_time()
    result = call()
    return 1e3 * (time.process_time() - start), result


def quadratic(distances: Tensor) -> None:
    for rows in distances.split(64):
        rows.mul_(rows.mul(0.01).sub_(0.2)).add_(1.0)


# f, and the same in place on the matrix of distances
FUNCTIONS = {
    "exponential": (
        Exponential(torch.tensor(-0.02)),
        lambda d: d.mul_(-0.02).exp_(),
    ),  # nowhere so small that exp is slow
    "quadratic polynomial": (Polynomial(torch.tensor([1.0, -0.2, 0.01])), quadratic),
    "rational 1 / (1 + x)": (Rational(torch.tensor([1.0]), torch.ones(2)), lambda d: d.add_(1).reciprocal_()),
    "exp(-x^2 / 10)": (ExponentialQuadratic(torch.tensor(-0.1)), lambda d: d.square_().mul_(-0.1).exp_()),
}


def measure(edges: Tensor, weights: Tensor | None, name: str, channels: int, rounds: int) -> dict:
    """One tree and one f."""
    f, in_place = FUNCTIONS[name]
    rooted = integrator_tree(edges, weights).rooted
    order = torch.from_numpy(rooted.node)
    x = torch.randn(len(order), channels)
    ours: dict[str, list[float]] = {"halving": [], "first": [], "further": []}
    brute: dict[str, list[float]] = {"distances": [], "f(D)": [], "product": []}
    for _ in range(rounds + 1):
        took, tree = timed(lambda: integrator_tree(edges, weights))
        ours["halving"].append(took)
        took, y = timed(lambda tree=tree: integrate(tree, x, f))
        ours["first"].append(took)
        ours["further"].append(timed(lambda tree=tree: integrate(tree, x, f))[0])
        took, apart = timed(lambda: torch.from_numpy(all_distances(rooted, np.float32)))
        brute["distances"].append(took)
        brute["f(D)"].append(timed(lambda apart=apart: in_place(apart))[0])
        took, product = timed(lambda apart=apart: apart @ x[order])
        brute["product"].append(took)
        del apart
    wanted = exact(tree, x, f)
    a, b = ({key: statistics.median(times[1:]) for key, times in side.items()} for side in (ours, brute))
    return {
        "f": name,
        "levels": tree.levels,
        "FTFI, ms": {key: round(value, 2) for key, value in a.items()},
        "brute force, ms": {key: round(value, 2) for key, value in b.items()},
        "ratio": {
            "whole": round(sum(b.values()) / (a["halving"] + a["first"]), 1),
            "another f": round((b["f(D)"] + b["product"]) / a["further"], 1),
            "another x": round(b["product"] / a["further"], 1),
        },
        "relative error": {
            "FTFI": float(f"{(y[order] - wanted).norm() / wanted.norm():.1e}"),
            "brute force": float(f"{(product - wanted).norm() / wanted.norm():.1e}"),
        },
    }


def exact(tree: IntegratorTree, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """In float64, over all pairs, in preorder."""
    x = x[torch.from_numpy(tree.rooted.node)].double()
    return torch.cat([f(rows) @ x for rows in torch.from_numpy(all_distances(tree.rooted)).split(256)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1000, 2000, 4000, 8000, 10000])
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    print(json.dumps({"kernels": native.describe(), "torch": torch.__version__} | vars(options)))
    for nodes in options.nodes:
        wide, deep = (random_tree(nodes, reach, generator) for reach in (nodes, 20))
        weights = torch.rand(nodes - 1, generator=generator)
        cases = [("random tree", wide, weights, name) for name in FUNCTIONS]
        cases += [("deep tree", deep, weights, name) for name in ("exponential", "rational 1 / (1 + x)")]
        cases += [("random tree on a lattice", wide, None, "exp(-x^2 / 10)")]
        cases += [("spanning tree of an image", image_tree(nodes), None, "rational 1 / (1 + x)")]
        for kind, edges, lengths, name in cases:
            row = measure(edges, lengths, name, options.channels, options.rounds)
            print(json.dumps({"nodes": len(edges) + 1, "tree": kind} | row), flush=True)


if __name__ == "__main__":
    main()
