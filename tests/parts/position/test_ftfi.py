"""Topological masks: exact properties, then masked attention as it is written, with all pairs."""

import math

import pytest
import torch

from formwright.contracts import Context, Toeplitz, UnsupportedContext
from formwright.errors import FormwrightError
from formwright.models.transformer import TransformerConfig, TransformerForImageClassification
from formwright.ops.trees import grid_edges, spanning_tree
from formwright.parts.attention.softmax import SoftmaxAttention
from formwright.parts.mixing.ftfi import TopologicalAttention
from formwright.parts.mixing.multihead import MultiHeadAttention
from formwright.parts.position.ftfi import TopologicalMask

A = [[-0.3, 0.1, 0.2], [0.2, -0.4, -0.1]]
GRIDS = [(5, 7), (8, 8), (2, 3, 4), (40,)]


def mask(per_head=False, trees=1, reach=32.0):
    part = TopologicalMask(heads=2, trees=trees, per_head=per_head, reach=reach)
    a = torch.tensor(A).T if per_head else torch.tensor(A[0])
    part.load_state_dict({"a": a.contiguous()})
    return part


def walk(grid, seed=None):
    """Steps between all cells along the spanning tree, by breadth-first walks."""
    edges = grid_edges(grid)
    nodes = math.prod(grid)
    near = [[] for _ in range(nodes)]
    for a, b in edges[spanning_tree(edges, nodes=nodes, seed=seed)].tolist():
        near[a].append(b)
        near[b].append(a)
    steps = torch.zeros(nodes, nodes, dtype=torch.float64)
    for start in range(nodes):
        seen, now, far = {start}, [start], 0
        while now:
            steps[start, now] = far
            now, far = [b for a in now for b in near[a] if b not in seen and not seen.add(b)], far + 1
    return steps


def by_hand(a, distance, reach=32.0):
    share = distance / reach
    return torch.exp(distance * (a[0] + a[1] * share + a[2] * share**2))


@pytest.mark.parametrize("grid", GRIDS)
def test_the_bias_is_the_logarithm_of_the_mask(grid):
    n = math.prod(grid)
    bias = mask().bias(Context(queries=n, keys=n, grid=grid))
    torch.testing.assert_close(bias[0, 0], by_hand(A[0], walk(grid)).log().float(), rtol=1e-4, atol=1e-5)
    both = mask(per_head=True).bias(Context(queries=n, keys=n, grid=grid))
    for head in range(2):
        torch.testing.assert_close(both[0, head], by_hand(A[head], walk(grid)).log().float(), rtol=1e-4, atol=1e-5)


def test_masks_of_several_trees_are_averaged():
    n, grid = 30, (5, 6)
    bias = mask(trees=3).bias(Context(queries=n, keys=n, grid=grid))
    wanted = torch.stack([by_hand(A[0], walk(grid, seed)) for seed in (None, 1, 2)]).mean(0)
    torch.testing.assert_close(bias[0, 0].exp(), wanted.float(), rtol=1e-4, atol=1e-5)


def test_a_sequence_is_its_own_tree():
    bias = mask().bias(Context(queries=3, keys=9))
    assert isinstance(bias, Toeplitz)
    distance = (torch.arange(6, 9)[:, None] - torch.arange(9)).abs().double()
    torch.testing.assert_close(bias.dense()[0], by_hand(A[0], distance).log().float(), rtol=1e-4, atol=1e-5)


def test_positions_choose_cells():
    grid, kept = (4, 5), torch.tensor([[0, 3, 11, 19], [7, 8, 9, 10]])
    whole = mask(per_head=True).bias(Context(queries=20, keys=20, grid=grid))
    some = mask(per_head=True).bias(Context(queries=2, keys=4, grid=grid, positions=kept))
    for row, cells in enumerate(kept):
        torch.testing.assert_close(some[row], whole[0][:, cells[-2:, None], cells])


def test_it_starts_as_no_mask():
    assert (TopologicalMask(heads=2).bias(Context(queries=9, keys=9, grid=(3, 3))) == 0).all()


def attention(**options):
    torch.manual_seed(0)
    part = TopologicalAttention(dim=8, heads=2, **options)
    if part.mask is not None:
        a = torch.tensor(A).T if options.get("per_head") else torch.tensor(A[0])
        with torch.no_grad():
            part.mask.a.copy_(a)
    return part.double()


PHI = {
    "relu": lambda x: x.relu() + 1e-3,
    "elu": lambda x: torch.where(x > 0, x + 1, x.exp()),
    "exp": torch.exp,
}


def written_out(part, x, distances, features, padding=None):
    """All pairs, one head at a time."""
    width, heads = part.head_dim, part.heads
    q, k, v = part.query_key_value(x).chunk(3, -1)
    mixed = []
    for head in range(heads):
        here = slice(head * width, (head + 1) * width)
        kernel = PHI[features](q[..., here] * width**-0.25) @ PHI[features](k[..., here] * width**-0.25).mT
        a = part.mask.a if part.mask.a.ndim == 1 else part.mask.a[:, head]
        weights = kernel * sum(by_hand(a, d) for d in distances)
        if padding is not None:
            weights = weights * padding[:, None, :]
        mixed.append(weights / weights.sum(-1, keepdim=True) @ v[..., here])
    return part.out(torch.cat(mixed, -1))


