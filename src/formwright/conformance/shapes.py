"""Shapes, finiteness, and rows of a batch that do not meet."""

import torch

from formwright.conformance.check import check, ensure, ensure_close
from formwright.conformance.subject import ALONE, LENGTH, Subject, tokens
from formwright.contracts import Context
from formwright.errors import FormwrightError

SIZES = (1, 7, 63)


@check()
def shape_is_kept(subject: Subject) -> None:
    """(b, n, d) -> (b, n, d), all finite, for 1, 7 and 63 tokens and an odd batch."""
    for causal in subject.causals or (False,):
        stand = subject.stand(causal=causal)
        for n in SIZES:
            for batch in (1, 3):
                x = tokens(n, batch=batch)
                y = stand(x, Context.of(x, causal=causal))
                ensure(y.shape == x.shape, f"{subject} turns {tuple(x.shape)} into {tuple(y.shape)} (causal={causal}).")
                ensure(
                    bool(torch.isfinite(y).all()),
                    f"{subject} gives NaN or infinity on plain tokens {tuple(x.shape)} (causal={causal}).",
                )


@check()
def input_is_left_alone(subject: Subject) -> None:
    """The tensors handed in are the caller's: nothing is written into them."""
    for causal in subject.causals or (False,):
        x = tokens(9)
        kept = x.clone()
        with torch.no_grad():
            subject.stand(causal=causal)(x, Context.of(x, causal=causal))
        ensure(torch.equal(x, kept), f"{subject} writes into the tokens it is given.")


@check()
def batch_order_does_not_matter(subject: Subject) -> None:
    """Shuffled rows in, the same rows out in the shuffled order."""
    order = torch.tensor([3, 0, 4, 1, 2])
    for causal in subject.causals or (False,):
        stand, x = subject.stand(causal=causal), tokens(7, batch=5)
        context = Context.of(x, causal=causal)
        ensure_close(
            stand(x[order], context),
            stand(x, context)[order],
            f"{subject}: the place of a row in the batch changes its output.",
        )


@check()
def batch_equals_one_by_one(subject: Subject) -> None:
    """A row alone gives what it gives among others."""
    for causal in subject.causals or (False,):
        stand, x = subject.stand(causal=causal), tokens(7)
        together = stand(x, Context.of(x, causal=causal))
        for i in range(len(x)):
            alone = stand(x[i : i + 1], Context.of(x[i : i + 1], causal=causal))
            ensure_close(alone, together[i : i + 1], f"{subject} gives a row another output alone than in a batch.")


@check(slots=ALONE)
def every_token_is_alone(subject: Subject) -> None:
    """What a token becomes depends on that token and no other."""
    stand, x = subject.stand(), tokens(7)
    together = stand(x, Context.of(x))
    for t in range(x.shape[1]):
        alone = stand(x[:, t : t + 1], Context.of(x[:, t : t + 1]))
        ensure_close(
            alone, together[:, t : t + 1], f"{subject} lets tokens meet: token {t} alone gives another output."
        )


@check("grid")
def grid_is_taken(subject: Subject) -> None:
    """With a grid in the context the shape is kept; a non-square grid is taken unless the card says needs-square."""
    grids = ((3, 3),) if "needs-square" in subject.capabilities else ((3, 3), (2, 5))
    for grid in grids:
        n = grid[0] * grid[1]
        try:
            stand, x = subject.stand(causal=False, grid=grid, length=max(n, LENGTH)), tokens(n)
            y = stand(x, Context.of(x, grid=grid))
        except FormwrightError as refused:
            raise AssertionError(f"{subject} declares grid, but refuses a {grid} one: {refused}") from refused
        ensure(y.shape == x.shape and bool(torch.isfinite(y).all()), f"{subject} fails on a {grid} grid.")
