"""VCC against dense layers by length, and as far as memory carries it.

    python benchmarks/vcc.py [--lengths 4096 8192 16384] [--far 131072] [--layers 4]

An encoder of width 256 with 4 heads, float32, one thread, batch 1: 16 tokens are important, and 32 blocks of 16 are
opened around them. Seconds of processor time and peak memory (10^6 bytes, weights apart) of a forward pass, medians of
three in turns; at the last length VCC alone.
"""

import argparse
import json
import statistics
import time

import torch

from formwright.bench.measure import peak_memory
from formwright.contracts import Context
from formwright.models.transformer import TransformerConfig, TransformerModel

WIDTH = 256


def stack(block: str | list[str], layers: int) -> torch.nn.Module:
    config = TransformerConfig(
        hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=4, position="none", block=block
    )
    return TransformerModel(config).eval().encoder


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--far", type=int, default=131072)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    spec = "vcc(vips=16, fine=32, size=16"
    ours = [f"{spec}, stay=true)"] * (options.layers - 1) + [f"{spec})"]
    stacks = {"vcc": stack(ours, options.layers), "dense": stack("pre", options.layers)}
    for tokens in [*options.lengths, options.far]:
        here = {"vcc": stacks["vcc"]} if tokens == options.far else stacks
        x = torch.randn(1, tokens, WIDTH)
        taken: dict[str, list[float]] = {name: [] for name in here}
        for _ in range(3):
            for name, layers in here.items():
                start = time.process_time()
                layers(x, Context.of(x))
                taken[name].append(time.process_time() - start)
        row: dict[str, float] = {"tokens": tokens}
        for name, layers in here.items():
            row[f"{name}, s"] = round(statistics.median(taken[name]), 3)
            row[f"{name}, MB"] = round(peak_memory(lambda layers=layers, x=x: layers(x, Context.of(x))) / 1e6)
        if "dense" in here:
            row["times as fast"] = round(row["dense, s"] / row["vcc, s"], 2)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
