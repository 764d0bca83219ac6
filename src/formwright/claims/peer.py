"""Claims: at equal compute PEER reaches a lower loss than a dense layer and than coarse experts; more experts lower it
further; batch normalisation of the queries spreads their use.

Paper  Curves of equal FLOPs on C4 (6e18 and 2e19): PEER below dense layers, coarse mixtures of experts and product-key
       memories; perplexity falls with the number of experts at fixed active ones; with query batch normalisation usage
       is more even and perplexity lower.
Here   A byte model of two layers and width 64, every feed-forward layer replaced, 450 steps of 16 windows of 128 bytes
       drawn from 7.5 MB of film reviews, an eighth of them. PEER with 4 heads of 16 experts, keys of width 16, and
       16^2, 64^2 or 128^2 experts of one neuron.
Fair   The dense layer and the mixture (8 experts, each token to its best one) have the widths that give them the FLOPs
       of PEER with 128^2 experts, queries, keys and router included. Same text, order and steps; every arm gets the
       better of two learning rates, a factor of 3 apart, by validation text. All matrices start at the scale of what
       they read (init fan-in), as experts do: at a smaller one the dense layer learns far more slowly. Parameters are
       not equal: that they come without compute is the claim.
Rule   loss = nats a byte of the test text.
       holds                in every seed PEER with 128^2 experts is below the dense layer and below the mixture, and a
                            paired t-test says so of each (p < 0.05)
       holds in direction   its mean is below both
Rule 2 holds                the mean loss falls from 16^2 over 64^2 to 128^2, and in every seed 128^2 is below 16^2
       holds in direction   the mean of 128^2 is below that of 16^2
Rule 3 On the test text, 128^2 experts: used = share of the experts that are retrieved, uneven = KL(usage || uniform).
       holds                in every seed batch normalisation has a larger share used and less uneven use, and its mean
                            loss is lower
       holds in direction   its mean unevenness is lower
"""

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from formwright.bench.statistics import paired_t
from formwright.claims import Claim, Outcome, Scale, Verdict
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM
from formwright.parts.feedforward import Usage
from formwright.parts.feedforward.peer import PEER
from formwright.tasks.base import Task
from formwright.tasks.support.files import folder, read_table
from formwright.tasks.support.language import character_task
from formwright.training import Settings, evaluate, fit, seeded

SEEDS = (0, 1, 2)

SIDES = (16, 64, 128)  # of the square of experts
WIDTHS = {"dense": 168, "moe": 164}  # the FLOPs of PEER with 128^2 experts
RATES = {"smoke": (8e-3,), "full": (4e-3, 12e-3)}
STEPS = {"smoke": 3, "full": 450}
READ = {"smoke": (60_000, 4_000), "full": (7_500_000, 200_000)}  # bytes to train and to test on


def peer(side: int, *, norm: bool = True) -> dict[str, Any]:
    options = f"experts={side * side}, retrievals=4, active=16, key_dim=16, query_norm={norm}"
    return {"feedforward": f"peer({options})"}


ARMS: dict[str, dict[str, Any]] = {
    "dense": {"feedforward": "gelu(bias=False)", "intermediate_size": WIDTHS["dense"]},
    "moe": {"feedforward": "moe(experts=8, active=1, routing=plain)", "intermediate_size": WIDTHS["moe"]},
    **{f"peer {side}^2": peer(side) for side in SIDES},
    "peer 128^2 without norm": peer(128, norm=False),
}


@cache
def text(scale: Scale) -> Task:
    """Film reviews, one after the other, as bytes."""
    given = os.environ.get("FORMWRIGHT_DATA")
    path = folder(Path(given) if given else None, "imdb", "of this claim") / "unlabeled.parquet"
    learnt, read = READ[scale]
    reviews = "\n".join(read_table(path)["text"]).encode()
    return character_task(
        name="imdb bytes",
        train=reviews[:learnt],
        test=reviews[-read:],
        unit="bytes",
        length=128,
        validation=0.02 if scale == "full" else 0.05,
        context=False,
        path=path,
    )


def run(scale: Scale, seed: int) -> Outcome:
    found = {arm: trained(arm, scale, seed) for arm in ARMS}
    measured = {f"loss {arm}": loss for arm, (loss, _) in found.items()}
    for arm in ("peer 128^2", "peer 128^2 without norm"):
        layers = [module for module in found[arm][1].modules() if isinstance(module, PEER)]
        measured[f"used {arm}"] = fmean(layer.usage.share() for layer in layers)
        measured[f"uneven {arm}"] = fmean(layer.usage.unevenness() for layer in layers)
    baseline = {name: measured.pop(name) for name in ("loss dense", "loss moe")}
    return Outcome(scale=scale, seed=seed, measured=measured, baseline=baseline)


