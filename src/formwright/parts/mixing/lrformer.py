"""LRFormer's attention: scores are negative squared distances, scaled so that no input makes them large.

Paper    Ye et al.: Mitigating Transformer Overconfidence via Lipschitz Regularization (UAI 2023), arXiv:2306.06849;
         without the scale: Kim, Papamakarios, Mnih: The Lipschitz Constant of Self-Attention (ICML 2021),
         arXiv:2006.04710.
Idea     Queries are the keys, so that a token is nearest to itself, and what is far from all training data stays far.

             q = k = x W_q, v = x W_v        score_ts = -alpha |q_t - q_s|^2 / (a b)        out = softmax(score) v W_o

             a = |Q|_F over all tokens, per head       b = the largest |x_t|       L2: 1 / sqrt(d) for alpha / (a b)

         Without biases f(s x) = s f(x) up to that of W_o. Since |q_t - q_s|^2 <= 4 max |q|^2, a >= max |q| and
         max |q| <= |W_q|_2 b, every score lies in [-4 alpha |W_q|_2, 0] whatever the input, and every one of N weights
         is at least exp(-4 alpha |W_q|_2) / N; dot products have no such bound.
Differs  Norms are those of one sample: in a public copy of the layer they run over the batch. In a causal model, which
         the paper does not treat, a and b are those of the tokens so far. a grows with sqrt(N), so that alpha belongs
         to a length; by_length=True divides it out. spectral bounds |W|_2 of all three matrices, as SNGP's layers do.
         Keys of their own, with which the bound is lost, are left out.
"""

import math
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.contracts import SCORE_HOOKS, Context, Hook, hooks, refuse
from formwright.errors import FormwrightError
from formwright.ops.linear import project
from formwright.parts.attention.softmax import softmax_or_zero

TINY = 1e-10


class L2Attention(nn.Module):
    """Self-attention by distance: (b, n, d) -> (b, n, d), two projections in place of three.

    Args:
        dim: width D of the tokens.
        heads: H.
        head_dim: width d of a head; none = dim / heads.
        bias: whether queries and values have biases; the output projection has one.
        spectral: the largest singular value the matrices may act with; none = as they are.
        dropout: probability of dropping a weight in training.
    """

    cache_kind: ClassVar[Literal["keys", "state"] | None] = "keys"
    hooks: ClassVar[frozenset[Hook]] = frozenset()

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        head_dim: int | None = None,
        bias: bool = False,
        spectral: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if heads < 1 or (head_dim is None and dim % heads):
            raise FormwrightError(f"A width of {dim} does not split into {heads} heads; set head_dim or another width.")
        if spectral is not None and spectral <= 0:
            raise FormwrightError(f"The largest singular value must be above 0, got spectral={spectral}.")
        if not 0 <= dropout < 1:
            raise FormwrightError(f"Attention dropout is a probability from 0 to below 1, got {dropout}.")
        self.heads, self.head_dim = heads, head_dim or dim // heads
        self.spectral, self.dropout = spectral, dropout
        self.inner_width = heads * self.head_dim
        self.query_value = nn.Linear(dim, 2 * self.inner_width, bias=bias)
        self.inner: nn.Module = nn.Identity()
        self.out = nn.Linear(self.inner_width, dim)
        self.out.role = "out"

    def forward(self, x: Float[Tensor, "b n d"], context: Context) -> Float[Tensor, "b n d"]:
        self._check(context)
        projected = self._applied(self.query_value, x, halves=2)
        q, v = (half.unflatten(-1, (self.heads, -1)).transpose(1, 2) for half in projected.chunk(2, dim=-1))
        # the size of a token travels as one more channel of its values, so that a cache keeps it
        v = torch.cat([v, x.norm(dim=-1)[:, None, :, None].expand(-1, self.heads, -1, 1)], -1)
        k = q
        if context.cache is not None:
            k, v = context.cache.update(k, v)
        weights = softmax_or_zero(self.scores(q, k, v[:, :1, :, -1], context)).to(x.dtype)
        if context.attentions is not None:
            context.attentions.append(weights)
        mixed = F.dropout(weights, self.dropout, self.training) @ v[..., :-1]
        return self._applied(self.out, self.inner(mixed.transpose(1, 2).flatten(2)))

    def scores(
        self, q: Float[Tensor, "b h q e"], k: Float[Tensor, "b h k e"], sizes: Float[Tensor, "b 1 k"], context: Context
    ) -> Float[Tensor, "b h q k"]:
        """At most 0, 0 for a token and itself, -inf where the mask hides the key. In float32 at least: the expanded
        square cancels.

        Args:
            sizes: |x_s| of the keys' tokens.
        """
        q, k, sizes = (one.to(torch.promote_types(one.dtype, torch.float32)) for one in (q, k, sizes))
        squares = k.square().sum(-1)
        apart = (q.square().sum(-1)[..., None] + squares[..., None, :] - 2 * q @ k.mT).clamp(min=0)
        place = torch.arange(context.keys, device=q.device)
        apart = apart.masked_fill(place == place[-context.queries :, None], 0)
        scores = -apart * self.factor(squares, sizes, context)
        seen = context.mask.dense()
        return scores if seen is None else scores.masked_fill(~seen, -torch.inf)

    def factor(
        self, _squares: Float[Tensor, "b h k"], _sizes: Float[Tensor, "b 1 k"], _context: Context
    ) -> float | Float[Tensor, "b h queries 1"]:
        """What squared distances are multiplied by."""
        return self.head_dim**-0.5

    def _applied(self, layer: nn.Linear, x: Tensor, halves: int = 1) -> Tensor:
        if self.spectral is None:
            return project(layer, x)
        largest = [torch.linalg.matrix_norm(half, 2) for half in layer.weight.float().chunk(halves)]
        shrunk = [
            half * (self.spectral / size).clamp(max=1).to(half.dtype)
            for half, size in zip(layer.weight.chunk(halves), largest, strict=True)
        ]
        return F.linear(x, torch.cat(shrunk), layer.bias)

    def _check(self, context: Context) -> None:
        name = type(self).__name__
        if context.memory is not None:
            raise refuse(
                name,
                asked="cross-attention",
                because="its queries are its keys",
                instead="Choose softmax for the cross-attention.",
            )
        if hooks(context.shared_position) & SCORE_HOOKS:
            raise refuse(
                name,
                asked="a position that acts on attention scores",
                because="they would no longer be distances",
                instead="Choose a position that is added to the tokens, such as learned or sinusoidal, or none.",
            )
        if context.cache is not None and not context.causal:
            raise refuse(
                name,
                asked="a cache without causality",
                because="earlier tokens would see later ones",
                instead="Pass use_cache=False.",
            )


