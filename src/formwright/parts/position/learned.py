"""Learned positions: a vector for every place, added to the token there.

Paper    Gehring et al.: Convolutional Sequence to Sequence Learning (ICML 2017), arXiv:1705.03122, section 3.1; the
         positions of BERT, GPT-2 and ViT.
Idea         x_p <- x_p + W[p]          W (length, d), learned

         A place never met in training has no vector worth the name, and beyond the table there is none at all.
Differs  The paper draws W from N(0, 0.1); N(0, 0.02) is BERT's and GPT-2's. `std` sets it: at small budgets the scale
         of the positions against the tokens moves accuracy by points.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.contracts import Context
from formwright.errors import FormwrightError
from formwright.parts.position import places


class Learned(nn.Module):
    """Absolute position from a table, added to the tokens; the tokens of a grid are counted row by row.

    Args:
        dim: width of the tokens.
        length: places in the table, the longest sequence.
        std: standard deviation of the first values (fan-in initialised vision models want about 1); none = 0.02 as in
            BERT, or as the model's initialisation scheme sets its embeddings (deepscalelm does).
    """

    def __init__(self, *, dim: int, length: int, std: float | None = None) -> None:
        super().__init__()
        if dim < 1 or length < 1 or (std is not None and std < 0):
            raise FormwrightError(
                "Learned positions need dim >= 1, length >= 1 and std >= 0, "
                f"got dim={dim}, length={length} and std={std}."
            )
        self.std = std
        self.weight = nn.Parameter(torch.empty(length, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02 if self.std is None else self.std)

    def embed(self, x: Float[Tensor, "b n d"], context: Context) -> Float[Tensor, "b n d"]:
        """x plus the rows of the queries' places.

        Raises:
            FormwrightError: a place outside the table.
        """
        length = self.weight.shape[0]
        if context.positions is None and context.memory is None:
            self._refuse_beyond(context.keys, length)
            return x + self.weight[context.past : context.keys].to(x.dtype)
        rows = places(context)
        if not torch.compiler.is_compiling():  # a trace cannot read values; there the lookup checks
            self._refuse_beyond(int(rows.max()) + 1, length)
        return x + F.embedding(rows, self.weight).to(x.dtype)

    @staticmethod
    def _refuse_beyond(needed: int, length: int) -> None:
        if needed > length:
            raise FormwrightError(
                f"Learned positions end after {length} tokens and {needed} are needed: build the model with a longer "
                "longest sequence (max_position_embeddings), shorten the input, or choose positions without an end "
                "such as rope, alibi or sinusoidal."
            )
