"""MoE against the blocks of transformers, PEER against PEER-pytorch and dense layers: interleaved, ratios of medians.

    python benchmarks/experts.py moe [--rounds 15] [--threads 1]
    python benchmarks/experts.py peer [--rounds 9] [--threads 1] [--tokens 512] [--dim 256]
    python benchmarks/experts.py retrieval

Times are milliseconds of processor time: medians of rounds in which all take turns, every second round backwards, the
first two warm up. In brackets the median of the ratios to ours within a round: above 1, the other takes longer.

moe        forward pass and training step (forward and backward) of Mixtral's and OLMoE's blocks, same weights, with
           both ways that transformers has to run experts on a CPU; ours is the part `moe`.
peer       forward pass of PEER, of PEER-pytorch with as many experts, retrievals and key widths (8 heads of 16 experts,
           non_competing_scores=False), of our dense GELU layer of as many neurons as PEER has experts, and of the same
           from two plain nn.Linear; with --train a training step.
retrieval  product keys against scoring every key, by the number of experts.
"""

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from formwright.ops.peer import search
from formwright.parts.feedforward.mlp import GELUMLP
from formwright.parts.feedforward.moe import MoE
from formwright.parts.feedforward.peer import PEER


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[float, float]]:
    """Median milliseconds of every call, and the median of its ratios to the first."""
    order, taken = list(calls.items()), {name: [] for name in calls}
    for _ in range(rounds + 2):
        order.reverse()
        for name, call in order:
            start = time.process_time()
            call()
            taken[name].append(1000 * (time.process_time() - start))
    times = {name: column[2:] for name, column in taken.items()}
    ours = times[next(iter(calls))]
    return {
        name: (statistics.median(column), statistics.median(a / b for a, b in zip(column, ours, strict=True)))
        for name, column in times.items()
    }


def row(title: str, found: dict[str, tuple[float, float]]) -> None:
    print(f"| {title} | " + " | ".join(f"{name} {ms:.2f} ({ratio:.2f})" for name, (ms, ratio) in found.items()) + " |")


def step(layer: nn.Module, x: Tensor) -> None:
    for parameter in layer.parameters():
        parameter.grad = None
    layer(x).sum().backward()


@torch.no_grad()
def transformers_block(ours: MoE, implementation: str) -> nn.Module:
    """Mixtral's block, or OLMoE's where gates are not renormalized, with our weights."""
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock
    from transformers.models.olmoe.modeling_olmoe import OlmoeConfig, OlmoeSparseMoeBlock

    count, dim, hidden = ours.down.shape
    sizes = {
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_experts_per_tok": ours.active,
        "num_local_experts": count,
        "num_experts": count,
    }
    plain = ours.routing == "plain"
    config = OlmoeConfig(**sizes) if plain else MixtralConfig(**sizes)
    config._experts_implementation = implementation
    block = OlmoeSparseMoeBlock(config) if plain else MixtralSparseMoeBlock(config)
    block.gate.weight.copy_(ours.router)
    block.experts.gate_up_proj.copy_(ours.up)
    block.experts.down_proj.copy_(ours.down)
    return block


def moe(options: argparse.Namespace) -> None:
    cases = [
        ("mixtral", 8, 2, "renormalized", 256, 512),
        ("mixtral", 8, 2, "renormalized", 512, 1024),
        ("olmoe", 64, 8, "plain", 512, 256),
    ]
    for kind, experts, active, routing, dim, hidden in cases:
        ours = MoE(dim=dim, hidden=hidden, experts=experts, active=active, routing=routing, expert="swiglu")
        blocks: dict[str, nn.Module] = {"ours": ours}
        blocks |= {name: transformers_block(ours, name) for name in ("eager", "grouped_mm")}
        for tokens in (1, 64, 2048):
            x = torch.randn(1, tokens, dim)
            title = f"{kind}, {experts} experts of {hidden}, {active} active, width {dim}, {tokens} tokens"
            for block in blocks.values():
                block.eval()
            with torch.no_grad():
                outputs = [block(x) for block in blocks.values()]
                found = interleaved({name: lambda b=block, x=x: b(x) for name, block in blocks.items()}, options.rounds)
            assert all(torch.allclose(outputs[0], other, atol=1e-5) for other in outputs)
            row(f"{title}, forward", found)
            if tokens > 1:
                for block in blocks.values():
                    block.train()
                calls = {name: lambda b=block, x=x: step(b, x) for name, block in blocks.items()}
                row(f"{title}, step", interleaved(calls, options.rounds))


def library(dim: int, experts: int) -> nn.Module | None:
    """PEER-pytorch, where it is installed."""
    if find_spec("PEER_pytorch") is None:
        return None
    from PEER_pytorch import PEER as Theirs

    return Theirs(dim, heads=8, num_experts=experts, num_experts_per_head=16, dim_key=64, non_competing_scores=False)


def peer(options: argparse.Namespace) -> None:
    dim, x = options.dim, torch.randn(1, options.tokens, options.dim)
    for power in options.powers:
        side = math.isqrt(2**power)
        experts = side * side
        layers: dict[str, nn.Module | None] = {
            "ours": PEER(dim=dim, experts=experts),
            "ours, bfloat16 tables": None,
            "PEER-pytorch": library(dim, experts),
            "dense": GELUMLP(dim=dim, hidden=experts),
            "dense, plain": nn.Sequential(nn.Linear(dim, experts), nn.GELU(), nn.Linear(experts, dim)),
        }
        if not options.train:
            half = copy.deepcopy(layers["ours"])
            half.up.data, half.down.data = half.up.bfloat16(), half.down.bfloat16()
            layers["ours, bfloat16 tables"] = half
        there = {name: layer.train(options.train) for name, layer in layers.items() if layer is not None}
        with torch.set_grad_enabled(options.train):
            run = step if options.train else nn.Module.__call__
            found = interleaved(
                {name: lambda a=layer, run=run: run(a, x) for name, layer in there.items()}, options.rounds
            )
        row(f"2^{power}: {experts} experts, width {dim}, {options.tokens} tokens", found)


@torch.no_grad()
def retrieval(options: argparse.Namespace) -> None:
    """8 heads of 16, keys of width 128; every key scored by one product and torch.topk."""
    q = torch.randn(8 * 16, 2, 64)
    for power in range(12, 21, 2):
        n = 2 ** (power // 2)
        keys = torch.randn(2, n, 64)
        whole = torch.cat((keys[0].repeat_interleave(n, 0), keys[1].repeat(n, 1)), 1)
        calls = {
            "product keys": lambda keys=keys: search(q, keys, 16),
            "every key": lambda whole=whole: (q.flatten(1) @ whole.T).topk(16),
        }
        row(f"2^{power} keys, 16 tokens", interleaved(calls, options.rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["moe", "peer", "retrieval"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--powers", type=int, nargs="+", default=[10, 12, 13, 14, 16, 18])
    parser.add_argument("--train", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    {"moe": moe, "peer": peer, "retrieval": retrieval}[options.what](options)


if __name__ == "__main__":
    main()
