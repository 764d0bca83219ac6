"""How long and how fast a model is trained: what a run needs besides model and data."""

import math
from dataclasses import dataclass
from typing import Literal

from formwright import catalog
from formwright.build import parse_spec, split_list
from formwright.errors import FormwrightError

Schedule = Literal["cosine", "constant", "linear"]
Precision = Literal["float32", "bfloat16"]

LAST = 0.02  # the share of the learning rate at which cosine and linear schedules end


def named(methods: str) -> list[str]:
    """The specs of the training methods that + joins: "a(x=1) + b" -> ["a(x=1)", "b"]."""
    return [] if methods == "none" else split_list(methods, "+")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one training run. Budgets are in steps, never in seconds.

    Args:
        steps: optimizer steps.
        batch_size: rows a step, over all processes and accumulated batches together.
        learning_rate: of AdamW, the highest of the schedule.
        schedule: after the warm-up; cosine and linear fall to 2 % of the learning rate.
        warmup: the share of the steps in which the rate rises from 0, below 1.
        weight_decay: on matrices; norms, biases, embeddings and what carries `no_weight_decay` are spared.
        betas: AdamW's two.
        clip: the largest norm of the gradient; 0 clips nothing.
        accumulate: how many batches, one after the other, make up the `batch_size` rows of a process.
        seed: of the order of the data and of dropout. The model was built before: see `seeded`.
        precision: "bfloat16" is autocast: parameters stay float32, and on a CPU attention does too.
        evaluate_every: steps between evaluations for the learning curve; 0 = none.
        save_every: steps between checkpoints to resume from; 0 = none.
        methods: training methods by name, with their options in brackets, joined by +; "none" trains as usual.
    """

    steps: int = 600
    batch_size: int = 64
    learning_rate: float = 2e-3
    schedule: Schedule = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    accumulate: int = 1
    seed: int = 0
    precision: Precision = "float32"
    evaluate_every: int = 0
    save_every: int = 0
    methods: str = "none"

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1),
            ("batch_size", 1),
            ("accumulate", 1),
            ("evaluate_every", 0),
            ("save_every", 0),
        ):
            if getattr(self, name) < least:
                raise FormwrightError(f"{name} is {getattr(self, name)}, but it must be at least {least}.")
        if not self.learning_rate > 0:
            raise FormwrightError(f"learning_rate is {self.learning_rate}, but it must be above 0.")
        if not 0 <= self.warmup < 1:
            raise FormwrightError(f"warmup is {self.warmup}, but it is a share of the steps: 0 or more and below 1.")
        if self.weight_decay < 0 or self.clip < 0:
            raise FormwrightError(
                f"weight_decay and clip must not be negative, got {self.weight_decay} and {self.clip}."
            )
        if self.schedule not in ("cosine", "constant", "linear"):
            raise FormwrightError(f"schedule is {self.schedule!r}, but it must be cosine, constant or linear.")
        if self.precision not in ("float32", "bfloat16"):
            raise FormwrightError(f"precision is {self.precision!r}, but it must be float32 or bfloat16.")
        if self.batch_size % self.accumulate:
            raise FormwrightError(
                f"batch_size {self.batch_size} does not split into accumulate={self.accumulate} equal parts."
            )
        for spec in named(self.methods):
            catalog.find("training", parse_spec(spec)["name"])

    def rate(self, step: int) -> float:
        """The factor on the learning rate in step 0, 1, 2, ..."""
        rise = round(self.warmup * self.steps)
        if step < rise:
            return (step + 1) / rise
        if self.schedule == "constant":
            return 1.0
        done = min(1.0, (step - rise) / max(1, self.steps - 1 - rise))
        fall = (1 + math.cos(math.pi * done)) / 2 if self.schedule == "cosine" else 1 - done
        return LAST + (1 - LAST) * fall
