"""Softmax attention, the baseline every other mixer is measured against.

Paper    Vaswani et al.: Attention Is All You Need (2017), arXiv:1706.03762, section 3.2. Fewer key than query heads:
         Shazeer (MQA), arXiv:1911.02150; Ainslie et al. (GQA), arXiv:2305.13245.
Idea     Every query takes a weighted mean of the values, the weights being a softmax of its products with the keys.

             out = (softmax(q k^T * scaling + bias) * scale) v        scaling = 1 / sqrt(d)

Differs  In nothing. A query that may see no key at all gets 0, as torch's scaled_dot_product_attention gives it.
"""

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.contracts import Mask, Structured, dense
from formwright.errors import FormwrightError
from formwright.ops.attention import serves, softmax_attention


def repeat_heads(x: Float[Tensor, "b g k d"], heads: int) -> Float[Tensor, "b {heads} k d"]:
    """Each key or value head once for every query head that shares it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def attention_scores(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b g k d"],
    *,
    mask: Mask,
    bias: Structured | None = None,
    scaling: float | None = None,
) -> Float[Tensor, "b h q k"]:
    """q k^T * scaling + bias, -inf where the mask hides the key."""
    scores = q @ repeat_heads(k, q.shape[1]).mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if bias is not None:
        scores = scores + dense(bias).to(scores.dtype)
    seen = mask.dense()
    return scores if seen is None else scores.masked_fill(~seen, -torch.inf)


def softmax_or_zero(scores: Float[Tensor, "b h q k"]) -> Float[Tensor, "b h q k"]:
    """Softmax over the keys; a row of -inf alone gives zeros instead of NaN."""
    hidden = scores.amax(-1, keepdim=True) == -torch.inf
    return scores.masked_fill(hidden, 0).softmax(-1).masked_fill(hidden, 0)


class SoftmaxAttention(nn.Module):
    """Scaled dot-product attention on a fused kernel: torch's, or on a CPU mostly our own.

    Args:
        dropout: probability of dropping a weight in training.
    """

    grouped: ClassVar[bool] = True

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise FormwrightError(f"Attention dropout is a probability from 0 to below 1, got {dropout}.")
        self.dropout = dropout

    def weights(
        self,
        q: Float[Tensor, "b h q d"],
        k: Float[Tensor, "b g k d"],
        *,
        mask: Mask,
        bias: Structured | None = None,
        scale: Structured | None = None,
        scaling: float | None = None,
    ) -> Float[Tensor, "b h q k"]:
        """The weights themselves, O(q k) memory."""
        weights = softmax_or_zero(attention_scores(q, k, mask=mask, bias=bias, scaling=scaling))
        return weights if scale is None else weights * dense(scale).to(weights.dtype)

    def is_native(self, q: Tensor, k: Tensor, v: Tensor, *, bias: Structured | None = None, **rest: Any) -> bool:
        """Whether our own kernel serves, which sums in float32 whatever the dtype."""
        dropped = self.training and self.dropout > 0
        return bias is None and rest.get("scale") is None and not dropped and serves(q, k, v)

    def forward(
        self,
        q: Float[Tensor, "b h q d"],
        k: Float[Tensor, "b g k d"],
        v: Float[Tensor, "b g k e"],
        *,
        mask: Mask,
        bias: Structured | None = None,
        scale: Structured | None = None,
        scaling: float | None = None,
    ) -> Float[Tensor, "b h q e"]:
        dropout = self.dropout if self.training else 0.0
        if scale is not None:  # no fused kernel multiplies into the weights
            weights = self.weights(q, k, mask=mask, bias=bias, scale=scale, scaling=scaling)
            return F.dropout(weights, dropout) @ repeat_heads(v, q.shape[1])
        if self.is_native(q, k, v, bias=bias):
            return softmax_attention(q, k, v, causal=mask.causal, padding=mask.padding, scaling=scaling)
        grouped = k.shape[1] != q.shape[1]
        if bias is None and mask.padding is None and (mask.hides_nothing or mask.queries == mask.keys):
            return F.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=not mask.hides_nothing, scale=scaling, enable_gqa=grouped
            )
        seen = mask.dense()
        if bias is not None:
            added = dense(bias).to(q.dtype)
            seen = added if seen is None else added.masked_fill(~seen, -torch.inf)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, dropout_p=dropout, scale=scaling, enable_gqa=grouped
        )
