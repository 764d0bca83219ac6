"""How much a layer can stretch a small change of its input: the largest singular value of its Jacobian."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def jacobian_norm(layer: Callable[[Tensor], Tensor], x: Float[Tensor, "..."]) -> float:
    """The spectral norm of d layer(x) / dx at one input, all of whose entries count; O(entries^2) memory."""
    jacobian = torch.autograd.functional.jacobian(layer, x)
    return float(torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), 2))
