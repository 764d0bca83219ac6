"""Softmax attention over the nearest keys, found by prioritised search: see native/iceformer.cpp.

    out_i = sum_j p_ij v_j over the k keys j that were found        p_ij = softmax_j(scaling q_i . k_j)

`nearest_attention` runs the kernel and `nearest_attention_reference` the same search in tensor operations, which looks
at every key: the same keys without the speed, on any device and in any dtype. `attend_found` attends to keys already
found, with gradients.

Axes     b batch, h heads of queries, g of keys and values, q queries, k keys, c features, e of the values, f found.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from formwright.ops import native

DRAWN = 4096  # random numbers at a time, so that the first of many are those of few
CONSTRUCTION = 5  # cells a key looks into where it looks for its own, as in the release
BLOCK = 2**24  # numbers of a block of scores in the reference


@dataclass(frozen=True, kw_only=True)
class Search:
    """How keys are looked for.

    Args:
        neighbours: keys a query attends to.
        levels: of cells; 1 = all keys in one.
        view: cells a query looks into on every level below the highest.
        composites, simples: composite indices, and simple ones in each.
        retrieve: share of the points in those cells that become candidates.
        visit: share of their places in the simple indices that are visited.
        seed: of the levels and directions.
    """

    neighbours: int
    levels: int = 2
    view: int = 32
    composites: int = 2
    simples: int = 4
    retrieve: float = 1.0
    visit: float = 1.0
    seed: int = 0

    @property
    def prioritised(self) -> bool:
        return self.retrieve < 1 or self.visit < 1


@functools.cache
def _kernel() -> Callable[..., int] | None:
    return native.function("formwright_iceformer", tensors=9, numbers=15)


@functools.lru_cache(maxsize=16)
def heights(keys: int, levels: int, seed: int) -> Int[Tensor, " keys"]:
    """Of the o-th key how many levels it rises: one more with probability (o + 1)^(-1 / levels) each time."""
    generator = torch.Generator("cpu").manual_seed(seed)
    draws = [torch.rand(DRAWN, generator=generator, dtype=torch.float64) for _ in range(-(-keys // DRAWN))]
    u = torch.cat(draws)[:keys] if draws else torch.empty(0)
    order = torch.arange(1, keys + 1, dtype=torch.float64, device="cpu").log()
    risen = (levels * -u.log() / order).nan_to_num(posinf=levels).clamp(max=levels - 1)
    return risen.to(torch.int32)


@functools.lru_cache(maxsize=16)
def directions(count: int, width: int, seed: int) -> Float[Tensor, "{count} {width}"]:
    """Unit vectors, drawn at random."""
    generator = torch.Generator("cpu").manual_seed(seed + 1)
    return F.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64, device="cpu"), dim=-1)


def serves(*tensors: Tensor) -> bool:
    """Whether the kernel is there and takes these."""
    return _kernel() is not None and all(
        x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and type(x) is Tensor for x in tensors
    )


def nearest_attention(
    q: Float[Tensor, "b h q c"],
    k: Float[Tensor, "b g k c"],
    v: Float[Tensor, "b g k e"],
    *,
    search: Search,
    causal: bool = False,
    padding: Bool[Tensor, "b k"] | None = None,
    scaling: float | None = None,
) -> tuple[Float[Tensor, "b h q e"], Int[Tensor, "b h q f"]]:
    """The mixed values, and which keys were found, in no order, -1 where a query sees fewer.

    Args:
        q, k, v: g divides h.
        search: how keys are looked for.
        causal: the queries are the last of the keys, and see none after themselves.
        padding: True = a key that may be seen; none = all may.
        scaling: factor above 0 on the products of queries and keys; none = 1 / sqrt(c).
    """
    if not serves(q, k, v):
        return nearest_attention_reference(q, k, v, search=search, causal=causal, padding=padding, scaling=scaling)
    kernel = _kernel()
    assert kernel is not None
    batch, heads, queries, width = q.shape
    groups, keys = k.shape[1:3]
    wide = [x.float().contiguous() for x in (q, k, v)]
    out = wide[0].new_empty(batch, heads, queries, v.shape[-1])
    found = torch.empty(batch, heads, queries, search.neighbours, dtype=torch.int32)
    real = None if padding is None else padding.to(torch.uint8).contiguous()
    constants = torch.tensor([width**-0.5 if scaling is None else scaling, search.retrieve, search.visit])
    axes = directions(search.composites * search.simples, width + 1, search.seed).float()
    rises = heights(keys, search.levels, search.seed)
    failed = kernel(
        *(x.data_ptr() for x in wide),
        None if real is None else real.data_ptr(),
        rises.data_ptr(),
        axes.data_ptr(),
        constants.data_ptr(),
        out.data_ptr(),
        found.data_ptr(),
        batch,
        heads,
        groups,
        queries,
        keys,
        width,
        v.shape[-1],
        search.neighbours,
        search.levels,
        search.view,
        CONSTRUCTION,
        search.composites,
        search.simples,
        causal,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"There was no memory for an index of {keys} keys.")
    return out.to(v.dtype), found


def nearest_attention_reference(
    q: Float[Tensor, "b h q c"],
    k: Float[Tensor, "b g k c"],
    v: Float[Tensor, "b g k e"],
    *,
    search: Search,
    causal: bool = False,
    padding: Bool[Tensor, "b k"] | None = None,
    scaling: float | None = None,
) -> tuple[Float[Tensor, "b h q e"], Int[Tensor, "b h q f"]]:
    """The same, every key looked at."""
    batch, heads, queries, _ = q.shape
    groups, keys = k.shape[1:3]
    found = torch.full((batch, heads, queries, search.neighbours), -1, dtype=torch.int32, device=q.device)
    dtype = torch.promote_types(q.dtype, torch.float32)
    for row in range(batch):
        position = torch.arange(keys, device=q.device) if padding is None else padding[row].nonzero()[:, 0]
        if not len(position):
            continue
        place = torch.arange(keys - queries, keys, device=q.device)
        limit = torch.searchsorted(position, place, right=True) - 1 if causal else torch.full_like(place, keys)
        for head in range(heads):
            points = k[row, head * groups // heads, position].to(dtype)
            index = _Index(points, search, causal)
            slots = index.look(q[row, head].to(dtype), limit)
            found[row, head] = torch.where(slots < 0, slots, position[slots.clamp(min=0)]).int()
    return attend_found(q, k, v, found, scaling=scaling), found


def products(q: Float[Tensor, "b h q c"], k: Float[Tensor, "b g k c"], *, search: Search, causal: bool = False) -> int:
    """How many products of two vectors the search takes, those among the keys for its index included; those of the
    simple indices, where candidates are put in an order, are not."""
    heads, queries, keys = q.shape[1], q.shape[2], k.shape[2]
    limit = torch.arange(keys - queries, keys, device=q.device) if causal else torch.full((queries,), keys)
    taken = 0
    for row in range(len(q)):
        for head in range(heads):
            index = _Index(k[row, head * k.shape[1] // heads], search, causal)
            index.look(q[row, head], limit.to(q.device))
            taken += index.products
    return taken


class _Index:
    """The points of each level and the cells they lie in, as masks."""

    def __init__(self, points: Float[Tensor, "n c"], search: Search, causal: bool) -> None:
        self.points, self.search = points, search
        self.products = 0  # taken so far
        n = len(points)
        self.squares = points.square().sum(-1)
        self.ceiling = self.squares.cummax(0).values if causal else self.squares.max().expand(n)
        self.heights = heights(n, search.levels, search.seed).to(points.device)
        # of every point its cell on every level: the ordinal of the point that heads it
        self.cell = torch.zeros(search.levels, n, dtype=torch.long, device=points.device)
        order = torch.arange(n, device=points.device)
        for level in range(search.levels - 2, -1, -1):
            heading = self.heights > level
            joining = ((self.heights == level).nonzero())[:, 0]
            self.cell[level] = torch.where(heading, order, 0)
            limit = joining if causal else torch.full_like(joining, n)
            near = self._descend(points[joining], limit, level + 1, CONSTRUCTION, 1, joining)
            self.cell[level, joining] = near[:, 0]

    def look(self, q: Float[Tensor, "q c"], limit: Int[Tensor, " q"]) -> Int[Tensor, "q f"]:
        """Ordinals of the keys found for queries that see ordinals up to a limit; -1 where there are fewer."""
        step = max(1, BLOCK // max(1, len(self.points)))
        parts = [
            self._descend(x, last, 0, self.search.view, self.search.neighbours, None)
            for x, last in zip(q.split(step), limit.split(step), strict=True)
        ]
        return torch.cat(parts)

    def _descend(
        self, x: Tensor, limit: Tensor, lowest: int, view: int, wanted: int, joining: Tensor | None
    ) -> Int[Tensor, "x f"]:
        n = len(self.points)
        order = torch.arange(n, device=x.device)
        top = limit.clamp(0, n - 1)
        ceiling = self.ceiling[joining] if joining is not None else self.ceiling[top]
        lift = (
            (ceiling - self.squares[joining]).clamp(min=0).sqrt() if joining is not None else torch.zeros_like(ceiling)
        )
        others = (ceiling[:, None] - self.squares).clamp(min=0).sqrt()
        scores = x @ self.points.mT + lift[:, None] * others
        length = ceiling.sqrt() if joining is not None else x.norm(dim=-1)
        within = seen = (order <= limit[:, None]) & (limit[:, None] >= 0)
        for level in range(self.search.levels - 1, lowest - 1, -1):
            allowed = within & (self.heights >= level)
            most = wanted if level == lowest else view
            if self.search.prioritised:
                allowed = allowed & self._candidates(x, lift, length, ceiling, others, allowed, most)
            self.products += int(allowed.sum())
            best, ordinal = scores.masked_fill(~allowed, -torch.inf).topk(min(most, n), dim=-1)
            ordinal = ordinal.masked_fill(best == -torch.inf, -1)
            if level == lowest:
                return F.pad(ordinal, (0, wanted - ordinal.shape[1]), value=-1)
            chosen = torch.zeros(len(x), n + 1, dtype=torch.bool, device=x.device)
            chosen.scatter_(1, torch.where(ordinal < 0, n, ordinal), True)
            within = seen & chosen[:, self.cell[level - 1]]
        raise AssertionError("The lowest level returns.")

    def _candidates(
        self, x: Tensor, lift: Tensor, length: Tensor, ceiling: Tensor, others: Tensor, allowed: Tensor, most: int
    ) -> Bool[Tensor, "x n"]:
        search = self.search
        u = directions(search.composites * search.simples, x.shape[1] + 1, search.seed).to(x)
        safe_length, c = (torch.where(size > 0, size, 1)[:, None] for size in (length, ceiling.sqrt()))
        asked = (x @ u[:, :-1].mT + lift[:, None] * u[:, -1]) / safe_length
        there = (self.points @ u[:, :-1].mT)[None] + others[..., None] * u[:, -1]
        distance = (there / c[..., None] - asked[:, None]).abs().masked_fill(~allowed[..., None], torch.inf)
        priority = distance.unflatten(-1, (search.composites, search.simples)).amax(-1).amin(-1)
        n = allowed.sum(-1)
        count = _share(search.retrieve, n)
        if search.visit < 1:
            visits = _share(search.visit, n * len(u))
            ranked = distance.flatten(1).sort(-1).values
            reached = ranked.gather(1, (visits - 1).clamp(min=0)[:, None]).where(visits[:, None] > 0, -1)
            count = count.minimum((priority <= reached).sum(-1))
        count = count.clamp(min=most).minimum(n)
        last = priority.sort(-1).values.gather(1, (count - 1).clamp(min=0)[:, None])
        return priority <= last


def _share(part: float, n: Int[Tensor, " x"]) -> Int[Tensor, " x"]:
    """Rounded up, in the kernel's float32."""
    return (torch.tensor(part, dtype=torch.float32, device=n.device) * n.float()).ceil().long()


