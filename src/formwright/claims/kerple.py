"""Claim: trained on short sequences, KERPLE with the log kernel reads long ones better than ALiBi and T5's bias.

Paper  OpenWebText2, GitHub and ArXiv, trained at 512 tokens: the abstract says that the log kernel extrapolates well
       on all three. The perplexities, table 3 with ALiBi and T5's bias, are left out.
Here   A two-layer character model of Python's own manual, trained at 64 bytes, read at 512.
Fair   The models differ in the position alone: same steps, batches and learning rate.
Rule   loss = nats a byte read at 512 bytes.
       holds                in every seed KERPLE's loss is below ALiBi's and T5's
       holds in direction   KERPLE's mean loss is below ALiBi's and T5's
"""

from collections.abc import Sequence
from statistics import fmean

from formwright import tasks
from formwright.claims import Outcome, Scale, Verdict
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM
from formwright.training import Settings, evaluate, fit, seeded

STATEMENT = "Trained on short sequences, KERPLE with the log kernel reads long ones better than ALiBi and T5's bias."
PAPER = {"abstract": "the log kernel extrapolates well on OpenWebText2, GitHub and ArXiv; figures: its table 3"}
RULE = (
    "loss = nats a byte read at 512 bytes after training at 64; holds: in every seed KERPLE's is below ALiBi's and "
    "T5's; holds in direction: KERPLE's mean is below ALiBi's and T5's."
)
SEEDS = (0, 1, 2)

OURS, OTHERS = "kerple", ("alibi", "t5")
TRAINED, READ = 64, 512
STEPS = {"smoke": 4, "full": 800}
HELD_OUT = {"smoke": 0.01, "full": 0.1}


def run(scale: Scale, seed: int) -> Outcome:
    losses = {position: loss(position, scale, seed) for position in (OURS, *OTHERS)}
    return Outcome(scale=scale, seed=seed, measured={OURS: losses.pop(OURS)}, baseline=losses)


def loss(position: str, scale: Scale, seed: int) -> float:
    """Nats a byte of long windows, after training on short ones."""
    short, long = (tasks.load(f"char-lm(length={length}, test={HELD_OUT[scale]})") for length in (TRAINED, READ))
    seeded(seed)
    model = TransformerForCausalLM(
        TransformerConfig(
            **long.model_config, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, position=position
        )
    )
    settings = Settings(
        steps=STEPS[scale], batch_size=32, learning_rate=4e-3, weight_decay=0.1, betas=(0.9, 0.95), seed=seed
    )
    fit(model, short, settings)
    return evaluate(model, long, "test", batch_size=64).metrics["loss"]


def verdict(outcomes: Sequence[Outcome]) -> Verdict:
    if all(outcome.measured[OURS] < min(outcome.baseline.values()) for outcome in outcomes):
        return "holds"
    ours = fmean(outcome.measured[OURS] for outcome in outcomes)
    theirs = min(fmean(outcome.baseline[name] for outcome in outcomes) for name in OTHERS)
    return "holds in direction" if ours < theirs else "does not hold here"
