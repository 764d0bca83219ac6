"""Topological attention: kernel attention under a mask by tree distance, without an n x n array.

Paper    Choromanski et al.: Fast Tree-Field Integrators: From Low Displacement Rank to Topological Transformers
         (NeurIPS 2024), arXiv:2406.15881.
Idea     Features phi of queries and keys stand for the kernel of attention. The mask of parts/position/ftfi.py then is
         a matrix by which a field on a tree is multiplied, and ops/ftfi.py knows how:

             out_i = phi(q_i) . D_i / phi(q_i) . E_i
             D_i = sum_j f(dist(i, j)) phi(k_j) v_j^T         E_i = sum_j f(dist(i, j)) phi(k_j)

         Work of order n log^2 n and memory of order n, forward and backward; a = 0 is plain linear attention.
Differs  phi is ReLU + 0.001, ELU + 1 or exp, channel by channel; random features are not here. What the mask's file
         says of trees and of the three numbers holds here, too.
"""

import math
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.contracts import SCORE_HOOKS, Context, Hook, hooks, refuse
from formwright.errors import FormwrightError
from formwright.ops.ftfi import integrate_lattice, lattice
from formwright.parts.position.ftfi import TopologicalMask, check_cells, grid_trees, refuse_a_memory

LEAST = 1e-3  # added to ReLU features, so that no query is without a key