@pytest.mark.reference
@pytest.mark.parametrize("features", PHI)
@pytest.mark.parametrize("options", [{}, {"per_head": True}, {"trees": 2}], ids=str)
@pytest.mark.parametrize("grid", GRIDS)
def test_equals_masked_attention_over_all_pairs(grid, options, features):
    part, n = attention(features=features, **options), math.prod(grid)
    x = torch.randn(2, n, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seeds = [None] if len(grid) == 1 else [None, 1][: options.get("trees", 1)]
    padding = torch.rand(2, n, generator=torch.Generator().manual_seed(2)) > 0.2
    for real in (None, padding):
        found = part(x, Context.of(x, grid=grid, padding=real))
        wanted = written_out(part, x, [walk(grid, seed) for seed in seeds], features, real)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


def test_gradients_equal_those_over_all_pairs():
    part, grid = attention(per_head=True), (8, 8)
    x = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cotangent, found = torch.randn_like(x), []
    for way in (lambda y: part(y, Context.of(y, grid=grid)), lambda y: written_out(part, y, [walk(grid)], "relu")):
        part.zero_grad()
        y = x.clone().requires_grad_()
        (way(y) * cotangent).sum().backward()
        found.append([y.grad, *(p.grad.clone() for p in part.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_gradients_of_the_three_numbers_equal_finite_differences():
    part, grid = attention(), (6, 7)
    x = torch.randn(1, 42, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def out(a):
        return torch.func.functional_call(part, {"mask.a": a}, (x, Context.of(x, grid=grid)))

    assert torch.autograd.gradcheck(out, (part.mask.a,))


def test_without_a_mask_and_with_zeros_it_is_linear_attention():
    grid = (6, 6)
    masked, plain = attention(), attention(masked=False)
    plain.load_state_dict(masked.state_dict(), strict=False)
    x = torch.randn(2, 36, 8, dtype=torch.float64)
    torch.nn.init.zeros_(masked.mask.a)
    torch.testing.assert_close(masked(x, Context.of(x, grid=grid)), plain(x, Context.of(x, grid=grid)))


def test_given_cells_are_those_of_the_grid_and_rows_may_differ():
    part, grid = attention(), (4, 5)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    cells = torch.tensor([[0, 3, 4, 11, 17, 19], [19, 2, 7, 8, 1, 0]])
    distances = walk(grid)[cells[:, :, None], cells[:, None, :]]
    found = part(x, Context.of(x, grid=grid, positions=cells))
    torch.testing.assert_close(found, written_out(part, x, [distances], "relu"))


def test_no_array_of_all_pairs_is_made():
    """Memory alive in a training step of 4,096 tokens, against the n x n array alone."""
    from formwright.conformance.growth import cost

    torch.manual_seed(0)
    part, x = TopologicalAttention(dim=8, heads=2), torch.randn(1, 4096, 8)
    context = Context.of(x, grid=(64, 64))
    part(x, context)  # the tree is halved before
    _, bytes_alive = cost(lambda: part(x, context), x, *part.parameters())
    assert bytes_alive < 4096 * 4096 * 4 / 2


def test_softmax_attention_takes_the_mask():
    torch.manual_seed(0)
    part = MultiHeadAttention(dim=8, heads=2, attention=SoftmaxAttention(), position=mask()).double()
    x = torch.randn(2, 20, 8, dtype=torch.float64)
    q, k, v = part._projected(x, Context.of(x))
    weights = (q @ k.mT / 2).exp() * by_hand(torch.tensor(A[0]).double(), walk((4, 5)))
    wanted = part.out((weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(part(x, Context.of(x, grid=(4, 5))), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "parts", [{"mixer": "topological-attention"}, {"mixer": "softmax", "position": "topological-mask(per_head=true)"}]
)
def test_in_an_image_classifier_every_layer_has_its_own_numbers(parts):
    config = TransformerConfig(
        architecture="encoder",
        image_size=8,
        patch_size=2,
        use_grid=True,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        **{"position": "none"} | parts,
    )
    model = TransformerForImageClassification(config)
    numbers = [parameter for name, parameter in model.named_parameters() if name.endswith(".a")]
    assert [parameter.numel() for parameter in numbers] == ([3, 3] if parts["mixer"] != "softmax" else [6, 6])
    model(pixel_values=torch.randn(3, 3, 8, 8), labels=torch.tensor([0, 1, 0])).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in numbers)


@pytest.mark.parametrize(
    ("context", "says"),
    [
        ({"queries": 4, "keys": 4, "grid": (3, 3)}, "cell"),
        ({"queries": 2, "keys": 2, "grid": (1, 2), "positions": torch.tensor([[0, 2]])}, "cell"),
        ({"queries": 4, "keys": 4, "memory": torch.zeros(1, 4, 8)}, "cross"),
    ],
)
def test_what_it_cannot_honour_raises(context, says):
    with pytest.raises(UnsupportedContext, match=says):
        mask().bias(Context(**context))


def test_impossible_options_are_named():
    for options in ({"heads": 0}, {"heads": 2, "trees": 0}, {"heads": 2, "reach": 0.0}):
        with pytest.raises(FormwrightError, match="from 1"):
            TopologicalMask(**options)
    with pytest.raises(FormwrightError, match="split"):
        TopologicalAttention(dim=7, heads=2)
