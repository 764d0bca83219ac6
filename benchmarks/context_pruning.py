"""Decoding with dynamic context pruning against the plain model, by the share of the context that is gone.

    python benchmarks/context_pruning.py [--lengths 1024 4096 8192] [--batch 8] [--pruned 0 0.5 0.8] [--steps 32]

GPT-2 of 4 layers, width 512 and 8 heads, float32, one thread. Caches are filled with random keys and values of so many
tokens, of which a share was forgotten; then tokens are decoded one by one. What was forgotten is imposed here: a
trained model chooses it, and the speed follows from how much it is. Milliseconds of processor time a step, medians of
steps in turns, and the bytes of the cache, votes included.
"""

import argparse
import copy
import json
import statistics
import time

import torch
from torch import nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from formwright.compress.structure import adopt
from formwright.compress.tokens.dynamic_context_pruning import DynamicContextPruning, Slots, prunings

LAYERS, WIDTH, HEADS, VOTES = 4, 512, 8, 32


def models(most: int) -> tuple[nn.Module, nn.Module]:
    """The plain model, and one whose attentions vote and forget nothing more."""
    config = GPT2Config(
        vocab_size=1000, n_embd=WIDTH, n_head=HEADS, n_layer=LAYERS, n_positions=most, bos_token_id=0, eos_token_id=0
    )
    plain = GPT2LMHeadModel(config).eval()
    pruned = adopt(copy.deepcopy(plain))
    DynamicContextPruning(width=VOTES).apply(pruned)
    for part in prunings(pruned):
        nn.init.constant_(part.beta, 1e4)
    return plain, pruned.eval()


def full(batch: int, tokens: int) -> DynamicCache:
    cache = DynamicCache()
    for layer in range(LAYERS):
        cache.update(*(torch.randn(batch, HEADS, tokens, WIDTH // HEADS) for _ in range(2)), layer)
    return cache


def slots(batch: int, tokens: int, pruned: float) -> DynamicCache:
    cache, kept = DynamicCache(), max(1, round((1 - pruned) * tokens))
    for _ in range(LAYERS):
        layer = Slots()
        layer.update(*(torch.randn(batch, HEADS, kept, WIDTH // HEADS) for _ in range(2)))
        layer.votes, layer.valid = torch.randn(batch, kept, VOTES), torch.ones(batch, kept, dtype=torch.bool)
        layer.seen = tokens
        cache.layers.append(layer)
    return cache


def held(cache: DynamicCache) -> int:
    return sum(
        layer.nbytes() if isinstance(layer, Slots) else layer.keys.nbytes + layer.values.nbytes
        for layer in cache.layers
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pruned", type=float, nargs="+", default=[0.0, 0.5, 0.8])
    parser.add_argument("--steps", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain, pruned = models(max(options.lengths) + options.steps + 1)
    token = torch.ones(options.batch, 1, dtype=torch.long)
    for tokens in options.lengths:
        runs = {"plain": (plain, full(options.batch, tokens))}
        runs |= {f"{share:.0%} pruned": (pruned, slots(options.batch, tokens, share)) for share in options.pruned}
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.steps):
            for name, (model, cache) in runs.items():
                start = time.process_time()
                model(input_ids=token, past_key_values=cache)
                taken[name].append(time.process_time() - start)
        steps = {name: statistics.median(times) for name, times in taken.items()}
        row = {"tokens": tokens, "batch": options.batch}
        for name, seconds in steps.items():
            row |= {f"{name}, ms": round(1e3 * seconds, 1), f"{name}, MB": round(held(runs[name][1]) / 1e6)}
            if name != "plain":
                row[f"{name}, times as fast"] = round(steps["plain"] / seconds, 2)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
