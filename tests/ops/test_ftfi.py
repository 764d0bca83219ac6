"""Trees and integration on them equal plain algorithms: all pairs, Dijkstra, Kruskal; in values and gradients."""

import heapq
import itertools
import math

import pytest
import torch

from formwright.errors import FormwrightError
from formwright.ops import trees
from formwright.ops.ftfi import (
    Cosine,
    Exponential,
    ExponentialQuadratic,
    Polynomial,
    Rational,
    integrate,
    integrate_lattice,
    integrate_reference,
    lattice,
)
from formwright.ops.trees import (
    all_distances,
    graph_distances,
    grid_edges,
    integrator_tree,
    random_tree_metric,
    spanning_tree,
)

KINDS = ("random", "path", "star", "caterpillar")


def some_tree(nodes, kind="random", seed=0):
    """Edges of a tree whose nodes are numbered in no order."""
    generator = torch.Generator().manual_seed(seed)
    parents = {
        "random": [int(torch.randint(0, i, (1,), generator=generator)) for i in range(1, nodes)],
        "path": list(range(nodes - 1)),
        "star": [0] * (nodes - 1),
        "caterpillar": [max(0, i - 1 - i % 2) for i in range(1, nodes)],
    }[kind]
    edges = torch.tensor([*zip(parents, range(1, nodes), strict=True)], dtype=torch.long).view(-1, 2)
    return torch.randperm(nodes, generator=generator)[edges]


