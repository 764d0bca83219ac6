"""sorting: a list of numbers, then the same list in order, told step by step.

Row      N uniform numbers below V (repeats allowed), the separator V, the sorted list without its last number.
Targets  from the separator on: the sorted list (teacher forcing). Read from left to right.
"""

import torch

from formwright.tasks.base import IGNORED, Columns, Task
from formwright.tasks.support.cells import at_least, cell_task, drawn, synthetic


def task(*, length: int = 16, symbols: int = 32, examples: int = 64 * 1200, seed: int = 0) -> Task:
    """98 % of the numbers and 74 % of whole lists after about 40 s of one core.

    Args:
        length: N numbers.
        symbols: V, how many different ones.
        examples: training rows.
        seed: of the rows.
    """
    at_least(length=(length, 1), symbols=(symbols, 2))

    def draw(rows: int, random: torch.Generator) -> Columns:
        numbers = torch.randint(symbols, (rows, length), generator=random)
        ordered = numbers.sort(1).values
        tokens = torch.cat([numbers, torch.full((rows, 1), symbols), ordered[:, :-1]], 1)
        labels = torch.cat([torch.full_like(numbers, IGNORED), ordered], 1)
        return Columns(input_ids=tokens, labels=labels)

    return cell_task(
        name="sorting",
        **drawn(draw, examples=examples, seed=seed),
        vocab_size=symbols + 1,
        classes=symbols,
        settings=synthetic(steps=1200),
    )
