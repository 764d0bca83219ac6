"""The block-sparse product: its integers are those of a dense product, in every form and at every size."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.ops import block_sparse as ops

SIZES = [(4, 3, 1), (8, 5, 3), (20, 33, 70), (64, 40, 64), (36, 300, 129)]  # outputs, inputs, tokens
needs_kernel = pytest.mark.skipif(ops.kernel() is None, reason="the kernels are not built")


def weight(outputs: int, inputs: int, share: float = 0.7) -> Tensor:
    whole = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    return whole * (torch.rand(outputs // 4, inputs) >= share).repeat_interleave(4, 0)


def matrix(w: Tensor, zero: int) -> ops.Matrix:
    rows = len(w)
    return ops.Matrix(
        packed=ops.pack(w),
        factors=0.01 * torch.rand(rows),
        offsets=zero * w.sum(1, dtype=torch.int32),
        bias=torch.randn(rows),
        inputs=w.shape[1],
    )


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("size", SIZES)
def test_packing_is_undone_by_unpacking_and_stores_only_blocks_that_hold_something(size, share) -> None:
    torch.manual_seed(0)
    w = weight(*size[:2], share)
    packed = ops.pack(w)
    assert torch.equal(ops.unpack(packed, size[1]), w)
    held = int(w.unflatten(0, (-1, 4)).any(1).sum())
    assert (len(packed.columns), len(packed.values)) == (held, 4 * held)


def test_a_column_beyond_15_bits_is_found_again() -> None:
    w = torch.zeros(4, 60_000, dtype=torch.int8)
    w[:, 59_999] = torch.tensor([1, 2, 3, -4])
    assert torch.equal(ops.unpack(ops.pack(w), 60_000), w)
    x = torch.zeros(2, 60_000, dtype=torch.uint8)
    x[1, 59_999] = 200
    assert ops.product_reference(x, ops.pack(w))[1].tolist() == [200, 400, 600, -800]
    if ops.kernel() is not None:
        panels, _ = ops.to_panels(x.float(), 1.0, 0)
        assert ops.integers(panels, matrix(w, 0))[1].tolist() == [200, 400, 600, -800]


@needs_kernel
@pytest.mark.reference
@pytest.mark.parametrize("share", [0.0, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("size", SIZES)
def test_all_products_give_the_same_integers(size, share) -> None:
    torch.manual_seed(1)
    w, zero = weight(*size[:2], share), 77
    x = 3 * torch.randn(size[2], size[1])
    codes = ops.quantise(x, 0.03, zero)
    wanted = codes.long() @ w.T.long()
    assert torch.equal(ops.product_reference(codes, ops.pack(w)).long(), wanted)
    assert torch.equal(ops.dense_product(codes, w).long(), wanted)
    panels, _ = ops.to_panels(x, 0.03, zero)
    # the zero point is taken off with the sums of the stored blocks: as if it had been taken off every input
    assert torch.equal(ops.integers(panels, matrix(w, zero)).long(), (codes.long() - zero) @ w.T.long())


@needs_kernel
def test_the_largest_products_do_not_saturate() -> None:
    w = torch.full((4, 4096), -127, dtype=torch.int8)
    panels, _ = ops.to_panels(torch.full((3, 4096), 255.0), 1.0, 0)
    assert (ops.integers(panels, matrix(w, 0)) == -127 * 255 * 4096).all()


@needs_kernel
@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65])
def test_panels_hold_every_number_once(tokens: int) -> None:
    x = torch.randn(tokens, 21)
    panels, kept = ops.to_panels(x, 0.02, 128, keep=True)
    assert torch.equal(ops.from_panels(kept), x)
    assert panels.values.shape == (-(-tokens // 64), 21, 64)
    ours, theirs = panels.values.sum().item(), ops.quantise(x, 0.02, 128).sum().item()
    assert ours == theirs + 128 * 21 * (64 * len(panels.values) - tokens)


@needs_kernel
@pytest.mark.parametrize("activation", ops.KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_bias_activation_and_bytes_are_fused_in(size, activation) -> None:
    torch.manual_seed(2)
    one = matrix(weight(*size[:2]), 90)
    x = torch.randn(size[2], size[1])
    panels, _ = ops.to_panels(x, 0.02, 90)
    real = ops.integers(panels, one) * one.factors + one.bias
    applied = {"relu": F.relu, "gelu": F.gelu, "gelu-tanh": lambda v: F.gelu(v, approximate="tanh")}
    wanted = applied.get(activation, lambda v: v)(real)
    torch.testing.assert_close(ops.floats(panels, one, activation), wanted, atol=1e-5, rtol=1e-5)
    made = ops.requantised(panels, one, activation, 0.05, 40)
    read = ops.integers(made, matrix(torch.eye(size[0], dtype=torch.int8), 0))  # the bytes themselves
    apart = (read - ops.quantise(wanted, 0.05, 40).int()).abs()
    assert apart.max() <= 1
    assert apart.float().mean() < 0.01


@needs_kernel
@pytest.mark.reference
@pytest.mark.parametrize("size", SIZES)
def test_norm_in_columns_is_layer_norm(size) -> None:
    torch.manual_seed(3)
    one = matrix(weight(*size[:2]), 128)
    norm = nn.LayerNorm(size[0], eps=1e-12)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    panels, _ = ops.to_panels(torch.randn(size[2], size[1]), 0.02, 128)
    before = 2 * torch.randn(size[2], size[0]) + 5
    _, residual = ops.to_panels(before, 1.0, 0, keep=True)
    with torch.no_grad():
        wanted = norm(before + ops.floats(panels, one))
        made = ops.add_and_normalise(panels, one, residual, norm, (0.04, 120))
    torch.testing.assert_close(ops.from_panels(residual), wanted, atol=1e-5, rtol=1e-4)
    read = ops.integers(made, matrix(torch.eye(size[0], dtype=torch.int8), 0))
    assert (read - ops.quantise(wanted, 0.04, 120).int()).abs().max() <= 1
    with torch.no_grad():
        assert ops.add_and_normalise(panels, one, residual, norm, None) is None


@needs_kernel
def test_threads_change_nothing() -> None:
    torch.manual_seed(4)
    one = matrix(weight(100, 60), 100)
    panels, _ = ops.to_panels(torch.randn(40, 60), 0.02, 100)
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(ops.floats(panels, one))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
