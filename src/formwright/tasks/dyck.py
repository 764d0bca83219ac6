"""dyck: brackets of two types, properly nested; which type closes next?

Row      N + 1 brackets, of which the model reads N: at depth 0 one opens, at depth K one closes, else one opens with
         p = 1/2;
         an opening bracket is of either type with p = 1/2. Tokens: ( 0, [ 1, ) 2, ] 3.
Targets  the next bracket everywhere; the accuracy counts the cells where it closes, among the two closing ones. Left
         to right.
Source   Hewitt et al.: RNNs can generate bounded hierarchical languages (2020), arXiv:2010.07515, section 3.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from formwright.tasks.base import ACCURACY, LOSS, Batch, Columns, Task, accuracy_and_loss
from formwright.tasks.support.cells import at_least, cell_task, drawn, synthetic
from formwright.training.items import Items

TYPES = 2


def task(*, length: int = 64, depth: int = 8, examples: int = 64 * 800, seed: int = 0) -> Task:
    """95 % after about 20 s of one core. Copying the type of the latest opening bracket already gives 80 %.

    Args:
        length: N, brackets read.
        depth: K, how deep they nest at most.
        examples: training rows.
        seed: of the rows.
    """
    at_least(length=(length, 2), depth=(depth, 1))

    def draw(rows: int, random: torch.Generator) -> Columns:
        tokens = brackets(rows, length + 1, depth, random)
        return Columns(input_ids=tokens[:, :-1], labels=tokens[:, 1:])

    splits = drawn(draw, examples=examples, seed=seed)
    return cell_task(
        name="dyck",
        **splits,
        vocab_size=2 * TYPES,
        classes=2 * TYPES,
        settings=synthetic(steps=800),
        score=score,
        summary=accuracy_and_loss,
        metrics=(ACCURACY, LOSS),
        baselines=lambda: baselines(splits["test"]),
    )


def brackets(rows: int, length: int, depth: int, random: torch.Generator) -> Int[Tensor, "rows length"]:
    """All rows at once, bracket after bracket, each with a stack of the types that are open."""
    types = torch.randint(TYPES, (rows, length), generator=random)
    opens = torch.rand(rows, length, generator=random) < 0.5
    tokens = torch.empty((rows, length), dtype=torch.long)
    stack = torch.zeros((rows, depth + 1), dtype=torch.long)
    level = torch.zeros(rows, dtype=torch.long)
    for i in range(length):
        opening = (level == 0) | (opens[:, i] & (level < depth))
        top = stack.gather(1, (level - 1).clamp(min=0)[:, None])[:, 0]
        tokens[:, i] = torch.where(opening, types[:, i], TYPES + top)
        stack.scatter_(
            1, torch.where(opening, level, depth)[:, None], types[:, i : i + 1]
        )  # place `depth` is never read
        level += torch.where(opening, 1, -1)
    return tokens


def score(logits: Float[Tensor, "b n c"], batch: Batch) -> Items:
    """Loss over every bracket, hits over the closing ones."""
    labels = batch["labels"]
    closes = labels >= TYPES
    right = (logits[..., TYPES:].argmax(-1) + TYPES == labels) & closes
    loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)
    cells = torch.full((len(labels),), labels.shape[1])
    return Items(loss=loss.cpu(), cells=cells, hits=right.sum(1).cpu(), trials=closes.sum(1).cpu())


def latest_opener(tokens: Int[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """The type of the last bracket that opened, up to and with each cell."""
    places = torch.arange(tokens.shape[1]).expand_as(tokens)
    return tokens.gather(1, torch.where(tokens < TYPES, places, 0).cummax(1).values)


def baselines(test: Columns) -> dict[str, dict[str, float]]:
    tokens, labels = test.columns["input_ids"], test.columns["labels"]
    closes = labels >= TYPES
    copied = latest_opener(tokens) + TYPES == labels
    return {
        "uniform": {"accuracy": 1 / TYPES, "loss": math.log(2 * TYPES)},
        "copy latest opener": {"accuracy": float(copied[closes].double().mean())},
    }


def distance(tokens: Int[Tensor, "b n"], labels: Int[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """Where a bracket closes next: how many cells lie from the one that opened it to the target; elsewhere 0."""
    whole = torch.cat([tokens, labels[:, -1:]], 1)
    level = torch.where(whole < TYPES, 1, -1).cumsum(1)
    found = torch.zeros_like(labels)
    for i in range(1, whole.shape[1]):
        closing = whole[:, i] >= TYPES
        outer = level[:, :i] == level[:, i : i + 1]  # the last earlier place at this depth lies just before the opener
        before = torch.where(outer, torch.arange(i), -1).amax(1)
        found[:, i - 1] = torch.where(closing, i - before - 1, 0)
    return found
