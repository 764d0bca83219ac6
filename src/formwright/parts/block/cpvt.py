"""The block of CPVT: any other block, with a position generator after the first of them.

Paper    Chu, Tian, Zhang, Wang, Shen: Conditional Positional Encodings for Vision Transformers (ICLR 2023),
         arXiv:2102.10882.
Idea     The first block sees tokens without places; what it makes of them is convolved over their grid (PEG), and all
         later blocks know where things are. No position is added to the input.

             x <- block_0(x)      x <- x + conv(x) + b      x <- block_1(x) ..

         With pooling="mean" the model is CPVT-GAP; with class_token=True and pooling="first" the class token goes past
         the convolution, as in CPVT.
Differs  PEG stands after the first `after` blocks, 1 in the paper's default and 5 in its larger variants. Sequences are
         served, too: see parts/position/cpvt.py.
"""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from formwright.build import build
from formwright.contracts import Context, FeedForward, Mixer, NormFactory
from formwright.errors import FormwrightError
from formwright.parts.position.cpvt import PEG


class CPVT(nn.Module):
    """(b, n, d) -> (b, n, d): a block, and PEG after it in the first layers.

    Args:
        dim: width d.
        mixer: the token mixer.
        feedforward: none = a block of the mixer alone.
        norm: makes a norm of a given width.
        cross: the mixer that reads the encoder's output.
        dropout: probability of dropping an element of what a sub-layer adds.
        layer: which layer this is.
        causal: whether tokens of a sequence look back alone.
        grid: what the tokens lie on; none = a sequence.
        inner: the block itself: where its norms are.
        after: how many of the first blocks a PEG follows.
        kernel: side of the convolution, odd.
    """

    def __init__(
        self,
        *,
        dim: int,
        mixer: Mixer,
        feedforward: FeedForward | None,
        norm: NormFactory,
        cross: Mixer | None = None,
        dropout: float = 0.0,
        layer: int = 0,
        causal: bool = False,
        grid: tuple[int, ...] | None = None,
        inner: Literal["pre", "post", "sub-ln"] = "pre",
        after: int = 1,
        kernel: int = 3,
    ) -> None:
        super().__init__()
        if after < 1:
            raise FormwrightError(f"CPVT needs a PEG after at least one block, got after={after}.")
        parts = {"mixer": mixer, "feedforward": feedforward, "norm": norm, "cross": cross}
        self.inner = build("block", inner, dim=dim, dropout=dropout, **parts)
        self.peg = PEG(dim=dim, grid=grid, causal=causal, kernel=kernel) if layer < after else None
        self.final_norm = self.inner.final_norm

    @property
    def mixer(self) -> Mixer:
        return self.inner.mixer

    @property
    def feedforward(self) -> FeedForward | None:
        return self.inner.feedforward

    @property
    def cross(self) -> Mixer | None:
        return self.inner.cross

    def forward(
        self, x: Float[Tensor, "b n d"], context: Context, cross: Context | None = None
    ) -> Float[Tensor, "b n d"]:
        if self.peg is None:
            return self.inner(x, context, cross)
        self.peg.check(x, context)  # before any work
        return self.peg.embed(self.inner(x, context, cross), context)
