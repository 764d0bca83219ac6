"""Topological masks: attention fades with the distance in a tree that spans the image, by three numbers a layer.

Paper    Choromanski et al.: Fast Tree-Field Integrators: From Low Displacement Rank to Topological Transformers
         (NeurIPS 2024), arXiv:2406.15881.
Idea     Every attention weight is multiplied by f(dist(i, j)), the distance along a spanning tree of the grid on which
         the tokens lie, before the weights of a query are divided by their sum:

             A_ij = kernel(q_i, k_j) f(dist(i, j)) / sum_j kernel(q_i, k_j) f(dist(i, j))

             f(x) = exp(x (a_1 + a_2 x/R + a_3 (x/R)^2))          a = 0 at first: f = 1, no mask

         With softmax attention log f is a bias on the scores (this file). With kernels the mask costs no n x n array:
         parts/mixing/ftfi.py.
Differs  The paper's polynomial is a_0 + a_1 x + a_2 x^2; a_0 cancels in the division and would never learn, so that the
         third number goes to x^3. R = 32 steps only sets the pace at which the numbers learn. All steps between
         neighbours are 1, so that every spanning tree is a minimum one; the first is Kruskal's in row order. Several
         trees, whose masks are averaged, are our extension: neighbours that one parts, another joins. A sequence is
         a grid of one axis and its own tree. Only g = exp of the paper's outer functions is here.
"""

import functools
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formwright.contracts import Context, Toeplitz, refuse
from formwright.errors import FormwrightError
from formwright.ops.trees import IntegratorTree, grid_edges, integrator_tree, spanning_tree
from formwright.parts.position import by_distance


class TopologicalMask(nn.Module):
    """A mask by distance in spanning trees of the grid. Three parameters a layer, or a head; no largest grid.

    Args:
        heads: attention heads.
        trees: spanning trees over which the mask is averaged; the second and later ones are random, the same for all.
        per_head: whether every head has its own three numbers.
        reach: R, the distance in steps at which all three numbers weigh the same.
    """

    scope = "layer"

    def __init__(self, *, heads: int, trees: int = 1, per_head: bool = False, reach: float = 32.0) -> None:
        super().__init__()
        if heads < 1 or trees < 1 or reach <= 0:
            raise FormwrightError(
                f"A topological mask needs heads and trees from 1 and reach above 0, got heads={heads}, trees={trees} "
                f"and reach={reach}."
            )
        self.trees, self.reach = trees, reach
        self.a = nn.Parameter(torch.empty(3, heads) if per_head else torch.empty(3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.a)

    def log_mask(self, distance: Tensor) -> Float[Tensor, "h ..."]:
        """log f in fp32 (fp64 for fp64 parameters), one row for all heads or one for each."""
        dtype = torch.promote_types(self.a.dtype, torch.float32)
        a1, a2, a3 = (a.reshape(-1, *[1] * distance.ndim) for a in self.a.to(dtype))
        x = distance.to(dtype)
        share = x / self.reach
        return x * (a1 + share * (a2 + share * a3))

    def bias(self, context: Context) -> Toeplitz | Float[Tensor, "b h {context.queries} {context.keys}"]:
        """log f of all pairs: diagonals on a sequence, an array on a grid.

        Raises:
            UnsupportedContext: cross-attention, or more or fewer tokens than the grid has cells without positions.
        """
        refuse_a_memory("A topological mask", context)
        if context.grid is None:
            return by_distance(context, lambda lags: self.log_mask(lags.abs()))
        check_cells("A topological mask", context)
        logs = self.log_mask(grid_distances(context.grid, self.trees).to(context.device))  # (h, t, n, n)
        mean = (logs.logsumexp(1) - torch.tensor(float(self.trees)).log().to(logs))[None]
        if context.positions is None:
            return mean[:, :, -context.queries :]
        rows, columns = context.query_positions()[:, :, None], context.positions[:, None, :]
        return mean[0][:, rows, columns].movedim(0, 1)


def refuse_a_memory(part: str, context: Context) -> None:
    if context.memory is not None:
        raise refuse(
            part,
            asked="cross-attention",
            because="it knows the distance between two places of one grid or sequence and no other",
            instead="Choose a position whose card lists it: formwright list --kind position.",
        )


def check_cells(part: str, context: Context) -> None:
    """Every token needs a cell: by its place in the row, or by its position, which counts the cells row by row.

    Raises:
        UnsupportedContext: the tokens do not fit the grid.
    """
    assert context.grid is not None
    cells = math.prod(context.grid)
    if context.positions is None:
        fits = context.keys == cells
    else:
        fits = torch.compiler.is_compiling() or int(context.positions.max()) < cells
    if not fits:
        raise refuse(
            part,
            asked=f"{context.keys} tokens on a grid of {context.grid}",
            because="every token needs a cell of its own",
            instead="Leave out extra tokens such as a class token (pooling='mean'), or give positions on the grid.",
        )


@functools.lru_cache(maxsize=64)
def grid_trees(grid: tuple[int, ...], trees: int) -> tuple[IntegratorTree, ...]:
    """Spanning trees of a grid: Kruskal's in row order, then random ones. A line has one."""
    edges, nodes = grid_edges(grid), math.prod(grid)
    seeds = [None, *range(1, trees)] if sum(size > 1 for size in grid) > 1 else [None]
    return tuple(integrator_tree(edges[spanning_tree(edges, nodes=nodes, seed=seed)]) for seed in seeds)


@torch.compiler.assume_constant_result
@functools.lru_cache(maxsize=16)
def grid_distances(grid: tuple[int, ...], trees: int) -> Float[Tensor, "t n n"]:
    """Steps between all cells in each tree."""
    return torch.stack([tree.distances() for tree in grid_trees(grid, trees)])
