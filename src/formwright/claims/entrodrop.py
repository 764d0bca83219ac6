"""Claim: removing the layers that raise entropy least costs less than removing those that turn the stream least.

Paper  Llama-3.1-8B, mean of 13 benchmarks (unpruned 0.5872): with 4, 8, 12, 16 layers removed ShortGPT's cosine 0.5054,
       0.3015, 0.3346, 0.2956 and EntroDrop 0.5170, 0.4583, 0.3346, 0.2980; of attentions, 16 removed: LLMDrop 0.4207,
       EntroDrop 0.4603. So a clear gain at 8 layers and 16 attentions, ties elsewhere.
Here   A Llama of 12 layers and width 64, trained on Shakespeare's bytes; 1 to 6 layers, or attentions, are removed and
       nothing is trained. Excess = test loss less the unpruned model's, mean over the six counts.
       Also: the entropy by depth, and the rank correlation of each score with the loss of leaving one layer out.
Fair   One model, the same 32 calibration texts for every score. Blocks before the entropy's turn are kept by the
       entropy scores alone, as in the paper; where bucket or knn leave fewer than six, the counts end there for all.
       Beside cosine: random layers (three draws a count) and the last ones.
Rule   of whole layers by bucket, the default
       holds                in every seed its excess is below cosine's and below random's
       holds in direction   its mean excess is at most cosine's and below random's
"""

import copy
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from statistics import fmean, median
from typing import get_args

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from formwright import tasks
from formwright.claims import Outcome, Scale, Verdict
from formwright.compress.modifier import Data
from formwright.compress.prune.entrodrop import EntroDrop, Granularity, Score
from formwright.compress.surgery import remove_layers, skip_attention
from formwright.errors import FormwrightError
from formwright.tasks.base import Task
from formwright.tasks.support.language import Windows
from formwright.training import Settings, evaluate, fit, seeded

STATEMENT = "Removing the layers that raise entropy least costs less than removing those that turn the stream least."
PAPER = {"EntroDrop, 8 of 32 layers removed": 0.4583, "cosine (ShortGPT)": 0.3015, "unpruned": 0.5872}
RULE = (
    "excess = test loss less the unpruned model's, mean over 1 to 6 layers removed by bucket; holds: in every seed "
    "below cosine's and random's; holds in direction: on the mean at most cosine's and below random's."
)
SEEDS = (0, 1, 2)

LENGTH = 64
WIDTH, LAYERS = {"smoke": 16, "full": 64}, {"smoke": 3, "full": 12}
STEPS, MOST, SAMPLES = {"smoke": 3, "full": 500}, {"smoke": 1, "full": 6}, {"smoke": 2, "full": 32}
WINDOWS = {"smoke": 8, "full": 250}  # of the test text, evenly spread
DRAWS = 3
REMOVE: dict[Granularity, Callable[[LlamaForCausalLM, Iterable[int]], None]] = {
    "layer": remove_layers,
    "attention": skip_attention,
}


