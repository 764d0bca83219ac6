"""Claim: a classifier whose attention goes by distance is better calibrated and notices unknown inputs better, at equal
accuracy.

Paper  Abstract: ahead of other single-forward-pass methods in accuracy, calibration and out-of-distribution detection
       on standard vision benchmarks.
Here   digits, a vision Transformer of 4 layers and width 64 on patches of 2 x 2. It is trained on the classes 0 to 7
       for 300 steps, on three tenths of their images, for with all of them nothing is left to calibrate; 8 and 9,
       uniform noise and its own test images at three times the contrast are unknown to it. A first design, on eight
       tenths of the images, was seen on a seed that is not among these: all were near 0.998 accurate, none ahead.
Fair   Softmax, L2 and LRFormer attention share data, order, steps, scheme and rates; each is judged at its own best
       of five rates by the loss on the other seven tenths, LRFormer's alpha (10, 50, 100) likewise, which gives it
       three times the choice. Unknown inputs choose nothing.
Rule   ece in 15 bins, auroc of 1 - the largest probability against 8 and 9.
       holds                in every seed LRFormer's accuracy is at most 0.01 below softmax's, its ece lower and its
                            auroc higher
       holds in direction   its mean accuracy is at most 0.01 below, its mean ece lower and its mean auroc higher
"""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor

from formwright import tasks
from formwright.claims import Outcome, Scale, Verdict
from formwright.models.transformer import TransformerConfig, TransformerForImageClassification
from formwright.tasks.base import Columns, Task, hold_out
from formwright.training import Settings, evaluate, fit, seeded
from formwright.training.calibration import calibration, logits_of, ood_auroc, uncertainty

STATEMENT = (
    "A classifier whose attention goes by scaled distance is better calibrated and notices unknown inputs better than "
    "one with dot products, at equal accuracy."
)
PAPER = {"abstract": "ahead of other single-forward-pass methods in accuracy, calibration and OOD detection"}
RULE = (
    "ece in 15 bins, auroc of 1 - the largest probability against 8 and 9; holds: in every seed LRFormer's accuracy is "
    "at most 0.01 below softmax's, its ece lower and its auroc higher; holds in direction: so are the means."
)
SEEDS = (0, 1, 2, 3)

KNOWN = 8  # classes 0 to 7
ARMS = {
    "lrformer": ("lrformer(alpha=10)", "lrformer(alpha=50)", "lrformer(alpha=100)"),
    "softmax": ("softmax",),
    "l2": ("l2",),
}
RATES = {"smoke": (2e-3,), "full": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)}
STEPS = {"smoke": 2, "full": 300}
LAYERS = {"smoke": 2, "full": 4}
ALLOWED = 0.01


def run(scale: Scale, seed: int) -> Outcome:
    task, unknown = known_digits(seed)
    measured, baseline = {}, {}
    for arm, mixers in ARMS.items():
        tried = [trained(mixer, task, scale, rate, seed) for mixer in mixers for rate in RATES[scale]]
        _, model = min(tried, key=lambda one: one[0])
        into = measured if arm == "lrformer" else baseline
        into |= {f"{arm}, {what}": value for what, value in judged(model, task, unknown).items()}
    return Outcome(scale=scale, seed=seed, measured=measured, baseline=baseline)


def known_digits(seed: int) -> tuple[Task, dict[str, Tensor]]:
    """The task without 8 and 9, seven tenths of its training images set aside, and inputs of other kinds."""
    whole = tasks.load("digits(patch_size=2)")
    rows = {name: getattr(whole, name).columns for name in ("train", "test")}
    kept = {
        name: Columns(**{key: column[columns["labels"] < KNOWN] for key, column in columns.items()})
        for name, columns in rows.items()
    }
    train, validation = hold_out(kept["train"], 0.7)
    task = replace(
        whole,
        name="digits-0-to-7",
        model_config={**whole.model_config, "num_labels": KNOWN, "id2label": None, "label2id": None},
        train=train,
        validation=validation,
        test=kept["test"],
    )
    others = [columns["pixel_values"][columns["labels"] >= KNOWN] for columns in rows.values()]
    pixels = kept["test"].columns["pixel_values"]
    generator = torch.Generator().manual_seed(seed)
    low, high = pixels.min(), pixels.max()
    noise = low + (high - low) * torch.rand(pixels.shape, generator=generator)
    return task, {"8 and 9": torch.cat(others), "noise": noise, "contrast": 3 * pixels}


def trained(
    mixer: str, task: Task, scale: Scale, rate: float, seed: int
) -> tuple[float, TransformerForImageClassification]:
    """Loss on the validation images, and the model."""
    seeded(seed)
    given = {key: value for key, value in task.model_config.items() if value is not None}
    sizes = {"hidden_size": 64, "num_hidden_layers": LAYERS[scale], "num_attention_heads": 4, "init": "fan-in"}
    config = TransformerConfig(**given, **sizes, mixer=mixer, position="learned(std=1.0)")
    model = TransformerForImageClassification(config)
    fit(model, task, Settings(steps=STEPS[scale], batch_size=64, learning_rate=rate, weight_decay=0.05, seed=seed))
    return evaluate(model, task, "validation").metrics["loss"], model


def judged(model: TransformerForImageClassification, task: Task, unknown: dict[str, Tensor]) -> dict[str, float]:
    test = task.test.columns
    logits = logits_of(model, test["pixel_values"])
    found = calibration(logits, test["labels"])
    found |= {f"auroc {kind}": ood_auroc(logits, logits_of(model, pixels)) for kind, pixels in unknown.items()}
    sure = 1 - uncertainty(logits_of(model, unknown["noise"]))
    return found | {"confidence in noise": float(sure.mean())}


def verdict(outcomes: Sequence[Outcome]) -> Verdict:
    def gains(o: Outcome) -> tuple[float, float, float]:
        def gain(what: str) -> float:
            return o.measured[f"lrformer, {what}"] - o.baseline[f"softmax, {what}"]

        return gain("accuracy"), -gain("ece"), gain("auroc 8 and 9")

    def good(accuracy: float, ece: float, auroc: float) -> bool:
        return accuracy >= -ALLOWED and ece > 0 and auroc > 0

    each = [gains(o) for o in outcomes]
    if all(good(*one) for one in each):
        return "holds"
    return "holds in direction" if good(*map(fmean, zip(*each, strict=True))) else "does not hold here"
