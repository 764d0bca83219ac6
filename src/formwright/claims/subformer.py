"""Claims: sharing the middle layers saves half of a model's parameters at nearly its loss, and beats sharing all layers
and an unshared model of its size; and narrow embeddings lifted by self-attention beat a linear lift.

Paper    WMT'14 En-De: BLEU of Transformer-base with 40 % fewer parameters; sharing every layer is the losing baseline
         of its ablation. WikiText-103: perplexity 20.39, 3.6 below Transformer-XL standard with 37 % fewer parameters.
Here     Language models of Python's own manual, 500 steps of 8 windows of 64 tokens. First 6 layers of width 64 on
         bytes: each layer its own weights, all shared, all but the last shared, a sandwich, and an unshared model with
         the sandwich's number of parameters (48 wide). Then 2 layers of width 64 on 2048 byte pairs: embeddings of
         width 16 with SAFE and with one matrix, and full ones.
Fair     All arms share data, order, steps, wiring, initialisation and learning rates; each is judged at its own best
         rate on validation text. Sharing all layers has the sandwich's width and depth, thus its work, and fewer
         parameters.
Rule     loss = nats a byte on the test text at the best rate.
         holds                in every seed the sandwich ends below sharing all layers and below the unshared model of
                              its size, and its mean loss is at most 0.02 above that of the unshared model of its width
         holds in direction   its mean loss is below both
Rule 2   loss = nats a token on the test text at the best rate.
         holds                SAFE ends below the linear lift in every seed
         holds in direction   its mean loss is below
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch

from formwright import tasks
from formwright.claims import Claim, Outcome, Scale, Verdict
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM
from formwright.tasks.base import Task
from formwright.training import Settings, evaluate, fit, seeded

SEEDS = (0, 1, 2)
STEPS = {"smoke": 2, "full": 500}
BYTES = {"smoke": "char-lm(length=64, test=0.01, validation=0.01)", "full": "char-lm(length=64, validation=0.05)"}
PAIRS = {
    "smoke": "bpe-lm(vocab=300, length=64, test=0.01, validation=0.01)",
    "full": "bpe-lm(vocab=2048, length=64, validation=0.05)",
}
RATES = {"smoke": (3e-3,), "full": (3e-3, 1e-2)}
WIDTH, NARROW, LAYERS = 64, 48, 6
SCHEMES = ("none", "all", "all-but-last", "sandwich")
LIFTS = {"safe": "safe(rank=16, heads=2)", "factorised": "factorised(rank=16)", "full": "none"}


def run(scale: Scale, seed: int) -> Outcome:
    measured: dict[str, float | int] = {}
    baseline: dict[str, float | int] = {}
    task = tasks.load(BYTES[scale])
    arms: dict[str, dict[str, Any]] = {
        scheme: {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "sharing": scheme} for scheme in SCHEMES
    }
    arms["narrow"] = matched(task, arms["sandwich"])
    for arm, options in arms.items():
        into = measured if arm == "sandwich" else baseline
        into |= {f"{arm}, {what}": value for what, value in best(task, options, scale, seed).items()}
    task = tasks.load(PAIRS[scale])
    for arm, lift in LIFTS.items():
        options = {"hidden_size": WIDTH, "num_hidden_layers": 2, "embedding": lift}
        into = measured if arm == "safe" else baseline
        into |= {f"{arm}, {what}": value for what, value in best(task, options, scale, seed).items()}
    return Outcome(scale=scale, seed=seed, measured=measured, baseline=baseline)


def config(task: Task, options: dict[str, Any]) -> TransformerConfig:
    return TransformerConfig(**task.model_config, num_attention_heads=4, position="rope", init="xavier", **options)


def parameters(task: Task, options: dict[str, Any]) -> int:
    with torch.device("meta"):
        return sum(one.numel() for one in TransformerForCausalLM(config(task, options)).parameters())


def matched(task: Task, options: dict[str, Any]) -> dict[str, Any]:
    """An unshared, narrower model with the parameters of this one: its feed-forward width makes up the difference."""
    wanted = parameters(task, options)

    def narrow(hidden: int) -> dict[str, Any]:
        return {"hidden_size": NARROW, "num_hidden_layers": LAYERS, "intermediate_size": hidden}

    a_neuron = parameters(task, narrow(2)) - parameters(task, narrow(1))
    return narrow(1 + round((wanted - parameters(task, narrow(1))) / a_neuron))


def best(task: Task, options: dict[str, Any], scale: Scale, seed: int) -> dict[str, float | int]:
    """Loss on the test text at the rate that is best on validation text, that rate, and the number of parameters."""
    validation, loss, rate = min(trained(task, options, rate, scale, seed) for rate in RATES[scale])
    del validation
    return {"loss": loss, "rate": rate, "parameters": parameters(task, options)}


def trained(task: Task, options: dict[str, Any], rate: float, scale: Scale, seed: int) -> tuple[float, float, float]:
    seeded(seed)
    model = TransformerForCausalLM(config(task, options))
    settings = Settings(
        steps=STEPS[scale], batch_size=8, learning_rate=rate, weight_decay=0.1, betas=(0.9, 0.95), seed=seed
    )
    fit(model, task, settings)
    validation, test = (evaluate(model, task, split).metrics["loss"] for split in ("validation", "test"))
    return validation, test, rate


def saves(outcomes: Sequence[Outcome]) -> Verdict:
    ours = [o.measured["sandwich, loss"] for o in outcomes]
    shared, small, whole = ([o.baseline[f"{arm}, loss"] for o in outcomes] for arm in ("all", "narrow", "none"))
    below = all(a < b and a < c for a, b, c in zip(ours, shared, small, strict=True))
    if below and fmean(ours) <= fmean(whole) + 0.02:
        return "holds"
    lower = fmean(ours) < min(fmean(shared), fmean(small))
    return "holds in direction" if lower else "does not hold here"


def lifts(outcomes: Sequence[Outcome]) -> Verdict:
    pairs = [(o.measured["safe, loss"], o.baseline["factorised, loss"]) for o in outcomes]
    if all(ours < theirs for ours, theirs in pairs):
        return "holds"
    lower = fmean(ours for ours, _ in pairs) < fmean(theirs for _, theirs in pairs)
    return "holds in direction" if lower else "does not hold here"


def _shown(*arms: str) -> tuple[str, ...]:
    return tuple(f"{arm}, {what}" for arm in arms for what in ("loss", "rate", "parameters"))


CLAIMS = [
    Claim(
        statement="Sharing the middle layers saves half of the parameters at nearly the loss of the whole model, and "
        "ends below sharing all layers and below an unshared model of its size.",
        paper={"WMT'14 En-De": "BLEU of Transformer-base with 40 % fewer parameters"},
        rule="holds: in every seed the sandwich ends below sharing all layers and below the unshared model of its "
        "size, and its mean loss is at most 0.02 above that of the unshared model of its width; holds in direction: "
        "its mean loss is below both.",
        verdict=saves,
        shows=_shown("sandwich", *(scheme for scheme in SCHEMES if scheme != "sandwich"), "narrow"),
    ),
    Claim(
        statement="Narrow embeddings lifted by self-attention end with a lower loss than lifted by one matrix.",
        paper={"ablation": "SAFE against ALBERT's linear lift at equal width"},
        rule="holds: SAFE ends below the linear lift in every seed; holds in direction: its mean loss is below.",
        verdict=lifts,
        shows=_shown(*LIFTS),
    ),
]
