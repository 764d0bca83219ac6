"""position-identification: every token says where it stands.

Row      N uniform symbols below V; in a share of the rows one symbol N times.
Targets  0, 1, .., N - 1, whatever the symbols. Read in both directions: a model from left to right can count.
Source   Luo et al.: Your Transformer May Not be as Powerful as You Expect (2022), arXiv:2205.13401; rows of one symbol
         are ours, the case of its theorem.
"""

import torch

from formwright.errors import FormwrightError
from formwright.tasks.base import Columns, Task
from formwright.tasks.support.cells import at_least, cell_task, drawn, synthetic


def task(
    *, length: int = 32, symbols: int = 100, constant: float = 0.25, examples: int = 64 * 1000, seed: int = 0
) -> Task:
    """All cells right with learned positions; chance with positions inside the softmax alone.

    Args:
        length: N.
        symbols: V, how many different ones.
        constant: share of the rows with one symbol throughout.
        examples: training rows.
        seed: of the rows.
    """
    at_least(length=(length, 2), symbols=(symbols, 1))
    if not 0 <= constant <= 1:
        raise FormwrightError(f"constant is {constant}, but it is a share of the rows, from 0 to 1.")

    def draw(rows: int, random: torch.Generator) -> Columns:
        tokens = torch.randint(symbols, (rows, length), generator=random)
        same = torch.rand(rows, 1, generator=random) < constant
        tokens = torch.where(same, tokens[:, :1], tokens)
        return Columns(input_ids=tokens, labels=torch.arange(length).repeat(rows, 1))

    return cell_task(
        name="position-identification",
        **drawn(draw, examples=examples, seed=seed, overlap=True),  # the answer is no property of the row
        vocab_size=symbols,
        classes=length,
        settings=synthetic(steps=1000),
        architecture="encoder",
    )
