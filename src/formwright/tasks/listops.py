"""listops: nested lists of digits under MAX, MIN, MED and SM (sum modulo 10); what is the outermost one's value?

Row      padding on the left, the expression, CLS. A node is a digit with p = 0.4 (not the root; always at level 0),
         else "[OP", two to
         four nodes one level lower, "]". MED is the upper median. Expressions longer than N are drawn again.
Target   at CLS: the value, 0 to 9. Read in both directions, padding masked.
Source   Nangia, Bowman: ListOps (2018), arXiv:1804.06028; shortened.
"""

import random as python

import torch

from formwright.tasks.base import IGNORED, Columns, Task
from formwright.tasks.support.cells import at_least, cell_task, drawn, synthetic

PAD, DIGIT, MAX, MIN, MED, SM, END, CLS = 0, 1, 11, 12, 13, 14, 15, 16  # digit d is token DIGIT + d
VOCAB = 17
VALUE = {MAX: max, MIN: min, MED: lambda values: sorted(values)[len(values) // 2], SM: lambda values: sum(values) % 10}
SHARE_OF_DIGITS = 0.4


def task(*, length: int = 64, depth: int = 3, examples: int = 16_000, seed: int = 0) -> Task:
    """A two-layer softmax model stays at 37 to 39 % (chance 12 %) after 25 s of one core: it cannot rank methods at
    that budget.

    Args:
        length: N, tokens an expression may have.
        depth: the root's level; 1 = plain lists.
        examples: training rows.
        seed: of the rows.
    """
    at_least(length=(length, 6), depth=(depth, 1))

    def draw(rows: int, random: torch.Generator) -> Columns:
        source = python.Random(int(torch.randint(2**62, (1,), generator=random)))
        tokens = torch.full((rows, length + 1), PAD)
        labels = torch.full_like(tokens, IGNORED)
        for row in range(rows):
            expression, value = short(source, depth, length)
            tokens[row, length - len(expression) :] = torch.tensor([*expression, CLS])
            labels[row, -1] = value
        return Columns(input_ids=tokens, attention_mask=(tokens != PAD).long(), labels=labels)

    return cell_task(
        name="listops",
        **drawn(draw, examples=examples, seed=seed),
        vocab_size=VOCAB,
        classes=10,
        architecture="encoder",
        pad=PAD,
        settings=synthetic(steps=1200, learning_rate=1e-3),
    )


def short(source: python.Random, depth: int, length: int) -> tuple[list[int], int]:
    """An expression of at most `length` tokens, and its value."""
    while True:
        expression, value = node(source, depth, root=True)
        if len(expression) <= length:
            return expression, value


def node(source: python.Random, level: int, *, root: bool = False) -> tuple[list[int], int]:
    if level == 0 or (not root and source.random() < SHARE_OF_DIGITS):
        digit = source.randrange(10)
        return [DIGIT + digit], digit
    operator = source.choice((MAX, MIN, MED, SM))
    below = [node(source, level - 1) for _ in range(source.randint(2, 4))]
    tokens = [operator, *(token for part, _ in below for token in part), END]
    return tokens, VALUE[operator]([value for _, value in below])
