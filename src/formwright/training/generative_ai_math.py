"""CEHPO: hyper-parameters by the cross-entropy method: draw settings, train, keep the best, draw near those.

Paper    Li: The Nature of Mathematical Modeling and Probabilistic Optimization Engineering in Generative AI (2024),
         arXiv:2410.18441, whose abstract proposes it for word2vec; the method is Rubinstein's (1999).
Idea     Every hyper-parameter has a distribution of its own: shares over choices, or a Gaussian over the logarithm of a
         number. A round draws M settings, scores each, and moves the distributions v to those of the best rho M:

             v <- smoothing v^ + (1 - smoothing) v          v^ the shares, or mean and deviation, of the elite

         until the rounds are over or the distributions have nearly no entropy left. The best ever drawn is kept.
Differs  All constants are our choice: the paper's equations could not be read. A lucky seed can carry a setting into
         the elite; the leaders of all rounds are therefore scored again under fresh seeds, and the best mean wins.
"""

import math
import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from formwright.errors import FormwrightError
from formwright.training.evaluation import Trainable, evaluate
from formwright.training.loop import fit, seeded
from formwright.training.settings import Settings

LEAST_ENTROPY = 0.05  # of the first distribution's, where a search is over
Setting = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """One of several values, each with its share; at first all alike."""

    values: tuple[Any, ...]
    shares: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.values)) < 2 or len(self.shares) not in (0, len(self.values)):
            raise FormwrightError(f"A choice needs at least two different values, got {self.values}.")
        if not self.shares:
            object.__setattr__(self, "shares", (1 / len(self.values),) * len(self.values))

    def draw(self, luck: random.Random) -> Any:
        return luck.choices(self.values, self.shares)[0]

    def moved(self, elite: list[Any], smoothing: float) -> "Choice":
        found = [elite.count(value) / len(elite) for value in self.values]
        shares = (smoothing * new + (1 - smoothing) * old for new, old in zip(found, self.shares, strict=True))
        return Choice(self.values, tuple(shares))

    @property
    def left(self) -> float:
        """Entropy, as a share of that of equal shares."""
        return -sum(p * math.log(p) for p in self.shares if p) / math.log(len(self.values))


@dataclass(frozen=True)
class Logarithmic:
    """A positive number from `low` to `high`, its logarithm Gaussian; at first two deviations to either end."""

    low: float
    high: float
    mean: float | None = None
    deviation: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < math.inf:
            raise FormwrightError(f"A range needs 0 < low < high, got {self.low} and {self.high}.")
        low, high = math.log(self.low), math.log(self.high)
        if self.mean is None:
            object.__setattr__(self, "mean", (low + high) / 2)
        if self.deviation is None:
            object.__setattr__(self, "deviation", (high - low) / 4)

    def draw(self, luck: random.Random) -> float:
        return min(self.high, max(self.low, math.exp(luck.gauss(self.mean, self.deviation))))

    def moved(self, elite: list[float], smoothing: float) -> "Logarithmic":
        found = [math.log(value) for value in elite]
        mean = smoothing * statistics.fmean(found) + (1 - smoothing) * self.mean
        deviation = smoothing * statistics.pstdev(found) + (1 - smoothing) * self.deviation
        return replace(self, mean=mean, deviation=deviation)

    @property
    def left(self) -> float:
        """The deviation, as a share of the first."""
        return 4 * self.deviation / math.log(self.high / self.low)


Space = Mapping[str, Choice | Logarithmic]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One setting and its score, lower = better; infinite where training failed."""

    setting: Setting
    score: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found.

    Attributes:
        setting: the best of the leaders by its mean score under fresh seeds.
        score: that mean.
        trials: all that was tried in the rounds, in order.
        again: the leaders' scores under fresh seeds, in the order of their first scores.
        space: the distributions at the end.
    """

    setting: Setting
    score: float
    trials: tuple[Trial, ...]
    again: tuple[tuple[Trial, ...], ...]
    space: Space


