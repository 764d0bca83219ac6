"""Claim: a tree of leaves keeps the accuracy of the dense layer of its training width, and infers many times faster.

Paper  Abstract: up to 220 times faster than the dense layer; a ViT that uses 1 % of the layer's neurons keeps 94.2 % of
       its performance.
Here   Accuracy: scikit-learn's digits, 64 pixels to one layer of training width 128 to a linear read-out, 1,000 steps;
       leaves of 8, 4, 2 and 1 neurons, h = 3. Speed: evaluation at width 768, one token, training widths 2^8 to 2^16,
       leaves of 32 neurons, one thread.
Fair   Same steps, batches and read-out; every layer gets the best of the same three learning rates by validation.
       Times are medians of calls taken in turn, in processor seconds; the dense layer is two matrices and ReLU.
Rule   kept = accuracy of the tree, one leaf at inference, as a share of the dense layer's.
       holds: with one neuron a leaf, kept is at least 0.942 in every seed;
       holds in direction: with eight neurons a leaf, kept is at least 0.942 in every seed.
       Speed, dense seconds / tree seconds at width 2^16; growth, the slope of log seconds over log width from 2^12 on:
       holds: at least 220 times faster in every seed;
       holds in direction: faster in every seed, with at most half the dense layer's growth.
"""

import math
import time
from collections.abc import Callable, Sequence
from statistics import fmean, median

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from formwright import tasks
from formwright.build import build
from formwright.claims import Claim, Outcome, Scale, Verdict
from formwright.contracts import Context
from formwright.models.transformer import TransformerHeadOutput
from formwright.parts.feedforward.fast_feedforward import FastFeedForward, entropy
from formwright.parts.feedforward.mlp import ReLUMLP
from formwright.training import Settings, evaluate, fit, seeded
from formwright.training.evaluation import fetch

SEEDS = (0, 1, 2, 3)

WIDTH = 128
LEAVES = (8, 4, 2, 1)
RATES = {"smoke": (4e-3,), "full": (2e-3, 4e-3, 8e-3)}
STEPS = {"smoke": 10, "full": 1000}
KEEPS = 0.942

DIM, LEAF = 768, 32
WIDTHS = {"smoke": (2**8, 2**10), "full": (2**8, 2**10, 2**12, 2**14, 2**16)}
GROWS_FROM = {"smoke": 2**8, "full": 2**12}
ROUNDS = {"smoke": 3, "full": 30}


class OneLayer(nn.Module):
    """Pixels through one feed-forward layer to classes."""

    def __init__(self, feedforward: nn.Module) -> None:
        super().__init__()
        self.feedforward, self.classes = feedforward, nn.Linear(64, 10)

    def forward(
        self, pixel_values: Float[Tensor, "b 1 8 8"], labels: Int[Tensor, " b"] | None = None
    ) -> TransformerHeadOutput:
        x = pixel_values.flatten(1)[:, None]
        context = Context.of(x)
        logits = self.classes(self.feedforward(x, context)[:, 0])
        loss = None if labels is None else sum(context.losses.values(), F.cross_entropy(logits, labels))
        return TransformerHeadOutput(loss=loss, logits=logits, extra_losses=context.losses or None)


