"""Sub-LN: a second layer norm inside every sub-layer.

Paper    Wang et al.: Foundation Transformers (Magneto; ICML 2023), arXiv:2210.06423.
Idea     Pre-norm, and a norm before each output projection too, so that what a sub-layer adds has a scale set by its
         last matrix alone. With the initialisation derived for it (init "magneto") the change of the model's output in
         one step does not grow with depth.

             x <- x + W_o norm(attention(norm(x)))        x <- x + W_2 norm(act(W_1 norm(x)))

         The inner norms run over the full width: all heads together, the whole hidden layer.
Differs  Cross-attention gets no inner norm, as in the released code; cross_inner=True puts it where the paper's figure
         shows it. A gated feed-forward is normalised after the product, which the paper does not treat. The release
         computes the activation in fp32 under mixed precision; ours in the dtype autocast chooses.
"""

from torch import nn

from formwright.contracts import FeedForward, Mixer, NormFactory, UnsupportedContext
from formwright.parts.block.prenorm import PreNorm


class SubLN(PreNorm):
    """(b, n, d) -> (b, n, d): the pre-norm block around sub-layers with a norm before their last matrix.

    Args:
        dim: width d.
        mixer: the token mixer; it must let a norm before its output projection (`inner`).
        feedforward: likewise; none = a block of the mixer alone.
        cross: the mixer that reads the encoder's output.
        norm: makes a norm of a given width.
        dropout: probability of dropping an element of what a sub-layer adds.
        cross_inner: whether cross-attention has the inner norm too.
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
        cross_inner: bool = False,
    ) -> None:
        super().__init__(dim=dim, mixer=mixer, feedforward=feedforward, norm=norm, cross=cross, dropout=dropout)
        for sublayer in (mixer, feedforward, cross if cross_inner else None):
            if sublayer is not None:
                _norm_inside(sublayer, norm)


def _norm_inside(sublayer: nn.Module, norm: NormFactory) -> None:
    if not isinstance(getattr(sublayer, "inner", None), nn.Identity):
        raise UnsupportedContext(
            f"Sub-LN puts a norm before the last matrix of a sub-layer, and {type(sublayer).__name__} has no place for "
            "it; use it with attention and a plain or gated feed-forward layer, or choose block pre."
        )
    sublayer.inner = norm(sublayer.inner_width)
