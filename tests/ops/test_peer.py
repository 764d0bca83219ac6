"""Chosen rows and product keys: kernel and PyTorch path against dense arrays, with every gradient."""

import jaxtyping
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from formwright.ops import native
from formwright.ops import peer as ops
from formwright.ops.peer import row_dots, row_scatter, row_sums, search, top_pairs_reference

needs_native = pytest.mark.skipif(native.library() is None, reason=f"The native kernels are {native.describe()}.")
SIZES = [(1, 1, 1, 1), (2, 9, 3, 5), (7, 5, 6, 33), (33, 300, 4, 64), (5, 2, 17, 40)]  # tokens, rows, chosen, width


@pytest.fixture(params=[pytest.param("native", marks=needs_native), "torch"])
def way(request, monkeypatch):
    if request.param == "torch":
        for kernel in ("DOTS", "SUMS", "SCATTER", "TOP_PAIRS"):
            monkeypatch.setattr(ops, kernel, None)
        monkeypatch.setattr(ops, "GATHERED", 200)  # several pieces
    return request.param


@pytest.fixture
def untyped(monkeypatch):
    """No shape checks: they wrap functions in code that dynamo cannot trace."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def inputs(tokens, rows, chosen, width, dtype=torch.float32):
    g = torch.Generator().manual_seed(tokens)
    x, w, table = (
        torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
        for shape in ((tokens, width), (tokens, chosen), (rows, width))
    )
    return x, w, table, torch.randint(rows, (tokens, chosen), generator=g)


def close(ours, theirs, tolerance=1e-5):
    for our, their in zip(ours, theirs, strict=True):
        assert (our.double() - their).abs().max() <= tolerance * their.abs().max().clamp(min=1e-3)


def all_of(function, *leaves):
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    y = function(*leaves)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, g)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("way")
def test_values_and_gradients_are_those_of_gathered_rows(size, dtype):
    x, w, table, index = inputs(*size, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    ours = all_of(lambda x, table: row_dots(x, table, index), x, table)
    theirs = all_of(lambda x, table: (table[index] * x[:, None]).sum(-1), x.double(), table.double())
    close(ours, theirs, tolerance)
    ours = all_of(lambda w, table: row_sums(w, table, index), w, table)
    theirs = all_of(lambda w, table: (table[index] * w[..., None]).sum(1), w.double(), table.double())
    close(ours, theirs, tolerance)

    def scattered(w, x):
        return x.new_zeros(len(table), x.shape[1]).index_add(
            0, index.flatten(), (w[..., None] * x[:, None]).flatten(0, 1)
        )

    ours = all_of(lambda w, x: row_scatter(w, x, index, len(table)), w, x)
    close(ours, all_of(scattered, w.double(), x.double()), tolerance)


@pytest.mark.usefixtures("way")
def test_tables_in_bfloat16_are_read_as_they_are():
    x, w, table, index = inputs(7, 9, 6, 33)
    half = table.bfloat16()
    found = [
        (row_dots(x, half, index), row_dots(x, half.float(), index)),
        (row_sums(w, half, index), row_sums(w, half.float(), index)),
    ]
    for ours, theirs in found:
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    half.requires_grad_()
    (gradient,) = torch.autograd.grad(row_dots(x, half, index).sum(), half)
    assert gradient.dtype == torch.bfloat16


@pytest.mark.usefixtures("way")
def test_a_gradient_is_nought_on_rows_that_nobody_chose():
    x, w, table, index = inputs(3, 300, 4, 5)
    table.requires_grad_()
    (row_dots(x, table, index).sum() + row_sums(w, table, index).sum()).backward()
    reached = torch.zeros(300, dtype=torch.bool).index_fill(0, index.flatten(), True)
    assert torch.equal(table.grad.any(1), reached)


@pytest.mark.usefixtures("way")
def test_second_gradients_hold():
    x, w, table, index = inputs(3, 4, 2, 3, dtype=torch.float64)
    for leaf in (x, w, table):
        leaf.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, table: row_dots(x, table, index), (x, table))
    assert torch.autograd.gradgradcheck(lambda w, table: row_sums(w, table, index), (w, table))


@pytest.mark.usefixtures("way")
def test_strided_inputs_and_no_tokens():
    x, w, table, index = inputs(8, 9, 4, 10)
    wide = torch.stack((x, x), -1)[..., 0]
    assert not wide.is_contiguous()
    torch.testing.assert_close(row_dots(wide, table.T.contiguous().T, index), row_dots(x, table, index))
    assert row_dots(x[:0], table, index[:0]).shape == (0, 4)
    assert row_sums(w[:0], table, index[:0]).shape == (0, 10)
    assert torch.equal(row_scatter(w[:0], x[:0], index[:0], 9), torch.zeros(9, 10))


@pytest.mark.usefixtures("way")
def test_threads_share_the_work():
    threads = torch.get_num_threads()
    x, w, table, index = inputs(33, 300, 4, 64)
    alone = row_dots(x, table, index), row_sums(w, table, index), row_scatter(w, x, index, 300)
    try:
        torch.set_num_threads(2)
        both = row_dots(x, table, index), row_sums(w, table, index), row_scatter(w, x, index, 300)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(alone, both, rtol=0, atol=0)


@pytest.mark.parametrize(("n", "k"), [(32, 16), (32, 1), (5, 25), (5, 7), (1, 1), (40, 33)])
@pytest.mark.usefixtures("way")
def test_product_keys_find_what_all_keys_would(n, k):
    g = torch.Generator().manual_seed(n)
    q, keys = torch.randn(63, 2, 6, generator=g), torch.randn(2, n, 6, generator=g)
    whole = torch.cat((keys[0].repeat_interleave(n, 0), keys[1].repeat(n, 1)), 1)  # key i n + j is [c_i; c'_j]
    scores = q.flatten(1).double() @ whole.T.double()
    found = search(q, keys, k)
    assert found.shape == (63, k)
    assert torch.equal(found.sort(-1).values, scores.topk(k).indices.sort(-1).values)
    assert (scores.gather(1, found).diff(dim=-1) <= 1e-5).all()


@pytest.mark.usefixtures("way")
def test_a_search_in_pieces_is_the_search(monkeypatch):
    q, keys = torch.randn(63, 2, 6), torch.randn(2, 32, 6)
    whole = search(q, keys, 16)
    monkeypatch.setattr(ops, "SCORES", 32 * 10)
    assert torch.equal(search(q, keys, 16), whole)
    assert search(q[:0], keys, 16).shape == (0, 16)


@pytest.mark.usefixtures("way")
def test_what_is_no_number_still_gives_valid_places():
    a = torch.full((3, 40), torch.nan)
    found = ops._top_pairs(a, a, 16)
    assert ((found >= 0) & (found < 1600)).all()


@needs_native
def test_kernel_and_sorting_agree_in_order():
    a, b = torch.randn(2, 500, 100, generator=torch.Generator().manual_seed(0)).unbind()
    assert torch.equal(ops._top_pairs(a, b, 16), top_pairs_reference(a, b, 16))


def test_work_is_counted():
    x, _, table, index = inputs(7, 9, 6, 33)
    with FlopCounterMode(display=False) as counter:
        row_sums(row_dots(x, table, index), table, index)
    assert counter.get_total_flops() == 2 * 2 * 7 * 6 * 33


@pytest.mark.usefixtures("untyped", "way")
def test_operators_keep_their_promises_to_the_compiler():
    x, w, table, index = inputs(7, 9, 6, 33)
    x.requires_grad_(), w.requires_grad_(), table.requires_grad_()
    torch.library.opcheck(ops._dots, (x, table, index))
    torch.library.opcheck(ops._sums, (w, table, index))
    torch.library.opcheck(ops._scatter, (w, x, index, 9))
    torch.library.opcheck(ops._top_pairs, (torch.randn(7, 9), torch.randn(7, 9), 4))
