"""DeepScaleLM's blocks: skip and branch weighted so that their sum keeps its variance.

Paper    Kedia et al.: Transformers Get Stable (ICML 2024), arXiv:2403.09635.
Idea     Every sub-layer gives variance 1 by init "deepscalelm"; so do weighted sums whose squared weights sum to 1. The
         weight of the branches falls with the depth N, and gradients neither vanish nor grow.

             pre    x <- l x + dropout(b f(norm(x)))      post    x <- norm(l x + dropout(b f(x)))
             l^2 = 1 - 1 / N      b^2 = 1 / N

         Both are fixed. b multiplies the bias of the branch too.
Differs  In nothing. Of one layer nothing would be left of the stream: it is refused.
"""

from jaxtyping import Float
from torch import Tensor

from formwright.contracts import Context, FeedForward, Mixer, NormFactory
from formwright.parts.block.postnorm import PostNorm
from formwright.parts.block.prenorm import PreNorm
from formwright.parts.norm.deepscalelm import residual


class DeepScaleLMPre(PreNorm):
    """(b, n, d) -> (b, n, d), the norm in the branch.

    Args:
        dim: width d.
        mixer: the token mixer.
        feedforward: none = a block of the mixer alone.
        layers: N, the depth of the stack.
        cross: the mixer that reads the encoder's output; none in an encoder or a plain decoder.
        norm: makes a norm of a given width.
        dropout: probability of dropping an element of what a sub-layer adds.
    """

    def __init__(
        self,
        *,
        dim: int,
        mixer: Mixer,
        feedforward: FeedForward | None,
        norm: NormFactory,
        layers: int,
        cross: Mixer | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim=dim, mixer=mixer, feedforward=feedforward, norm=norm, cross=cross, dropout=dropout)
        self.skip, self.branch = residual(layers)

    def forward(
        self, x: Float[Tensor, "b n d"], context: Context, cross: Context | None = None
    ) -> Float[Tensor, "b n d"]:
        x = self._sum(x, self.mixer(self.mixer_norm(x), context))
        if self.cross is not None:
            x = self._sum(x, self.cross(self.cross_norm(x), cross))
        if self.feedforward is not None:
            x = self._sum(x, self.feedforward(self.feedforward_norm(x), context))
        return x

    def _sum(self, x: Tensor, added: Tensor) -> Tensor:
        return self.skip * x + self._dropped(self.branch * added)


class DeepScaleLMPost(PostNorm):
    """(b, n, d) -> (b, n, d), the norm behind the sum.

    Args:
        dim: width d.
        mixer: the token mixer.
        feedforward: none = a block of the mixer alone.
        layers: N, the depth of the stack.
        cross: the mixer that reads the encoder's output; none in an encoder or a plain decoder.
        norm: makes a norm of a given width.
        dropout: probability of dropping an element of what a sub-layer adds.
    """

    def __init__(
        self,
        *,
        dim: int,
        mixer: Mixer,
        feedforward: FeedForward | None,
        norm: NormFactory,
        layers: int,
        cross: Mixer | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim=dim, mixer=mixer, feedforward=feedforward, norm=norm, cross=cross, dropout=dropout)
        self.skip, self.branch = residual(layers)

    def forward(
        self, x: Float[Tensor, "b n d"], context: Context, cross: Context | None = None
    ) -> Float[Tensor, "b n d"]:
        x = self.mixer_norm(self._sum(x, self.mixer(x, context)))
        if self.cross is not None:
            x = self.cross_norm(self._sum(x, self.cross(x, cross)))
        if self.feedforward is not None:
            x = self.feedforward_norm(self._sum(x, self.feedforward(x, context)))
        return x

    def _sum(self, x: Tensor, added: Tensor) -> Tensor:
        return self.skip * x + self._dropped(self.branch * added)