class LRFormerAttention(L2Attention):
    """Self-attention by distance relative to the size of the input.

    Args:
        dim: width D of the tokens.
        heads: H.
        head_dim: width d of a head; none = dim / heads.
        alpha: how sharp the weights are (100 in the paper); near 0 they are uniform.
        by_length: whether a is divided by sqrt(N), so that one alpha suits texts of any length.
        bias: whether queries and values have biases, with which there is no bound; the output projection has one.
        spectral: the largest singular value the matrices may act with; none = as they are.
        dropout: probability of dropping a weight in training.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        head_dim: int | None = None,
        alpha: float = 100.0,
        by_length: bool = False,
        bias: bool = False,
        spectral: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim=dim, heads=heads, head_dim=head_dim, bias=bias, spectral=spectral, dropout=dropout)
        if alpha <= 0:
            raise FormwrightError(f"alpha must be above 0, got {alpha}: at 0 no token would tell others apart.")
        self.alpha, self.by_length = alpha, by_length

    def factor(
        self, squares: Float[Tensor, "b h k"], sizes: Float[Tensor, "b 1 k"], context: Context
    ) -> Float[Tensor, "b h queries 1"]:
        """alpha / (a b), of the real tokens, in a causal model of those so far."""
        real = torch.ones_like(sizes[:, 0]) if context.padding is None else context.padding.to(sizes.dtype)
        real = real[:, None]
        squares, sizes = squares * real, sizes * real
        if context.causal:
            total, largest, count = squares.cumsum(-1), sizes.cummax(-1).values, real.cumsum(-1)
            total, largest, count = (one[..., -context.queries :] for one in (total, largest, count))
        else:
            total, largest, count = (
                squares.sum(-1, keepdim=True),
                sizes.amax(-1, keepdim=True),
                real.sum(-1, keepdim=True),
            )
        if self.by_length:
            total = total / count.clamp(min=1)
        norm = total.clamp(min=torch.finfo(total.dtype).tiny).sqrt()
        return (self.alpha / (norm * largest + TINY))[..., None]

    @torch.no_grad()
    def lowest_score(self, tokens: int = 1) -> Float[Tensor, " h"]:
        """What no score of a head falls below, whatever the input: -4 alpha |W_q|_2.

        Args:
            tokens: the longest input, which counts with by_length alone.

        Raises:
            FormwrightError: the queries have a bias, so that small inputs are no longer bounded.
        """
        if self.query_value.bias is not None:
            raise FormwrightError("Queries with a bias have no bound; build the layer with bias=False.")
        queries = self.query_value.weight[: self.inner_width].float()
        scale = 1.0
        if self.spectral is not None:
            scale = min(1.0, self.spectral / float(torch.linalg.matrix_norm(queries, 2)))
        norms = torch.linalg.matrix_norm(queries.view(self.heads, self.head_dim, -1), 2)
        return -4 * self.alpha * scale * norms * (math.sqrt(tokens) if self.by_length else 1.0)
