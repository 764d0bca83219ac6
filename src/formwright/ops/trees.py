"""Trees for fast integration: spanning trees and tree metrics of graphs, and the IntegratorTree that halves a tree.

Paper    Choromanski et al.: Fast Tree-Field Integrators (NeurIPS 2024), arXiv:2406.15881. Tree metrics: Fakcharoenphol,
         Rao, Talwar: A tight bound on approximating arbitrary metrics by tree metrics (2004).
Idea     Every tree has a node, the pivot, at which it falls into two trees of at least a quarter of the nodes each
         that share the pivot alone. Done again and again, every pair of nodes is parted exactly once, at a pivot on its
         path: dist(i, j) = dist(i, pivot) + dist(pivot, j).
Here     The nodes stand in preorder: a part of a tree is then a subsequence of it, again in preorder, and no part is
         ever walked. A level is halved at a time, by native/trees.cpp or by array operations. Everything is
         done once a tree; what the integrators read are index tensors.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from formwright.errors import FormwrightError
from formwright.ops import native

LEAF = 24  # trees of up to so many nodes are not halved any more
FINEST = 64  # weights that are multiples of 1 / q, q up to this, lie on a lattice

Array = np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Rooted:
    """The nodes of a tree in preorder: each stands before its descendants, which follow it without a gap."""

    node: Array  # which node stands here
    parent: Array  # where its parent stands; the root's is itself
    size: Array  # of its subtree
    depth: Array  # distance from the root
    weight: Array  # of the edge to the parent; 0 at the root


@dataclass(frozen=True, kw_only=True, eq=False)
class IntegratorTree:
    """A weighted tree, halved down to leaves of a few nodes. `integrator_tree` makes it.

    Entries are the nodes of all halves of all levels, the pivots left out; the halves of a pair are 2 g and 2 g + 1.

    Attributes:
        nodes: how many nodes there are.
        levels: how often the tree is halved.
        entry: which node an entry is, in the order of the halves.
        half: the half it belongs to.
        distance: how far it is from the pivot that its half shares with the other, to 1e-15 of the tree's depth.
        level: the level of each half.
        leaf: nodes of every leaf, -1 where there is none.
        within: the distances inside the leaves.
        step: all distances are multiples of it; none = they lie on no lattice.
        rooted: the tree itself.
    """

    nodes: int
    levels: int
    entry: Int[Tensor, " e"]
    half: Int[Tensor, " e"]
    distance: Float[Tensor, " e"]
    level: Int[Tensor, " h"]
    leaf: Int[Tensor, "l t"]
    within: Float[Tensor, "l t t"]
    step: float | None
    rooted: Rooted
    kept: dict = field(default_factory=dict)  # what an integrator works out once a tree

    def distances(self) -> Float[Tensor, "n n"]:
        """dist(i, j) of all pairs, float64: O(n^2), for tests and small trees."""
        place = np.argsort(self.rooted.node)
        return torch.from_numpy(np.maximum(all_distances(self.rooted)[place][:, place], 0.0))

    @functools.cached_property
    def diameter(self) -> float:
        """The longest distance."""
        longest = float(self.within.max()) if self.within.numel() else 0.0
        if self.half.numel():
            reach = torch.zeros(len(self.level), dtype=torch.float64)
            reach.scatter_reduce_(0, self.half, self.distance, "amax")
            longest = max(longest, float(reach.view(-1, 2).sum(1).max()))
        return longest


def integrator_tree(
    edges: Int[Tensor, "m 2"], weights: Float[Tensor, " w"] | None = None, *, leaf: int = LEAF
) -> IntegratorTree:
    """Halve a tree of m + 1 nodes. O(n log^2 n), once a tree.

    Args:
        edges: pairs of nodes, numbered from 0.
        weights: lengths of the edges, from 0; none = 1.
        leaf: trees of up to so many nodes are left whole.

    Raises:
        FormwrightError: the edges are no tree, a weight is negative or not finite, or leaf is below 2.
    """
    if leaf < 2:
        raise FormwrightError(f"Leaves of {leaf} nodes cannot be: choose from 2, such as {LEAF}.")
    ends = _edges(edges)
    lengths = np.ones(len(ends)) if weights is None else _weights(weights, len(ends))
    rooted, halves, (place, length) = _halved_by_kernel(ends, lengths, leaf) or _halved_by_arrays(ends, lengths, leaf)
    nodes, within = _inside(rooted, place, length)
    entry, half, distance, level = (torch.from_numpy(part) for part in halves)
    return IntegratorTree(
        nodes=len(rooted.node),
        levels=int(level.max()) + 1 if len(level) else 0,
        entry=entry,
        half=half,
        distance=distance,
        level=level,
        leaf=torch.from_numpy(nodes),
        within=torch.from_numpy(within),
        step=_lattice(lengths),
        rooted=rooted,
    )


@functools.cache
def _kernel(name: str, tensors: int, numbers: int) -> Callable[..., int] | None:
    """A native function; none where the kernels are not built, or are from before it."""
    try:
        return native.function(name, tensors=tensors, numbers=numbers)
    except AttributeError:
        return None


def _pointers(*arrays: Array) -> list[int]:
    return [array.__array_interface__["data"][0] for array in arrays]  # array.ctypes.data costs ten times as much


def counting_sort(keys: Array, count: int) -> tuple[Array, Array]:
    """For things that belong to 0 .. count - 1: in which order to take them, and where each one's begin (and end)."""
    kernel = _kernel("formwright_counting_sort", 3, 2)
    if kernel is None:
        return np.argsort(keys, kind="stable"), np.concatenate([[0], np.bincount(keys, minlength=count).cumsum()])
    keys, order, begin = np.ascontiguousarray(keys), np.empty(len(keys), np.int64), np.empty(count + 1, np.int64)
    kernel(*_pointers(keys, order, begin), len(keys), count)
    return order, begin


