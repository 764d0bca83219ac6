"""A feed-forward layer computed for a few tokens at a time.

Paper    Kitaev, Kaiser, Levskaya: Reformer (ICLR 2020), arXiv:2001.04451, section 3; named among the general tricks by
         the surveys of efficient Transformers.
Idea     A feed-forward layer treats every token alone, so that its hidden layer, the widest thing of a block, need not
         exist for all tokens at once.

             y = [f(x_1 .. x_c), f(x_c+1 .. x_2c), ...]

         In training each chunk is computed again in the backward pass, else its hidden layer would have to be kept.
Differs  In nothing.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from formwright.build import build
from formwright.contracts import Context
from formwright.errors import FormwrightError

Form = Literal["gelu", "gelu-tanh", "relu", "swiglu", "geglu"]


class ChunkedFeedForward(nn.Module):
    """(b, n, d) -> (b, n, d), every token alone.

    Args:
        dim: width d.
        hidden: hidden width.
        form: the layer that is computed in chunks.
        chunk: tokens of a sequence at a time.
        bias: whether its matrices have biases.
    """

    def __init__(self, *, dim: int, hidden: int, form: Form = "gelu", chunk: int = 64, bias: bool = True) -> None:
        super().__init__()
        if form not in get_args(Form):
            raise FormwrightError(f"Chunks are computed of {', '.join(get_args(Form))}; got {form!r}.")
        if chunk < 1:
            raise FormwrightError(f"A chunk holds at least one token, got chunk={chunk}.")
        self.layer: nn.Module = build("feedforward", form, dim=dim, hidden=hidden, bias=bias)
        self.chunk = chunk

    def forward(self, x: Float[Tensor, "b n d"], _context: Context | None = None) -> Float[Tensor, "b n d"]:
        if x.shape[1] <= self.chunk:
            return self.layer(x)
        parts = x.split(self.chunk, 1)
        if self.training and torch.is_grad_enabled():
            return torch.cat([checkpoint(self.layer, part, use_reentrant=False) for part in parts], 1)
        return torch.cat([self.layer(part) for part in parts], 1)
