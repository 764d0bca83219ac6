"""The pre-norm block.

Paper    Xiong et al.: On Layer Normalization in the Transformer Architecture (ICML 2020), arXiv:2002.04745; first in
         GPT-2.
Idea     Every sub-layer reads a normalised copy of the residual stream, which itself is never normalised until the end.

             x <- x + mixer(norm(x))      x <- x + cross(norm(x))      x <- x + feedforward(norm(x))

Differs  In nothing. A stack of these ends with a norm of its own.
"""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.contracts import Context, FeedForward, Mixer, NormFactory


class PreNorm(nn.Module):
    """(b, n, d) -> (b, n, d).

    Args:
        dim: width d.
        mixer: the token mixer.
        feedforward: none = a block of the mixer alone.
        cross: the mixer that reads the encoder's output; none in an encoder or a plain decoder.
        norm: makes a norm of a given width.
        dropout: probability of dropping an element of what a sub-layer adds.
    """

    final_norm: ClassVar[bool] = True

    def __init__(
        self,
        *,
        dim: int,
        mixer: Mixer,
        feedforward: FeedForward | None,
        norm: NormFactory,
        cross: Mixer | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = norm(dim), mixer
        self.cross_norm, self.cross = (norm(dim), cross) if cross is not None else (None, None)
        self.feedforward_norm, self.feedforward = (norm(dim), feedforward) if feedforward is not None else (None, None)
        self.dropout = dropout

    def forward(
        self, x: Float[Tensor, "b n d"], context: Context, cross: Context | None = None
    ) -> Float[Tensor, "b n d"]:
        x = x + self._dropped(self.mixer(self.mixer_norm(x), context))
        if self.cross is not None:
            x = x + self._dropped(self.cross(self.cross_norm(x), cross))
        if self.feedforward is not None:
            x = x + self._dropped(self.feedforward(self.feedforward_norm(x), context))
        return x

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x
