"""Our Transformer against Hugging Face's and x-transformers' in training, encoding and decoding: one interleaved run.

    OMP_WAIT_POLICY=passive python benchmarks/transformer.py [training encoding decoding] [--threads 2] [--rounds 7]

training   a causal language model of 4 layers and width 256 on 16 x 256 tokens, forward, backward and fused AdamW, in
           float32 and under bfloat16 autocast (ours with attention in float32, as `formwright.training.fit` has it on a
           CPU), against GPT-2 and x-transformers with flash attention (pip install
           x-transformers; left out when absent).
encoding   BERT of 6 layers and width 384 with the same weights, 16 x 128 tokens, a third of them padding.
decoding   GPT-2 of 4 layers and width 256 with the same weights, one token at a time behind 512 and 8,192.

The variants take turns, the order turns round every round; figures are medians of processor time over all threads (and
of the clock), ratios medians of the ratios within a round. A ratio above 1 says how many times as long the other takes.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec

import torch
from torch.nn import functional as F
from transformers import BertConfig, BertModel, DynamicCache, GPT2Config, GPT2LMHeadModel

from formwright.models.convert import from_transformers
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM
from formwright.training.precision import attention_in_float32

WARM_UP = 2
Times = dict[str, list[tuple[float, float]]]


def interleaved(cases: dict[str, Callable[[], object]], rounds: int) -> Times:
    """Seconds of processor and clock of every case in every round."""
    times: Times = {name: [] for name in cases}
    for turn in range(rounds + WARM_UP):
        for name in list(cases)[:: 1 if turn % 2 else -1]:
            start = time.process_time(), time.perf_counter()
            cases[name]()
            times[name].append((time.process_time() - start[0], time.perf_counter() - start[1]))
    return {name: taken[WARM_UP:] for name, taken in times.items()}


def ratio(others: list[tuple[float, float]], ours: list[tuple[float, float]]) -> dict[str, float]:
    """How many times as long the others take, by processor time and by the clock."""
    pairs = list(zip(others, ours, strict=True))
    return {
        kind: round(statistics.median(theirs[i] / mine[i] for theirs, mine in pairs), 3)
        for i, kind in enumerate(("processor", "clock"))
    }


def report(title: str, times: Times, ours: str, scale: float = 1.0) -> dict[str, object]:
    """Milliseconds, and how many times as long as ours each of the others takes."""
    ms = {
        name: [round(statistics.median(one[i] for one in taken) * 1e3 / scale, 2) for i in (0, 1)]
        for name, taken in times.items()
    }
    ratios = {name: ratio(taken, times[ours]) for name, taken in times.items() if name != ours}
    shown = "  ".join(f"{name} {processor} ({clock}) ms" for name, (processor, clock) in ms.items())
    print(f"{title:28} {shown} | ours is faster by {ratios}", flush=True)
    return {"title": title, "milliseconds": ms, "ratios": ratios}


def training(rounds: int) -> list[dict[str, object]]:
    rows, length, vocab, dim = 16, 256, 256, 256
    ids = torch.randint(0, vocab, (rows, length))

    def gpt2() -> torch.nn.Module:
        sizes = {"vocab_size": vocab, "n_embd": dim, "n_layer": 4, "n_head": 4, "n_positions": length}
        plain = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
        return GPT2LMHeadModel(GPT2Config(**sizes, **plain, use_cache=False))

    def mine(qkv_bias: bool) -> torch.nn.Module:
        sizes = {"vocab_size": vocab, "hidden_size": dim, "num_hidden_layers": 4, "num_attention_heads": 4}
        return TransformerForCausalLM(
            TransformerConfig(
                architecture="decoder",
                position="learned",
                max_position_embeddings=length,
                qkv_bias=qkv_bias,
                use_cache=False,
                **sizes,
            )
        )

    models = {"ours": mine(True), "gpt2": gpt2()}
    if find_spec("x_transformers") is not None:
        from x_transformers import Decoder, TransformerWrapper

        layers = Decoder(dim=dim, depth=4, heads=4, attn_dim_head=64, attn_flash=True)
        models["x-transformers"] = TransformerWrapper(num_tokens=vocab, max_seq_len=length, attn_layers=layers)
        models["ours without attention biases"] = mine(False)  # x-transformers has none

    def step(name: str, dtype: torch.dtype | None) -> None:
        model, optimizer = models[name].train(), optimizers[name]
        fp32_attention = attention_in_float32(model) if dtype and name.startswith("ours") else nullcontext()
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None), fp32_attention:
            if name == "x-transformers":
                logits = model(ids)[:, :-1].flatten(0, 1)
                loss = F.cross_entropy(logits.float(), ids[:, 1:].flatten())
            else:
                loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True) for name, model in models.items()}
    found = []
    precisions = {"float32": None, "bfloat16 autocast": torch.bfloat16}
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        print("bfloat16 is left out: this processor has no instructions for it, and emulation says nothing.")
        del precisions["bfloat16 autocast"]
    for title, dtype in precisions.items():
        times = interleaved({name: lambda n=name, d=dtype: step(n, d) for name in models}, rounds)
        found.append(report(f"training {title}", times, "ours"))
        if dtype is None:
            fp32_gpt2 = times["gpt2"]
        else:
            found[-1]["against gpt2 in float32"] = ratio(fp32_gpt2, times["ours"])
            print(f"{'':28} against gpt2 in float32: {found[-1]['against gpt2 in float32']}")
        if "x-transformers" in times:
            alike = ratio(times["x-transformers"], times["ours without attention biases"])
            print(f"{'':28} without attention biases, against x-transformers: {alike}")
            found[-1]["without attention biases, against x-transformers"] = alike
    return found


def encoding(rounds: int) -> list[dict[str, object]]:
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    theirs = BertModel(BertConfig(**sizes), add_pooling_layer=False).eval()
    ours = from_transformers(theirs)
    ids = torch.randint(5, 30000, (16, 128))
    mask = (torch.arange(128) < torch.linspace(43, 128, 16)[:, None]).long()
    found = []
    with torch.no_grad():
        for title, given in (("padded", mask), ("full", torch.ones_like(mask))):
            inputs = {"input_ids": ids, "attention_mask": given}
            real = given.bool()
            torch.testing.assert_close(ours(**inputs)[0][real], theirs(**inputs)[0][real], atol=1e-5, rtol=1e-4)
            cases = {"ours": lambda i=inputs: ours(**i), "bert": lambda i=inputs: theirs(**i)}
            found.append(report(f"encoding {title}", interleaved(cases, rounds), "ours"))
    return found


@torch.no_grad()
def decoding(rounds: int, tokens: int = 16) -> list[dict[str, object]]:
    sizes = {"vocab_size": 256, "n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": 8300}
    theirs = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=None)).eval()
    ours = from_transformers(theirs)
    found = []
    for context in (512, 8192):
        ids = torch.randint(0, 256, (1, context))
        caches = {"ours": ours.model.new_cache(capacity=context + tokens), "gpt2": DynamicCache(config=theirs.config)}
        models, written = {"ours": ours, "gpt2": theirs}, {}
        for name, model in models.items():
            model(input_ids=ids, past_key_values=caches[name], use_cache=True)

        def run(name: str, models=models, caches=caches, written=written) -> None:
            token, out = torch.zeros(1, 1, dtype=torch.long), []
            for _ in range(tokens):
                logits = models[name](input_ids=token, past_key_values=caches[name], use_cache=True).logits
                token = logits[:, -1:].argmax(-1)
                out.append(token)
            written[name] = torch.cat(out, 1)
            caches[name].crop(-tokens)

        times = interleaved({name: lambda n=name, r=run: r(n) for name in models}, rounds)
        assert torch.equal(written["ours"], written["gpt2"])
        found.append(report(f"decoding behind {context}, a token", times, "ours", scale=tokens))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["training", "encoding", "decoding"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    parts = {"training": training, "encoding": encoding, "decoding": decoding}
    found = {name: parts[name](options.rounds) for name in options.parts}
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"threads": options.threads, "capability": torch.backends.cpu.get_cpu_capability()} | found, file)


if __name__ == "__main__":
    main()
