"""PrFlashAttention: causal attention over blocks, of which the far ones take part by chance.

Paper    Li: The Nature of Mathematical Modeling and Probabilistic Optimization Engineering in Generative AI (2024),
         arXiv:2410.18441, whose abstract proposes a probability over block distances that decides which blocks take
         part in a round of attention, the lower triangle of the scores being kept by re-shaping.
Idea     Queries and keys lie in T blocks of b. Whether query block I meets key block J <= I is drawn for the layer:

             Z_IJ ~ Bernoulli(p(I - J))          p(0) = p(1) = 1,  p(delta) = max(least, delta^-gamma)

         Only drawn blocks are read, by an exact fused attention, so that the work is that of the sum of p: about T ln T
         blocks for gamma = 1, in place of T (T + 1) / 2. In training every forward draws anew; in evaluation Z follows
         from layer, I and J alone, so that decoding with a cache sees the blocks that one forward sees.
         The triangle is a rectangle: block rows I and T - 1 - I have T + 1 blocks together.
Differs  p, the fixed draw of evaluation and the rectangle are our choice: the paper's equations could not be read.
         `weighted` adds -log p to the scores of drawn blocks, a ratio estimate of full attention: consistent, not
         unbiased. Blocks count a row's real tokens, so that padding moves none. Where rows of a batch differ in more
         than that (a cache or a bias beside padding) the blocks left out are masked, and no work is saved.
"""

from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.contracts import Hook, Mask, Structured, Toeplitz, dense, refuse
from formwright.errors import FormwrightError


def rectangle(blocks: int) -> tuple[Int[Tensor, "rows width"], Int[Tensor, "rows width"]]:
    """The lower triangle of `blocks` rows as a rectangle: I and J of its cells. Row r holds block row T - 1 - r, then
    block row r; of an odd T the middle one stands alone and is filled up with I = J = -1.
    """
    rows, width = (blocks + 1) // 2, blocks + 1
    low, place = torch.arange(rows)[:, None], torch.arange(width)[None]
    first = blocks - low  # cells of block row T - 1 - r
    in_first = place < first
    i = torch.where(in_first, blocks - 1 - low, low)
    j = torch.where(in_first, place, place - first)
    empty = ~in_first & (2 * low == blocks - 1)
    return i.masked_fill(empty, -1), j.masked_fill(empty, -1)


def uniforms(i: Int[Tensor, "*n"], j: Int[Tensor, "*n"], layer: int) -> Float[Tensor, "*n"]:
    """Numbers from 0 to 1 that follow from layer and block alone, by a hash of 32 bits."""
    x = (i * 0x9E3779B1 + j * 0x85EBCA77 + layer * 0xC2B2AE3D) & 0xFFFFFFFF
    for _ in range(3):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return (x ^ (x >> 16)).double() / 2.0**32


