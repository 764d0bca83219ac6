"""Claims: without feed-forward layers the tokens of a deep stack grow alike, with them, serial or parallel, they do
not; attention adds little beside its input; and the parallel design learns as well as the serial one.

Paper  Abstract: both assumptions hold in BERT-large and RoBERTa-large trained in the parallel design. Repository,
       PAF-RoBERTa-large on GLUE: MNLI 89.3, SST-2 96.2; RoBERTa-large, as published by its authors: 90.2, 96.4.
Here   Three bytes in ten of Python's own manual are hidden and guessed: six post-norm layers of width 64 with RoPE
       (with learned positions next to nothing is learnt in this time), 600 steps of 16 windows of 64 bytes. Cosines and
       ratios are those of formwright.theory.paf on 32 windows of the test text.
Fair   The serial, the parallel and the stack without feed-forward layers have equal parameters (the last has attention
       three times as wide; within a hundredth), data, order, steps and learning rates; each is read at the rate that
       is best for it on validation text.
Rule   cosine = of two tokens of a text, the mean over the last third of the layers.
       holds                in every seed the cosine of both designs is below that of the stack without feed-forward
                            layers and below their own with those layers' part taken away
       holds in direction   the same of the parallel design's mean
Rule 2 ratio = length of what attention adds by length of its input, the mean over tokens.
       holds                in every seed, in every layer of the parallel design at most 0.5
       holds in direction   in every seed the mean over its layers is below 1
Rule 3 loss = nats a hidden byte of the test text.
       holds                the parallel design's mean loss is at most 0.02 above the serial one's, and in every seed
                            below that of the stack without feed-forward layers
       holds in direction   its mean loss is at most 0.05 above
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from formwright import tasks
from formwright.claims import Claim, Outcome, Scale, Verdict
from formwright.models.transformer import TransformerConfig, TransformerForMaskedLM
from formwright.tasks.base import IGNORED, Task, accuracy_and_loss, score_cells
from formwright.theory.paf import Row, measure
from formwright.training import Settings, evaluate, fit, seeded

WIDTH = 64
ARMS = {
    "series": {"block": "post", "num_attention_heads": 4, "head_dim": 16},
    "parallel": {"block": "paf", "num_attention_heads": 4, "head_dim": 16},
    "none": {"block": "post", "feedforward": "none", "num_attention_heads": 12, "head_dim": 16},
}
DESIGNS = ("series", "parallel")
TEXT = {
    "smoke": "char-lm(length=64, test=0.01, validation=0.01)",
    "full": "char-lm(length=64, test=0.1, validation=0.05)",
}
LAYERS = {"smoke": 3, "full": 6}
STEPS = {"smoke": 3, "full": 600}
RATES = {"smoke": (2e-3,), "full": (1e-3, 3e-3, 6e-3)}
HIDDEN = 0.3
SEEDS = (0, 1, 2, 3)


def run(scale: Scale, seed: int) -> Outcome:
    task = tasks.load(TEXT[scale])
    found = {arm: learnt(arm, task, scale, seed) for arm in ARMS}
    ours = found.pop("parallel")
    return Outcome(scale=scale, seed=seed, measured=ours, baseline=found["series"] | found["none"])


def masked(task: Task, *, fixed: bool) -> Task:
    """The text of a task, to guess hidden bytes of; `fixed`: the same ones whenever a batch is read."""
    mask = task.model_config["vocab_size"]

    def collate(given: Any) -> dict[str, Tensor]:
        ids = task.collate(given)["input_ids"]
        generator = torch.Generator().manual_seed(0) if fixed else None
        hidden = torch.rand(ids.shape, generator=generator) < HIDDEN
        return {"input_ids": ids.masked_fill(hidden, mask), "labels": ids.masked_fill(~hidden, IGNORED)}

    config = {**task.model_config, "vocab_size": mask + 1, "architecture": "encoder"}
    changed = {"head": "masked-lm", "model_config": config, "collate": collate}
    return replace(task, **changed, score=score_cells, summary=accuracy_and_loss)


def built(arm: str, task: Task, scale: Scale) -> TransformerForMaskedLM:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS[scale], "position": "rope", "init": "fan-in"}
    return TransformerForMaskedLM(TransformerConfig(**task.model_config | sizes | {"embedding_norm": True} | ARMS[arm]))


def learnt(arm: str, text: Task, scale: Scale, seed: int) -> dict[str, float]:
    training, reading = masked(text, fixed=False), masked(text, fixed=True)
    lowest, best = math.inf, {}
    for rate in RATES[scale]:
        seeded(seed)
        model = built(arm, training, scale)
        settings = Settings(
            steps=STEPS[scale], batch_size=16, learning_rate=rate, warmup=0.1, weight_decay=0.1, seed=seed
        )
        fit(model, training, settings)
        validation = evaluate(model, reading, "validation").metrics["loss"]
        if validation < lowest:
            lowest = validation
            best = {f"{arm}, loss": evaluate(model, reading, "test").metrics["loss"], f"{arm}, learning rate": rate}
            best |= measured(arm, model, text)
    return best


def measured(arm: str, model: TransformerForMaskedLM, text: Task) -> dict[str, float]:
    places = torch.linspace(0, len(text.test) - 1, 32).long().tolist()
    batch = {"input_ids": torch.stack([text.test[i]["input_ids"] for i in places])}
    rows = measure(model, batch)
    found = {
        f"{arm}, cosine": late(rows),
        f"{arm}, ratio": fmean(row.ratio for row in rows),
        f"{arm}, largest ratio": max(row.ratio for row in rows),
    }
    if arm in DESIGNS:
        found[f"{arm}, cosine less its feed-forward"] = late(measure(model, batch, feedforward=False))
    return found


def late(rows: Sequence[Row]) -> float:
    """The mean cosine of the last third of the layers."""
    return fmean(row.cosine for row in rows[-(len(rows) // 3) :])


def _all(outcomes: Sequence[Outcome]) -> list[dict[str, float]]:
    return [dict(o.measured) | dict(o.baseline) for o in outcomes]


def isotropy(outcomes: Sequence[Outcome]) -> Verdict:
    seen = _all(outcomes)
    mean = {name: fmean(one[name] for one in seen) for name in seen[0]}

    def apart(one: dict[str, float], arm: str) -> bool:
        return one[f"{arm}, cosine"] < min(one["none, cosine"], one[f"{arm}, cosine less its feed-forward"])

    if not apart(mean, "parallel"):
        return "does not hold here"
    return "holds" if all(apart(one, arm) for one in seen for arm in DESIGNS) else "holds in direction"


def small(outcomes: Sequence[Outcome]) -> Verdict:
    if all(o.measured["parallel, largest ratio"] <= 0.5 for o in outcomes):
        return "holds"
    below = all(o.measured["parallel, ratio"] < 1 for o in outcomes)
    return "holds in direction" if below else "does not hold here"


def as_good(outcomes: Sequence[Outcome]) -> Verdict:
    more = fmean(o.measured["parallel, loss"] - o.baseline["series, loss"] for o in outcomes)
    below = all(o.measured["parallel, loss"] < o.baseline["none, loss"] for o in outcomes)
    if more <= 0.02 and below:
        return "holds"
    return "holds in direction" if more <= 0.05 else "does not hold here"


CLAIMS = [
    Claim(
        statement="Without feed-forward layers the tokens of a deep stack grow alike; feed-forward layers, serial or "
        "parallel to attention, prevent it.",
        paper={"abstract": "feed-forward layers keep token embeddings isotropic, in PAF's BERT- and RoBERTa-large"},
        rule="cosine = of two tokens of a text, the mean over the last third of the layers; holds: in every seed the "
        "cosine of both designs is below that of the stack without feed-forward layers and below their own with those "
        "layers' part taken away; holds in direction: the same of the parallel design's mean.",
        verdict=isotropy,
        shows=tuple(f"{arm}, cosine" for arm in ARMS)
        + tuple(f"{arm}, cosine less its feed-forward" for arm in DESIGNS),
    ),
    Claim(
        statement="What attention adds is small beside its input.",
        paper={"abstract": "attention's residual norm is substantially smaller than the input's, in the same models"},
        rule="ratio = length of what attention adds by length of its input, the mean over tokens; holds: in every "
        "seed, in every layer of the parallel design at most 0.5; holds in direction: in every seed the mean over its "
        "layers is below 1.",
        verdict=small,
        shows=tuple(f"{arm}, {what}" for arm in DESIGNS for what in ("ratio", "largest ratio")),
    ),
    Claim(
        statement="The parallel design learns as well as the serial one.",
        paper={
            "GLUE (MNLI, SST-2)": {"PAF-RoBERTa-large": [89.3, 96.2], "RoBERTa-large, by its authors": [90.2, 96.4]},
        },
        rule="loss = nats a hidden byte of the test text; holds: the parallel design's mean loss is at most 0.02 above "
        "the serial one's, and in every seed below that of the stack without feed-forward layers; holds in direction: "
        "its mean loss is at most 0.05 above.",
        verdict=as_good,
        shows=tuple(f"{arm}, {what}" for arm in ARMS for what in ("loss", "learning rate")),
    ),
]
