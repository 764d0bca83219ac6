"""Claims: derived scales keep signals and gradients near 1 through 192 layers; with them a deep post-norm model trains
that does not without; and at equal parameters the deep, narrow model is the better one.

Paper    192 layers: forward and backward variance within a small band of 1 at every layer, pre- and post-norm, against
         a blow-up with Xavier; deep, narrow models beat BERT's 12 and 24 layers at equal or fewer parameters.
Here     First, one training step at 192 layers of width 128, dropout 0.1, text by Zipf's law. Then a character model of
         Python's own manual, 200 steps of 8 windows of 64 bytes without warm-up: 32 layers of width 48 with post-norm
         at four learning rates; and 24 layers of width 64 by DeepScaleLM against 6 of width 128, pre-norm, at three.
Fair     Arms share data, order, steps, rates and feed-forward layer (ReLU); each is judged at its own best rate on
         validation text. Post-norm starts as Xavier's, the wide pre-norm model as GPT-2's. r0 is that of the text.
Rule     forward = largest |ln| of the stream's mean square over the layers; backward = ln of the gradient at the first
         layer over that at the last.
         holds                in every seed DeepScaleLM's two forward are at most 0.3 and its |backward| at most 1.2;
                              Xavier's forward before the norm and its |backward| behind the norm are above 2
         holds in direction   in every seed DeepScaleLM is the nearer to 0 in both
Rule 2   loss = nats a byte on the test text at the best rate.
         holds                in every seed DeepScaleLM ends at least 0.3 below guessing by frequency, and lower than
                              post-norm by 0.1
         holds in direction   its mean loss is below post-norm's
Rule 3   holds                in every seed the deep, narrow model ends lower
         holds in direction   its mean loss is lower
"""

import math
from collections.abc import Sequence
from statistics import fmean

import torch

from formwright import tasks
from formwright.claims import Claim, Outcome, Scale, Verdict
from formwright.errors import FormwrightError
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM, TransformerModel
from formwright.parts.norm.deepscalelm import token_correlation
from formwright.tasks.base import Task
from formwright.theory.deepscalelm import measure, texts
from formwright.training import Settings, evaluate, fit, seeded

DEPTH = {"smoke": 6, "full": 192}
STEPS = {"smoke": 2, "full": 200}
TASK = {"smoke": "char-lm(length=64, test=0.01, validation=0.01)", "full": "char-lm(length=64, validation=0.05)"}
SEEDS = (0, 1, 2)

WIRINGS = {
    "deepscalelm": ("deepscalelm", "deepscalelm"),
    "deepscalelm-post": ("deepscalelm-post", "deepscalelm"),
    "xavier": ("pre", "xavier"),
    "xavier-post": ("post", "xavier"),
}
POST_RATES, PRE_RATES = (2e-4, 5e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2)
ARMS = {  # layers, width, block, init, rates
    "deepscalelm-post": (32, 48, "deepscalelm-post", "deepscalelm", POST_RATES),
    "post": (32, 48, "post", "xavier", POST_RATES),
    "deep": (24, 64, "deepscalelm", "deepscalelm", PRE_RATES),
    "wide": (6, 128, "pre", "normal", PRE_RATES),
}
OURS = ("deepscalelm-post", "deep")


def run(scale: Scale, seed: int) -> Outcome:
    measured, baseline = {}, {}
    for name in WIRINGS:
        into = measured if name in ("deepscalelm", "deepscalelm-post") else baseline
        into |= {f"{name}, {what}": value for what, value in spread(name, DEPTH[scale], seed).items()}
    task = tasks.load(TASK[scale])
    baseline["guessing, loss"] = task.baselines()["unigram"]["loss"]
    for arm in ARMS:
        best, loss, rate = min(
            trained(arm, task, scale, rate, seed) for rate in (ARMS[arm][4] if scale == "full" else (1e-3,))
        )
        found = {f"{arm}, loss": loss if math.isfinite(best) else baseline["guessing, loss"], f"{arm}, rate": rate}
        into = measured if arm in OURS else baseline
        into |= found
    return Outcome(scale=scale, seed=seed, measured=measured, baseline=baseline)


def spread(name: str, layers: int, seed: int) -> dict[str, float]:
    """How far from 1 the stream gets, and by how much the gradient grows towards the input; natural logarithms."""
    block, init = WIRINGS[name]
    ids = texts(256, batch=2, length=64, seed=seed)
    r0 = token_correlation(ids)
    seeded(seed)
    config = TransformerConfig(
        hidden_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        position="none",
        feedforward="relu",
        dropout=0.1,
        block=block,
        init=f"{init}(r0={r0})" if init == "deepscalelm" else init,
    )
    found = measure(TransformerModel(config), {"input_ids": ids}, seed=seed)
    # Xavier's own stream starts at 1 / width: it is compared with where it starts
    start = found["encoder", 0, "stream"].second if init == "xavier" else 1.0
    streams = [abs(math.log(found["encoder", i, "stream"].second / start)) for i in range(layers)]
    first, last = (found["encoder", i, "gradient"].second for i in (0, layers - 1))
    return {"forward": max(streams), "backward": math.log(first / last)}


