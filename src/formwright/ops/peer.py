"""Rows chosen from large tables by index, and the search for them by product keys.

Paper    He: Mixture of A Million Experts (2024), arXiv:2407.04153; Lample et al.: Large Memory Layers with Product Keys
         (NeurIPS 2019), arXiv:1907.05242.

             row_dots      out[t, j] = x[t] . table[index[t, j]]
             row_sums      out[t]    = sum over j of w[t, j] table[index[t, j]]
             row_scatter   out[r]    = sum over the (t, j) with index[t, j] = r of w[t, j] x[t]
             search        the k keys [c_i; c'_j] with the largest product with q, of n^2, from 2 n products

         The gradients of the first three are made of the first three. No array of tokens x chosen x width is stored: a
         C++ kernel reads each row where it lies (CPU, float32, tables in bfloat16 too), elsewhere PyTorch gathers the
         rows of a few tokens at a time.

         Of two falling lists, a_i + b_j has (i + 1)(j + 1) - 1 sums before it that are no smaller: the k largest are
         among the about k ln k with (i + 1)(j + 1) <= k.
"""

import functools
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from formwright.ops import native
from formwright.ops.linear import linear

GATHERED = 2**22  # numbers that the PyTorch path gathers at a time
SCORES = 2**20  # products of queries and sub-keys at a time, for each of the two halves
DOTS = native.function("formwright_row_dots", tensors=4, numbers=5)
SUMS = native.function("formwright_row_sums", tensors=4, numbers=5)
SCATTER = native.function("formwright_row_scatter", tensors=4, numbers=5)
TOP_PAIRS = native.function("formwright_top_pairs", tensors=3, numbers=4)


def row_dots(x: Float[Tensor, "t d"], table: Float[Tensor, "r d"], index: Int[Tensor, "t m"]) -> Float[Tensor, "t m"]:
    """The products of every token with the rows chosen for it.

    Args:
        x: float32 or float64.
        table: of any floating dtype; products and sums are taken in that of x.
    """
    return _dots(x, table, index)


def row_sums(w: Float[Tensor, "t m"], table: Float[Tensor, "r d"], index: Int[Tensor, "t m"]) -> Float[Tensor, "t d"]:
    """The weighted sum of the rows chosen for every token.

    Args:
        w: float32 or float64.
        table: of any floating dtype; products and sums are taken in that of w.
    """
    return _sums(w, table, index)


def row_scatter(
    w: Float[Tensor, "t m"], x: Float[Tensor, "t d"], index: Int[Tensor, "t m"], rows: int
) -> Float[Tensor, "rows d"]:
    """For every row the weighted sum of the tokens that it was chosen for, 0 where there is none.

    Args:
        rows: how many there are.
    """
    return _scatter(w, x, index, rows)


@torch.no_grad()
def search(q: Float[Tensor, "r 2 c"], keys: Float[Tensor, "2 n c"], k: int) -> Int[Tensor, "r {k}"]:
    """Of the n^2 keys [keys[0, i]; keys[1, j]] the k with the largest products, as i n + j, the largest first.

    Args:
        q: queries, a half for each half of the keys.
        k: from 1 to n^2.
    """
    step = max(1, SCORES // keys.shape[1])
    parts = [q] if torch.compiler.is_compiling() or len(q) <= step else q.split(step)
    found = [_top_pairs(linear(part[:, 0], keys[0]), linear(part[:, 1], keys[1]), k) for part in parts]
    return found[0] if len(found) == 1 else torch.cat(found)


def served(kernel: Any, *tensors: Tensor, table: Tensor | None = None) -> bool:
    """Whether the kernel is there and takes these."""
    return (
        kernel is not None
        and all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)
        and (table is None or (table.device.type == "cpu" and table.dtype in (torch.float32, torch.bfloat16)))
    )


