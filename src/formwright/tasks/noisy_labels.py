"""noisy-labels: another classification task with a share of its training labels wrong; the test stays clean.

symmetric   a wrong label is any other class, all equally likely
pair-flip   it is the class that follows, the first behind the last

Rows set aside for validation are as noisy as those trained on, as they would be in practice.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from formwright.errors import FormwrightError
from formwright.tasks.base import Task
from formwright.tasks.support.relabelled import Chosen, baselines_of, inner, labels_of

Noise = Literal["symmetric", "pair-flip"]


def task(
    *,
    of: str = "digits",
    share: float = 0.2,
    kind: Noise = "symmetric",
    seed: int = 0,
    validation: float = 0.0,
    data: Path | None,
) -> Task:
    """The metrics of the other task, on its clean test.

    Args:
        of: a classification task, with options in brackets: rt-polarity(length=32).
        share: of the labels that are wrong, 0 or more and below 1.
        kind: which wrong ones.
        seed: of the noise.
        validation: share of the training rows set aside.
        data: the data folder, if the other task needs it.
    """
    if not 0 <= share < 1:
        raise FormwrightError(f"share is {share}, but it is the share of wrong labels: 0 or more and below 1.")
    clean = inner(of, validation, data)
    classes = clean.model_config["num_labels"]
    random = torch.Generator().manual_seed(seed)

    def noisy(rows: Dataset) -> Chosen:
        labels = wrong(labels_of(rows), share, kind, classes, random)
        return Chosen(rows, torch.arange(len(labels)), labels)

    train = noisy(clean.train)
    return replace(
        clean,
        name="noisy-labels",
        train=train,
        validation=None if clean.validation is None else noisy(clean.validation),
        baselines=lambda: baselines_of(train, clean.test, clean),
    )


def wrong(
    labels: Int[Tensor, " n"], share: float, kind: Noise, classes: int, random: torch.Generator
) -> Int[Tensor, " n"]:
    """Labels of which a share, exactly to within one row, is wrong."""
    at = torch.randperm(len(labels), generator=random)[: round(share * len(labels))]
    step = torch.ones_like(at) if kind == "pair-flip" else torch.randint(1, classes, at.shape, generator=random)
    found = labels.clone()
    found[at] = (labels[at] + step) % classes
    return found