def cross_entropy_search(
    *,
    space: Space,
    score: Callable[[Setting, int], float],
    samples: int = 20,
    rounds: int = 5,
    elite: float = 0.2,
    smoothing: float = 0.7,
    leaders: int = 3,
    again: int = 3,
    seed: int = 0,
) -> Found:
    """Search a space for the setting of the lowest score.

    Args:
        space: a distribution for every hyper-parameter.
        score: (setting, seed) -> a number to make small, such as a validation loss.
        samples: M, settings a round.
        rounds: at most; a search ends before when little entropy is left.
        elite: rho, the share of a round that the distributions move to.
        smoothing: how far they move, above 0 and at most 1.
        leaders: how many of the best different settings are scored again.
        again: under how many fresh seeds each.
        seed: of the draws, and of the seeds that `score` is given.

    Raises:
        FormwrightError: an empty space, impossible numbers, or no setting that could be scored.
    """
    if not space or samples < 2 or rounds < 1 or leaders < 1 or again < 1:
        raise FormwrightError(
            f"A search needs a space, samples from 2, and rounds, leaders and again from 1; got {len(space)} "
            f"hyper-parameters, samples={samples}, rounds={rounds}, leaders={leaders} and again={again}."
        )
    if not 0 < elite <= 1 or not 0 < smoothing <= 1:
        raise FormwrightError(f"elite and smoothing are shares above 0, got elite={elite} and smoothing={smoothing}.")
    luck, now = random.Random(seed), dict(space)
    trials: list[Trial] = []

    def tried(setting: Setting) -> Trial:
        fresh = luck.randrange(2**31)
        found = float(score(dict(setting), fresh))
        return Trial(setting=setting, score=found if math.isfinite(found) else math.inf, seed=fresh)

    for _ in range(rounds):
        drawn = [tried({name: one.draw(luck) for name, one in now.items()}) for _ in range(samples)]
        trials += drawn
        best = [one for one in sorted(drawn, key=_score)[: max(1, round(elite * samples))] if one.score < math.inf]
        if best:
            now = {name: one.moved([t.setting[name] for t in best], smoothing) for name, one in now.items()}
        if statistics.fmean(one.left for one in now.values()) < LEAST_ENTROPY:
            break
    first: list[Trial] = []
    for trial in sorted(trials, key=_score):
        if len(first) < leaders and trial.score < math.inf and trial.setting not in [one.setting for one in first]:
            first.append(trial)
    if not first:
        raise FormwrightError("No setting of the space could be scored: give ranges in which training works.")
    repeated = tuple(tuple(tried(one.setting) for _ in range(again)) for one in first)
    means = [statistics.fmean(one.score for one in group) for group in repeated]
    if min(means) == math.inf:
        raise FormwrightError("Every leading setting failed under another seed: give ranges in which training works.")
    place = means.index(min(means))
    return Found(setting=first[place].setting, score=means[place], trials=tuple(trials), again=repeated, space=now)


def _score(trial: Trial) -> float:
    return trial.score


def score_by_training(
    *, model: Callable[..., nn.Module], task: Trainable, settings: Settings
) -> Callable[[Setting, int], float]:
    """A score for the search: the validation loss of a model trained under a setting.

    Args:
        model: makes one, from what of the setting is no field of Settings (width, heads ...).
        task: with validation rows, so that the search does not see the test.
        settings: what the search does not vary.

    Raises:
        FormwrightError: the task has no validation rows.
    """
    if task.validation is None:
        raise FormwrightError(f"{task.name} has no validation rows to search by: set some aside, validation=0.1.")
    fields = set(Settings.__dataclass_fields__)

    def score(setting: Setting, seed: int) -> float:
        own = {name: value for name, value in setting.items() if name in fields}
        seeded(seed)
        made = model(**{name: value for name, value in setting.items() if name not in fields})
        try:
            fit(made, task, replace(settings, **own, seed=seed))
        except FormwrightError as failed:
            if "The loss of" not in str(failed):  # anything but a training that diverged is the caller's to know
                raise
            return math.inf
        return evaluate(made, task, "validation").metrics["loss"]

    return score
