"""The post-norm block, the Transformer's first form.

Paper    Vaswani et al.: Attention Is All You Need (2017), arXiv:1706.03762, section 3.1; BERT's block.
Idea     The residual stream is normalised after every sub-layer.

             x <- norm(x + mixer(x))      x <- norm(x + cross(x))      x <- norm(x + feedforward(x))

Differs  In nothing.
"""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.contracts import Context, FeedForward, Mixer, NormFactory


class PostNorm(nn.Module):
    """(b, n, d) -> (b, n, d).

    Args:
        dim: width d.
        mixer: the token mixer.
        feedforward: none = a block of the mixer alone.
        cross: the mixer that reads the encoder's output; none in an encoder or a plain decoder.
        norm: makes a norm of a given width.
        dropout: probability of dropping an element of what a sub-layer adds.
    """

    final_norm: ClassVar[bool] = False

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
        self.mixer, self.mixer_norm = mixer, norm(dim)
        self.cross, self.cross_norm = (cross, norm(dim)) if cross is not None else (None, None)
        self.feedforward, self.feedforward_norm = (feedforward, norm(dim)) if feedforward is not None else (None, None)
        self.dropout = dropout

    def forward(
        self, x: Float[Tensor, "b n d"], context: Context, cross: Context | None = None
    ) -> Float[Tensor, "b n d"]:
        x = self.mixer_norm(x + self._dropped(self.mixer(x, context)))
        if self.cross is not None:
            x = self.cross_norm(x + self._dropped(self.cross(x, cross)))
        if self.feedforward is not None:
            x = self.feedforward_norm(x + self._dropped(self.feedforward(x, context)))
        return x

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x