def attend_found(
    q: Float[Tensor, "b h q c"],
    k: Float[Tensor, "b g k c"],
    v: Float[Tensor, "b g k e"],
    found: Int[Tensor, "b h q f"],
    *,
    scaling: float | None = None,
) -> Float[Tensor, "b h q e"]:
    """Softmax attention over keys already found, -1 = none; a query without any gets 0."""
    shared = q.shape[1] // k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    rows = found.clamp(min=0).long().unflatten(1, (k.shape[1], shared)).flatten(2)[..., None]
    with torch.autocast(q.device.type, enabled=False):
        near, mixed = (
            x.to(dtype).gather(2, rows.expand(*rows.shape[:3], x.shape[-1])).unflatten(2, (shared, *found.shape[2:]))
            for x in (k, v)
        )
        near, mixed = near.flatten(1, 2), mixed.flatten(1, 2)
        scores = (q[..., None, :].to(dtype) @ near.mT)[..., 0, :] * (
            q.shape[-1] ** -0.5 if scaling is None else scaling
        )
        nothing = (found < 0).all(-1, keepdim=True)
        scores = scores.masked_fill((found < 0) & ~nothing, -torch.inf)
        weights = scores.softmax(-1).masked_fill(nothing, 0)
        return (weights[..., None, :] @ mixed)[..., 0, :].to(v.dtype)
