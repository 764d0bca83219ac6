"""The two-matrix feed-forward layer with ReLU or GELU.

Paper    Vaswani et al.: Attention Is All You Need (2017), arXiv:1706.03762, section 3.3 (ReLU); Hendrycks, Gimpel:
         Gaussian Error Linear Units (2016), arXiv:1606.08415 (GELU and its tanh approximation, which GPT-2 uses).
Idea     Every token passes alone through a wider hidden layer.

             y = act(x W_1 + b_1) W_2 + b_2

Differs  In nothing. What the second matrix reads may pass through `inner`, where sub-LN puts its norm.
"""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.contracts import Context
from formwright.errors import FormwrightError
from formwright.ops.linear import project


class MLP(nn.Module):
    """(b, n, d) -> (b, n, d), every token alone. A subclass gives the activation.

    Args:
        dim: width d.
        hidden: width of the hidden layer.
        bias: whether the two matrices have biases.
    """

    def __init__(self, *, dim: int, hidden: int, bias: bool = True) -> None:
        super().__init__()
        if hidden < 1:
            raise FormwrightError(f"A feed-forward layer needs a hidden width of at least 1, got {hidden}.")
        self.up, self.down = nn.Linear(dim, hidden, bias=bias), nn.Linear(hidden, dim, bias=bias)
        self.inner_width = hidden
        self.inner: nn.Module = nn.Identity()
        self.up.role, self.down.role = "up", "down"

    def forward(self, x: Float[Tensor, "b n d"], _context: Context | None = None) -> Float[Tensor, "b n d"]:
        return project(self.down, self.inner(self.activation(project(self.up, x))))

    def activation(self, x: Float[Tensor, "b n h"]) -> Float[Tensor, "b n h"]:
        raise NotImplementedError


class ReLUMLP(MLP):
    """max(0, x)."""

    def activation(self, x: Float[Tensor, "b n h"]) -> Float[Tensor, "b n h"]:
        return F.relu(x)


class GELUMLP(MLP):
    """x times the Gaussian distribution function of x."""

    approximate: Literal["none", "tanh"] = "none"

    def activation(self, x: Float[Tensor, "b n h"]) -> Float[Tensor, "b n h"]:
        return F.gelu(x, approximate=self.approximate)


class TanhGELUMLP(GELUMLP):
    """GELU by its tanh approximation."""

    approximate = "tanh"