Halves = tuple[Rooted, tuple[Array, Array, Array, Array], tuple[Array, Array]]


def _halved_by_kernel(ends: Array, lengths: Array, leaf: int) -> Halves | None:
    """See native/trees.cpp; none without it, and for what is no tree."""
    kernel, nodes = _kernel("formwright_halve_tree", 14, 3), len(ends) + 1
    if kernel is None:
        return None
    whole, real = (lambda size: np.empty(size, np.int64)), (lambda size: np.empty(size))
    # at each level there are fewer than 2 n entries, and a level is at most 3/4 of the last, and a node, in length
    room = 2 * nodes * (2 + math.ceil(math.log(max(nodes / leaf, 1)) / math.log(4 / 3)))
    rooted = [whole(nodes), whole(nodes), whole(nodes), real(nodes), real(nodes)]
    halves, leaves = [whole(room), whole(room), real(room), whole(room)], [whole(room), whole(room)]
    counts = whole(4)
    ends, lengths = np.ascontiguousarray(ends), np.ascontiguousarray(lengths)
    if kernel(*_pointers(ends, lengths, *rooted, *halves, *leaves, counts), nodes, leaf, room):
        return None
    entries, parts, places, count = counts.tolist()
    node, parent, size, depth, weight = rooted
    return (
        Rooted(node=node, parent=parent, size=size, depth=depth, weight=weight),
        tuple(part[:end].copy() for part, end in zip(halves, (entries, entries, entries, parts), strict=True)),
        (leaves[0][:places], leaves[1][:count]),
    )


def _halved_by_arrays(ends: Array, lengths: Array, leaf: int) -> Halves:
    rooted = _preorder(ends, lengths)
    entries, halves, distances, levels, leaves = _halved(rooted, leaf)
    gathered = tuple(np.concatenate(part) for part in zip(*leaves, strict=True))
    return rooted, (entries, halves, distances, np.array(levels, np.int64)), gathered


def _edges(edges: Tensor) -> Array:
    ends = edges.detach().cpu().numpy().astype(np.int64).reshape(-1, 2)
    if len(ends) and (ends.min() < 0 or ends.max() > len(ends)):
        raise FormwrightError(
            f"A tree of {len(ends)} edges has the nodes 0 to {len(ends)}, but they name {ends.min()} to {ends.max()}."
        )
    return ends


