"""Claims: a TokenFormer grown from a trained small one reaches the loss of one trained from scratch with less compute;
and its modified softmax learns better than softmax.

Paper  OpenWebText2, 757M: grown from 354M with 120k steps, perplexity 10.7; from scratch with 600k, 10.5. The ablation
       of the activation finds GELU of L2-normalised scores better than exp of L1-normalised ones (softmax).
Here   A byte model of Python's own manual, two layers of width 64: 64 parameter tokens a projection and 256 in the
       feed-forward layer, grown to twice that with zero keys and the old scale after 320 steps. Three lengths of
       further training, three of training the grown shape from scratch, and a Transformer of its parameters.
Fair   Every run has a schedule of its own and the best of the same three learning rates by a validation part, and is
       read on the test part. Compute is that of the chosen run: FLOPs of forward and backward, the small model's
       training counted in full; 1 is the longest run from scratch.
Rule   holds: in every seed the longest grown run ends at or below the loss of the longest run from scratch, with less
       compute;
       holds in direction: in every seed a grown run is below a run from scratch of at least as many steps as it took
       after growing.
Rule 2 Loss of the small model after equal steps:
       holds: GELU of L2-normalised scores below softmax in every seed and in a paired t-test (p < 0.05);
       holds in direction: below in the mean.
"""

import copy
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from formwright import tasks
from formwright.bench.measure import flops
from formwright.bench.statistics import paired_t
from formwright.claims import Claim, Outcome, Scale, Verdict
from formwright.models.tokenformer import grow, grown
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM
from formwright.tasks.base import Task
from formwright.training import Settings, evaluate, fit, seeded
from formwright.training.evaluation import fetch

SEEDS = (0, 1, 2)

TEXT = {"smoke": "char-lm(length=32, test=0.01, validation=0.01)", "full": "char-lm(validation=0.05)"}
RATES = {"smoke": (4e-3,), "full": (2e-3, 4e-3, 8e-3)}
SMALL = {"smoke": 4, "full": 320}  # steps before growing
EXTRA = {"smoke": (1, 2, 3), "full": (40, 80, 160)}  # and after it
SCRATCH = {"smoke": (2, 4, 8), "full": (120, 240, 480)}
TOKENS, HIDDEN = 128, 512  # of the grown model, twice those of the small one

Trained = tuple[float, TransformerForCausalLM]


def run(scale: Scale, seed: int) -> Outcome:
    task = tasks.load(TEXT[scale])
    small_loss, small = best(lambda: built(task, seed), task, scale, SMALL[scale], seed)
    at_once = evaluate(enlarged(small), task, "test").metrics["loss"]
    measured = {"loss, small": small_loss, "change by growing": abs(at_once - small_loss)}
    unit = SCRATCH[scale][-1] * cost(enlarged(small), task)
    before = SMALL[scale] * cost(small, task)
    for steps in EXTRA[scale]:
        measured[f"loss, grown +{steps}"], big = best(lambda: enlarged(small), task, scale, steps, seed)
        measured[f"compute, grown +{steps}"] = (before + steps * cost(big, task)) / unit
    middle = EXTRA[scale][1]
    for name, how in {"random keys": {"keys": "random"}, "new scale": {"tau": "current"}}.items():
        # what the paper's release and its formula do; see formwright.models.tokenformer
        measured[f"loss, grown +{middle}, {name}"], _ = best(
            lambda how=how: enlarged(small, **how), task, scale, middle, seed
        )
    baseline = {}
    for steps in SCRATCH[scale]:
        baseline[f"loss, scratch {steps}"], big = best(
            lambda: TransformerForCausalLM(grown(small.config, tokens=TOKENS, hidden=HIDDEN, tau="current")),
            task,
            scale,
            steps,
            seed,
        )
        baseline[f"compute, scratch {steps}"] = steps * cost(big, task) / unit
    middle = SCRATCH[scale][1]
    baseline[f"loss, Transformer {middle}"], _ = best(lambda: plain(task, big), task, scale, middle, seed)
    softmax = dict.fromkeys(("mixer", "feedforward"), "tokenformer(theta=softmax)")
    baseline["loss, small, softmax"], _ = best(lambda: built(task, seed, **softmax), task, scale, SMALL[scale], seed)
    return Outcome(scale=scale, seed=seed, measured=measured, baseline=baseline)


