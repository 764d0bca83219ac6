"""Claim: trained on short sequences, ALiBi does not get worse on longer ones; sinusoidal positions do.

Paper  Figure 1 and table 2: WikiText-103, trained at 512 tokens, read at ever longer ones. From 512 to 15,512 tokens
       ALiBi's perplexity goes from 19.73 to 18.31, sinusoidal's from 20.05 to 406.01.
Here   A two-layer character model of Python's own manual, trained at 64 bytes, read at 64 and at 512.
Fair   The models differ in the position alone: same steps, batches and learning rate. Sinusoidal waves are as large as
       the tokens, which are drawn from N(0, 0.02), as in their paper.
Rule   rise = nats a byte read at 512 - read at 64.
       holds                ALiBi's largest rise <= 0 < sinusoidal's smallest
       holds in direction   ALiBi's largest rise < sinusoidal's smallest
"""

from collections.abc import Sequence

from formwright import tasks
from formwright.claims import Outcome, Scale, Verdict
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM
from formwright.training import Settings, evaluate, fit, seeded

STATEMENT = "Trained on short sequences, ALiBi does not get worse on longer ones; sinusoidal positions do."
PAPER = {
    "perplexity read at 512 and at 15,512 tokens (table 2)": {"alibi": [19.73, 18.31], "sinusoidal": [20.05, 406.01]}
}
RULE = (
    "rise = nats a byte read at 512 bytes - read at 64; holds: ALiBi's largest rise <= 0 < sinusoidal's smallest; "
    "holds in direction: ALiBi's largest rise < sinusoidal's smallest."
)
SEEDS = (0, 1, 2)

TRAINED, READ = 64, 512
STEPS = {"smoke": 4, "full": 800}
HELD_OUT = {"smoke": 0.01, "full": 0.1}


def run(scale: Scale, seed: int) -> Outcome:
    return Outcome(
        scale=scale,
        seed=seed,
        measured={"alibi": rise("alibi", scale, seed)},
        baseline={"sinusoidal": rise("sinusoidal(amplitude=0.03)", scale, seed)},
    )


def rise(position: str, scale: Scale, seed: int) -> float:
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
    at_length = [evaluate(model, task, "test", batch_size=64).metrics["loss"] for task in (short, long)]
    return at_length[1] - at_length[0]


def verdict(outcomes: Sequence[Outcome]) -> Verdict:
    ours = [outcome.measured["alibi"] for outcome in outcomes]
    theirs = [outcome.baseline["sinusoidal"] for outcome in outcomes]
    if max(ours) <= 0 < min(theirs):
        return "holds"
    return "holds in direction" if max(ours) < min(theirs) else "does not hold here"
