"""Multi-head attention: projections, a position and an attention function make a mixer.

Paper    Vaswani et al.: Attention Is All You Need (2017), arXiv:1706.03762, section 3.2.2.
Idea     The width is split into heads that attend each in its own way.

             q, k, v = x W_q, x W_k, x W_v        out = concat_h(attention_h(q, k, v)) W_o

Differs  One matrix holds W_q, W_k and W_v side by side (same function). What the heads give may pass through `inner`
         before W_o, where sub-LN puts its norm.
"""

from dataclasses import replace
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.contracts import SCORE_HOOKS, Context, Hook, UnsupportedContext, hooks
from formwright.errors import FormwrightError
from formwright.ops.linear import project
from formwright.parts.attention.softmax import repeat_heads


class MultiHeadAttention(nn.Module):
    """Self-attention, or cross-attention when the context brings a memory.

    Args:
        dim: width D of the tokens.
        heads: query heads.
        attention: the attention function.
        kv_heads: key and value heads, a divisor of `heads` (1 = multi-query); none = as many as query heads.
        head_dim: width of a head; none = dim / heads.
        position: this layer's own position; none = the context's shared one, if any.
        bias: whether the projections have biases.
    """

    cache_kind: ClassVar[Literal["keys", "state"] | None] = "keys"

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        attention: nn.Module,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        position: nn.Module | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise FormwrightError(f"Key-value heads must divide the query heads, got {kv_heads} and {heads}.")
        if head_dim is None and dim % heads:
            raise FormwrightError(f"A width of {dim} does not split into {heads} heads; set head_dim or another width.")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim or dim // heads
        self.query_key_value = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim, bias=bias)
        self.attention = attention
        self.hooks: frozenset[Hook] = getattr(attention, "hooks", SCORE_HOOKS)
        self.position = position
        self.inner_width = heads * self.head_dim
        self.inner: nn.Module = nn.Identity()
        self.out = nn.Linear(self.inner_width, dim, bias=bias)
        self.query_key_value.role, self.out.role = "query-key-value", "out"
        self.query_key_value.splits = [width * self.head_dim for width in (heads, kv_heads, kv_heads)]

    def forward(self, x: Float[Tensor, "b n d"], context: Context) -> Float[Tensor, "b n d"]:
        position = context.shared_position if self.position is None else self.position
        used = hooks(position)
        if getattr(position, "reads_tokens", False):
            context = replace(context, tokens=x)
        q, k, v = self._projected(x, context)
        late = getattr(position, "turns_stored", False)
        if "rotate" in used and not late:
            q, k = position.rotate(q, k, context)
        if context.memory is None and context.cache is not None:
            k, v = context.cache.update(k, v)
        if "rotate" in used and late:
            q, k = position.rotate(q, k, context)
        arguments: dict[str, Any] = {}
        if "scores" in used:  # they take the place of q k^T: nothing is left of it at a scaling of 0
            arguments |= {"bias": position.scores(q, k, context), "scaling": 0.0}
        if "bias" in used:
            arguments["bias"] = position.bias(context)
        if "scale" in used:
            arguments["scale"] = position.scale(context)
        if not self.attention.grouped and self.kv_heads != self.heads:
            k, v = repeat_heads(k, self.heads), repeat_heads(v, self.heads)
        if context.attentions is not None:
            context.attentions.append(self._weights(q, k, context, arguments))
        mixed = self.attention(q, k, v, mask=context.mask, **arguments)
        return project(self.out, self.inner(self.gather(mixed, x)))

    def gather(
        self, mixed: Float[Tensor, "b h n e"], _x: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b n {self.inner_width}"]:
        """The heads side by side. Gated attention overrides this: it gates each head by the layer's input."""
        return mixed.transpose(1, 2).flatten(2)

    def _projected(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        if context.memory is None:
            # split first, then turn each: so the gradients lie as the projection wants them and need no copy
            split = project(self.query_key_value, x).unflatten(-1, (-1, self.head_dim))
            q, k, v = split.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
            return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        wide = self.inner_width
        q = self._rows(x, slice(wide))
        q = q.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        stored = None if context.cache is None else context.cache.stored()
        if stored is not None:  # the memory does not change between decoding steps
            return q, *stored
        kv = self._rows(context.memory, slice(wide, None))
        k, v = kv.unflatten(-1, (-1, self.head_dim)).transpose(1, 2).chunk(2, dim=1)
        if context.cache is not None:
            context.cache.update(k, v)
        return q, k, v

    def _rows(self, x: Tensor, rows: slice) -> Tensor:
        """Some rows of the projection alone; all of it where an adapter stands in its place."""
        projection = self.query_key_value
        if type(projection) is not nn.Linear:
            return projection(x)[..., rows]
        return F.linear(x, projection.weight[rows], None if projection.bias is None else projection.bias[rows])

    def _weights(self, q: Tensor, k: Tensor, context: Context, arguments: dict[str, Any]) -> Tensor:
        if not hasattr(self.attention, "weights"):
            raise UnsupportedContext(
                f"{type(self.attention).__name__} has no attention weights to show; choose an attention that has, "
                "such as softmax."
            )
        return self.attention.weights(q, k, mask=context.mask, **arguments)