def built(task: Task, seed: int, **parts: str) -> TransformerForCausalLM:
    seeded(seed)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ours = {"mixer": "tokenformer", "feedforward": "tokenformer", "block": "tokenformer"}
    position = "rope(fraction=0.25, layout=half)"
    return TransformerForCausalLM(TransformerConfig(**task.model_config, **sizes, position=position, **ours | parts))


def enlarged(small: TransformerForCausalLM, **how: Any) -> TransformerForCausalLM:
    big = copy.deepcopy(small)
    grow(big, tokens=TOKENS, hidden=HIDDEN, **how)
    return big


def plain(task: Task, like: TransformerForCausalLM) -> TransformerForCausalLM:
    """The Transformer with as many parameters, in its feed-forward layers."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "position": "rope", "init": "fan-in"}
    layer = sum(p.numel() for p in like.model.decoder.layers[0].parameters())
    hidden = (layer - 4 * 64**2) // (2 * 64)
    return TransformerForCausalLM(TransformerConfig(**task.model_config, **sizes, intermediate_size=hidden))


def cost(model: TransformerForCausalLM, task: Task) -> float:
    """FLOPs of a step, forward and backward, counted without data."""
    batch = fetch(task.test, list(range(16)), task.collate)
    return 3.0 * flops(copy.deepcopy(model).to("meta"), {name: value.to("meta") for name, value in batch.items()})


def best(make: Callable[[], TransformerForCausalLM], task: Task, scale: Scale, steps: int, seed: int) -> Trained:
    """Test loss and model at the rate that is best on the validation part."""
    tried = []
    for rate in RATES[scale]:
        seeded(seed)
        model = make()
        fit(
            model,
            task,
            Settings(steps=steps, batch_size=16, learning_rate=rate, weight_decay=0.1, betas=(0.9, 0.95), seed=seed),
        )
        tried.append((evaluate(model, task, "validation").metrics["loss"], rate, model))
    chosen = min(tried, key=lambda one: one[:2])[2]
    return evaluate(chosen, task, "test").metrics["loss"], chosen


def _points(values: dict[str, float], what: str) -> dict[int, float]:
    """Numbers by steps: "loss, grown +160" -> {160: ...}."""
    begins = {name: name.removeprefix(what) for name in values if name.startswith(what)}
    return {int(steps): values[name] for name, steps in begins.items() if steps.isdecimal()}


def growing_verdict(outcomes: Sequence[Outcome]) -> Verdict:
    reached, sooner = True, True
    for outcome in outcomes:
        ours, theirs = _points(outcome.measured, "loss, grown +"), _points(outcome.baseline, "loss, scratch ")
        cheap = _points(outcome.measured, "compute, grown +")[max(ours)] < 1
        reached = reached and cheap and ours[max(ours)] <= theirs[max(theirs)]
        sooner = sooner and any(ours[a] < theirs[b] for a in ours for b in theirs if a <= b)
    return "holds" if reached else "holds in direction" if sooner else "does not hold here"


def softmax_verdict(outcomes: Sequence[Outcome]) -> Verdict:
    ours = [outcome.measured["loss, small"] for outcome in outcomes]
    theirs = [outcome.baseline["loss, small, softmax"] for outcome in outcomes]
    chance = paired_t(ours, theirs)
    if all(a < b for a, b in zip(ours, theirs, strict=True)) and chance is not None and chance < 0.05:
        return "holds"
    return "holds in direction" if fmean(ours) < fmean(theirs) else "does not hold here"


CLAIMS = [
    Claim(
        statement="A TokenFormer grown from a trained small one reaches the loss of the large one trained from scratch "
        "with less compute in all.",
        paper={
            "perplexity, 757M grown with 120k steps and from scratch with 600k": [10.7, 10.5],
            "perplexity, Transformer from scratch with 120k steps": 11.3,
        },
        rule="holds: in every seed the longest grown run ends at or below the loss of the longest run from scratch, "
        "with less compute; holds in direction: in every seed a grown run is below a run from scratch of at least as "
        "many steps as it took after growing.",
        verdict=growing_verdict,
    ),
    Claim(
        statement="GELU of L2-normalised scores learns better than softmax over the parameter tokens.",
        paper={"ablation": "better than exp with L1 normalisation"},
        rule="holds: below softmax in every seed and in a paired t-test (p < 0.05); holds in direction: below in the "
        "mean.",
        verdict=softmax_verdict,
        shows=("loss, small", "loss, small, softmax"),
    ),
]
