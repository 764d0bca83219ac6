"""What rotary positions share: the coordinates that turn a token, one for every axis, and how they share its channels.

    r channels that turn, A axes: axis a turns r/A of them, at its own coordinate p_a

        angles[p] = (p_1 f, p_2 f, .., p_A f)        f_i = base^(-2i / (r/A)), i = 0 .. r/(2A) - 1

A sequence has one axis, the position. On a grid the tokens lie row by row, so that position p of a grid (T, H, W) is
(p div HW, p div W mod H, p mod W).
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float, Int
from torch import Tensor

from formwright.contracts import Context, refuse
from formwright.errors import FormwrightError

__all__ = [
    "along_axes",
    "channels_by_axis",
    "frequencies",
    "full_precision",
    "length_along",
    "refuse_cross_attention",
    "turned_channels",
]


def frequencies(channels: int, base: float) -> list[float]:
    """Turns a step, in radians, of every pair."""
    return [base ** (-i / channels) for i in range(0, channels, 2)]


def turned_channels(part: str, head_dim: int, *, rotary_dim: int | None = None, fraction: float = 1.0) -> int:
    """How many channels of a head turn, checked.

    Raises:
        FormwrightError: they make no pairs, or are given twice.
    """
    if rotary_dim is not None and fraction != 1:
        raise FormwrightError(
            f"{part} is told twice how many channels turn: give rotary_dim={rotary_dim} or fraction={fraction}."
        )
    turned = int(head_dim * fraction) if rotary_dim is None else rotary_dim
    if turned < 2 or turned % 2 or turned > head_dim:
        raise FormwrightError(
            f"{part} turns pairs of channels: of a head of {head_dim} it cannot turn {turned}; choose an even "
            f"rotary_dim from 2 to {head_dim} or another number of heads."
        )
    return turned


def full_precision(device: torch.device) -> AbstractContextManager:
    """No autocast: angles, and what makes them, are lost in half precision."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def refuse_cross_attention(part: str, context: Context) -> None:
    """A place of the memory is no place of the queries' own sequence.

    Raises:
        UnsupportedContext: cross-attention.
    """
    if context.memory is not None:
        raise refuse(
            part,
            asked="cross-attention",
            because="it knows the distance between two places of one sequence or grid and no other",
            instead="Choose a position whose card lists it: formwright list --kind position.",
        )


def along_axes(part: str, context: Context, tokens: int) -> list[Int[Tensor, "b {tokens}"]]:
    """Where the last `tokens` of the keys stand, a coordinate for every axis of the grid; without one, the position.

    Raises:
        UnsupportedContext: the tokens are not those of the grid.
    """
    if context.positions is None:
        places = torch.arange(context.keys - tokens, context.keys, device=context.device)[None]
    else:
        places = context.positions[:, -tokens:]
    grid = context.grid
    if grid is None:
        return [places]
    cells = math.prod(grid)
    if context.keys > cells or (context.keys < cells and context.positions is None and not context.causal):
        raise refuse(
            part,
            asked=f"{context.keys} tokens on a grid of {grid}",
            because="every token needs a cell of its own, and cells are counted row by row",
            instead="Leave out extra tokens such as a class token, give the positions of the cells that are there, or "
            "leave the grid out to go along the rows.",
        )
    strides = [math.prod(grid[axis + 1 :]) for axis in range(len(grid))]
    return [places // stride % size for stride, size in zip(strides, grid, strict=True)]


def channels_by_axis(part: str, turned: int, axes: Sequence[Tensor]) -> int:
    """How many of the channels that turn belong to each axis.

    Raises:
        UnsupportedContext: they do not share out in pairs.
    """
    if turned % (2 * len(axes)):
        raise refuse(
            part,
            asked=f"a grid of {len(axes)} axes with {turned} channels that turn",
            because="every axis turns the same number of pairs",
            instead=f"Choose a number of heads or a rotary_dim that gives a multiple of {2 * len(axes)}.",
        )
    return turned // len(axes)


def length_along(axis: int, context: Context, dtype: torch.dtype) -> Float[Tensor, "rows 1 1"]:
    """How long the sequence is, or the axis of its grid: positions from 0 to the last real token's, row by row."""
    if context.grid is not None:
        length = torch.full((1,), context.grid[axis], device=context.device)
    elif context.positions is None and context.padding is None:
        length = torch.full((1,), context.keys, device=context.device)
    else:
        places = torch.arange(context.keys, device=context.device) if context.positions is None else context.positions
        if context.padding is not None:
            places = places.expand(context.padding.shape).masked_fill(~context.padding, -1)
        length = places.amax(-1) + 1
    return length.to(dtype)[:, None, None]