def trained(arm: str, task: Task, scale: Scale, rate: float, seed: int) -> tuple[float, float, float]:
    """Loss on validation and test text, infinite when the run broke off, and the rate."""
    layers, width, block, init, _ = ARMS[arm]
    if init == "deepscalelm":
        rows = torch.stack([task.train[i]["input_ids"] for i in range(64)])
        init = f"deepscalelm(r0={token_correlation(rows, tables=2)})"
    seeded(seed)
    config = TransformerConfig(
        **task.model_config,
        hidden_size=width,
        num_hidden_layers=layers if scale == "full" else 2,
        num_attention_heads=4,
        position="learned",
        feedforward="relu",
        block=block,
        init=init,
    )
    model = TransformerForCausalLM(config)
    settings = Settings(
        steps=STEPS[scale], batch_size=8, learning_rate=rate, warmup=0.0, weight_decay=0.1, betas=(0.9, 0.95), seed=seed
    )
    try:
        fit(model, task, settings)
    except FormwrightError:  # the loss is no number any more
        return math.inf, math.inf, rate
    validation, test = (evaluate(model, task, split).metrics["loss"] for split in ("validation", "test"))
    finite = math.isfinite(validation) and math.isfinite(test)
    return (validation, test, rate) if finite else (math.inf, math.inf, rate)


def near_one(outcomes: Sequence[Outcome]) -> Verdict:
    def holds(o: Outcome) -> bool:
        ours, theirs = o.measured, o.baseline
        kept = all(
            ours[f"{name}, forward"] <= 0.3 and abs(ours[f"{name}, backward"]) <= 1.2
            for name in ("deepscalelm", "deepscalelm-post")
        )
        return kept and theirs["xavier, forward"] > 2 and abs(theirs["xavier-post, backward"]) > 2

    def nearer(o: Outcome) -> bool:
        return (
            o.measured["deepscalelm, forward"] < o.baseline["xavier, forward"]
            and abs(o.measured["deepscalelm, backward"]) < abs(o.baseline["xavier, backward"])
            and abs(o.measured["deepscalelm-post, backward"]) < abs(o.baseline["xavier-post, backward"])
        )

    if all(map(holds, outcomes)):
        return "holds"
    return "holds in direction" if all(map(nearer, outcomes)) else "does not hold here"


def trains(outcomes: Sequence[Outcome]) -> Verdict:
    def holds(o: Outcome) -> bool:
        ours = o.measured["deepscalelm-post, loss"]
        return ours <= o.baseline["guessing, loss"] - 0.3 and ours <= o.baseline["post, loss"] - 0.1

    if all(map(holds, outcomes)):
        return "holds"
    ours = fmean(o.measured["deepscalelm-post, loss"] for o in outcomes)
    return "holds in direction" if ours < fmean(o.baseline["post, loss"] for o in outcomes) else "does not hold here"


def deeper(outcomes: Sequence[Outcome]) -> Verdict:
    if all(o.measured["deep, loss"] < o.baseline["wide, loss"] for o in outcomes):
        return "holds"
    ours, theirs = fmean(o.measured["deep, loss"] for o in outcomes), fmean(o.baseline["wide, loss"] for o in outcomes)
    return "holds in direction" if ours < theirs else "does not hold here"


CLAIMS = [
    Claim(
        statement="DeepScaleLM keeps the variance of signals and gradients near 1 through 192 layers, pre- and "
        "post-norm; Xavier's do not stay there.",
        paper={"192 layers": "forward and backward variance within a small band of 1 at every layer"},
        rule="forward = largest |ln| of the stream's mean square; backward = ln of the gradient at the first layer "
        "over that at the last; holds: in every seed DeepScaleLM's forward are at most 0.3 and |backward| at most 1.2, "
        "Xavier's forward before and |backward| behind the norm above 2; holds in direction: in every seed it is the "
        "nearer to 0 in both.",
        verdict=near_one,
        shows=tuple(f"{name}, {what}" for name in WIRINGS for what in ("forward", "backward")),
    ),
    Claim(
        statement="With DeepScaleLM a post-norm model of 32 layers trains without warm-up where Xavier's hardly does.",
        paper={"trained": "models of hundreds of layers, pre- and post-norm"},
        rule="loss at the best rate; holds: in every seed at least 0.3 nats below guessing by frequency, and 0.1 below "
        "post-norm; holds in direction: its mean is below post-norm's.",
        verdict=trains,
        shows=("deepscalelm-post, loss", "deepscalelm-post, rate", "post, loss", "post, rate", "guessing, loss"),
    ),
    Claim(
        statement="At equal parameters a deep, narrow model by DeepScaleLM ends with a lower loss than a wide one.",
        paper={"pre-training": "deep, narrow models beat 12 and 24 layers at equal or fewer parameters"},
        rule="loss at the best rate; holds: lower in every seed; holds in direction: the mean is lower.",
        verdict=deeper,
        shows=("deep, loss", "deep, rate", "wide, loss", "wide, rate"),
    ),
]