class TopologicalAttention(nn.Module):
    """Multi-head kernel attention, in both directions, masked by the distance in spanning trees of the tokens' grid.

    Args:
        dim: width D of the tokens.
        heads: attention heads.
        head_dim: width of a head; none = dim / heads.
        qkv_bias: whether the projections have biases.
        features: phi.
        trees: spanning trees over which the mask is averaged.
        per_head: whether every head has its own three numbers.
        reach: the distance in steps at which all three numbers weigh the same.
        masked: without the mask it is linear attention.
    """

    cache_kind: ClassVar[Literal["keys", "state"] | None] = None
    hooks: ClassVar[frozenset[Hook]] = frozenset()

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        features: Literal["relu", "elu", "exp"] = "relu",
        trees: int = 1,
        per_head: bool = False,
        reach: float = 32.0,
        masked: bool = True,
    ) -> None:
        super().__init__()
        if heads < 1 or (head_dim is None and dim % heads):
            raise FormwrightError(f"A width of {dim} does not split into {heads} heads; set head_dim or another width.")
        if features not in ("relu", "elu", "exp"):
            raise FormwrightError(f'Topological attention has features="relu", "elu" or "exp", got {features!r}.')
        self.heads, self.head_dim, self.features = heads, head_dim or dim // heads, features
        self.inner_width = heads * self.head_dim
        self.query_key_value = nn.Linear(dim, 3 * self.inner_width, bias=qkv_bias)
        self.query_key_value.role, self.query_key_value.splits = "query-key-value", [self.inner_width] * 3
        self.mask = TopologicalMask(heads=heads, trees=trees, per_head=per_head, reach=reach) if masked else None
        self.inner: nn.Module = nn.Identity()
        self.out = nn.Linear(self.inner_width, dim, bias=qkv_bias)
        self.out.role = "out"

    def forward(self, x: Float[Tensor, "b n d"], context: Context) -> Float[Tensor, "b n d"]:
        self.check(context)
        q, k, v = self.query_key_value(x).unflatten(-1, (3, self.heads, -1)).permute(2, 1, 3, 0, 4)  # (n, h, b, d)
        wide = torch.promote_types(x.dtype, torch.float32)
        if torch.is_autocast_enabled(x.device.type):
            wide = torch.float32
        real = None if context.padding is None else context.padding.mT[:, None, :, None]
        with torch.autocast(x.device.type, enabled=False):
            mixed = self.mix(q.to(wide), k.to(wide), v.to(wide), real, context).to(q.dtype)
        return self.out(self.inner(mixed.permute(2, 0, 1, 3).flatten(2)))

    def check(self, context: Context) -> None:
        """Raises:
        UnsupportedContext: causality, a memory, a cache, weights to show, or a position that works on scores.
        """
        name = "Topological attention"
        refuse_a_memory(name, context)
        if context.causal or context.cache is not None:
            raise refuse(
                name,
                asked="a causal sequence" if context.causal else "a cache",
                because="a tree has no order of its nodes, and every token is summed with all others",
                instead="Use it in an encoder; for decoders choose softmax with position=topological-mask.",
            )
        if context.attentions is not None:
            raise refuse(
                name,
                asked="output_attentions",
                because="its weights are never formed",
                instead="Choose softmax with position=topological-mask to see weights.",
            )
        asked = hooks(context.shared_position) & SCORE_HOOKS
        if asked:
            raise refuse(
                name,
                asked=f"a position with {', '.join(sorted(asked))}",
                because="it has no scores, and its mask is its position",
                instead="Choose a position that is added to the tokens, such as learned, or none.",
            )
        if context.grid is not None and self.mask is not None:
            check_cells(name, context)

    def mix(
        self,
        q: Float[Tensor, "n h b d"],
        k: Float[Tensor, "n h b d"],
        v: Float[Tensor, "n h b d"],
        real: Tensor | None,
        context: Context,
    ) -> Float[Tensor, "n h b d"]:
        """The masked weighted means of the values."""
        q, k = self.phi(q, None), self.phi(k, real)
        if real is not None:
            k, v = k * real, v.masked_fill(~real, 0)
        v = F.pad(v, (0, 1), value=1.0)
        if self.mask is None:
            sums = torch.einsum("nhbm,nhbe->hbme", k, v)[None]
        else:
            sums = self.integral(k[..., :, None] * v[..., None, :], context)  # phi(k) (v, 1)^T
        mixed = (q[..., None, :] @ sums).squeeze(-2)
        return mixed[..., :-1] / mixed[..., -1:].clamp(min=torch.finfo(mixed.dtype).tiny)

    def phi(self, x: Float[Tensor, "n h b d"], real: Tensor | None) -> Float[Tensor, "n h b d"]:
        """Features, above 0. A factor common to the channels of a query, or to all keys, cancels."""
        x = x * self.head_dim**-0.25
        if self.features == "relu":
            return F.relu(x) + LEAST
        if self.features == "elu":
            return F.elu(x) + 1
        hidden = x if real is None else x.masked_fill(~real, -torch.inf)
        top = hidden.detach().amax((0, 3), keepdim=True)
        return (x - top.clamp(min=torch.finfo(x.dtype).min)).exp()

    def integral(self, field: Float[Tensor, "n h b m e"], context: Context) -> Float[Tensor, "n h b m e"]:
        """sum_j f(dist(i, j)) field_j, by the trees of the grid that the tokens lie on."""
        assert self.mask is not None
        grid, positions = context.grid, context.positions
        if grid is None:
            grid = (len(field) if positions is None else int(positions.max()) + 1,)
        cells = math.prod(grid)
        if positions is not None:
            at = positions.expand(field.shape[2], -1).mT[:, None, :, None, None].expand_as(field)
            field = field.new_zeros(cells, *field.shape[1:]).scatter_add(0, at, field)
        trees = grid_trees(grid, self.mask.trees)
        longest = max((lattice(tree, field) for tree in trees), key=len)
        logs = self.mask.log_mask(longest)
        values = (logs - logs.detach().amax(1, keepdim=True)).exp() / len(trees)  # (h or 1, s); the factor cancels
        parts = field.split(1, dim=1) if len(values) > 1 else [field]
        summed = []
        for part, row in zip(parts, values.to(field.dtype), strict=True):
            flat = part.flatten(1)
            mean = sum(integrate_lattice(tree, flat, row[: len(lattice(tree, flat))]) for tree in trees)
            summed.append(mean.view_as(part))
        result = torch.cat(summed, 1)
        return result if positions is None else result.gather(0, at)
