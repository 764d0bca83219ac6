"""Sinusoidal positions: a fixed wave of its own for every pair of channels, added to the tokens.

Paper    Vaswani et al.: Attention Is All You Need (NeurIPS 2017), arXiv:1706.03762, section 3.5.
Idea     Channel pair i turns once in 2 pi base^(2i/d) tokens, so a fixed offset is the same linear map everywhere.

             x_p[2i]     <- x_p[2i]     + a sin(p base^(-2i/d))
             x_p[2i + 1] <- x_p[2i + 1] + a cos(p base^(-2i/d))          base = 10000, a = 1

         Nothing is stored and no length is the longest.
Differs  In the paper the tokens are multiplied by sqrt(d) first, which makes them as large as the waves; tokens drawn
         from N(0, 0.02) are drowned by waves of amplitude 1. That factor is the embedding's; `amplitude` balances the
         two from this side. axes="grid", a share of the channels for every axis of a grid, is not in the paper.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from formwright.contracts import Context, refuse
from formwright.errors import FormwrightError
from formwright.parts.position import places


def sinusoids(
    positions: Int[Tensor, "b n"], dim: int, *, base: float = 10000.0, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "b n {dim}"]:
    """sin and cos at every position, channel by channel; an odd width ends with a sine."""
    rates = torch.tensor([base ** (-i / dim) for i in range(0, dim, 2)], dtype=dtype, device=positions.device)
    angles = positions.to(dtype)[..., None] * rates
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)[..., :dim]


class Sinusoidal(nn.Module):
    """Absolute position, added to the tokens. No parameters, no longest length.

    Args:
        dim: width of the tokens, odd ones too.
        base: the slowest pair turns once in about 2 pi base tokens (10000 in the paper).
        amplitude: height of the waves (1 in the paper).
        axes: "sequence" counts the tokens, also those of a grid, row by row; "grid" gives every axis of the context's
            grid an equal share of the channels.
    """

    def __init__(
        self,
        *,
        dim: int,
        base: float = 10000.0,
        amplitude: float = 1.0,
        axes: Literal["sequence", "grid"] = "sequence",
    ) -> None:
        super().__init__()
        if dim < 1 or base <= 1 or amplitude <= 0:
            raise FormwrightError(
                "Sinusoidal positions need dim >= 1, base > 1 and amplitude > 0, "
                f"got dim={dim}, base={base} and amplitude={amplitude}."
            )
        if axes not in ("sequence", "grid"):
            raise FormwrightError(f'Sinusoidal positions have axes="sequence" or "grid", got {axes!r}.')
        self.dim, self.base, self.amplitude, self.axes = dim, base, amplitude, axes

    def embed(self, x: Float[Tensor, "b n d"], context: Context) -> Float[Tensor, "b n d"]:
        """x plus the waves at the queries' places, computed in fp32 whatever the dtype of x (fp64 for fp64).

        Raises:
            UnsupportedContext: axes="grid" without a grid, or with more tokens than it holds.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        coordinates, widths = [places(context)], [self.dim]
        if self.axes == "grid":
            coordinates, widths = self._along_axes(*coordinates, context)
        waves = [
            sinusoids(coordinate, width, base=self.base, dtype=dtype)
            for coordinate, width in zip(coordinates, widths, strict=True)
        ]
        return x + (self.amplitude * torch.cat(waves, -1)).to(x.dtype)

    def _along_axes(self, tokens: Tensor, context: Context) -> tuple[list[Tensor], list[int]]:
        """A coordinate and a width for every axis of the grid; the first axes take what does not divide."""
        grid = context.grid
        if grid is None or context.keys > math.prod(grid) or self.dim < len(grid):
            there = "no grid" if grid is None else f"a grid of {grid}"
            raise refuse(
                'Sinusoidal with axes="grid"',
                asked=f"{context.keys} tokens of width {self.dim} on {there}",
                because="every token needs a cell and every axis a channel",
                instead='Take axes="sequence", which counts the tokens row by row.',
            )
        strides = [math.prod(grid[axis + 1 :]) for axis in range(len(grid))]
        coordinates = [tokens // stride % size for stride, size in zip(strides, grid, strict=True)]
        share, rest = divmod(self.dim, len(grid))
        return coordinates, [share + (axis < rest) for axis in range(len(grid))]