def run(scale: Scale, seed: int) -> Outcome:
    dense, _ = trained("relu", scale, seed)
    measured: dict[str, float] = {}
    for leaf in LEAVES:
        depth = int(math.log2(WIDTH // leaf))
        accuracy, model = trained(f"fast-feedforward(depth={depth})", scale, seed)
        measured[f"accuracy, leaf {leaf}"] = accuracy
        measured[f"kept, leaf {leaf}"] = accuracy / dense
        if leaf == LEAVES[0]:
            measured[f"soft accuracy, leaf {leaf}"], measured[f"entropy, leaf {leaf}"] = softly(model)
    accuracy, model = trained("fast-feedforward(depth=4, hardening=0.0)", scale, seed)
    measured["accuracy, leaf 8, h = 0"] = accuracy
    measured["soft accuracy, leaf 8, h = 0"], measured["entropy, leaf 8, h = 0"] = softly(model)
    ours, theirs = speed(scale, seed)
    widest, grows = WIDTHS[scale][-1], GROWS_FROM[scale]
    return Outcome(
        scale=scale,
        seed=seed,
        measured={**measured, "faster": theirs[widest] / ours[widest], "growth": growth(ours, grows)},
        baseline={"accuracy, dense": dense, "growth, dense": growth(theirs, grows)},
    )


def trained(feedforward: str, scale: Scale, seed: int) -> tuple[float, OneLayer]:
    """Test accuracy at the rate that is best on the validation part, and the model."""
    task = tasks.load("digits(validation=0.2)")
    tried = []
    for rate in RATES[scale]:
        seeded(seed)
        model = OneLayer(build("feedforward", feedforward, dim=64, hidden=WIDTH))
        fit(model, task, Settings(steps=STEPS[scale], batch_size=64, learning_rate=rate, seed=seed))
        tried.append((evaluate(model, task, "validation").metrics["accuracy"], model))
    best = max(tried, key=lambda pair: pair[0])[1]
    return evaluate(best, task, "test").metrics["accuracy"], best


@torch.no_grad()
def softly(model: OneLayer) -> tuple[float, float]:
    """Test accuracy of the mixture of leaves, and the nodes' mean entropy in nats."""
    task = tasks.load("digits(validation=0.2)")
    test = fetch(task.test, list(range(len(task.test))), task.collate)
    layer = model.train().feedforward
    right = model(test["pixel_values"]).logits.argmax(-1) == test["labels"]
    logits = F.linear(test["pixel_values"].flatten(1), layer.node_weight, layer.node_bias)
    model.eval()
    return right.float().mean().item(), entropy(logits).mean().item()


@torch.no_grad()
def speed(scale: Scale, seed: int) -> tuple[dict[int, float], dict[int, float]]:
    """Median processor seconds of one token by training width: the tree's and the dense layer's."""
    seeded(seed)
    ours, theirs = {}, {}
    for width in WIDTHS[scale]:
        tree = FastFeedForward(dim=DIM, hidden=width, depth=int(math.log2(width // LEAF))).eval()
        dense = ReLUMLP(dim=DIM, hidden=width).eval()
        x = torch.randn(ROUNDS[scale] + 2, 1, 1, DIM)
        taken = [(_seconds(tree, token), _seconds(dense, token)) for token in x]
        ours[width], theirs[width] = (median(column[2:]) for column in zip(*taken, strict=True))
    return ours, theirs


def _seconds(layer: Callable[[Tensor], Tensor], x: Tensor) -> float:
    start = time.process_time()
    layer(x)
    return time.process_time() - start


def growth(seconds: dict[int, float], start: int) -> float:
    """The slope of log seconds over log width, by least squares."""
    points = [(math.log(width), math.log(taken)) for width, taken in seconds.items() if width >= start]
    x, y = (fmean(column) for column in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def accuracy_verdict(outcomes: Sequence[Outcome]) -> Verdict:
    if all(outcome.measured["kept, leaf 1"] >= KEEPS for outcome in outcomes):
        return "holds"
    kept = all(outcome.measured["kept, leaf 8"] >= KEEPS for outcome in outcomes)
    return "holds in direction" if kept else "does not hold here"


def speed_verdict(outcomes: Sequence[Outcome]) -> Verdict:
    if all(outcome.measured["faster"] >= 220 for outcome in outcomes):
        return "holds"
    flatter = all(
        outcome.measured["faster"] > 1 and outcome.measured["growth"] <= 0.5 * outcome.baseline["growth, dense"]
        for outcome in outcomes
    )
    return "holds in direction" if flatter else "does not hold here"


CLAIMS = [
    Claim(
        statement="A tree that infers with one leaf keeps the accuracy of the dense layer of its training width.",
        paper={"share of a ViT's performance kept with 1 % of the neurons (abstract)": 0.942},
        rule=(
            "holds: with one neuron a leaf, kept is at least 0.942 in every seed; "
            "holds in direction: with eight neurons a leaf, kept is at least 0.942 in every seed."
        ),
        verdict=accuracy_verdict,
        shows=(
            *(f"{what}, leaf {leaf}" for leaf in LEAVES for what in ("accuracy", "kept", "soft accuracy", "entropy")),
            *(f"{what}, leaf 8, h = 0" for what in ("accuracy", "soft accuracy", "entropy")),
            "accuracy, dense",
        ),
    ),
    Claim(
        statement="Inference is many times faster than the dense layer's and grows far more slowly with the width.",
        paper={"times faster, up to (abstract)": 220},
        rule=(
            "holds: at least 220 times faster in every seed; "
            "holds in direction: faster in every seed, with at most half the dense layer's growth."
        ),
        verdict=speed_verdict,
        shows=("faster", "growth", "growth, dense"),
    ),
]
