"""URPE: attention weights multiplied by a learned number a distance, so that a row need not sum to 1.

Paper    Luo, Li, Zheng, Liu, Wang, He: Your Transformer May Not be as Powerful as You Expect (NeurIPS 2022),
         arXiv:2205.13401.
Idea     Whatever is added to the scores or turns q and k, every row of a softmax sums to 1: on equal tokens all outputs
         are equal, at any depth, so no such model approximates a function that tells their places apart. A Toeplitz
         matrix after the softmax does away with the sum and makes the model universal:

             out = (softmax(q k^T / sqrt(d) + B) * C) v        B_ij = b_(j - i),  C_ij = c_(j - i),  c = 1 at the start

         The rows are not scaled back afterwards, or the theorem would hold again. B, or any other position, is `inner`:
         its rotation, bias or sum with the tokens goes on as without URPE. C is kept as its diagonals, which is what
         attention by FFT needs too.
Differs  Distances beyond `reach` take the number at its edge; the release has none there. Of a decoder only the numbers
         of the past exist. c is not weight-decayed (0 would silence attention). C looked up by the distance in a graph
         (Graphormer) and the release's c >= 0 are left out.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from formwright.build import build, parse_spec
from formwright.contracts import Context, Toeplitz, hooks, refuse, scope
from formwright.errors import FormwrightError
from formwright.parts.position import by_distance, refuse_all_but_one_sequence
from formwright.parts.position.t5 import t5_buckets

HOOKS = ("embed", "rotate", "bias", "scores", "turns_stored", "reads_tokens", "series")


class URPE(nn.Module):
    """A factor on every attention weight, set by head and distance, beside another position.

    Args:
        heads: attention heads.
        length: longest sequence of training.
        dim: width of the model, for the inner position.
        head_dim: channels of a head, for the inner position.
        causal: keep numbers of the past alone.
        inner: the position that goes with it, such as "t5(buckets=16)", "rope" or "none".
        buckets: numbers a head, shared by far distances as in T5 (64 in the release); none = one for every distance.
        reach: from here on all distances are one (128 in the release); none = length.
    """

    no_weight_decay = ("c",)

    def __init__(
        self,
        *,
        heads: int,
        length: int,
        dim: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        inner: Literal["none"] | str | Mapping[str, Any] | None = "t5",
        buckets: int | None = None,
        reach: int | None = None,
    ) -> None:
        super().__init__()
        reach = length if reach is None else reach
        sides = 1 if causal else 2
        if heads < 1 or reach < 1:
            raise FormwrightError(f"URPE needs heads and reach from 1, got heads={heads} and reach={reach}.")
        if buckets is not None and (buckets < 2 * sides or buckets % (2 * sides) or reach <= buckets // (2 * sides)):
            raise FormwrightError(
                f"URPE needs a multiple of {2 * sides} as buckets here and a reach beyond the {buckets // (2 * sides)} "
                f"single distances among them, got buckets={buckets} and reach={reach}."
            )
        self.causal, self.buckets, self.reach = causal, buckets, reach
        self.inner: nn.Module | None = None
        if inner is not None and parse_spec(inner)["name"] != "none":
            known = {"heads": heads, "length": length, "dim": dim, "head_dim": head_dim, "causal": causal}
            try:
                self.inner = build(
                    "position", inner, **{name: size for name, size in known.items() if size is not None}
                )
            except FormwrightError as error:
                raise FormwrightError(f"URPE's inner position: {error}") from error
            if "scale" in hooks(self.inner):
                raise FormwrightError(f"URPE's inner position {inner!r} has factors of its own; choose another.")
        self.scope = "model" if self.inner is None else scope(self.inner)
        entries = (reach if causal else 2 * reach - 1) if buckets is None else buckets
        self.c = nn.Parameter(torch.empty(entries, heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.c)

    def __getattr__(self, name: str) -> Any:
        if name in HOOKS:  # of the inner position, where it has them
            return getattr(self.inner, name)
        return super().__getattr__(name)

    def scale(self, context: Context) -> Toeplitz | Float[Tensor, "b h {context.queries} {context.keys}"]:
        """The factors, in the dtype of the parameter.

        Raises:
            UnsupportedContext: a grid, or keys ahead of the query when it was built causal.
        """
        if context.memory is None:
            refuse_all_but_one_sequence("URPE", context)
        if self.causal and (context.memory is not None or (not context.causal and context.queries > 1)):
            raise refuse(
                "URPE of a decoder",
                asked="attention in both directions" if context.memory is None else "cross-attention",
                because="it has no factors for keys ahead of the query",
                instead="Build it with causal=False.",
            )
        return by_distance(context, self._values)

    def _values(self, lags: Int[Tensor, "..."]) -> Float[Tensor, "h ..."]:
        if self.buckets is not None:
            found = t5_buckets(lags, buckets=self.buckets, max_distance=self.reach, causal=self.causal)
        else:
            least = 0 if self.causal else 1 - self.reach
            found = lags.clamp(least, self.reach - 1) - least
        return self.c[found].movedim(-1, 0)
