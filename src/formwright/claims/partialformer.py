"""Claim: at equal parameters PartialFormer reaches a lower loss than the Transformer, deep and narrow or not.

Paper  WMT'14 English-German BLEU 29.56; on nine translation tasks and one of summarisation as good or better than the
       Transformer and other light models at fewer parameters and multiply-adds (abstract and listing pages).
Here   No translation: a character model of Python's own manual, width 64, 500 steps of 16 windows of 64 bytes.
       PartialFormer has four layers of 4 heads expanded to 8. Multiply-adds are counted, not timed.
Fair   The two Transformers get the hidden width at which they hold as many parameters (within two in a thousand):
       one has three layers with a wide hidden layer, one six with a narrow one. All have ReLU, pre-norm, learned
       positions and the same initialisation, data, order, steps and learning rates; each is read at the rate that is
       best for it on validation text.
Rule   loss = nats a byte on the test text.
       holds                in every seed PartialFormer's is the lowest of the three
       holds in direction   its mean is the lowest
"""

import functools
import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from formwright import tasks
from formwright.bench.measure import flops
from formwright.claims import Claim, Outcome, Scale, Verdict
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM
from formwright.tasks.base import Task
from formwright.training import Settings, evaluate, fit, seeded

OURS = "partialformer"
ARMS: dict[str, dict[str, Any]] = {
    OURS: {"num_hidden_layers": 4, "mixer": "partialformer(expanded=8)", "feedforward": "none"},
    "transformer": {"num_hidden_layers": 3, "feedforward": "relu"},
    "narrow": {"num_hidden_layers": 6, "feedforward": "relu"},
}
TEXT = {
    "smoke": "char-lm(length=64, test=0.01, validation=0.01)",
    "full": "char-lm(length=64, test=0.1, validation=0.05)",
}
STEPS = {"smoke": 3, "full": 500}
RATES = {"smoke": (4e-3,), "full": (2e-3, 4e-3, 8e-3)}
SEEDS = (0, 1, 2, 3)


def run(scale: Scale, seed: int) -> Outcome:
    task = tasks.load(TEXT[scale])
    found = {arm: learnt(arm, task, scale, seed) for arm in ARMS}
    ours = found.pop(OURS)
    return Outcome(
        scale=scale, seed=seed, measured=ours, baseline={k: v for one in found.values() for k, v in one.items()}
    )


def built(arm: str, task: Task, **more: Any) -> TransformerForCausalLM:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "block": "pre", "position": "learned", "init": "xavier"}
    return TransformerForCausalLM(TransformerConfig(**task.model_config | sizes | ARMS[arm] | more))


@functools.cache
def hidden(arm: str, vocabulary: int, length: int) -> int | None:
    """The hidden width at which the arm has the parameters of PartialFormer, which has none."""
    if arm == OURS:
        return None
    facts = {"architecture": "decoder", "vocab_size": vocabulary, "max_position_embeddings": length}
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "position": "learned"} | facts

    def count(which: str, width: int | None) -> int:
        return TransformerForCausalLM(
            TransformerConfig(**sizes | ARMS[which], intermediate_size=width)
        ).num_parameters()

    least, one_more = count(arm, 1), count(arm, 2)
    return 1 + round((count(OURS, None) - least) / (one_more - least))


def learnt(arm: str, task: Task, scale: Scale, seed: int) -> dict[str, float]:
    width = hidden(arm, task.model_config["vocab_size"], task.model_config["max_position_embeddings"])
    lowest, best = math.inf, {}
    for rate in RATES[scale]:
        seeded(seed)
        model = built(arm, task, intermediate_size=width)
        settings = Settings(
            steps=STEPS[scale], batch_size=16, learning_rate=rate, weight_decay=0.1, betas=(0.9, 0.95), seed=seed
        )
        fit(model, task, settings)
        validation = evaluate(model, task, "validation").metrics["loss"]
        if validation < lowest:
            lowest = validation
            best = {f"{arm}, loss": evaluate(model, task, "test").metrics["loss"], f"{arm}, learning rate": rate}
    window = {"input_ids": task.test[0]["input_ids"][None]}
    return best | {
        f"{arm}, parameters": model.num_parameters(),
        f"{arm}, multiply-adds a byte": flops(model, window) / 2 / window["input_ids"].numel(),
    }


def verdict(outcomes: Sequence[Outcome]) -> Verdict:
    lower = [
        o.measured[f"{OURS}, loss"] < min(o.baseline[f"{arm}, loss"] for arm in ARMS if arm != OURS) for o in outcomes
    ]
    ours = fmean(o.measured[f"{OURS}, loss"] for o in outcomes)
    theirs = min(fmean(o.baseline[f"{arm}, loss"] for o in outcomes) for arm in ARMS if arm != OURS)
    if ours >= theirs:
        return "does not hold here"
    return "holds" if all(lower) else "holds in direction"


CLAIMS = [
    Claim(
        statement="At equal parameters PartialFormer reaches a lower loss than the Transformer, deep and narrow or "
        "not.",
        paper={"WMT'14 En-De, BLEU": {"PartialFormer": 29.56}},
        rule="loss = nats a byte on the test text; holds: in every seed PartialFormer's is the lowest of the three; "
        "holds in direction: its mean is the lowest.",
        verdict=verdict,
        shows=tuple(
            f"{arm}, {what}" for arm in ARMS for what in ("loss", "learning rate", "parameters", "multiply-adds a byte")
        ),
    )
]
