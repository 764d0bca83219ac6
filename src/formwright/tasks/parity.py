"""parity: is the number of ones even or odd?

Row      N fair bits, then a "2".
Target   at the "2": the parity. Read in both directions.
"""

import torch

from formwright.tasks.base import IGNORED, Columns, Task
from formwright.tasks.support.cells import at_least, cell_task, drawn, synthetic

ASK = 2


def task(*, length: int = 16, examples: int = 64 * 800, seed: int = 0) -> Task:
    """Not learnt by a two-layer softmax model in 800 steps, neither of 8 nor of 16 bits: it cannot rank such models.

    Args:
        length: N bits. Up to 14 the held-out rows turn up in training, since there are so few.
        examples: training rows.
        seed: of the rows.
    """
    at_least(length=(length, 1))

    def draw(rows: int, random: torch.Generator) -> Columns:
        bits = torch.randint(2, (rows, length), generator=random)
        tokens = torch.cat([bits, torch.full((rows, 1), ASK)], 1)
        labels = torch.full_like(tokens, IGNORED)
        labels[:, -1] = bits.sum(1) % 2
        return Columns(input_ids=tokens, labels=labels)

    return cell_task(
        name="parity",
        **drawn(draw, examples=examples, seed=seed, overlap=length < 15),
        vocab_size=3,
        classes=2,
        architecture="encoder",
        settings=synthetic(steps=800, learning_rate=1e-3),
    )
