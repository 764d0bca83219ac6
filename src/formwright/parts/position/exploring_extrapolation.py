"""The biases of "Exploring Transformer Extrapolation": fixed falls with distance, among them the paper's two new ones.

Paper    Qin, Zhong, Deng: Exploring Transformer Extrapolation (AAAI 2024), arXiv:2307.10156.
Idea     Which fall with distance lets a model read longer texts than those of training? One whose exponentials have a
         finite sum; see `formwright.ops.relative_kernels`. Slower falls than ALiBi's are then allowed:

             score[h, i, j] = q_i . k_j / sqrt(d) + r(m_h |i - j|)         m_h = ALiBi's slopes

             r(y) = -ln(1 + y^2)            type-1, as 1 / n^2             -(ln(3 + y))^2   type-2, as exp(-ln^2 n)
                    ln(1 + ln(1 + y)) - 2 ln(1 + y)                        log-over-square
                    -y, -y^0.5, -y^0.75 / 2, -y^1.25, -y^2, -y^4           exponential (ALiBi) and the powers
                    -ln(1 + y), -ln(3 + y) - ln ln(3 + y)                  inverse, inverse-log: the sums diverge

         Nothing is learned, all layers have the same bias, no length is the longest.
Differs  The paper is causal; |i - j| in both directions is our extension.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from formwright.contracts import Context, Toeplitz
from formwright.errors import FormwrightError
from formwright.ops.relative_kernels import KERNELS, Series, alibi_slopes
from formwright.parts.position import by_distance, refuse_all_but_one_sequence

Name = Literal[
    "exponential",
    "type-1",
    "type-2",
    "log-over-square",
    "power-1/2",
    "power-3/4",
    "power-5/4",
    "power-2",
    "power-4",
    "inverse",
    "inverse-log",
]


class Decay(nn.Module):
    """Relative position as a bias that falls with distance in a given way. No parameters, no longest length.

    Args:
        heads: attention heads, any number from 1.
        kernel: how it falls.
        max_bias: the flattest head's slope is 2^-max_bias (8 in the paper).
    """

    def __init__(self, *, heads: int, kernel: Name = "type-1", max_bias: float = 8.0) -> None:
        super().__init__()
        if heads < 1 or max_bias <= 0:
            raise FormwrightError(
                f"Decay needs heads >= 1 and max_bias > 0, got heads={heads} and max_bias={max_bias}."
            )
        if kernel not in get_args(Name):
            raise FormwrightError(f"Decay has the kernels {', '.join(get_args(Name))}, got {kernel!r}.")
        self.kernel, self.slopes = kernel, alibi_slopes(heads, max_bias)

    def bias(self, context: Context) -> Toeplitz | Float[Tensor, "b h {context.queries} {context.keys}"]:
        """The bias in fp32, highest at the query itself.

        Raises:
            UnsupportedContext: cross-attention or a grid, where |i - j| is no distance.
        """
        refuse_all_but_one_sequence("Decay", context)
        slopes = torch.tensor(self.slopes, dtype=torch.float32, device=context.device)

        def values(lags: Int[Tensor, "..."]) -> Float[Tensor, "h ..."]:
            return KERNELS[self.kernel].r(slopes.view(-1, *[1] * lags.ndim) * lags.abs(), torch.log)

        return by_distance(context, values)

    def series(self) -> list[Series]:
        """Each head's fall as a series over distances."""
        return [KERNELS[self.kernel].series(slope) for slope in self.slopes]
