"""Efficient attention against its Python libraries and against softmax attention, in one run.

    python benchmarks/mixers.py [--lengths 1024 2048 4096 8192] [--rounds 5] [--only local]

One layer of width 512 with 8 heads, its projections included, batch 1, reading both ways (and causally where a library
does), one thread. Processor time in milliseconds of a forward pass and of a training step, medians of rounds in which
all take turns; how many times as fast as the library ours is; and the peak memory of a step (10^6 bytes, weights
apart). `softmax` is torch's fused attention in the same projections. Libraries run in float32, ours and softmax in
bfloat16 too, where the processor multiplies in it.

    performer   performer-pytorch's SelfAttention, as many features
    nystrom     nystrom-attention, 256 landmarks, no convolution
    linformer   linformer, 256 rows
    reformer    reformer-pytorch's LSHSelfAttention, 8 rounds of hashing, buckets of 64
    local       local-attention between the same projections, 256 tokens to either side
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from formwright.bench.measure import peak_memory
from formwright.contracts import Context
from formwright.parts import assemble

WIDTH, HEADS = 512, 8


def ours(spec: str, tokens: int) -> nn.Module:
    return assemble.mixer(
        spec,
        position=None,
        qkv_bias=False,
        dim=WIDTH,
        heads=HEADS,
        kv_heads=None,
        head_dim=WIDTH // HEADS,
        length=tokens,
        layers=1,
        layer=0,
    )


class LocalPeer(nn.Module):
    """local-attention between projections: a token sees its own block of 256 and the ones beside it."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        from local_attention import LocalAttention

        self.into, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.attention = LocalAttention(
            window_size=256, causal=causal, look_forward=0 if causal else 1, use_rotary_pos_emb=False, autopad=True
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.into(x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        return self.out(self.attention(q, k, v).transpose(1, 2).flatten(2))


def peer(name: str, tokens: int, causal: bool) -> nn.Module | None:
    """The library's layer; none where it is not installed or not causal."""
    if name == "performer" and find_spec("performer_pytorch"):
        from performer_pytorch import SelfAttention

        return SelfAttention(WIDTH, heads=HEADS, dim_head=WIDTH // HEADS, nb_features=256, causal=causal)
    if name == "local" and find_spec("local_attention"):
        return LocalPeer(causal)
    if name == "reformer" and find_spec("reformer_pytorch"):
        from reformer_pytorch import LSHSelfAttention

        return LSHSelfAttention(WIDTH, heads=HEADS, bucket_size=64, n_hashes=8, causal=causal)
    if name == "nystrom" and not causal and find_spec("nystrom_attention"):
        from nystrom_attention import NystromAttention

        return NystromAttention(WIDTH, dim_head=WIDTH // HEADS, heads=HEADS, num_landmarks=256, residual=False)
    if name == "linformer" and not causal and find_spec("linformer"):
        from linformer import LinformerSelfAttention

        return LinformerSelfAttention(WIDTH, tokens, k=256, heads=HEADS)
    return None


def spec(name: str, tokens: int) -> str:
    return {
        "performer": "performer(features=256)",
        "nystrom": "nystromformer(landmarks=256)",
        "linformer": "linformer(rows=256)",
        "reformer": f"reformer(rounds=8, buckets={max(2, tokens // 64)}, chunk=64)",
        "local": "local(window=256)",
    }[name]


def calls(name: str, tokens: int, causal: bool) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Every layer that takes its turn."""
    theirs = peer(name, tokens, causal)
    layers: dict[str, tuple[nn.Module, torch.dtype]] = {
        "ours": (ours(spec(name, tokens), tokens), torch.float32),
        "softmax": (ours("softmax", tokens), torch.float32),
    }
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        layers["ours bf16"] = (ours(spec(name, tokens), tokens).bfloat16(), torch.bfloat16)
        layers["softmax bf16"] = (ours("softmax", tokens).bfloat16(), torch.bfloat16)
    for called, (layer, dtype) in layers.items():
        x = torch.randn(1, tokens, WIDTH, dtype=dtype)
        context = Context.of(x, causal=causal)
        yield called, lambda layer=layer, x=x, context=context: layer(x, context)
    if theirs is not None:
        x = torch.randn(1, tokens, WIDTH)
        yield "library", lambda: theirs(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=["performer", "nystrom", "linformer", "reformer", "local"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name in options.only:
        for causal in (False, True) if name in ("performer", "local", "reformer") else (False,):
            for tokens in options.lengths:
                taken: dict[str, list[float]] = {}
                layers = dict(calls(name, tokens, causal))
                for _ in range(options.rounds + 1):
                    for called, call in layers.items():
                        start = time.process_time()
                        with torch.no_grad():
                            call()
                        middle = time.process_time()
                        call().float().square().mean().backward()
                        taken.setdefault(f"{called}, forward", []).append(middle - start)
                        taken.setdefault(f"{called}, step", []).append(time.process_time() - middle)
                row = {called: round(1e3 * statistics.median(times[1:]), 1) for called, times in taken.items()}
                for called in ("ours", "library", "softmax"):
                    if called in layers:
                        memory = peak_memory(lambda run=layers[called]: run().square().mean().backward())
                        row[f"{called}, MB"] = round(memory / 1e6)
                if "library" in layers:
                    for phase in ("forward", "step"):
                        row[f"times as fast, {phase}"] = round(row[f"library, {phase}"] / row[f"ours, {phase}"], 2)
                print(json.dumps({"mixer": name, "tokens": tokens, "causal": causal} | row), flush=True)


if __name__ == "__main__":
    main()
