"""Transformer-XL against our decoder with RoPE: a training step, and evaluation with memory against a sliding window.

    python benchmarks/transformer_xl.py [--threads 1] [--rounds 15] [--json FILE]

Candidates of a size run in turn, round after round. Times are medians of wall milliseconds; ratios, medians of the
rounds' own. Above 1: so many times as long as the RoPE decoder; in evaluation, as the segments with memory.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from formwright.models.text.transformer_xl import TransformerXLConfig, TransformerXLForCausalLM
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM

VOCAB = 66
TRAINED = ((64, 2, 2, 128), (64, 2, 2, 512), (128, 4, 4, 128), (256, 4, 4, 128))  # width, heads, layers, length
TOKENS = 2048  # a step
MEMORIES = (128, 256, 512)


def measured(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Wall seconds of every call in every round, in an order that turns round."""
    seen: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name in list(calls) if turn % 2 else reversed(calls):
            start = time.perf_counter()
            calls[name]()
            if turn > 1:  # the first rounds warm up
                seen[name].append(time.perf_counter() - start)
    return seen


def summary(seen: dict[str, list[float]], base: str, per: dict[str, int] | None = None) -> dict[str, dict[str, float]]:
    per = per or dict.fromkeys(seen, 1)
    return {
        name: {
            "ms": round(1e3 * statistics.median(values) / per[name], 3),
            "ratio": round(
                statistics.median(a / b * per[base] / per[name] for a, b in zip(values, seen[base], strict=True)),
                2,
            ),
        }
        for name, values in seen.items()
    }


def models(width: int, heads: int, layers: int, length: int, memory: int) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "max_position_embeddings": length,
        "dropout": 0.0,
    }
    rope = TransformerForCausalLM(
        TransformerConfig(
            **sizes, architecture="decoder", position="rope", block="post", feedforward="relu", qkv_bias=False
        )
    )
    return rope, TransformerXLForCausalLM(TransformerXLConfig(**sizes, mem_len=memory))


def training(width: int, heads: int, layers: int, length: int, rounds: int) -> dict:
    """Forward, backward and the optimizer's step on the same number of tokens."""
    rope, xl = models(width, heads, layers, length, memory=length)
    ids = torch.randint(VOCAB, (TOKENS // length, length + 1))
    optimizers = {model: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True) for model in (rope, xl)}

    def step(model: nn.Module, **more: object) -> None:
        model(input_ids=ids[:, :-1], labels=ids[:, :-1], **more).loss.backward()
        optimizers[model].step()
        optimizers[model].zero_grad()

    memory = xl(ids[:, :-1], past_key_values=xl.new_cache()).past_key_values
    return summary(
        measured(
            {
                "rope": lambda: step(rope),
                "transformer-xl, no memory": lambda: step(xl),
                "transformer-xl, memory as long as the segment": lambda: step(xl, past_key_values=memory),
            },
            rounds,
        ),
        "rope",
    )


@torch.no_grad()
def evaluation(memory: int, rounds: int, width: int = 128, heads: int = 4, layers: int = 4, segment: int = 64) -> dict:
    """One stream, every token told with `memory` tokens before it: segments with memory; token by token with memory;
    a window of the RoPE decoder read again for each token.
    """
    rope, xl = (model.eval() for model in models(width, heads, layers, memory, memory))
    ids = torch.randint(VOCAB, (1, memory + segment))
    held = xl(ids[:, :memory]).past_key_values
    calls = {
        "segments": lambda: xl(ids[:, memory:], past_key_values=held),
        "token by token": lambda: [xl(ids[:, t : t + 1], past_key_values=held) for t in range(8)],
        "window": lambda: [rope(ids[:, t : t + memory], use_cache=False, logits_to_keep=1) for t in range(4)],
    }
    return summary(measured(calls, rounds), "segments", {"segments": segment, "token by token": 8, "window": 4})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"A training step of {TOKENS} tokens, {arguments.threads} threads: ms, and as a multiple of RoPE's")
    results: dict[str, dict] = {}
    for size in TRAINED:
        name = "D{}, {} heads, {} layers, length {}".format(*size)
        results[name] = training(*size, arguments.rounds)
        print(f"  {name}")
        for candidate, row in results[name].items():
            print(f"    {row['ms']:9.2f}  {row['ratio']:6.2f}x  {candidate}", flush=True)
    print("Evaluation, D128, 4 layers: ms a token, and as a multiple of the segments'")
    for memory in MEMORIES:
        results[f"memory {memory}"] = evaluation(memory, max(3, arguments.rounds // 3))
        print(f"  {memory} tokens of context")
        for candidate, row in results[f"memory {memory}"].items():
            print(f"    {row['ms']:9.3f}  {row['ratio']:6.1f}x  {candidate}", flush=True)
    if arguments.json:
        facts = {"threads": arguments.threads, "torch": torch.__version__}
        arguments.json.write_text(json.dumps({"environment": facts, **results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
