"""PAF: attention and feed-forward side by side, on the same input.

Paper    Sonkar, Baraniuk: Investigating the Role of Feed-Forward Networks in Transformers Using Parallel Attention and
         Feed-Forward Net Design (2023), arXiv:2305.13297, who train BERT and RoBERTa so; in decoders it is GPT-J's and
         PaLM's block.
Idea     In series the feed-forward layer reads x + attention(x). What attention adds is small beside x (the paper's
         second assumption; `formwright.theory.paf` measures it), so it may as well read x, and neither waits.

             post       y = norm(x + attention(x) + feedforward(x))
             pre        y = x + attention(norm(x)) + feedforward(norm(x))
             pre-two    y = x + attention(norm(x)) + feedforward(norm'(x))

         Each layer has one norm: 2 d parameters fewer than in series, or as many with pre-two (GPT-NeoX).
Differs  Cross-attention is a third summand that reads the same input; the release feeds it what self-attention gave,
         without residual or norm. The products of x with the matrices of both sides stay two, where the release for
         GPUs joins them in one: on a CPU little is gained.
"""

from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.contracts import Context, FeedForward, Mixer, NormFactory
from formwright.errors import FormwrightError

Layout = Literal["post", "pre", "pre-two"]


class PAF(nn.Module):
    """(b, n, d) -> (b, n, d).

    Args:
        dim: width d.
        mixer: the token mixer.
        feedforward: none = a block of the mixer alone.
        cross: the mixer that reads the encoder's output; none in an encoder or a plain decoder.
        norm: makes a norm of a given width.
        dropout: probability of dropping an element of what a sub-layer adds.
        layout: where the norm stands: behind the sum (BERT), before both sides (PaLM), or one before each (GPT-NeoX),
            in which case cross-attention reads through the attention's.
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
        layout: Layout = "post",
    ) -> None:
        super().__init__()
        if layout not in get_args(Layout):
            raise FormwrightError(f"The layout of PAF is one of {', '.join(get_args(Layout))}, got {layout!r}.")
        self.mixer, self.cross, self.feedforward = mixer, cross, feedforward
        self.norm = norm(dim)
        self.feedforward_norm = norm(dim) if layout == "pre-two" and feedforward is not None else None
        self.dropout, self.first = dropout, layout != "post"
        self.final_norm = self.first

    def forward(
        self, x: Float[Tensor, "b n d"], context: Context, cross: Context | None = None
    ) -> Float[Tensor, "b n d"]:
        read = self.norm(x) if self.first else x
        y = x + self._dropped(self.mixer(read, context))
        if self.cross is not None:
            y = y + self._dropped(self.cross(read, cross))
        if self.feedforward is not None:
            own = read if self.feedforward_norm is None else self.feedforward_norm(x)
            y = y + self._dropped(self.feedforward(own, context))
        return y if self.first else self.norm(y)

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x