def _weights(weights: Tensor, edges: int) -> Array:
    lengths = weights.detach().cpu().double().numpy()
    if lengths.shape != (edges,) or not np.isfinite(lengths).all() or (lengths < 0).any():
        raise FormwrightError(f"A tree of {edges} edges needs as many finite weights from 0; check the weights given.")
    return lengths


def _lattice(lengths: Array) -> float | None:
    """The step of which all weights are multiples; none without one."""
    parts = np.arange(1, FINEST + 1)[:, None]
    few = lengths[:16] * parts  # the first weights rule out nearly all
    for candidate in np.flatnonzero((np.abs(few - np.rint(few)) <= 1e-9 * np.maximum(1, few)).all(1)) + 1:
        whole = np.rint(lengths * candidate)
        if whole.max(initial=0) < 2**52 and (np.abs(lengths * candidate - whole) <= 1e-9 * np.maximum(1, whole)).all():
            step = int(np.gcd.reduce(whole.astype(np.int64))) if len(whole) else 0
            return max(step, 1) / int(candidate)
    return None


def _preorder(ends: Array, lengths: Array) -> Rooted:
    """Root the tree at node 0: the walk round it, as a linked list of arcs, ranked by doubling."""
    nodes, arcs = len(ends) + 1, 2 * len(ends)
    if arcs == 0:
        zero = np.zeros(1, np.int64)
        return Rooted(node=zero, parent=zero, size=zero + 1, depth=np.zeros(1), weight=np.zeros(1))
    source, target = np.concatenate([ends[:, 0], ends[:, 1]]), np.concatenate([ends[:, 1], ends[:, 0]])
    back = (np.arange(arcs) + len(ends)) % arcs  # the same edge the other way
    order = np.argsort(source, kind="stable")  # the arcs out of node 0, of node 1, ...
    first = np.searchsorted(source[order], np.arange(nodes + 1))
    if (np.diff(first) == 0).any():
        raise FormwrightError(f"The edges are no tree: node {int(np.argmin(np.diff(first)))} has none. Connect it.")
    place = np.empty(arcs, np.int64)
    place[order] = np.arange(arcs)
    following = place + 1
    turn = following == first[source + 1]  # after a node's last arc comes its first
    following[turn] = first[source[turn]]
    after = order[following]  # the next arc out of the same node
    follower = after[back]  # the walk: in by an arc, out by the one after its way back
    start = order[first[0]]
    end = np.flatnonzero(follower == start)
    follower[end] = end
    left = (follower != np.arange(arcs)).astype(np.int64)  # arcs still to come
    jump = follower
    for _ in range(arcs.bit_length()):
        left = left + left[jump]
        jump = jump[jump]
    if left.max() >= arcs or np.bincount(left).max() > 1:
        raise FormwrightError("The edges are no tree: they hold a cycle. Take a spanning tree first.")
    rank = arcs - 1 - left
    walk = np.empty(arcs, np.int64)
    walk[rank] = np.arange(arcs)
    down = rank < rank[back]
    entered = walk[down[walk]]  # arcs away from the root, in order
    node = np.concatenate([[0], target[entered]])
    at = np.empty(nodes, np.int64)
    at[node] = np.arange(nodes)
    parent = np.concatenate([[0], at[source[entered]]])
    size = np.concatenate([[nodes], (rank[back[entered]] - rank[entered] + 1) // 2])
    weight = np.concatenate([[0.0], lengths[entered % len(ends)]])
    depth, above = weight.copy(), parent.copy()
    while above.any():
        depth, above = depth + depth[above], above[above]
    return Rooted(node=node, parent=parent, size=size, depth=depth, weight=weight)


def _halved(rooted: Rooted, leaf: int) -> tuple[Array, Array, Array, list[int], list[tuple[Array, Array]]]:
    """Entries, their halves and distances; the level of every half; leaves as (places, lengths) in preorder."""
    place, size = np.arange(len(rooted.node)), rooted.size  # of the nodes of this level's trees, one after the other
    length = np.array([len(place)])
    entries, halves, distances, levels, leaves, made = [], [], [], [], [], 0
    for level in itertools.count():
        small = length <= leaf
        if small.any():
            ends = np.repeat(small, length)
            leaves.append((place[ends], length[small]))
            place, size, length = place[~ends], size[~ends], length[~small]
        if not len(length):
            break
        count, trees = len(place), len(length)
        start = np.cumsum(length) - length
        tree = np.repeat(np.arange(trees), length)
        i = np.arange(count)
        # the pivot: the deepest node that more than half of the tree is below
        pivot = np.maximum.reduceat(np.where(2 * size > length[tree], i, 0), start)
        # its children's subtrees go to the one side or to the other, cut where the sides are most alike
        child = np.flatnonzero(rooted.parent[place] == place[pivot[tree]])
        child = child[child > pivot[tree[child]]]
        end = (pivot + size[pivot])[tree]
        below = end[child] - child
        key = np.abs(2 * below - (length[tree[child]] - 1)) * np.int64(count) + child
        cut = np.minimum.reduceat(key, np.searchsorted(tree[child], np.arange(trees))) % count
        apart = _to_pivot(rooted.depth[place], size, i, tree, pivot, length)
        lower = (i >= cut[tree]) & (i < end)
        is_pivot = i == pivot[tree]
        # ancestors of the pivot, and itself, lose on the upper side what goes to the lower one
        lost = np.where((i <= pivot[tree]) & (i + size > pivot[tree]), (end - cut[tree]), 0)
        upper = np.flatnonzero(~lower)
        lower = np.flatnonzero(lower | is_pivot)
        side = np.concatenate([upper, lower])
        half = np.concatenate([2 * tree[upper], 2 * tree[lower] + 1])
        order = np.argsort(half, kind="stable")
        side, half = side[order], half[order]
        kept = ~is_pivot[side]
        entries.append(place[side[kept]])
        halves.append(half[kept] + made)
        distances.append(apart[side[kept]])
        levels += [level] * (2 * trees)
        made += 2 * trees
        size = np.where(half % 2 == 0, (size - lost)[side], size[side])
        # the lower side is rooted at the pivot and holds the pivot and what lies behind the cut
        rooted_here = is_pivot[side] & (half % 2 == 1)
        length = np.bincount(half, minlength=2 * trees)
        size[rooted_here] = length[1::2]
        place = place[side]
    if not entries:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), levels, leaves
    return rooted.node[np.concatenate(entries)], np.concatenate(halves), np.concatenate(distances), levels, leaves


def _to_pivot(depth: Array, size: Array, i: Array, tree: Array, pivot: Array, length: Array) -> Array:
    """Distances from the pivots: depth_i + depth_p - 2 depth_lca, the last common ancestor being

    before the pivot in preorder     the last ancestor of the pivot that stands there
    behind it                        the last ancestor of the pivot whose subtree still goes on there
    """
    p = pivot[tree]
    above = (i <= p) & (i + size > p)
    before = np.maximum.accumulate(np.where(above, i, 0))
    reaching = np.full(len(i), -1)
    ancestors = np.flatnonzero(above)
    np.maximum.at(reaching, ancestors + size[ancestors] - 1, ancestors)
    # a running maximum from the right, each tree by itself: a tree further right has lower keys
    key = np.where(reaching >= 0, (len(length) - tree) * np.int64(len(i)) + reaching, 0)
    behind = np.maximum.accumulate(key[::-1])[::-1] % len(i)
    common = np.where(i <= p, before, behind)
    return np.maximum(depth + depth[p] - 2 * depth[common], 0.0)


def _inside(rooted: Rooted, place: Array, length: Array) -> tuple[Array, Array]:
    """Nodes and mutual distances of small trees: (l, t), -1 where there is none, and (l, t, t)."""
    most, start = int(length.max()), np.cumsum(length) - length
    kernel = _kernel("formwright_leaf_distances", 7, 2)
    if kernel is not None:
        nodes, within = np.empty((len(length), most), np.int64), np.empty((len(length), most, most))
        place, length = np.ascontiguousarray(place), np.ascontiguousarray(length)
        given = _pointers(place, length, rooted.node, rooted.parent, rooted.weight)
        kernel(*given, *_pointers(nodes, within), len(length), most)
        return nodes, within
    column = np.arange(most)
    there = column < length[:, None]
    at = np.where(there, start[:, None] + np.minimum(column, length[:, None] - 1), 0)
    places = np.where(there, place[at], -1)
    # where in its leaf the parent stands: places rise along a leaf
    row = np.arange(len(length))
    keyed = (places + (row * (len(rooted.node) + 1))[:, None])[there]
    wanted = rooted.parent[places] + (row * (len(rooted.node) + 1))[:, None]
    parent = np.searchsorted(keyed, wanted.ravel()).reshape(wanted.shape) - start[:, None]
    apart = np.zeros((most, most, len(length)))
    parent, weight = np.clip(parent, 0, most - 1).T, np.where(there, rooted.weight[places], 0.0).T
    for j in range(1, most):
        to_others = apart[parent[j], :j, row].T + weight[j]
        apart[j, :j], apart[:j, j] = to_others, to_others
    return np.where(there, rooted.node[places], -1), np.ascontiguousarray(apart.transpose(2, 0, 1))


def all_distances(rooted: Rooted, dtype: type = np.float64) -> Array:
    """The matrix of all distances, nodes in preorder: one is an edge further than its parent from all but its own
    descendants.
    """
    apart = np.empty((len(rooted.node),) * 2, dtype)
    apart[0] = rooted.depth
    weight, parent, size = rooted.weight.astype(dtype), rooted.parent.tolist(), rooted.size.tolist()
    for j in range(1, len(apart)):
        np.add(apart[parent[j]], weight[j], out=apart[j])
        apart[j, j : j + size[j]] -= 2 * weight[j]
    return apart


def spanning_tree(
    edges: Int[Tensor, "m 2"], weights: Float[Tensor, " m"] | None = None, *, nodes: int, seed: int | None = None
) -> Int[Tensor, " k"]:
    """The minimum spanning tree of a graph: which of its edges are taken, nodes - 1 of them (Boruvka's rounds).

    Args:
        edges: pairs of nodes.
        weights: none = 1, so that any spanning tree is a minimum one.
        nodes: how many there are.
        seed: of the random order of edges of equal weight; none = the order in which they are given.

    Raises:
        FormwrightError: an edge names a node that is not there, or the graph is not connected.
    """
    ends = edges.detach().cpu().numpy().astype(np.int64).reshape(-1, 2)
    if nodes < 1 or (len(ends) and (ends.min() < 0 or ends.max() >= nodes)):
        raise FormwrightError(f"The edges of a graph of {nodes} nodes name the nodes 0 to {nodes - 1} and no other.")
    lengths = np.ones(len(ends)) if weights is None else weights.detach().cpu().double().numpy()
    if lengths.shape != (len(ends),):
        raise FormwrightError(f"{len(ends)} edges need as many weights, got {tuple(lengths.shape)}.")
    among = np.arange(len(ends)) if seed is None else np.random.default_rng(seed).permutation(len(ends))
    order = np.lexsort((among, lengths))
    ends = ends[order]  # from here on an edge's number is its rank, and no two are equal
    component, taken = np.arange(nodes), np.zeros(len(ends), bool)
    while True:
        a, b = component[ends[:, 0]], component[ends[:, 1]]
        crossing = np.flatnonzero(a != b)
        if not len(crossing):
            break
        best = np.full(nodes, len(ends))
        np.minimum.at(best, a[crossing], crossing)
        np.minimum.at(best, b[crossing], crossing)
        chosen = np.flatnonzero(best < len(ends))
        rank = best[chosen]
        taken[rank] = True
        other = np.where(a[rank] == chosen, b[rank], a[rank])
        to = np.arange(nodes)
        to[chosen] = other
        mutual = (to[to] == np.arange(nodes)) & (np.arange(nodes) < to)
        to[mutual] = np.flatnonzero(mutual)
        while (to[to] != to).any():
            to = to[to]
        component = to[component]
    if taken.sum() != nodes - 1:
        raise FormwrightError(f"The graph of {nodes} nodes is not connected; take its components one by one.")
    return torch.from_numpy(np.sort(order[taken]))


def grid_edges(grid: Sequence[int]) -> Int[Tensor, "m 2"]:
    """The edges between neighbours of a grid of any number of axes, its cells counted row by row."""
    if not grid or min(grid) < 1:
        raise FormwrightError(f"A grid has axes of at least one cell, got {tuple(grid)}.")
    cells = torch.arange(math.prod(grid)).view(*grid)
    pairs = [
        torch.stack([cells.narrow(axis, 0, size - 1).flatten(), cells.narrow(axis, 1, size - 1).flatten()], 1)
        for axis, size in reversed(list(enumerate(grid)))
    ]
    edges = torch.cat(pairs)
    return edges[edges[:, 0].argsort(stable=True)]


def graph_distances(
    edges: Int[Tensor, "m 2"], weights: Float[Tensor, " m"] | None = None, *, nodes: int
) -> Float[Tensor, "n n"]:
    """Lengths of the shortest paths between all pairs, float64, inf where there is none: O(n m) a round, as many rounds
    as the longest of those paths has edges.
    """
    both = torch.cat([edges, edges.flip(1)])
    lengths = torch.ones(len(edges), dtype=torch.float64) if weights is None else weights.double()
    apart = torch.full((nodes, nodes), torch.inf, dtype=torch.float64)
    apart.fill_diagonal_(0)
    step, to = lengths.repeat(2)[:, None], both[:, 1:].expand(-1, nodes)
    for _ in range(nodes):
        nearer = apart.scatter_reduce(0, to, apart[both[:, 0]] + step, "amin")
        if torch.equal(nearer, apart):
            break
        apart = nearer
    return apart


def random_tree_metric(distances: Float[Tensor, "n n"], *, seed: int) -> tuple[Int[Tensor, "m 2"], Float[Tensor, " m"]]:
    """A random tree whose distances are never below the metric's and on average O(log n) above (Fakcharoenphol, Rao and
    Talwar): the points are its first n nodes, all leaves; the others are clusters of halving radius.

    Two points are as far apart as the smallest cluster that holds both is wide, at most what the original gives them.
    A field on the points alone is integrated by them: `integrate` takes fewer rows than the tree has nodes. The mean
    over several trees is nearer to the metric than one.

    Raises:
        FormwrightError: the matrix is no metric of at least two points, or two points are at distance 0.
    """
    d = distances.detach().cpu().double().numpy()
    points = len(d)
    if d.shape != (points, points) or points < 2 or not np.isfinite(d).all():
        raise FormwrightError("A tree metric needs the finite distances of at least two points, as a square matrix.")
    apart = d[~np.eye(points, dtype=bool)]
    if apart.min() <= 0 or not np.allclose(d, d.T):
        raise FormwrightError("A tree metric needs symmetric distances above 0 between different points.")
    rng = np.random.default_rng(seed)
    order, radius = rng.permutation(points), 2.0 ** rng.random() * apart.max()
    ranked, edges, weights, made = d[:, order], [], [], points + 1
    # of each point: its cluster, the node of that cluster (the root holds all), and how high it stands over the leaves
    cluster, above, height = np.zeros(points, np.int64), np.full(points, points), np.full(points, apart.max() / 2)
    while (above >= points).any():
        radius /= 2
        centre = (ranked <= radius).argmax(1)  # the first in the random order that is near enough
        _, first, cluster = np.unique(cluster * points + centre, return_index=True, return_inverse=True)
        alone = np.bincount(cluster) == 1
        node = np.where(alone, first, made + np.cumsum(~alone) - 1)
        width = np.zeros(len(node))
        np.maximum.at(width, cluster, np.where(cluster[:, None] == cluster, d, 0.0).max(1))
        new = np.flatnonzero(above[first] != node)  # a point that has become a leaf stays where it hangs
        edges.append(np.stack([above[first[new]], node[new]], 1))
        weights.append(height[first[new]] - width[new] / 2)
        made += int((~alone).sum())
        above, height = node[cluster], width[cluster] / 2
    return torch.from_numpy(np.concatenate(edges)), torch.from_numpy(np.concatenate(weights))
