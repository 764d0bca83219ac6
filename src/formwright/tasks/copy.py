"""copy: a row of symbols, then the model must say it again.

Row      N symbols 1 .. V, uniform; then N cells "0".
Targets  on the last N cells: the symbols in order. Read from left to right.
"""

import torch

from formwright.tasks.base import IGNORED, Columns, Task
from formwright.tasks.support.cells import at_least, cell_task, drawn, synthetic


def task(*, length: int = 16, symbols: int = 16, examples: int = 64 * 1600, seed: int = 0) -> Task:
    """The plainest test of memory over a distance.

    Args:
        length: N, symbols to remember.
        symbols: V, kinds of them.
        examples: training rows.
        seed: of the rows.
    """
    at_least(length=(length, 1), symbols=(symbols, 2))

    def draw(rows: int, random: torch.Generator) -> Columns:
        held = torch.randint(1, symbols + 1, (rows, length), generator=random)
        tokens = torch.cat([held, torch.zeros_like(held)], 1)
        labels = torch.cat([torch.full_like(held, IGNORED), held - 1], 1)
        return Columns(input_ids=tokens, labels=labels)

    return cell_task(
        name="copy",
        **drawn(draw, examples=examples, seed=seed),
        vocab_size=symbols + 1,
        classes=symbols,
        settings=synthetic(steps=1600),
    )
