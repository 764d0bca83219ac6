"""Transformer-XL's attention: the score knows how far a key is, not where it stands.

Paper    Dai, Yang, Yang, Carbonell, Le, Salakhutdinov: Transformer-XL (ACL 2019), arXiv:1901.02860, section 3.3 and
         appendix B.
Idea     The product of query and key is written out for tokens that carry a position, and every absolute place in it
         is replaced by the distance t = i - j or by a learned vector. Keys that were made for an earlier segment can
         then be read from a later one.

             score[i, j] = ((q_i + u) . k_j + (q_i + w) . r_t) / sqrt(d)
             r_t         = W_r [sin(t f), cos(t f)]         f_i = 10000^(-2i/D)

         u and w are two vectors a head (the model of the paper has one pair for all its layers: `share`); W_r is a
         matrix of its own, not the keys'. The products with r_t are made for every distance once, q x (k + 1), and
         moved into place by reading the array on from row to row with rows one shorter: no q x k x d array, no gather.
         Where the context sets positions, and for a single query, r is not made at all: W_r is moved to the query,
         which is turned by its place, sin and cos of i - j being sums of products.

             (q + w) . r_(i - j) = turned((q + w) W_r, i) . [sin(j f), cos(j f)]
Differs  The paper's attention is causal; the distances -1, -2, ... of a bidirectional one are our extension, as in
         XLNet. Fewer key than query heads, biases in the projections and positions that leave places out are ours too.
"""

from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.contracts import SCORE_HOOKS, Context, Hook, hooks, refuse
from formwright.errors import FormwrightError
from formwright.ops.linear import project
from formwright.parts.attention.softmax import repeat_heads, softmax_or_zero
from formwright.parts.position import refuse_all_but_one_sequence

NAME = "Transformer-XL's attention"


@runtime_checkable
class Recalls(Protocol):
    """A cache that keeps what the layer read, in place of the keys and values made of it: while the model learns, its
    matrices change and get a gradient from the past tokens, which themselves get none.
    """

    def recall(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b k d"]:
        """The past inputs and x; x is kept for the next call."""
        ...


class GlobalBiases(nn.Module):
    """u and w: what every query of a head looks for, whatever it is.

    Args:
        heads: query heads.
        head_dim: width of a head.
    """

    no_weight_decay: ClassVar[tuple[str, ...]] = ("content", "distance")

    def __init__(self, *, heads: int, head_dim: int) -> None:
        super().__init__()
        self.content = nn.Parameter(torch.empty(heads, 1, head_dim))  # u
        self.distance = nn.Parameter(torch.empty(heads, 1, head_dim))  # w
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.content, std=0.02)
        nn.init.normal_(self.distance, std=0.02)


