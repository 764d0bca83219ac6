"""Fast tree-field integration: Y_i = sum_j f(dist(i, j)) X_j on a weighted tree, without the matrix of f(dist(i, j)).

Paper    Choromanski et al.: Fast Tree-Field Integrators: From Low Displacement Rank to Topological Transformers
         (NeurIPS 2024), arXiv:2406.15881.
Idea     A pivot parts a tree into two halves L and R; dist(i, j) = l_i + r_j for i in L and j in R. What crosses is the
         product with the matrix [f(l_a + r_b)] of the different distances, which has structure; what does not cross is
         two smaller trees (ops/trees.py).

             C_a = sum_b f(l_a + r_b) X'_b            X'_b = sum of X_j with r_j = r_b,  Y_i += C_a for l_i = l_a

         separable  polynomials, exponentials, cosines, their sums and products: f(l + r) = sum_k u_k(l) v_k(r), exact,
                    O(n log n)
         lattice    any f where the distances are multiples of a step (unit or rational weights): Hankel matrices,
                    exact, by FFT where they are large, O(n log^2 n)
         panels     rational and exponentiated quadratic f, any weights: f is smooth at the scale of its poles (or of
                    its width), so K points of panels of that size hold it to rounding, and f is read at these alone
         direct     any other f: the matrices of different distances as they are

         Leaves of up to 24 nodes are multiplied out. Every pair of nodes is met once, f(0) X_i is added at the end.
Differs  The paper multiplies by Cauchy-like and Vandermonde-like matrices with solvers of low displacement rank; panels
         take their place: O(n log n) with a constant, and stable. The release adds f(0) X_p at a pivot p once for each
         of its halves; here, as in its own brute force, once.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from formwright.errors import FormwrightError
from formwright.ops.trees import IntegratorTree, counting_sort

Method = Literal["auto", "separable", "lattice", "panels", "direct"]

LARGE = 128  # Hankel matrices from this size go through the FFT
SPARSE = 8  # steps to a distance beyond which a lattice is too fine to be of use
TOGETHER = 1 << 22  # numbers of the matrices multiplied at a time by "direct"
POINTS = {torch.float32: 10, torch.float64: 20}  # of a panel


@runtime_checkable
class Separable(Protocol):
    """f with f(l + r) = sum_k u_k(l) v_k(r)."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def factors(self, x: Float[Tensor, " n"]) -> tuple[Float[Tensor, "k n"], Float[Tensor, "k n"]]:
        """u and v at these distances."""
        ...


