"""few-labels: another classification task of which only some training rows keep their label; the texts of all of them
are there to pre-train on."""

from dataclasses import replace
from pathlib import Path

import torch

from formwright.errors import FormwrightError
from formwright.tasks.base import Task
from formwright.tasks.support.relabelled import Chosen, baselines_of, inner, labels_of


def task(*, of: str = "digits", rows: int = 200, seed: int = 0, validation: float = 0.0, data: Path | None) -> Task:
    """The metrics, and the test, of the other task.

    Args:
        of: a classification task, with options in brackets: imdb(length=128).
        rows: training rows that keep their label; every class has one.
        seed: of the draw.
        validation: share of the other task's training rows set aside before.
        data: the data folder, if the other task needs it.
    """
    whole = inner(of, validation, data)
    labels = labels_of(whole.train)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    classes = labels.unique()
    first = [int(order[(labels[order] == label).nonzero()[0, 0]]) for label in classes]
    if not len(first) <= rows <= len(labels):
        raise FormwrightError(
            f"rows is {rows}, but {of} has {len(first)} classes and {len(labels)} training rows: choose a number "
            "between."
        )
    taken = set(first)
    kept = torch.tensor(first + [i for i in order.tolist() if i not in taken][: rows - len(first)]).sort().values
    train = Chosen(whole.train, kept)
    return replace(
        whole,
        name="few-labels",
        train=train,
        unlabelled=whole.train,
        baselines=lambda: baselines_of(train, whole.test, whole),
    )
