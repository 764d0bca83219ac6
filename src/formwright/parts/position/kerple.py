"""KERPLE: ALiBi's penalty with a learned shape, from the conditionally positive definite kernels.

Paper    Chi, Fan, Ramadge, Rudnicky: KERPLE (NeurIPS 2022), arXiv:2205.09921, equations 6 and 7.
Idea     exp(score) may be multiplied by any kernel that a constant makes positive definite; the constant cancels in the
         softmax. Two such families, with two learned numbers a head in every layer:

             score[h, i, j] = q_i . k_j / sqrt(d) - r1 log(1 + r2 |i - j|)     kernel="log"     r1, r2 > 0
             score[h, i, j] = q_i . k_j / sqrt(d) - r1 |i - j|^r2              kernel="power"   r1 > 0, 0 < r2 <= 2

         First values as in the release: log r1 in U(0, 2), r2 in U(0, 1); power r1 in U(0, 1), r2 in U(0, 2).
Differs  The release keeps the numbers at 0.01 or above (r2 at 2 or below) by overwriting them on every forward pass; we
         clamp what is used and let the gradient through, so that a number at its limit can come back. Neither number
         is weight-decayed. The paper is causal; |i - j| in both directions is our extension. The variants of the
         release that multiply the weights as well, or share or fix a number, are not here.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from formwright.contracts import Context, Toeplitz
from formwright.errors import FormwrightError
from formwright.ops.relative_kernels import Series, kerple_series
from formwright.parts.position import by_distance, refuse_all_but_one_sequence

LEAST = 0.01


class KERPLE(nn.Module):
    """Relative position as a bias whose decay each head of each layer learns. Two parameters a head, no longest length.

    Args:
        heads: attention heads.
        kernel: "log" (the paper's best) or "power" (ALiBi is r2 = 1).
    """

    scope = "layer"

    def __init__(self, *, heads: int, kernel: Literal["log", "power"] = "log") -> None:
        super().__init__()
        if heads < 1:
            raise FormwrightError(f"KERPLE needs heads >= 1, got heads={heads}.")
        if kernel not in ("log", "power"):
            raise FormwrightError(f'KERPLE has kernel="log" or "power", got {kernel!r}.')
        self.kernel = kernel
        self.r1 = nn.Parameter(torch.empty(heads))
        self.r2 = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.r1, 0.0, 2.0 if self.kernel == "log" else 1.0)
        nn.init.uniform_(self.r2, 0.0, 1.0 if self.kernel == "log" else 2.0)

    def bias(self, context: Context) -> Toeplitz | Float[Tensor, "b h {context.queries} {context.keys}"]:
        """The bias in fp32 (fp64 for fp64 parameters), nowhere above 0.

        Raises:
            UnsupportedContext: cross-attention or a grid, where |i - j| is no distance.
        """
        refuse_all_but_one_sequence("KERPLE", context)
        return by_distance(context, self._values)

    def series(self) -> list[Series]:
        """Each head's fall as a series over distances, as it is now."""
        r1, r2 = _within(self.r1, None), _within(self.r2, 2.0 if self.kernel == "power" else None)
        return [kerple_series(self.kernel, *numbers) for numbers in zip(r1.tolist(), r2.tolist(), strict=True)]

    def _values(self, lags: Int[Tensor, "..."]) -> Float[Tensor, "h ..."]:
        r1 = _within(self.r1, None).view(-1, *[1] * lags.ndim)
        r2 = _within(self.r2, 2.0 if self.kernel == "power" else None).view(-1, *[1] * lags.ndim)
        distance = lags.abs().to(r1.dtype)
        return -r1 * torch.log1p(r2 * distance) if self.kernel == "log" else -r1 * distance**r2


def _within(r: Float[Tensor, " h"], most: float | None) -> Float[Tensor, " h"]:
    """r, or the nearest allowed number, with the gradient of r."""
    r = r.to(torch.promote_types(r.dtype, torch.float32))
    return r + (r.clamp(LEAST, most) - r).detach()
