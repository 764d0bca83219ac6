"""Read a model on a split of a task: every row once, in the split's own order."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from formwright.errors import FormwrightError
from formwright.training.items import Items
from formwright.training.settings import Precision

Split = Literal["train", "validation", "test"]
Batch = dict[str, Tensor]


@runtime_checkable
class Trainable(Protocol):
    """What training needs of a task; `formwright.tasks.Task` is one."""

    @property
    def name(self) -> str: ...
    @property
    def head(self) -> str: ...
    @property
    def train(self) -> Dataset: ...
    @property
    def validation(self) -> Dataset | None: ...
    @property
    def test(self) -> Dataset: ...
    @property
    def collate(self) -> Callable[[Any], Batch]: ...
    @property
    def score(self) -> Callable[[Tensor, Batch], Items]: ...
    @property
    def summary(self) -> Callable[[Items], dict[str, float]]: ...


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The metrics of a split (the main one first) and what was right and wrong in it."""

    metrics: dict[str, float]
    items: Items


def rows(task: Trainable, split: Split) -> Dataset:
    """The dataset of a split.

    Raises:
        FormwrightError: there is no such split, or the task holds no validation data.
    """
    if split not in ("train", "validation", "test"):
        raise FormwrightError(f"{split!r} is no split: use train, validation or test.")
    dataset = getattr(task, split)
    if dataset is None:
        raise FormwrightError(
            f"{task.name} holds no validation rows: set them aside from its training rows with validation=0.1."
        )
    return dataset


def fetch(dataset: Dataset, indices: list[int], collate: Callable[[Any], Batch]) -> Batch:
    """The rows at these places as one batch, at once where the dataset can."""
    many = getattr(dataset, "__getitems__", None)
    return collate(many(indices) if many is not None else [dataset[i] for i in indices])


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Trainable,
    split: Split = "test",
    *,
    batch_size: int = 256,
    precision: Precision = "float32",
) -> Evaluation:
    """Metrics and per-item results of a model on a split. The model's mode and the random state are left as they were.

    Args:
        model: gives an output with `logits` for a batch of the task without its labels.
        task: what to read it on.
        split: "test", "validation" or "train".
        batch_size: rows read at once; it changes nothing but memory and speed. Of a text in `streams`, one row each is
            read at once, whatever is asked for: the model remembers from batch to batch.
        precision: "bfloat16" reads under autocast.

    Raises:
        FormwrightError: the task holds no such split.
    """
    dataset = rows(task, split)
    count = len(dataset)  # type: ignore[arg-type]
    lengths = getattr(dataset, "lengths", None)
    order = torch.arange(count) if lengths is None else torch.argsort(lengths, stable=True)
    device = next(model.parameters()).device
    parts = []
    training = model.training
    model.eval()
    try:
        for places in order.split(getattr(dataset, "streams", batch_size)):
            batch = {key: value.to(device) for key, value in fetch(dataset, places.tolist(), task.collate).items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
            parts.append(task.score(logits.float(), batch))
    finally:
        model.train(training)
    items = Items.join(parts)
    items = items if lengths is None else items.reorder(order)
    return Evaluation(metrics=task.summary(items), items=items)
