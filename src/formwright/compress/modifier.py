"""What a compression method is, and what it works with.

A modifier changes a model in place, in four acts that the pipeline calls in this order:

    check        can it be applied to this model? raises the reason if not
    calibrate    look at the model on data, change nothing
    apply        the change
    finetune     train what is left, if the method does
    finalize     fold, compact, freeze

Methods are found through the catalogue ([provides."modifier/<name>"]) and built from a recipe's step; their options
are the constructor's typed keywords.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from formwright.errors import FormwrightError
from formwright.training import Settings
from formwright.training.evaluation import Trainable, fetch

Kind = Literal["text-classification", "image-classification", "causal-lm", "sentence-embedding"]


@dataclass(kw_only=True)
class Data:
    """The user's data as a modifier sees it.

    Args:
        task: rows, collation and score.
        kind: what the model is for.
        teacher: the original model, frozen, for steps that learn from it.
        settings: of training, where a step trains and says nothing else.
        seed: of the rows that `batches` draws.
    """

    task: Trainable
    kind: Kind
    teacher: nn.Module | None = None
    settings: Settings = field(default_factory=Settings)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise FormwrightError(f"{self.kind!r} is no kind of task: use {', '.join(get_args(Kind))}.")

    def batches(self, count: int, *, batch_size: int = 32, labels: bool = False) -> Iterator[dict[str, Tensor]]:
        """`count` batches of training rows, drawn without repetition, the same ones every time.

        Args:
            labels: whether the batches hold them.

        Raises:
            FormwrightError: there are no training rows.
        """
        rows = len(self.task.train)  # type: ignore[arg-type]
        if not rows:
            raise FormwrightError(f"{self.task.name} has no training rows to calibrate on.")
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(self.seed))
        for places in order.split(batch_size)[:count]:
            batch = fetch(self.task.train, places.tolist(), self.task.collate)
            yield {name: value for name, value in batch.items() if labels or name != "labels"}


class Modifier:
    """One compression method. A subclass overrides the acts it has."""

    simulated: ClassVar[bool] = False  # outputs as the method gives them, without its gain in speed
    exact: ClassVar[bool] = False  # changes how the model runs, not what it computes
    trains: ClassVar[bool] = False  # takes training time
    uses_teacher: ClassVar[bool] = False  # reads data.teacher

    def check(self, model: PreTrainedModel) -> None:
        """Raise FormwrightError when the method cannot be applied to this model."""

    def calibrate(self, model: PreTrainedModel, data: Data) -> None:
        """Collect what the change depends on; the model stays as it is."""

    def apply(self, model: PreTrainedModel) -> None:
        """Change the model."""

    def finetune(self, model: PreTrainedModel, data: Data) -> None:
        """Train what is left."""

    def finalize(self, model: PreTrainedModel) -> None:
        """Bring the model into the form it is used in."""
