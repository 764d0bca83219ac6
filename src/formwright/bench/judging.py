"""How many validation rows it takes to judge an allowed loss, which ones, and how sure the judgement is.

Candidate and original read the same rows, so what scatters is the difference row by row. With n rows of spread s the
loss is known to a standard error of s / sqrt(n), which shall be at most a third of the loss allowed:

    n = (3 s / allowed)^2

    accuracy     s^2 = 2 allowed: at the limit, twice the allowed share of rows is answered differently
                 (three are lost for each one won)
    perplexity   s = 0.05 nats a token of a window, which a method at the limit stays below
    fidelity     s = 2 allowed: the spread of a rank correlation of 1 - allowed is about 1 - (1 - allowed)^2

These spreads are set before anything is measured; what was found is told beside every loss.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from formwright.compress.fidelity import MOST
from formwright.compress.modifier import Kind
from formwright.tasks.base import Task
from formwright.training.evaluation import rows
from formwright.training.items import Items

FLOOR, WINDOWS = 500, 100  # fewer rows, or windows of a text, save no time worth having and miss what is rare


def needed(kind: Kind, allowed: float) -> int | float:
    """Rows that tell a loss of this kind to a third of what is allowed; infinite where nothing may be lost."""
    most = MOST if kind == "sentence-embedding" else math.inf
    if allowed == 0:
        return most
    spread = {"causal-lm": 0.05**2, "sentence-embedding": (2 * allowed) ** 2}.get(kind, 2 * allowed)
    count = math.ceil(round(9 * spread / allowed**2, 6))  # rounded first: 18 / 0.1 is more than 180 in binary
    return min(most, max(WINDOWS if kind == "causal-lm" else FLOOR, count))


def judging_on(task: Task, kind: Kind, allowed: float, seed: int) -> Task:
    """The task with no more validation rows than are needed: drawn once, every class by its share."""
    held, most = rows(task, "validation"), needed(kind, allowed)
    total = len(held)  # type: ignore[arg-type]
    if total <= most:
        return task
    return replace(task, validation=subset(held, drawn(total, int(most), seed, labels_of(held))))


def drawn(total: int, count: int, seed: int, labels: Tensor | None) -> list[int]:
    """`count` of `total` places in their order, evenly spread over the rows once they are shuffled and sorted by label:
    each class gives its share to within one row.
    """
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    if labels is not None:
        order = order[torch.argsort(labels[order], stable=True)]
    return order[(torch.arange(count) * total + total // 2) // count].sort().values.tolist()


def labels_of(dataset: Dataset) -> Tensor | None:
    """The class of every row, where a dataset says it without reading the rows."""
    labels = getattr(dataset, "labels", None)
    labels = getattr(dataset, "columns", {}).get("labels") if labels is None else labels
    if labels is None:
        return None
    labels = torch.as_tensor(labels)
    return labels if labels.ndim == 1 else None


def subset(dataset: Dataset, places: list[int]) -> Dataset:
    chosen = Subset(dataset, places)
    lengths = getattr(dataset, "lengths", None)
    if lengths is not None:  # reading puts similar ones into one batch
        chosen.lengths = lengths[places]  # type: ignore[attr-defined]
    return chosen


def standard_error(ours: Items, theirs: Items, *, shares: bool) -> float | None:
    """Of the difference between two models on the same rows; none of a single row.

    Args:
        shares: of the accuracy; else of the loss in nats, which is that of a perplexity as a share.
    """
    if len(ours) < 2:
        return None
    ours_rows, theirs_rows = (
        one.hits.double() / one.trials if shares else one.loss.double() / one.cells for one in (ours, theirs)
    )
    return float((ours_rows - theirs_rows).std() / len(ours) ** 0.5)
