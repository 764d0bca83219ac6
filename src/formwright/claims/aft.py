"""Claim: learned position biases and elementwise products match attention, with memory linear in length.

Paper  Abstract: competitive on Enwik8, CIFAR-10 and ImageNet-1K, with memory linear in length and width. An attention
       map is quadratic in length.
Here   A two-layer character model of Python's own manual, 200 steps of 16 windows of 128 bytes, with softmax attention,
       AFT-full, AFT-local (window 32) and AFT-simple, which has no biases. Memory: the most bytes alive in a training
       step of one layer of width 64 at 512 and at 2,048 tokens, AFT-local against attention that forms its map and
       against torch's fused attention, which does not.
Fair   All get the same steps, batches, learned positions and learning rates; each is read at the rate that is best
       for it on validation text.
Rule   loss = nats a byte on the test text.
       holds                in every seed AFT-local's loss is at most softmax's
       holds in direction   AFT-local's mean loss is nearer to softmax's than to AFT-simple's
       exponent = growth of memory with the tokens.
       holds                AFT-local's largest exponent <= 1.1 and the attention map's smallest >= 1.5
       holds in direction   AFT-local's largest exponent is below the attention map's smallest
"""

import math
from collections.abc import Sequence
from statistics import fmean

import torch

from formwright import tasks
from formwright.bench.measure import peak_memory
from formwright.claims import Claim, Outcome, Scale, Verdict
from formwright.contracts import Context
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM
from formwright.parts.assemble import mixer
from formwright.training import Settings, evaluate, fit, seeded

SEEDS = (0, 1, 2)

OURS, BOUND, WITHOUT = "aft-local", "softmax", "aft-simple"
MIXERS = {"aft-local": "aft-local(window=32)", "aft-full": "aft-full", "aft-simple": "aft-simple", "softmax": "softmax"}
MAPS = {"aft-local": MIXERS["aft-local"], "attention map": "clipped-softmax(gamma=0.0)", "fused attention": "softmax"}
RATES = (4e-3, 8e-3)
STEPS = {"smoke": 2, "full": 200}
TASK = {"smoke": "char-lm(test=0.01, validation=0.01)", "full": "char-lm(validation=0.05)"}
SHORT, LONG = 512, 2048


def run(scale: Scale, seed: int) -> Outcome:
    losses = {name: learnt(spec, scale, seed) for name, spec in MIXERS.items()}
    growth = {f"exponent, {name}": exponent(spec) for name, spec in MAPS.items()}
    found = losses | growth
    ours = {name: value for name, value in found.items() if "aft" in name}
    return Outcome(
        scale=scale, seed=seed, measured=ours, baseline={name: found[name] for name in found if name not in ours}
    )


def learnt(spec: str, scale: Scale, seed: int) -> float:
    """Test loss at the rate that is best on validation text."""
    task = tasks.load(TASK[scale])
    found = []
    for rate in RATES[: 1 if scale == "smoke" else None]:
        seeded(seed)
        model = TransformerForCausalLM(
            TransformerConfig(
                **task.model_config,
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                mixer=spec,
                position="learned",
            )
        )
        settings = Settings(
            steps=STEPS[scale], batch_size=16, learning_rate=rate, weight_decay=0.1, betas=(0.9, 0.95), seed=seed
        )
        fit(model, task, settings)
        found.append(tuple(evaluate(model, task, rows).metrics["loss"] for rows in ("validation", "test")))
    return min(found)[1]


def exponent(spec: str) -> float:
    """Growth of the peak memory of one layer's training step."""
    peaks = []
    for tokens in (SHORT, LONG):
        part = mixer(spec, dim=64, heads=4, length=LONG, causal=True)
        x = torch.randn(1, tokens, 64)
        context = Context.of(x, causal=True)
        peaks.append(peak_memory(lambda part=part, x=x, context=context: part(x, context).sum().backward()))
    return math.log(peaks[1] / peaks[0]) / math.log(LONG / SHORT)


def matches(outcomes: Sequence[Outcome]) -> Verdict:
    if all(outcome.measured[OURS] <= outcome.baseline[BOUND] for outcome in outcomes):
        return "holds"
    ours, without = (fmean(outcome.measured[name] for outcome in outcomes) for name in (OURS, WITHOUT))
    bound = fmean(outcome.baseline[BOUND] for outcome in outcomes)
    return "holds in direction" if abs(ours - bound) < abs(ours - without) else "does not hold here"


def linear(outcomes: Sequence[Outcome]) -> Verdict:
    ours = max(outcome.measured["exponent, aft-local"] for outcome in outcomes)
    theirs = min(outcome.baseline["exponent, attention map"] for outcome in outcomes)
    if ours <= 1.1 and theirs >= 1.5:
        return "holds"
    return "holds in direction" if ours < theirs else "does not hold here"


CLAIMS = [
    Claim(
        statement="Mixing tokens by learned position biases and elementwise products matches softmax attention.",
        paper={"Enwik8, CIFAR-10, ImageNet-1K": "competitive performance (abstract)"},
        rule="loss = nats a byte; holds: in every seed AFT-local's loss is at most softmax's; holds in direction: "
        "AFT-local's mean loss is nearer to softmax's than to AFT-simple's, which has no biases.",
        verdict=matches,
        shows=("aft-local", "aft-full", "aft-simple", "softmax"),
    ),
    Claim(
        statement="Its memory is linear in length, where an attention map's is quadratic.",
        paper={"memory": "linear in length and width (abstract)"},
        rule="exponent = growth of a training step's peak memory from 512 to 2,048 tokens; holds: AFT-local's largest "
        "<= 1.1 and the attention map's smallest >= 1.5; holds in direction: AFT-local's largest is below the map's "
        "smallest.",
        verdict=linear,
        shows=("exponent, aft-local", "exponent, attention map", "exponent, fused attention"),
    ),
]
