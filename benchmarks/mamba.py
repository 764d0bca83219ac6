"""Mamba against mambapy and transformers: a training step over length, decoding over context.

All candidates of a size run in turn, round after round, so that a busy machine slows them alike. The figure is
the median over rounds of CPU time (all threads) and of wall time; ratios are medians of per-round ratios.

    python benchmarks/mamba.py [--threads 2] [--rounds 5] [--json FILE]
"""

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # else idle threads count as CPU time

import torch
from torch import Tensor, nn

from formwright.contracts import Context
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM
from formwright.ops import mamba as mamba_ops
from formwright.ops import native
from formwright.ops import selective_scan as scan_ops
from formwright.parts.mixing.mamba import Mamba

WIDTH, LAYERS, VOCAB = 256, 8, 256
LENGTHS = (512, 1024, 2048, 4096, 16384)
CONTEXTS = (512, 2048, 8192)
LONGEST = {"transformers": 512, "mambapy": 4096}  # transformers' backward pass is quadratic in length
DECODED = 16  # tokens a round


def measured(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of CPU and wall time of every call in every round, in an order that turns round."""
    seen = {name: {"cpu": [], "wall": []} for name in calls}
    for turn in range(rounds + 1):
        for name in list(calls) if turn % 2 else reversed(calls):
            cpu, wall = time.process_time(), time.perf_counter()
            calls[name]()
            if turn > 0:  # the first round warms up
                seen[name]["cpu"].append(time.process_time() - cpu)
                seen[name]["wall"].append(time.perf_counter() - wall)
    return seen


def ratio(slow: list[float], fast: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


class Pure:
    """Inside, the mixer runs without the C++ kernels."""

    def __enter__(self) -> None:
        self.kernels = scan_ops.FORWARD, mamba_ops.FORWARD, mamba_ops.STEP
        scan_ops.FORWARD = mamba_ops.FORWARD = mamba_ops.STEP = None

    def __exit__(self, *_: object) -> None:
        scan_ops.FORWARD, mamba_ops.FORWARD, mamba_ops.STEP = self.kernels


def training_steps(length: int) -> dict[str, Callable[[], None]]:
    from mambapy.mamba import MambaBlock
    from mambapy.mamba import MambaConfig as PyConfig
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    torch.manual_seed(0)
    ours, x = Mamba(dim=WIDTH), torch.randn(1, length, WIDTH, requires_grad=True)
    config = MambaConfig(hidden_size=WIDTH, num_hidden_layers=1)
    peers: dict[str, nn.Module] = {
        "mambapy": MambaBlock(PyConfig(d_model=WIDTH, n_layers=1)),
        "transformers": MambaMixer(config, layer_idx=0).train(),
    }

    def step(forward: Callable[[Tensor], Tensor]) -> None:
        forward(x).square().mean().backward()

    def chunked() -> None:
        with Pure():
            step(lambda x: ours(x, Context.of(x, causal=True)))

    calls: dict[str, Callable[[], None]] = {"chunked": chunked}
    if native.library() is not None:
        calls["native"] = lambda: step(lambda x: ours(x, Context.of(x, causal=True)))
    calls |= {name: lambda peer=peer: step(peer) for name, peer in peers.items() if length <= LONGEST[name]}
    return calls


def decoders(context: int) -> dict[str, Callable[[], None]]:
    """Each continues its own cached prompt, token by token."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS}
    config = TransformerConfig(
        **shape, architecture="decoder", mixer="mamba", feedforward="none", position="none", norm="rmsnorm"
    )
    models = {
        "ours": TransformerForCausalLM(config).eval(),
        "transformers": MambaForCausalLM(MambaConfig(**shape)).eval(),
    }
    prompt = torch.randint(VOCAB, (1, context))
    calls = {}
    for name, model in models.items():
        with torch.no_grad():
            out = model(input_ids=prompt, use_cache=True)
        key = "past_key_values" if name == "ours" else "cache_params"

        def decode(model: nn.Module = model, key: str = key, cache: object = out[key]) -> None:
            token = prompt[:, -1:]
            with torch.no_grad():
                for _ in range(DECODED):
                    token = model(input_ids=token, **{key: cache}, use_cache=True).logits[:, -1:].argmax(-1)

        calls[name] = decode
    return calls


def exponent(lengths: list[int], seconds: list[float]) -> float:
    """The slope of log time over log length, by least squares."""
    x, y = [math.log(n) for n in lengths], [math.log(s) for s in seconds]
    return statistics.linear_regression(x, y).slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"threads {arguments.threads}, native kernels {native.describe()}, torch {torch.__version__}")
    print(f"\nTraining step of one mixer, width {WIDTH}, batch 1: CPU ms / wall ms")
    training, decoding = {}, {}
    for length in LENGTHS:
        calls = training_steps(length)
        if length == LENGTHS[0]:
            slow = {"transformers": calls.pop("transformers")}
            reference = {name: calls[name] for name in calls if name != "mambapy"}
            training["quadratic"] = summary(measured({**slow, **reference}, 1), "transformers")
        rounds = arguments.rounds if length <= 2048 else max(2, arguments.rounds // 2)
        training[length] = summary(measured(calls, rounds), "mambapy" if "mambapy" in calls else None)
        report(length, training[length], "mambapy")
    report("512", training.pop("quadratic"), "transformers")
    names = [name for name in ("native", "chunked") if name in training[LENGTHS[0]]]
    slopes = {name: exponent(list(LENGTHS), [training[n][name]["cpu_ms"] for n in LENGTHS]) for name in names}
    print("  growth with length: " + ", ".join(f"{name} N^{slope:.2f}" for name, slope in slopes.items()))
    print(f"\nDecoding, {LAYERS} layers, width {WIDTH}, batch 1: CPU ms / wall ms a token")
    for context in CONTEXTS:
        decoding[context] = summary(measured(decoders(context), 2 * arguments.rounds), "transformers", DECODED)
        report(context, decoding[context], "transformers")
    flat = decoding[CONTEXTS[-1]]["ours"]["cpu_ms"] / decoding[CONTEXTS[0]]["ours"]["cpu_ms"]
    print(f"  ours at context {CONTEXTS[-1]} over {CONTEXTS[0]}: {flat:.2f}x")
    if arguments.json:
        facts = {"threads": arguments.threads, "native": native.describe(), "processor": platform.processor()}
        results = {"environment": facts, "training": training, "growth": slopes, "decoding": decoding, "flat": flat}
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def summary(seen: dict[str, dict[str, list[float]]], peer: str | None, per: int = 1) -> dict[str, dict[str, float]]:
    """Medians in ms, and how many times faster than the peer."""
    found = {}
    for name, times in seen.items():
        found[name] = {f"{kind}_ms": 1e3 * statistics.median(values) / per for kind, values in times.items()}
        if peer is not None and name != peer:
            found[name] |= {f"{kind}_ratio": ratio(seen[peer][kind], values) for kind, values in times.items()}
    return found


def report(size: int | str, found: dict[str, dict[str, float]], peer: str) -> None:
    cells = []
    for name, row in found.items():
        gain = f" ({row['cpu_ratio']:.1f}x, wall {row['wall_ratio']:.1f}x {peer})" if "cpu_ratio" in row else ""
        cells.append(f"{name} {row['cpu_ms']:.1f} / {row['wall_ms']:.1f}{gain}")
    print(f"  {size:>6}  " + "   ".join(cells), flush=True)


if __name__ == "__main__":
    main()
