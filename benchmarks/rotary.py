"""Rotary positions against transformers' LLaMA, and as a share of attention: one interleaved run, medians.

    python benchmarks/rotary.py [--batch 8] [--heads 4] [--length 512] [--head-dim 64] [--threads 1] [--rounds 30]

Ratios above 1 say how many times as long transformers takes for the same rotation of q and k.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from formwright.contracts import Context
from formwright.parts.position.roformer import RoPE


def interleaved(cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of every case, one call of each in turn."""
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds + 3):
        for name, call in cases.items():
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[3:]) for name, times in taken.items()}


def measure(batch: int, heads: int, length: int, head_dim: int, rounds: int, dtype: torch.dtype, train: bool) -> dict:
    """Milliseconds and ratios at one size; q, k and v lie in memory as a head split leaves them."""
    context = Context(queries=length, keys=length)
    packed = torch.randn(batch, length, 3 * heads, head_dim, dtype=dtype).transpose(1, 2)
    q, k, v = (x.requires_grad_(train) for x in packed.chunk(3, 1))
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    cos, sin = (torch.cat((wave, wave), -1)[None].to(dtype) for wave in (angles.cos(), angles.sin()))
    ours, half = RoPE(head_dim=head_dim), RoPE(head_dim=head_dim, layout="half")

    def step(result: tuple[Tensor, ...] | Tensor, inputs: tuple[Tensor, ...]) -> None:
        if train:
            results = result if isinstance(result, tuple) else (result,)
            torch.autograd.grad(results, inputs, [torch.ones_like(x) for x in results])

    seconds = interleaved(
        {
            "attention": lambda: step(F.scaled_dot_product_attention(q, k, v), (q, k, v)),
            "transformers": lambda: step(apply_rotary_pos_emb(q, k, cos, sin), (q, k)),
            "interleaved": lambda: step(ours.rotate(q, k, context), (q, k)),
            "half": lambda: step(half.rotate(q, k, context), (q, k)),
        },
        rounds,
    )
    layouts = ("interleaved", "half")
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "mode": "forward and backward" if train else "forward",
        "milliseconds": {name: round(1000 * value, 3) for name, value in seconds.items()},
        "faster than transformers": {name: round(seconds["transformers"] / seconds[name], 2) for name in layouts},
        "share of attention": {name: round(seconds[name] / seconds["attention"], 3) for name in layouts},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("batch", 8),
        ("heads", 4),
        ("length", 512),
        ("head-dim", 64),
        ("threads", 1),
        ("rounds", 30),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for dtype in (torch.float32, torch.bfloat16):
        for train in (False, True):
            row = measure(options.batch, options.heads, options.length, options.head_dim, options.rounds, dtype, train)
            print(json.dumps(vars(options) | row))


if __name__ == "__main__":
    main()
