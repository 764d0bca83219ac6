"""What the synthetic tasks share: rows of tokens of which some cells are scored, drawn from seeds, and their baselines.

Train, validation and test are drawn from one generator each, seeded with (seed, split). Where the space of rows is so
small that a
held-out row can turn up in training, `fresh` draws until none does.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from formwright.errors import FormwrightError
from formwright.tasks.base import (
    ACCURACY,
    IGNORED,
    LOSS,
    WHOLE,
    Columns,
    Defaults,
    Task,
    cells_and_wholes,
    score_cells,
)
from formwright.training import Settings

Draw = Callable[[int, torch.Generator], Columns]  # how many rows, from which generator
SPLITS = ("train", "validation", "test")
HELD_OUT = 2000


def generator(seed: int, split: str) -> torch.Generator:
    """One stream of random numbers a split."""
    if seed < 0:
        raise FormwrightError(f"seed is {seed}, but it must be 0 or more.")
    return torch.Generator().manual_seed(seed * len(SPLITS) + SPLITS.index(split))


def keys(rows: Columns) -> set[bytes]:
    """What a row looks like to a model, for comparing rows."""
    return {row.tobytes() for row in rows.columns["input_ids"].to(torch.int32).numpy()}


def fresh(draw: Draw, count: int, random: torch.Generator, taken: set[bytes], tries: int = 100) -> Columns:
    """Rows none of which is among those taken.

    Raises:
        FormwrightError: nearly every row there is has been taken.
    """
    kept: list[Columns] = []
    found = 0
    for _ in range(tries):
        rows = draw(count, random)
        new = torch.tensor([row.tobytes() not in taken for row in rows.columns["input_ids"].to(torch.int32).numpy()])
        rows = rows.select(new.nonzero()[:, 0][: count - found])
        kept.append(rows)
        found += len(rows)
        if found == count:
            return Columns(**{name: torch.cat([part.columns[name] for part in kept]) for name in rows.columns})
    raise FormwrightError(
        f"There are too few different rows to draw {count} that no held-out row equals: make them longer, or over "
        "more symbols."
    )


def at_least(**sizes: tuple[int, int]) -> None:
    """Options with the least value each may take."""
    for name, (value, least) in sizes.items():
        if value < least:
            raise FormwrightError(f"{name} is {value}, but it must be at least {least}.")


def random_subset(rows: int, of: int, count: int, random: torch.Generator) -> Int[Tensor, "rows count"]:
    """For every row, `count` different numbers below `of`, uniformly, in random order."""
    return torch.rand(rows, of, generator=random).argsort(1)[:, :count]


def label_baselines(rows: Columns, test: Columns, classes: int) -> dict[str, dict[str, float]]:
    """Uniform over the classes, and the training targets' shares."""
    shares = torch.bincount(scored(rows), minlength=classes).double() + 1
    shares /= shares.sum()
    labels = scored(test)
    whole = test.columns["labels"]
    commonest = ((whole == shares.argmax()) | (whole == IGNORED)).all(1).double().mean()
    per_row = (whole != IGNORED).sum(1).double()
    return {
        "uniform": {
            "accuracy": 1 / classes,
            "loss": math.log(classes),
            "whole": float(((1.0 / classes) ** per_row).mean()),
        },
        "majority": {
            "accuracy": float((labels == shares.argmax()).double().mean()),
            "loss": float(-shares[labels].log().mean()),
            "whole": float(commonest),
        },
    }


def scored(rows: Columns) -> Int[Tensor, " cells"]:
    labels = rows.columns["labels"]
    return labels[labels != IGNORED]


def drawn(draw: Draw, *, examples: int, seed: int, overlap: bool = False) -> dict[str, Columns]:
    """The three splits, each from a generator of its own.

    Args:
        draw: makes rows.
        examples: training rows.
        seed: of all rows.
        overlap: a held-out row may turn up in training (where there are so few rows that they all do).
    """
    at_least(examples=(examples, 1))
    test, validation = (draw(HELD_OUT, generator(seed, split)) for split in ("test", "validation"))
    random = generator(seed, "train")
    train = draw(examples, random) if overlap else fresh(draw, examples, random, keys(test) | keys(validation))
    return {"train": train, "validation": validation, "test": test}


def cell_task(
    *,
    name: str,
    train: Columns,
    test: Columns,
    vocab_size: int,
    classes: int,
    settings: Settings,
    validation: Columns | None = None,
    architecture: Literal["encoder", "decoder"] = "decoder",
    pad: int | None = None,
    **rest: Any,
) -> Task:
    """A task of rows of cells.

    Args:
        vocab_size, classes: how many tokens and how many targets there are.
        architecture: "decoder" reads from left to right.
        pad: the padding token.
        rest: fields of the task that differ from the usual.
    """
    config = {
        "architecture": architecture,
        "vocab_size": vocab_size,
        "num_labels": classes,
        "max_position_embeddings": train.columns["input_ids"].shape[1],
        "pad_token_id": pad,
    }
    usual = {
        "score": score_cells,
        "summary": cells_and_wholes,
        "metrics": (ACCURACY, LOSS, WHOLE),
        "baselines": lambda: label_baselines(train, test, classes),
    }
    return Task(
        name=name,
        head="token-classification",
        model_config=config,
        train=train,
        validation=validation,
        test=test,
        defaults=Defaults(settings=settings, model=SMALL),
        **(usual | rest),
    )


SMALL: Mapping[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "init": "fan-in",
    "position": "rope",
}


def synthetic(*, steps: int, **changes: Any) -> Settings:
    """The settings that synthetic tasks were calibrated with: a constant rate after 100 steps of warm-up."""
    usual = {
        "steps": steps,
        "batch_size": 64,
        "learning_rate": 2e-3,
        "schedule": "constant",
        "warmup": min(0.5, 100 / steps),
        "weight_decay": 0.1,
        "betas": (0.9, 0.98),
    }
    return Settings(**(usual | changes))
