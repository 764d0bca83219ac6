"""Claims: sub-LN with its initialisation stands the learning rates that pre- and post-norm stand and ends with the
lowest loss; and one step changes the model by the same amount at any depth.

Paper  Abstract: better results and stability than the usual variant of each application (BERT, GPT, translation,
       vision, speech, multimodal). The second is the aim of its initialisation, derived from DeepNet for stable scaling
       up; that the update keeps its size at any depth is as reported by secondary sources.
Here   A character model of Python's own manual, 12 layers of width 64, 200 steps of 8 windows of 64 bytes without
       warm-up, at four learning rates. For the second: the change of the logits, root mean square, that one step of
       gradient descent makes at depths 4 to 32.
Fair   The three arms share data, order, steps, learning rates and the same initialisation (Xavier), which Magneto
       scales as it derives; each is judged at its own best rate on validation text. A rate is stood when the run ends
       below the loss of guessing by the frequency of bytes.
Rule   stands = the highest of the four rates that the arm stands; loss = nats a byte on the test text at its best rate.
       holds                in every seed Magneto stands at least the rates the others stand, and its mean loss is the
                            lowest
       holds in direction   its mean loss is the lowest of the three
Rule 2 growth = slope of ln change against ln depth.
       holds                Magneto's largest growth is at most 0.1 and below post-norm's smallest
       holds in direction   Magneto's mean growth is below post-norm's
"""

import math
from collections.abc import Sequence
from statistics import fmean

import torch

from formwright import tasks
from formwright.claims import Claim, Outcome, Scale, Verdict
from formwright.errors import FormwrightError
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM
from formwright.tasks.base import Task
from formwright.training import Settings, evaluate, fit, seeded

ARMS = {
    "magneto": {"block": "sub-ln", "init": "magneto"},
    "pre": {"block": "pre", "init": "xavier"},
    "post": {"block": "post", "init": "xavier"},
}
RATES = {"smoke": (1e-3,), "full": (1e-3, 3e-3, 1e-2, 2e-2)}
LAYERS = {"smoke": 2, "full": 12}
STEPS = {"smoke": 3, "full": 200}
DEPTHS = {"smoke": (2, 4), "full": (4, 8, 16, 32)}
TASK = {"smoke": "char-lm(length=64, test=0.01, validation=0.01)", "full": "char-lm(length=64, validation=0.05)"}
SEEDS = (0, 1, 2, 3)


def run(scale: Scale, seed: int) -> Outcome:
    task = tasks.load(TASK[scale])
    guessing = task.baselines()["unigram"]["loss"]
    found: dict[str, dict[str, float]] = {}
    for arm in ARMS:
        best, stands = math.inf, 0.0
        found[arm] = {f"{arm}, growth": growth(arm, task, DEPTHS[scale], seed)}
        for rate in RATES[scale]:
            validation, test = trained(arm, task, scale, rate, seed)
            stands = rate if test < guessing else stands
            if validation < best:
                best, found[arm][f"{arm}, loss"] = validation, test
        found[arm].setdefault(f"{arm}, loss", guessing)  # no rate was stood
        found[arm][f"{arm}, stands"] = stands
    return Outcome(scale=scale, seed=seed, measured=found["magneto"], baseline=found["pre"] | found["post"])


def built(arm: str, task: Task, layers: int, seed: int) -> TransformerForCausalLM:
    seeded(seed)
    sizes = {"hidden_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4, "position": "learned"}
    return TransformerForCausalLM(TransformerConfig(**task.model_config, **sizes, **ARMS[arm]))


def trained(arm: str, task: Task, scale: Scale, rate: float, seed: int) -> tuple[float, float]:
    """Loss on validation and test text; infinite when the run broke off."""
    model = built(arm, task, LAYERS[scale], seed)
    settings = Settings(
        steps=STEPS[scale], batch_size=8, learning_rate=rate, warmup=0.0, weight_decay=0.1, betas=(0.9, 0.95), seed=seed
    )
    try:
        fit(model, task, settings)
    except FormwrightError:  # the loss is no number any more
        return math.inf, math.inf
    validation, test = (evaluate(model, task, split).metrics["loss"] for split in ("validation", "test"))
    return (validation, test) if math.isfinite(validation) and math.isfinite(test) else (math.inf, math.inf)


def growth(arm: str, task: Task, depths: Sequence[int], seed: int) -> float:
    """The exponent with which the change made by one step grows with depth."""
    batch = task.collate([task.test[i] for i in range(8)])
    changes = [change(built(arm, task, depth, seed), batch) for depth in depths]
    x, y = torch.tensor(depths).double().log(), torch.tensor(changes).double().log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def change(model: TransformerForCausalLM, batch: dict[str, torch.Tensor], rate: float = 1e-2) -> float:
    """How far one step of gradient descent moves the logits, root mean square."""
    before = model(**batch)
    before.loss.backward()
    with torch.no_grad():
        for weight in model.parameters():
            weight -= rate * weight.grad
        return float((model(**batch).logits - before.logits).square().mean().sqrt())


def better(outcomes: Sequence[Outcome]) -> Verdict:
    loss = {arm: fmean((o.measured | o.baseline)[f"{arm}, loss"] for o in outcomes) for arm in ARMS}
    if loss["magneto"] >= min(loss["pre"], loss["post"]):
        return "does not hold here"
    stands = all(
        o.measured["magneto, stands"] >= max(o.baseline["pre, stands"], o.baseline["post, stands"]) for o in outcomes
    )
    return "holds" if stands else "holds in direction"


def steady(outcomes: Sequence[Outcome]) -> Verdict:
    ours = [o.measured["magneto, growth"] for o in outcomes]
    theirs = [o.baseline["post, growth"] for o in outcomes]
    if max(ours) <= 0.1 and max(ours) < min(theirs):
        return "holds"
    return "holds in direction" if fmean(ours) < fmean(theirs) else "does not hold here"


CLAIMS = [
    Claim(
        statement="Sub-LN with its initialisation stands the learning rates that pre- and post-norm stand and ends "
        "with the lowest loss.",
        paper={"abstract": "better results and stability than the usual variant of each application"},
        rule="holds: in every seed Magneto stands at least the rates the others stand, and its mean loss is lowest; "
        "holds in direction: its mean loss is the lowest of the three.",
        verdict=better,
        shows=tuple(f"{arm}, {what}" for arm in ARMS for what in ("loss", "stands")),
    ),
    Claim(
        statement="With sub-LN and its initialisation one step changes the model by the same amount at any depth.",
        paper={"theory": "an update of the same size at any depth (as reported by secondary sources)"},
        rule="growth = slope of ln change against ln depth; holds: Magneto's largest growth is at most 0.1 and below "
        "post-norm's smallest; holds in direction: Magneto's mean growth is below post-norm's.",
        verdict=steady,
        shows=tuple(f"{arm}, growth" for arm in ARMS),
    ),
]
