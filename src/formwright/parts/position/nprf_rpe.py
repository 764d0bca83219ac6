"""Relative position as one learned number a distance, the bias of NPRF attention.

Paper    Luo et al.: Stable, Fast and Accurate: Kernelized Attention with Relative Positional Encoding (NeurIPS 2021),
         arXiv:2106.12566, equation 8; the Toeplitz matrix of its FFT is exp(b).
Idea     score[h, i, j] += b_h[i - j]         b of 2 N - 1 numbers a head, 0 at first

         The diagonals are all there is: an attention that can use them never sees an array.
Differs  Beyond N, the longest sequence of training, all distances are one; the paper has none there. Of a decoder only
         the N numbers of the past exist. Every layer has its own. b is not weight-decayed.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from formwright.contracts import Context, Toeplitz, refuse
from formwright.errors import FormwrightError
from formwright.parts.position import by_distance, refuse_all_but_one_sequence


class RelativeBias(nn.Module):
    """A learned bias for every distance, 2 N - 1 numbers a head (N in a decoder).

    Args:
        heads: attention heads.
        length: N; from here on all distances are one.
        causal: keep numbers of the past alone.
        std: standard deviation of the first values.
    """

    scope = "layer"
    no_weight_decay = ("b",)

    def __init__(self, *, heads: int, length: int, causal: bool = False, std: float = 0.0) -> None:
        super().__init__()
        if heads < 1 or length < 1 or std < 0:
            raise FormwrightError(
                f"A relative bias needs heads >= 1, length >= 1 and std >= 0, "
                f"got heads={heads}, length={length} and std={std}."
            )
        self.length, self.causal, self.std = length, causal, std
        self.b = nn.Parameter(torch.empty(heads, length if causal else 2 * length - 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.b, std=self.std)

    def bias(self, context: Context) -> Toeplitz | Float[Tensor, "b h {context.queries} {context.keys}"]:
        """The bias in the dtype of the parameter.

        Raises:
            UnsupportedContext: a grid, or keys ahead of the query when it was built causal.
        """
        if context.memory is None:
            refuse_all_but_one_sequence("A relative bias", context)
        if self.causal and (context.memory is not None or (not context.causal and context.queries > 1)):
            raise refuse(
                "A relative bias of a decoder",
                asked="attention in both directions" if context.memory is None else "cross-attention",
                because="it has no number for keys ahead of the query",
                instead="Build it with causal=False.",
            )
        return by_distance(context, self._values)

    def _values(self, lags: Int[Tensor, "..."]) -> Float[Tensor, "h ..."]:
        least = 0 if self.causal else 1 - self.length
        return self.b[:, lags.clamp(least, self.length - 1) - least]
