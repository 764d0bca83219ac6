"""Claim: hyperbolic rotations make attention fall monotonically with distance and lower perplexity beyond the training
length.

Paper  Abstract: attention weights that decay monotonically with distance, in place of RoPE's oscillation, and lower
       perplexity than existing position encodings on extended sequences. No figure was checked.
Here   A two-layer character model of Python's own manual, 400 steps of 32 windows of 64 bytes, read at 64, 128 and 512.
       The fall with distance is that of the trained position's score of two equal vectors of ones, over 512 tokens, in
       every head of every layer.
Fair   HoPE, RoPE, ALiBi and sinusoidal positions, each at the learning rate, of the same three, that is best for it on
       validation text of 64 bytes; same steps and batches.
Rule   loss = nats a byte read at 512 bytes; rises = share of the steps in distance at which the score rises.
       holds                in every seed HoPE's loss is the lowest of the four and its rises are 0, RoPE's are not
       holds in direction   HoPE's mean loss is below RoPE's and sinusoidal's, ALiBi's or not, and its rises are 0
"""

from collections.abc import Sequence
from statistics import fmean

import torch
from torch import nn

from formwright import tasks
from formwright.claims import Outcome, Scale, Verdict
from formwright.contracts import Context
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM
from formwright.training import Settings, evaluate, fit, seeded

STATEMENT = (
    "Hyperbolic rotations make attention fall monotonically with distance and lower perplexity beyond the training "
    "length."
)
PAPER = {"abstract": "monotonic decay with distance; perplexity on extended sequences below existing encodings"}
RULE = (
    "loss = nats a byte read at 512 bytes after training at 64; rises = share of the steps in distance at which the "
    "score of two equal vectors rises; holds: in every seed HoPE's loss is the lowest of the four and its rises are 0, "
    "while RoPE's are not; holds in direction: HoPE's mean loss is below RoPE's and sinusoidal's, and its rises are 0."
)
SEEDS = (3, 4, 5)  # others than those looked at while the claim was written

OURS, RIVAL = "hope", "rope"
ARMS = {OURS: "hope", RIVAL: "rope", "alibi": "alibi", "sinusoidal": "sinusoidal(amplitude=0.03)"}
READ = (64, 128, 512)
RATES = {"smoke": (8e-3,), "full": (4e-3, 8e-3, 16e-3)}
STEPS = {"smoke": 4, "full": 400}
HELD_OUT = {"smoke": 0.01, "full": 0.05}


def run(scale: Scale, seed: int) -> Outcome:
    found = {name: learnt(name, scale, seed) for name in ARMS}
    measured = found.pop(OURS)
    return Outcome(
        scale=scale,
        seed=seed,
        measured=measured,
        baseline={key: value for numbers in found.values() for key, value in numbers.items()},
    )


def learnt(name: str, scale: Scale, seed: int) -> dict[str, float]:
    """Nats a byte at every length, at the rate that is best on validation text of the training length."""
    held = HELD_OUT[scale]
    short, *longer = (tasks.load(f"char-lm(length={n}, test={held}, validation={held})") for n in READ)
    tried = []
    for rate in RATES[scale]:
        seeded(seed)
        model = TransformerForCausalLM(
            TransformerConfig(
                **longer[-1].model_config,
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                position=ARMS[name],
            )
        )
        settings = Settings(
            steps=STEPS[scale], batch_size=32, learning_rate=rate, weight_decay=0.1, betas=(0.9, 0.95), seed=seed
        )
        fit(model, short, settings)
        tried.append((evaluate(model, short, "validation").metrics["loss"], rate, model))
    _, rate, model = min(tried, key=lambda trial: trial[0])
    numbers = {
        f"{name} at {n}": evaluate(model, task, "test", batch_size=64).metrics["loss"]
        for n, task in zip(READ, (short, *longer), strict=True)
    }
    decoder = model.model.decoder
    if name == OURS:
        numbers[f"{name}, rises"] = fmean(rises(mixer.position) for mixer in decoder.mixers)
    elif name == RIVAL:
        numbers[f"{name}, rises"] = rises(decoder.position)
    return {**numbers, f"{name}, learning rate": rate}


@torch.no_grad()
def rises(position: nn.Module) -> float:
    """Share of the steps away from a query at which its score with an equal key rises."""
    n = READ[-1]
    x, context = torch.ones(1, 2, n, 32, dtype=torch.float64), Context(queries=n, keys=n, causal=True)
    if hasattr(position, "scores"):
        scores = position.double().scores(x, x, context)
        position.float()
    else:
        q, k = position.rotate(x, x, context)
        scores = q @ k.mT / x.shape[-1] ** 0.5
    away = scores[0, :, -1].flip(-1)
    return (away.diff(dim=-1) > 0).double().mean().item()


def verdict(outcomes: Sequence[Outcome]) -> Verdict:
    far, others = READ[-1], [name for name in ARMS if name != OURS]
    falls = all(outcome.measured[f"{OURS}, rises"] == 0 for outcome in outcomes)
    swings = all(outcome.baseline[f"{RIVAL}, rises"] > 0 for outcome in outcomes)

    def ours(outcome: Outcome) -> float:
        return outcome.measured[f"{OURS} at {far}"]

    def theirs(outcome: Outcome, name: str) -> float:
        return outcome.baseline[f"{name} at {far}"]

    lowest = all(ours(outcome) < min(theirs(outcome, name) for name in others) for outcome in outcomes)
    if falls and swings and lowest:
        return "holds"
    mean = fmean(map(ours, outcomes))
    below = all(mean < fmean(theirs(outcome, name) for outcome in outcomes) for name in (RIVAL, "sinusoidal"))
    return "holds in direction" if falls and below else "does not hold here"
