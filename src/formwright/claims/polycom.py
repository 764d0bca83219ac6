"""Claim: at equal parameters PolyNorm reaches a lower loss than SwiGLU; PolyReLU fits smooth functions better than
       ReLU.

Paper  1B dense model, 250B tokens: training loss 2.17 (PolyNorm) against 2.19 (SwiGLU), validation perplexity 3.17
       against 3.22, as reported by secondary sources. Theorem: PolyCom networks reach the optimal approximation rate on
       smooth functions (abstract).
Here   A two-layer character model of width 64 of Python's own manual, 400 steps; x^2, x y and sin(3x) cos(2y) on the
       square [-1, 1]^2, fitted by one hidden layer of 16 neurons.
Fair   Equal parameters (hidden 256 without a gate, 171 with one, no biases), same steps, batches and initial scheme;
       every layer gets the best of the same three learning rates by a validation part, and is read on the test part.
Rule   Loss, nats a byte of the test part:
       holds: PolyNorm's below SwiGLU's in every seed and in a paired t-test (p < 0.05);
       holds in direction: PolyNorm's mean below SwiGLU's mean.
       Fit, root mean square error on unseen points, the median over the three functions:
       holds: PolyReLU's at most a tenth of ReLU's in every seed;
       holds in direction: PolyReLU's below ReLU's in every seed.
"""

from collections.abc import Sequence
from statistics import fmean, median

import torch
from torch import Tensor, nn

from formwright import tasks
from formwright.bench.statistics import paired_t
from formwright.claims import Claim, Outcome, Scale, Verdict
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM
from formwright.parts.feedforward.polycom import PolyReLU
from formwright.training import Settings, evaluate, fit, seeded

SEEDS = (0, 1, 2, 3)

LAYERS = {  # feed-forward and its hidden width: 2 x 64 x 256 or 3 x 64 x 171 weights
    "polynorm": ("polynorm", 256),
    "polyrelu": ("polyrelu", 256),
    "swiglu": ("swiglu", 171),
}
RATES = {"smoke": (8e-3,), "full": (4e-3, 8e-3, 16e-3)}
STEPS = {"smoke": 4, "full": 400}
TEXT = {"smoke": "char-lm(test=0.01, validation=0.01)", "full": "char-lm(test=0.1, validation=0.05)"}

NEURONS = 16
FIT_RATES = {"smoke": (1e-2,), "full": (3e-3, 1e-2, 3e-2)}
FIT_STEPS = {"smoke": 20, "full": 1000}
FUNCTIONS = {
    "x^2": lambda x: x[:, 0] ** 2,
    "x y": lambda x: x[:, 0] * x[:, 1],
    "sin cos": lambda x: torch.sin(3 * x[:, 0]) * torch.cos(2 * x[:, 1]),
}


def run(scale: Scale, seed: int) -> Outcome:
    loss = {name: read_loss(name, scale, seed) for name in LAYERS}
    error = {name: fit_error(activation, scale, seed) for name, activation in ACTIVATIONS.items()}
    return Outcome(
        scale=scale,
        seed=seed,
        measured={
            "loss polynorm": loss["polynorm"],
            "loss polyrelu": loss["polyrelu"],
            "fit polyrelu": error["polyrelu"],
        },
        baseline={"loss swiglu": loss["swiglu"], "fit relu": error["relu"]},
    )


def read_loss(layer: str, scale: Scale, seed: int) -> float:
    """Nats a byte of the test part, at the rate that is best on the validation part."""
    task = tasks.load(TEXT[scale])
    feedforward, hidden = LAYERS[layer]
    config = {**task.defaults.model, **task.model_config, "feedforward": feedforward, "intermediate_size": hidden}
    tried = []
    for rate in RATES[scale]:
        seeded(seed)
        model = TransformerForCausalLM(TransformerConfig(**config))
        settings = Settings(
            steps=STEPS[scale], batch_size=16, learning_rate=rate, weight_decay=0.1, betas=(0.9, 0.95), seed=seed
        )
        fit(model, task, settings)
        tried.append((evaluate(model, task, "validation").metrics["loss"], rate, model))
    return evaluate(min(tried)[2], task, "test").metrics["loss"]


ACTIVATIONS = {"polyrelu": PolyReLU, "relu": nn.ReLU}


def fit_error(activation: type[nn.Module], scale: Scale, seed: int) -> float:
    """The median over the functions of the error of the network that fits each best on validation points."""
    return median(_fitted(activation, function, scale, seed) for function in FUNCTIONS.values())


def _fitted(activation: type[nn.Module], function: object, scale: Scale, seed: int) -> float:
    draw = torch.Generator().manual_seed(seed)
    train, validation, test = (2 * torch.rand(1024, 2, generator=draw) - 1 for _ in range(3))
    tried = []
    for rate in FIT_RATES[scale]:
        seeded(seed)
        net = nn.Sequential(nn.Linear(2, NEURONS), activation(), nn.Linear(NEURONS, 1))
        optimizer = torch.optim.Adam(net.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, FIT_STEPS[scale])
        for _ in range(FIT_STEPS[scale]):
            optimizer.zero_grad()
            _squares(net, function, train).backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            tried.append([_squares(net, function, points).sqrt().item() for points in (validation, test)])
    return min(tried)[1]


def _squares(net: nn.Module, function: object, points: Tensor) -> Tensor:
    return (net(points)[:, 0] - function(points)).square().mean()


def _columns(outcomes: Sequence[Outcome], ours: str, theirs: str) -> tuple[list[float], list[float]]:
    return [o.measured[ours] for o in outcomes], [o.baseline[theirs] for o in outcomes]


def loss_verdict(outcomes: Sequence[Outcome]) -> Verdict:
    ours, theirs = _columns(outcomes, "loss polynorm", "loss swiglu")
    chance = paired_t(ours, theirs)
    if all(a < b for a, b in zip(ours, theirs, strict=True)) and chance is not None and chance < 0.05:
        return "holds"
    return "holds in direction" if fmean(ours) < fmean(theirs) else "does not hold here"


def fit_verdict(outcomes: Sequence[Outcome]) -> Verdict:
    ours, theirs = _columns(outcomes, "fit polyrelu", "fit relu")
    if all(a <= 0.1 * b for a, b in zip(ours, theirs, strict=True)):
        return "holds"
    lower = all(a < b for a, b in zip(ours, theirs, strict=True))
    return "holds in direction" if lower else "does not hold here"


CLAIMS = [
    Claim(
        statement="PolyNorm reaches a lower loss than SwiGLU at equal parameters.",
        paper={"training loss, PolyNorm and SwiGLU (as reported by secondary sources)": [2.17, 2.19]},
        rule=(
            "holds: PolyNorm's below SwiGLU's in every seed and in a paired t-test (p < 0.05); "
            "holds in direction: PolyNorm's mean below SwiGLU's mean."
        ),
        verdict=loss_verdict,
        shows=("loss polynorm", "loss polyrelu", "loss swiglu"),
    ),
    Claim(
        statement="PolyReLU fits smooth functions better than ReLU at equal size.",
        paper={"theorem": "the optimal approximation rate for smooth functions in Sobolev spaces (abstract)"},
        rule=(
            "holds: PolyReLU's at most a tenth of ReLU's in every seed; "
            "holds in direction: PolyReLU's below ReLU's in every seed."
        ),
        verdict=fit_verdict,
        shows=("fit polyrelu", "fit relu"),
    ),
]
