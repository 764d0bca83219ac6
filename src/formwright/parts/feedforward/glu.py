"""Gated feed-forward layers: SwiGLU and GEGLU.

Paper    Shazeer: GLU Variants Improve Transformer (2020), arXiv:2002.05202.
Idea     One projection of the token gates another, element by element.

             y = (act(x W) * (x V)) W_2        act = SiLU (SwiGLU) or GELU (GEGLU)

         Three matrices: at two thirds of the hidden width they hold the parameters of the two-matrix layer.
Differs  W and V lie in one matrix (same function). The paper has no biases; neither has ours unless asked for.
"""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.contracts import Context
from formwright.errors import FormwrightError
from formwright.ops.linear import project


class GLU(nn.Module):
    """(b, n, d) -> (b, n, d), every token alone. A subclass gives the activation of the gate.

    Args:
        dim: width d.
        hidden: width of the gated layer.
        bias: whether the matrices have biases.
    """

    gated: ClassVar[bool] = True  # three matrices: the default hidden width is 8/3 d instead of 4 d

    def __init__(self, *, dim: int, hidden: int, bias: bool = False) -> None:
        super().__init__()
        if hidden < 1:
            raise FormwrightError(f"A feed-forward layer needs a hidden width of at least 1, got {hidden}.")
        self.up, self.down = nn.Linear(dim, 2 * hidden, bias=bias), nn.Linear(hidden, dim, bias=bias)
        self.inner_width = hidden
        self.inner: nn.Module = nn.Identity()
        self.up.role, self.down.role = "up", "down"

    def forward(self, x: Float[Tensor, "b n d"], _context: Context | None = None) -> Float[Tensor, "b n d"]:
        gate, value = project(self.up, x).chunk(2, dim=-1)
        return project(self.down, self.inner(self.activation(gate) * value))

    def activation(self, x: Float[Tensor, "b n h"]) -> Float[Tensor, "b n h"]:
        raise NotImplementedError


class SwiGLU(GLU):
    """The gate is x times the logistic function of x."""

    def activation(self, x: Float[Tensor, "b n h"]) -> Float[Tensor, "b n h"]:
        return F.silu(x)


class GEGLU(GLU):
    """The gate is GELU."""

    def activation(self, x: Float[Tensor, "b n h"]) -> Float[Tensor, "b n h"]:
        return F.gelu(x)