class PrFlashAttention(nn.Module):
    """Causal softmax attention that reads all near blocks and a few far ones. No parameters.

    Args:
        layer: in which layer it stands, so that layers draw different blocks in evaluation.
        block: b, tokens of a block.
        gamma: how fast the chance of a block falls with its distance; 0 = all blocks, plain attention.
        least: the smallest chance.
        weighted: add -log p to the scores of drawn blocks, so that they stand for those left out.
    """

    grouped: ClassVar[bool] = True
    hooks: frozenset[Hook] = frozenset({"rotate", "bias"})

    def __init__(
        self, *, layer: int = 0, block: int = 64, gamma: float = 1.0, least: float = 0.0, weighted: bool = False
    ) -> None:
        super().__init__()
        if block < 1 or not 0 <= gamma < float("inf") or not 0 <= least <= 1:
            raise FormwrightError(
                f"PrFlashAttention needs block from 1, gamma from 0 and least from 0 to 1, got block={block}, "
                f"gamma={gamma} and least={least}."
            )
        self.layer, self.block, self.gamma, self.least, self.weighted = layer, block, gamma, least, weighted

    def chance(self, distance: Int[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """p of a distance in blocks."""
        return distance.clamp(min=1).double().pow(-self.gamma).clamp(min=self.least)

    def draw(self, blocks: int) -> Bool[Tensor, "i j"]:
        """Which blocks of a lower triangle take part; drawn cell by cell of its rectangle, on the CPU."""
        i, j = rectangle(blocks)
        real = i >= 0
        i, j = i[real], j[real]
        chance = self.chance(i - j)
        luck = torch.rand(len(i), dtype=torch.float64) if self.training else uniforms(i, j, self.layer)
        drawn = torch.zeros(blocks, blocks, dtype=torch.bool)
        drawn[i, j] = luck < chance
        return drawn

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
        """Mixed values; of a query that is padding, 0.

        Raises:
            UnsupportedContext: queries that see later keys, or a scale on the weights, which are never formed.
        """
        if scale is not None:
            raise refuse(
                "PrFlashAttention",
                asked="a position that scales the weights",
                because="its fused kernel forms none",
                instead="Choose a position that rotates or adds a bias, such as rope or alibi.",
            )
        if not mask.causal:
            raise refuse(
                "PrFlashAttention",
                asked="attention in both directions or across sequences",
                because="its blocks are those of a causal triangle",
                instead="Choose another attention for encoders and cross-attention, such as softmax.",
            )
        if mask.padding is None:
            if isinstance(bias, Tensor) and len(bias) > 1:
                places = torch.arange(mask.keys, device=q.device)[None]
                return self._masked(q, k, v, mask, places, bias, scaling)
            return self._blocks(q, k, v, bias, scaling)
        places = (mask.padding.cumsum(-1) - 1).clamp(min=0)
        if mask.queries < mask.keys or bias is not None:
            return self._masked(q, k, v, mask, places, bias, scaling)
        # Every row's real tokens to its beginning: no real query then sees a pad, which lies later.
        order = torch.argsort(~mask.padding, dim=-1, stable=True)
        q, k, v = (x.take_along_dim(order[:, None, :, None], 2) for x in (q, k, v))
        mixed = self._blocks(q, k, v, None, scaling)
        back = torch.argsort(order, dim=-1)
        return mixed.take_along_dim(back[:, None, :, None], 2).masked_fill(~mask.padding[:, None, :, None], 0)

    def _masked(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask,
        places: Int[Tensor, "rows k"],
        bias: Structured | None,
        scaling: float | None,
    ) -> Float[Tensor, "b h q e"]:
        """Rows of a batch whose blocks lie at different keys: the drawn blocks as an array (b, 1, q, k)."""
        block = places // self.block
        drawn = self.draw(-(-mask.keys // self.block)).to(q.device)
        i, j = block[:, -mask.queries :, None], block[:, None, :]
        seen, known = drawn[i, j][:, None], mask.dense()
        seen = seen if known is None else seen & known
        added = torch.zeros(seen.shape, dtype=q.dtype, device=q.device)
        if self.weighted:
            added = added - self.chance(i - j).log().to(q.dtype)[:, None]
        if bias is not None:
            added = added + dense(bias).to(q.dtype)
        mixed = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=added.masked_fill(~seen, -torch.inf),
            scale=scaling,
            enable_gqa=k.shape[1] != q.shape[1],
        )
        return mixed if mask.padding is None else mixed * mask.padding[:, None, -mask.queries :, None]

    def _blocks(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Structured | None, scaling: float | None
    ) -> Float[Tensor, "b h q e"]:
        """Every query block with its drawn key blocks alone; blocks that drew equally many go together."""
        b, queries, keys = self.block, q.shape[2], k.shape[2]
        total = -(-keys // b)
        first = (keys - queries) // b  # the first query block
        lone = first == total - 1  # one block of queries, as in decoding, is not filled up
        front = 0 if lone else (keys - queries) % b
        offset = (keys - queries) % b if lone else 0
        rows = queries if lone else b
        q = q if lone else F.pad(q, (0, 0, front, -keys % b))
        k, v = (F.pad(x, (0, 0, 0, -keys % b)).unflatten(2, (total, b)) for x in (k, v))
        q = q.unflatten(2, (-1, rows))  # (b, h, query blocks, rows, d)
        drawn = self.draw(total)[first:]
        counts = drawn.sum(1)
        future = torch.arange(b, device=q.device) > torch.arange(rows, device=q.device)[:, None] + offset
        parts, order = [], []
        for count in counts.unique().tolist():
            own = (counts == count).nonzero()[:, 0]
            chosen = drawn[own].nonzero()[:, 1].view(len(own), count)  # ascending: the query's own block is the last
            added = self._added(own + first, chosen, rows, offset, future, bias, queries, keys, q)
            here, met = own.to(q.device), chosen.to(q.device)
            mixed = F.scaled_dot_product_attention(
                q[:, :, here].transpose(1, 2).flatten(0, 1),
                k[:, :, met].flatten(3, 4).transpose(1, 2).flatten(0, 1),
                v[:, :, met].flatten(3, 4).transpose(1, 2).flatten(0, 1),
                attn_mask=added.repeat(len(q), 1, 1, 1),
                scale=scaling,
                enable_gqa=k.shape[1] != q.shape[1],
            )
            parts.append(mixed.unflatten(0, (len(q), len(own))).transpose(1, 2))
            order.append(own)
        back = torch.cat(order).argsort().to(q.device)
        return torch.cat(parts, 2)[:, :, back].flatten(2, 3)[:, :, front : front + queries]

    def _added(
        self,
        own: Int[Tensor, " blocks"],
        chosen: Int[Tensor, "blocks count"],
        rows: int,
        offset: int,
        future: Bool[Tensor, "rows b"],
        bias: Structured | None,
        queries: int,
        keys: int,
        like: Tensor,
    ) -> Float[Tensor, "blocks heads rows keys"]:
        """What is added to the scores of query blocks and the key blocks they met: (blocks, 1 or h, rows, count b)."""
        (blocks, count), b = chosen.shape, self.block
        added = torch.zeros(blocks, 1, rows, count, b, dtype=like.dtype, device=like.device)
        if self.weighted:
            added = added - self.chance(own[:, None] - chosen).log().to(added)[:, None, None, :, None]
        if bias is not None:
            i = (own[:, None] * b + offset + torch.arange(rows)).to(like.device)  # (blocks, rows)
            j = (chosen[..., None] * b + torch.arange(b)).to(like.device)  # (blocks, count, b)
            i, j = i.clamp(keys - queries, keys - 1)[:, :, None, None], j.clamp(max=keys - 1)[:, None]
            at = i - (keys - queries)
            values = bias.diagonals[:, i - j + queries - 1] if isinstance(bias, Toeplitz) else bias[0][:, at, j]
            added = added + values.transpose(0, 1).to(like.dtype)
        last = torch.zeros(count, dtype=torch.bool, device=like.device)
        last[-1] = True
        return added.masked_fill(future[:, None] & last[:, None], -torch.inf).flatten(3, 4)
