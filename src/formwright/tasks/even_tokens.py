"""even-tokens: every second token, moved to the front.

Row      N uniform symbols below V.
Targets  tokens 2, 4, 6, .. in the first half of the cells (counted from 1), the filler V in the others. Read in both
         directions.
Source   Even Token Prediction, Luo et al.: Your Transformer May Not be as Powerful as You Expect (2022),
         arXiv:2205.13401. With N even the filler alone gives half of the cells.
"""

import torch

from formwright.tasks.base import Columns, Task
from formwright.tasks.support.cells import at_least, cell_task, drawn, synthetic


def task(*, length: int = 16, symbols: int = 100, examples: int = 64 * 2000, seed: int = 0) -> Task:
    """All cells right with learned positions; little beyond the filler with positions inside the softmax alone.

    Args:
        length: N.
        symbols: V, how many different ones.
        examples: training rows.
        seed: of the rows.
    """
    at_least(length=(length, 2), symbols=(symbols, 2))

    def draw(rows: int, random: torch.Generator) -> Columns:
        tokens = torch.randint(symbols, (rows, length), generator=random)
        labels = torch.full_like(tokens, symbols)
        labels[:, : length // 2] = tokens[:, 1::2]
        return Columns(input_ids=tokens, labels=labels)

    return cell_task(
        name="even-tokens",
        **drawn(draw, examples=examples, seed=seed),
        vocab_size=symbols,
        classes=symbols + 1,
        settings=synthetic(steps=2000),
        architecture="encoder",
    )
