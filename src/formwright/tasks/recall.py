"""recall: pairs of key and value, then keys; at each the model must say its value (multi-query associative recall).

Row      keys are K different ones of 1 .. V, values uniform of V.
         pair=1: K cells, a token for each pair (1 + V + V key' + value', both from 0); then N - K cells, each one of
         the K keys, uniform.
         pair=2: k1 v1 .. kK vK; then, of N - 2K cells, K chosen uniformly hold the keys in shuffled order, the rest 0;
                 with dense=True every one of them is one of the K keys, uniform.
Targets  at each key after the pairs: its value. Read from left to right.
Source   Arora et al.: Zoology (2023), arXiv:2312.04927, section 3.
"""

from typing import Literal

import torch

from formwright.errors import FormwrightError
from formwright.tasks.base import IGNORED, Columns, Task
from formwright.tasks.support.cells import at_least, cell_task, drawn, random_subset, synthetic


def task(
    *,
    pair: Literal[1, 2] = 1,
    length: int = 32,
    pairs: int = 8,
    symbols: int = 16,
    dense: bool = False,
    examples: int = 64 * 600,
    seed: int = 0,
) -> Task:
    """With pairs of one token learnt in 100 steps; with pairs of two a two-layer softmax model stays at 1/K for
    thousands of steps.

    Args:
        pair: tokens a pair: 1 or 2. A mixer with a built-in shift has it easier with 2.
        length: N, all cells.
        pairs: K.
        symbols: V, kinds of keys and of values.
        dense: with pair=2, ask in every later cell; pair=1 always does.
        examples: training rows.
        seed: of the rows.
    """
    at_least(pairs=(pairs, 1), symbols=(symbols, 2))
    if pairs > symbols:
        raise FormwrightError(f"pairs is {pairs}, but only symbols={symbols} different keys exist.")
    told = pair * pairs
    least = told + (1 if dense or pair == 1 else pairs)
    if length < least:
        raise FormwrightError(f"length is {length}, but {pairs} pairs and their questions need at least {least} cells.")

    def draw(rows: int, random: torch.Generator) -> Columns:
        keys = random_subset(rows, symbols, pairs, random)
        values = torch.randint(symbols, (rows, pairs), generator=random)
        if pair == 1:
            facts = 1 + symbols + keys * symbols + values
        else:
            facts = torch.stack([1 + keys, 1 + symbols + values], 2).flatten(1)
        later = length - told
        labels = torch.full((rows, length), IGNORED)
        tokens = torch.zeros((rows, length), dtype=torch.long)
        tokens[:, :told] = facts
        if dense or pair == 1:
            asked = torch.randint(pairs, (rows, later), generator=random)
            places = torch.arange(told, length).expand(rows, -1)
        else:
            asked = random_subset(rows, pairs, pairs, random)
            places = told + random_subset(rows, later, pairs, random)
        tokens.scatter_(1, places, 1 + keys.gather(1, asked))
        labels.scatter_(1, places, values.gather(1, asked))
        return Columns(input_ids=tokens, labels=labels)

    return cell_task(
        name="recall",
        **drawn(draw, examples=examples, seed=seed),
        vocab_size=1 + symbols + symbols * (symbols if pair == 1 else 1),
        classes=symbols,
        settings=synthetic(steps=600),
    )
