"""One linear layer in float32, bfloat16 and int8, in turns: one run, ratios of medians.

    python benchmarks/int8.py [--threads 1] [--seconds 60] [--model FOLDER]

Times are milliseconds of processor time a thread, which other work on the machine disturbs less than wall-clock time.
int8 is the whole layer, rounding its input included, from float32 and from bfloat16; `int_mm` is
torch._int_mm alone, without rounding before and scaling after. Ratios say how many times as long as int8 (from
bfloat16) something takes. With --model, a folder of an encoder, a forward of 32 texts of 64 tokens is timed as well.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from formwright.compress.quantize.bfloat16 import BFloat16
from formwright.compress.quantize.int8 import Int8Linear, Seen, layers
from formwright.compress.structure import load, replace

SHAPES = [(1830, 384, 1152), (1830, 384, 1536), (1830, 1536, 384), (4096, 768, 3072)]  # tokens, inputs, outputs


def interleaved(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median processor milliseconds a thread, one call of each in turn, every second round backwards."""
    threads = torch.get_num_threads()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    until = time.perf_counter() + seconds
    order = list(calls.items())
    while min(map(len, taken.values())) < 6 or time.perf_counter() < until:
        order.reverse()
        for name, call in order:
            start = time.process_time()
            call()
            taken[name].append((time.process_time() - start) / threads)
    return {name: 1000 * statistics.median(times[2:]) for name, times in taken.items()}


def table(title: str, times: dict[str, float], unit: str) -> None:
    print(f"| {title} | " + " | ".join(f"{times[name]:.2f} ({times[name] / times[unit]:.2f})" for name in times) + " |")


def in_integers(old: nn.Linear, scale: Any, x: torch.Tensor) -> Int8Linear:
    return Int8Linear.of(old, scale=scale, smooth=0.5, seen=Seen(x.amin(0), x.amax(0), []))


def layer(tokens: int, inputs: int, outputs: int) -> dict[str, Callable[[], Any]]:
    x, linear = torch.randn(tokens, inputs), nn.Linear(inputs, outputs)
    short, half = x.bfloat16(), copy.deepcopy(linear).bfloat16()
    static, dynamic = in_integers(linear, "static", x), in_integers(linear, "dynamic", x)
    codes, weight = torch.randint(-127, 128, (tokens, inputs), dtype=torch.int8), static.codes.T
    return {
        "float32": lambda: linear(x),
        "bfloat16": lambda: half(short),
        "int8 from float32": lambda: static(x),
        "int8": lambda: static(short),
        "int8 dynamic": lambda: dynamic(short),
        "int_mm alone": lambda: torch._int_mm(codes, weight),
    }


def encoder(folder: str) -> dict[str, Callable[[], Any]]:
    """The whole model; with scales from random tokens, as only time is of interest."""
    model = load(folder).eval()
    batch = {"input_ids": torch.randint(1000, 20000, (32, 64)), "attention_mask": torch.ones(32, 64, dtype=torch.long)}
    half, integer, dynamic = (copy.deepcopy(model) for _ in range(3))
    BFloat16().apply(half)
    both = {}
    for name, changed, scale in (("int8", integer, "static"), ("int8 dynamic", dynamic, "dynamic")):
        for path, module in layers(changed).items():
            x = torch.randn(64, module.in_features)
            replace(changed, path, in_integers(module, scale, x))
        both[name] = changed
    only = copy.deepcopy(integer)
    for changed in both.values():
        BFloat16().apply(changed)
    found = {"float32": model, "bfloat16": half, "int8, rest float32": only, **both}
    return {name: partial(one, **batch) for name, one in found.items()}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--model")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    parts = len(SHAPES) + 2 * bool(options.model)
    for number, shape in enumerate(SHAPES):
        calls = layer(*shape)
        if not number:
            print("| tokens, inputs, outputs | " + " | ".join(calls) + " |\n" + "| --- " * (len(calls) + 1) + "|")
        table(str(shape), interleaved(calls, options.seconds / parts), "int8")
    if options.model:
        calls = encoder(options.model)
        print("\n| model | " + " | ".join(calls) + " |\n" + "| --- " * (len(calls) + 1) + "|")
        table("32 x 64 tokens", interleaved(calls, 2 * options.seconds / parts), "int8")


if __name__ == "__main__":
    main()
