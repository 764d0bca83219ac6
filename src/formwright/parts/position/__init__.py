"""Where a token stands: added to it (`embed`), turned into q, k (`rotate`) or put on the scores (`bias`, `scale`)."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from formwright.contracts import Context, Toeplitz, refuse

__all__ = ["by_distance", "places", "refuse_all_but_one_sequence"]


def places(context: Context) -> Int[Tensor, "b {context.queries}"]:
    """Where the queries stand in their own sequence. With a memory the context's positions are the memory's, not
    theirs.
    """
    if context.memory is None:
        return context.query_positions()
    if context.query_places is not None:
        return context.query_places
    return torch.arange(context.queries, device=context.device)[None]


def refuse_all_but_one_sequence(part: str, context: Context) -> None:
    """For positions that only know i - j, the distance between two places of one sequence.

    Raises:
        UnsupportedContext: cross-attention or a grid.
    """
    if context.memory is None and context.grid is None:
        return
    raise refuse(
        part,
        asked="cross-attention" if context.memory is not None else f"a grid of {context.grid}",
        because="it knows the distance between two places of one sequence and no other",
        instead="Choose a position whose card lists it: formwright list --kind position.",
    )


def by_distance(
    context: Context, values: Callable[[Int[Tensor, "..."]], Float[Tensor, "h ..."]]
) -> Toeplitz | Float[Tensor, "b h {context.queries} {context.keys}"]:
    """A bias made of i - j: one number a diagonal, O(q + k), unless `context.positions` sets the distances. In
    cross-attention i counts the queries' sequence and j the memory.
    """
    if context.positions is None and context.memory is None:
        lags = torch.arange(1 - context.queries, context.keys, device=context.device)
        return Toeplitz(values(lags), context.keys)
    keys = torch.arange(context.keys, device=context.device)[None] if context.positions is None else context.positions
    return values(places(context)[:, :, None] - keys[:, None, :]).movedim(0, 1)
