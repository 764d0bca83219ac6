"""Claims: feed-forward layers trained 2:4-sparse, with decay on the gradients of what is masked and a dense end, come
to the loss of dense training; and that decay calms the flips of the mask.

Paper  GPT-2 of 124M to 1.5B, BERT, DeiT and translation converge as dense training does; better than SR-STE, which
       decays weights. The flip rate of a plain straight-through estimator stays high.
Here   A character model of two layers, width 96 and feed-forwards of 384, of Python's own manual, 240 steps, masks
       anew every 10. Losses are of the test part. Flips are the share of weights that change sides in a step, a
       mean over the third quarter of the steps. No speed: a CPU gains none; beside it, the time that the masks of a
       matrix of 1024 x 4096 take, and that of the greedy choice, which keeps at least half of the best.
Fair   The same weights, batches and steps for all; each arm at the better of two learning rates by a validation part,
       and at each rate with the decay that a few steps choose by flips (60 to 95 % of a dense run's), for SR-STE too;
       the decays to choose among were set on seed 100, by flips.
       `half width` is a dense model of as many feed-forward multiplications as the sparse products have.
Rule   holds                in every seed the recipe's loss is at most 1.01 times the dense model's, and below half
                            width's
       holds in direction   its mean is below those of half width and of no decay and no dense end
Rule 2 holds                in every seed flips with decay on gradients are below those without
       holds in direction   on the mean
"""

import time
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from formwright import tasks
from formwright.claims import Claim, Outcome, Scale, Verdict
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM
from formwright.tasks.base import Task
from formwright.training import Settings, evaluate, fit, seeded
from formwright.training.fst_2by4 import FST, find_decay, flip_rates, transposable_mask

SEEDS = (0, 1, 2)
TEXT = {"smoke": "char-lm(test=0.01, validation=0.01)", "full": "char-lm(test=0.1, validation=0.05)"}
WIDTH = {"smoke": 16, "full": 96}
STEPS, EARLY = {"smoke": 8, "full": 240}, {"smoke": 4, "full": 32}
RATES = {"smoke": (3e-3,), "full": (2e-3, 6e-3)}
DECAYS = {"gradients": (1e-3, 3e-3, 1e-2), "weights": (0.1, 1.0, 10.0)}
REFRESH = 10
MATRIX = {"smoke": (64, 64), "full": (1024, 4096)}

# Of each arm what FST is given beside the decay, which is chosen where it says on what; none = a dense run, watched.
ARMS: dict[str, dict[str, Any]] = {
    "dense": {"dense": 1.0},
    "half width": {"dense": 1.0},
    "no decay": {"dense": 0.0, "decay": 0.0},
    "sr-ste": {"dense": 0.0, "on": "weights"},
    "decay": {"dense": 0.0, "on": "gradients"},
    "recipe": {"on": "gradients"},
}
OURS = ("decay", "recipe")


def run(scale: Scale, seed: int) -> Outcome:
    task = tasks.load(TEXT[scale])
    chosen = {(on, rate): decay(task, scale, seed, rate, on, DECAYS[on]) for on in DECAYS for rate in RATES[scale]}
    found: dict[str, dict[str, float]] = {"ours": {}, "theirs": {}}
    for arm, options in ARMS.items():
        tried = []
        for rate in RATES[scale]:
            given: dict[str, Any] = {"decay": chosen[options["on"], rate]} if "on" in options else {}
            tried.append(trained(task, scale, seed, rate, arm, FST(refresh=REFRESH, **options, **given)))
        _, loss, flips = min(tried)
        found["ours" if arm in OURS else "theirs"] |= {f"loss, {arm}": loss, f"flips, {arm}": flips}
    times = {f"seconds, {name}": value for name, value in mask_times(scale, seed).items()}
    decays = {f"decay at {rate:g}": chosen["gradients", rate] for rate in RATES[scale]}
    return Outcome(scale=scale, seed=seed, measured=found["ours"] | decays | times, baseline=found["theirs"])


def decay(task: Task, scale: Scale, seed: int, rate: float, on: str, candidates: Sequence[float]) -> float:
    early, settings = EARLY[scale], settings_of(scale, seed, rate)
    return find_decay(
        lambda: model(task, scale), task, settings, candidates, steps=early, on=on, refresh=REFRESH
    )[0]  # fmt: skip


