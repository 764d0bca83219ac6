"""FIRE: a bias learned as a function of distance over position, so that no length is out of its range.

Paper    Li, You, Guruganesh, Ainslie, Ontanon, Zaheer, Sanghai, Yang, Kumar, Bhojanapalli: Functional Interpolation for
         Relative Positions Improves Long Context Transformers (ICLR 2024), arXiv:2310.04418.
Idea     The distance is divided by the query's position, both on a learned logarithmic scale; near the start of a text
         a learned threshold L takes the position's place. What a small network sees is from 0 to 1 at any length:

             b(i, j) = f(psi(i - j) / psi(max(L, i)))        psi(x) = log(c x + 1)
             f       = Linear(1, 32), ReLU, Linear(32, H)    c, L > 0 and f learned in every layer

         FIRE-S (`fire-s`) is one such module for all layers. f is a broken line of 33 pieces: they are found once a
         call and looked up, which stores no N^2 x 32 hidden values. As long as no position is beyond L the bias is set
         by i - j alone and costs N.
Differs  The paper is causal. In both directions we divide by psi(max(L, i, j)) and give f the ratio with the sign of
         i - j, which leaves causal calls as they are. c and L are never weight-decayed; L = |learned multiple x
         threshold| and c taken by its size, as the paper's code has them.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.contracts import Context, Toeplitz
from formwright.errors import FormwrightError
from formwright.parts.position import refuse_all_but_one_sequence

EPSILON = 1e-6


class FIRE(nn.Module):
    """Relative position as a learned function of normalised distance. No longest length.

    Args:
        heads: attention heads.
        threshold: L at the start, in tokens.
        width: hidden units of f.
        c: of psi at the start.
    """

    scope: Literal["layer", "model"] = "layer"

    def __init__(self, *, heads: int, threshold: float = 512.0, width: int = 32, c: float = 0.1) -> None:
        super().__init__()
        if heads < 1 or width < 1 or threshold <= 0 or c <= 0:
            raise FormwrightError(
                "FIRE needs heads and width from 1 and threshold and c above 0, "
                f"got heads={heads}, width={width}, threshold={threshold} and c={c}."
            )
        self.threshold, self.start = threshold, c
        self.hidden, self.out = nn.Linear(1, width), nn.Linear(width, heads)
        self.c, self.multiple = nn.Parameter(torch.empty(())), nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.hidden.reset_parameters()
        self.out.reset_parameters()
        nn.init.constant_(self.c, self.start)
        nn.init.ones_(self.multiple)

    def bias(self, context: Context) -> Toeplitz | Float[Tensor, "b h {context.queries} {context.keys}"]:
        """The bias in fp32 (fp64 for fp64 parameters). A Toeplitz one while L is the larger of all maxima.

        Raises:
            UnsupportedContext: cross-attention or a grid, where |i - j| is no distance.
        """
        refuse_all_but_one_sequence("FIRE", context)
        limit = self.limit()
        # Whether the last key is within L hangs on a number that traced code may not look at.
        if context.positions is None and not torch.compiler.is_compiling() and context.keys - 1 <= limit.item():
            lags = torch.arange(1 - context.queries, context.keys, device=context.device)
            return Toeplitz(self.function(self._ratio(lags, limit)).movedim(-1, 0), context.keys)
        i = context.query_positions()[:, :, None]
        j = torch.arange(context.keys, device=context.device)[None] if context.positions is None else context.positions
        furthest = torch.maximum(i, j[:, None, :]).to(limit.dtype)
        return self.function(self._ratio(i - j[:, None, :], torch.maximum(furthest, limit))).movedim(-1, 1)

    def limit(self) -> Float[Tensor, ""]:
        """L, in tokens."""
        return (self.multiple.to(self._dtype) * self.threshold).abs()

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.c.dtype, torch.float32)

    def psi(self, x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return torch.log1p(self.c.to(x.dtype).abs() * x)

    def _ratio(self, lags: Tensor, furthest: Tensor) -> Tensor:
        """psi(|i - j|) / psi(max(L, i, j)) with the sign of i - j."""
        return lags.sign() * self.psi(lags.abs().to(furthest.dtype)) / (self.psi(furthest) + EPSILON)

    def function(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n h"]:
        """f, from the slopes and offsets of its pieces."""
        weight, bias = self.hidden.weight[:, 0].to(z.dtype), self.hidden.bias.to(z.dtype)
        with torch.no_grad():
            kinks = torch.where(weight == 0, torch.inf, -bias / weight).sort().values
            # A piece's units are those at work at its middle. z is from -1 to 1: pieces beyond -2 and 2 are not met.
            edges = F.pad(F.pad(kinks.clamp(-2, 2), (1, 0), value=-2.0), (0, 1), value=2.0)
            middles = (edges[1:] + edges[:-1]) / 2
            at_work = (middles[:, None] * weight + bias > 0).to(z.dtype)  # (pieces, width)
            piece = torch.bucketize(z.detach(), kinks)
        out = self.out.weight.to(z.dtype).T
        slopes, offsets = (at_work * weight) @ out, (at_work * bias) @ out + self.out.bias.to(z.dtype)
        return torch.addcmul(F.embedding(piece, offsets), F.embedding(piece, slopes), z[..., None])


class FIRES(FIRE):
    """FIRE-S: one function for all layers, so one bias for all layers of a pass."""

    scope = "model"

    def embed(self, x: Float[Tensor, "b n d"], context: Context) -> Float[Tensor, "b n d"]:
        """x as it is. A stack calls this once, before its layers and outside of what checkpointing runs again: the
        time to make the bias that the layers find.
        """
        context.carry[f"fire-s {context.queries} of {context.keys}"] = super().bias(context)
        return x

    def bias(self, context: Context) -> Toeplitz | Float[Tensor, "b h {context.queries} {context.keys}"]:
        made = context.carry.get(f"fire-s {context.queries} of {context.keys}")
        return super().bias(context) if made is None else made
