"""Root-mean-square normalisation.

Paper    Zhang, Sennrich: Root Mean Square Layer Normalization (NeurIPS 2019), arXiv:1910.07467.
Idea     The re-scaling of layer normalisation without the re-centring.

             y = gain * x / sqrt(mean(x^2) + eps)

Differs  eps inside the root, as all later models have it; the paper writes none.
"""

from torch import nn


class RMSNorm(nn.RMSNorm):
    """x (.., d) -> (.., d).

    Args:
        dim: width d.
        eps: added to the mean square.
    """

    def __init__(self, *, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps=eps)