class TransformerXLAttention(nn.Module):
    """Multi-head self-attention with relative positions of its own; any length.

    Args:
        dim: width D of the tokens, even.
        heads: query heads.
        kv_heads: key and value heads, a divisor of `heads`; none = as many as query heads.
        head_dim: width d of a head; none = dim / heads.
        qkv_bias: whether the projections have biases (not in the paper).
        dropout: probability of dropping a weight in training.
        clamp_len: distances beyond it count as it; for reading further back than in training. None = no limit.
        window: a query sees the keys less than this far away, itself among them; none = all.
    """

    cache_kind: ClassVar[Literal["keys", "state"] | None] = "keys"
    hooks: ClassVar[frozenset[Hook]] = frozenset()

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        clamp_len: int | None = None,
        window: int | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise FormwrightError(f"Key-value heads must divide the query heads, got {kv_heads} and {heads}.")
        if dim % 2:
            raise FormwrightError(f"{NAME} needs an even width for its pairs of sine and cosine, got {dim}.")
        if head_dim is None and dim % heads:
            raise FormwrightError(f"A width of {dim} does not split into {heads} heads; set head_dim or another width.")
        if not 0 <= dropout < 1:
            raise FormwrightError(f"Attention dropout is a probability from 0 to below 1, got {dropout}.")
        for name, value in (("clamp_len", clamp_len), ("window", window)):
            if value is not None and value < 1:
                raise FormwrightError(f"{name} is a number of tokens from 1, or none for no limit; got {value}.")
        self.dim, self.heads, self.kv_heads, self.head_dim = dim, heads, kv_heads, head_dim or dim // heads
        self.dropout, self.clamp_len, self.window = dropout, clamp_len, window
        self.inner_width = heads * self.head_dim
        self.query_key_value = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim, bias=qkv_bias)
        self.relative = nn.Linear(dim, self.inner_width, bias=False)  # W_r
        self.biases = GlobalBiases(heads=heads, head_dim=self.head_dim)
        self.inner: nn.Module = nn.Identity()
        self.out = nn.Linear(self.inner_width, dim, bias=qkv_bias)
        self.query_key_value.role, self.out.role = "query-key-value", "out"
        self.query_key_value.splits = [width * self.head_dim for width in (heads, kv_heads, kv_heads)]
        self._theirs: tuple[GlobalBiases, ...] = ()

    def share(self, biases: GlobalBiases) -> None:
        """Read u and w from another module, which saves and trains them, and drop one's own."""
        del self.biases
        self._theirs = (biases,)  # in a tuple: not a child of this module

    def forward(self, x: Float[Tensor, "b n d"], context: Context) -> Float[Tensor, "b n d"]:
        self._check(context)
        q, k, v = self._projected(x, context)
        biases = self._theirs[0] if self._theirs else self.biases
        scaling = self.head_dim**-0.5
        scores = self._by_distance((q + biases.distance) * scaling, context)
        content, keys = (q + biases.content) * scaling, repeat_heads(k, self.heads)
        scores = torch.baddbmm(scores.flatten(0, 1), content.flatten(0, 1), keys.flatten(0, 1).mT)
        scores = scores.unflatten(0, (-1, self.heads))
        seen = self._seen(context)
        if seen is not None:
            with torch.no_grad():  # in place and unrecorded: the softmax sends no gradient to what it does not see
                scores.masked_fill_(~seen, -torch.inf)
        weights = softmax_or_zero(scores) if context.padding is not None else scores.softmax(-1)
        if context.attentions is not None:
            context.attentions.append(weights)
        mixed = F.dropout(weights, self.dropout, self.training) @ repeat_heads(v, self.heads)
        return project(self.out, self.inner(mixed.transpose(1, 2).flatten(2)))

    def _check(self, context: Context) -> None:
        refuse_all_but_one_sequence(NAME, context)
        if hooks(context.shared_position) & SCORE_HOOKS:
            raise refuse(
                NAME,
                asked="a position that acts on attention scores",
                because="it has its own",
                instead="Choose position none, or one that is added to the tokens.",
            )
        if context.cache is not None and not context.causal:
            raise refuse(
                NAME,
                asked="a cache without causality",
                because="earlier tokens would see later ones",
                instead="Pass use_cache=False.",
            )

    def _projected(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        groups = [self.heads, self.kv_heads, self.kv_heads]
        if isinstance(context.cache, Recalls):
            q = self._rows(x, slice(self.inner_width)).unflatten(-1, (-1, self.head_dim))
            kept = self._rows(context.cache.recall(x), slice(self.inner_width, None))
            k, v = kept.unflatten(-1, (-1, self.head_dim)).chunk(2, dim=2)
            return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        split = project(self.query_key_value, x).unflatten(-1, (-1, self.head_dim)).split(groups, dim=2)
        q, k, v = (part.transpose(1, 2) for part in split)
        return (q, k, v) if context.cache is None else (q, *context.cache.update(k, v))

    def _rows(self, x: Tensor, rows: slice) -> Tensor:
        """Some rows of the projection alone; all of it where an adapter stands in its place."""
        projection = self.query_key_value
        if type(projection) is not nn.Linear:
            return projection(x)[..., rows]
        return F.linear(x, projection.weight[rows], None if projection.bias is None else projection.bias[rows])

    def _by_distance(self, q: Float[Tensor, "b h q d"], context: Context) -> Float[Tensor, "b h q k"]:
        """q_i . r_t for t = i - j; anything where the mask hides the key."""
        if self.clamp_len is None and (context.positions is not None or context.queries == 1):
            return self._by_turning(q, context)
        if context.positions is not None:
            far = self.clamp_len
            table = self._keys(self._waves(torch.arange(-far, far + 1, device=q.device), q.dtype))
            place = _distances(context).clamp(-far, far)[:, None] + far
            products = q @ table
            return products.gather(-1, place.expand(*products.shape[:2], -1, -1))
        # Column c is distance k - c. From column q on, read in rows of one column less, row i starts at distance i.
        last = 0 if context.causal else 1 - context.queries
        distances = torch.arange(context.keys, last - 1, -1, device=q.device)
        if self.clamp_len is not None:
            distances = distances.clamp(-self.clamp_len, self.clamp_len)
        key = f"transformer-xl {context.keys} to {last} by {self.clamp_len} {q.dtype}"
        if key not in context.carry:
            context.carry[key] = self._waves(distances, q.dtype)
        products = q @ self._keys(context.carry[key])
        moved = products.flatten(-2)[..., context.queries :].unflatten(-1, (context.queries, -1))
        return moved[..., : context.keys]

    def _by_turning(self, q: Float[Tensor, "b h q d"], context: Context) -> Float[Tensor, "b h q k"]:
        key = f"transformer-xl waves {q.dtype}"
        waves = context.carry.get(key)
        if waves is None or waves[0] is not context.positions:
            places = (
                torch.arange(context.keys, device=q.device)[None] if context.positions is None else context.positions
            )
            waves = context.carry[key] = (
                context.positions,
                self._waves(places - places[:, -1:], q.dtype)[:, None],  # small angles are exact
            )
        waves = waves[1]
        linear = type(self.relative) is nn.Linear
        matrix = (
            self.relative.weight if linear else self.relative(torch.eye(self.dim, dtype=q.dtype, device=q.device)).mT
        )
        sine, cosine = (q @ matrix.to(q.dtype).unflatten(0, (self.heads, -1))).chunk(2, -1)
        sin, cos = waves[:, :, -context.queries :].chunk(2, -1)
        turned = torch.cat((cosine * sin - sine * cos, sine * sin + cosine * cos), -1)
        return turned @ waves.mT

    def _waves(self, places: Int[Tensor, "*n"], dtype: torch.dtype) -> Float[Tensor, "*n d"]:
        """[sin, cos] in fp32 or wider, then in the dtype of the products."""
        wide = torch.promote_types(dtype, torch.float32)
        rates = torch.tensor(
            [10000.0 ** (-i / self.dim) for i in range(0, self.dim, 2)], dtype=wide, device=places.device
        )
        angles = places.to(wide)[..., None] * rates
        return torch.cat((angles.sin(), angles.cos()), -1).to(dtype)

    def _keys(self, waves: Float[Tensor, "t d"]) -> Float[Tensor, "h e t"]:
        return self.relative(waves).unflatten(-1, (self.heads, -1)).permute(1, 2, 0)

    def _seen(self, context: Context) -> Bool[Tensor, "b 1 q k"] | None:
        seen = context.mask.dense()
        if self.window is None:
            return seen
        near = (_distances(context).abs() < self.window)[:, None]
        return near if seen is None else seen & near


def _distances(context: Context) -> Int[Tensor, "b q k"]:
    keys = torch.arange(context.keys, device=context.device)[None] if context.positions is None else context.positions
    return context.query_positions()[:, :, None] - keys[:, None, :]