def settings_of(scale: Scale, seed: int, rate: float) -> Settings:
    return Settings(
        steps=STEPS[scale], batch_size=16, learning_rate=rate, weight_decay=0.1, betas=(0.9, 0.95), seed=seed
    )


def model(task: Task, scale: Scale, share: float = 1.0) -> TransformerForCausalLM:
    width = WIDTH[scale]
    sizes = {"hidden_size": width, "intermediate_size": int(4 * width * share)}
    return TransformerForCausalLM(TransformerConfig(**{**task.defaults.model, **task.model_config, **sizes}))


def trained(task: Task, scale: Scale, seed: int, rate: float, arm: str, method: FST) -> tuple[float, float, float]:
    """Loss on the validation and on the test part, and flips."""
    seeded(seed)
    made = model(task, scale, 0.5 if arm == "half width" else 1.0)
    flips = flip_rates(fit(made, task, settings_of(scale, seed, rate), methods=[method]))
    quarter = flips[len(flips) // 2 : 3 * len(flips) // 4]
    losses = [evaluate(made, task, split).metrics["loss"] for split in ("validation", "test")]
    return losses[0], losses[1], fmean(quarter)


def mask_times(scale: Scale, seed: int) -> dict[str, float]:
    weight = torch.randn(*MATRIX[scale], generator=torch.Generator().manual_seed(seed))
    return {"masks": seconds(transposable_mask, weight), "greedy masks": seconds(greedy_mask, weight)}


def seconds(search: Callable[[Tensor], Tensor], weight: Tensor) -> float:
    search(weight)
    spent = []
    for _ in range(3):
        started = time.process_time()
        search(weight)
        spent.append(time.process_time() - started)
    return min(spent)


def greedy_mask(weight: Float[Tensor, "o i"]) -> Tensor:
    """The baseline: of a block the largest weights one after the other, while their row and column have room."""
    blocks = weight.abs().unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).transpose(1, 2).reshape(-1, 16)
    kept = torch.zeros(len(blocks), 4, 4)
    each = torch.arange(len(blocks))
    for place in blocks.argsort(1, descending=True).T:
        row, column = place // 4, place % 4
        room = (kept[each, row].sum(1) < 2) & (kept[each, :, column].sum(1) < 2)
        kept[each, row, column] = room.float()
    rows, columns = weight.shape
    return kept.view(rows // 4, columns // 4, 4, 4).transpose(1, 2).reshape(rows, columns).bool()


def near(outcomes: Sequence[Outcome]) -> Verdict:
    recipe = [o.measured["loss, recipe"] for o in outcomes]
    others = {arm: [o.baseline[f"loss, {arm}"] for o in outcomes] for arm in ("dense", "half width", "no decay")}
    rows = zip(recipe, others["dense"], others["half width"], strict=True)
    if all(ours <= 1.01 * dense and ours < half for ours, dense, half in rows):
        return "holds"
    below = fmean(recipe) < min(fmean(others["half width"]), fmean(others["no decay"]))
    return "holds in direction" if below else "does not hold here"


def calm(outcomes: Sequence[Outcome]) -> Verdict:
    gains = [o.baseline["flips, no decay"] - o.measured["flips, decay"] for o in outcomes]
    if min(gains) > 0:
        return "holds"
    return "holds in direction" if fmean(gains) > 0 else "does not hold here"


CLAIMS = [
    Claim(
        statement="Feed-forward layers trained 2:4-sparse with decay on gradients and a dense end come to the loss of "
        "dense training.",
        paper={"convergence as dense": "GPT-2 of 124M to 1.5B, BERT, DeiT, translation"},
        rule="holds: in every seed the recipe's loss is at most 1.01 times the dense model's and below half width's; "
        "holds in direction: its mean is below those of half width and of no decay and no dense end.",
        verdict=near,
        shows=(
            *(f"loss, {arm}" for arm in ARMS),
            *(f"decay at {rate:g}" for rate in (*RATES["smoke"], *RATES["full"])),
            *("seconds, masks", "seconds, greedy masks"),
        ),
    ),
    Claim(
        statement="Decay of masked weights on their gradients calms the flips of the mask.",
        paper={"figure": "flip rates rise and stay without decay, rise and fall with it"},
        rule="holds: in every seed flips with decay on gradients are below those without; holds in direction: on the "
        "mean.",
        verdict=calm,
        shows=tuple(f"flips, {arm}" for arm in ARMS),
    ),
]
