"""T5 bias: one learned number per head and bucket of distances, added to the scores.

Paper    Raffel et al.: Exploring the Limits of Transfer Learning (JMLR 2020), arXiv:1910.10683, section 2.1.
Idea     Near distances have a bucket each, far ones share buckets that grow logarithmically up to `max_distance`;
         everything beyond shares the last. One table serves all layers.

             score[h, i, j] = q_i . k_j + W[bucket(j - i), h]

             bucket(r) = [r > 0] B + near(|r|)      both directions, B = buckets / 2
             bucket(r) = near(max(-r, 0))           causal,          B = buckets

             near(r) = r                                                             r < B/2
                       min(B - 1, B/2 + floor(B/2 log(2r/B) / log(2 max_distance/B)))  else
         In cross-attention i counts the queries' sequence and j the memory, in both directions.
Differs  T5 itself gives its cross-attention no bias, and nor do our models unless their config's `cross_position` asks
         for one. T5 divides no score by sqrt(d) and starts from smaller query matrices instead. This part is the bias
         alone: the mixer scales as it does with any position. First values are N(0, 1/d) as in the release.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from formwright.contracts import Context, Toeplitz, refuse
from formwright.errors import FormwrightError
from formwright.parts.position import by_distance, refuse_all_but_one_sequence


def t5_buckets(
    lags: Int[Tensor, "..."], *, buckets: int = 32, max_distance: int = 128, causal: bool = False
) -> Int[Tensor, "..."]:
    """The bucket of i - j. Causal: keys ahead of the query fall into bucket 0 with the query itself."""
    side = buckets if causal else buckets // 2
    exact = side // 2
    distance = lags.clamp(min=0) if causal else lags.abs()
    # In fp32 and in this order: a distance on an edge must fall where it fell when the released models were trained.
    spread = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (side - exact)
    far = (exact + spread.long()).clamp(max=side - 1)
    near = torch.where(distance < exact, distance, far)
    return near if causal else near + side * (lags < 0)


class T5Bias(nn.Module):
    """Relative position as a learned bias on the scores, one table for all layers.

    Args:
        dim: width of the model; it sets the scale of the first values.
        heads: attention heads.
        causal: spend all buckets on the past.
        buckets: numbers a head; half of them (a quarter when not causal) are for single distances.
        max_distance: from here on all distances are one.
    """

    scope = "model"

    def __init__(
        self, *, dim: int, heads: int, causal: bool = False, buckets: int = 32, max_distance: int = 128
    ) -> None:
        super().__init__()
        sides = 1 if causal else 2
        if buckets < 2 * sides or buckets % (2 * sides):
            raise FormwrightError(f"T5 bias needs a multiple of {2 * sides} as buckets here, got buckets={buckets}.")
        if dim < 1 or heads < 1 or max_distance <= buckets // (2 * sides):
            raise FormwrightError(
                f"T5 bias needs dim >= 1, heads >= 1 and max_distance > {buckets // (2 * sides)} (the single distances "
                f"of {buckets} buckets), got dim={dim}, heads={heads} and max_distance={max_distance}."
            )
        self.dim, self.causal, self.buckets, self.max_distance = dim, causal, buckets, max_distance
        self.weight = nn.Parameter(torch.empty(buckets, heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.dim**-0.5)

    def bias(self, context: Context) -> Toeplitz | Float[Tensor, "b h {context.queries} {context.keys}"]:
        """The bias in the weights' dtype.

        Raises:
            UnsupportedContext: a grid, or causal buckets where keys ahead of the query are seen.
        """
        if context.memory is None:
            refuse_all_but_one_sequence("T5 bias", context)
        if self.causal and (context.memory is not None or (not context.causal and context.queries > 1)):
            raise refuse(
                "T5 bias with causal buckets",
                asked="attention in both directions" if context.memory is None else "cross-attention",
                because="all keys ahead of a query share one bucket",
                instead="Build it with causal=False.",
            )
        return by_distance(context, self._values)

    def _values(self, lags: Int[Tensor, "..."]) -> Float[Tensor, "h ..."]:
        found = t5_buckets(lags, buckets=self.buckets, max_distance=self.max_distance, causal=self.causal)
        return self.weight[found].movedim(-1, 0)