@runtime_checkable
class Smooth(Protocol):
    """f that polynomials of moderate degree follow on panels of a known size."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def panels(self, reach: float) -> list[float]:
        """The ends of panels from 0 to `reach`, for both arguments of f(l + r)."""
        ...


class _Combined:
    """What separable functions share: sums and products of them are separable."""

    def __add__(self, other: Separable) -> "Sum":
        return Sum(self, other)

    def __mul__(self, other: Separable) -> "Product":
        return Product(self, other)


@dataclass(frozen=True)
class Sum(_Combined):
    """f + g, ranks added."""

    f: Separable
    g: Separable

    def __call__(self, x: Tensor) -> Tensor:
        return self.f(x) + self.g(x)

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(torch.cat(pair) for pair in zip(self.f.factors(x), self.g.factors(x), strict=True))


@dataclass(frozen=True)
class Product(_Combined):
    """f g, ranks multiplied."""

    f: Separable
    g: Separable

    def __call__(self, x: Tensor) -> Tensor:
        return self.f(x) * self.g(x)

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pairs = zip(self.f.factors(x), self.g.factors(x), strict=True)
        return tuple((f[:, None] * g).flatten(0, 1) for f, g in pairs)


@dataclass(frozen=True)
class Polynomial(_Combined):
    """sum_t a_t x^t, rank degree + 1, by the binomial formula."""

    coefficients: Float[Tensor, " t"]

    def __call__(self, x: Tensor) -> Tensor:
        return _polynomial(self.coefficients, x)

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        terms = len(self.coefficients)
        powers = torch.stack([x**t for t in range(terms)])
        v = [sum(self.coefficients[t] * math.comb(t, s) * powers[t - s] for t in range(s, terms)) for s in range(terms)]
        return powers, torch.stack(v)


@dataclass(frozen=True)
class Exponential(_Combined):
    """e^(rate x), rank 1."""

    rate: Float[Tensor, ""]

    def __call__(self, x: Tensor) -> Tensor:
        return (self.rate * x).exp()

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        power = (self.rate * x).exp()[None]
        return power, power


@dataclass(frozen=True)
class Cosine(_Combined):
    """cos(frequency x + phase), rank 2."""

    frequency: Float[Tensor, ""]
    phase: Float[Tensor, ""] | float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        return (self.frequency * x + self.phase).cos()

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        turned, plain = self.frequency * x + self.phase, self.frequency * x
        return torch.stack([turned.cos(), -turned.sin()]), torch.stack([plain.cos(), plain.sin()])


@dataclass(frozen=True)
class Rational:
    """sum_t p_t x^t / sum_t q_t x^t, without a pole at any distance."""

    numerator: Float[Tensor, " p"]
    denominator: Float[Tensor, " q"]

    def __call__(self, x: Tensor) -> Tensor:
        return _polynomial(self.numerator, x) / _polynomial(self.denominator, x)

    def panels(self, reach: float) -> list[float]:
        """As wide as the nearest pole is far."""
        poles = np.roots(self.denominator.detach().double().cpu().numpy()[::-1])
        if ((np.abs(poles.imag) <= 1e-9 * np.abs(poles)) & (poles.real >= 0) & (poles.real <= 2 * reach)).any():
            raise FormwrightError(
                f"This rational function is infinite at a distance between 0 and {2 * reach:.3g}; change the "
                "denominator so that it has no root there."
            )

        def width(start: float) -> float:
            nearest = np.clip(poles.real, start, 2 * reach)
            return float(np.abs(poles - nearest).min(initial=math.inf))

        return _panels(reach, width)


@dataclass(frozen=True)
class ExponentialQuadratic:
    """e^(a x^2 + b x + c)."""

    a: Float[Tensor, ""]
    b: Float[Tensor, ""] | float = 0.0
    c: Float[Tensor, ""] | float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        return ((self.a * x + self.b) * x + self.c).exp()

    def panels(self, reach: float) -> list[float]:
        """One and a half times the width of the bell, or a growth by e^4."""
        a, b = (float(torch.as_tensor(part).detach()) for part in (self.a, self.b))
        if a < 0:
            return _panels(reach, lambda _: 1.5 / math.sqrt(-a))
        growth = 4 * a * reach + abs(b)
        return _panels(reach, lambda _: 4 / growth if growth > 0 else math.inf)


def _polynomial(coefficients: Tensor, x: Tensor) -> Tensor:
    value = torch.zeros_like(x) + coefficients[-1]
    for coefficient in coefficients.flip(0)[1:]:
        value = value * x + coefficient
    return value


def _panels(reach: float, width: Callable[[float], float], most: int = 100_000) -> list[float]:
    ends = [0.0]
    while ends[-1] < reach and len(ends) < most:
        ends.append(min(reach, ends[-1] + width(ends[-1])))
    return ends if len(ends) > 1 else [0.0, 1.0]


def integrate_reference(
    tree: IntegratorTree, x: Float[Tensor, "n *c"], f: Callable[[Tensor], Tensor]
) -> Float[Tensor, "n *c"]:
    """The sum as it is written, O(n^2)."""
    distances = tree.distances().to(x)[: len(x), : len(x)]
    return torch.tensordot(f(distances), x, 1)


def integrate(
    tree: IntegratorTree, x: Float[Tensor, "n *c"], f: Callable[[Tensor], Tensor], *, method: Method = "auto"
) -> Float[Tensor, "n *c"]:
    """sum_j f(dist(i, j)) x_j for all nodes i, in the dtype of x. Differentiable in x and in what f is made of.

    Args:
        tree: made once by `integrator_tree`.
        x: a field of any shape on the first n nodes of the tree; nodes behind have none and are left out of the result.
        f: any function of the distances, element by element; the classes of this module are faster than others.
        method: see the module; "auto" = separable where f is, else the lattice where there is one, else panels where f
            is smooth, else direct.

    Raises:
        FormwrightError: more rows than nodes, or a method that this f or this tree does not allow.
    """
    if len(x) > tree.nodes:
        raise FormwrightError(f"A field of {len(x)} rows does not fit a tree of {tree.nodes} nodes; give a row a node.")
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(len(x), -1)
    field = F.pad(wide, (0, 0, 0, tree.nodes - len(x)))
    how = _method(tree, f, method)
    if how == "lattice":
        result = integrate_lattice(tree, field, f(lattice(tree, field)))
    else:
        crossing = {"separable": _separable, "panels": _smooth, "direct": _direct}[how]
        result = _within_leaves(tree, field, f) + crossing(tree, field, f)
    return result[: len(x)].view(x.shape).to(x.dtype)


def lattice(tree: IntegratorTree, like: Tensor) -> Float[Tensor, " s"]:
    """All distances there can be in a tree whose weights are multiples of a step: 0, 1, 2, ... steps."""
    assert tree.step is not None
    return torch.arange(round(tree.diameter / tree.step) + 1, dtype=like.dtype, device=like.device) * tree.step


def integrate_lattice(
    tree: IntegratorTree, x: Float[Tensor, "n c"], values: Float[Tensor, " s"]
) -> Float[Tensor, "n c"]:
    """The integral of f given by its values on `lattice(tree, x)`. Keeps nothing for the backward pass but x."""
    return _OnLattice.apply(x, values, tree)


def _method(tree: IntegratorTree, f: Callable[[Tensor], Tensor], method: Method) -> Method:
    coarse = tree.step is not None and _slots(tree) <= SPARSE * (len(tree.entry) + tree.within.numel())
    if method == "auto":
        if isinstance(f, Separable):
            return "separable"
        if coarse:
            return "lattice"
        return "panels" if isinstance(f, Smooth) and _few(tree, f) else "direct"
    allowed = {
        "separable": isinstance(f, Separable),
        "lattice": tree.step is not None,
        "panels": isinstance(f, Smooth),
        "direct": True,
    }
    if not allowed.get(method, False):
        can = ", ".join(name for name, yes in allowed.items() if yes)
        raise FormwrightError(f"The method {method!r} does not fit this function on this tree; choose auto or {can}.")
    return method


def _few(tree: IntegratorTree, f: Smooth) -> bool:
    """Whether the panels' points are fewer than the distances they stand for."""
    return 4 * len(f.panels(_reach(tree))) * POINTS[torch.float64] <= tree.nodes


