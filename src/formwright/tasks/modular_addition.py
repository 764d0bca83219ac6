"""modular-addition: (a + b) mod N from half of all pairs; the other half is the test.

Row      a, b, "=" (token N).
Target   at "=": (a + b) mod N. Read from left to right.
Source   Power et al.: Grokking (2022), arXiv:2201.02177; here with weight decay 1, so that it is learnt without a
         long wait.
"""

import torch

from formwright.errors import FormwrightError
from formwright.tasks.base import IGNORED, Columns, Task
from formwright.tasks.support.cells import at_least, cell_task, synthetic


def task(*, modulus: int = 59, share: float = 0.5, seed: int = 0) -> Task:
    """Held-out pairs are answered to 100 % after about 40 s of one core.

    Args:
        modulus: N.
        share: of the N^2 pairs that are trained on.
        seed: of the split.
    """
    at_least(modulus=(modulus, 2))
    if not 0 < share < 1 or not 1 <= round(share * modulus**2) < modulus**2:
        raise FormwrightError(f"share is {share}, but it must leave some of the {modulus**2} pairs on both sides.")
    a, b = torch.cartesian_prod(torch.arange(modulus), torch.arange(modulus)).unbind(1)
    tokens = torch.stack([a, b, torch.full_like(a, modulus)], 1)
    labels = torch.full_like(tokens, IGNORED)
    labels[:, -1] = (a + b) % modulus
    order = torch.randperm(len(a), generator=torch.Generator().manual_seed(seed))
    learnt = round(share * len(a))
    everything = Columns(input_ids=tokens, labels=labels)
    return cell_task(
        name="modular-addition",
        train=everything.select(order[:learnt]),
        test=everything.select(order[learnt:]),
        vocab_size=modulus + 1,
        classes=modulus,
        settings=synthetic(steps=2000, batch_size=min(512, learnt), weight_decay=1.0),
    )
