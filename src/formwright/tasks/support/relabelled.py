"""Rows of a classification task with other labels, or fewer rows: what tasks made of other tasks share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from formwright.build import parse_spec
from formwright.errors import FormwrightError
from formwright.tasks.base import Columns, Task, share_of_classes
from formwright.tasks.support.texts import Texts, naive_bayes

CLASSIFICATION = ("sequence-classification", "image-classification")


def inner(of: str, validation: float, data: Path | None) -> Task:
    """The task that another one is made of.

    Raises:
        FormwrightError: it has no classes, one for every row.
    """
    from formwright.tasks import load  # which imports this package's modules by name

    options = parse_spec(of)
    found = load({**options, "validation": validation} if validation else options, data=data)
    if found.head not in CLASSIFICATION:
        raise FormwrightError(
            f"{of} gives no row a class ({found.head}): choose a task of classes, such as rt-polarity."
        )
    return found


def labels_of(dataset: Dataset) -> Int[Tensor, " rows"]:
    """The label of every row."""
    if isinstance(dataset, Columns):
        return dataset.columns["labels"]
    held = getattr(dataset, "labels", None)
    if held is None:
        held = [int(dataset[i]["labels"]) for i in range(len(dataset))]  # type: ignore[arg-type]
    return torch.as_tensor(held)


class Chosen(Dataset):
    """Some rows of a dataset, under labels of their own if such are given.

    Args:
        dataset: whose rows.
        places: which, in order.
        labels: theirs, as many; none = as they are.
    """

    def __init__(
        self, dataset: Dataset, places: Int[Tensor, " rows"], labels: Int[Tensor, " rows"] | None = None
    ) -> None:
        self.dataset, self.places = dataset, places
        self.labels = labels_of(dataset)[places] if labels is None else labels
        if hasattr(dataset, "lengths"):
            self.lengths = dataset.lengths[places]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[int(self.places[index])], "labels": self.labels[index]}

    def __getitems__(self, indices: Sequence[int]) -> Any:
        at = torch.as_tensor(indices)
        many = getattr(self.dataset, "__getitems__", None)
        if many is None:
            return [self[index] for index in indices]
        rows, labels = many(self.places[at].tolist()), self.labels[at]
        if isinstance(rows, dict):
            return {**rows, "labels": labels}
        return [{**row, "labels": label} for row, label in zip(rows, labels, strict=True)]


def baselines_of(train: Dataset, test: Dataset, task: Task) -> dict[str, dict[str, float]]:
    """What needs no model, learnt from these labels."""
    learnt, asked = labels_of(train), labels_of(test)
    classes = task.model_config["num_labels"]
    found = share_of_classes(learnt, asked, classes)
    whole = task.train
    if isinstance(whole, Texts) and isinstance(train, Chosen) and train.dataset is whole and isinstance(test, Texts):
        texts = Texts([whole.tokens[i] for i in train.places.tolist()], learnt, whole.pad)
        found["naive Bayes"] = naive_bayes(texts, test, task.model_config["vocab_size"], classes)
    return found