def _few(tokens: int, numbers: int) -> int:
    """So many tokens at a time that each gathers `numbers`."""
    return max(1, min(tokens, GATHERED // max(1, numbers)))


def row_dots_reference(x: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """The rows of a few tokens at a time, gathered."""
    few = _few(len(x), index.shape[1] * x.shape[1])
    parts = zip(x.split(few), index.split(few), strict=True)
    return torch.cat([(table[i].to(x.dtype) @ one[..., None])[..., 0] for one, i in parts])


def row_sums_reference(w: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """The rows of a few tokens at a time, gathered."""
    few = _few(len(w), index.shape[1] * table.shape[1])
    parts = zip(w.split(few), index.split(few), strict=True)
    return torch.cat([(one[:, None] @ table[i].to(w.dtype))[:, 0] for one, i in parts])


def row_scatter_reference(w: Tensor, x: Tensor, index: Tensor, rows: int) -> Tensor:
    """The products of a few tokens at a time, added to their rows."""
    out = x.new_zeros(rows, x.shape[1])
    few = _few(len(x), index.shape[1] * x.shape[1])
    for weights, one, i in zip(w.split(few), x.split(few), index.split(few), strict=True):
        out.index_add_(0, i.flatten(), (weights[..., None] * one[:, None]).flatten(0, 1))
    return out


@functools.lru_cache(maxsize=64)
def _candidates(n: int, k: int) -> tuple[list[int], list[int]]:
    """The i and j with (i + 1)(j + 1) <= k, both below n."""
    pairs = [(i, j) for i in range(min(k, n)) for j in range(min(k // (i + 1), n))]
    return [i for i, _ in pairs], [j for _, j in pairs]


def top_pairs_reference(a: Tensor, b: Tensor, k: int) -> Tensor:
    """By sorting."""
    n = a.shape[1]
    (left, i), (right, j) = a.topk(min(k, n)), b.topk(min(k, n))
    p, q = (torch.tensor(places, device=a.device) for places in _candidates(n, k))
    best = (left[:, p] + right[:, q]).topk(k).indices
    return i.gather(1, p[best]) * n + j.gather(1, q[best])


def _run(kernel: Any, out: Tensor, inputs: tuple[Tensor, ...], *numbers: int) -> Tensor:
    inputs = tuple(x.contiguous() for x in inputs)  # named, so that copies live through the call
    if out.numel() and kernel(*(x.data_ptr() for x in (*inputs, out)), *numbers, torch.get_num_threads()):
        raise MemoryError("There was no memory to sort the chosen rows.")
    return out


@torch.library.custom_op("formwright::row_dots", mutates_args=())
def _dots(x: Tensor, table: Tensor, index: Tensor) -> Tensor:
    if not served(DOTS, x, table=table):
        return row_dots_reference(x, table, index)
    half = table.dtype == torch.bfloat16
    return _run(DOTS, x.new_empty(index.shape), (x, table, index), *index.shape, x.shape[1], half)


@torch.library.custom_op("formwright::row_sums", mutates_args=())
def _sums(w: Tensor, table: Tensor, index: Tensor) -> Tensor:
    if not served(SUMS, w, table=table):
        return row_sums_reference(w, table, index)
    half, width = table.dtype == torch.bfloat16, table.shape[1]
    return _run(SUMS, w.new_empty(len(w), width), (w, table, index), *index.shape, width, half)


@torch.library.custom_op("formwright::row_scatter", mutates_args=())
def _scatter(w: Tensor, x: Tensor, index: Tensor, rows: int) -> Tensor:
    if not served(SCATTER, w, x):
        return row_scatter_reference(w, x, index, rows)
    return _run(SCATTER, x.new_empty(rows, x.shape[1]), (w, x, index), *index.shape, rows, x.shape[1])


@torch.library.custom_op("formwright::top_pairs", mutates_args=())
def _top_pairs(a: Tensor, b: Tensor, k: int) -> Tensor:
    if not served(TOP_PAIRS, a, b):
        return top_pairs_reference(a, b, k)
    return _run(TOP_PAIRS, a.new_empty(len(a), k, dtype=torch.long), (a, b), *a.shape, k)


@_dots.register_fake
def _(x: Tensor, table: Tensor, index: Tensor) -> Tensor:  # noqa: ARG001
    return x.new_empty(index.shape)


@_sums.register_fake
def _(w: Tensor, table: Tensor, index: Tensor) -> Tensor:  # noqa: ARG001
    return w.new_empty(w.shape[0], table.shape[1])


@_scatter.register_fake
def _(w: Tensor, x: Tensor, index: Tensor, rows: int) -> Tensor:  # noqa: ARG001
    return x.new_empty(rows, x.shape[1])


@_top_pairs.register_fake
def _(a: Tensor, b: Tensor, k: int) -> Tensor:  # noqa: ARG001
    return a.new_empty(a.shape[0], k, dtype=torch.long)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:3])


def _dots_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, table, index = ctx.saved_tensors
    to_x = _sums(grad, table, index) if ctx.needs_input_grad[0] else None
    to_table = _scatter(grad, x, index, table.shape[0]).to(table.dtype) if ctx.needs_input_grad[1] else None
    return to_x, to_table, None


def _sums_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    w, table, index = ctx.saved_tensors
    to_w = _dots(grad, table, index) if ctx.needs_input_grad[0] else None
    to_table = _scatter(w, grad, index, table.shape[0]).to(table.dtype) if ctx.needs_input_grad[1] else None
    return to_w, to_table, None


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    w, x, index = ctx.saved_tensors
    to_w = _dots(x, grad, index) if ctx.needs_input_grad[0] else None
    to_x = _sums(w, grad, index) if ctx.needs_input_grad[1] else None
    return to_w, to_x, None, None


_dots.register_autograd(_dots_backward, setup_context=_save)
_sums.register_autograd(_sums_backward, setup_context=_save)
_scatter.register_autograd(_scatter_backward, setup_context=_save)


@register_flop_formula([torch.ops.formwright.row_dots, torch.ops.formwright.row_sums])
def _flops(first: Any, table: Any, index: Any, *_: Any, **__: Any) -> int:  # noqa: ARG001
    return 2 * index[0] * index[1] * table[1]


@register_flop_formula(torch.ops.formwright.row_scatter)
def _scatter_flops(w: Any, x: Any, *_: Any, **__: Any) -> int:
    return 2 * w[0] * w[1] * x[1]