def _reach(tree: IntegratorTree) -> float:
    """The longest distance from a pivot."""
    return float(tree.distance.max()) if len(tree.distance) else 0.0


def _slots(tree: IntegratorTree) -> float:
    """How many steps the distances from pivots and the longest distance have in all."""
    assert tree.step is not None
    if "slots" not in tree.kept:
        farthest = torch.zeros(len(tree.level), dtype=torch.float64)
        farthest.scatter_reduce_(0, tree.half, tree.distance, "amax")
        tree.kept["slots"] = (float(farthest.sum()) + tree.diameter) / tree.step
    return tree.kept["slots"]


def _once(tree: IntegratorTree, what: str, like: Tensor, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What is worked out once a tree, on the device (and, floating point, in the dtype) of `like`."""
    key = (what, like.device, like.dtype)
    if key not in tree.kept:
        tree.kept[key] = tuple(
            part.to(like.device, like.dtype if part.is_floating_point() else part.dtype) for part in make()
        )
    return tree.kept[key]


def _bags(of: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """For things that belong to 0 .. count - 1: in which order to take them, and where each one's begin (and end)."""
    order, bounds = counting_sort(of.numpy(), count)
    return torch.from_numpy(order), torch.from_numpy(bounds)


def _sums(rows: Tensor, which: Tensor, bounds: Tensor, weights: Tensor | None = None) -> Tensor:
    """sum of weight * rows[which] over each bag."""
    return F.embedding_bag(which, rows, bounds, mode="sum", per_sample_weights=weights, include_last_offset=True)


# Leaves and the diagonal


def _within_leaves(tree: IntegratorTree, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """Pairs that meet in a leaf, and f(0) x."""
    within, *gather = _once(tree, "leaves", x, lambda: (tree.within, *_leaf_plan(tree)))
    values = f(within.flatten()).view_as(within).masked_fill(_same(within), 0)
    return _multiply_leaves(values, x, *gather) + f(within.new_zeros(1)) * x


def _same(within: Float[Tensor, "l t t"] | Int[Tensor, "l t t"]) -> Bool[Tensor, "t t"]:
    """A node and itself do not meet."""
    return torch.eye(within.shape[1], dtype=torch.bool, device=within.device)


def _leaf_plan(tree: IntegratorTree) -> tuple[Tensor, ...]:
    """Nodes (l t), where there is none (l, t, 1), and each node's places in the leaves."""
    leaf = tree.leaf.flatten()
    absent = leaf < 0
    places, bounds = _bags(leaf.masked_fill(absent, tree.nodes), tree.nodes + 1)
    bounds = bounds[:-1]
    return leaf.clamp(min=0), absent.view(*tree.leaf.shape, 1), places[: int(bounds[-1])], bounds


def _leaf_field(x: Tensor, nodes: Tensor, absent: Tensor) -> Float[Tensor, "l t c"]:
    return x.index_select(0, nodes).view(*absent.shape[:2], -1).masked_fill(absent, 0)


def _multiply_leaves(
    values: Tensor, x: Tensor, nodes: Tensor, absent: Tensor, places: Tensor, bounds: Tensor
) -> Tensor:
    return _sums((values @ _leaf_field(x, nodes, absent)).flatten(0, 1), places, bounds)


# Separable f: two weighted sums, over the halves and over the nodes


def _separable(tree: IntegratorTree, x: Tensor, f: Separable) -> Tensor:
    distance, entry, halves, partner, order, bounds = _once(tree, "halves", x, lambda: _half_plan(tree))
    result = torch.zeros_like(x)
    for u, v in zip(*f.factors(distance), strict=True):
        moments = _sums(x, entry, halves, v.expand_as(distance).contiguous())
        result = result + _sums(moments, partner, bounds, u.expand_as(distance)[order])
    return result


def _half_plan(tree: IntegratorTree) -> tuple[Tensor, ...]:
    order, bounds = _bags(tree.entry, tree.nodes)
    halves = torch.searchsorted(tree.half, torch.arange(len(tree.level) + 1))
    return tree.distance, tree.entry, halves, (tree.half ^ 1)[order], order, bounds


# Slots: what stands for the different distances of a half. Pairs of halves of like size go together.


@dataclass(frozen=True)
class Bucket:
    """Pairs of halves that get the same number of slots, in groups of w: an entry is spread over the w of its group."""

    pairs: int
    slots: int
    into: tuple[Tensor, Tensor]  # (which node, bounds of every group)
    into_weights: Float[Tensor, "w e"] | None  # none = w is 1, and so are they
    out: tuple[Tensor, Tensor]  # (which group, bounds of every node)
    out_weights: Float[Tensor, "w e"] | None
    chosen: Tensor  # the pairs

    def fill(self, x: Float[Tensor, "n c"]) -> Float[Tensor, "p 2 s c"]:
        """x'_b of both halves of all pairs, each where the other half will read it."""
        if self.into_weights is None:
            groups = _sums(x, *self.into)
        else:
            groups = torch.stack([_sums(x, *self.into, weights) for weights in self.into_weights], 1)
        return groups.reshape(self.pairs, 2, self.slots, x.shape[1])

    def drain(self, slots: Float[Tensor, "p 2 s c"]) -> Float[Tensor, "n c"]:
        """Each node gets what stands in its own slots."""
        if self.out_weights is None:
            return _sums(slots.flatten(0, 2), *self.out)
        groups = slots.reshape(-1, len(self.out_weights), slots.shape[-1])
        return sum(
            _sums(one.contiguous(), *self.out, weights)
            for one, weights in zip(groups.unbind(1), self.out_weights, strict=True)
        )


def _buckets(
    tree: IntegratorTree, group: Int[Tensor, " e"], weights: Float[Tensor, "w e"] | None, like: Tensor
) -> list[Bucket]:
    """Pairs with up to 1, 2, 4, 8, .. groups of w slots in the larger half."""
    if not len(tree.entry):
        return []
    w = 1 if weights is None else len(weights)
    most = torch.zeros(len(tree.level), dtype=torch.long)
    most.scatter_reduce_(0, tree.half, group + 1, "amax")
    most = most.view(-1, 2).amax(1)
    size = torch.log2(most.double()).ceil().long()
    pair, side = tree.half // 2, tree.half % 2
    buckets = []
    for key in size.unique().tolist():
        chosen = (size == key).nonzero()[:, 0]
        pairs, groups = len(chosen), int(most[chosen].max())
        rank = torch.full((len(most),), -1)
        rank[chosen] = torch.arange(pairs)
        here = (rank[pair] >= 0).nonzero()[:, 0]
        node, row = tree.entry[here], (2 * rank[pair[here]] + side[here]) * groups + group[here]
        across = row + (1 - 2 * side[here]) * groups
        by_group, group_bounds = _bags(across, 2 * pairs * groups)
        by_node, node_bounds = _bags(node, tree.nodes)
        buckets.append(
            Bucket(
                pairs=pairs,
                slots=groups * w,
                into=(node[by_group].to(like.device), group_bounds.to(like.device)),
                into_weights=None if weights is None else weights[:, here[by_group]].to(like),
                out=(row[by_node].to(like.device), node_bounds.to(like.device)),
                out_weights=None if weights is None else weights[:, here[by_node]].to(like),
                chosen=chosen,
            )
        )
    return buckets


# Any f on a lattice: one Hankel matrix serves all pairs of a bucket


class _OnLattice(torch.autograd.Function):
    """M_f is symmetric, so the gradient of x is the integral of the gradient."""

    @staticmethod
    def forward(ctx, x, values, tree):
        ctx.save_for_backward(x, values)
        ctx.tree = tree
        return _lattice_forward(tree, x, values)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, values = ctx.saved_tensors
        grad = grad.contiguous()
        dx = _lattice_forward(ctx.tree, grad, values) if ctx.needs_input_grad[0] else None
        dvalues = _lattice_backward(ctx.tree, x, grad, values) if ctx.needs_input_grad[1] else None
        return dx, dvalues, None


def _lattice_plan(tree: IntegratorTree, like: Tensor) -> tuple[list[Bucket], tuple[Tensor, ...]]:
    """The buckets; for the leaves the steps between two nodes (one more than there are: none), and how to gather."""
    key = ("lattice", like.device)
    if key not in tree.kept:
        assert tree.step is not None
        steps = (tree.distance / tree.step).round().long()
        nowhere = round(tree.diameter / tree.step) + 1
        between = (tree.within / tree.step).round().long()
        between = between.masked_fill(_same(between), nowhere)
        leaves = tuple(part.to(like.device) for part in (between, *_leaf_plan(tree)))
        tree.kept[key] = (_buckets(tree, steps, None, like), leaves)
    return tree.kept[key]


def _padded(values: Tensor, buckets: list[Bucket]) -> Tensor:
    """0 behind the longest distance: for a node and itself in a leaf, and sums of two slots that no two nodes have."""
    return F.pad(values, (0, max([2 * bucket.slots for bucket in buckets], default=0) + 1))


def _lattice_forward(tree: IntegratorTree, x: Tensor, values: Tensor) -> Tensor:
    buckets, (between, *gather) = _lattice_plan(tree, x)
    padded = _padded(values.to(x.dtype), buckets)
    result = _multiply_leaves(padded[between], x, *gather).add_(padded[0] * x)
    for bucket in buckets:
        result += bucket.drain(_hankel(padded, bucket.fill(x)))
    return result


def _hankel(values: Tensor, x: Float[Tensor, "p 2 s c"]) -> Float[Tensor, "p 2 s c"]:
    """sum_b values[a + b] x_b."""
    slots = x.shape[2]
    if slots < LARGE:
        return values[: 2 * slots - 1].unfold(0, slots, 1) @ x
    spectrum = torch.fft.rfft(values[: 2 * slots - 1], 2 * slots)[:, None]
    return torch.fft.irfft(spectrum * torch.fft.rfft(x, 2 * slots, dim=2).conj(), 2 * slots, dim=2)[:, :, :slots]


def _lattice_backward(tree: IntegratorTree, x: Tensor, grad: Tensor, values: Tensor) -> Tensor:
    """The sum of grad_i . x_j over all pairs at each distance."""
    buckets, (between, nodes, absent, *_) = _lattice_plan(tree, x)
    found = torch.zeros_like(_padded(values.to(x.dtype), buckets))
    found[0] = (grad * x).sum()
    met = _leaf_field(grad, nodes, absent) @ _leaf_field(x, nodes, absent).mT
    found.index_add_(0, between.flatten(), met.flatten())
    found[len(values)] = 0  # a node and itself
    for bucket in buckets:
        theirs, ours, slots = bucket.fill(x), bucket.fill(grad).flip(1), bucket.slots
        if slots < LARGE:
            met = (ours.flatten(0, 1) @ theirs.flatten(0, 1).mT).sum(0)
            at = torch.arange(slots, device=x.device)
            found.index_add_(0, (at[:, None] + at).flatten(), met.flatten())
        else:
            product = (torch.fft.rfft(ours, 2 * slots, dim=2) * torch.fft.rfft(theirs, 2 * slots, dim=2)).sum((0, 1, 3))
            found[: 2 * slots] += torch.fft.irfft(product, 2 * slots)
    return found[: len(values)].to(values.dtype)


# Smooth f: the points of panels are the slots, and every entry lies between those of its panel


def _smooth(tree: IntegratorTree, x: Tensor, f: Smooth) -> Tensor:
    ends = torch.tensor(f.panels(_reach(tree)), dtype=torch.float64)
    key = ("panels", x.device, x.dtype, tuple(ends.tolist()))
    if key not in tree.kept:
        for old in [old for old in tree.kept if old[0] == "panels"]:  # of another f, or of this one before it learned
            del tree.kept[old]
        panel = (torch.searchsorted(ends, tree.distance, right=True) - 1).clamp(0, len(ends) - 2)
        inside = (2 * (tree.distance - ends[panel]) / ends.diff()[panel] - 1).clamp(-1, 1)
        nodes = ((torch.arange(POINTS[x.dtype], dtype=torch.float64) + 0.5) * (math.pi / POINTS[x.dtype])).cos()
        # Lagrange's polynomials through Chebyshev's points, by the sum of Chebyshev polynomials that they are
        basis = 2 / len(nodes) * _chebyshev(nodes, len(nodes))
        basis[0] /= 2
        weights = basis.T.to(x.dtype) @ _chebyshev(inside, len(nodes)).to(x.dtype)
        at = (ends[:-1, None] + ends.diff()[:, None] * (1 + nodes) / 2).flatten()
        tree.kept[key] = (_buckets(tree, panel, weights, x), at.to(x))
    buckets, at = tree.kept[key]
    result = torch.zeros_like(x)
    for bucket in buckets:
        here = at[: bucket.slots]
        result = result + bucket.drain(f(here[:, None] + here) @ bucket.fill(x))
    return result


def _chebyshev(x: Float[Tensor, " n"], count: int) -> Float[Tensor, "k n"]:
    """T_0, T_1, .. at points from -1 to 1."""
    rows = [torch.ones_like(x), x]
    while len(rows) < count:
        rows.append(2 * x * rows[-1] - rows[-2])
    return torch.stack(rows[:count])


# Any f and any weights: the matrices of different distances


def _direct(tree: IntegratorTree, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    key = ("direct", x.device, x.dtype)
    if key not in tree.kept:
        tree.kept[key] = list(_direct_plan(tree, x))
    result = torch.zeros_like(x)
    for bucket, at in tree.kept[key]:
        slots = bucket.fill(x)
        crossed = []
        for left, right, (to_left, to_right) in zip(
            *(at[:, side].split(max(1, TOGETHER // bucket.slots**2)) for side in (0, 1)),
            (part.unbind(1) for part in slots.split(max(1, TOGETHER // bucket.slots**2))),
            strict=True,
        ):
            matrix = f(left[:, :, None] + right[:, None, :])
            crossed.append(torch.stack([matrix @ to_left, matrix.mT @ to_right], 1))
        result = result + bucket.drain(torch.cat(crossed))
    return result


def _direct_plan(tree: IntegratorTree, like: Tensor) -> Iterator[tuple[Bucket, Float[Tensor, "p 2 s"]]]:
    """Buckets whose slots are the different distances of each half, and these distances."""
    if not len(tree.entry):
        return
    grain = 1e-12 * max(_reach(tree), 1e-300)
    order = np.lexsort((tree.distance.numpy(), tree.half.numpy()))
    half, distance = tree.half.numpy()[order], tree.distance.numpy()[order]
    new = np.ones(len(order), bool)
    new[1:] = (half[1:] != half[:-1]) | (distance[1:] - distance[:-1] > grain)
    rank = np.cumsum(new) - 1
    first = np.searchsorted(half, np.arange(len(tree.level)))
    slot = np.empty(len(order), np.int64)
    slot[order] = rank - rank[np.minimum(first, len(order) - 1)][half]
    at = torch.from_numpy(slot)
    for bucket in _buckets(tree, at, None, like):
        distances = torch.zeros(len(tree.level), bucket.slots, dtype=torch.float64)
        here = torch.isin(tree.half // 2, bucket.chosen)
        distances[tree.half[here], at[here]] = tree.distance[here]
        yield bucket, distances.view(-1, 2, bucket.slots)[bucket.chosen].to(like)
