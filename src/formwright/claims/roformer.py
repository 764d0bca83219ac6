"""Claim: rotary positions let a language model learn faster than absolute positions under the same budget.

Paper  Masked language modelling against BERT (figure 3): faster convergence. Table 1, BLEU on WMT14 En-De: 27.5, and
       27.3 of the original Transformer, whose positions are sinusoidal.
Here   A two-layer character model of Python's own manual, 500 steps of 16 windows of 128 bytes: RoPE, learned
       positions, sinusoidal positions and none at all (a causal model can count without).
Fair   All four get the same steps, batches and learning rates; each is read at the rate that is best for it on
       validation text. Sinusoidal waves are as large as the tokens, which are drawn from N(0, 0.02), as in their paper.
Rule   loss = nats a byte on the test text; halfway = the same on validation text after half the steps.
       holds                in every seed RoPE's loss is the lowest of the four, halfway and at the end
       holds in direction   RoPE's mean loss at the end is the lowest of the four
"""

from collections.abc import Sequence
from statistics import fmean

from formwright import tasks
from formwright.claims import Outcome, Scale, Verdict
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM
from formwright.training import Settings, evaluate, fit, seeded

STATEMENT = "Rotary positions let a language model learn faster than absolute positions under the same budget."
PAPER = {"BLEU, RoFormer (table 1)": 27.5, "BLEU, Transformer with sinusoidal positions (table 1)": 27.3}
RULE = (
    "holds: in every seed RoPE's loss is the lowest of the four, halfway and at the end; "
    "holds in direction: RoPE's mean loss at the end is the lowest of the four."
)
SEEDS = (0, 1, 2)

OURS = "rope"
OTHERS = {"learned": "learned", "sinusoidal": "sinusoidal(amplitude=0.03)", "none": "none"}
RATES = (4e-3, 8e-3)
STEPS = {"smoke": 4, "full": 500}
TASK = {"smoke": "char-lm(test=0.01, validation=0.01)", "full": "char-lm(validation=0.05)"}


def run(scale: Scale, seed: int) -> Outcome:
    measured = learnt(OURS, OURS, scale, seed)
    baseline: dict[str, float] = {}
    for name, position in OTHERS.items():
        baseline |= learnt(name, position, scale, seed)
    return Outcome(scale=scale, seed=seed, measured=measured, baseline=baseline)


def learnt(name: str, position: str, scale: Scale, seed: int) -> dict[str, float]:
    """What a model with these positions has learnt, at the rate that is best for it on validation text."""
    task = tasks.load(TASK[scale])
    best: dict[str, float] = {}
    lowest = float("inf")
    for rate in RATES[: 1 if scale == "smoke" else None]:
        settings = Settings(
            steps=STEPS[scale],
            batch_size=16,
            learning_rate=rate,
            weight_decay=0.1,
            betas=(0.9, 0.95),
            seed=seed,
            evaluate_every=STEPS[scale] // 2,
        )
        seeded(seed)
        model = TransformerForCausalLM(
            TransformerConfig(
                **task.model_config, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, position=position
            )
        )
        halfway, end = (entry["loss"] for entry in fit(model, task, settings).curve)
        if end < lowest:
            lowest = end
            test = evaluate(model, task, "test").metrics["loss"]
            best = {name: test, f"{name}, halfway": halfway, f"{name}, learning rate": rate}
    return best


def verdict(outcomes: Sequence[Outcome]) -> Verdict:
    def lowest(outcome: Outcome, when: str) -> bool:
        return outcome.measured[OURS + when] < min(outcome.baseline[name + when] for name in OTHERS)

    if all(lowest(outcome, when) for outcome in outcomes for when in ("", ", halfway")):
        return "holds"
    ours = fmean(outcome.measured[OURS] for outcome in outcomes)
    theirs = min(fmean(outcome.baseline[name] for outcome in outcomes) for name in OTHERS)
    return "holds in direction" if ours < theirs else "does not hold here"
