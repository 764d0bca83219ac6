"""Claim: what makes a state space solve selective copying is that its step size and its maps depend on the token.

Paper  Table 1: selective copying at length 4,096, accuracy: S4 18.3 %, S6 97.0 % without a gate; inside Mamba's
       block, S4 56.4 %, S6 99.8 %.
Here   64 cells, 8 of them hold one of 16 symbols at random places, then 8 questions: the symbols in order. Two layers
       of Mamba alone, width 64.
Fair   The rival is the same block with the same initial weights, batches, steps and learning rate; its step size and
       maps come through the same matrices from a constant in place of the token, so that it has the same parameters.
       Its convolution and gate still see the token.
Rule   accuracy = share of the answers that are right, on held-out rows.
       holds                in every seed S6 is above 0.95 and the constant one below 0.75 of S6
       holds in direction   in every seed S6 is above the constant one by more than 0.05
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formwright import tasks
from formwright.claims import Outcome, Scale, Verdict
from formwright.models.transformer import TransformerConfig, TransformerForTokenClassification
from formwright.training import Settings, evaluate, fit, seeded

STATEMENT = "A state space solves selective copying when its step size and maps depend on the token, and not otherwise."
PAPER = {"selective (S6)": 0.998, "constant (S4)": 0.564, "where": "table 1, inside Mamba's block, length 4,096"}
RULE = (
    "accuracy on held-out rows; holds: in every seed the selective one is above 0.95 and the constant one below 0.75 "
    "of it; holds in direction: in every seed the selective one is above the constant one by more than 0.05."
)
SEEDS = (0, 1, 2)

STEPS = {"smoke": 3, "full": 700}
TASK = "selective-copy(length=64, items=8, symbols=16, examples={examples}, seed={seed})"
SOLVED, FAR_BELOW, ABOVE = 0.95, 0.75, 0.05


class Constant(nn.Module):
    """In the place of x_proj: the same matrix reads ones instead of the token. The state space is then S4's kind."""

    def __init__(self, projection: nn.Linear) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n maps"]:
        return self.projection(torch.ones_like(x))


def run(scale: Scale, seed: int) -> Outcome:
    return Outcome(
        scale=scale,
        seed=seed,
        measured={"selective": accuracy(True, scale, seed)},
        baseline={"constant": accuracy(False, scale, seed)},
    )


def accuracy(selective: bool, scale: Scale, seed: int) -> float:
    """Share of right answers after training."""
    settings = Settings(steps=STEPS[scale], batch_size=64, learning_rate=4e-3, seed=seed)
    task = tasks.load(TASK.format(examples=settings.steps * settings.batch_size, seed=seed))
    seeded(seed)
    model = TransformerForTokenClassification(
        TransformerConfig(
            **task.model_config,
            hidden_size=64,
            num_hidden_layers=2,
            mixer="mamba",
            feedforward="none",
            position="none",
            norm="rmsnorm",
            init="fan-in",
        )
    )
    if not selective:
        for mixer in model.model.decoder.mixers:
            mixer.x_proj = Constant(mixer.x_proj)
    fit(model, task, settings)
    return evaluate(model, task, "test").metrics["accuracy"]


def verdict(outcomes: Sequence[Outcome]) -> Verdict:
    pairs = [(outcome.measured["selective"], outcome.baseline["constant"]) for outcome in outcomes]
    if all(ours > SOLVED and theirs < FAR_BELOW * ours for ours, theirs in pairs):
        return "holds"
    return "holds in direction" if all(ours > theirs + ABOVE for ours, theirs in pairs) else "does not hold here"
