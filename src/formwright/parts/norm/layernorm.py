"""Layer normalisation.

Paper    Ba, Kiros, Hinton: Layer Normalization (2016), arXiv:1607.06450.
Idea     Every token is brought to mean 0 and variance 1 over its features, then scaled and shifted by learned vectors.

             y = gain * (x - mean(x)) / sqrt(var(x) + eps) + shift        variance over d, not d - 1

Differs  In nothing.
"""

from torch import nn


class LayerNorm(nn.LayerNorm):
    """x (.., d) -> (.., d).

    Args:
        dim: width d.
        eps: added to the variance.
        bias: whether a shift is learned.
    """

    def __init__(self, *, dim: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__(dim, eps=eps, bias=bias)
