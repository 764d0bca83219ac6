"""ALiBi: a penalty on distance in place of a position embedding.

Paper    Press, Smith, Lewis: Train Short, Test Long (ICLR 2022), arXiv:2108.12409.
Idea     Nothing is added to the tokens. A score loses m_h for every step between query and key, at a rate fixed per
         head, so a distance never met in training is only more of what was met.

             score[h, i, j] = q_i . k_j / sqrt(d) - m_h |i - j|

             m_h = 2^(-8 s_h / 2P)   s = 2, 4, .., 2P, 1, 3, .., 2P - 1   P = the largest power of two <= H

         The first P slopes are the paper's 2^(-8h/P); other head counts fill in between them, steepest first.
Differs  The paper is causal; |i - j| in both directions is our extension. The release adds m_h j, a constant per row
         away from ours: after softmax the same, so there is no variant="release".
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formwright.contracts import Context, Toeplitz
from formwright.errors import FormwrightError
from formwright.ops.relative_kernels import KERNELS, Series, alibi_slopes
from formwright.parts.position import by_distance, refuse_all_but_one_sequence


class ALiBi(nn.Module):
    """Relative position as a bias on the scores. No parameters, no longest length.

    Args:
        heads: attention heads, any number from 1.
        max_bias: the flattest head loses 2^-max_bias a step (8 in the paper).
    """

    def __init__(self, *, heads: int, max_bias: float = 8.0) -> None:
        super().__init__()
        if heads < 1 or max_bias <= 0:
            raise FormwrightError(
                f"ALiBi needs heads >= 1 and max_bias > 0, got heads={heads} and max_bias={max_bias}."
            )
        # Floats, not a buffer: model.bfloat16() would round a buffer, and loading through the meta device lose it.
        self.slopes = alibi_slopes(heads, max_bias)

    def bias(self, context: Context) -> Toeplitz | Float[Tensor, "b h {context.queries} {context.keys}"]:
        """The bias in fp32, nowhere above 0.

        Raises:
            UnsupportedContext: cross-attention or a grid, where |i - j| is no distance.
        """
        refuse_all_but_one_sequence("ALiBi", context)
        slopes = torch.tensor(self.slopes, dtype=torch.float32, device=context.device)
        return by_distance(context, lambda lags: -slopes.view(-1, *[1] * lags.ndim) * lags.abs())

    def series(self) -> list[Series]:
        """Each head's fall as a series over distances."""
        return [KERNELS["exponential"].series(slope) for slope in self.slopes]