def trained(arm: str, scale: Scale, seed: int) -> tuple[float, TransformerForCausalLM]:
    """Loss on the test text at the rate that is best on validation text, and the model, its usage that of the test."""
    task, tried = text(scale), []
    for rate in RATES[scale]:
        seeded(seed)
        config = {**task.defaults.model, **task.model_config, **ARMS[arm], "init": "fan-in"}
        model = TransformerForCausalLM(TransformerConfig(**config))
        settings = Settings(
            steps=STEPS[scale], batch_size=16, learning_rate=rate, weight_decay=0.1, betas=(0.9, 0.95), seed=seed
        )
        fit(model, task, settings)
        tried.append((evaluate(model, task, "validation").metrics["loss"], rate, model))
    best = min(tried)[2]
    for module in best.modules():
        if isinstance(module, Usage):
            module.reset_parameters()
    return evaluate(best, task, "test").metrics["loss"], best


def _losses(outcomes: Sequence[Outcome], arm: str) -> list[float]:
    return [{**o.measured, **o.baseline}[f"loss {arm}"] for o in outcomes]


def compute_verdict(outcomes: Sequence[Outcome]) -> Verdict:
    ours, others = _losses(outcomes, "peer 128^2"), [_losses(outcomes, arm) for arm in ("dense", "moe")]
    if any(fmean(ours) >= fmean(theirs) for theirs in others):
        return "does not hold here"
    for theirs in others:
        chance = paired_t(ours, theirs)
        below = all(a < b for a, b in zip(ours, theirs, strict=True))
        if not below or chance is None or chance >= 0.05:
            return "holds in direction"
    return "holds"


def experts_verdict(outcomes: Sequence[Outcome]) -> Verdict:
    few, more, most = (_losses(outcomes, f"peer {side}^2") for side in SIDES)
    every = all(a < b for a, b in zip(most, few, strict=True))
    if fmean(few) > fmean(more) > fmean(most) and every:
        return "holds"
    return "holds in direction" if fmean(most) < fmean(few) else "does not hold here"


def norm_verdict(outcomes: Sequence[Outcome]) -> Verdict:
    def both(what: str) -> tuple[list[float], list[float]]:
        ours, plain = ([o.measured[f"{what} {arm}"] for o in outcomes] for arm in NORMS)
        return ours, plain

    used, uneven, loss = both("used"), both("uneven"), both("loss")
    every = all(a > b for a, b in zip(*used, strict=True)) and all(a < b for a, b in zip(*uneven, strict=True))
    if every and fmean(loss[0]) < fmean(loss[1]):
        return "holds"
    return "holds in direction" if fmean(uneven[0]) < fmean(uneven[1]) else "does not hold here"


NORMS = ("peer 128^2", "peer 128^2 without norm")

CLAIMS = [
    Claim(
        statement="At equal compute PEER reaches a lower loss than a dense layer and than a mixture of coarse experts.",
        paper={"curves of equal FLOPs, C4, 6e18 and 2e19": "PEER below dense layers, coarse experts and memories"},
        rule=(
            "holds: in every seed below both, and in a paired t-test against each (p < 0.05); "
            "holds in direction: its mean is below both."
        ),
        verdict=compute_verdict,
        shows=("loss dense", "loss moe", "loss peer 128^2"),
    ),
    Claim(
        statement="More experts lower the loss while the active ones stay as many.",
        paper={"ablation": "perplexity falls with the number of experts at fixed active ones"},
        rule=(
            "holds: the mean loss falls from 16^2 over 64^2 to 128^2 experts, and in every seed 128^2 is below 16^2; "
            "holds in direction: the mean of 128^2 is below that of 16^2."
        ),
        verdict=experts_verdict,
        shows=tuple(f"loss peer {side}^2" for side in SIDES),
    ),
    Claim(
        statement="Batch normalisation of the queries makes more experts used, and more evenly, at a lower loss.",
        paper={"ablation": "usage more even and perplexity lower with query batch normalisation"},
        rule=(
            "holds: in every seed a larger share used and less uneven, and a lower mean loss; "
            "holds in direction: the mean unevenness is lower."
        ),
        verdict=norm_verdict,
        shows=tuple(f"{what} {arm}" for what in ("used", "uneven", "loss") for arm in NORMS),
    ),
]
