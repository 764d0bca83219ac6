"""What a task is: data, the head that fits it, what is counted, trivial baselines, and settings known to work.

A task is found by its module: `tasks/selective_copy.py` holds `task(*, length=32, ...)` and is called
`selective-copy(length=32)`.
Every module's options are the keywords of that function; `data`, where it is one, is the data folder and no option.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from formwright.training import Settings
from formwright.training.items import Items

Head = Literal[
    "causal-lm",
    "masked-lm",
    "token-classification",
    "sequence-classification",
    "image-classification",
    "sentence-embedding",
]
Batch = dict[str, Tensor]
IGNORED = -100  # the label of a cell that is not scored


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number about a model on a task: what it is called, its unit ("" = a share), and which way is better."""

    name: str
    unit: str = ""
    better: Literal["higher", "lower"] = "higher"

    def beats(self, ours: float, theirs: float) -> bool:
        return ours > theirs if self.better == "higher" else ours < theirs


ACCURACY = Metric(name="accuracy")
WHOLE = Metric(name="whole", unit="share of sequences without a mistake")
LOSS = Metric(name="loss", unit="nats", better="lower")
BITS = Metric(name="bits_per_byte", unit="bits", better="lower")
PERPLEXITY = Metric(name="perplexity", better="lower")


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What is known to work: training settings, and the fields of TransformerConfig a small model takes (the caller
    may change all)."""

    settings: Settings
    model: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A dataset, a metric and baselines under one name.

    Args:
        name: as it is typed, with the options that are not the default.
        head: which of the model's heads it needs.
        model_config: the fields of TransformerConfig the data dictates.
        train, validation, test: rows, each a dict of tensors that goes into the model's forward; no validation rows
            unless some were
            set aside (`validation=0.1`) or are drawn anew (synthetic tasks).
        collate: a list of rows, or what `__getitems__` of the dataset gave, as one batch.
        score: logits and batch -> what was right, item by item.
        summary: items -> the metrics, the main one first.
        metrics: what `summary` gives, in its order.
        baselines: what needs no model, by name; computed when called.
        defaults: settings and sizes known to work.
        tokenizer: of a text task, a `tokenizers.Tokenizer`.
        unlabelled: rows to pre-train on, whose labels are not to be looked at; none = the training rows.
    """

    name: str
    head: Head
    model_config: Mapping[str, Any]
    train: Dataset
    test: Dataset
    metrics: Sequence[Metric]
    baselines: Callable[[], dict[str, dict[str, float]]]
    defaults: Defaults
    validation: Dataset | None = None
    collate: Callable[[Any], Batch] = field(default=lambda rows: collate(rows))
    score: Callable[[Tensor, Batch], Items] = field(default=lambda logits, batch: score_rows(logits, batch))
    summary: Callable[[Items], dict[str, float]] = field(default=lambda items: accuracy_and_loss(items))
    tokenizer: Any = None
    unlabelled: Dataset | None = None

    @property
    def main(self) -> Metric:
        """The metric that ranks."""
        return self.metrics[0]


class Columns(Dataset):
    """Rows of equal shape, held as one tensor a column. Many rows are fetched at once."""

    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns
        self.count = len(next(iter(columns.values())))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        return {name: column[index] for name, column in self.columns.items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        places = torch.as_tensor(indices)
        return {name: column[places] for name, column in self.columns.items()}

    def select(self, rows: Tensor) -> "Columns":
        return Columns(**{name: column[rows] for name, column in self.columns.items()})


def collate(rows: Batch | Sequence[Batch]) -> Batch:
    """One batch of equally long rows; a batch that was fetched as one passes through."""
    if isinstance(rows, Mapping):
        return dict(rows)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def hold_out(rows: Columns, share: float, seed: int = 0) -> tuple[Columns, Columns | None]:
    """Training rows and the share of them set aside for validation, drawn once and for all."""
    if share == 0:
        return rows, None
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    aside = max(1, round(share * len(rows)))
    return rows.select(order[aside:].sort().values), rows.select(order[:aside].sort().values)


def score_rows(logits: Float[Tensor, "b c"], batch: Batch) -> Items:
    """One answer a row: images and texts."""
    labels = batch["labels"]
    one = torch.ones_like(labels)
    return Items(
        loss=F.cross_entropy(logits, labels, reduction="none").cpu(),
        cells=one.cpu(),
        hits=(logits.argmax(-1) == labels).long().cpu(),
        trials=one.cpu(),
    )


def score_cells(logits: Float[Tensor, "b n c"], batch: Batch) -> Items:
    """An answer a cell, where the label is no -100."""
    return count_cells(logits, batch["labels"])


def score_next(logits: Float[Tensor, "b n c"], batch: Batch) -> Items:
    """Each token is the answer to those before it."""
    return count_cells(logits[:, :-1], batch["labels"][:, 1:])


def count_cells(logits: Float[Tensor, "b n c"], labels: Int[Tensor, "b n"]) -> Items:
    scored = labels != IGNORED
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
    cells = scored.sum(1).cpu()
    return Items(
        loss=losses.sum(1).cpu(),
        cells=cells,
        hits=((logits.argmax(-1) == labels) & scored).sum(1).cpu(),
        trials=cells,
    )


def accuracy_and_loss(items: Items) -> dict[str, float]:
    return {"accuracy": items.accuracy(), "loss": items.mean_loss()}


def cells_and_wholes(items: Items) -> dict[str, float]:
    return {"accuracy": items.accuracy(), "loss": items.mean_loss(), "whole": items.whole()}


def share_of_classes(train: Int[Tensor, " m"], test: Int[Tensor, " n"], classes: int) -> dict[str, dict[str, float]]:
    """The two baselines that look at no input: all classes alike, and the training labels' shares (the answer: the
    commonest)."""
    counts = (
        torch.bincount(train, minlength=classes).double() + 1
    )  # one more, so that an unseen class costs no infinite loss
    shares = counts / counts.sum()
    return {
        "uniform": {"accuracy": 1 / classes, "loss": math.log(classes)},
        "majority": {
            "accuracy": float((test == counts.argmax()).double().mean()),
            "loss": float(-shares[test].log().mean()),
        },
    }
