"""Dense float32, dense int8 and block-sparse int8 products, and a whole DistilBERT in each: one interleaved run.

    OMP_WAIT_POLICY=passive python benchmarks/block_sparse.py [products encoder] [--threads 2] [--rounds 7]

products   4,096 tokens (32 x 128) times matrices of 768 x 768, 3,072 x 768 and 768 x 3,072, in which 0, 50, 70, 80 and
           90 % of the blocks of four are zero. From float32 rows to float32 rows: the int8 products quantise their
           input. `dense int8` is oneDNN's product with its own packed weight; `int8 product` is the bare product, bytes
           to integers. Also the share of zero blocks from which the sparse product is the faster one, interpolated.
encoder    DistilBERT's own sizes (6 layers, width 768) on 32 texts of 128 tokens, and of 16 to 128, padded: float32 as
           transformers runs it (eager, attention by scaled_dot_product_attention), padding-free in float32, int8 by
           step `int8`, and 80 % block-sparse int8. Weights are random: only time is read here.

The variants take turns, the order turns round every round; figures are medians of the clock in milliseconds (and of
processor time over all threads), ratios medians of the ratios within a round.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch.nn import functional as F
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from formwright.build import build
from formwright.compress.modifier import Data
from formwright.compress.pipeline import apply
from formwright.compress.prune.llm_weight_pruning import matrices
from formwright.compress.runtime.bytetransformer import padding_free
from formwright.compress.runtime.fast_distilbert import divisible
from formwright.ops import block_sparse

WARM_UP = 2
TOKENS = 32 * 128
SHARES = (0.0, 0.5, 0.7, 0.8, 0.9)
SCALE, ZERO = 8 / 255, 128  # of the products' inputs
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


def shown(title: str, times: Times, base: str) -> dict[str, object]:
    """Milliseconds of the clock and of the processor, and how many times as fast as `base` each is."""
    found = {}
    for name, taken in times.items():
        clock, processor = (statistics.median(one[i] for one in taken) * 1e3 for i in (1, 0))
        pairs = zip(times[base], taken, strict=True)
        faster = statistics.median(theirs[0] / ours[0] for theirs, ours in pairs)
        found[name] = {"clock": round(clock, 2), "processor": round(processor, 2), "faster": round(faster, 2)}
    text = "  ".join(f"{name} {one['clock']} ({one['processor']}) x{one['faster']}" for name, one in found.items())
    print(f"{title:24} {text}", flush=True)
    return found


def pruned(weight: torch.Tensor, share: float) -> torch.Tensor:
    rows, columns = weight.shape
    return weight * (torch.rand(rows // 4, columns) >= share).repeat_interleave(4, 0)


def products(rounds: int) -> list[dict[str, object]]:
    found = []
    for rows, columns in ((768, 768), (3072, 768), (768, 3072)):
        x, weight, bias = torch.randn(TOKENS, columns), torch.randn(rows, columns), torch.randn(rows)
        step = weight.abs().amax(1) / 127
        whole = (weight / step[:, None]).round().to(torch.int8)
        packed = torch.ops.onednn.qlinear_prepack(whole, None)
        codes = block_sparse.quantise(x, SCALE, ZERO)
        zeros, shift = torch.zeros(rows, dtype=torch.int32), torch.full((columns,), ZERO + 0.5)
        signed, turned = (codes.short() - 128).to(torch.int8), whole.T

        def dense(x=x, packed=packed, step=step, zeros=zeros, bias=bias, shift=shift) -> torch.Tensor:
            inverse = torch.tensor(1 / SCALE)
            q = torch.addcmul(shift, x, inverse).clamp_(0, 255).to(torch.uint8)
            return torch.ops.onednn.qlinear_pointwise(
                q, 1.0, ZERO, packed, SCALE * step, zeros, bias, 1.0, 0, torch.float32, "none", [], ""
            )

        cases: dict[str, Callable[[], object]] = {
            "float32": lambda x=x, w=weight, b=bias: F.linear(x, w, b),
            "dense int8": dense,
            "int8 product": lambda a=signed, b=turned: torch._int_mm(a, b),
        }
        for share in SHARES:
            sparse = pruned(whole, share)
            matrix = block_sparse.Matrix(
                packed=block_sparse.pack(sparse),
                factors=SCALE * step,
                offsets=ZERO * sparse.sum(1, dtype=torch.int32),
                bias=bias,
                inputs=columns,
            )
            sums = block_sparse.integers(block_sparse.to_panels(x[:64], SCALE, ZERO)[0], matrix)
            assert torch.equal(sums, block_sparse.dense_product(codes[:64], sparse) - matrix.offsets)
            cases[f"sparse {share:.0%}"] = lambda x=x, m=matrix: block_sparse.floats(
                block_sparse.to_panels(x, SCALE, ZERO)[0], m
            )
        times = interleaved(cases, rounds)
        figures = shown(f"{rows} x {columns}", times, "float32")
        border = {name: break_even(figures, name) for name in ("float32", "dense int8")}
        print(f"{'':24} faster than float32 from {border['float32']}, than dense int8 from {border['dense int8']}")
        found.append({"rows": rows, "columns": columns, "times": figures, "break-even": border})
    return found


def break_even(figures: dict, other: str) -> float | None:
    """The least share of zero blocks at which the sparse product takes less time of the processor; None: at none."""
    taken = [(share, figures[f"sparse {share:.0%}"]["processor"]) for share in SHARES]
    limit = figures[other]["processor"]
    if taken[0][1] <= limit:
        return 0.0
    for (a, before), (b, after) in pairwise(taken):
        if after <= limit:
            return round(a + (b - a) * (before - limit) / (before - after), 2)
    return None


def encoder(rounds: int) -> list[dict[str, object]]:
    torch.manual_seed(0)
    plain = DistilBertForSequenceClassification(DistilBertConfig()).eval()
    thin = copy.deepcopy(plain)
    for one in divisible(matrices(thin)).values():
        one.weight.data.copy_(pruned(one.weight.data, 0.8))
    models = {"float32": plain, "padding-free": padding_free(copy.deepcopy(plain))}
    models |= {"dense int8": made(copy.deepcopy(plain), "int8(smooth=0.0)"), "sparse 80%": made(thin, "sparse-int8")}
    found = []
    for title, lengths in (("full", torch.full((32,), 128)), ("padded", torch.linspace(16, 128, 32).long())):
        mask = (torch.arange(128) < lengths[:, None]).long()
        ids = torch.randint(5, 30000, (32, 128)) * mask
        given = {"input_ids": ids, "attention_mask": mask}
        cases = {name: lambda model=model, given=given: model(**given) for name, model in models.items()}
        with torch.no_grad():
            times = interleaved(cases, rounds)
        found.append({"texts": title, "times": shown(f"DistilBERT, {title}", times, "float32")})
    sizes = {name: sum(one.nbytes for one in model.state_dict().values()) / 1e6 for name, model in models.items()}
    print(f"{'':24} MB { ({name: round(size, 1) for name, size in sizes.items()}) }")
    return found


def made(model: torch.nn.Module, step: str) -> torch.nn.Module:
    """The model after one step, calibrated on random ids."""
    apply(model, build("modifier", step), Data(task=RandomIds(), kind="text-classification"))
    return model.eval()


class RandomIds:
    """Rows to calibrate on."""

    name, head, validation, score, summary = "random ids", "sequence-classification", None, None, None

    def __init__(self) -> None:
        self.train = self.test = torch.randint(5, 30000, (16, 128))

    @staticmethod
    def collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.stack(rows), "attention_mask": torch.ones(len(rows), 128, dtype=torch.long)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["products", "encoder"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"byte dot products: {block_sparse.has_vnni()}; {torch.backends.cpu.get_cpu_capability()}")
    found = {name: {"products": products, "encoder": encoder}[name](options.rounds) for name in options.parts}
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"threads": options.threads, "byte dot products": block_sparse.has_vnni()} | found, file)


if __name__ == "__main__":
    main()