def run(scale: Scale, seed: int) -> Outcome:
    whole = tasks.load(f"tinyshakespeare(length={LENGTH})")
    model = trained(whole, scale, seed)
    test = whole.test
    assert isinstance(test, Windows)
    starts = test.starts[:-1]
    spread = starts[:: max(1, len(starts) // WINDOWS[scale])][: WINDOWS[scale]]
    task = replace(whole, test=Windows(test.symbols, LENGTH, spread))
    data = Data(task=task, kind="causal-lm", seed=seed)
    intact = loss(model, task)
    measured: dict[str, float] = {"unpruned, loss": intact}
    baseline: dict[str, float] = {}
    for granularity in get_args(Granularity):
        found = compared(model, task, data, granularity, scale, seed, intact)
        for name, value in found.items():
            theirs = any(word in name for word in ("cosine", "random", "last"))
            (baseline if theirs else measured)[f"{granularity}, {name}"] = value
    fewer = copy.deepcopy(model)
    remove_layers(fewer, range(1, 1 + LAYERS[scale] // 2))
    measured["time, half of the layers"] = ratio(fewer, model, task)
    return Outcome(scale=scale, seed=seed, measured=measured, baseline=baseline)


def trained(task: Task, scale: Scale, seed: int) -> LlamaForCausalLM:
    seeded(seed)
    config = LlamaConfig(
        vocab_size=task.model_config["vocab_size"],
        hidden_size=WIDTH[scale],
        intermediate_size=3 * WIDTH[scale],
        num_hidden_layers=LAYERS[scale],
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )
    model = LlamaForCausalLM(config)
    fit(model, task, Settings(steps=STEPS[scale], batch_size=16, learning_rate=3e-3, weight_decay=0.1, seed=seed))
    return model.eval()


def loss(model: LlamaForCausalLM, task: Task) -> float:
    return evaluate(model, task).metrics["loss"]


def compared(
    model: LlamaForCausalLM,
    task: Task,
    data: Data,
    granularity: Granularity,
    scale: Scale,
    seed: int,
    intact: float,
) -> dict[str, float]:
    """The excess of every way to choose, and what tells about the scores."""
    layers, known = len(model.model.layers), {}

    def excess(blocks: list[int]) -> float:
        key = tuple(sorted(blocks))
        if key not in known:
            arm = copy.deepcopy(model)
            REMOVE[granularity](arm, key)
            known[key] = loss(arm, task) - intact
        return known[key]

    alone = [excess([index]) for index in range(layers)]
    found: dict[str, float] = {}
    orders: dict[str, list[int]] = {}
    for score in get_args(Score):
        drop = EntroDrop(score=score, granularity=granularity, samples=SAMPLES[scale])
        drop.measure(model, data)
        orders[score] = order(drop, model, layers)
        found[f"{score}, rank correlation"] = spearman([drop.scores[i] for i in range(layers)], alone)
        if score != "cosine":
            found[f"{score}, turn"] = drop.start
            if granularity == "layer":
                found |= {f"{score}, entropy at {depth}": value for depth, value in enumerate(drop.entropies)}
    most = min(MOST[scale], *(len(one) for name, one in orders.items() if name != "renyi"))
    orders["last"] = list(reversed(range(layers)))
    draw = random.Random(seed)
    drawn = {count: [draw.sample(range(layers), count) for _ in range(DRAWS)] for count in range(1, most + 1)}
    for name, one in orders.items():
        values = [excess(one[:count]) for count in range(1, min(most, len(one)) + 1)]
        found |= {f"{name}, {count} gone": value for count, value in enumerate(values, 1)}
        found[f"{name}, excess"] = fmean(values) if len(values) == most and values else max(known.values())
    values = [fmean(excess(one) for one in drawn[count]) for count in drawn]
    found |= {f"random, {count} gone": value for count, value in enumerate(values, 1)}
    found["random, excess"] = fmean(values) if values else max(known.values())
    found["counts compared"] = most
    return found


def order(drop: EntroDrop, model: LlamaForCausalLM, layers: int) -> list[int]:
    """The blocks that may go, the first to go first."""
    found: list[int] = []
    for count in range(1, layers):
        drop.count = count
        try:
            chosen = drop.choose(model)
        except FormwrightError:  # the others are kept
            break
        found += [index for index in chosen if index not in found]
    return found


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """The correlation of the ranks."""
    ranks = torch.stack([torch.tensor(one).argsort().argsort().double() for one in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


@torch.no_grad()
def ratio(model: LlamaForCausalLM, whole: LlamaForCausalLM, task: Task) -> float:
    """The time of a pass over four windows, as a share of the whole model's."""
    ids = task.collate([task.test[i] for i in range(4)])["input_ids"]
    ratios = []
    for _ in range(8):
        spent = []
        for one in (model, whole):
            started = time.perf_counter()
            one(ids, use_cache=False)
            spent.append(time.perf_counter() - started)
        ratios.append(spent[0] / spent[1])
    return median(ratios[1:])


def verdict(outcomes: Sequence[Outcome]) -> Verdict:
    rows = [
        (
            o.measured["layer, bucket, excess"],
            o.baseline["layer, cosine, excess"],
            o.baseline["layer, random, excess"],
        )
        for o in outcomes
    ]
    if all(ours < min(cosine, chance) for ours, cosine, chance in rows):
        return "holds"
    ours, cosine, chance = (fmean(column) for column in zip(*rows, strict=True))
    return "holds in direction" if ours <= cosine and ours < chance else "does not hold here"
