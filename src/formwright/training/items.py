"""What a model did on every single item of a split, so that two models can be tested against each other item by
item."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Items:
    """One row an item (an image, a text, a sequence), all over its scored cells.

    Args:
        loss: the sum of the cells' losses in nats.
        cells: how many cells the loss was summed over.
        hits: how many of the trials were right.
        trials: how many cells the accuracy counts; most often the same as `cells`.
    """

    loss: Float[Tensor, " n"]
    cells: Int[Tensor, " n"]
    hits: Int[Tensor, " n"]
    trials: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def correct(self) -> Tensor:
        """Whether every trial of the item was right: what McNemar's test counts."""
        return self.hits == self.trials

    def mean_loss(self) -> float:
        """Nats a cell over all items."""
        return float(self.loss.double().sum()) / int(self.cells.sum())

    def accuracy(self) -> float:
        """The share of right trials over all items."""
        return int(self.hits.sum()) / int(self.trials.sum())

    def whole(self) -> float:
        """The share of items without a mistake."""
        return float(self.correct.double().mean())

    def reorder(self, order: Tensor) -> "Items":
        """The items as they stood before they were read in this order."""
        back = torch.argsort(order)
        return Items(loss=self.loss[back], cells=self.cells[back], hits=self.hits[back], trials=self.trials[back])

    @staticmethod
    def join(parts: Sequence["Items"]) -> "Items":
        columns = {
            name: torch.cat([getattr(part, name) for part in parts]) for name in ("loss", "cells", "hits", "trials")
        }
        return Items(**columns)