def shortest(edges, weights, nodes):
    """Dijkstra from every node."""
    near = [[] for _ in range(nodes)]
    for (a, b), w in zip(edges.tolist(), weights.tolist(), strict=True):
        near[a].append((b, w))
        near[b].append((a, w))
    rows = []
    for source in range(nodes):
        found, queue = {}, [(0.0, source)]
        while queue:
            d, node = heapq.heappop(queue)
            if node not in found:
                found[node] = d
                for other, w in near[node]:
                    heapq.heappush(queue, (d + w, other))
        rows.append([found.get(node, math.inf) for node in range(nodes)])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.reference
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nodes", [1, 2, 3, 7, 60])
def test_distances_of_a_tree_are_dijkstras(nodes, kind):
    edges = some_tree(nodes, kind)
    weights = torch.rand(len(edges), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = shortest(edges, weights, nodes)
    torch.testing.assert_close(integrator_tree(edges, weights).distances(), wanted)
    torch.testing.assert_close(graph_distances(edges, weights, nodes=nodes), wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nodes", [2, 5, 33, 200, 1000])
def test_every_pair_meets_once_and_at_its_distance(nodes, kind):
    edges = some_tree(nodes, kind)
    tree = integrator_tree(edges, torch.rand(len(edges)), leaf=4)
    distances, met = tree.distances(), torch.zeros(nodes, nodes)
    for half in range(0, len(tree.level), 2):
        left, right = ((tree.half == side).nonzero()[:, 0] for side in (half, half + 1))
        a, b = tree.entry[left], tree.entry[right]
        met[a[:, None], b] += 1
        met[b[:, None], a] += 1
        if half < 40:
            torch.testing.assert_close(
                tree.distance[left][:, None] + tree.distance[right], distances[a[:, None], b], atol=1e-9, rtol=0
            )
    for leaf, within in zip(tree.leaf, tree.within, strict=True):
        inside = leaf[leaf >= 0]
        met[inside[:, None], inside] += 1
        torch.testing.assert_close(within[: len(inside), : len(inside)], distances[inside[:, None], inside])
    met.fill_diagonal_(1)
    assert (met == 1).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nodes", [50, 500, 3000])
def test_halves_are_balanced_so_that_there_are_few_levels(nodes, kind):
    tree = integrator_tree(some_tree(nodes, kind), leaf=6)
    assert tree.levels <= math.log(nodes) / math.log(4 / 3) + 1
    sizes = torch.bincount(tree.half).view(-1, 2)
    assert (sizes.amin(1) >= (sizes.sum(1) - 2) / 4).all()


def test_a_lattice_is_found_where_there_is_one():
    edges = some_tree(40)

    def step(weights):
        return integrator_tree(edges, weights).step

    whole = torch.randint(1, 9, (39,), generator=torch.Generator().manual_seed(0))
    assert step(None) == 1
    assert step(torch.full((39,), 6.0)) == 6
    assert step(whole / 4) == pytest.approx(0.25)
    assert step(whole.double() / 12) == pytest.approx(1 / 12)
    assert step(torch.rand(39)) is None


@pytest.mark.parametrize(
    ("edges", "weights", "says"),
    [
        ([[0, 1], [1, 2], [2, 0], [3, 4]], None, "cycle"),
        ([[0, 1], [0, 1]], None, "none"),
        ([[0, 1], [1, 3]], None, "name"),
        ([[0, 1], [1, 2]], [1.0, -1.0], "weights"),
        ([[0, 1], [1, 2]], [1.0, math.nan], "weights"),
        ([[0, 1], [1, 2]], [1.0], "weights"),
    ],
)
def test_what_is_no_tree_is_refused(edges, weights, says):
    with pytest.raises(FormwrightError, match=says):
        integrator_tree(torch.tensor(edges), None if weights is None else torch.tensor(weights))
    with pytest.raises(FormwrightError, match="Leaves"):
        integrator_tree(torch.tensor([[0, 1]]), leaf=1)


def kruskal(edges, weights, nodes):
    """The total weight of a minimum spanning tree, edge by edge."""
    group, total = list(range(nodes)), 0.0
    for w, (a, b) in sorted(zip(weights.tolist(), edges.tolist(), strict=True)):
        if group[a] != group[b]:
            total += w
            old, new = group[a], group[b]
            group = [new if g == old else g for g in group]
    return total


@pytest.mark.reference
@pytest.mark.parametrize("nodes", [2, 10, 80])
def test_a_spanning_tree_is_kruskals(nodes):
    pairs = torch.tensor([*itertools.combinations(range(nodes), 2)])
    weights = torch.rand(len(pairs), generator=torch.Generator().manual_seed(nodes), dtype=torch.float64)
    taken = spanning_tree(pairs, weights, nodes=nodes)
    integrator_tree(pairs[taken], weights[taken])  # raises if it is no tree
    assert float(weights[taken].sum()) == pytest.approx(kruskal(pairs, weights, nodes))


def test_ties_follow_the_order_or_the_seed():
    edges = grid_edges((5, 6))
    first = spanning_tree(edges, nodes=30)
    assert torch.equal(first, spanning_tree(edges, nodes=30))
    drawn = [spanning_tree(edges, nodes=30, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    for taken in (first, *drawn):
        assert integrator_tree(edges[taken]).nodes == 30


def test_a_graph_in_pieces_has_no_spanning_tree():
    with pytest.raises(FormwrightError, match="connected"):
        spanning_tree(torch.tensor([[0, 1], [2, 3]]), nodes=4)
    with pytest.raises(FormwrightError, match="no other"):
        spanning_tree(torch.tensor([[0, 9]]), nodes=4)


@pytest.mark.parametrize(("grid", "count"), [((1,), 0), ((5,), 4), ((3, 4), 17), ((2, 3, 4), 46)])
def test_a_grid_joins_neighbours(grid, count):
    edges = grid_edges(grid)
    assert len(edges) == count
    cells = torch.cartesian_prod(*[torch.arange(size) for size in grid]).view(-1, len(grid))
    assert ((cells[edges[:, 0]] - cells[edges[:, 1]]).abs().sum(1) == 1).all()


def test_random_trees_are_never_below_the_metric_and_their_mean_is_nearer_than_one_spanning_tree():
    edges, nodes = grid_edges((7, 7)), 49
    metric = graph_distances(edges, nodes=nodes)

    def error(distances):
        """Relative, after the best factor."""
        factor = (distances * metric).sum() / distances.square().sum()
        return float((factor * distances - metric).norm() / metric.norm())

    def spanning(seed):
        return integrator_tree(edges[spanning_tree(edges, nodes=nodes, seed=seed)]).distances()

    clusters = []
    for seed in range(12):
        tree = integrator_tree(*random_tree_metric(metric, seed=seed))
        clusters.append(tree.distances()[:nodes, :nodes])
    drawn = [spanning(seed) for seed in range(12)]
    assert all((found >= metric - 1e-9).all() for found in clusters + drawn)
    other = ~torch.eye(nodes, dtype=torch.bool)
    assert float((torch.stack(clusters).mean(0) / metric)[other].mean()) < math.log2(nodes)
    one = error(spanning(None))
    assert error(torch.stack(clusters).mean(0)) < 0.85 * one
    assert error(torch.stack(drawn).mean(0)) < 0.6 * one


def test_a_metric_must_be_one():
    for wrong in (torch.zeros(3, 3), torch.rand(3, 3), torch.zeros(1, 1)):
        with pytest.raises(FormwrightError, match="tree metric"):
            random_tree_metric(wrong, seed=0)


def test_brute_force_is_symmetric_and_zero_on_the_diagonal():
    distances = torch.from_numpy(all_distances(integrator_tree(some_tree(40), torch.rand(39)).rooted))
    torch.testing.assert_close(distances, distances.T)
    assert float(distances.diagonal().abs().max()) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nodes", [1, 2, 40, 1000])
def test_the_native_kernel_halves_as_the_arrays_do(nodes, kind, monkeypatch):
    edges, weights = some_tree(nodes, kind), torch.rand(nodes - 1)
    native = integrator_tree(edges, weights, leaf=7)
    monkeypatch.setattr(trees, "_kernel", lambda *_: None)
    plain = integrator_tree(edges, weights, leaf=7)
    for name in ("entry", "half", "level", "distance", "leaf", "within"):
        ours, theirs = getattr(native, name), getattr(plain, name)
        if name == "within":  # what stands where a leaf has no nodes is of no account
            there = native.leaf >= 0
            ours, theirs = (part[there[:, :, None] & there[:, None, :]] for part in (ours, theirs))
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    assert native.step == plain.step
    x = field(nodes, 2)
    torch.testing.assert_close(integrate(native, x, FUNCTIONS["e^-x"]), integrate(plain, x, FUNCTIONS["e^-x"]))


def number(*values):
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


FUNCTIONS = {
    "1": Polynomial(number([1.0])),
    "x": Polynomial(number(0.0, 1.0)),
    "x^2": Polynomial(number(0.0, 0.0, 1.0)),
    "e^-x": Exponential(number(-1.0)),
    "cos x": Cosine(number(1.0)),
    "(1 + x) e^-x cos(2x + 1) + x": Polynomial(number(1.0, 1.0))
    * Exponential(number(-1.0))
    * Cosine(number(2.0), number(1.0))
    + Polynomial(number(0.0, 1.0)),
    "1 / (1 + x)": Rational(number([1.0]), number(1.0, 1.0)),
    "(2 + x) / ((x - 1)^2 + 25)": Rational(number(2.0, 1.0), number(26.0, -2.0, 1.0)),
    "e^-x^2": ExponentialQuadratic(number(-1.0)),
    "e^(-x^2/10 + x - 2)": ExponentialQuadratic(number(-0.1), number(1.0), number(-2.0)),
    "e^(x^2/1000)": ExponentialQuadratic(number(0.001)),
    "any": lambda x: (1 + x) ** -1.5,
}
METHODS = ("auto", "separable", "lattice", "panels", "direct")


def weighted(nodes, kind, weights, **options):
    edges = some_tree(nodes, kind)
    generator = torch.Generator().manual_seed(2)
    real = torch.rand(len(edges), generator=generator, dtype=torch.float64) * 0.3
    lengths = {"unit": None, "real": real, "some zero": (real > 0.1).double(), "rational": (real * 20).ceil() / 8}
    return integrator_tree(edges, lengths[weights], **options)


def field(nodes, *shape, seed=3):
    return torch.randn(nodes, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("weights", ["unit", "real", "some zero", "rational"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nodes", [1, 2, 40, 500])
def test_every_method_equals_the_sum_over_all_pairs(nodes, kind, weights):
    tree, x = weighted(nodes, kind, weights), field(nodes, 2, 2)
    for name, f in FUNCTIONS.items():
        wanted = integrate_reference(tree, x, f)
        for method in METHODS:
            try:
                found = integrate(tree, x, f, method=method)
            except FormwrightError:
                assert method not in ("auto", "direct")
                continue
            away = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9))
            assert away < 1e-8, f"{name} by {method}"


@pytest.mark.reference
@pytest.mark.parametrize("weights", ["unit", "real"])
def test_equals_dijkstra_and_a_product_with_the_whole_matrix(weights):
    edges = some_tree(120)
    lengths = torch.ones(119).double() if weights == "unit" else torch.rand(119, dtype=torch.float64)
    tree, x = integrator_tree(edges, lengths), field(120, 3)
    distances = shortest(edges, lengths, 120)
    for name, f in FUNCTIONS.items():
        torch.testing.assert_close(integrate(tree, x, f), f(distances) @ x, msg=name, rtol=1e-8, atol=1e-8)


def test_a_path_is_a_toeplitz_product():
    n = 300
    tree = integrator_tree(torch.stack([torch.arange(n - 1), torch.arange(1, n)], 1))
    x, f = field(n, 2), FUNCTIONS["1 / (1 + x)"]
    lags = (torch.arange(n)[:, None] - torch.arange(n)).abs().double()
    torch.testing.assert_close(integrate(tree, x, f), f(lags) @ x, rtol=1e-9, atol=1e-9)


def test_the_pivots_own_value_counts_once():
    """The release adds f(0) x at a pivot once for each half."""
    tree, x = weighted(60, "random", "real", leaf=2), field(60)
    for f in (FUNCTIONS["e^-x"], FUNCTIONS["1 / (1 + x)"]):
        torch.testing.assert_close(integrate(tree, x, f), integrate_reference(tree, x, f))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_operator_is_symmetric(name):
    tree, y, z = weighted(200, "random", "real"), field(200), field(200, seed=4)
    f = FUNCTIONS[name]
    torch.testing.assert_close(y @ integrate(tree, z, f), z @ integrate(tree, y, f))


CASES = {
    "separable": lambda a: Polynomial(a) * Exponential(-a[0]) + Cosine(a[1]),
    "lattice": lambda a: lambda x: (-a[0] * x + a[1] * x**2 / 100).exp(),
    "panels": lambda a: Rational(a[:1], torch.cat([torch.ones_like(a[:1]), a])),
    "direct": lambda a: lambda x: (-a[0] * x).exp() * a[1],
}


@pytest.mark.parametrize("method", CASES)
def test_gradients_equal_finite_differences(method):
    tree = weighted(25, "random", "unit" if method == "lattice" else "real", leaf=3)
    a, x = number(0.6, -0.4).requires_grad_(), field(25, 2).requires_grad_()
    if method == "panels":
        a = number(0.6, 0.4).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, x: integrate(tree, x, CASES[method](a), method=method), (a, x))


@pytest.mark.parametrize("method", CASES)
@pytest.mark.parametrize("kind", ["random", "path"])
def test_gradients_equal_those_of_the_whole_matrix(method, kind):
    tree = weighted(400, kind, "unit" if method == "lattice" else "real")
    x, cotangent, found = field(400, 2), field(400, 2, seed=5), []
    for way in (lambda x, f: integrate(tree, x, f, method=method), lambda x, f: integrate_reference(tree, x, f)):
        a, field_ = number(0.3, 0.1).requires_grad_(), x.clone().requires_grad_()
        (way(field_, CASES[method](a)) * cotangent).sum().backward()
        found.append((a.grad, field_.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8 * float(theirs.abs().max()))


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("weights", ["unit", "real"])
def test_lower_precisions_are_as_near_as_their_digits(dtype, close, weights):
    tree, x = weighted(700, "random", weights), field(700, 3).to(dtype)
    for name in ("e^-x", "1 / (1 + x)", "e^-x^2", "cos x"):
        f = FUNCTIONS[name]
        wanted = integrate_reference(tree, x.double(), f)
        found = integrate(tree, x, f)
        assert found.dtype == dtype
        assert float((found - wanted).norm() / wanted.norm()) < close, name


def test_a_lattice_takes_values_in_place_of_a_function():
    tree, x = weighted(300, "random", "rational"), field(300, 2)
    f = FUNCTIONS["any"]
    values = f(lattice(tree, x))
    torch.testing.assert_close(integrate_lattice(tree, x, values), integrate_reference(tree, x, f))


def test_a_lattice_that_is_too_fine_is_not_used():
    weights = torch.full((59,), 3.0, dtype=torch.float64)
    weights[0] = 1e9
    for nodes in (5, 60):
        tree, x = integrator_tree(some_tree(nodes, "path"), weights[: nodes - 1]), field(nodes)
        f = FUNCTIONS["any"]
        torch.testing.assert_close(integrate(tree, x, f), integrate_reference(tree, x, f), rtol=1e-6, atol=1e-6)


def test_a_field_on_some_nodes_is_zero_on_the_others():
    metric = graph_distances(grid_edges((4, 5)), nodes=20)
    tree = integrator_tree(*random_tree_metric(metric, seed=0))
    assert tree.nodes > 20
    x = field(20, 2)
    f = FUNCTIONS["1 / (1 + x)"]
    torch.testing.assert_close(integrate(tree, x, f), f(tree.distances()[:20, :20]) @ x)


def test_a_learned_function_brings_tree_distances_nearer_to_the_graphs():
    """Graph distances by f(tree distances) with a rational f, fitted by its coefficients."""
    edges = grid_edges((6, 6))
    tree = integrator_tree(edges[spanning_tree(edges, nodes=36)])
    wanted, apart = graph_distances(edges, nodes=36), tree.distances()
    p, q = number(0.0, 1.0).requires_grad_(), number(1.0, 0.1).requires_grad_()
    optimizer = torch.optim.Adam([p, q], lr=0.03)
    losses = []
    for _ in range(150):
        loss = (Rational(p, q)(apart) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * float((apart - wanted).square().mean())
    x = field(36)
    torch.testing.assert_close(
        integrate(tree, x, Rational(p, q), method="panels"), integrate_reference(tree, x, Rational(p, q))
    )


def test_what_does_not_fit_is_refused():
    tree = weighted(50, "random", "real")
    with pytest.raises(FormwrightError, match="rows"):
        integrate(tree, field(51), FUNCTIONS["1"])
    with pytest.raises(FormwrightError, match="lattice"):
        integrate(tree, field(50), FUNCTIONS["1"], method="lattice")
    with pytest.raises(FormwrightError, match="separable"):
        integrate(tree, field(50), torch.exp, method="separable")
    with pytest.raises(FormwrightError, match="infinite"):
        integrate(tree, field(50), Rational(number([1.0]), number(-0.5, 1.0)), method="panels")
